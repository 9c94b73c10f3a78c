"""Runs of another length: every phase of a schedule in proportion."""

import pytest
from mmengine.config import Config
from mmengine.optim import ExponentialLR

from mmslak.apis.run_length import set_iterations
from mmslak.cli.config_checks import check_schedules
from mmslak.errors import UserError
from tests.golden import ROOT

ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000, val_begin=8000)
EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=3)


def config(train_cfg: dict, schedulers: object, **more: object) -> Config:
    loader = dict(sampler=dict(type='DefaultSampler', shuffle=True))
    parts = dict(train_cfg=train_cfg, param_scheduler=schedulers, train_dataloader=loader)
    return Config({**parts, **more})


def test_iterations_in_proportion():
    warm_up = dict(type='LinearLR', start_factor=1e-6, end=1500, by_epoch=False)
    decay = dict(type='PolyLR', begin=1500, end=160000, power=1.0, by_epoch=False)
    cfg = config(ITERATIONS, [warm_up, decay])
    set_iterations(cfg, 1600)
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=1600, val_interval=1600)
    assert cfg.param_scheduler == [dict(warm_up, end=15), dict(decay, begin=15, end=1600)]
    assert cfg.default_hooks.checkpoint == dict(
        type='CheckpointHook', by_epoch=False, interval=1600
    )
    assert cfg.default_hooks.logger.interval == 10


def test_epochs_become_iterations():
    warm_up = dict(type='LinearLR', start_factor=0.001, end=1000, by_epoch=False)
    steps = dict(type='MultiStepLR', end=36, milestones=[27, 33], gamma=0.1)
    cosine = dict(type='CosineAnnealingLR', begin=9, T_max=18, convert_to_iter_based=True)
    checkpoint = dict(type='CheckpointHook', interval=3, save_begin=9, save_best='mAP')
    hooks = dict(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=50))
    cfg = config(EPOCHS, [warm_up, steps, cosine], default_hooks=hooks)
    set_iterations(cfg, 72)
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=72, val_interval=72)
    assert cfg.param_scheduler == [
        dict(warm_up, end=7),  # a tenth
        dict(steps, end=72, milestones=[54, 66], by_epoch=False),
        dict(type='CosineAnnealingLR', begin=18, T_max=36, by_epoch=False),
    ]
    assert cfg.default_hooks.checkpoint == dict(
        type='CheckpointHook', interval=72, save_best='mAP', by_epoch=False
    )
    assert cfg.default_hooks.logger.interval == 7
    assert cfg.log_processor.by_epoch is False
    assert cfg.train_dataloader.sampler == dict(type='InfiniteSampler', shuffle=True)


@pytest.mark.parametrize('iterations', [1, 2, 3, 20])
@pytest.mark.parametrize('name', ['upernet_slak_t_ade20k', 'faster_rcnn_slak_t_voc07'])
def test_a_very_short_run_has_a_schedule(name, iterations):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    set_iterations(cfg, iterations)
    check_schedules(cfg)
    assert cfg.param_scheduler[0].end == 2  # of 1 the rate would stay at its start


@pytest.mark.parametrize('kind', ['ExponentialLR', 'ExponentialMomentum', ExponentialLR])
def test_a_factor_of_every_step(kind):
    """The rate ends where it ended: a quarter per epoch is a half per half epoch."""
    cfg = config(dict(by_epoch=True, max_epochs=2), [dict(type=kind, gamma=0.25)])
    set_iterations(cfg, 4)
    assert cfg.param_scheduler == [dict(type=kind, gamma=0.5, by_epoch=False)]


def test_factors_of_a_step_that_is_longer_stay():
    steps = dict(type='StepLR', step_size=4, gamma=0.25)
    cfg = config(dict(by_epoch=True, max_epochs=8), [steps])
    set_iterations(cfg, 16)
    assert cfg.param_scheduler == [dict(steps, step_size=8, by_epoch=False)]


def test_a_factor_of_steps_that_cannot_be_shorter():
    """Eight halves are two sixteenths."""
    cfg = config(dict(by_epoch=True, max_epochs=8), [dict(type='StepLR', step_size=1, gamma=0.5)])
    set_iterations(cfg, 4)
    assert cfg.param_scheduler == [dict(type='StepLR', step_size=2, gamma=1 / 16, by_epoch=False)]


@pytest.mark.parametrize('settings', [dict(monitor='mIoU', patience=3), {}])
def test_schedulers_of_several_optimizers_and_of_scores(settings):
    plateau = dict(type='ReduceOnPlateauLR', **settings)
    schedulers = dict(a=dict(type='StepLR', step_size=8000, by_epoch=False), b=[plateau])
    cfg = config(dict(by_epoch=False, max_iters=160000), schedulers)
    set_iterations(cfg, 160)
    assert cfg.param_scheduler == dict(
        a=dict(type='StepLR', step_size=8, by_epoch=False), b=[plateau]
    )


@pytest.mark.parametrize(
    ('settings', 'interval'),
    [({}, 10), (dict(preset='finetune'), 0), (dict(preset='slak_t', update_interval=5), 5)],
)
def test_masks_move_in_the_run(settings, interval):
    """An update interval longer than the run is an error of the hook; 0 keeps masks fixed."""
    hooks = [dict(type='mmslak.SparseTrainingHook', **settings)]
    cfg = config(ITERATIONS, None, custom_hooks=hooks, optim_wrapper=dict(accumulative_counts=2))
    set_iterations(cfg, 200)
    assert cfg.custom_hooks[0].update_interval == interval


def test_a_loop_of_another_kind():
    cfg = config(dict(type='mmslak.Unknown', max_iters=10), None)
    with pytest.raises(UserError, match=r'train_cfg\.type is mmslak\.Unknown, expected EpochBased'):
        set_iterations(cfg, 2)


def test_averages_that_begin_late_begin_in_the_middle():
    hooks = [dict(type='EMAHook', begin_epoch=5), dict(type='EMAHook', momentum=0.1)]
    cfg = Config(
        dict(
            train_cfg=dict(by_epoch=True, max_epochs=12),
            train_dataloader=dict(),
            custom_hooks=hooks,
        )
    )
    set_iterations(cfg, 20)
    assert cfg.custom_hooks == [
        dict(type='EMAHook', begin_iter=10),
        dict(type='EMAHook', momentum=0.1),
    ]
