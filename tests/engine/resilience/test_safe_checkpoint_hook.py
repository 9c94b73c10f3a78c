"""The order in which checkpoints are written, named and removed."""

import errno
import os
from pathlib import Path

import pytest
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook

from mmslak.checkpoints.files import read_checkpoint
from mmslak.errors import CheckpointError
from mmslak.fileio import atomic
from mmslak.fileio.atomic import AtomicBackend, write_atomically
from tests.toy import build_runner, hook_of


def run(folder: Path, iters: int = 8, **options):
    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=2, **options)
    logger = dict(type='LoggerHook', interval=10**6)
    runner = build_runner(
        folder, iters=iters, default_hooks=dict(logger=logger, checkpoint=checkpoint)
    )
    runner.train()
    return runner


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Renames and removals, in order."""
    seen = []
    replace, remove = os.replace, LocalBackend.remove

    def note_replace(source, target) -> None:
        seen.append(f'write {Path(target).name}')
        replace(source, target)

    def note_remove(self, path) -> None:
        seen.append(f'remove {Path(path).name}')
        remove(self, path)

    monkeypatch.setattr(atomic.os, 'replace', note_replace)
    monkeypatch.setattr(LocalBackend, 'remove', note_remove)
    return seen


def test_written_named_and_then_removed(tmp_path, events):
    run(tmp_path, max_keep_ckpts=2)
    assert events == [
        *('write iter_2.pth', 'write last_checkpoint'),
        *('write iter_4.pth', 'write last_checkpoint'),
        *('write iter_6.pth', 'write last_checkpoint', 'remove iter_2.pth'),
        *('write iter_8.pth', 'write last_checkpoint', 'remove iter_4.pth'),
    ]
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_8.pth')
    assert sorted(path.name for path in tmp_path.glob('.*')) == []


@pytest.mark.parametrize('best', ['auto', 'coco/bbox_mAP'])
def test_a_validation_without_scores_saves_no_best_one(tmp_path, best):
    """As of a detector that detects nothing yet."""
    runner = run(tmp_path, iters=2, save_best=best, rule='greater')
    hook = hook_of(runner, 'SafeCheckpointHook')
    for scores, saved in (({}, 0), ({'coco/bbox_mAP': 0.1}, 1)):
        hook.after_val_epoch(runner, scores)
        hook.after_val(runner)
        assert len(list(tmp_path.glob('best_*'))) == saved


@pytest.mark.parametrize(('value', 'warnings'), [(range(3), 1), ([1, 2.0, 'x'], 0)])
def test_the_first_save_says_what_will_not_be_read_back(tmp_path, value, warnings):
    class Keeps(Hook):
        def before_train(self, runner) -> None:
            runner.message_hub.update_info('mine', value)

    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=2)
    runner = build_runner(tmp_path, iters=6, default_hooks=dict(checkpoint=checkpoint))
    runner.register_hook(Keeps())
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count('cannot be resumed from, because of message_hub.runtime_info.mine') == warnings


def test_the_best_one_is_replaced_last(tmp_path, events):
    runner = run(tmp_path, save_best='score', rule='greater')
    hook = hook_of(runner, 'SafeCheckpointHook')
    for score in (0.5, 0.7, 0.6):
        events.clear()
        runner.train_loop._iter += 1
        hook.after_val_epoch(runner, dict(score=score))
        assert events == []
        hook.after_val(runner)
        if score == 0.7:
            assert events == [
                'write best_score_iter_10.pth',
                'write iter_10.pth',
                'write last_checkpoint',
                'remove best_score_iter_9.pth',
            ]
    assert events == []
    assert not (tmp_path / 'best_score_iter_9.pth').exists()


def test_all_ranks_are_asked_before_each_checkpoint(tmp_path):
    """The best one, too."""
    seen = []

    class Asked(Hook):
        def before_gather_checkpoint(self, runner) -> None:
            seen.append('asked')

        def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
            seen.append('saved')

    runner = run(tmp_path, save_best='score', rule='greater')
    runner.register_hook(Asked())
    runner.train_loop._iter += 1
    hook = hook_of(runner, 'SafeCheckpointHook')
    hook.after_val_epoch(runner, dict(score=0.5))
    hook.after_val(runner)
    assert seen == ['asked', 'saved'] * 2  # the best one, and the last one with its name


def test_the_next_checkpoint_removes_an_interrupted_one(tmp_path, events):
    class Interrupted(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            if runner.iter == 2:
                hook_of(runner, 'SafeCheckpointHook').save_interrupted(runner, 3)

    checkpoint = dict(type='mmslak.SafeCheckpointHook', by_epoch=False, interval=4)
    default = dict(logger=dict(type='LoggerHook', interval=10**6), checkpoint=checkpoint)
    build_runner(tmp_path, iters=4, default_hooks=default, hooks=[Interrupted()]).train()
    assert events == [
        *('write interrupted.pth', 'write last_checkpoint'),
        *('write iter_4.pth', 'write last_checkpoint', 'remove interrupted.pth'),
    ]
    assert not (tmp_path / 'interrupted.pth').exists()


def test_other_ranks_keep_no_list_of_what_the_first_does(tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: 1)
    runner = run(tmp_path, max_keep_ckpts=1)
    assert hook_of(runner, 'SafeCheckpointHook')._after == []
    assert not list(tmp_path.glob('*.pth'))


def test_what_a_killed_run_did_not_remove_is_removed(tmp_path):
    run(tmp_path / 'a', max_keep_ckpts=1, iters=4)
    saved = read_checkpoint(tmp_path / 'a/iter_4.pth')['message_hub']['runtime_info']
    assert saved['keep_ckpt_ids'] == [2, 4]


@pytest.mark.parametrize('step', ['write', 'fsync', 'replace'])
def test_an_error_of_the_disk_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / 'iter_2.pth'
    write_atomically(path, b'before')

    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == 'write':
        monkeypatch.setattr(Path, 'open', full)
    else:
        monkeypatch.setattr(atomic.os, step, full)
    with pytest.raises(CheckpointError, match=r'iter_2\.pth cannot be written: No space left'):
        AtomicBackend().put(b'after', path)
    monkeypatch.undo()
    assert path.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['iter_2.pth']


def test_a_disk_that_cannot_flush_stops_the_run(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic.os, 'fsync', full)
    with pytest.raises(CheckpointError, match='cannot be written'):
        run(tmp_path)
    assert list(tmp_path.glob('*.pth')) == []
    assert not (tmp_path / 'last_checkpoint').exists()
