import logging

import pytest
import torch

from mmslak.ops import DepthwiseConv2d
from tests import toy

HOOK = dict(type='mmslak.AccelerateHook')


class Log(logging.Handler):
    """The lines that the hook writes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith('AccelerateHook'):
            self.lines.append(f'{record.levelname} {record.getMessage()}')


def train(tmp_path, *hooks: dict, **options) -> tuple:
    """The runner after training, and what the hook logged."""
    runner = toy.build_runner(tmp_path, hooks=hooks, iters=3, **options)
    log = Log()
    runner.logger.addHandler(log)
    runner.train()
    return runner, log.lines


@pytest.mark.parametrize('ema', [False, True])
def test_trains_the_same_model(ema, tmp_path):
    stock, silent = train(tmp_path / 'stock', ema=ema)
    ours, lines = train(tmp_path / 'ours', HOOK, ema=ema)
    assert silent == []
    assert lines == ['INFO AccelerateHook: changed 1 convolutions: 1 of 9×3']
    assert type(stock.model.strip) is torch.nn.Conv2d
    assert type(ours.model.strip) is DepthwiseConv2d
    if ema:
        assert type(toy.hook_of(ours, 'EMAHook').ema_model.module.strip) is DepthwiseConv2d
    for kind in ('weights', 'ema') if ema else ('weights',):
        one, other = (toy.records(runner)[-1][kind] for runner in (stock, ours))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_hook(tmp_path):
    """A checkpoint of a run without it; the hook may also come after EMAHook."""
    train(tmp_path, ema=True)
    late, file = dict(HOOK, priority='LOWEST'), str(tmp_path / 'iter_3.pth')
    after, lines = train(tmp_path, late, ema=True, load_from=file)
    assert len(lines) == 1
    assert type(after.model.strip) is DepthwiseConv2d
    saved = toy.load(tmp_path, 3)
    assert list(saved['state_dict']) == list(after.model.state_dict())


def test_nothing_to_change_is_a_warning(tmp_path):
    _, lines = train(tmp_path, dict(HOOK, min_size=11))
    assert lines == [
        'WARNING AccelerateHook: the model has no depthwise convolution of stride 1, dilation 1 '
        "and 'same' padding with a side of at least 11: nothing was changed"
    ]


def test_an_accelerated_model_is_no_warning(tmp_path):
    model = toy.Toy()
    model.strip = DepthwiseConv2d(8, (9, 3))
    _, lines = train(tmp_path, HOOK, model=model)
    assert lines == []
