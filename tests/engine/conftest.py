import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """On a shared machine, threads cost a hundred times what tiny tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
