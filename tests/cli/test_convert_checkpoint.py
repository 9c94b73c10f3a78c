"""mmslak convert-checkpoint: clean files of official ones and of runs."""

import shutil

import pytest
import torch

from mmslak.checkpoints.files import count_parameters, read_checkpoint, read_state_dict
from mmslak.cli import convert_checkpoint
from tests import forks
from tests.checkpoints.official import OFFICIAL, from_pretrained, same, weights
from tests.golden import GOLDEN, ROOT


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_convert_checkpoint(tmp_path, capsys, suffix):
    out = tmp_path / 'new' / f'clean.{suffix}'
    source = GOLDEN / 'slak_decomposed_sparse40.pth'
    assert convert_checkpoint.main([str(source), str(out)]) == 0
    dense, nonzero = count_parameters(read_state_dict(source))
    assert f'{dense:,} parameters, {nonzero:,} non-zero' in capsys.readouterr().out
    assert 0.55 < nonzero / dense < 0.75
    assert same(weights(from_pretrained(out)), weights(from_pretrained(source)))
    if suffix == 'pth':  # nothing but tensors in it
        assert torch.load(out, weights_only=True).keys() == {'state_dict'}


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ('absent.pth', 'out.pth', 'absent.pth: no such checkpoint file'),
        ('official', 'out.txt', 'out.txt: expected a name that ends in .pth or .safetensors'),
        ('foreign', 'out.pth', 'no SLaK in it'),
    ],
)
def test_convert_checkpoint_errors(tmp_path, capsys, source, target, message):
    path = tmp_path / source
    if source == 'official':
        shutil.copy(OFFICIAL, path)
    elif source == 'foreign':
        torch.save({'state_dict': {'layer1.0.conv1.weight': torch.ones(4, 4)}}, path)
    assert convert_checkpoint.main([str(path), str(tmp_path / target)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_publishing_keeps_weights_and_zeros_alone(tmp_path, capsys, suffix):
    weight = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
    state = {'decode_head.conv.weight': weight, 'backbone.norm.running_mean': torch.zeros(2)}
    run = {'state_dict': state, 'optimizer': {'state': {0: weight}}, 'sparse_training': {'step': 3}}
    torch.save(run, tmp_path / 'iter_3.pth')
    out = tmp_path / f'published.{suffix}'
    assert convert_checkpoint.main(['--publish', str(tmp_path / 'iter_3.pth'), str(out)]) == 0
    assert '4 parameters, 2 non-zero' in capsys.readouterr().out
    content = read_checkpoint(out)
    assert same(content['state_dict'] if suffix == 'pth' else content, state)
    assert set(content) == ({'state_dict'} if suffix == 'pth' else set(state))


def test_convert_checkpoint_as_a_command():
    ended = forks.run(forks.program, f'{ROOT}/tools/convert_checkpoint.py', '--help')
    assert ended.statuses == [0]
    assert 'Examples:' in ended.output
