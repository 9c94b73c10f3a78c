"""Large depthwise convolutions of any model by mmslak's operator, switched on in a config."""

from collections import Counter

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmslak.ops import DepthwiseConv2d
from mmslak.ops.accelerate import MIN_SIZE, accelerate, replaceable
from mmslak.registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Calls `mmslak.ops.accelerate` on the runner's model before it trains, validates or tests.

    Checkpoints have the names and weights that they have without the hook, and can be used with it
    and without. The model may be wrapped (DDP) before, and averaged or initialised before or after.

    Args:
        min_size: Least longer side of the kernels that are changed, in pixels.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the model

    def __init__(self, min_size: int = MIN_SIZE) -> None:
        self.min_size = min_size

    def before_run(self, runner: Runner) -> None:
        """Changes the model, and logs how many convolutions of which sizes it had."""
        sizes = Counter(conv.kernel_size for conv in replaceable(runner.model, self.min_size))
        if accelerate(runner.model, self.min_size):
            listed = ', '.join(f'{n} of {h}×{w}' for (h, w), n in sorted(sizes.items()))
            runner.logger.info(f'AccelerateHook: changed {sizes.total()} convolutions: {listed}')
        elif not any(isinstance(module, DepthwiseConv2d) for module in runner.model.modules()):
            runner.logger.warning(
                'AccelerateHook: the model has no depthwise convolution of stride 1, dilation 1 '
                f"and 'same' padding with a side of at least {self.min_size}: nothing was changed"
            )
