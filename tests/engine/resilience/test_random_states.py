import random

import numpy as np
import pytest
import torch

from mmslak.engine.resilience.random_states import (
    random_states,
    random_states_kept,
    restore_random_states,
)


def draw() -> tuple:
    """Of all kinds; a Gauss in Python and NumPy leaves a second number for the next call."""
    return random.gauss(0, 1), np.random.randn(), torch.rand(1).item()


def test_restored_states_draw_the_same_numbers(tmp_path):
    draw()
    torch.save(random_states(), tmp_path / 'states.pth')  # as plain values and tensors
    expected = [draw(), draw()]
    restore_random_states(torch.load(tmp_path / 'states.pth', weights_only=True))
    assert [draw(), draw()] == expected


def draw_and_fail() -> None:
    draw()
    raise KeyError


@pytest.mark.parametrize('devices', [True, False])
def test_kept_states_survive_an_error(devices):
    before = random_states()
    with pytest.raises(KeyError), random_states_kept(devices):
        draw_and_fail()
    expected = draw()
    restore_random_states(before)
    assert draw() == expected
