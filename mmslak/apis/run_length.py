"""Gives the run of a config another length."""

from mmengine.config import Config, ConfigDict
from mmengine.optim import ExponentialParamScheduler, StepParamScheduler
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmslak.apis.config import resolve, walk
from mmslak.engine.sparse_training_hook import DEFAULTS, PRESETS
from mmslak.errors import UserError

# Arguments of schedulers that are a time, or a list of times.
TIMES = ('begin', 'end', 'step_size', 'T_max', 'total_steps', 'milestones', 'periods')


def set_iterations(cfg: Config, iterations: int) -> None:
    """Makes a config train for a number of iterations, in place.

    Its schedulers keep their proportions, and validation and checkpoint come at the end. What
    counted epochs counts iterations then. Where a config that counts epochs has a warm-up in
    iterations, it takes a tenth of the run. Sparse training updates its masks at least ten times.

    Args:
        cfg: The config, with a train_dataloader.
        iterations: Their number, from 1.

    Raises:
        UserError: If its training loop is neither of MMEngine's two.
    """
    loop = cfg.train_cfg
    if 'type' in loop:
        kind = resolve(loop, cfg)
    else:
        kind = EpochBasedTrainLoop if loop.get('by_epoch') else IterBasedTrainLoop
    if kind is EpochBasedTrainLoop:
        lengths = {True: loop.max_epochs, False: 10 * _longest_warm_up(cfg)}
    elif kind is IterBasedTrainLoop:
        lengths = {False: loop.max_iters}
    else:
        raise UserError(
            f'--iterations: train_cfg.type is {loop.type}, expected EpochBasedTrainLoop or '
            'IterBasedTrainLoop; set the lengths of this config by hand'
        )
    for scheduler, kind in _schedulers(cfg):
        length = lengths.get(scheduler.get('by_epoch', True))
        if length:
            _scale(scheduler, kind, iterations / length)
    cfg.train_cfg = ConfigDict(
        type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations
    )
    cfg.log_processor = ConfigDict(cfg.get('log_processor') or {}, by_epoch=False)
    sampler = cfg.train_dataloader.get('sampler') or {}
    if sampler.get('type') == 'DefaultSampler':  # at whose end the loop would sleep
        shuffle = sampler.get('shuffle', True)
        cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=shuffle)
    _set_hooks(cfg, iterations)


def _schedulers(cfg: Config) -> list[tuple[dict, type]]:
    """The schedulers that count times; those that wait for a score are in epochs always."""
    values = [value for _, value in walk(dict(schedulers=cfg.get('param_scheduler') or []))]
    found = [value for value in values if isinstance(value, dict) and 'type' in value]
    kinds = [(scheduler, resolve(scheduler, cfg)) for scheduler in found]
    return [(scheduler, kind) for scheduler, kind in kinds if not _waits(kind)]


def _waits(kind: type | None) -> bool:
    return getattr(kind, 'need_val_args', False)


def _longest_warm_up(cfg: Config) -> int:
    ends = [s.get('end') or 0 for s, _ in _schedulers(cfg) if not s.get('by_epoch', True)]
    return max(ends, default=0)


def _scale(scheduler: dict, kind: type | None, ratio: float) -> None:
    def scaled(time: int) -> int:
        # LinearLR of a single iteration would stay at its first value.
        return time and max(2, round(time * ratio))

    step = scheduler.get('step_size', 1)
    for name in TIMES:
        value = scheduler.get(name)
        if isinstance(value, (list, tuple)):
            scheduler[name] = [scaled(time) for time in value]
        elif value is not None:
            scheduler[name] = scaled(value)
    if scheduler.get('end') is not None:
        scheduler['end'] = max(scheduler['end'], scheduler.get('begin', 0) + 1)
    exponent = scheduler.get('step_size', 1) / (step * ratio)
    of_steps = (ExponentialParamScheduler, StepParamScheduler)
    if isinstance(kind, type) and issubclass(kind, of_steps) and exponent != 1:
        # A factor of every step, so that the value ends where it ended.
        scheduler['gamma'] = scheduler.get('gamma', 0.1) ** exponent
    scheduler['by_epoch'] = False
    scheduler.pop('convert_to_iter_based', None)


def _set_hooks(cfg: Config, iterations: int) -> None:
    hooks = cfg.get('default_hooks') or ConfigDict()
    checkpoint = hooks.get('checkpoint', ConfigDict(type='CheckpointHook'))
    logger = hooks.get('logger', ConfigDict(type='LoggerHook'))
    cfg.default_hooks = ConfigDict(hooks, checkpoint=checkpoint, logger=logger)
    checkpoint, logger = cfg.default_hooks.checkpoint, cfg.default_hooks.logger
    if isinstance(checkpoint, dict):
        checkpoint.update(by_epoch=False, interval=iterations)
        checkpoint.pop('save_begin', None)
    if isinstance(logger, dict):
        logger.interval = min(logger.get('interval', 10), max(1, iterations // 10))
        logger.log_metric_by_epoch = False
    steps = iterations // (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    for hook in cfg.get('custom_hooks') or []:
        kind = hook.get('type') if isinstance(hook, dict) else None
        if kind == 'EMAHook':
            begins = [hook.pop(name, 0) for name in ('begin_iter', 'begin_epoch')]
            if any(begins):  # the run may end before it otherwise
                hook['begin_iter'] = iterations // 2
        elif kind == 'mmslak.SparseTrainingHook':
            settings = {**DEFAULTS, **PRESETS.get(hook.get('preset'), {}), **hook}
            hook.update_interval = min(settings['update_interval'], max(1, steps // 10))
