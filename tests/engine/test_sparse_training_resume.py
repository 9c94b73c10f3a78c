"""A run of SparseTrainingHook that was interrupted ends like one that was not."""

import json
import signal
from pathlib import Path

import pytest
import torch

from tests import forks, toy
from tests.toy import (
    ADAMW,
    SGD,
    SHAPES,
    assert_same,
    build_runner,
    hook_of,
    load,
    records,
    start,
    train,
)

SPARSE = dict(update_interval=3, prune_rate=0.4)
STATE = ('state_dict', 'ema_state_dict', 'optimizer', 'sparse_training')


def resume(work_dir: Path, checkpoint: Path, sparse: dict, **options):
    """Trains on from a checkpoint, in another folder."""
    return train(work_dir, sparse, load_from=str(checkpoint), resume=True, **options)


def assert_same_end(one: Path, other: Path, iteration: int, keys: tuple = STATE) -> None:
    for key in keys:
        assert_same(load(one, iteration)[key], load(other, iteration)[key], key)


@pytest.mark.parametrize('saved', [5, 6, 7], ids=['before', 'right-after', 'after'])
@pytest.mark.parametrize(
    ('optimizer', 'settings'),
    [
        (SGD, dict(grow='random')),
        (SGD, dict(grow='momentum', grown_state='zero')),
        (ADAMW, dict(grow='gradient', grown_state='mask')),
        (ADAMW, dict(grow='random', init='erk', drop='set')),
    ],
    ids=['sgd-random', 'sgd-momentum', 'adamw-gradient', 'adamw-set'],
)
def test_resumed_runs_end_the_same_to_the_bit(tmp_path, optimizer, settings, saved):
    """Saved around the update of step 6; right after it, grown weights are still zero."""
    options = dict(optimizer=optimizer, ema=True, iters=12, save_every=1)
    sparse = dict(SPARSE, **settings)
    whole = train(tmp_path / 'whole', sparse, **options)
    resumed = resume(tmp_path / 'resumed', tmp_path / f'whole/iter_{saved}.pth', sparse, **options)
    assert len(records(resumed)) == 12 - saved
    for one, other in zip(records(resumed), records(whole)[saved:]):
        assert_same(one, other)
    assert_same_end(tmp_path / 'resumed', tmp_path / 'whole', 12)
    if saved == 6:
        begin = start(resumed)
        assert any(
            begin['weights'][name][mask].count_nonzero() < mask.sum()
            for name, mask in begin['masks'].items()
        )


def test_resumed_accumulation_ends_the_same_to_the_bit(tmp_path):
    options = dict(ema=True, iters=15, save_every=6, wrapper=dict(accumulative_counts=2))
    train(tmp_path / 'whole', SPARSE, **options)
    resumed = resume(tmp_path / 'resumed', tmp_path / 'whole/iter_6.pth', SPARSE, **options)
    assert hook_of(resumed).step == 8
    assert_same_end(tmp_path / 'resumed', tmp_path / 'whole', 15)


def test_killed_right_after_an_update_and_resumed(tmp_path):
    """SIGKILL, as from the kernel or a scheduler; then the same command with resume."""
    options = dict(sparse=SPARSE, optimizer=ADAMW, ema=True, iters=9, save_every=3)
    runs = json.dumps([dict(options, kill_after=6)])
    ended = forks.run(toy.main, str(tmp_path), runs)
    assert ended.statuses == [-signal.SIGKILL], ended.output[-2000:]
    killed = tmp_path / '0'
    assert sorted(p.name for p in killed.glob('*.pth')) == ['iter_3.pth', 'iter_6.pth']
    train(tmp_path / 'whole', **options)
    resumed = train(killed, **options, resume=True)
    assert len(records(resumed)) == 3
    assert_same_end(killed, tmp_path / 'whole', 9)


def test_a_second_start_from_weights_makes_new_masks(tmp_path):
    """`load_from` without resume is a new run: step 0, masks of its own."""
    train(tmp_path / 'first', dict(SPARSE, seed=1), iters=4)
    second = train(
        tmp_path / 'second',
        dict(update_interval=0, init='uniform'),
        iters=1,
        load_from=str(tmp_path / 'first/iter_4.pth'),
    )
    fresh = train(tmp_path / 'fresh', dict(update_interval=0, init='uniform'), iters=1)
    assert [r['step'] for r in records(second)] == [1]
    assert_same(start(second)['masks'], start(fresh)['masks'])


# ---------------------------------------------------------------- the checkpoint's entry


def test_the_saved_masks_are_tensors_and_plain_values(tmp_path):
    for i, iteration in enumerate((3, 4)):  # with and without weights that wait for a step
        train(tmp_path / str(i), SPARSE, iters=5, ema=True, save_every=1)
        entry = load(tmp_path / str(i), iteration)['sparse_training']
        assert (entry['grown'] is None) == (iteration == 4)
        torch.save(entry, tmp_path / 'entry.pth')
        assert_same(torch.load(tmp_path / 'entry.pth', weights_only=True), entry)
        assert entry['step'] == iteration
        assert {n: tuple(s) for n, s in entry['masks']['shapes'].items()} == SHAPES
        bits = sum(8 * packed.numel() for packed in entry['masks']['active'].values())
        assert bits == 216 + 216 + 128 + 64  # a bit per weight


# ---------------------------------------------------------------- refusals


def edited(folder: Path, iteration: int, edit) -> Path:
    """A checkpoint after `edit(checkpoint)`, in a file of its own."""
    checkpoint = load(folder, iteration)
    edit(checkpoint)
    torch.save(checkpoint, folder / 'edited.pth')
    return folder / 'edited.pth'


def test_a_checkpoint_without_masks_is_an_error(tmp_path):
    train(tmp_path / 'dense', iters=4)
    with pytest.raises(ValueError, match=r"dense/iter_4.pth .* has no masks \(no 'sparse_training"):
        resume(tmp_path / 'resumed', tmp_path / 'dense/iter_4.pth', SPARSE, iters=8)


def test_masks_from_weights_when_the_checkpoint_has_none(tmp_path):
    whole = train(tmp_path / 'whole', SPARSE, ema=True, save_every=4)

    def without_masks(checkpoint: dict) -> None:
        del checkpoint['sparse_training']
        checkpoint['state_dict']['stem.weight'] += 1.0  # averaged by others: dense

    checkpoint = edited(tmp_path / 'whole', 4, without_masks)
    sparse = dict(SPARSE, resume_fallback='from_weights')
    resumed = resume(tmp_path / 'resumed', checkpoint, sparse, ema=True)
    assert_same(start(resumed)['masks'], records(whole)[3]['masks'])
    assert start(resumed)['step'] == 4
    for name, mask in start(resumed)['masks'].items():
        assert start(resumed)['ema'][name][~mask].count_nonzero() == 0
    assert hook_of(resumed).step == 8


def test_the_fallback_is_not_used_when_there_are_masks(tmp_path):
    """Right after an update the zeros of the weights are more than the masks'."""
    train(tmp_path / 'whole', SPARSE, save_every=3)
    sparse = dict(SPARSE, resume_fallback='from_weights')
    resume(tmp_path / 'resumed', tmp_path / 'whole/iter_3.pth', sparse)
    assert_same_end(tmp_path / 'resumed', tmp_path / 'whole', 8, ('state_dict', 'sparse_training'))


def other_shape(checkpoint: dict) -> None:
    checkpoint['sparse_training']['masks']['shapes']['head.weight'] = [16, 4]


def too_short(checkpoint: dict) -> None:
    active = checkpoint['sparse_training']['masks']['active']
    active['head.weight'] = active['head.weight'][:-1]


def incomplete(checkpoint: dict) -> None:
    del checkpoint['sparse_training']['masks']['ever']


@pytest.mark.parametrize(
    ('edit', 'settings', 'message'),
    [
        (None, dict(exclude='^stem'), r"1 unknown \['stem\.weight'\]"),
        (other_shape, {}, r'head\.weight: saved mask has shape \(16, 4\), the model has \(4, 16\)'),
        (too_short, {}, r"head\.weight: 'active' has the wrong number of bytes"),
        (incomplete, {}, r'not a mask state: ever missing'),
    ],
    ids=['names', 'shape', 'bytes', 'incomplete'],
)
def test_masks_that_do_not_fit_are_an_error(tmp_path, edit, settings, message):
    train(tmp_path / 'first', SPARSE, iters=4)
    checkpoint = edited(tmp_path / 'first', 4, edit or (lambda checkpoint: None))
    runner = build_runner(
        tmp_path / 'resumed', dict(SPARSE, **settings), load_from=str(checkpoint), resume=True
    )
    with pytest.raises(ValueError, match=rf"\(key 'sparse_training'\) do not fit .*{message}"):
        runner.train()
