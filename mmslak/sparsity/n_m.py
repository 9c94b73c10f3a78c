"""n:m sparsity: n non-zeros in each group of m neighbours along the input of a linear layer.

GPUs from NVIDIA's Ampere on multiply 2:4 weights faster than dense ones (Mishra et al.,
arXiv:2104.08378).
"""

import torch
from torch import Tensor, nn


def n_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks the n highest scores of each group of m along the last dimension.

    Args:
        scores: (out, in) with `in` a multiple of m, floating; equal scores: the lowest index first.
        n: Non-zeros of a group.
        m: Size of a group.

    Returns:
        Bool tensor of the same shape with exactly n of every m True.

    Raises:
        ValueError: The numbers do not fit the shape, or a score is NaN.
    """
    groups = _groups(scores, n, m)
    if groups.isnan().any():
        raise ValueError('cannot rank scores: some are NaN')
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, :n], True).reshape(scores.shape)


def is_n_m(mask: Tensor, n: int, m: int, exactly: bool = False) -> bool:
    """Whether at most, or exactly, n of each m along the last dimension are True (or not zero)."""
    if mask.dim() != 2 or mask.shape[1] % m:
        return False
    counts = (mask != 0).reshape(-1, m).sum(1)
    return bool((counts == n if exactly else counts <= n).all())


def drop_and_grow_n_m(
    weight: Tensor, mask: Tensor, scores: Tensor, count: int, n: int, m: int
) -> Tensor:
    """Moves one non-zero within each of ``count`` groups of m.

    The groups are those whose smallest active weight is the smallest of all. That weight is
    dropped, and the inactive position of the highest score grows; it may be the same one. Every
    group keeps its n.

    Args:
        weight: (out, in), floating.
        mask: Bool, n of every m True.
        scores: Growth scores, the shape of ``weight``.
        count: Number of groups; more than there are means all.
        n: Non-zeros of a group.
        m: Size of a group.

    Returns:
        A new bool mask.

    Raises:
        ValueError: As :func:`n_m_mask`; or the mask is not n:m.
    """
    values, active = _groups(weight.detach().abs().float(), n, m), _groups(mask, n, m)
    if not bool((active.sum(1) == n).all()):
        raise ValueError(f'the mask does not have {n} of every {m}')
    if values[active].isnan().any():
        raise ValueError('cannot rank active weights: some are NaN')
    smallest, where = values.masked_fill(~active, torch.inf).min(1)
    chosen = smallest.argsort(stable=True)[:count]
    new = active.clone()
    new[chosen, where[chosen]] = False
    free = _groups(scores.to(mask.device), n, m)[chosen].masked_fill(new[chosen], -torch.inf)
    new[chosen, free.argmax(1)] = True
    return new.reshape(mask.shape)


def to_semi_structured_(model: nn.Module) -> int:
    """Stores every 2:4 linear weight of a model so that NVIDIA GPUs multiply it faster, in place.

    For inference, on a GPU from compute capability 8.0, in half precision or bfloat16
    (`torch.sparse.to_sparse_semi_structured`). Layers whose weight is not 2:4, or is too small for
    torch's kernels, stay dense.

    Returns:
        Number of layers changed.

    Raises:
        RuntimeError: The model is not on such a GPU.
    """
    from torch.sparse import to_sparse_semi_structured

    changed = 0
    for layer in model.modules():
        if type(layer) is not nn.Linear or not is_n_m(layer.weight.detach(), 2, 4):
            continue
        device = layer.weight.device
        if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError(
                f'2:4 weights need an NVIDIA GPU of compute capability 8.0 or newer; the model is '
                f'on {device}'
            )
        if layer.out_features % 64 or layer.in_features % 64:
            continue
        weight = to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        changed += 1
    return changed


def _groups(tensor: Tensor, n: int, m: int) -> Tensor:
    if not 0 < n < m:
        raise ValueError(f'n:m needs 0 < n < m, got {n}:{m}')
    if tensor.dim() != 2 or tensor.shape[1] % m:
        raise ValueError(f'{n}:{m} needs (out, in) with in a multiple of {m}, got {tensor.shape}')
    return tensor.reshape(-1, m)
