"""The wheel: it holds what a user needs, and works without the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from mmslak.checkpoints.released import RELEASED
from mmslak.ops.plans import write_table
from tests import miniatures
from tests.cli.test_train_and_test import SMALL
from tests.golden import ROOT

CONFIG = 'mmslak::upernet_slak_t_ade20k'
MODEL_OPTIONS = [option for option in SMALL if option.startswith('model.')]
# In one process: most of the time is imports.
COMMANDS = f"""
import mmslak
from mmengine.hub import get_config
from mmslak.__main__ import main
for argv in {{}}:
    assert main(argv) == 0, argv
print(mmslak.__file__)
print(get_config('{CONFIG}.py', pretrained=True).model_path)
"""
SCRIPTS = {'dist_train.sh', 'dist_test.sh', 'slurm_train.sh'}


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    options = ['--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', folder]
    run('-m', 'pip', 'wheel', *options, '.', cwd=source)
    (wheel,) = folder.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A copy of what is built from: building leaves files beside it."""
    folder = tmp_path_factory.mktemp('source')
    for name in ('mmslak', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'model-index.yml'):
        shutil.copy(ROOT / name, folder)
    tables = folder / 'mmslak/ops/tables'
    tables.mkdir(exist_ok=True)
    write_table(tables / 'example.json', dict(device='an example'), {})
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> dict:
    """Where and how to run, so that mmslak is the wheel's, and all else this environment's."""
    site = tmp_path_factory.mktemp('site')
    run('-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel, cwd=site)
    return dict(cwd=tmp_path_factory.mktemp('elsewhere'), PYTHONPATH=str(site))


def test_wheel_holds_configs_tools_index_and_licence(wheel):
    names = set(ZipFile(wheel).namelist())
    configs = {path for path in (ROOT / 'configs').rglob('*') if path.is_file()}
    configs = {path for path in configs if '__pycache__' not in path.parts}
    assert len(configs) > 60
    wanted = {f'mmslak/.mim/{path.relative_to(ROOT)}' for path in configs}
    wanted |= {f'mmslak/.mim/tools/{path.name}' for path in (ROOT / 'tools').glob('*.py')}
    wanted |= {f'mmslak/.mim/tools/{name}' for name in SCRIPTS}
    wanted |= {'mmslak/.mim/model-index.yml'}
    assert {name for name in names if name.startswith('mmslak/.mim/')} == wanted
    assert {name for name in names if name.endswith('/LICENSE')}
    assert 'mmslak/ops/drop_in/depthwise_conv2d_implicit_gemm.py' in names
    assert 'mmslak/ops/tables/example.json' in names
    assert {name.split('/')[0] for name in names} == {'mmslak', 'mmslak-0.1.0.dist-info'}


def test_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    code = 'from setuptools import build_meta; print(build_meta.build_sdist({!r}))'
    name = run('-c', code.format(str(tmp_path)), cwd=source).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path)
    again = build_wheel(tmp_path / name.removesuffix('.tar.gz'), tmp_path / 'wheel')
    assert sorted(ZipFile(again).namelist()) == sorted(ZipFile(wheel).namelist())


def test_train_test_and_export_without_the_clone(installed, tmp_path):
    data, work = miniatures.write_ade20k(tmp_path / 'ade', size=(64, 80)), tmp_path / 'work'
    options = ['--work-dir', str(work), '--cfg-options', f'data_root={data}', *SMALL]
    train = ['train', CONFIG, '--no-validate', *options]
    checkpoint, out = str(work / 'iter_2.pth'), str(tmp_path / 'slak.safetensors')
    test = ['test', f'{CONFIG}.py', checkpoint, *options]
    export = ['export', CONFIG, checkpoint, '--to', 'safetensors', '--out', out]
    export += ['--cfg-options', *MODEL_OPTIONS]
    printed = run('-c', COMMANDS.format([train, test, export]), **installed)
    assert re.search(r'^mIoU: \d', printed, re.MULTILINE)
    assert Path(out).stat().st_size > 10000
    where, weights = printed.splitlines()[-2:]
    assert where == str(Path(installed['PYTHONPATH']) / 'mmslak/__init__.py')
    assert weights == RELEASED['upernet_slak_tiny'].link


def test_index_lists_every_config_with_its_source():
    imports = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    index = [yaml.safe_load((ROOT / path).read_text()) for path in imports]
    models = [model for part in index for model in part['Models']]
    collections = {collection['Name'] for part in index for collection in part['Collections']}
    links = {released.link for released in RELEASED.values()}
    assert len({model['Name'] for model in models}) == len(models)
    for model in models:
        assert (ROOT / model['Config']).is_file(), model['Name']
        assert Path(model['Config']).stem == model['Name']
        assert model['In Collection'] in collections
        assert ('Results' in model) == ('Published' in model['Metadata']), model['Name']
        assert model.get('Weights') in {None, *links}
    listed = {model['Config'] for model in models}
    assert {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')} <= listed


def test_index_has_the_results_of_the_documentation():
    """In docs/configs.md a row is a file, and the first numbers of its third cell the result."""
    rows = {}
    for line in (ROOT / 'docs/configs.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if len(cells) == 4 and cells[0].endswith('.py`'):
            numbers = cells[2].split(' [')[0].split(' from ')[0].split(' / ')
            rows[cells[0].strip('`')] = [float(n) for n in numbers if n[0].isdigit()]
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())['Models']
    for model in models:
        name = model['Config'].removeprefix('configs/')
        results = [v for r in model.get('Results', []) for v in r['Metrics'].values()]
        if '/' not in name:  # ablations have no rows of their own
            assert results == rows[name], name
