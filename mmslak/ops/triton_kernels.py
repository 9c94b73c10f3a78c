"""Triton kernels of the depthwise convolution; imported only where triton is.

A program holds one channel and a tile of SIDE × SIDE pixels of several images; the lines of all its
images are the rows of one matrix product. A kernel row that slides along a line multiplies it by a
banded matrix, whose band is read at aligned addresses from shifted copies of that row. Lines are
read from maps padded with zeros to a pitch of a multiple of 16, which aligns them too.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
    sources,  # per branch (N, C, lines, pitch), where it is turned with the columns as lines
    outputs,  # per branch (N, C, height, width), or one for their sum
    bands,  # per branch (C, ROWS, 8, BAND): see `mmslak.ops.triton_backend`
    bias,  # (C,) or None
    batch,
    channels,
    height,
    width,
    pitch,
    turned_pitch,
    BRANCHES: tl.constexpr,  # per branch (ROWS, COLUMNS, BAND, whether it is turned)
    SUMMED: tl.constexpr,
    IMAGES: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All branches of one tile, each stored on its own or their sum; grid (tiles, C)."""
    tiles_x = (width + SIDE - 1) // SIDE
    tiles_y = (height + SIDE - 1) // SIDE
    tile_row = tl.program_id(0) // tiles_x
    x = tl.program_id(0) % tiles_x * SIDE
    y = tile_row % tiles_y * SIDE
    image = tile_row // tiles_y * IMAGES
    channel = tl.program_id(1)
    total = tl.full((IMAGES * SIDE, SIDE), 0.0, tl.float32)
    for b in tl.static_range(len(BRANCHES)):
        if not SUMMED:
            total = tl.full((IMAGES * SIDE, SIDE), 0.0, tl.float32)
        # The sum changes sides with the branch, and back once that is added.
        if BRANCHES[b][3]:
            total = _accumulate(
                _turn(total, IMAGES, SIDE), sources[b], bands[b], image, channel, x, y,
                batch, channels, width, turned_pitch,
                BRANCHES[b][0], BRANCHES[b][1], BRANCHES[b][2],
                IMAGES, SIDE, DEPTH, PAD, PRECISION,
            )  # fmt: skip
            total = _turn(total, IMAGES, SIDE)
        else:
            total = _accumulate(
                total, sources[b], bands[b], image, channel, y, x,
                batch, channels, height, pitch,
                BRANCHES[b][0], BRANCHES[b][1], BRANCHES[b][2],
                IMAGES, SIDE, DEPTH, PAD, PRECISION,
            )  # fmt: skip
        if not SUMMED:
            _store(outputs[b], total, image, channel, y, x, batch, channels, height, width,
                   IMAGES, SIDE)  # fmt: skip
    if SUMMED:
        if bias is not None:
            total += tl.load(bias + channel).to(tl.float32)
        _store(outputs[0], total, image, channel, y, x, batch, channels, height, width,
               IMAGES, SIDE)  # fmt: skip


@triton.jit
def _accumulate(
    total, source, band, image, channel, line, start, batch, channels, lines, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr, IMAGES: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the branch's convolution of the lines from `line`, pixels `start` to start + SIDE."""
    REACH: tl.constexpr = COLUMNS // 2
    images, tile_lines, offsets = _lines(image, line, channels, lines, pitch, IMAGES, SIDE)
    # Only pixels of the map are read, in steps that stay aligned.
    low = tl.maximum(start - REACH, 0) // 16 * 16
    steps = (tl.minimum(start + SIDE + REACH, pitch) - low + DEPTH - 1) // DEPTH
    depth = tl.arange(0, DEPTH)
    source += ((image.to(tl.int64) * channels + channel) * lines + line - ROWS // 2) * pitch + low
    # Entry (i, o) of the band matrix is entry i - o + REACH of the kernel row, zero outside of it.
    # Of the row's copies, one is shifted such that it has these entries at aligned addresses.
    entry = low - start + REACH + PAD - tl.arange(0, SIDE)
    band += channel.to(tl.int64) * (ROWS * 8 * BAND)
    in_copy = (entry % 8) * BAND + entry // 8 * 8
    for step in range(ROWS * steps):
        row = step // steps
        offset = (step - row * steps) * DEPTH
        row_lines = tile_lines + row - ROWS // 2
        inside = (images < batch) & (row_lines >= 0) & (row_lines < lines)
        left = tl.load(
            source + (row.to(tl.int64) * pitch + offset) + (offsets[:, None] + depth[None, :]),
            mask=inside[:, None] & (low + offset + depth < pitch)[None, :],
            other=0.0,
        )
        right = tl.load(band + (row * (8 * BAND) + offset) + (in_copy[None, :] + depth[:, None]))
        total = _dot(left, right, total, PRECISION)
    return total


@triton.jit
def correlate(
    source,  # (N, C, lines, pitch)
    gradient,  # same shape
    sums,  # (C, ROWS, WINDOWS, 2 · WINDOW) float32
    first,  # first pixel of the first window, relative to the tile of gradients
    batch,
    channels,
    lines,
    pitch,
    ROWS: tl.constexpr,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    IMAGES: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the band matrix, summed along its diagonals; grid (ROWS · WINDOWS, C).

    A program sums up the products of window pixel i and gradient pixel o over all lines. Diagonal
    i - o is written to entry i - o + WINDOW of its sums, always in the same order of additions.
    """
    row = tl.program_id(0) // WINDOWS
    q = tl.program_id(0) % WINDOWS
    first += q * WINDOW
    channel = tl.program_id(1)
    tiles_x = (pitch + SIDE - 1) // SIDE
    tiles_y = (lines + SIDE - 1) // SIDE
    window = tl.arange(0, WINDOW)
    side = tl.arange(0, SIDE)
    images, tile_lines, offsets = _lines(0, 0, channels, lines, pitch, IMAGES, SIDE)
    window_offsets = offsets[:, None] + window[None, :]
    side_offsets = offsets[:, None] + side[None, :]
    shift = (row - ROWS // 2).to(tl.int64) * pitch + first
    total = tl.full((WINDOW, SIDE), 0.0, tl.float32)
    for tile in range((batch + IMAGES - 1) // IMAGES * tiles_y * tiles_x):
        tile_row = tile // tiles_x
        start = (tile - tile_row * tiles_x) * SIDE
        block = tile_row // tiles_y
        line = (tile_row - block * tiles_y) * SIDE
        place = ((block.to(tl.int64) * IMAGES * channels + channel) * lines + line) * pitch + start
        whole = images < batch - block * IMAGES
        columns = start + first + window
        row_lines = tile_lines + line + row - ROWS // 2
        inside = whole & (row_lines >= 0) & (row_lines < lines)
        left = tl.load(
            source + (place + shift) + window_offsets,
            mask=inside[:, None] & ((columns >= 0) & (columns < pitch))[None, :],
            other=0.0,
        )
        right = tl.load(
            gradient + place + side_offsets,
            mask=(whole & (tile_lines + line < lines))[:, None] & (start + side < pitch)[None, :],
            other=0.0,
        )
        total = _dot(tl.trans(left), right, total, PRECISION)
    # Diagonals d and d - WINDOW become one row: entry (d, o) is taken from ((d + o) % WINDOW, o).
    ends = window[:, None] + side[None, :]
    diagonals = tl.gather(total, ends % WINDOW, 0)
    sums += ((channel * ROWS + row).to(tl.int64) * WINDOWS + q) * (2 * WINDOW)
    tl.store(sums + window, tl.sum(tl.where(ends >= WINDOW, diagonals, 0.0), 1))
    tl.store(sums + WINDOW + window, tl.sum(tl.where(ends < WINDOW, diagonals, 0.0), 1))


@triton.jit
def transpose(source, output, rows, columns, pitch, SIDE: tl.constexpr):
    """(…, rows, columns) to (…, columns, pitch) with pitch - rows zeros; grid (tiles, matrices)."""
    tiles = (columns + SIDE - 1) // SIDE
    side = tl.arange(0, SIDE)
    row = tl.program_id(0) // tiles * SIDE + side
    column = tl.program_id(0) % tiles * SIDE + side
    matrix = tl.program_id(1).to(tl.int64) * columns
    tile = tl.load(
        source + matrix * rows + row.to(tl.int64)[:, None] * columns + column[None, :],
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0.0,
    )
    tl.store(
        output + (matrix + column)[:, None] * pitch + row[None, :],
        tl.trans(tile),
        mask=(column < columns)[:, None] & (row < pitch)[None, :],
    )


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right; the interpreter's own product takes bfloat16 for integers."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _lines(image, line, channels, lines, pitch, IMAGES: tl.constexpr, SIDE: tl.constexpr):
    """Image, line and offset in memory of the rows of a tile that begins at `image`, `line`."""
    row = tl.arange(0, IMAGES * SIDE)
    offsets = row // SIDE * (channels * lines * pitch) + row % SIDE * pitch
    return image + row // SIDE, line + row % SIDE, offsets


@triton.jit
def _turn(tile, IMAGES: tl.constexpr, SIDE: tl.constexpr):
    """Swaps lines and columns within each image of a tile."""
    turned = tl.permute(tl.reshape(tile, (IMAGES, SIDE, SIDE)), (0, 2, 1))
    return tl.reshape(turned, (IMAGES * SIDE, SIDE))


@triton.jit
def _store(
    output, tile, image, channel, y, x, batch, channels, height, width,
    IMAGES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    images, lines, offsets = _lines(image, y, channels, height, width, IMAGES, SIDE)
    columns = tl.arange(0, SIDE)
    place = ((image.to(tl.int64) * channels + channel) * height + y) * width + x
    tl.store(
        output + place + (offsets[:, None] + columns[None, :]),
        tile.to(output.dtype.element_ty),
        mask=((images < batch) & (lines < height))[:, None] & (x + columns < width)[None, :],
    )


# Kernels and Triton's own functions are compiled or interpreted as the environment said when each
# was imported; to be interpreted, all must be.
INTERPRETED = tl.constexpr(not any(isinstance(f, triton.JITFunction) for f in (convolve, tl.sum)))
