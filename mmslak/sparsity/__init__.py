"""Dynamic sparse training on plain tensors; knows nothing of models, hooks or frameworks."""

from mmslak.sparsity.distribution import (
    dense_layers,
    erk,
    from_map,
    from_nonzeros,
    from_scores,
    target_nonzeros,
    uniform,
)
from mmslak.sparsity.masks import Masks, MaskUpdate
from mmslak.sparsity.schedule import SCHEDULES, Schedule, constant, cosine, linear
from mmslak.sparsity.score import magnitude, random_scores, snip
from mmslak.sparsity.topology import DROP_METHODS, drop, drop_and_grow, drop_count, grow

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
