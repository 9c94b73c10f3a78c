"""What a trained backbone looks at and what it costs; pictures and exports of it."""

from mmslak.analysis.complexity import Complexity, Cost, complexity
from mmslak.analysis.erf import (
    THRESHOLDS,
    Area,
    ReceptiveField,
    contribution_scores,
    effective_receptive_field,
    high_contribution_area,
)

__all__ = [
    'THRESHOLDS',
    'Area',
    'Complexity',
    'Cost',
    'ReceptiveField',
    'complexity',
    'contribution_scores',
    'effective_receptive_field',
    'high_contribution_area',
]
