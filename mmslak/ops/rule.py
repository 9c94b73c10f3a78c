"""The fixed rule: methods by device, dtype and shape, where nothing was measured or may be."""

import torch

from mmslak.ops.plans import Case, Plan

SMALL = 13  # longer side below which torch's convolution is rarely slow


def rule(case: Case) -> Plan:
    """The methods for a case.

    On a CPU, oneDNN is near the machine's peak for strips. It is far from it for all weight
    gradients and, on all but small maps, for large squares: there the FFT is faster. One FFT of x
    serves all kernels, so that on large maps the FFT is faster too where branches are summed, and
    where the weight gradients need the transforms anyway. 'rows' serves wide strips of large maps,
    'toeplitz' the weight gradients of thin kernels on small maps (measured: docs/operator.md).
    Without instructions for bfloat16, oneDNN needs a hundred times as long as the FFT; and there
    are cases from which it does not come back.
    """
    if case.device.type != 'cpu':
        return Plan(('conv',), ('conv',), ('conv',), plain=True)
    if max(max(kernel) for kernel in case.kernels) < SMALL:
        return Plan(('native',), ('native',), ('native',))
    if case.never_ends or (case.dtype == torch.bfloat16 and not _has_bfloat16()):
        return Plan(('fft',), ('fft',), ('fft',))
    height, width = case.shape[2:]
    square = max(min(kernel) for kernel in case.kernels) > 13 and max(height, width) > 20
    large, nchw = min(height, width) >= 96, case.layout == torch.contiguous_format
    forward = 'native'
    if square or (case.summed and large and nchw):
        forward = 'fft'
    elif large and nchw and case.dtype == torch.float32:
        forward = 'rows'
    thin = max(min(kernel) for kernel in case.kernels) <= 7
    full = case.dtype in (torch.float32, torch.float64)
    small = thin and full and max(height, width) <= 32
    gradient = 'fft' if square or large else 'native'
    return Plan((forward,), (gradient,), ('toeplitz' if small else 'fft',))


def _has_bfloat16() -> bool:
    """Whether oneDNN can compute bfloat16 on this CPU at all."""
    known = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return known is None or known()
