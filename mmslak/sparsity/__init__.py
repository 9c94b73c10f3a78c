"""Dynamic sparse training on plain tensors; knows nothing of models, hooks or frameworks."""

from .distribution import (
    dense_layers,
    erk,
    from_map,
    from_nonzeros,
    from_scores,
    target_nonzeros,
    uniform,
)
from .masks import Masks, MaskUpdate
from .schedule import SCHEDULES, Schedule, constant, cosine, linear
from .score import magnitude, random_scores, snip
from .topology import DROP_METHODS, drop, drop_and_grow, drop_count, grow

__all__ = [
    'DROP_METHODS',
    'SCHEDULES',
    'MaskUpdate',
    'Masks',
    'Schedule',
    'constant',
    'cosine',
    'dense_layers',
    'drop',
    'drop_and_grow',
    'drop_count',
    'erk',
    'from_map',
    'from_nonzeros',
    'from_scores',
    'grow',
    'linear',
    'magnitude',
    'random_scores',
    'snip',
    'target_nonzeros',
    'uniform',
]
