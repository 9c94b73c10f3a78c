"""Dynamic sparse training on plain tensors; knows nothing of models, hooks or frameworks."""

from mmslak.sparsity.compact import compact_, compact_pair, compact_state, narrow_
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
from mmslak.sparsity.pairs import HiddenLayer, find_hidden_layers, find_in_state, probe
from mmslak.sparsity.schedule import SCHEDULES, Schedule, constant, cosine, linear
from mmslak.sparsity.score import magnitude, random_scores, snip
from mmslak.sparsity.topology import DROP_METHODS, drop, drop_and_grow, drop_count, grow

__all__ = [
    'DROP_METHODS',
    'SCHEDULES',
    'HiddenLayer',
    'MaskUpdate',
    'Masks',
    'Schedule',
    'compact_',
    'compact_pair',
    'compact_state',
    'constant',
    'cosine',
    'dense_layers',
    'drop',
    'drop_and_grow',
    'drop_count',
    'erk',
    'find_hidden_layers',
    'find_in_state',
    'from_map',
    'from_nonzeros',
    'from_scores',
    'grow',
    'linear',
    'magnitude',
    'narrow_',
    'probe',
    'random_scores',
    'snip',
    'target_nonzeros',
    'uniform',
]
