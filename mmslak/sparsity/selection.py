"""Pick exactly k elements of a tensor, the same ones on every machine."""

import numpy as np
import torch
from torch import Tensor


def smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest values; among equal ones the lowest flat index goes first.

    Args:
        values: Any shape, floating dtype. Callers check for NaN, because they can name the tensor.
        count: 0 to ``values.numel()``.

    Returns:
        Bool tensor of the shape of ``values`` with exactly ``count`` True.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 <= count <= values.numel():
        raise ValueError(f'cannot pick {count} of {values.numel()} values')
    flat = values.detach().reshape(-1)
    if count in (0, flat.numel()):
        return torch.full_like(values, bool(count), dtype=torch.bool)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()  # exact, and NumPy knows no bfloat16

    threshold = _kth_smallest(flat, count)
    picked = flat < threshold
    ties = (flat == threshold).nonzero().reshape(-1)
    picked[ties[: count - int(picked.count_nonzero())]] = True
    return picked.reshape(values.shape)


def largest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest values; otherwise like :func:`smallest`.

    Raises:
        ValueError: As :func:`smallest`; or ``values`` is not floating (negating uint8 wraps
            around).
    """
    if not values.is_floating_point():
        raise ValueError(f'cannot rank {values.dtype}, only floating dtypes')
    return smallest(-values.detach(), count)


def _kth_smallest(flat: Tensor, k: int) -> Tensor:
    # torch.kthvalue is quadratic on descending input and refuses deterministic mode on CUDA.
    if flat.device.type == 'cpu':
        return torch.from_numpy(np.partition(flat.numpy(), k - 1)[k - 1 : k])
    return flat.sort().values[k - 1]
