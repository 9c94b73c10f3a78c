"""BadSampleHook of a config; its runs are in tests/test_survival.py."""

import json
import logging
from types import SimpleNamespace

import pytest
from mmengine.config import Config, ConfigDict

from mmslak.cli.runner import SURVIVAL, enable_survival
from mmslak.datasets.sample_list import SampleList
from mmslak.datasets.samples import BadSampleError
from mmslak.engine import BadSampleHook


def test_the_policy_of_a_hook_that_is_an_object():
    hook = BadSampleHook()
    cfg = Config(dict(model=ConfigDict(), custom_hooks=[hook]))
    enable_survival(cfg, 'skip')
    assert cfg.custom_hooks[0].policy == 'skip'
    assert len(cfg.custom_hooks) == len(SURVIVAL)


@pytest.mark.parametrize(
    ('total', 'allowed', 'limits'),
    [
        (1, 0, 'more than 0 and more than 1 %'),
        (4, 2, 'more than 2 and more than 1 %'),
        (31, 5, 'more than 5 and more than 1 %'),
        (100, 5, 'more than 5 and more than 1 %'),
        (700, 7, 'more than 5 and more than 1 %'),
    ],
)
def test_how_many_may_be_skipped(tmp_path, total, allowed, limits):
    hook = BadSampleHook('skip')
    hook._total, hook._skipped = total, 0
    hook._bad, hook._odd = SampleList(tmp_path / 'bad'), SampleList(tmp_path / 'odd')
    lines = [json.dumps(dict(file=f'{i}.jpg', reason='truncated')) for i in range(allowed + 1)]
    hook._bad.path.write_text(''.join(f'{line}\n' for line in lines[:allowed]))
    runner = SimpleNamespace(logger=logging.getLogger('skips'))
    hook.after_train_iter(runner, 0)
    with hook._bad.path.open('a') as file:
        file.write(f'{lines[allowed]}\n')
    with pytest.raises(BadSampleError, match=f'{limits}; repair them, then remove this list'):
        hook.after_train_iter(runner, 0)
