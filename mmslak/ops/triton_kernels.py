"""Triton kernels of the depthwise convolution; imported only where triton is.

A program of `convolve` holds one channel and a tile of SIDE × SIDE pixels of several images; the
lines of all its images are the rows of one matrix product. A kernel row that slides along a line
multiplies it by a banded matrix: entry (i, o) is entry i - o + reach of the kernel row, zero
outside of it. Lines are read from maps that are padded with zeros to a pitch of a multiple of 16,
so that all of them begin at aligned addresses; upright kernels read the turned maps, whose lines
are the columns.
"""

import triton
import triton.language as tl


@triton.jit
def arrange(
    sources,  # (N, C, H, W) each, all of the same strides
    targets,  # the same maps in the strides that follow, or anything where they are not wanted
    turned,  # the same maps as (N, C, W, turned_pitch), or anything where they are not wanted
    channels,
    height,
    width,
    source_n,
    source_c,
    source_h,
    source_w,
    target_n,
    target_c,
    target_h,
    target_w,
    columns,  # of a line of the targets: width, or more to be filled with zeros
    turned_pitch,
    WANTED: tl.constexpr,  # per map: whether the target is wanted, whether the turned one is
    ALIGNS: tl.constexpr,  # powers of two that divide the sizes and strides, in their order
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Copies maps to other strides, turned or not; grid (tiles of images and channels, maps)."""
    # The compiler learns what divides a size, and accesses as many elements at once.
    channels = channels // ALIGNS[0] * ALIGNS[0]
    height = height // ALIGNS[1] * ALIGNS[1]
    width = width // ALIGNS[2] * ALIGNS[2]
    source_n = source_n // ALIGNS[3] * ALIGNS[3]
    source_c = source_c // ALIGNS[4] * ALIGNS[4]
    source_h = source_h // ALIGNS[5] * ALIGNS[5]
    source_w = source_w // ALIGNS[6] * ALIGNS[6]
    target_n = target_n // ALIGNS[7] * ALIGNS[7]
    target_c = target_c // ALIGNS[8] * ALIGNS[8]
    target_h = target_h // ALIGNS[9] * ALIGNS[9]
    target_w = target_w // ALIGNS[10] * ALIGNS[10]
    columns = columns // ALIGNS[11] * ALIGNS[11]
    tiles_x = (columns + SIDE - 1) // SIDE
    tiles_y = (turned_pitch + SIDE - 1) // SIDE
    tiles_c = (channels + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    x = tile % tiles_x * SIDE + tl.arange(0, SIDE)[None, None, :]
    y = tile // tiles_x % tiles_y * SIDE + tl.arange(0, SIDE)[None, :, None]
    block = tile // (tiles_x * tiles_y)
    c = block % tiles_c * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    n = (block // tiles_c).to(tl.int64)
    for b in tl.static_range(len(sources)):
        if tl.program_id(1) == b:
            places = n * source_n + (c.to(tl.int64) * source_c + y * source_h + x * source_w)
            inside = (c < channels) & (y < height) & (x < width)
            maps = tl.load(sources[b] + places, mask=inside, other=0.0)
            if WANTED[2 * b]:
                places = n * target_n + (c.to(tl.int64) * target_c + y * target_h + x * target_w)
                inside = (c < channels) & (y < height) & (x < columns)
                tl.store(targets[b] + places, maps, mask=inside)
            if WANTED[2 * b + 1]:
                places = ((n * channels + c) * width + x) * turned_pitch + y
                inside = (c < channels) & (x < width) & (y < turned_pitch)
                tl.store(turned[b] + places, maps, mask=inside)


@triton.jit
def build_bands(
    bands,  # per branch (C, ROWS, COPIES, BAND), or (C, ROWS, SIDE, SIDE) where BAND is 0
    weights,  # kernels (C, 1, kH, kW), contiguous
    BRANCHES: tl.constexpr,  # per branch: turned, ROWS, COLUMNS, BAND
    KERNELS: tl.constexpr,  # per kernel: its branch, kH, kW
    FLIP: tl.constexpr,
    SIDE: tl.constexpr,
    PAD: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bands of all branches; grid (rows of the longest branch, C, branches).

    A branch's kernel is the sum of its kernels, centre on centre, cut to ROWS × COLUMNS.
    """
    for b in tl.static_range(len(bands)):
        if (tl.program_id(2) == b) & (tl.program_id(0) < BRANCHES[b][1]):
            if BRANCHES[b][3]:
                # Copy s begins with entry s of PAD zeros and the kernel row.
                copy = tl.arange(0, COPIES)[:, None]
                place = tl.arange(0, BLOCK)[None, :]
                across = place + copy - PAD - BRANCHES[b][2] // 2
                places = copy * BRANCHES[b][3] + place
                size = COPIES * BRANCHES[b][3]
                inside = (copy >= 0) & (place < BRANCHES[b][3])
            else:
                across = tl.arange(0, SIDE)[:, None] - tl.arange(0, SIDE)[None, :]
                places = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
                size = SIDE * SIDE
                inside = places < size
            down = tl.program_id(0) - BRANCHES[b][1] // 2
            reach = BRANCHES[b][2] // 2
            exists = inside & (across >= -reach) & (across <= reach)
            total = tl.where(inside, 0.0, 0.0)
            for k in tl.static_range(len(weights)):
                if KERNELS[k][0] == b:
                    if BRANCHES[b][0]:
                        total += _entries(weights[k], across, down, exists, KERNELS[k][1],
                                          KERNELS[k][2], FLIP)  # fmt: skip
                    else:
                        total += _entries(weights[k], down, across, exists, KERNELS[k][1],
                                          KERNELS[k][2], FLIP)  # fmt: skip
            channel = tl.program_id(1).to(tl.int64)
            tl.store(
                bands[b] + (channel * BRANCHES[b][1] + tl.program_id(0)) * size + places,
                total.to(bands[b].dtype.element_ty),
                mask=inside,
            )


@triton.jit
def _entries(weight, y, x, exists, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FLIP: tl.constexpr):
    """A kernel's entries at offsets from its centre, zeros where it has none."""
    if FLIP:
        y = -y
        x = -x
    y += HEIGHT // 2
    x += WIDTH // 2
    exists = exists & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    weight += tl.program_id(1).to(tl.int64) * (HEIGHT * WIDTH)
    return tl.load(weight + (y * WIDTH + x), mask=exists, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    sources,  # per branch (N, C, lines, pitch), where it is turned with the columns as lines
    outputs,  # two per branch (N, C, height, output_pitch): its own and its inner kernel's
    bands,  # two per branch: see `build_bands`
    bias,  # (C,) or None
    batch,
    channels,
    height,
    width,
    pitch,
    turned_pitch,
    output_pitch,
    BRANCHES: tl.constexpr,  # per branch: turned, ROWS, COLUMNS, BAND, the inner's three; (0,)
    SUMMED: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two that divides output_pitch
    IMAGES: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    PAD: tl.constexpr,
    COPIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All branches of one tile, each stored on its own or their sum; grid (tiles, C).

    A branch's inner kernel (of ROWS 0 where there is none) fits into its first one and shares the
    loads of the map. Turned branches come first, so that a sum is turned once.
    """
    output_pitch = output_pitch // ALIGN * ALIGN
    tiles_x = (width + SIDE - 1) // SIDE
    tiles_y = (height + SIDE - 1) // SIDE
    tile_row = tl.program_id(0) // tiles_x
    x = tl.program_id(0) % tiles_x * SIDE
    y = tile_row % tiles_y * SIDE
    image = tile_row // tiles_y * IMAGES
    channel = tl.program_id(1)
    total = tl.full((IMAGES * SIDE, SIDE), 0.0, tl.float32)
    for b in tl.static_range(len(sources)):
        if not SUMMED:
            total = tl.full((IMAGES * SIDE, SIDE), 0.0, tl.float32)
        inner = tl.full((IMAGES * SIDE, SIDE), 0.0, tl.float32)
        if BRANCHES[b][0]:
            total, inner = _accumulate(
                total, inner, sources[b], bands[2 * b], bands[2 * b + 1], image, channel, x, y,
                batch, channels, width, turned_pitch,
                BRANCHES[b][1], BRANCHES[b][2], BRANCHES[b][3],
                BRANCHES[b][4], BRANCHES[b][5], BRANCHES[b][6],
                IMAGES, SIDE, DEPTH, PAD, COPIES, PRECISION,
            )  # fmt: skip
            if SUMMED:
                if not BRANCHES[b + 1][0]:
                    total = _turn(total, IMAGES, SIDE)
            else:
                total = _turn(total, IMAGES, SIDE)
                if BRANCHES[b][4]:
                    inner = _turn(inner, IMAGES, SIDE)
        else:
            total, inner = _accumulate(
                total, inner, sources[b], bands[2 * b], bands[2 * b + 1], image, channel, y, x,
                batch, channels, height, pitch,
                BRANCHES[b][1], BRANCHES[b][2], BRANCHES[b][3],
                BRANCHES[b][4], BRANCHES[b][5], BRANCHES[b][6],
                IMAGES, SIDE, DEPTH, PAD, COPIES, PRECISION,
            )  # fmt: skip
        if not SUMMED:
            _store(outputs[2 * b], total, image, channel, y, x, batch, channels, height,
                   output_pitch, IMAGES, SIDE)  # fmt: skip
            if BRANCHES[b][4]:
                _store(outputs[2 * b + 1], inner, image, channel, y, x, batch, channels, height,
                       output_pitch, IMAGES, SIDE)  # fmt: skip
    if SUMMED:
        if bias is not None:
            total += tl.load(bias + channel).to(tl.float32)
        _store(outputs[0], total, image, channel, y, x, batch, channels, height, output_pitch,
               IMAGES, SIDE)  # fmt: skip


@triton.jit
def _accumulate(
    total, inner, source, band, inner_band, image, channel, line, start,
    batch, channels, lines, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
    INNER_ROWS: tl.constexpr, INNER_COLUMNS: tl.constexpr, INNER_BAND: tl.constexpr,
    IMAGES: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, PAD: tl.constexpr,
    COPIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total and inner plus the convolutions of the lines from `line`, pixels from `start` on."""
    REACH: tl.constexpr = COLUMNS // 2
    INNER_REACH: tl.constexpr = INNER_COLUMNS // 2
    SKIPPED: tl.constexpr = (ROWS - INNER_ROWS) // 2
    images, tile_lines, offsets = _lines(image, line, channels, lines, pitch, IMAGES, SIDE)
    # Only pixels of the map are read, in steps that stay aligned.
    low = tl.maximum(start - REACH, 0) // 16 * 16
    steps = (tl.minimum(start + SIDE + REACH, pitch) - low + DEPTH - 1) // DEPTH
    depth = tl.arange(0, DEPTH)
    source += ((image.to(tl.int64) * channels + channel) * lines + line - ROWS // 2) * pitch + low
    band += channel.to(tl.int64) * (ROWS * (COPIES * BAND if BAND else SIDE * SIDE))
    inner_band += channel.to(tl.int64) * (
        INNER_ROWS * (COPIES * INNER_BAND if INNER_BAND else SIDE * SIDE)
    )
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
        places = _band(row, offset, low - start + REACH, BAND, SIDE, DEPTH, PAD, COPIES)
        total = _dot(left, tl.load(band + places), total, PRECISION)
        if INNER_ROWS:
            # Where the inner kernel has no entries nothing is read, and zeros are multiplied.
            column = low - start + offset
            meets = (row >= SKIPPED) & (row < SKIPPED + INNER_ROWS)
            meets &= (column + DEPTH > -INNER_REACH) & (column < SIDE + INNER_REACH)
            places = _band(
                row - SKIPPED, offset, low - start + INNER_REACH, INNER_BAND, SIDE, DEPTH, PAD,
                COPIES,
            )  # fmt: skip
            right = tl.load(inner_band + places, mask=meets, other=0.0)
            inner = _dot(left, right, inner, PRECISION)
    return total, inner


@triton.jit
def _band(
    row, offset, first, BAND: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
    PAD: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Places of DEPTH × SIDE entries of a row's banded matrix, from its line `offset` on.

    Entry (0, 0) of the matrix is entry `first` of the kernel row. Of the row's copies, one is
    shifted such that it has a column of the matrix at aligned addresses.
    """
    depth = tl.arange(0, DEPTH)
    side = tl.arange(0, SIDE)
    if BAND == 0:
        return (row * SIDE + offset + depth)[:, None] * SIDE + side[None, :]
    entry = first + PAD - side
    in_copy = (entry % COPIES) * BAND + entry // COPIES * COPIES
    return (row * (COPIES * BAND) + offset) + (in_copy[None, :] + depth[:, None])


@triton.jit
def march(
    source,  # (N, C, lines, pitch)
    output,  # same shape
    band,  # (C, ROWS, COPIES, BAND)
    bias,  # (C,) or None
    batch,
    channels,
    lines,
    pitch,
    length,  # lines of a segment
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BAND: tl.constexpr,
    IMAGES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIDE: tl.constexpr,
    WINDOW: tl.constexpr,  # pixels of a line that SIDE outputs need, and up to 15 to be aligned
    PAD: tl.constexpr,
    COPIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One kernel set on SIDE columns, with the lines of the map read once; grid (tiles, C).

    Every image is cut into segments of lines. A step takes the next line of each segment, whose
    windows are the rows of one product with each of the ROWS banded matrices, kept at hand. A
    product with matrix r belongs to the output r lines back: each step completes one line.
    """
    tiles_x = (pitch + SIDE - 1) // SIDE
    x = tl.program_id(0) % tiles_x * SIDE
    part = tl.arange(0, IMAGES * SEGMENTS)
    image = tl.program_id(0) // tiles_x * IMAGES + part // SEGMENTS
    begin = part % SEGMENTS * length
    channel = tl.program_id(1)
    low = tl.maximum(x - COLUMNS // 2, 0) // 16 * 16
    window = tl.arange(0, WINDOW)
    side = tl.arange(0, SIDE)
    place = (image.to(tl.int64) * channels + channel) * lines * pitch
    band += channel.to(tl.int64) * (ROWS * COPIES * BAND)
    first = low - x + COLUMNS // 2
    matrices = ()
    totals = ()
    for r in tl.static_range(ROWS):
        places = _band(r, 0, first, BAND, SIDE, WINDOW, PAD, COPIES)
        matrices += (tl.load(band + places),)
        totals += (tl.full((IMAGES * SEGMENTS, SIDE), 0.0, tl.float32),)
    for step in range(length + ROWS - 1):
        line = begin + step - ROWS // 2
        inside = (image < batch) & (line >= 0) & (line < lines)
        left = tl.load(
            source + (place + line * pitch + low)[:, None] + window[None, :],
            mask=inside[:, None] & (low + window < pitch)[None, :],
            other=0.0,
        )
        nothing = tl.full((IMAGES * SEGMENTS, SIDE), 0.0, tl.float32)
        rows = (_dot(left, matrices[0], nothing, PRECISION),)
        for r in tl.static_range(1, ROWS):
            rows += (_dot(left, matrices[r], totals[r - 1], PRECISION),)
        totals = rows
        done = step - (ROWS - 1)
        line = begin + done
        inside = (image < batch) & (done >= 0) & (line < lines)
        complete = totals[ROWS - 1]
        if bias is not None:
            complete += tl.load(bias + channel).to(tl.float32)
        tl.store(
            output + (place + line * pitch + x)[:, None] + side[None, :],
            complete.to(output.dtype.element_ty),
            mask=inside[:, None] & (x + side < pitch)[None, :],
        )


@triton.jit
def correlate(
    sources,  # per branch (N, C, lines, pitch)
    gradients,  # per branch, of the same shape
    sums,  # per branch (C, ROWS, PARTS · WINDOWS, 2 · WINDOW) float32
    lengths,  # lines per branch
    pitches,  # per branch
    batch,
    channels,
    BRANCHES: tl.constexpr,  # per branch: its first program, ROWS, WINDOWS, the first pixel of the
    # first window relative to the tile of gradients
    GROUP: tl.constexpr,  # rows of a kernel in one program
    PARTS: tl.constexpr,  # programs that share the tiles
    WINDOW: tl.constexpr,
    IMAGES: tl.constexpr,
    LINES: tl.constexpr,  # of each image, which are summed up in one product
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of band matrices, summed along their diagonals.

    A program loads each window of the map once and multiplies it by GROUP lines of gradients: the
    product of window pixel i and gradient pixel o belongs to diagonal i - o, which is written to
    entry i - o + WINDOW of its sums. The additions always have the same order. The grid is
    (groups · WINDOWS of all branches, C, PARTS).
    """
    source, gradient, target = sources[0], gradients[0], sums[0]
    lines, pitch = lengths[0], pitches[0]
    begin, rows, windows, first = BRANCHES[0][0], BRANCHES[0][1], BRANCHES[0][2], BRANCHES[0][3]
    for b in tl.static_range(1, len(sources)):  # values are chosen, code is not repeated
        here = tl.program_id(0) >= BRANCHES[b][0]
        source = tl.where(here, sources[b], source)
        gradient = tl.where(here, gradients[b], gradient)
        target = tl.where(here, sums[b], target)
        lines = tl.where(here, lengths[b], lines)
        pitch = tl.where(here, pitches[b], pitch)
        begin = tl.where(here, BRANCHES[b][0], begin)
        rows = tl.where(here, BRANCHES[b][1], rows)
        windows = tl.where(here, BRANCHES[b][2], windows)
        first = tl.where(here, BRANCHES[b][3], first)
    row = (tl.program_id(0) - begin) // windows * GROUP
    q = (tl.program_id(0) - begin) % windows
    first += q * WINDOW
    channel = tl.program_id(1)
    tiles_x = (pitch + SIDE - 1) // SIDE
    tiles_y = (lines + LINES - 1) // LINES
    window = tl.arange(0, WINDOW)
    side = tl.arange(0, SIDE)
    images, tile_lines, offsets = _lines(0, 0, channels, lines, pitch, IMAGES, LINES)
    window_offsets = offsets[None, :] + window[:, None]
    side_offsets = offsets[:, None] + side[None, :]
    totals = ()
    for _ in tl.static_range(GROUP):
        totals += (tl.full((WINDOW, SIDE), 0.0, tl.float32),)
    tiles = (batch + IMAGES - 1) // IMAGES * tiles_y * tiles_x
    for tile in range(tl.program_id(2), tiles, PARTS):
        tile_row = tile // tiles_x
        start = (tile - tile_row * tiles_x) * SIDE
        block = tile_row // tiles_y
        line = (tile_row - block * tiles_y) * LINES
        place = ((block.to(tl.int64) * IMAGES * channels + channel) * lines + line) * pitch + start
        whole = images < batch - block * IMAGES
        columns = start + first + window
        left = tl.load(
            source + (place + first) + window_offsets,
            mask=(whole & (tile_lines + line < lines))[None, :]
            & ((columns >= 0) & (columns < pitch))[:, None],
            other=0.0,
        )
        sums_of_rows = ()
        for g in tl.static_range(GROUP):
            shift = rows // 2 - row - g
            row_lines = tile_lines + line + shift
            inside = whole & (row_lines >= 0) & (row_lines < lines)
            right = tl.load(
                gradient + (place + shift.to(tl.int64) * pitch) + side_offsets,
                mask=inside[:, None] & (start + side < pitch)[None, :],
                other=0.0,
            )
            sums_of_rows += (_dot(left, right, totals[g], PRECISION),)
        totals = sums_of_rows
    part = tl.program_id(2) * windows + q
    for g in tl.static_range(GROUP):
        if row + g < rows:
            place = (channel * rows + row + g).to(tl.int64) * (PARTS * windows) + part
            _store_diagonals(target + place * (2 * WINDOW), totals[g], WINDOW, SIDE)


@triton.jit
def _store_diagonals(sums, total, WINDOW: tl.constexpr, SIDE: tl.constexpr):
    """Sum of the entries (i, o) of each diagonal i - o, at entry i - o + WINDOW."""
    HALF: tl.constexpr = SIDE // 2
    window = tl.arange(0, WINDOW)
    side = tl.arange(0, HALF)
    low = tl.full((WINDOW,), 0.0, tl.float32)
    high = tl.full((WINDOW,), 0.0, tl.float32)
    left, right = tl.split(tl.permute(tl.reshape(total, (WINDOW, 2, HALF)), (0, 2, 1)))
    for half in tl.static_range(2):  # half of the columns need half of the registers
        # Diagonals d and d - WINDOW become one row: entry (d, o) is that of ((d + o) % WINDOW, o).
        ends = window[:, None] + (side + half * HALF)[None, :]
        diagonals = tl.gather(right if half else left, ends % WINDOW, 0)
        low += tl.sum(tl.where(ends >= WINDOW, diagonals, 0.0), 1)
        high += tl.sum(tl.where(ends < WINDOW, diagonals, 0.0), 1)
    tl.store(sums + window, low)
    tl.store(sums + WINDOW + window, high)


@triton.jit
def collect(
    gradients,  # of the kernels, (C, 1, kH, kW)
    sums,  # per kernel: its branch's, as `correlate` writes them
    KERNELS: tl.constexpr,  # per kernel: kH, kW, then of its branch turned, ROWS, COLUMNS, first,
    # WINDOW, WINDOWS, PARTS
    BLOCK: tl.constexpr,
):
    """Gradients of all kernels from the sums; grid (blocks of entries, C, kernels)."""
    for k in tl.static_range(len(gradients)):
        if tl.program_id(2) == k:
            _collect(
                gradients[k], sums[k],
                KERNELS[k][0], KERNELS[k][1], KERNELS[k][2], KERNELS[k][3], KERNELS[k][4],
                KERNELS[k][5], KERNELS[k][6], KERNELS[k][7], KERNELS[k][8], BLOCK,
            )  # fmt: skip


@triton.jit
def _collect(
    gradient, sums, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, WINDOW: tl.constexpr,
    WINDOWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if TURNED:
        down = entry % WIDTH - WIDTH // 2
        across = entry // WIDTH - HEIGHT // 2
    else:
        down = entry // WIDTH - HEIGHT // 2
        across = entry % WIDTH - WIDTH // 2
    row = down + ROWS // 2
    # Entries beyond the branch's only meet padding: their gradient is zero.
    exists = (entry < HEIGHT * WIDTH) & (row >= 0) & (row < ROWS)
    exists &= (across >= -(COLUMNS // 2)) & (across <= COLUMNS // 2)
    sums += (channel * ROWS + row) * (PARTS * WINDOWS * 2 * WINDOW)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in range(PARTS * WINDOWS):
        place = across - FIRST + (1 - part % WINDOWS) * WINDOW
        inside = exists & (place >= 0) & (place < 2 * WINDOW)
        total += tl.load(sums + part * 2 * WINDOW + place, mask=inside, other=0.0)
    tl.store(
        gradient + channel * (HEIGHT * WIDTH) + entry,
        total.to(gradient.dtype.element_ty),
        mask=entry < HEIGHT * WIDTH,
    )


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right; the interpreter's own product takes bfloat16 for integers."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _lines(image, line, channels, lines, pitch, IMAGES: tl.constexpr, LINES: tl.constexpr):
    """Image, line and offset in memory of the rows of a tile that begins at `image`, `line`."""
    row = tl.arange(0, IMAGES * LINES)
    offsets = row // LINES * (channels * lines * pitch) + row % LINES * pitch
    return image + row // LINES, line + row % LINES, offsets


@triton.jit
def _turn(tile, IMAGES: tl.constexpr, SIDE: tl.constexpr):
    """Swaps lines and columns within each image of a tile."""
    turned = tl.permute(tl.reshape(tile, (IMAGES, SIDE, SIDE)), (0, 2, 1))
    return tl.reshape(turned, (IMAGES * SIDE, SIDE))


@triton.jit
def _store(
    output, tile, image, channel, y, x, batch, channels, height, pitch,
    IMAGES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    images, lines, offsets = _lines(image, y, channels, height, pitch, IMAGES, SIDE)
    columns = tl.arange(0, SIDE)
    place = ((image.to(tl.int64) * channels + channel) * height + y) * pitch + x
    tl.store(
        output + place + (offsets[:, None] + columns[None, :]),
        tile.to(output.dtype.element_ty),
        mask=((images < batch) & (lines < height))[:, None] & (x + columns < pitch)[None, :],
    )


# Kernels and Triton's own functions are compiled or interpreted as the environment said when each
# was imported; to be interpreted, all must be.
INTERPRETED = tl.constexpr(not any(isinstance(f, triton.JITFunction) for f in (convolve, tl.sum)))
