"""Triton code of the GPU kernels; :mod:`hvd_sketch.kernels.gpu` launches it.

A program works on a tile: TILE coordinates from a multiple of TILE on, a whole number of blocks, as a matrix
[TILE // LANES, LANES] whose rows share a sign word. Block numbers, coordinates and shards' first cells are int64,
columns int32, field elements uint32. :class:`hvd_sketch.kernels.gpu.DeviceHash` lays out ``coefficients``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# A parameter's type is known when a kernel is compiled; an annotation would say constexpr or nothing.

import triton
import triton.language as tl

from hvd_sketch.hashing import PRIME
from hvd_sketch.kernels.reference import MAGNITUDE_MASK

NETWORK_ROWS = 9  # medians of more rows are found by counting, with rows * rows votes instead of rows

_PRIME = tl.constexpr(PRIME)
_MAGNITUDE = tl.constexpr(MAGNITUDE_MASK)
_INFINITY = tl.constexpr(0x7F800000)
_LEAST = tl.constexpr(-(2**31))
_GREATEST = tl.constexpr(2**31 - 1)
_NETWORK_ROWS = tl.constexpr(NETWORK_ROWS)

# Compiled for any value. Of the other numbers Triton compiles variants, for multiples of 16 among them: lengths
# that are keep loads 16 bytes wide, and do not change from step to step.
_VARYING = [
    "row",
    "first_row",
    "last_row",
    "first_block",
    "count",
    "shard",
    "momentum",
    "edge",
    "threshold",
    "ties",
    "room",
    "targets",
]

# --- the hash (hvd_sketch.hashing is its specification) ----------------------------------------------------


@triton.jit
def _reduced(value):
    """``value`` modulo 2^31 - 1, without a division: 2^31 = 1 there. uint32 [0, PRIME)."""
    folded = (value & _PRIME).to(tl.uint32) + (value >> 31).to(tl.uint32)
    return tl.minimum(folded, folded - _PRIME)  # which wraps where it would be negative


@triton.jit
def _step(value, x, coefficient):
    """``value * x + coefficient`` in the field. Of 32-bit factors: one instruction, where 64-bit ones take four."""
    return _reduced(value.to(tl.uint64) * x.to(tl.uint64) + tl.load(coefficient).to(tl.uint32).to(tl.uint64))


@triton.jit
def _cubic(coefficients, x):
    """The cubic at ``x`` (below PRIME) over GF(2^31 - 1): uint32 in [0, PRIME)."""
    x = x.to(tl.uint32)
    value = tl.load(coefficients + 3).to(tl.uint32)
    value = _step(value, x, coefficients + 2)
    value = _step(value, x, coefficients + 1)
    return _step(value, x, coefficients)


@triton.jit
def _scaled(coefficients, x, size):
    """The cubic at ``x`` mapped to [0, size): int64."""
    return ((_cubic(coefficients, x).to(tl.uint64) * size) >> 31).to(tl.int64)


@triton.jit
def _rotations(coefficients, group, SHARDS: tl.constexpr):
    if SHARDS == 1:
        return group * 0
    else:
        return _scaled(coefficients, group, SHARDS)


@triton.jit
def _shards(coefficients, block, SHARDS: tl.constexpr):
    return (block % SHARDS + _rotations(coefficients, block // SHARDS, SHARDS)) % SHARDS


@triton.jit
def _columns(coefficients, row, block, cols):
    """Column of lane 0 of each block: int32."""
    return _scaled(coefficients + 8 + 8 * row, block, cols).to(tl.int32)


@triton.jit
def _sign_words(coefficients, row, word):
    """Words of 16 sign bits, int32."""
    return (_cubic(coefficients + 4 + 8 * row, word) & 0xFFFF).to(tl.int32)


@triton.jit
def _flipped(values, words, origin, place):
    """A matrix of float32 values as int32 bits, each row by its word: negated where its coordinate's bit is set."""
    bit = (origin & 15).to(tl.int32)[:, None] + place
    return values.to(tl.int32, bitcast=True) ^ ((words[:, None] >> bit) << 31)


# --- tiles -------------------------------------------------------------------------------------------------


@triton.jit
def _for_lanes(per_block, BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """What is known for each block of a tile, for each row of its matrix: [TILE // LANES].

    So an offset is hashed once per block, not once per row of the matrix.
    """
    repeated = tl.broadcast_to(per_block[:, None], (TILE // BLOCK, BLOCK // LANES))
    return tl.reshape(repeated, (TILE // LANES,))


@triton.jit
def _lanes(BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """Lane, within its block, of each row's first element [TILE // LANES], and places within a row [1, LANES]."""
    return (tl.arange(0, TILE // LANES) * LANES) % BLOCK, tl.arange(0, LANES)[None, :]


@triton.jit
def _wrapped(column, cols):
    return tl.where(column >= cols, column - cols, column)


@triton.jit
def _tile_blocks(
    coefficients, tile, shard, cols, OWNED: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr
):
    """Blocks of a tile, and the first cell of their shard in a row of the table: int64 [TILE // BLOCK].

    OWNED: tiles of one shard's coordinates in its owner's order; its table holds no other shard.
    """
    block = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    if OWNED:
        place = shard - _rotations(coefficients, block, SHARDS)
        return block * SHARDS + tl.where(place < 0, place + SHARDS, place), block * 0
    else:
        return block, _shards(coefficients, block, SHARDS) * cols


# --- feedback and accumulate -------------------------------------------------------------------------------


@triton.jit
def _fed_back(v, u, gradient, at, mask, momentum):
    """``u <- m * u + g``, ``v <- v + u`` at some coordinates; the new v. To be compiled without fused rounding."""
    fed = tl.load(gradient + at, mask=mask)
    if u is not None:
        fed = tl.load(u + at, mask=mask) * momentum + fed
        tl.store(u + at, fed, mask=mask)
    fed += tl.load(v + at, mask=mask)
    tl.store(v + at, fed, mask=mask)
    return fed


@triton.jit(do_not_specialize=_VARYING)
def feedback(v, u, gradient, momentum, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _fed_back(v, u, gradient, at, at < size, momentum)


@triton.jit(do_not_specialize=_VARYING)
def accumulate(
    table, values, u, gradient, coefficients, momentum, start, size, cols, row_cells, first_row, last_row,
    BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a tile of values to the rows from ``table`` on, atomically; with a gradient, after its feedback."""
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    block, base = _tile_blocks(coefficients, tile, 0, cols, False, BLOCK, SHARDS, TILE)
    first, place = _lanes(BLOCK, LANES, TILE)
    origin = _for_lanes(block, BLOCK, LANES, TILE) * BLOCK + first
    base = _for_lanes(base, BLOCK, LANES, TILE)
    at = origin[:, None] + place - start
    mask = (at >= 0) & (at < size)
    if gradient is not None:
        value = _fed_back(values, u, gradient, at, mask, momentum)
    else:
        value = tl.load(values + at, mask=mask)
    for row in range(first_row, last_row):
        column = _for_lanes(_columns(coefficients, row, block, cols), BLOCK, LANES, TILE) + first
        cells = (table + base)[:, None] + _wrapped(column[:, None] + place, cols)
        signed = _flipped(value, _sign_words(coefficients, row, origin >> 4), origin, place)
        tl.atomic_add(cells, signed.to(tl.float32, bitcast=True), mask=mask, sem="relaxed")
        table += row_cells


@triton.jit(do_not_specialize=_VARYING)
def list_landings(
    tiles, coefficients, row, first_block, count, cols, lists,
    BLOCK: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The one or two lists of :func:`gather` that each block belongs to: int32 [count, 2].

    List l of a shard is of the blocks that meet cells ``l * BLOCK … (l + 1) * BLOCK`` of its part of the row, the
    last one's all cells from there on: so no list's cells are fewer than a block's, and a block meets two at most.
    """
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    block = first_block + at
    column = _columns(coefficients, row, block, cols)
    shard = _shards(coefficients, block, SHARDS)
    head = tl.minimum(column // BLOCK, lists - 1)
    tail = tl.minimum(_wrapped(column + BLOCK - 1, cols) // BLOCK, lists - 1)
    none = SHARDS * lists  # behind all others
    mask = at < count
    tl.store(tiles + 2 * at, shard * lists + head, mask=mask)
    tl.store(tiles + 2 * at + 1, tl.where(tail == head, none, shard * lists + tail), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def gather(
    table, values, entries, bounds, coefficients, row, first_block, start, size, cols, lists,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each program sums, into its BLOCK cells of a row, what lands there, block after block in ascending order.

    ``entries`` are the numbers of the landings, list after list; list l's are ``bounds[l] … bounds[l + 1]``.
    """
    tiles = (cols + BLOCK - 1) // BLOCK
    shard = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first, place = _lanes(BLOCK, LANES, BLOCK)
    cell = tile * BLOCK + first
    inside = cell[:, None] + place < cols
    table += shard.to(tl.int64) * cols + (cell[:, None] + place)
    total = tl.load(table, mask=inside)
    bounds += shard * lists + tl.minimum(tile, lists - 1)
    low = tl.load(bounds)
    high = tl.load(bounds + 1)
    for landing in tl.range(low, high, loop_unroll_factor=4):  # so that the loads of four blocks overlap
        block = first_block + tl.load(entries + landing) // 2
        lane = cell - _columns(coefficients, row, block, cols)
        lane = tl.where(lane <= -LANES, lane + cols, lane)  # nearer ones hold the column: none wraps
        origin = block * BLOCK + lane
        # Cells are not aligned as coordinates are: a row of the tile meets two sign words.
        words = _sign_words(coefficients, row, origin >> 4)
        words |= _sign_words(coefficients, row, (origin >> 4) + 1) << 16
        at = origin[:, None] + place - start
        lands = (lane[:, None] + place >= 0) & (lane[:, None] + place < BLOCK) & (at >= 0) & (at < size) & inside
        value = _flipped(tl.load(values + at, mask=lands, other=0.0), words, origin, place)
        total = tl.where(lands, total + value.to(tl.float32, bitcast=True), total)
    tl.store(table, total, mask=inside)


# --- estimate ----------------------------------------------------------------------------------------------


@triton.jit
def _vote(
    shard_row, coefficients, row, block, origin, first, place, exists, cols,
    BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row's votes as int32 keys in the order of the floats, NaN of either sign last.

    ``shard_row`` points to where, in that row of the table, each matrix row's shard begins.
    """
    column = _for_lanes(_columns(coefficients, row, block, cols), BLOCK, LANES, TILE) + first
    cells = shard_row[:, None] + _wrapped(column[:, None] + place, cols)
    votes = tl.load(cells, mask=exists, other=0.0)
    magnitude = _magnitudes(votes)
    key = _mirrored(_flipped(votes, _sign_words(coefficients, row, origin >> 4), origin, place))
    return tl.where(magnitude > _INFINITY, magnitude, key)


@triton.jit
def _magnitudes(values):
    return values.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _mirrored(bits):
    """Float bits to keys, and back."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def _sorted(a, b):
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def _medians(
    table, coefficients, block, base, first, place, dim, cols, row_cells,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Medians over rows of the tile's coordinates at some places of its matrix's rows: [TILE // LANES, WIDTH]."""
    origin = _for_lanes(block, BLOCK, LANES, TILE) * BLOCK + first
    shard_row = table + _for_lanes(base, BLOCK, LANES, TILE)
    exists = origin[:, None] + place < dim
    if ROWS <= _NETWORK_ROWS:
        # The five least votes seen so far, in order, of ROWS and some below all of them: the median ends up last.
        # What is not needed, such as comparing with these constants, the compiler drops.
        below = tl.full((TILE // LANES, WIDTH), _LEAST, tl.int32)
        e = tl.full((TILE // LANES, WIDTH), _GREATEST, tl.int32)
        a = e if ROWS > 7 else below
        b = e if ROWS > 5 else below
        c = e if ROWS > 3 else below
        d = e if ROWS > 1 else below
        for row in tl.static_range(ROWS):
            vote = _vote(shard_row, coefficients, row, block, origin, first, place, exists, cols, BLOCK, LANES, TILE)
            shard_row += row_cells
            a, vote = _sorted(a, vote)
            b, vote = _sorted(b, vote)
            c, vote = _sorted(c, vote)
            d, vote = _sorted(d, vote)
            e = tl.minimum(e, vote)
        low, high = d, e
    else:
        low = tl.full((TILE // LANES, WIDTH), 0, tl.int32)
        high = low
        first_row = shard_row
        for row in range(ROWS):
            vote = _vote(shard_row, coefficients, row, block, origin, first, place, exists, cols, BLOCK, LANES, TILE)
            shard_row += row_cells
            rank = tl.full((TILE // LANES, WIDTH), 0, tl.int32)
            other_row = first_row
            for i in range(ROWS):
                other = _vote(other_row, coefficients, i, block, origin, first, place, exists, cols, BLOCK, LANES, TILE)
                other_row += row_cells
                rank += ((other < vote) | ((other == vote) & (i < row))).to(tl.int32)
            low = tl.where(rank == (ROWS - 1) // 2, vote, low)
            high = tl.where(rank == ROWS // 2, vote, high)
    median = _mirrored(high).to(tl.float32, bitcast=True)
    if ROWS % 2 == 0:
        median = (_mirrored(low).to(tl.float32, bitcast=True) + median) * 0.5
    return median


@triton.jit
def _estimates(
    table, coefficients, tile, shard, dim, cols, row_cells,
    OWNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The medians of a tile, zero past the vector's end: float32 [TILE].

    Table rows are not aligned, and so each thread reads single floats; the compiler gives it every 32nd, each of
    another sign word. Taken four times a fourth, they are four neighbours, whose word it computes once.
    """
    block, base = _tile_blocks(coefficients, tile, shard, cols, OWNED, BLOCK, SHARDS, TILE)
    first = (tl.arange(0, TILE // LANES) * LANES) % BLOCK
    if LANES < 4 or ROWS > _NETWORK_ROWS:
        place = tl.arange(0, LANES)[None, :]
        median = _medians(
            table, coefficients, block, base, first, place, dim, cols, row_cells, ROWS, BLOCK, LANES, LANES, TILE
        )
    else:
        WIDTH: tl.constexpr = LANES // 4
        place = tl.arange(0, WIDTH)[None, :] * 4
        m0 = _medians(
            table, coefficients, block, base, first, place, dim, cols, row_cells, ROWS, BLOCK, LANES, WIDTH, TILE
        )
        m1 = _medians(
            table, coefficients, block, base, first, place + 1, dim, cols, row_cells, ROWS, BLOCK, LANES, WIDTH, TILE
        )
        m2 = _medians(
            table, coefficients, block, base, first, place + 2, dim, cols, row_cells, ROWS, BLOCK, LANES, WIDTH, TILE
        )
        m3 = _medians(
            table, coefficients, block, base, first, place + 3, dim, cols, row_cells, ROWS, BLOCK, LANES, WIDTH, TILE
        )
        median = tl.join(tl.join(m0, m2), tl.join(m1, m3))
    return tl.reshape(median, (TILE,))


@triton.jit(do_not_specialize=_VARYING)
def estimate(
    out, table, coefficients, start, stop, shard, dim, cols, row_cells,
    OWNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    median = _estimates(table, coefficients, tile, shard, dim, cols, row_cells, OWNED, ROWS, BLOCK, SHARDS, LANES, TILE)
    position = tile * TILE + tl.arange(0, TILE)
    tl.store(out + position - start, median, mask=(position >= start) & (position < stop))


# --- selection ---------------------------------------------------------------------------------------------


@triton.jit
def _tile_values(
    source, coefficients, shard, size, cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's tile, zero past the end: of the vector ``source``, or, with ROWS, of a shard's estimates."""
    tile = tl.program_id(0).to(tl.int64)
    if ROWS == 0:
        at = tile * TILE + tl.arange(0, TILE)
        return tl.load(source + at, mask=at < size, other=0.0)
    else:
        return _estimates(source, coefficients, tile, shard, size, cols, cols, True, ROWS, BLOCK, SHARDS, LANES, TILE)


@triton.jit
def _number(number):
    """A number, or what a pointer to one says."""
    if number.dtype.is_ptr():
        return tl.load(number)
    else:
        return number


@triton.jit
def _compared(magnitude, threshold):
    """Which magnitudes lie above the threshold, and which on it; zeros never do."""
    threshold = _number(threshold)
    return magnitude > tl.maximum(threshold, 0), (magnitude == threshold) & (magnitude != 0)


@triton.jit
def _add_to_histogram(
    counts, magnitude, edge, SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr
):  # fmt: skip
    """Add magnitudes from ``edge`` upwards to one of the histograms ``counts``, int32 [COPIES, BINS + 1]."""
    counted = (magnitude != 0) & (magnitude >= edge)
    bin = tl.minimum((magnitude - edge) >> SHIFT, BINS)
    copy = tl.program_id(0) % COPIES
    tl.atomic_add(counts + copy * (BINS + 1) + bin, 1, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=_VARYING)
def histogram(
    source, coefficients, shard, size, cols, counts, edge,
    SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a tile to a histogram."""
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    _add_to_histogram(counts, _magnitudes(values), _number(edge), SHIFT, BINS, COPIES)


@triton.jit(do_not_specialize=_VARYING)
def count(
    source, coefficients, shard, size, cols, found, threshold,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many magnitudes of each tile lie above the threshold, and how many on it: int64 [2, programs]."""
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    above, equal = _compared(_magnitudes(values), threshold)
    found += tl.program_id(0)
    tl.store(found, tl.sum(above.to(tl.int32), 0))
    tl.store(found + tl.num_programs(0), tl.sum(equal.to(tl.int32), 0))


@triton.jit(do_not_specialize=_VARYING)
def write_chosen(
    source, coefficients, shard, size, cols, positions, out, room, found, threshold, ties, counts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr = 0, BINS: tl.constexpr = 0, COPIES: tl.constexpr = 1,
):  # fmt: skip
    """Positions and values of the first ``room`` chosen; with ``counts``, also a histogram of all above the threshold.

    ``found`` is what :func:`count` found, summed up to each tile.
    """
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    magnitude = _magnitudes(values)
    if counts is not None:
        _add_to_histogram(counts, magnitude, _number(threshold) + 1, SHIFT, BINS, COPIES)
    tile = tl.program_id(0).to(tl.int64)
    above, equal = _compared(magnitude, threshold)
    ties = _number(ties)
    above_before = tl.load(found + tile) - tl.sum(above.to(tl.int32), 0)
    equal_before = tl.load(found + tl.num_programs(0) + tile) - tl.sum(equal.to(tl.int32), 0)
    chosen = above | (equal & (equal_before + tl.cumsum(equal.to(tl.int32), 0) <= ties))
    at = above_before + tl.minimum(equal_before, ties) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    chosen = chosen & (at < room)
    tl.store(positions + at, tile * TILE + tl.arange(0, TILE), mask=chosen)
    tl.store(out + at, values, mask=chosen)


# --- the update --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def scatter(
    addresses, starts, targets, indices, values, size,
    DTYPE: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write each value where its index lies: in the last of ``targets`` tensors that starts at it or before."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < size
    index = tl.load(indices + at, mask=mask, other=0)
    target = tl.zeros([TILE], tl.int32)
    for step in tl.static_range(STEPS):
        later = target + (1 << (STEPS - 1 - step))
        is_target = later < targets
        start = tl.load(starts + later, mask=mask & is_target, other=0)
        target = tl.where(is_target & (start <= index), later, target)
    address = tl.load(addresses + target).to(tl.pointer_type(DTYPE))
    tl.store(address + (index - tl.load(starts + target)), tl.load(values + at, mask=mask), mask=mask)
