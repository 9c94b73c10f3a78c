"""Colours of classes: how far they are from each other."""

import math
from itertools import combinations

import pytest

from mmslak.datasets.palette import distinct_colours


@pytest.mark.parametrize(
    ('count', 'distance'), [(5, 162), (10, 78), (20, 78), (64, 65), (150, 45), (256, 36)]
)
def test_colours_differ(count, distance):
    colours = distinct_colours(count)
    assert len(colours) == count
    assert min(math.dist(*pair) for pair in combinations(colours, 2)) >= distance
    assert all(0 <= value <= 255 for colour in colours for value in colour)


def test_more_colours_add_to_fewer():
    assert distinct_colours(0) == ()
    assert distinct_colours(1) == ((0, 0, 0),)
    assert distinct_colours(100)[:30] == distinct_colours(30)
