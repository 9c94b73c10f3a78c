"""The demo of hidden units: all but the training, of which checkpoints take the place."""

import ast
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

from mmslak.checkpoints.files import read_state_dict
from mmslak.cli import compact, run_demo
from mmslak.cli import run_demo_compact as demo
from mmslak.sparsity import find_hidden_layers


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """Steps that train save what the config builds; in it, two of five hidden units are dead."""
    made = []

    def train_and_test(config, folder, options, metrics, stamp):
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(dict(option.split('=', 1) for option in options if 'hidden' in option))
        if 'hidden_channels' in str(options):
            widths = next(o for o in options if 'hidden_channels' in o).split('=', 1)[1]
            cfg.model.backbone.hidden_channels = ast.literal_eval(widths)
        cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        if 'neuron' in config:
            for layer in find_hidden_layers(model.backbone):
                first = model.backbone.get_submodule(layer.first)
                dead = len(first.weight) * 2 // 5
                first.weight.data[:dead] = 0
                first.bias.data[:dead] = 0
        folder.mkdir(parents=True)
        torch.save(dict(state_dict=model.state_dict()), folder / 'last.pth')
        made.append((folder.name, options))
        return folder / 'last.pth', [90.0 + len(made)]

    def call(command, arguments, log):
        assert command == 'compact'
        compact.main(arguments)
        return 'hidden units: 5, 3 left'

    for module in (demo, run_demo):
        monkeypatch.setattr(module, 'train_and_test', train_and_test)
    monkeypatch.setattr(run_demo, 'make_digit_scenes', lambda *args, **kwargs: True)
    monkeypatch.setattr(demo, 'call', call)
    monkeypatch.setattr(demo, 'draw', lambda ade, predictions, picture: picture.touch())
    monkeypatch.setattr(demo, 'ROUNDS', 1)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digit_scenes.json').write_text('{}')
    return made


def test_all_steps_but_the_training(untrained, tmp_path, capsys):
    work = tmp_path / 'work'
    arguments = ['--data', str(tmp_path / 'data'), '--work-dir', str(work)]
    assert demo.main(arguments) == 0
    assert [name for name, _ in untrained] == [
        *('slak_digits', 'upernet_pretrained', 'slak_neuron_digits', 'upernet_compact')
    ]
    options = untrained[-1][1]
    assert f'checkpoint={work / "slak_compact.pth"}' in options
    assert 'model.backbone.hidden_channels=[[77],[154],[308,308],[615]]' in options
    state = read_state_dict(work / 'upernet_compact/last.pth')
    assert state['backbone.stages.0.0.pwconv1.weight'].shape == (77, 32)
    output = capsys.readouterr().out
    assert 'accuracy 91.0 % (single weights)' in output
    assert '93.0 % (hidden units; bar: 90)' in output
    assert 'mIoU 92.0 % (single weights)' in output
    assert '94.0 % (taken out; bar: 60)' in output
    whole, small = (int(n.replace(',', '')) for n in re.findall(r'has ([\d,]+) weights', output))
    # A unit of a block of c channels has c weights, a bias and c weights.
    blocks = (32, 64, 128, 128, 256)
    assert whole - small == sum(4 * c * 2 // 5 * (2 * c + 1) for c in blocks)
    page = (work / 'index.html').read_text()
    assert 'Zeros that pay: hidden units' in page
    assert 'slak_compact.pth' in page


def test_exit_status_tells_whether_the_bars_are_met(monkeypatch, capsys):
    monkeypatch.setattr(demo, 'run', lambda args: dict(accuracy=95.0, mIoU=50.0))
    assert demo.main([]) == 1
    assert 'below the bar: mIoU' in capsys.readouterr().err
