"""Depthwise convolution as banded matrix products in fused Triton kernels, for NVIDIA GPUs.

A kernel row of K entries that slides along W makes 64 output pixels of 64 + K - 1 input pixels: a
product with a banded (Toeplitz) matrix, which tensor cores compute, with sums in float32. Upright
strips run on the transposed map. A forward is one launch that copies x to aligned lines, one that
builds the bands of all kernels, one that computes all branches and, in NHWC, one that copies the
outputs back. A backward adds one launch for the gradients of kernels, or a few where those differ
in size, and one that collects these. The speed on a GPU is not measured yet; `tiles` proposes what
to try, marching kernels among it, which read every line of x once. Under `TRITON_INTERPRET=1` the
kernels run on a CPU, slowly, for tests.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmslak.ops.layouts import layout_of

if TYPE_CHECKING:
    from types import ModuleType

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Programs of weight gradients, a few times as many as a GPU has room for at once; a fixed number
# fixes the bits.
PROGRAMS = 1024


class Tile(NamedTuple):
    """What one program computes: lines of one or more images, all powers of two.

    Attributes:
        rows: Lines of all images together, the rows of a matrix product.
        side: Lines of one image, and pixels of a line; from 16 on.
        warps: Warps of the program.
        marches: Whether it goes down the lines of a forward's map, each of which is read once and
            meets all rows of a kernel; `rows` then counts segments of lines.
    """

    rows: int
    side: int
    warps: int
    marches: bool = False

    @property
    def images(self) -> int:
        """Images whose lines share a product, where the program does not march."""
        return self.rows // self.side


# Fits into the registers and the shared memory of all GPUs, where one of 64 columns does not.
MARCHING = Tile(64, 32, 4, marches=True)


def tiles(x: Tensor, weights: Sequence[Tensor]) -> list[Tile]:
    """Up to three tiles for an input (N, C, H, W), the default one first.

    Each can be the `tile` of `forward` and `backward`, whose results differ by rounding only.
    """
    several = [Tile(128, 64, 4), Tile(64, 64, 4), Tile(128, 32, 4)]
    if x.element_size() == 4:
        several = [Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 32, 4)]
    elif min(x.shape[2:]) // _segments(MARCHING, x.shape) >= 16 and _marches(weights, MARCHING, x):
        several[2] = MARCHING
    return list(dict.fromkeys(_fitted(tile, x.shape) for tile in several))


def available(x: Tensor) -> bool:
    """Whether this backend can compute on x: its device, its dtype and triton itself."""
    try:
        check(x)
    except ValueError:
        return False
    return True


def check(x: Tensor, weights: Sequence[Tensor] = (), bias: Tensor | None = None) -> None:
    """Checks that this backend can run here.

    Raises:
        ValueError: If x is not on an NVIDIA GPU with bfloat16 tensor cores (or on the CPU under
            Triton's interpreter), triton is missing or too old, a dtype is not supported, or a
            kernel or the bias has another dtype or device than x.
    """
    if x.device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError(
            "backend 'triton': expected x on a GPU, got the CPU, where it runs only under "
            'TRITON_INTERPRET=1'
        )
    if x.device.type not in ('cpu', 'cuda') or (x.is_cuda and torch.version.hip):
        raise ValueError(f"backend 'triton': expected x on an NVIDIA GPU, got {x.device.type}")
    if _capability(x) < (8, 0):
        raise ValueError("backend 'triton': expected a GPU of compute capability 8.0 or above")
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton': expected float32, float16 or bfloat16, got {x.dtype}")
    named = [('weight', weight) for weight in weights]
    for name, tensor in named if bias is None else [*named, ('bias', bias)]:
        if tensor.dtype != x.dtype:
            raise ValueError(f'{name}: expected dtype {x.dtype} of x, got {tensor.dtype}')
        if tensor.device != x.device:
            raise ValueError(f'{name}: expected device {x.device} of x, got {tensor.device}')
    kernels = _kernels()
    if x.device.type == 'cpu' and not kernels.INTERPRETED.value:
        raise ValueError("backend 'triton': TRITON_INTERPRET=1 was set after triton's import")


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    summed: bool = False,
    tile: Sequence[int] | None = None,
) -> list[Tensor]:
    """One output of x's shape for each of the kernels (C, 1, kH, kW), or their sum plus bias.

    Args:
        x: (N, C, H, W), any strides; float32, float16 or bfloat16.
        weights: Kernels (C, 1, kH, kW) of x's dtype and device, odd sides of any ratio.
        bias: Shape (C,) or None; only where summed.
        summed: Whether the outputs are added up, in float32 and in one kernel.
        tile: One of `tiles(x, weights)`, or None for the first.

    Returns:
        Outputs in x's dtype and layout (`layout_of`).

    Raises:
        ValueError: As `check`.
        RuntimeError: If a CUDA graph is captured and no such call has been made before.
    """
    check(x, weights, bias)
    tile = _tile(x, tile)
    if tile.marches and _marches(weights, tile, x):
        groups = _groups(weights, x.shape, largest=len(weights) if summed else 1)
        if not summed or len(groups) == 1:
            return _march(x, weights, groups, bias, tile)
    tile = _tile(x, None) if tile.marches else tile
    groups = _groups(weights, x.shape, largest=len(weights) if summed else 2)
    (lines,) = _lines([x], [{group.turned for group in groups}])
    return _convolve(x, [lines] * len(groups), weights, groups, bias, summed, tile)


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: bool = True,
    weight_gradients: bool = True,
    tile: Sequence[int] | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradients of x and of the kernels. Sums run in a fixed order: the same input, the same bits.

    Args:
        x: The input, (N, C, H, W).
        weights: The kernels, each (C, 1, kH, kW).
        gradients: Output gradients of x's shape and dtype: one per kernel, or one for their sum.
        input_gradient: Whether the gradient of x is wanted.
        weight_gradients: Whether those of the kernels are wanted.
        tile: One of `tiles(x, weights)`, or None for the first.

    Returns:
        (gradient of x or None, gradients of the kernels or None), in their dtypes.

    Raises:
        ValueError: As `check`.
        RuntimeError: As `forward`.
    """
    check(x, weights)
    tile = _tile(x, tile)
    tile = _tile(x, None) if tile.marches else tile
    summed = len(gradients) < len(weights)
    groups = _groups(weights, x.shape, largest=len(weights) if summed else 1)
    turned = [{group.turned} for group in groups]
    if summed:
        lines = _lines(gradients, [set.union(*turned)]) * len(groups)
    else:
        lines = _lines([gradients[group.kernels[0]] for group in groups], turned)
    dx = dws = None
    if input_gradient:  # the operator with the kernels turned by 180°, summed over the branches
        (dx,) = _convolve(x, lines, weights, groups, None, True, tile, flip=True)
    if weight_gradients:
        (source,) = _lines([x], [set.union(*turned)])
        dws = _weight_gradients(x, source, lines, weights, groups, tile)
    return dx, dws


class _Group(NamedTuple):
    """Kernels that fit into the first of them, whose longer side is its columns.

    Attributes:
        turned: Whether the columns run along H.
        rows: Shorter side of the first kernel.
        columns: Its longer side.
        kernels: Places of the kernels in the list of all.
    """

    turned: bool
    rows: int
    columns: int
    kernels: list[int]


def _groups(weights: Sequence[Tensor], shape: torch.Size, largest: int) -> list[_Group]:
    """Groups of up to `largest` kernels, turned ones first; entries beyond a map do not count."""
    sizes = [_size(weight, shape) for weight in weights]
    groups: list[list[int]] = []
    for k in sorted(range(len(sizes)), key=lambda k: -math.prod(sizes[k])):
        for group in groups:
            height, width = sizes[group[0]]
            if len(group) < largest and sizes[k][0] <= height and sizes[k][1] <= width:
                group.append(k)
                break
        else:
            groups.append([k])
    found = []
    for group in groups:
        height, width = sizes[group[0]]
        found.append(_Group(height > width, min(height, width), max(height, width), group))
    return sorted(found, key=lambda group: not group.turned)


def _size(weight: Tensor, shape: torch.Size) -> tuple[int, int]:
    """Height and width of a kernel without the entries that only meet padding."""
    return min(weight.shape[2], 2 * shape[2] - 1), min(weight.shape[3], 2 * shape[3] - 1)


def _tile(x: Tensor, tile: Sequence[int] | None) -> Tile:
    return tiles(x, ())[0] if tile is None else _fitted(Tile(*tile), x.shape)


def _fitted(tile: Tile, shape: torch.Size) -> Tile:
    """A tile no larger than the maps: several small ones share it."""
    if tile.marches:
        return tile
    batch, channels, height, width = shape
    side = min(tile.side, tile.rows, max(16, _power_of_two(max(height, width))))
    images = max(1, min(tile.rows // side, _power_of_two(batch)))
    if images * channels * _pitch(height) * _pitch(width) >= 2**31:
        images = 1  # offsets within a tile have 32 bits
    return Tile(images * side, side, tile.warps)


def _lines(maps: Sequence[Tensor], needs: Sequence[set[bool]]) -> list[dict[bool, Tensor]]:
    """Maps (N, C, H, W) as the kernels read them: lines padded to a multiple of 16.

    Args:
        maps: Of one shape and any strides.
        needs: Per map whether it is needed as it is (False), turned with H and W swapped (True).

    Returns:
        Per map what is needed: (N, C, H, W + padding), (N, C, W, H + padding).
    """
    batch, channels, height, width = maps[0].shape
    shapes = {
        False: (batch, channels, height, _pitch(width)),
        True: (batch, channels, width, _pitch(height)),
    }
    lines: list[dict[bool, Tensor]] = []
    copies: dict[tuple[int, ...], list[int]] = {}  # one launch for all maps of the same strides
    for i, (source, needed) in enumerate(zip(maps, needs, strict=True)):
        usable = width % 16 == 0 and source.is_contiguous()
        lines.append({False: source} if usable else {})
        missing = needed - lines[i].keys()
        lines[i] |= {turned: source.new_empty(shapes[turned]) for turned in missing}
        if missing:
            copies.setdefault(source.stride(), []).append(i)
    for several in copies.values():
        targets = [(lines[i].get(False), lines[i].get(True)) for i in several]
        sources = [maps[i] for i in several]
        if targets[0][0] is sources[0]:
            targets = [(None, turned) for _, turned in targets]
        _copy(sources, targets, _pitch(width), _pitch(height))
    return lines


def _copy(
    sources: Sequence[Tensor],
    targets: Sequence[tuple[Tensor | None, Tensor | None]],
    columns: int,
    turned_pitch: int,
) -> None:
    """Copies maps (N, C, H, W) to others of any strides and `columns` per line, and to turned ones.

    Sources have the same strides, and so do the targets; None is not written.
    """
    source = sources[0]
    target = next((target for target, _ in targets if target is not None), source)
    numbers = [*source.shape[1:], *source.stride(), *target.stride(), columns]
    batch, channels = source.shape[:2]
    side = min(64, max(16, _power_of_two(max(columns, turned_pitch))))
    if channels > 1 and 1 in (source.stride(1), target.stride(1)):
        side = 16  # channels are neighbours: many of them in a tile
    block = min(_power_of_two(channels), 8192 // side**2)
    count = batch * _ceil(channels, block) * _ceil(columns, side) * _ceil(turned_pitch, side)
    _launch(
        'arrange',
        source,
        (count, len(sources)),
        tuple(sources),
        tuple(source if target is None else target for target, _ in targets),
        tuple(source if turned is None else turned for _, turned in targets),
        *numbers,
        turned_pitch,
        WANTED=tuple(int(tensor is not None) for pair in targets for tensor in pair),
        ALIGNS=tuple(math.gcd(number, 16) for number in numbers),
        CHANNELS=block,
        SIDE=side,
        num_warps=8,
    )


def _convolve(
    x: Tensor,
    lines: Sequence[dict[bool, Tensor]],
    weights: Sequence[Tensor],
    groups: Sequence[_Group],
    bias: Tensor | None,
    summed: bool,
    tile: Tile,
    flip: bool = False,
) -> list[Tensor]:
    """Convolutions of a map per group with its kernels, or their sum plus bias, in x's layout."""
    batch, channels, height, width = x.shape
    bands = []  # one per output of a group: its sum, or its kernels
    for turned, rows, columns, kernels in groups:
        bands.append([_Group(turned, rows, columns, kernels if summed else kernels[:1])])
        for k in [] if summed else kernels[1:]:
            size = _size(weights[k], x.shape)
            bands[-1].append(_Group(turned, *(reversed(size) if turned else size), [k]))
    depth = min(32, tile.side)
    built = _built(x, weights, [band for group in bands for band in group], tile.side, depth, flip)
    nhwc = layout_of(x) == torch.channels_last
    pitch = _pitch(width) if nhwc else width
    shape = (batch, channels, height, pitch)
    outputs = [x.new_empty(shape) for _ in range(1 if summed else len(weights))]
    branches, matrices, stored = [], [], []
    for group in bands:
        branches.append((int(group[0].turned),))
        for band in group:
            matrix, length = next(built)
            branches[-1] += (band.rows, band.columns, length)
            matrices.append(matrix)
            stored.append(outputs[0 if summed else band.kernels[0]])
        if len(group) == 1:  # no inner kernel: anything stands for it
            branches[-1] += (0, 1, 0)
            matrices.append(matrix)
            stored.append(stored[-1])
    count = _ceil(batch, tile.images) * _ceil(height, tile.side) * _ceil(width, tile.side)
    _launch(
        'convolve',
        x,
        (count, channels),
        tuple(source[group.turned] for source, group in zip(lines, groups, strict=True)),
        tuple(stored),
        tuple(matrices),
        bias,
        batch,
        channels,
        height,
        width,
        _pitch(width),
        _pitch(height),
        pitch,
        BRANCHES=(*branches, (0,)),
        SUMMED=summed,
        ALIGN=math.gcd(pitch, 16),
        IMAGES=tile.images,
        SIDE=tile.side,
        DEPTH=depth,
        PAD=tile.side + depth,
        COPIES=_copies(x),
        PRECISION=_precision(x),
        num_warps=tile.warps,
        num_stages=4 if x.element_size() == 2 else 3,
    )
    if not nhwc:
        return outputs
    staged = [output[..., :width] for output in outputs]
    outputs = [torch.empty_like(x) for _ in outputs]
    _copy(staged, [(output, None) for output in outputs], width, height)
    return outputs


def _built(
    x: Tensor, weights: Sequence[Tensor], bands: Sequence[_Group], side: int, depth: int, flip: bool
) -> Iterator[tuple[Tensor, int]]:
    """The matrices of all bands, as `convolve` reads them, each with the length of its rows.

    Where a map is one small tile the matrix itself is smaller than the copies of its row: then the
    length is 0.
    """
    channels, copies = x.shape[1], _copies(x)
    whole = side <= 32 and max(x.shape[2:]) <= side
    lengths = [0 if whole else _round_up(2 * (side + depth) + b.columns, 16) for b in bands]
    built = [
        x.new_empty(channels, band.rows, *((copies, length) if length else (side, side)))
        for band, length in zip(bands, lengths, strict=True)
    ]
    of_kernel = {k: i for i, band in enumerate(bands) for k in band.kernels}
    branches = [
        (int(band.turned), band.rows, band.columns, length)
        for band, length in zip(bands, lengths, strict=True)
    ]
    kernels = [(of_kernel[k], *weight.shape[2:]) for k, weight in enumerate(weights)]
    _launch(
        'build_bands',
        x,
        (max(band.rows for band in bands), channels, len(bands)),
        tuple(built),
        tuple(weight.contiguous() for weight in weights),
        BRANCHES=tuple(branches),
        KERNELS=tuple(kernels),
        FLIP=flip,
        SIDE=side,
        PAD=side + depth,
        COPIES=copies,
        BLOCK=_power_of_two(max(1, *lengths)),
        num_warps=4,
    )
    return zip(built, lengths, strict=True)


def _marches(weights: Sequence[Tensor], tile: Tile, x: Tensor) -> bool:
    """Whether a marching tile can take all kernels: few rows, and windows that fit."""
    sizes = [_size(weight, x.shape) for weight in weights]
    fits = all(min(size) <= 5 and _window(tile, max(size)) <= 128 for size in sizes)
    return fits and max(x.shape[2:]) > tile.side


def _window(tile: Tile, columns: int) -> int:
    """Pixels of a line that a tile needs, from an aligned one on."""
    return _power_of_two(tile.side + columns - 1 + 15)


def _segments(tile: Tile, shape: torch.Size) -> int:
    """Segments of lines of an image in a marching tile."""
    return max(1, tile.rows // _power_of_two(shape[0]))


def _march(
    x: Tensor, weights: Sequence[Tensor], groups: Sequence[_Group], bias: Tensor | None, tile: Tile
) -> list[Tensor]:
    """One output per group, by the place of its first kernel, in x's layout.

    Each is one launch, and one more copies all where they have to be.
    """
    batch, channels, height, width = x.shape
    (lines,) = _lines([x], [{group.turned for group in groups}])
    depth = max(_window(tile, group.columns) for group in groups)
    built = _built(x, weights, groups, tile.side, depth, flip=False)
    segments = _segments(tile, x.shape)
    images = tile.rows // segments
    outputs: dict[int, Tensor] = {}
    staged: dict[bool, list[int]] = {}
    layout = layout_of(x)
    for group, (band, length) in zip(groups, built, strict=True):
        source = lines[group.turned]
        output = torch.empty_like(source, memory_format=torch.contiguous_format)
        count, pitch = source.shape[2:]
        _launch(
            'march',
            x,
            (_ceil(batch, images) * _ceil(pitch, tile.side), channels),
            source,
            output,
            band,
            bias,
            batch,
            channels,
            count,
            pitch,
            _ceil(count, segments),
            ROWS=group.rows,
            COLUMNS=group.columns,
            BAND=length,
            IMAGES=images,
            SEGMENTS=segments,
            SIDE=tile.side,
            WINDOW=_window(tile, group.columns),
            PAD=tile.side + depth,
            COPIES=_copies(x),
            PRECISION=_precision(x),
            num_warps=tile.warps,
            num_stages=2,
        )
        k = group.kernels[0]
        outputs[k] = output[..., : height if group.turned else width]
        if group.turned:
            outputs[k] = outputs[k].transpose(2, 3)
        if group.turned or layout == torch.channels_last or pitch > width:
            staged.setdefault(group.turned, []).append(k)
    for several in staged.values():
        sources = [outputs[k] for k in several]
        for k in several:
            outputs[k] = torch.empty_like(x, memory_format=layout)
        _copy(sources, [(outputs[k], None) for k in several], width, height)
    return [outputs[k] for k in sorted(outputs)]


def _weight_gradients(
    x: Tensor,
    source: dict[bool, Tensor],
    lines: Sequence[dict[bool, Tensor]],
    weights: Sequence[Tensor],
    groups: Sequence[_Group],
    tile: Tile,
) -> list[Tensor]:
    """Gradients of the kernels (C, 1, kH, kW), in their dtype."""
    launches: dict[tuple[int, int], list[int]] = {}  # of equal windows, and rows of a program
    for i, group in enumerate(groups):
        window = _windows(group, source[group.turned].shape[3], tile)[1]
        programs = _ceil(group.rows, _rows_at_once(x))
        launches.setdefault((window, _ceil(group.rows, programs)), []).append(i)
    sums, kernels = {}, {}
    for (window, rows), several in launches.items():
        found = _correlate(
            [source[groups[i].turned] for i in several],
            [lines[i][groups[i].turned] for i in several],
            [groups[i] for i in several],
            tile,
            window,
            rows,
        )
        for i, (summed, figures) in zip(several, found, strict=True):
            for k in groups[i].kernels:
                sums[k] = summed
                kernels[k] = (*weights[k].shape[2:], int(groups[i].turned), *figures)
    dws = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    entries = max(weight[0].numel() for weight in weights)
    block = min(1024, _power_of_two(entries))
    order = range(len(weights))
    _launch(
        'collect',
        x,
        (_ceil(entries, block), x.shape[1], len(weights)),
        tuple(dws),
        tuple(sums[k] for k in order),
        KERNELS=tuple(kernels[k] for k in order),
        BLOCK=block,
        num_warps=4,
    )
    return dws


def _windows(group: _Group, pitch: int, tile: Tile) -> tuple[int, int, int]:
    """Pixels that meet a tile's gradients: the first one, those of a window, and its windows."""
    reach = group.columns // 2
    first, total = 0, tile.side  # a map of one tile is its own window
    if pitch > tile.side:
        first = -_round_up(reach, 16)
        total = tile.side + reach - first
    window = min(128, _power_of_two(total))
    return first, window, _ceil(total, window)


def _correlate(
    maps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    groups: Sequence[_Group],
    tile: Tile,
    window: int,
    rows: int,
) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Sums of gradients by one launch, with their (rows, columns, first, window, windows, parts).

    Args:
        maps: Lines of x per group.
        gradients: Lines of the output's gradient per group.
        groups: What is wanted.
        tile: Its side, and how many images share a product.
        window: Pixels of x in a product.
        rows: Rows of a kernel in one program.
    """
    x = maps[0]
    batch, channels = x.shape[:2]
    warps = 8 if window * tile.side >= 4096 else 4
    # Lines of a product: 32, or as many more as let each thread load 16 bytes of them at once.
    most = max(32, 32 * warps * _copies(x) // tile.side)
    in_product = min(32, tile.side)  # of one image
    images = min(most // in_product, tile.images)
    branches, programs, steps = [], 0, 1
    for source, group in zip(maps, groups, strict=True):
        lines, pitch = source.shape[2:]
        first, _, windows = _windows(group, pitch, tile)
        branches.append((programs, group.rows, windows, first))
        programs += _ceil(group.rows, rows) * windows
        steps = max(steps, _ceil(lines, in_product) * _ceil(pitch, tile.side))
    steps *= _ceil(batch, images)
    parts = max(1, min(steps, PROGRAMS // (programs * channels)))
    sums = [
        x.new_empty((channels, group.rows, parts * windows, 2 * window), dtype=torch.float32)
        for group, (_, _, windows, _) in zip(groups, branches, strict=True)
    ]
    _launch(
        'correlate',
        x,
        (programs, channels, parts),
        tuple(maps),
        tuple(gradients),
        tuple(sums),
        tuple(source.shape[2] for source in maps),
        tuple(source.shape[3] for source in maps),
        batch,
        channels,
        BRANCHES=tuple(branches),
        GROUP=rows,
        PARTS=parts,
        WINDOW=window,
        IMAGES=images,
        LINES=in_product,
        SIDE=tile.side,
        PRECISION=_precision(x),
        num_warps=warps,
        num_stages=3,
    )
    return [
        (summed, (group.rows, group.columns, first, window, windows, parts))
        for summed, group, (_, _, windows, first) in zip(sums, groups, branches, strict=True)
    ]


def _rows_at_once(x: Tensor) -> int:
    """Rows of a kernel whose gradients one program computes; their sums fill the registers.

    Compute capabilities 9.0 and 10.0 multiply from shared memory, which leaves more of them.
    """
    if x.element_size() == 4:
        return {9: 2, 10: 2}.get(_capability(x)[0], 1)
    return {8: 3, 9: 5, 10: 5}.get(_capability(x)[0], 2)


def _capability(x: Tensor) -> tuple[int, int]:
    """Of x's GPU; the interpreter stands for Hopper."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _launch(kernel: str, like: Tensor, grid: tuple[int, ...], *args, **options) -> None:
    """Launches a kernel on the device of a tensor."""
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    with torch.cuda.device_of(like):
        try:
            getattr(_kernels(), kernel)[grid](*args, **options)
        except Exception as error:
            if capturing:
                raise RuntimeError(
                    "backend 'triton': a CUDA graph cannot be captured around the first call of "
                    'this shape and dtype, which compiles kernels: make one such call before'
                ) from error
            raise


def _copies(x: Tensor) -> int:
    """Shifted copies of a kernel row: as many entries are one aligned read of 16 bytes."""
    return 16 // x.element_size()


def _precision(x: Tensor) -> str:
    """Of products: three in TensorFloat-32 keep float32's accuracy; 16 bits need no choice."""
    return 'tf32x3' if x.dtype == torch.float32 else 'ieee'


def _pitch(length: int) -> int:
    """Length of lines in memory, for which all of them begin at aligned addresses."""
    return _round_up(length, 16)


def _power_of_two(size: int) -> int:
    """The next power of two from `size` on."""
    return 1 << (size - 1).bit_length()


def _ceil(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _round_up(size: int, multiple: int) -> int:
    return _ceil(size, multiple) * multiple


def _kernels() -> 'ModuleType':
    """The module of kernels; whether they are interpreted is fixed when triton is imported."""
    try:
        import triton
    except ModuleNotFoundError:
        raise ValueError("backend 'triton': the package triton is not installed") from None
    version = triton.__version__
    if tuple(int(part) for part in version.split('.')[:2]) < (3, 4):
        raise ValueError(f"backend 'triton': expected triton 3.4 or newer, got {version}")
    from mmslak.ops import triton_kernels

    return triton_kernels
