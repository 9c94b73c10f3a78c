"""What plugs into MMEngine's training loop."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .sparse_training_hook import SparseTrainingHook

__all__ = ['LayerDecayOptimWrapperConstructor', 'SparseTrainingHook']
