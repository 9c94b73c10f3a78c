"""From the arguments of training and testing to a checked config and its runner."""

import argparse
import copy
import logging
import math
import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
    init_dist,
)
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from mmslak.apis.config import LOADERS, innermost_datasets, work_dir
from mmslak.apis.options import read_with_options
from mmslak.apis.prints import redirect_prints
from mmslak.checkpoints.files import forget_checkpoint, read_checkpoint
from mmslak.checkpoints.runs import newest_intact
from mmslak.checkpoints.schemes import load_without_code
from mmslak.cli.census import census_of_config, sentence
from mmslak.cli.config_checks import check_replaced_backbone
from mmslak.datasets.census import Census
from mmslak.errors import CheckpointError, UserError, own_errors_only
from mmslak.fileio.per_machine import is_first_of_machine
from mmslak.ops.plans import cores

# Hooks that every training of our tools has; a config may name them itself, with other settings.
SURVIVAL = (
    *('BadSampleHook', 'ExactResumeHook', 'PreemptionHook', 'NonFiniteHook'),
    'TimeEstimateHook',
)
# Beginnings of what the libraries log for the log file alone.
LISTINGS = (
    *(f'\n{"-" * 60}\nSystem environment:', 'Config:\n', 'Hooks will be executed in the following'),
    *('Distributed training is not used, all SyncBatchNorm', 'The prefix is not set in metric'),
    *('paramwise_options -- ', 'layer_'),  # of each parameter, of each layer
    *('"FileClient" will be deprecated', '"HardDiskBackend" is the alias'),  # MMEngine's own calls
    *('bbox_mAP_copypaste: ', 'segm_mAP_copypaste: '),  # the scores in another form
)
# The scores of a test in one long line, which has no estimate of the time that is left.
TESTED = re.compile(r'(Epoch|Iter)\(test\)(?!.*\beta: )', re.DOTALL)


def load_config(args: argparse.Namespace) -> Config:
    """The config of the command line, with the options and flags of `add_run_arguments`.

    Raises:
        UserError: If the file is missing or broken, or an option does not fit it.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_with_options(args.config, args.cfg_options)
    check_replaced_backbone(cfg)
    cfg.launcher = args.launcher
    cfg.work_dir = work_dir(cfg) if args.work_dir is None else args.work_dir
    for loader in filter(cfg.get, LOADERS):
        _set_loader_defaults(cfg, cfg[loader], args)
    _limit_workers(cfg)
    return cfg


def _set_loader_defaults(cfg: Config, loader: ConfigDict, args: argparse.Namespace) -> None:
    if cfg.get('default_scope') == 'mmpretrain':
        # Its preprocessor wants stacked batches; its configs leave that to the tool.
        defaults = dict(
            pin_memory=True, persistent_workers=True, collate_fn=dict(type='default_collate')
        )
        for key, value in defaults.items():
            loader.setdefault(key, value)
    if args.no_pin_memory:
        loader.pin_memory = False
    if args.no_persistent_workers or not loader.get('num_workers'):
        loader.persistent_workers = False  # torch refuses it where there are no workers


def _limit_workers(cfg: Config) -> None:
    """Takes no more data workers than there are cores, as torch advises."""
    loaders, there = [cfg[name] for name in filter(cfg.get, LOADERS)], cores()
    most = max((loader.get('num_workers', 0) for loader in loaders), default=0)
    for loader in loaders:
        loader.num_workers = min(loader.get('num_workers', 0), there)
    if most > there and is_first_of_machine():
        print(f'data workers: {there} in place of {most}, one for each core')


def enable_amp(cfg: Config) -> None:
    """Turns automatic mixed precision on for training.

    Raises:
        UserError: If the config's optimizer wrapper does not allow it.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper; the config has {kind}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


@own_errors_only
def check_amp(cfg: Config) -> None:
    """Checks that this machine can do what an AmpOptimWrapper asks for.

    Raises:
        UserError: If there is no accelerator.
    """
    kind = (cfg.get('optim_wrapper') or {}).get('type')
    if kind == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise UserError(
            'mixed precision (--amp) needs an accelerator: '
            "MMEngine's AmpOptimWrapper does not run on the CPU"
        )


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate by the actual batch size.

    Raises:
        UserError: If the config does not say which batch size its learning rate is for.
    """
    if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise UserError(
            '--auto-scale-lr needs the batch size that the learning rate is for: '
            '--cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, resume: str | None) -> None:
    """Sets where training goes on from, and keeps the content of that file for the runner.

    A run that its launcher may start again, since a process or a machine has died, goes on from the
    newest intact checkpoint that it has written; without one it starts as it did the first time.

    Args:
        cfg: The config, changed in place.
        resume: A checkpoint; 'auto' for the newest intact one of the work folder, from the
            beginning if there is none; or None to leave it to the config.

    Raises:
        CheckpointError: If a file does not exist or cannot be read, or all are damaged.
    """
    is_auto, started = resume == 'auto', _started()
    if is_auto or started is not None:
        join_processes(cfg)
        # A machine that is back knows of no start before its own.
        since = -math.inf if is_auto else min(all_gather_object(started))
        latest = _newest_checkpoint(cfg, since, '--resume' if is_auto else 'started again')
        if is_auto or latest is not None:
            cfg.resume = latest is not None
            cfg.load_from = latest or cfg.get('load_from')
            resume = None
    if resume is not None:
        cfg.resume = True
        cfg.load_from = resume
    if cfg.get('load_from') and '://' not in cfg.load_from:
        read_checkpoint(cfg.load_from, keep=True)
    else:
        forget_checkpoint()


def _started() -> float | None:
    """The time from which on checkpoints in the work folder belong to this run.

    A launcher that restarts a run after a fault sets it: our scripts give the time of their start.
    torchrun alone says only whether this is a restart: all checkpoints belong to the run then, and
    none before the first restart.

    Returns:
        Seconds since the epoch, maybe infinite; None if the launcher does not restart runs.
    """
    if 'MMSLAK_STARTED' in os.environ:
        return float(os.environ['MMSLAK_STARTED'])
    if int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) == 0:
        return None
    return -math.inf if int(os.environ['TORCHELASTIC_RESTART_COUNT']) else math.inf


def _newest_checkpoint(cfg: Config, since: float, why: str) -> str | None:
    """The newest intact checkpoint. The first process looks for it, and all processes take it.

    If each process looked, they could find different files: other machines see a new file late.

    Args:
        cfg: The config.
        since: Seconds of the epoch; older checkpoints do not count.
        why: What the lines begin with that are printed.
    """
    folder = _checkpoint_folder(cfg)
    found: list = [None, [], None]
    if get_rank() == 0 and folder.is_dir() and _was_written(folder.glob('*.pth'), since):
        try:
            latest, found[1] = newest_intact(folder, keep=True)
            found[0] = latest if latest and _was_written([latest], since) else None
        except CheckpointError as error:  # of all processes, or the others would wait
            found[2] = str(error)
    broadcast_object_list(found)
    latest, passed_over, error = found
    if error is not None:
        raise CheckpointError(error)
    if latest is not None and not latest.is_file():
        raise CheckpointError(
            f'{latest}: found by the first process, but not there on another machine; the work '
            'folder has to be on a disk that all machines share'
        )
    if is_first_of_machine():
        for reason in passed_over:
            print(f'{why}: passed over {reason}')
        if latest is not None:
            print(f'{why}: goes on from {latest}')
        elif since == -math.inf:
            print(f'{why}: no checkpoint in {folder}, training starts from the beginning')
    return latest and str(latest)


def _was_written(files: Iterable[Path], since: float) -> bool:
    return since == -math.inf or any(file.stat().st_mtime >= since for file in files)


def _checkpoint_folder(cfg: Config) -> Path:
    """Where CheckpointHook writes: the work folder, or one of its name in `out_dir`."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    work_dir = Path(cfg.work_dir)
    return Path(hook['out_dir'], work_dir.name) if hook.get('out_dir') else work_dir


def enable_survival(cfg: Config, on_bad_sample: str | None = None) -> None:
    """Gives a config what a long training needs, whatever library it is for.

    Checkpoints that survive a crash, exact resuming, a stop at signals, checks of samples and of
    numbers, an estimate of its time: `SafeCheckpointHook` in the place of CheckpointHook, and the
    hooks of `SURVIVAL`.

    Args:
        cfg: The config, changed in place. Hooks that it names itself are left as they are.
        on_bad_sample: 'error', 'skip' or 'warn'; None leaves it to the config, where the default is
            error.
    """
    hooks = cfg.get('default_hooks') or ConfigDict()
    checkpoint = hooks.get('checkpoint', ConfigDict(type='CheckpointHook'))
    if isinstance(checkpoint, dict) and checkpoint.get('type', 'CheckpointHook') in (
        'CheckpointHook',
        'mmengine.CheckpointHook',
        CheckpointHook,
    ):
        hooks.checkpoint = ConfigDict(checkpoint, type='mmslak.SafeCheckpointHook')
    cfg.default_hooks = hooks
    custom = list(cfg.get('custom_hooks') or [])
    for name in SURVIVAL:
        there = [hook for hook in custom if _is_hook(hook, name)]
        if not there:
            there = [ConfigDict(type=f'mmslak.{name}')]
            custom += there
        if name == 'BadSampleHook' and on_bad_sample is not None:
            if isinstance(there[0], dict):
                there[0]['policy'] = on_bad_sample
            else:
                there[0].policy = on_bad_sample
    cfg.custom_hooks = custom


def enable_rehearsal(cfg: Config, wanted: bool = True) -> None:
    """Gives a config the rehearsal of its validation, or takes it out, in place."""
    hooks = list(cfg.get('custom_hooks') or [])
    there = [hook for hook in hooks if _is_hook(hook, 'RehearsalHook')]
    if wanted and not there:
        hooks.append(ConfigDict(type='mmslak.RehearsalHook'))
    elif not wanted:
        hooks = [hook for hook in hooks if hook not in there]
    cfg.custom_hooks = hooks


def _is_hook(hook: object, name: str) -> bool:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    return kind == f'mmslak.{name}' or getattr(kind, '__name__', kind) == name


def take_first_census(cfg: Config, loaders: Iterable[str]) -> list[Census]:
    """Takes the census of a config's data in the first process, and stops all where it has to.

    Returns:
        The censuses; none in the other processes.

    Raises:
        UserError: If nothing could be learnt.
    """
    join_processes(cfg)
    taken = census_of_config(cfg, loaders) if get_rank() == 0 else []
    stops = [[sentence(f) for census in taken for f in census.findings if f.stops]]
    broadcast_object_list(stops)  # or the other processes would wait
    if stops[0]:
        raise UserError(f'{stops[0][0]} (--no-census leaves this check out)')
    return taken


def enable_tta(cfg: Config) -> None:
    """Turns test-time augmentation on: the config's own, or flips and the library's usual model.

    Raises:
        UserError: If there is no such model for the config's library, or it cannot merge what the
            config's model predicts.
    """
    scope = cfg.get('default_scope')
    nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    models = {
        'mmseg': dict(type='SegTTAModel'),
        'mmdet': dict(type='DetTTAModel', tta_cfg=nms),
        'mmpretrain': dict(type='AverageClsScoreTTA'),
    }
    if 'tta_model' not in cfg and scope not in models:
        raise UserError(f'--tta needs a tta_model in configs of scope {scope!r}')
    if scope == 'mmdet' and 'tta_model' not in cfg:
        _drop_masks(cfg)
    datasets = [d for _, d in innermost_datasets(cfg.test_dataloader.dataset)]
    if 'tta_pipeline' not in cfg:
        *transforms, pack = copy.deepcopy(datasets[0].pipeline)
        pack.pop('meta_keys', None)  # the default ones tell of the flip
        # The unflipped view first: merged results take the annotations of the first one.
        flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
        cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.get('tta_model', models.get(scope)), module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def _metrics(cfg: Config) -> list[ConfigDict]:
    """The metrics of the test, of which a config may have one or several."""
    metrics = cfg.test_evaluator
    return list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]


def _drop_masks(cfg: Config) -> None:
    """Makes a detector of boxes alone of one that has masks, too."""
    roi_head = cfg.model.get('roi_head') or {}
    of_masks = [metric for metric in _metrics(cfg) if 'segm' in metric.get('metric', ())]
    has_masks = roi_head.pop('mask_head', None) is not None
    roi_head.pop('mask_roi_extractor', None)
    if of_masks and not has_masks:
        raise UserError(
            f'--tta: MMDetection does not merge masks of several views, and config {cfg.filename} '
            'has no roi_head.mask_head that could be left out'
        )
    if has_masks:
        print('--tta: boxes alone, since MMDetection does not merge masks of several views')
    for metric in of_masks:
        metric.metric = 'bbox'


def set_output(cfg: Config, out: str) -> None:
    """Keeps predictions: a folder of label maps for mmseg, a pickle for mmdet and mmpretrain.

    Raises:
        UserError: If `out` is not of the form that the config's library writes.
    """
    metrics = _metrics(cfg)
    pickle = out.endswith(('.pkl', '.pickle'))
    if cfg.get('default_scope') == 'mmseg':
        if pickle:
            raise UserError(f'--out {out}: predictions of mmseg are pictures, --out is a folder')
        for metric in metrics:
            metric.output_dir = out
    elif not pickle:
        raise UserError(f'--out {out}: expected a name that ends in .pkl')
    else:
        kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
        metrics.append(dict(type=kind, out_file_path=out))
    cfg.test_evaluator = metrics


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Draws predictions on screen (`--show`) or below `--show-dir`.

    Raises:
        UserError: If the config has no visualization hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise UserError('--show and --show-dir need default_hooks.visualization in the config')
    folder = str(Path(args.show_dir).resolve()) if args.show_dir else None
    hook.show, hook.wait_time = args.show, args.wait_time
    hook.interval = args.interval  # some hooks draw every 50th picture otherwise
    kind = hook.type.rpartition('.')[2]
    if kind == 'VisualizationHook' and args.tta:
        raise UserError("--show and --show-dir: mmpretrain's pictures cannot be drawn with --tta")
    hook['enable' if kind == 'VisualizationHook' else 'draw'] = True
    if kind == 'VisualizationHook':
        hook.out_dir = folder
    elif kind == 'DetVisualizationHook':
        hook.test_out_dir = folder
    elif folder:
        cfg.visualizer.save_dir = folder


def _is_for_screen(record: logging.LogRecord) -> bool:
    """Whether a person is to see it now; the log file has everything."""
    text = record.getMessage()
    is_noise = text.startswith(LISTINGS) or TESTED.match(text)
    return not is_noise and not getattr(record, 'file_only', False)


class _Runner(Runner):
    """A runner whose listings go into the log file alone."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_is_for_screen)
        return logger


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, on several processes also where there is no accelerator.

    On the screen it begins with a few lines about the run; the environment, the config and the
    hooks are in the log file.

    Raises:
        UserError: If the launcher does not fit the environment, or something that the config names
            does not exist or refuses its settings.
    """
    join_processes(cfg)
    if cfg.launcher != 'none' and get_device() == 'cpu':
        _distribute_on_cpu(cfg)
    load_without_code()
    try:
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else _Runner.from_cfg(cfg)
    except (UserError, RuntimeError):
        raise  # errors with a message of ours, and errors of the machine: CUDA, NCCL
    except Exception as error:  # the classes of a config can raise anything
        raise UserError(
            f'config {cfg.filename} cannot be built: {type(error).__name__}: {error}'
        ) from error
    redirect_prints(runner.logger)
    runner.logger.info('\n'.join(_head(cfg, runner)))
    return runner


def _head(cfg: Config, runner: Runner) -> list[str]:
    """What a person wants to see at the start."""
    names = ['mmslak', 'torch', 'mmengine', cfg.get('default_scope') or 'mmengine']
    versions = [
        f'{name} {getattr(import_module(name), "__version__", "")}'.strip()
        for name in dict.fromkeys(names)
    ]
    device = get_device()
    if device == 'cpu':
        device = f'CPU with {cores()} cores'
    elif device == 'cuda':
        device = torch.cuda.get_device_name()
    processes = f', {get_world_size()} processes' if get_world_size() > 1 else ''
    return [
        f'{", ".join(versions)}; {device}{processes}',
        f'config: {cfg.filename}',
        f'work folder: {runner.work_dir}',
        f'log file, with the environment and the whole config: {runner.logger.log_file}',
    ]


def join_processes(cfg: Config) -> None:
    """Makes this process one of its group, as building a runner does where there are accelerators.

    Raises:
        UserError: If the launcher does not fit the environment.
    """
    if cfg.launcher == 'none' or torch.distributed.is_initialized():
        return
    if cfg.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UserError(
            '--launcher pytorch is for processes started by torchrun: use tools/dist_train.sh or '
            'tools/dist_test.sh'
        )
    if get_device() != 'cpu':
        env_cfg = cfg.get('env_cfg') or {}
        set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)
        try:
            init_dist(cfg.launcher, **env_cfg.get('dist_cfg', {}))
        except KeyError as error:  # MMEngine's answer to what the environment lacks
            raise UserError(
                f'--launcher {cfg.launcher} is for processes that it has started: the environment '
                f'lacks {error.args[0]}'
            ) from error
    elif cfg.launcher != 'pytorch':
        raise UserError(f'--launcher {cfg.launcher} needs accelerators; on CPUs use torchrun')
    else:
        torch.distributed.init_process_group('gloo')


def _distribute_on_cpu(cfg: Config) -> None:
    """Sets up what MMEngine does for accelerators only: DDP without devices, no SyncBN."""
    wrapper = cfg.setdefault('model_wrapper_cfg', ConfigDict(type='MMDistributedDataParallel'))
    wrapper.device_ids = None
    wrapper.setdefault('broadcast_buffers', False)
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
    _revert_sync_bn(cfg.model)


def _revert_sync_bn(node: dict | list) -> None:
    """Replaces SyncBN, which needs an accelerator, by BN of the same weights' names, in place."""
    if isinstance(node, dict):
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
        node = list(node.values())
    for child in node:
        if isinstance(child, (dict, list, tuple)):
            _revert_sync_bn(child)
