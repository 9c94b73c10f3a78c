"""Dynamic sparse training on plain tensors; knows nothing of models, hooks or frameworks."""

from mmslak.sparsity.compact import compact_, compact_pair, compact_state, narrow_
from mmslak.sparsity.distribution import (
    dense_layers,
    erk,
    from_map,
    from_nonzeros,
    from_scores,
    in_proportion,
    target_nonzeros,
    uniform,
)
from mmslak.sparsity.masks import Masks, MaskUpdate
from mmslak.sparsity.n_m import drop_and_grow_n_m, is_n_m, n_m_mask, to_semi_structured_
from mmslak.sparsity.pairs import HiddenLayer, find_hidden_layers, find_in_state, probe
from mmslak.sparsity.schedule import SCHEDULES, Schedule, constant, cosine, linear
from mmslak.sparsity.score import magnitude, random_scores, snip
from mmslak.sparsity.topology import DROP_METHODS, drop, drop_and_grow, drop_count, grow
from mmslak.sparsity.units import (
    UNIT_SCORES,
    UnitGroup,
    Units,
    removed_count,
    unit_scores,
)

__all__ = [
    'DROP_METHODS',
    'SCHEDULES',
    'UNIT_SCORES',
    'HiddenLayer',
    'MaskUpdate',
    'Masks',
    'Schedule',
    'UnitGroup',
    'Units',
    'compact_',
    'compact_pair',
    'compact_state',
    'constant',
    'cosine',
    'dense_layers',
    'drop',
    'drop_and_grow',
    'drop_and_grow_n_m',
    'drop_count',
    'erk',
    'find_hidden_layers',
    'find_in_state',
    'from_map',
    'from_nonzeros',
    'from_scores',
    'grow',
    'in_proportion',
    'is_n_m',
    'linear',
    'magnitude',
    'n_m_mask',
    'narrow_',
    'probe',
    'random_scores',
    'removed_count',
    'snip',
    'target_nonzeros',
    'to_semi_structured_',
    'uniform',
    'unit_scores',
]
