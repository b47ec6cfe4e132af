"""Triton code of the GPU kernels: estimates from the table, and the selection of large values."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from hvd_sketch.kernels._gpu_hash import VARYING, columns, for_lanes, lanes, sign_words, tile_blocks, wrap
from hvd_sketch.kernels.reference import MAGNITUDE_MASK

NETWORK_ROWS = 9  # medians of more rows are found by counting, which loads rows * rows votes instead of rows

_MAGNITUDE = tl.constexpr(MAGNITUDE_MASK)
_INFINITY = tl.constexpr(0x7F800000)
_LEAST = tl.constexpr(-(2**31))
_GREATEST = tl.constexpr(2**31 - 1)
_NETWORK_ROWS = tl.constexpr(NETWORK_ROWS)

# --- estimate ----------------------------------------------------------------------------------------------


@triton.jit
def _vote(
    shard_row, coefficients, row, block, word, bit, lane, exists, cols,
    BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row's votes as int32 keys in the order of the floats, NaN of either sign last: [TILE].

    ``shard_row`` points to the first cell of each coordinate's shard in that row of the table.
    """
    column = for_lanes(columns(coefficients, row, block, cols), BLOCK, 1, TILE) + lane
    votes = tl.load(shard_row + wrap(column, cols), mask=exists, other=0.0)
    magnitude = _magnitudes(votes)
    words = for_lanes(sign_words(coefficients, row, word), LANES, 1, TILE)
    key = _mirrored(votes.to(tl.int32, bitcast=True) ^ ((words >> bit) << 31))
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
def _estimates(
    table, coefficients, tile, shard, dim, cols, row_cells,
    OWNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The medians of a tile, zero past the vector's end: float32 [TILE].

    Table rows are not aligned, so each thread reads single floats: of a vector neighbours read neighbours, of a matrix
    they do not with every compiler (Triton 3.6). A sign word is worked out once, and goes to its coordinates.
    """
    block, base = tile_blocks(coefficients, tile, shard, cols, OWNED, BLOCK, SHARDS, TILE)
    first, _ = lanes(BLOCK, LANES, TILE)
    word = (for_lanes(block, BLOCK, LANES, TILE) * BLOCK + first) >> 4
    lane = tl.arange(0, TILE) % BLOCK
    coordinate = for_lanes(block, BLOCK, 1, TILE) * BLOCK + lane
    bit, exists = (coordinate & 15).to(tl.int32), coordinate < dim
    shard_row = table + for_lanes(base, BLOCK, 1, TILE)
    if ROWS <= _NETWORK_ROWS:
        # The five least values so far, in order, of ROWS votes and some values below all votes. The last one will be
        # the median. The compiler drops what is not needed, such as comparisons with these constants.
        below = tl.full((TILE,), _LEAST, tl.int32)
        e = tl.full((TILE,), _GREATEST, tl.int32)
        a = e if ROWS > 7 else below
        b = e if ROWS > 5 else below
        c = e if ROWS > 3 else below
        d = e if ROWS > 1 else below
        for row in tl.static_range(ROWS):
            vote = _vote(shard_row, coefficients, row, block, word, bit, lane, exists, cols, BLOCK, LANES, TILE)
            shard_row += row_cells
            a, vote = _sorted(a, vote)
            b, vote = _sorted(b, vote)
            c, vote = _sorted(c, vote)
            d, vote = _sorted(d, vote)
            e = tl.minimum(e, vote)
        low, high = d, e
    else:
        low = tl.full((TILE,), 0, tl.int32)
        high = low
        first_row = shard_row
        for row in range(ROWS):
            vote = _vote(shard_row, coefficients, row, block, word, bit, lane, exists, cols, BLOCK, LANES, TILE)
            shard_row += row_cells
            rank = tl.full((TILE,), 0, tl.int32)
            other_row = first_row
            for i in range(ROWS):
                other = _vote(other_row, coefficients, i, block, word, bit, lane, exists, cols, BLOCK, LANES, TILE)
                other_row += row_cells
                rank += ((other < vote) | ((other == vote) & (i < row))).to(tl.int32)
            low = tl.where(rank == (ROWS - 1) // 2, vote, low)
            high = tl.where(rank == ROWS // 2, vote, high)
    median = _mirrored(high).to(tl.float32, bitcast=True)
    if ROWS % 2 == 0:
        median = (_mirrored(low).to(tl.float32, bitcast=True) + median) * 0.5
    return median


@triton.jit(do_not_specialize=VARYING)
def estimate(
    out, table, coefficients, start, stop, dim, cols, row_cells,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    median = _estimates(table, coefficients, tile, 0, dim, cols, row_cells, False, ROWS, BLOCK, SHARDS, LANES, TILE)
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
def _add_to_histogram(counts, magnitude, edge, SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr):
    """Add magnitudes from ``edge`` upwards to one of the histograms ``counts``, int32 [COPIES, BINS + 1]."""
    counted = (magnitude != 0) & (magnitude >= edge)
    bin = tl.minimum((magnitude - edge) >> SHIFT, BINS)
    copy = tl.program_id(0) % COPIES
    tl.atomic_add(counts + copy * (BINS + 1) + bin, 1, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def histogram(
    source, coefficients, shard, size, cols, counts, edge,
    SHIFT: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a tile to a histogram."""
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    _add_to_histogram(counts, _magnitudes(values), edge, SHIFT, BINS, COPIES)


@triton.jit(do_not_specialize=VARYING)
def count(
    source, coefficients, shard, size, cols, found, threshold,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The number of magnitudes above the threshold in each tile: int64 [programs]."""
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    above = _magnitudes(values) > tl.maximum(threshold, 0)  # zeros never are
    tl.store(found + tl.program_id(0), tl.sum(above.to(tl.int32), 0))


@triton.jit(do_not_specialize=VARYING)
def write_chosen(
    source, coefficients, shard, size, cols, positions, out, room, found, threshold, counts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr = 0, BINS: tl.constexpr = 0, COPIES: tl.constexpr = 1,
):  # fmt: skip
    """Positions and values of the first ``room`` above the threshold; with ``counts``, also a histogram of all.

    ``found`` are the cumulative sums of the numbers from :func:`count`.
    """
    values = _tile_values(source, coefficients, shard, size, cols, ROWS, BLOCK, SHARDS, LANES, TILE)
    magnitude = _magnitudes(values)
    if counts is not None:
        _add_to_histogram(counts, magnitude, threshold + 1, SHIFT, BINS, COPIES)
    tile = tl.program_id(0).to(tl.int64)
    above = magnitude > tl.maximum(threshold, 0)
    before = tl.load(found + tile) - tl.sum(above.to(tl.int32), 0)
    at = before + tl.cumsum(above.to(tl.int32), 0) - 1
    chosen = above & (at < room)
    tl.store(positions + at, tile * TILE + tl.arange(0, TILE), mask=chosen)
    tl.store(out + at, values, mask=chosen)
