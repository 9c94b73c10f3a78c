"""Depthwise convolution as banded matrix products in fused Triton kernels, for NVIDIA GPUs.

A kernel row of K entries that slides along W makes 64 output pixels of 64 + K - 1 input pixels: a
product with a banded (Toeplitz) matrix, which tensor cores compute, with sums in float32. Upright
strips run on the transposed map. One launch computes all branches, so that they share x in the
cache. One launch computes the gradient of x, and one per branch the gradient of its kernel.
Sizes of tiles follow from shapes and are not tuned: the speed on a GPU is not measured yet. Under
`TRITON_INTERPRET=1` the kernels run on a CPU, slowly, for tests.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmslak.ops.native import crop_to_map, layout_of, merge_kernels

if TYPE_CHECKING:
    from types import ModuleType

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COPIES = 8  # shifted copies of a kernel row: 8 entries of 16 bits are one aligned 16-byte read


def available(x: Tensor) -> bool:
    """Whether this backend can compute on x: its device, its dtype and triton itself."""
    try:
        check(x)
    except ValueError:
        return False
    return True


def check(x: Tensor, weights: Sequence[Tensor] = ()) -> None:
    """Checks that this backend can run here.

    Raises:
        ValueError: If x is not on an NVIDIA GPU with bfloat16 tensor cores (or on the CPU under
            Triton's interpreter), triton is missing or too old, or a dtype is not supported.
    """
    if x.device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError(
            "backend 'triton': expected x on a GPU, got the CPU, where it runs only under "
            'TRITON_INTERPRET=1'
        )
    if x.device.type not in ('cpu', 'cuda') or (x.is_cuda and torch.version.hip):
        raise ValueError(f"backend 'triton': expected x on an NVIDIA GPU, got {x.device.type}")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        raise ValueError("backend 'triton': expected a GPU of compute capability 8.0 or above")
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton': expected float32, float16 or bfloat16, got {x.dtype}")
    for weight in weights:
        if weight.dtype != x.dtype:
            raise ValueError(f'weight: expected dtype {x.dtype} of x, got {weight.dtype}')
    kernels = _kernels()
    if x.device.type == 'cpu' and not kernels.INTERPRETED.value:
        raise ValueError("backend 'triton': TRITON_INTERPRET=1 was set after triton's import")


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, summed: bool = False
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias.

    Args:
        x: (N, C, H, W), any strides; float32, float16 or bfloat16.
        weights: Kernels (C, 1, kH, kW) of x's dtype, odd sides of any ratio.
        bias: Shape (C,) or None; only where summed.
        summed: Whether the outputs are added up, in float32 and in one kernel.

    Returns:
        Outputs in x's dtype, channels_last where x is that and not contiguous, else contiguous.

    Raises:
        ValueError: As `check`.
    """
    check(x, weights)
    maps = _Maps(x)
    if summed:
        weights = merge_kernels(weights)
    outputs = _convolve([maps] * len(weights), weights, bias, summed)
    return [_in_layout_of(x, output) for output in outputs]


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels. Sums run in a fixed order: the same input, the same bits.

    Args:
        x: The input, (N, C, H, W).
        weights: The kernels, each (C, 1, kH, kW).
        gradients: Output gradients of x's shape and dtype: one per kernel, or one for their sum.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradients: Whether those of the kernels are wanted.

    Returns:
        (gradient of x or None, gradients of the kernels or None), in their dtypes.

    Raises:
        ValueError: As `check`.
    """
    check(x, weights)
    maps = [_Maps(gradient) for gradient in gradients]
    dx = dws = None
    if input_gradient:  # the operator with the kernels turned by 180°, summed over the branches
        kernels = merge_kernels(weights) if len(maps) < len(weights) else weights
        kernels = [kernel.flip((2, 3)) for kernel in kernels]
        dx = _in_layout_of(x, _convolve(_per_kernel(maps, kernels), kernels, None, summed=True)[0])
    if weight_gradients:
        source = _Maps(x)
        pairs = zip(_per_kernel(maps, weights), weights, strict=True)
        dws = [_correlate(source, gradient, weight) for gradient, weight in pairs]
    return dx, dws


class _Maps:
    """Feature maps (N, C, H, W) as the kernels read them: lines padded to a multiple of 16.

    The turned maps, with H and W swapped, are made when a branch first needs them.
    """

    def __init__(self, maps: Tensor) -> None:
        self.shape = maps.shape
        self._maps = maps
        self._turned: Tensor | None = None
        self._padded: Tensor | None = None

    def get(self, turned: bool) -> Tensor:
        """(N, C, H, W + padding), or turned (N, C, W, H + padding), contiguous."""
        if turned:
            if self._turned is None:
                self._turned = _transposed(self._contiguous(), _pitch(self.shape[2]))
            return self._turned
        if self._padded is None:
            maps = self._contiguous()
            padding = _pitch(maps.shape[3]) - maps.shape[3]
            self._padded = F.pad(maps, (0, padding)) if padding else maps
        return self._padded

    def _contiguous(self) -> Tensor:
        if layout_of(self._maps) == torch.channels_last:
            pixels = self._maps.permute(0, 2, 3, 1).flatten(1, 2)
            self._maps = _transposed(pixels).view(self.shape)
        self._maps = self._maps.contiguous()
        return self._maps


class _Tile(NamedTuple):
    """What one program computes: side × side pixels of some images; both are powers of two."""

    images: int
    side: int


def _tile(shape: torch.Size, rows: int) -> _Tile:
    """Tiles of up to `rows` lines, as matrix products want them: small maps share one."""
    batch, channels, height, width = shape
    side = min(64, rows, max(16, _power_of_two(max(height, width))))
    images = max(1, min(rows // side, _power_of_two(batch)))
    if images * channels * _pitch(height) * _pitch(width) >= 2**31:
        images = 1  # offsets within a tile have 32 bits
    return _Tile(images, side)


def _per_kernel(maps: list[_Maps], weights: Sequence[Tensor]) -> list[_Maps]:
    """One entry of maps per kernel; a single entry is repeated."""
    return maps * len(weights) if len(maps) < len(weights) else maps


def _convolve(
    maps: Sequence[_Maps], weights: Sequence[Tensor], bias: Tensor | None, summed: bool
) -> list[Tensor]:
    """Convolutions of maps[b] with weights[b], or their sum plus bias, contiguous; one launch."""
    shape = maps[0].shape
    batch, channels, height, width = shape
    half = weights[0].element_size() == 2
    tile = _tile(shape, rows=128)
    depth = min(32, tile.side)
    pad = tile.side + 16
    sources, bands, branches = [], [], []
    for source, weight in zip(maps, weights, strict=True):
        weight, turned = _longer_side_along_columns(crop_to_map(weight, shape))
        rows, columns = weight.shape[1:]
        length = _round_up(2 * tile.side + columns + depth + 16, 16)
        padded = F.pad(weight, (pad, length + COPIES - 1 - pad - columns))
        bands.append(padded.unfold(2, length, 1).contiguous())  # (C, rows, COPIES, length)
        branches.append((rows, columns, length, turned))
        sources.append(source.get(turned))
    x = sources[0]
    outputs = [x.new_empty(shape) for _ in range(1 if summed else len(weights))]
    tiles = -(-batch // tile.images) * -(-height // tile.side) * -(-width // tile.side)
    with torch.cuda.device_of(x):
        _kernels().convolve[(tiles, channels)](
            tuple(sources),
            tuple(outputs),
            tuple(bands),
            bias,
            batch,
            channels,
            height,
            width,
            _pitch(width),
            _pitch(height),
            BRANCHES=tuple(branches),
            SUMMED=summed,
            IMAGES=tile.images,
            SIDE=tile.side,
            DEPTH=depth,
            PAD=pad,
            PRECISION=_precision(x),
            num_warps=4 if half else 8,
            num_stages=4 if half else 3,
        )
    return outputs


def _correlate(source: _Maps, gradient: _Maps, weight: Tensor) -> Tensor:
    """Gradient of the kernels (C, 1, kH, kW), in their dtype."""
    cropped, turned = _longer_side_along_columns(crop_to_map(weight, source.shape))
    x, dy = source.get(turned), gradient.get(turned)
    batch, channels, lines, pitch = x.shape
    rows, columns = cropped.shape[1:]
    reach = columns // 2
    tile = _tile(source.shape, rows=64 if x.element_size() == 2 else 32)
    first, total = 0, tile.side  # a map of one tile is its own window
    if pitch > tile.side:
        first = -_round_up(reach, 16)
        total = tile.side + reach - first
    window = min(128, _power_of_two(total))
    windows = -(-total // window)
    sums = x.new_empty((channels, rows, windows, 2 * window), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _kernels().correlate[(rows * windows, channels)](
            x,
            dy,
            sums,
            first,
            batch,
            channels,
            lines,
            pitch,
            ROWS=rows,
            WINDOWS=windows,
            WINDOW=window,
            IMAGES=tile.images,
            SIDE=tile.side,
            PRECISION=_precision(x),
            num_warps=4,
            num_stages=3,
        )
    # Entry j of window q belongs to the kernel's entry first + q · window + j - window + reach.
    spread = sums.new_zeros(channels, rows, columns + (windows + 3) * window)
    for q in range(windows):
        begin = first + (q + 1) * window + reach
        spread[:, :, begin : begin + 2 * window] += sums[:, :, q]
    dw = spread[:, :, 2 * window : 2 * window + columns]
    dw = (dw.transpose(1, 2) if turned else dw).unsqueeze(1)
    outside = [(weight.shape[d] - dw.shape[d]) // 2 for d in (3, 2)]
    return F.pad(dw, [side for side in outside for _ in range(2)]).to(weight.dtype)


def _longer_side_along_columns(weight: Tensor) -> tuple[Tensor, bool]:
    """(C, rows, columns) with the longer side along the columns, and whether it is transposed."""
    turned = weight.shape[2] > weight.shape[3]
    return (weight[:, 0].transpose(1, 2) if turned else weight[:, 0]), turned


def _transposed(matrices: Tensor, pitch: int | None = None) -> Tensor:
    """Contiguous (…, rows, columns) to (…, columns, pitch), with zeros from `rows` to `pitch`."""
    *batch, rows, columns = matrices.shape
    pitch = pitch or rows
    output = matrices.new_empty(*batch, columns, pitch)
    side = 64
    tiles = -(-pitch // side) * -(-columns // side)
    # The second axis of a grid has at most 65535 programs.
    pairs = zip(
        matrices.view(-1, rows, columns).split(65535),
        output.view(-1, columns, pitch).split(65535),
        strict=True,
    )
    with torch.cuda.device_of(matrices):
        for source, target in pairs:
            _kernels().transpose[(tiles, len(source))](
                source, target, rows, columns, pitch, SIDE=side, num_warps=4
            )
    return output


def _in_layout_of(x: Tensor, output: Tensor) -> Tensor:
    if layout_of(x) != torch.channels_last:
        return output
    batch, channels, height, width = x.shape
    return _transposed(output.flatten(2)).view(batch, height, width, channels).permute(0, 3, 1, 2)


def _precision(x: Tensor) -> str:
    """Of products: three in TensorFloat-32 keep float32's accuracy; 16 bits need no choice."""
    return 'tf32x3' if x.dtype == torch.float32 else 'ieee'


def _pitch(length: int) -> int:
    """Length of lines in memory, for which all of them begin at aligned addresses."""
    return _round_up(length, 16)


def _power_of_two(size: int) -> int:
    """The next power of two from `size` on."""
    return 1 << (size - 1).bit_length()


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _kernels() -> 'ModuleType':
    """The module of kernels; whether they are interpreted is fixed when triton is imported."""
    try:
        import triton
    except ModuleNotFoundError:
        raise ValueError("backend 'triton': the package triton is not installed") from None
    version = triton.__version__
    if tuple(int(part) for part in version.split('.')[:2]) < (3, 3):
        raise ValueError(f"backend 'triton': expected triton 3.3 or newer, got {version}")
    from mmslak.ops import triton_kernels

    return triton_kernels
