"""The large depthwise kernels of a model: their parts, their zeros, and what they are together."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST = 5  # longer side of the kernels that count as large


@dataclass
class LayerKernels:
    """The kernels of one layer.

    Attributes:
        weights: (C, 1, kH, kW) of each part by its name within the layer, as it is trained.
        fused: (C, K, K): the one kernel that does what all parts and their norms do in eval mode;
            of a single convolution its own, (C, kH, kW).
    """

    weights: dict[str, Tensor]
    fused: Tensor

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        active = sum(int(weight.count_nonzero()) for weight in self.weights.values())
        return active / sum(weight.numel() for weight in self.weights.values())


def large_kernel_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a large depthwise kernel by their names, in the order of the model.

    A layer that computes such a kernel by several convolutions counts as one.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f'{outer}.') for outer in found)
        if not inside and (hasattr(module, 'conv_backend') or isinstance(module, nn.Conv2d)):
            sides = [max(weight.shape[2:]) for weight in _depthwise(module).values()]
            if sides and max(sides) >= SMALLEST:
                found[name] = module
    return found


@torch.no_grad()
def layer_kernels(layer: nn.Module) -> LayerKernels:
    """The kernels of a layer of `large_kernel_layers`, on the CPU.

    The fused kernel is the layer's answer to one pixel: it holds what shared weights (PeLK) stand
    for, norms with their statistics, and parts that were deployed.

    Args:
        layer: In eval mode.
    """
    weights = {name: weight.detach() for name, weight in _depthwise(layer).items()}
    parts = {name: weight.cpu() for name, weight in weights.items()}
    if isinstance(layer, nn.Conv2d):
        return LayerKernels(parts, parts['kernel'][:, 0])
    dense = [p.kernel() for p in layer.modules() if callable(getattr(p, 'kernel', None))]
    side = max(max(kernel.shape[2:]) for kernel in [*weights.values(), *dense])
    weight = next(iter(weights.values()))
    convolved = weight.shape[0]
    channels = sum(getattr(layer, 'sizes', (convolved,)))  # PeLK passes some of them
    pictures = weight.new_zeros(2, channels, side, side)
    pictures[1, :, side // 2, side // 2] = 1
    nothing, pixel = layer(pictures)[:, :convolved]
    return LayerKernels(parts, (pixel - nothing).flip(1, 2).cpu())


def _depthwise(layer: nn.Module) -> dict[str, Tensor]:
    """The depthwise weights of a layer by the names of their convolutions."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return {}
    return {
        name.removesuffix('weight').removesuffix('.').removesuffix('.conv') or 'kernel': weight
        for name, weight in layer.named_parameters()
        if weight.dim() == 4 and weight.shape[1] == 1
    }
