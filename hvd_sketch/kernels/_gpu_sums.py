"""Triton code of the GPU kernels: additions to u, v and the table, and the writing of an update."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from hvd_sketch.kernels._gpu_hash import VARYING, columns, flip, for_lanes, lanes, shards, sign_words, tile_blocks, wrap

# --- feedback and accumulate -------------------------------------------------------------------------------


@triton.jit
def _fed_back(v, u, gradient, at, mask, momentum):
    """``u <- m * u + g``, ``v <- v + u`` at coordinates ``at``; the new v. Compile it without fused rounding.

    What passes once leaves the level-2 cache first, to the table.
    """
    fed = tl.load(gradient + at, mask=mask, eviction_policy="evict_first")
    if u is not None:
        fed = tl.load(u + at, mask=mask, eviction_policy="evict_first") * momentum + fed
        tl.store(u + at, fed, mask=mask, eviction_policy="evict_first")
    fed += tl.load(v + at, mask=mask, eviction_policy="evict_first")
    tl.store(v + at, fed, mask=mask, eviction_policy="evict_first")
    return fed


@triton.jit(do_not_specialize=VARYING)
def feedback(v, u, gradient, momentum, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _fed_back(v, u, gradient, at, at < size, momentum)


@triton.jit(do_not_specialize=VARYING)
def accumulate(
    table, values, u, gradient, coefficients, momentum, start, size, cols, row_cells, first_row, last_row,
    BLOCK: tl.constexpr, SHARDS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a tile of values to the rows from ``table`` on, atomically; with a gradient, after its feedback.

    Signs are worked out in the tile's matrix, additions made in a vector: of a matrix some compilers (Triton 3.6) give
    neighbouring threads cells of different rows, and additions to scattered cells take eight times as long.
    """
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    block, base = tile_blocks(coefficients, tile, 0, cols, False, BLOCK, SHARDS, TILE)
    first, place = lanes(BLOCK, LANES, TILE)
    origin = for_lanes(block, BLOCK, LANES, TILE) * BLOCK + first
    at = origin[:, None] + place - start
    mask = (at >= 0) & (at < size)
    if gradient is not None:
        value = _fed_back(values, u, gradient, at, mask, momentum)
    else:
        value = tl.load(values + at, mask=mask, eviction_policy="evict_first")
    lane = tl.arange(0, TILE)
    at = tile * TILE + lane - start
    mask = (at >= 0) & (at < size)
    cells = table + for_lanes(base, BLOCK, 1, TILE)
    for row in range(first_row, last_row):
        column = for_lanes(columns(coefficients, row, block, cols), BLOCK, 1, TILE) + lane % BLOCK
        signed = flip(value, sign_words(coefficients, row, origin >> 4), origin, place)
        signed = tl.reshape(signed.to(tl.float32, bitcast=True), (TILE,))
        tl.atomic_add(cells + wrap(column, cols), signed, mask=mask, sem="relaxed")
        cells += row_cells


@triton.jit(do_not_specialize=VARYING)
def list_landings(
    tiles, coefficients, row, first_block, count, cols, lists,
    BLOCK: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The one or two lists of :func:`gather` that each block belongs to: int32 [count, 2].

    List l of a shard has the blocks that meet the shard's cells ``l * BLOCK … (l + 1) * BLOCK`` in the row, or for the
    last list all cells from ``l * BLOCK`` on. So no list has fewer cells than a block, and a block meets at most two.
    """
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    block = first_block + at
    column = columns(coefficients, row, block, cols)
    shard = shards(coefficients, block, SHARDS)
    head = tl.minimum(column // BLOCK, lists - 1)
    tail = tl.minimum(wrap(column + BLOCK - 1, cols) // BLOCK, lists - 1)
    none = SHARDS * lists  # after all lists
    mask = at < count
    tl.store(tiles + 2 * at, shard * lists + head, mask=mask)
    tl.store(tiles + 2 * at + 1, tl.where(tail == head, none, shard * lists + tail), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def gather(
    table, values, entries, bounds, coefficients, row, first_block, start, size, cols, lists,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each program adds the coordinates of its BLOCK cells of a row, in ascending order.

    ``entries`` are the landings, list after list. List l has entries ``bounds[l] … bounds[l + 1]``.
    """
    tiles = (cols + BLOCK - 1) // BLOCK
    shard = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first, place = lanes(BLOCK, LANES, BLOCK)
    cell = tile * BLOCK + first
    inside = cell[:, None] + place < cols
    table += shard.to(tl.int64) * cols + (cell[:, None] + place)
    total = tl.load(table, mask=inside)
    bounds += shard * lists + tl.minimum(tile, lists - 1)
    low = tl.load(bounds)
    high = tl.load(bounds + 1)
    for landing in tl.range(low, high, loop_unroll_factor=4):  # so that the loads of four blocks overlap
        block = first_block + tl.load(entries + landing) // 2
        lane = cell - columns(coefficients, row, block, cols)
        lane = tl.where(lane <= -LANES, lane + cols, lane)  # from -LANES + 1 on the row has lane 0: no wrap
        origin = block * BLOCK + lane
        # Cells are not aligned as coordinates are: a row of the tile meets two sign words.
        words = sign_words(coefficients, row, origin >> 4)
        words |= sign_words(coefficients, row, (origin >> 4) + 1) << 16
        at = origin[:, None] + place - start
        lands = (lane[:, None] + place >= 0) & (lane[:, None] + place < BLOCK) & (at >= 0) & (at < size) & inside
        value = flip(tl.load(values + at, mask=lands, other=0.0), words, origin, place)
        total = tl.where(lands, total + value.to(tl.float32, bitcast=True), total)
    tl.store(table, total, mask=inside)


# --- the update --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def scatter(
    addresses, starts, targets, indices, values, size,
    DTYPE: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write each value to the last of ``targets`` tensors that starts at its index or before it."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < size
    index = tl.load(indices + at, mask=mask, other=0)
    target = tl.zeros([TILE], tl.int32)
    for step in tl.static_range(STEPS):
        later = target + (1 << (STEPS - 1 - step))
        is_target = later < targets
        start = tl.load(starts + later, mask=mask & is_target, other=0)
        target = tl.where(is_target & (start <= index), later, target)
    address = tl.load(addresses + target)
    mask = mask & (address != 0)  # 0: a tensor that is not to be written
    cell = address.to(tl.pointer_type(DTYPE)) + (index - tl.load(starts + target))
    tl.store(cell, tl.load(values + at, mask=mask), mask=mask)
