import pytest
from mmengine.visualization import Visualizer


@pytest.fixture(autouse=True)
def _no_visualizer_of_an_earlier_test():
    """MMEngine's hooks draw with the process's newest visualizer, which must be their own run's."""
    _forget(Visualizer)


def _forget(kind: type) -> None:
    kind._instance_dict.clear()
    for derived in kind.__subclasses__():
        _forget(derived)
