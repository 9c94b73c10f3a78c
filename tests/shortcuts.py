"""What libraries do again and again in a run, and tests need not wait for."""

import copy
import functools
import sysconfig
import weakref
from types import SimpleNamespace

import pytest
from mmengine.config import Config, config, utils
from mmengine.dataset import base_dataset
from mmengine.runner import runner
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from yapf.yapflib import yapf_api

from tests.golden import ROOT

LASTING = (sysconfig.get_path('purelib'), str(ROOT / 'configs'), str(ROOT / 'mmslak'))


def take(patch: pytest.MonkeyPatch) -> None:
    """Takes all shortcuts."""
    shorten_configs(patch)
    survey_once(patch)
    leave_garbage(patch)
    end_data_workers(patch)


def shorten_configs(patch: pytest.MonkeyPatch) -> None:
    """Configs are written unformatted; metafiles, and bases that are installed, are read once.

    MMEngine lays the text of a config out anew for each log and dump, and reads all metafiles of a
    library for each base. Both together take half of the time of a small run.
    """
    patch.setattr(utils, 'load', functools.cache(utils.load))
    patch.setattr(Config, '_file2dict', staticmethod(_remembering(Config._file2dict)))
    for module in (config, yapf_api):
        patch.setattr(module, 'FormatCode', lambda text, **_: (text, True), raising=False)


def survey_once(patch: pytest.MonkeyPatch) -> None:
    """The machine is surveyed once and not for each run, git asked once and not at each save."""
    for name in ('collect_env', 'get_git_hash'):
        patch.setattr(runner, name, functools.cache(getattr(runner, name)))


def leave_garbage(patch: pytest.MonkeyPatch) -> None:
    """Each data set of MMEngine would look through all objects for garbage, a tenth of a run."""
    patch.setattr(base_dataset, 'gc', SimpleNamespace(collect=lambda: 0))


def _remembering(read):
    once = functools.cache(read)

    def file2dict(*top: object, **base: object) -> tuple:
        """MMEngine names the arguments for a base only."""
        if top or not base['filename'].startswith(LASTING):
            return read(*top, **base)
        return copy.deepcopy(once(**base))

    return file2dict


def end_data_workers(patch: pytest.MonkeyPatch) -> None:
    """Data workers end at once when the garbage collector finds their iterator, as after a run.

    It would find their queues as well, and close them first; torch then waits five seconds for each
    worker, which is not told to end any more. So something else holds the queues until then.
    """
    begin = _MultiProcessingDataLoaderIter.__init__

    def begin_and_hold(self, loader) -> None:
        begin(self, loader)
        weakref.finalize(self, len, self._index_queues)

    patch.setattr(_MultiProcessingDataLoaderIter, '__init__', begin_and_hold)
