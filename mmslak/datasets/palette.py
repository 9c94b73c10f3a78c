"""Colours of classes that a person can tell apart."""

import functools

import numpy as np

from mmslak.datasets.digit_scenes import SEG_PALETTE

STEP = 15  # between neighbours of the colours to choose from, in each of red, green and blue


@functools.cache
def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that are far from each other, always the same: more only add to those of fewer.

    After those of the digit scenes, of which black is the first, each is the one that is farthest
    from all before it. Any two of 64 differ by 65 at least, any two of 256 by 36 (the distance in
    red, green and blue, each from 0 to 255).

    Args:
        count: From 0. Colours repeat after some 5,800.
    """
    levels = [np.arange(0, 256, STEP)] * 3
    grid = np.stack(np.meshgrid(*levels, indexing='ij'), axis=-1).reshape(-1, 3)
    colours = [*SEG_PALETTE[:count]]
    nearest = np.full(len(grid), np.iinfo(int).max)
    for i in range(count):
        if i == len(colours):
            colours.append(tuple(grid[nearest.argmax()].tolist()))
        nearest = np.minimum(nearest, ((grid - colours[i]) ** 2).sum(1))
    return tuple(colours)
