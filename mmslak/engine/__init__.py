"""What plugs into MMEngine's training loop."""

from mmslak.engine.accelerate_hook import AccelerateHook
from mmslak.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmslak.engine.resilience.bad_sample_hook import BadSampleHook
from mmslak.engine.resilience.exact_resume_hook import ExactResumeHook
from mmslak.engine.resilience.non_finite_hook import NonFiniteError, NonFiniteHook
from mmslak.engine.resilience.preemption_hook import Interrupted, PreemptionHook
from mmslak.engine.resilience.rehearsal_hook import RehearsalError, RehearsalHook
from mmslak.engine.resilience.safe_checkpoint_hook import SafeCheckpointHook
from mmslak.engine.snip import SparseTrainingError
from mmslak.engine.sparse_training_hook import SparseTrainingHook
from mmslak.engine.time_estimate_hook import TimeEstimateHook

__all__ = [
    'AccelerateHook',
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
    'TimeEstimateHook',
]
