import pytest
from mmengine.utils import ManagerMixin


@pytest.fixture(autouse=True)
def _nothing_global_of_an_earlier_test():
    """MMEngine keeps one log, scope, visualizer, … per process: each test begins without them.

    Hooks would draw with an earlier run's visualizer, and log to an output that pytest has closed.
    """
    _forget(ManagerMixin)


def _forget(kind: type) -> None:
    kind._instance_dict.clear()
    for derived in kind.__subclasses__():
        _forget(derived)
