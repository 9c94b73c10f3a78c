import gc
import os
from pathlib import Path

import pytest

# What is measured differs from run to run; tests of the measuring switch it on. Also for commands.
os.environ.setdefault('MMSLAK_TUNING', 'off')
# There is a process of pytest for each core: more threads wait for each other, and cost a multiple
# of what tiny tensors do. Read when torch is imported, which is not done here.
os.environ['OMP_NUM_THREADS'] = '1'

# Files that take longest begin first, so that two processes end at the same time.
LONGEST = ('test_survival', 'test_recipes', 'test_run_demo', 'test_restarts', 'test_train_and_test')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What is imported stays: MMEngine's data sets would look through it for garbage, each."""
    gc.freeze()


@pytest.fixture(autouse=True, scope='session')
def _shortcuts():
    from tests import shortcuts

    with pytest.MonkeyPatch.context() as patch:
        shortcuts.take(patch)
        yield


@pytest.fixture(autouse=True, scope='session')
def _cache_of_its_own(tmp_path_factory):
    """What a test remembers is not for the user's next run, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMSLAK_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session')
def quick_demo(tmp_path_factory) -> Path:
    """Folder of the quick demos, of which the second takes over what the first has done."""
    return tmp_path_factory.mktemp('quick_demo')


@pytest.fixture(autouse=True)
def _nothing_global_of_an_earlier_test():
    """MMEngine keeps one log, scope, visualizer, … per process: each test begins without them.

    Hooks would draw with an earlier run's visualizer, and log to an output that pytest has closed.
    """
    from mmengine.utils import ManagerMixin

    _forget(ManagerMixin)


def _forget(kind: type) -> None:
    kind._instance_dict.clear()
    for derived in kind.__subclasses__():
        _forget(derived)
