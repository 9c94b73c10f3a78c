"""Checkpoint files: read whole, with averaged weights, or one clear error."""

import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmslak.checkpoints import torch_file
from mmslak.checkpoints.files import (
    forget_checkpoint,
    read_checkpoint,
    read_state_dict,
    save_state_dict,
    take_checkpoint,
)
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.cli import convert_checkpoint
from mmslak.errors import CheckpointError, UserError
from mmslak.models import SLaK
from tests.checkpoints.official import OFFICIAL, from_pretrained, same, weights
from tests.toy import records, train


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny(out_indices=1, gap_before_final_norm=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x, y, mode='tensor'):
        logits = self.head(self.backbone(x)[0])
        return dict(loss=nn.functional.cross_entropy(logits, y)) if mode == 'loss' else logits


def tiny(**options) -> SLaK:
    arch = dict(depths=[1, 1], dims=[8, 12])
    torch.manual_seed(0)
    defaults = dict(out_indices=(0, 1), width_factor=1.0, layer_scale_init_value=1.0)
    return SLaK(arch, kernel_sizes=(7, 7), **{**defaults, **options})


def reading_averages(path) -> list[dict[str, torch.Tensor]]:
    """A backbone's averaged weights by all the ways to ask for them."""
    model = tiny(init_cfg=dict(type='Pretrained', checkpoint=str(path), use_ema=True))
    model.init_weights()
    found = [weights(model)]
    for publish in ([], ['--publish']):
        out = path.with_name('clean.pth')
        assert convert_checkpoint.main([*publish, '--use-ema', str(path), str(out)]) == 0
        found.append(read_state_dict(out))
    return found


@pytest.mark.parametrize('begin', [0, 6])
def test_averaged_weights_of_a_run(tmp_path, begin):
    """A hook that has not begun keeps copies of the live weights as its averages."""
    hook = dict(type='EMAHook', momentum=0.5, begin_iter=begin)
    runner = train(tmp_path, model=Classifier(), iters=8, save_every=4, hooks=[hook])
    for iteration in (4, 8):
        record = records(runner)[iteration - 1]
        began = iteration >= begin
        own, *whole = reading_averages(tmp_path / f'iter_{iteration}.pth')
        for name, average in record['ema'].items():
            for state in whole:
                assert torch.equal(state[name], average)
            if name.startswith('backbone.stages'):
                assert torch.equal(own[name.removeprefix('backbone.')], average)
                assert torch.equal(average, record['weights'][name]) != began, name


def test_a_run_without_averages_says_so(tmp_path, capsys):
    train(tmp_path, model=Classifier(), iters=1)
    path = tmp_path / 'iter_1.pth'
    with pytest.raises(
        CheckpointError, match=r'iter_1\.pth: no averaged weights in it .keys: meta'
    ):
        load_pretrained(tiny(), path, use_ema=True)
    assert convert_checkpoint.main(['--use-ema', str(path), str(tmp_path / 'out.pth')]) == 2
    assert 'no averaged weights in it' in capsys.readouterr().err


@pytest.mark.parametrize('by_epoch', [True, False])
def test_averaged_weights_of_a_run_of_mmcv(tmp_path, by_epoch):
    """Its hook exchanges weights and buffers at the end of an epoch, which iterations are not."""
    live = {f'backbone.{k}': v for k, v in weights(tiny()).items()}
    averages = {k: v + 1 for k, v in live.items() if not re.search('running|num_batches', k)}
    here, beside = ({**live, **averages}, live) if by_epoch else (live, averages)
    beside = {f'ema_{k.replace(".", "_")}': beside[k] for k in averages}
    config = f"runner = dict(type='{'Epoch' if by_epoch else 'Iter'}BasedRunner')"
    path = tmp_path / 'old.pth'
    torch.save(dict(state_dict={**here, **beside}, meta=dict(config=config, epoch=1)), path)
    own, *whole = reading_averages(path)
    assert all(same(state, {**live, **averages}) for state in whole)
    assert torch.equal(own['stages.0.0.gamma'], averages['backbone.stages.0.0.gamma'])


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f'{kind}.pth'
    if kind == 'truncated':
        path.write_bytes(OFFICIAL.read_bytes()[:200_000])
    elif kind == 'text':
        path.write_text('<html>Quota exceeded</html>')
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'no_tensors':
        torch.save({'epoch': 3}, path)
    elif kind == 'foreign':
        torch.save({'state_dict': {'layer1.0.conv1.weight': torch.ones(4, 4)}}, path)
    elif kind == 'safetensors':
        path = folder / 'bad.safetensors'
        path.write_bytes(b'\x10\x00\x00\x00\x00\x00\x00\x00garbage')
    return path


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('absent', 'no such checkpoint file'),
        ('truncated', 'truncated, damaged or not a checkpoint'),
        ('text', 'truncated, damaged or not a checkpoint'),
        ('empty', 'the file is empty'),
        ('list', 'holds a list, not a dict'),
        ('no_tensors', r'not a checkpoint \(keys: epoch\)'),
        ('foreign', 'no tensor of the file belongs to SLaK'),
        ('safetensors', 'truncated, damaged or not a checkpoint'),
    ],
)
def test_bad_files_get_one_clear_error(tmp_path, kind, message):
    path = bad_file(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_a_file_cut_anywhere_gets_one_clear_error(tmp_path):
    whole, path = OFFICIAL.read_bytes(), tmp_path / 'cut.pth'
    torch.save({'state_dict': {'a': torch.ones(8)}}, path)
    small = path.read_bytes()
    cuts = [small[:n] for n in range(1, len(small) - 1, 7)]
    cuts += [whole[: len(whole) * part // 20] for part in range(1, 20)]
    for content in cuts:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r'cut\.pth'):
            read_checkpoint(path)


@pytest.mark.parametrize('name', ['a' * 5000 + '.pth', 'a\0b'])
def test_a_name_that_no_file_can_have_is_one_clear_error(name):
    with pytest.raises(CheckpointError, match='no such checkpoint file'):
        read_checkpoint(name)


# ---------------------------------------------------------------- kept for a later reader


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that are read, in order."""
    paths, load = [], torch_file.load
    monkeypatch.setattr(torch_file, 'load', lambda path: paths.append(path) or load(path))
    yield paths
    forget_checkpoint()


def test_a_kept_file_is_read_once_and_given_away(tmp_path, reads):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}}, path)
    content = read_checkpoint(path, keep=True)
    assert read_checkpoint(path) is content
    assert read_state_dict(str(path))['w'] is content['state_dict']['w']
    assert take_checkpoint(path) is content
    assert reads == [path]
    assert take_checkpoint(path) is not content
    assert reads == [path] * 2


def test_a_kept_file_that_has_changed_is_read_again(tmp_path, reads):
    path = tmp_path / 'a.pth'
    torch.save({'n': 1}, path)
    read_checkpoint(path, keep=True)
    torch.save({'n': 2}, path)
    os.utime(path, (1, 1))
    assert take_checkpoint(path) == {'n': 2}
    assert len(reads) == 2


def test_one_file_is_kept_at_a_time(tmp_path, reads):
    first, second = tmp_path / 'a.pth', tmp_path / 'b.pth'
    for path in (first, second):
        torch.save({'n': 1}, path)
        read_checkpoint(path, keep=True)
    take_checkpoint(first)
    take_checkpoint(second)
    assert reads == [first, second, first]


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f'x.{suffix}'
    save_state_dict({'a': torch.ones(1)}, path)

    def full(file):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=rf'x\.{suffix} cannot be written: No space left on device'):
        save_state_dict({'a': torch.zeros(1)}, path)
    assert read_state_dict(path)['a'].tolist() == [1.0]
    assert list(tmp_path.iterdir()) == [path]
