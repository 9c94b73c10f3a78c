import re
import subprocess
import sys

import pytest
from mmengine.config import Config

import mmslak
from tests.golden import ROOT


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_version_is_setups():
    assert re.fullmatch(r'\d+\.\d+\.\d+', mmslak.__version__)


def test_import_is_light_and_mends_torchvision():
    code = 'import sys, mmslak; print([m for m in sys.modules if m.startswith("mmslak.")]);'
    code += 'import torchvision.transforms, torchvision.ops; print(torchvision.__version__)'
    loaded, version = run(code).splitlines()
    assert loaded == '[]'
    assert version[0].isdigit()


@pytest.mark.parametrize(
    'base',
    [
        'mmseg::_base_/datasets/ade20k.py',
        'mmdet::_base_/datasets/voc0712.py',
        'mmpretrain::_base_/default_runtime.py',
    ],
)
def test_bases_of_the_libraries_resolve(tmp_path, base):
    (tmp_path / 'config.py').write_text(f'_base_ = [{base!r}]\n')
    assert len(Config.fromfile(str(tmp_path / 'config.py'))) > 3


@pytest.mark.parametrize('name', ['upernet_slak_t_ade20k', 'demo/slak_digits'])
@pytest.mark.parametrize('suffix', ['', '.py'])
def test_own_configs_have_names(tmp_path, name, suffix):
    cfg = Config.fromfile(f'mmslak::{name}{suffix}')
    assert cfg.model.backbone.type == 'mmslak.SLaK'
    (tmp_path / 'config.py').write_text(f'_base_ = {f"mmslak::{name}{suffix}"!r}\n')
    assert Config.fromfile(tmp_path / 'config.py').to_dict() == cfg.to_dict()


def test_a_config_type_imports_the_package():
    code = (
        'from mmengine.registry import MODELS\n'
        'model = MODELS.build(dict(type="mmslak.SLaK", arch=dict(depths=[1], dims=[8]), '
        'kernel_sizes=[7], out_indices=[0]))\n'
        'print(type(model).__name__)'
    )
    assert run(code).splitlines()[-1] == 'SLaK'
