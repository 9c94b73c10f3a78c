"""BadSampleHook of a config; its runs are in tests/test_survival.py."""

from mmengine.config import Config, ConfigDict

from mmslak.cli.runner import SURVIVAL, enable_survival
from mmslak.engine import BadSampleHook


def test_the_policy_of_a_hook_that_is_an_object():
    hook = BadSampleHook()
    cfg = Config(dict(model=ConfigDict(), custom_hooks=[hook]))
    enable_survival(cfg, 'skip')
    assert cfg.custom_hooks[0].policy == 'skip'
    assert len(cfg.custom_hooks) == len(SURVIVAL)
