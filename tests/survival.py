"""Runs of tools/train.py that are killed, told to stop, or run out of disk, and go on.

    python tests/survival.py WORK_DIR --tasks seg det cls --kills 20 --processes 1 2 --iters 30

trains each task on digit scenes without an interruption, then the same with that many SIGKILLs, at
random iterations, each followed by `--resume`; it prints whether weights, optimizer and masks are
the same to the bit, and ends with status 1 if not. Kills come after the first checkpoint and before
the last iteration, so that each resumed run has something to go on from, and to train. Every run
is a process of its own that is forked from one which has done the imports.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.runs import MARKER, newest_intact
from mmslak.datasets import make_digit_scenes

ROOT = Path(__file__).parents[1]
SCENES = dict(train=24, test=2, size=80, train_digits=40, test_digits=10)
STATE = ('state_dict', 'ema_state_dict', 'optimizer', 'sparse_training', 'exact_resume')
BACKBONE = """
backbone = dict(
    type='mmslak.SLaK', arch=dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]), width_factor=1.0,
    kernel_sizes=(9, 7, 5, 5), small_kernel=3, layer_scale_init_value=1.0, drop_path_rate=0.3)
custom_hooks = [
    dict(type='mmslak.SparseTrainingHook', init='uniform', update_interval=2, prune_rate=0.4),
    dict(type='EMAHook', momentum=0.1)]
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3),
                     clip_grad=dict(max_norm=5))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, end={iters}, by_epoch=False)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1000),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval={every}, max_keep_ckpts=2))
randomness = dict(seed=0)
loading = dict(batch_size=2, num_workers={workers}, persistent_workers={workers} > 0)
"""
SEG = """
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
norm_cfg = dict(type='BN', requires_grad=True)
head = dict(num_classes=11, norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=(64, 64)), backbone=dict(_delete_=True, **backbone),
    decode_head=dict(in_channels=[8, 8, 16, 16], pool_scales=(1, 2), channels=8, **head),
    auxiliary_head=dict(in_channels=16, channels=8, **head))
train_dataloader = dict(
    **loading, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset', data_root='{data}/ade', reduce_zero_label=True,
        metainfo=dict(classes=[str(i) for i in range(11)]),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='RandomCrop', crop_size=(64, 64)), dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]))
train_cfg = dict(type='IterBasedTrainLoop', max_iters={iters}, val_interval=10**6)
val_cfg = val_dataloader = val_evaluator = test_cfg = None
"""
DET = """
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
model = dict(
    backbone=dict(_delete_=True, **backbone),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=8, num_outs=4),
    rpn_head=dict(in_channels=8, feat_channels=8,
                  anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32])),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=8),
                  bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=10)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20),
                   rcnn=dict(sampler=dict(num=16))))
train_dataloader = dict(
    **loading, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='VOCDataset', data_root='{data}/voc/VOCdevkit', metainfo=dict(classes=tuple('0123456789')),
        ann_file='VOC2007/ImageSets/Main/trainval.txt', data_prefix=dict(sub_data_root='VOC2007/'),
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='RandomResize', scale=(96, 96), ratio_range=(0.7, 1.0), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=-(-{iters} * 2 * {processes} // 24), val_interval=10**6)
val_cfg = val_dataloader = val_evaluator = test_cfg = None
"""  # noqa: E501
CLS = """
_base_ = ['mmpretrain::_base_/default_runtime.py']
model = dict(
    type='ImageClassifier', backbone=dict(out_indices=3, gap_before_final_norm=True, **backbone),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=16))
train_dataloader = dict(
    **loading, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='{data}/cls', data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32),
            dict(type='RandomFlip', prob=0.5), dict(type='RandomErasing', mode='rand'),
            dict(type='PackInputs')]))
train_cfg = dict(by_epoch=True, max_epochs=-(-{iters} * 2 * {processes} // 40), val_interval=10**6)
val_cfg = val_dataloader = val_evaluator = test_cfg = None
"""
DISTILLED = f"""{CLS}
data_preprocessor = dict(num_classes=10)
model = dict(
    type='mmslak.DistilledClassifier',
    teacher=dict(model), teacher_checkpoint='{{teacher}}',
    student=dict(model, train_cfg=dict(augments=dict(type='Mixup', alpha=0.8))))
"""
TASKS = dict(seg=SEG, det=DET, cls=CLS, distilled=DISTILLED)


class At(Hook):
    """Does something in an iteration, counted from 1 over all runs."""

    def __init__(self, iteration: int, do: Callable[[], None], after: bool) -> None:
        self.iteration, self.do = iteration, do
        self.priority = 'LOWEST' if after else 'VERY_HIGH'
        setattr(self, 'after_train_iter' if after else 'before_train_iter', self._event)

    def _event(self, runner, batch_idx=0, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            self.do()


def write_config(folder: Path, task: str, iters: int, workers: int = 0, every: int = 2,
                 processes: int = 1) -> Path:  # fmt: skip
    """A task's config and, beside it, its digit scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / 'scenes'
    make_digit_scenes(data, **SCENES)
    text = TASKS[task].partition('\n')[2]
    bases, _, rest = text.partition('\n')
    values = dict(iters=iters, workers=workers, every=every, data=data, processes=processes)
    values['teacher'] = folder / 'teacher.pth'
    text = '\n'.join([bases, BACKBONE, rest])
    for key, value in values.items():
        text = text.replace('{%s}' % key, str(value))  # noqa: UP031
    path = folder / f'{task}_{iters}_{processes}.py'
    path.write_text(text)
    if task == 'distilled':
        write_teacher(path, values['teacher'])
    return path


def write_teacher(config: Path, file: Path) -> None:
    """Random weights of a config's teacher."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(1)
    torch.save(dict(state_dict=MODELS.build(cfg.model.teacher).state_dict()), file)


def train(argv: list, log: Path, events: list[At] | None = None, processes: int = 1) -> list[int]:
    """tools/train.py in processes of its own; the exit status of each, negative for a signal.

    With several, the death of one is that of all, as under torchrun.

    Args:
        argv: Its arguments.
        log: File that its output is added to.
        events: What is to happen, in the first process.
        processes: How many.
    """
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.setpgid(0, 0)
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1), os.dup2(output, 2)
                status = _main(argv, rank, processes, port, (events or []) if rank == 0 else [])
            except BaseException:  # the copy of the parent must not go on
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return _wait(children)


def _main(argv: list, rank: int, processes: int, port: int, events: list[At]) -> int:
    sys.argv = ['tools/train.py', *map(str, argv)]
    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='')
    if processes > 1:
        argv = [*argv, '--launcher', 'pytorch']
    from mmslak.cli import train

    build = train.build_runner

    def build_runner(cfg):
        runner = build(cfg)
        for event in events:
            runner.register_hook(event)
        return runner

    train.build_runner = build_runner
    return train.main([str(part) for part in argv])


def _wait(children: list[int]) -> list[int]:
    found: dict[int, int] = {}
    while len(found) < len(children):
        for child in children:
            if child in found:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
                if found[child] < 0 or found[child] == 70:
                    for other in children:
                        if other not in found:
                            os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [found[child] for child in children]


def last(work_dir: Path) -> dict:
    """The checkpoint that the marker names."""
    return read_checkpoint((work_dir / MARKER).read_text())


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same state, to the bit."""
    first, second = last(one), last(other)
    if first['meta']['iter'] != second['meta']['iter']:
        return False
    return all(_equal(first[key], second[key]) for key in STATE)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def kill() -> None:
    """As the kernel or a scheduler does: nothing is told."""
    os.kill(os.getpid(), signal.SIGKILL)


def survive_kills(
    folder: Path,
    task: str,
    iters: int,
    kills: int,
    processes: int = 1,
    workers: int = 0,
    every: int = 2,
) -> dict:
    """A run with SIGKILLs and one without; whether they end the same.

    Returns:
        dict(task, processes, workers, killed_in=[iterations], resumed_from=[iterations], same)
    """
    config = write_config(folder, task, iters, workers, every, processes)
    whole, killed = (folder / f'{task}_{processes}_{name}' for name in ('whole', 'killed'))
    log = folder / f'{task}_{processes}.log'
    statuses = train([config, '--work-dir', whole], log, processes=processes)
    if any(statuses):
        raise RuntimeError(f'training ended with {statuses}; see {log}')
    total = last(whole)['meta']['iter']
    rng = random.Random(f'{task} {processes}')
    # The same iteration can be hit again; in the order of time, or there would be nothing to lose.
    moments = sorted(rng.randint(every + 1, total - 1) for _ in range(kills))
    killed_in, resumed_from, done = [], [], 0
    for number in [*moments, None]:
        if number is not None:
            number = max(number, done + 1)  # what was saved right before a kill is not done again
            if number >= total:
                continue
            killed_in.append(number)
        events = [At(number, kill, rng.random() < 0.5)] if number else []
        argv = [config, '--work-dir', killed, '--resume']
        statuses = train(argv, log, events, processes)
        if number is not None and statuses[0] != -signal.SIGKILL:
            raise RuntimeError(f'killed in {number}, but ended with {statuses}; see {log}')
        if number is None and any(statuses):
            raise RuntimeError(f'resumed, but ended with {statuses}; see {log}')
        found = newest_intact(killed)[0]
        done = read_checkpoint(found)['meta']['iter'] if found else 0
        resumed_from.append(done)
    return dict(
        task=task,
        processes=processes,
        workers=workers,
        iterations=total,
        killed_in=killed_in,
        resumed_from=resumed_from[:-1],
        same=same(whole, killed),
    )


# ---------------------------------------------------------------- other accidents

VALIDATED = """
_base_ = ['{config}']
val_dataloader = dict(
    _delete_=True, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='{data}/cls', data_prefix='val',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=32),
                  dict(type='PackInputs')]))
val_evaluator = dict(_delete_=True, type='Accuracy', topk=1)
val_cfg = dict(_delete_=True)
train_cfg = dict(max_epochs=2, val_interval=1)
"""


def signals(folder: Path) -> None:
    """Each signal; the run goes on, and ends as one without."""
    log = folder / 'log.txt'
    config = write_config(folder, 'cls', 6, workers=2)
    validated = folder / 'validated.py'
    text = VALIDATED.replace('{data}', str(folder / 'scenes'))
    validated.write_text(text.replace('{config}', str(config)))
    pair = write_config(folder, 'seg', 4, processes=2)
    expect_success([config, '--work-dir', folder / 'whole'], log)
    expect_success([validated, '--work-dir', folder / 'whole_val'], log)
    expect_success([pair, '--work-dir', folder / 'whole_pair'], log, processes=2)

    def send(number: int, *more: float) -> Callable[[], None]:
        def do() -> None:
            for pause in (0, *more):
                time.sleep(pause)
                os.kill(os.getpid(), number)

        return do

    def to_group() -> None:
        # From another process, as torchrun does: of its parent a data worker takes more.
        subprocess.run(['kill', '-TERM', '--', f'-{os.getpgid(0)}'])

    in_validation = At(20, send(signal.SIGTERM), False)
    in_validation.before_train_iter = lambda *args, **kwargs: None
    in_validation.before_val_iter = lambda runner, batch_idx, data_batch=None: (
        in_validation.do() if runner.iter == 20 and batch_idx == 1 else None
    )
    cases = {
        'SIGTERM': (config, 'whole', At(3, send(signal.SIGTERM), False), 1),
        'SIGINT': (config, 'whole', At(9, send(signal.SIGINT), False), 1),
        'SIGTERM to the group': (config, 'whole', At(5, to_group, False), 1),
        'SIGTERM in validation': (validated, 'whole_val', in_validation, 1),
        'SIGTERM to one of two': (pair, 'whole_pair', At(3, send(signal.SIGTERM), False), 2),
        'SIGTERM twice': (config, 'whole', At(3, send(signal.SIGTERM, 0), False), 1),
        'SIGTERM again': (config, 'whole', At(3, send(signal.SIGTERM, 3.5), False), 1),
    }
    for number, (what, (path, whole, event, processes)) in enumerate(cases.items()):
        argv = [path, '--work-dir', folder / str(number), '--resume']
        statuses = train(argv, log, [event], processes)
        expect_success(argv, log, processes=processes)
        ended = same(folder / whole, folder / str(number))
        print(json.dumps(dict(what=what, statuses=statuses, same=ended)), flush=True)


def expect_success(argv: list, log: Path, processes: int = 1) -> None:
    """Trains to the end."""
    statuses = train(argv, log, processes=processes)
    if any(statuses):
        raise RuntimeError(f'training ended with {statuses}; {log}: {log.read_text()[-3000:]}')


def disk(folder: Path) -> None:
    """No room for the second checkpoint; with room again the run goes on."""
    log, work = folder / 'log.txt', folder / 'full'
    config = write_config(folder, 'seg', 6)
    expect_success([config, '--work-dir', folder / 'whole'], log)
    fill = At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)), False)
    log.write_text('')
    statuses = train([config, '--work-dir', work], log, [fill])
    says = [line for line in log.read_text().splitlines() if line.startswith('error: ')]
    left = sorted(path.name for path in work.iterdir() if path.is_file() and path.suffix != '.py')
    expect_success([config, '--work-dir', work, '--resume'], log)
    ended = same(folder / 'whole', work)
    print(json.dumps(dict(statuses=statuses, says=says[-1], left=left, same=ended)))


def saves(folder: Path, every_end: bool = False) -> None:
    """A kill before each step of the file system of the third save, and in the middle of writes.

    The first checkpoint is removed then, since two are kept. Every third run, or each, is resumed
    and trained to its end.
    """
    log = folder / 'log.txt'
    config = write_config(folder, 'seg', 8)
    expect_success([config, '--work-dir', folder / 'whole'], log)
    number = 0
    while True:
        number += 1
        work, noted = folder / str(number), folder / f'{number}.txt'
        counter = Counter(number, noted)
        events = [At(6, counter.start, False), At(7, counter.stop, False)]
        statuses = train([config, '--work-dir', work], log, events)
        if statuses == [0]:
            break
        found = newest_intact(work)[0]
        resumed_from = read_checkpoint(found)['meta']['iter']
        if every_end or number % 3 == 1:
            expect_success([config, '--work-dir', work, '--resume'], log)
        left = sorted(path.name for path in work.glob('*.pth'))
        ended = last(work)['meta']['iter'] == 8
        result = dict(
            step=noted.read_text() if noted.exists() else 'none',
            status=statuses[0],
            before=4,
            resumed_from=resumed_from,
            left=left,
            same=same(folder / 'whole', work) if ended else None,
        )
        print(json.dumps(result), flush=True)


class Counter:
    """Ends the process without a word before the n-th step of writing checkpoints.

    Args:
        number: The step, from 1.
        noted: File that takes its name.
    """

    def __init__(self, number: int, noted: Path) -> None:
        self.left, self.noted = number, noted

    def start(self) -> None:
        from mmengine.fileio import LocalBackend

        from mmslak.fileio import atomic

        for name in ('fsync', 'replace'):
            self._wrap(os, name, name)
        self._wrap(LocalBackend, 'remove', 'remove')
        opened = Path.open

        def open_(path: Path, *args, **kwargs):
            file = opened(path, *args, **kwargs)
            if not path.name.endswith('.tmp') or 'r' in args[0]:
                return file
            self.of = 'marker ' if MARKER in path.name else ''
            return _HalfWritten(file, self)

        atomic.Path.open = open_
        self.of = ''

    def stop(self) -> None:
        self.left = -1

    def _wrap(self, owner: object, name: str, said: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.step(said)
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    def step(self, said: str) -> bool:
        """Counts a step; ends at the n-th."""
        self.left -= 1
        if self.left == 0:
            self.noted.write_text(f'{"" if said == "remove" else self.of}{said}')
            os._exit(9)


class _HalfWritten:
    """A file whose writing is interrupted in the middle."""

    def __init__(self, file, counter: Counter) -> None:
        self.file, self.counter = file, counter

    def __enter__(self) -> '_HalfWritten':
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: memoryview) -> int:
        written = self.file.write(data[: len(data) // 2 or 1])
        self.counter.step('write')
        return written + self.file.write(data[written:])


SCENARIOS = dict(signals=signals, disk=disk, saves=saves)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('scenario', nargs='?', choices=['kills', *SCENARIOS], default='kills')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--iters', type=int, default=30)
    parser.add_argument('--processes', type=int, nargs='+', default=[1])
    parser.add_argument('--workers', type=int, default=0, help='of the data loader')
    parser.add_argument('--all', action='store_true', help='saves: train every run to its end')
    args = parser.parse_args(argv)
    for module in ('mmseg.apis', 'mmdet.apis', 'mmpretrain.apis', 'mmslak.models', 'mmslak.engine'):
        __import__(module)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.scenario != 'kills':
        options = dict(every_end=True) if args.all and args.scenario == 'saves' else {}
        SCENARIOS[args.scenario](args.work_dir, **options)
        return 0
    results = []
    for task in args.tasks:
        for processes in args.processes:
            result = survive_kills(
                args.work_dir, task, args.iters, args.kills, processes, args.workers
            )
            print(json.dumps(result), flush=True)
            results.append(result)
    return 0 if all(result['same'] for result in results) else 1


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
