"""What plugs into MMEngine's training loop."""

from .bad_sample_hook import BadSampleHook
from .exact_resume_hook import ExactResumeHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite_hook import NonFiniteError, NonFiniteHook
from .preemption_hook import Interrupted, PreemptionHook
from .rehearsal_hook import RehearsalError, RehearsalHook
from .safe_checkpoint_hook import SafeCheckpointHook
from .snip import SparseTrainingError
from .sparse_training_hook import SparseTrainingHook

__all__ = [
    'BadSampleHook',
    'ExactResumeHook',
    'Interrupted',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteError',
    'NonFiniteHook',
    'PreemptionHook',
    'RehearsalError',
    'RehearsalHook',
    'SafeCheckpointHook',
    'SparseTrainingError',
    'SparseTrainingHook',
]
