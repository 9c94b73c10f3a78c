"""mmslak compact: files of ours and of the libraries, and the config beside them."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmslak.checkpoints.files import read_state_dict
from mmslak.cli import compact
from mmslak.models import SLaK
from mmslak.sparsity import find_hidden_layers
from tests.golden import ROOT
from tests.models.test_compact import WIDTHS, hidden, kill, largest_error, small

CONVNEXT = """
model = dict(backbone=dict(
    type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 12]), out_indices=(0, 1),
    gap_before_final_norm=False, init_cfg=dict(type='Pretrained', checkpoint='whole.pth')))
default_scope = 'mmpretrain'
"""
SLAK = """
model = dict(backbone=dict(
    type='mmslak.SLaK', arch=dict(depths=[2, 1], dims=[8, 12]), kernel_sizes=(9, 7),
    width_factor=1.0, out_indices=(0, 1), layer_scale_init_value=1.0))
default_scope = 'mmseg'
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path and returns the status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        status = compact.main(words)
        return status, ''.join(capsys.readouterr())

    return call


def save(model, path, **more) -> None:
    state = {f'backbone.{name}': tensor for name, tensor in model.state_dict().items()}
    head = {'head.fc.weight': torch.tensor([[1.0, 0.0]])}
    torch.save({'state_dict': state | head, **more}, path)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_file_of_ours(run, tmp_path, suffix):
    whole = kill(small()).eval()
    save(whole, tmp_path / 'run.pth', optimizer={'state': {}}, sparse_training={'masks': {}})
    out = f'new/small.{suffix}'
    status, said = run('run.pth', out)
    assert status == 0
    assert 'hidden units: 112, 53 left, in 3 layers' in said
    dense = sum(p.numel() for p in whole.parameters()) + 2
    left = dense - 12 * 17 - 47 * 25
    before = sum(int(p.count_nonzero()) for p in whole.parameters()) + 1
    assert f'weights before: {dense:,}, {before:,} of them non-zero' in said
    assert f'weights left: {left:,}, ' in said
    assert 'multiplications' not in said
    assert 'without optimizer and masks; new/small.py: its config' in said

    state = read_state_dict(tmp_path / out)
    assert state['head.fc.weight'].tolist() == [[1.0, 0.0]]
    cfg = Config.fromfile('new/small.py').model.backbone
    assert cfg == dict(
        hidden_channels=WIDTHS,
        init_cfg=dict(type='Pretrained', checkpoint=out, prefix='backbone.'),
    )
    model = small(**cfg).eval()
    model.init_weights()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert largest_error(model(x), whole(x)) <= 1e-6
    status, said = run(out, 'again.pth')
    assert status == 2
    assert said.splitlines()[-1] == (
        f'error: {out}: nothing to take out, for none of the 53 hidden units of its 3 hidden '
        'layers is dead'
    )
    assert not (tmp_path / 'again.pth').exists()
    assert run('run.pth', out)[0] == 0  # over its own files


def test_a_config_counts_and_is_written_over(run, tmp_path):
    save(kill(small()), tmp_path / 'run.pth')
    (tmp_path / 'whole.py').write_text(SLAK)
    status, said = run('run.pth', 'new/small.pth', '--config', 'whole.py')
    assert status == 0
    assert 'multiplications before: 0.' in said
    assert '(the backbone at 512×512)' in said
    cfg = Config.fromfile('new/small.py')
    assert cfg.model.backbone.type == 'mmslak.SLaK'
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model.backbone)
    assert isinstance(model, SLaK)
    assert hidden(model) == WIDTHS
    model.init_weights()
    state = read_state_dict('new/small.pth')
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f'backbone.{name}'])


def students(text: str) -> Iterator[str]:
    """Configs in which student.py, written with the text, learns: named, and as a base."""
    Path('student.py').write_text(text.replace('model = dict(', "model = dict(type='Whole', "))
    for before, student in (
        (re.search('default_scope.*', text)[0] + '\nmodel = dict(', "'student.py'"),
        ("_base_ = 'student.py'\nmodel = dict(_delete_=True, ", '_base_.model'),
    ):
        yield (
            f"{before}type='mmslak.DistilledClassifier', student={student}, teacher='none.py', "
            "teacher_checkpoint='none.pth')\n"
        )


@pytest.mark.parametrize('text', [SLAK, CONVNEXT])
def test_a_student_leaves_its_teacher(run, tmp_path, text):
    """The checkpoint is the student's alone, and so is the config of what is left of it."""
    whole = kill(small()).eval() if text == SLAK else convnext()
    save(whole, tmp_path / 'run.pth')
    for distilled in students(text):
        (tmp_path / 'distilled.py').write_text(distilled)
        status, said = run('run.pth', 'small.pth', '--config', 'distilled.py')
        assert (status, 'multiplications before: 0.' in said) == (0, True), said
        cfg = Config.fromfile('small.py')
        assert cfg.model.type == 'Whole'
        assert not {'student', 'teacher', '_delete_'} & cfg.model.keys()
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model.backbone)
        model.init_weights()
        model.eval()  # returns None for some models of mmpretrain
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert largest_error(model(x), whole(x)) <= 1e-6


def convnext() -> nn.Module:
    """ConvNeXt of CONVNEXT in which 5 units of each layer live; the others are constants."""
    init_default_scope('mmpretrain')
    options = Config.fromstring(CONVNEXT, '.py').model.backbone
    whole = MODELS.build({**options, 'init_cfg': None})
    whole.eval()
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for layer in find_hidden_layers(whole):
            parameters[f'{layer.first}.weight'][5:] = 0
            parameters[f'{layer.first}.bias'].normal_()
    return whole


@pytest.mark.parametrize('before', ["dict(type='Pretrained', checkpoint='a', use_ema=True)", None])
def test_the_checkpoint_of_the_config_gives_way(run, tmp_path, before):
    save(kill(small()), tmp_path / 'run.pth')
    text = SLAK.replace("type='mmslak.SLaK',", f"type='mmslak.SLaK', init_cfg={before},")
    (tmp_path / 'whole.py').write_text(text)
    assert run('run.pth', 'small.pth', '--config', 'whole.py')[0] == 0
    assert Config.fromfile('small.py').model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint='small.pth', prefix='backbone.'
    )


def test_a_backbone_of_a_library(run, tmp_path):
    (tmp_path / 'whole.py').write_text(CONVNEXT)
    whole = convnext()
    save(whole, tmp_path / 'run.pth')
    status, said = run('run.pth', 'small.pth')
    assert status == 2
    assert 'none of the 80 hidden units' in said  # what they are as constants, no file says
    status, said = run('run.pth', 'small.pth', '--config', 'whole.py')
    assert (status, 'hidden units: 80, 10 left' in said) == (0, True)
    cfg = Config.fromfile('small.py').model.backbone
    assert cfg.hidden_channels == [5, 5]
    model = MODELS.build(cfg)
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert largest_error(model(x), whole(x)) <= 1e-6

    for layer in find_hidden_layers(model):  # and once more, by the config that is left
        model.get_parameter(f'{layer.first}.weight').data[2:] = 0
    save(model, tmp_path / 'again.pth')
    assert run('again.pth', 'smaller.pth', '--config', 'small.py')[0] == 0
    cfg = Config.fromfile('smaller.py').model.backbone
    assert cfg.hidden_channels == [2, 2]
    smaller = MODELS.build(cfg)
    smaller.init_weights()
    smaller.eval()
    with torch.no_grad():
        assert largest_error(smaller(x), model(x)) <= 1e-6


def test_units_that_are_zero_all_over_need_no_config(run, tmp_path):
    state = {
        'backbone.a.fc1.weight': torch.tensor([[1.0], [0.0]]),
        'backbone.a.fc1.bias': torch.tensor([1.0, 0.0]),
        'backbone.a.fc2.weight': torch.tensor([[1.0, 0.0]]),
        'neck.fc1.weight': torch.zeros(2, 1),
        'neck.fc2.weight': torch.zeros(1, 2),
    }
    torch.save(state, tmp_path / 'x.pth')
    assert run('x.pth', 'small.pth')[0] == 0
    kept = read_state_dict('small.pth')
    assert kept['backbone.a.fc1.weight'].tolist() == [[1.0]]
    assert kept['neck.fc1.weight'].shape == (2, 1)
    backbone = Config.fromfile('small.py').model.backbone
    assert backbone == dict(type='mmslak.CompactBackbone', hidden_channels=[1])


def test_averaged_weights(run, tmp_path):
    live, averaged = small(), kill(small())
    content = dict(model=live.state_dict(), model_ema=averaged.state_dict())
    torch.save(content, tmp_path / 'official.pth')
    assert 'nothing to take out' in run('official.pth', 'small.pth')[1]
    assert run('official.pth', 'small.pth', '--use-ema')[0] == 0
    assert Config.fromfile('small.py').model.backbone.hidden_channels == WIDTHS


@pytest.mark.parametrize(
    ('words', 'says'),
    [
        (['none.pth', 'x.pth'], 'none.pth: no such checkpoint file'),
        (['run.pth', 'x.txt'], 'x.txt: expected a name that ends in .pth or .safetensors'),
        (['run.pth', 'mine.pth'], 'mine.py would be overwritten: name another OUT'),
        (['other.pth', 'x.pth'], 'other.pth: no hidden layers with names that are known'),
        (['run.pth', 'x.pth', '--config', 'other.py'], 'no tensor of the file belongs to ResNet'),
    ],
)
def test_what_cannot_be(run, tmp_path, words, says):
    save(kill(small()), tmp_path / 'run.pth')
    torch.save({'conv1.weight': torch.ones(2, 2)}, tmp_path / 'other.pth')
    (tmp_path / 'mine.py').write_text('model = dict()')
    (tmp_path / 'other.py').write_text(
        "model = dict(backbone=dict(type='mmpretrain.ResNet', depth=18))"
    )
    status, said = run(*words)
    assert status == 2
    assert len(said.splitlines()) == 1
    assert says in said
    assert not list(tmp_path.glob('x.*'))
    assert (tmp_path / 'mine.py').read_text() == 'model = dict()'


def test_compact_as_a_command():
    tool = [sys.executable, ROOT / 'tools' / 'compact.py', '--help']
    done = subprocess.run(tool, capture_output=True, text=True, check=True)
    assert 'Examples:' in done.stdout
