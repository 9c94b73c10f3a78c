"""The states of all random number generators of a process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_states(devices: bool = True) -> dict:
    """States of Python, NumPy, torch and all its CUDA devices, as plain values and tensors.

    Args:
        devices: Whether the generators of devices are among them.
    """
    kind, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=[kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        torch=torch.get_rng_state(),
        devices=torch.cuda.get_rng_state_all() if devices and torch.cuda.is_available() else [],
    )


def restore_random_states(states: dict) -> None:
    """Puts the generators back to what `random_states` returned."""
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    for device, state in enumerate(states['devices'][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def random_states_kept(devices: bool = True) -> Iterator[None]:
    """Restores the states of the generators at the end of the block."""
    states = random_states(devices)
    try:
        yield
    finally:
        restore_random_states(states)
