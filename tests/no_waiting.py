"""A check, on any device, that code never makes the host wait for a GPU."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = (aten.nonzero, aten.masked_select, aten._local_scalar_dense, aten.equal)
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class NoWaiting(TorchDispatchMode):
    """Raises on operations whose result, or its size, the host has to read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if packet in WAITING or by_mask:
            raise AssertionError(f'{func} makes the host wait for the device')
        return func(*args, **(kwargs or {}))
