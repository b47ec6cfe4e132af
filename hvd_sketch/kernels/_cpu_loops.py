"""Numba code of the CPU kernels; :mod:`hvd_sketch.kernels.cpu` calls it.

All that these kernels call is in this one file, because Numba's on-disk cache only notices changes of the file of the
cached function. ``hvd_sketch.coding`` compiles its own loops with :func:`lowest_bit` and :func:`count_ones` from here:
after a change of those two, touch the files of ``hvd_sketch.coding``. Nothing is compiled at import.

The last two arguments of a kernel, ``thread`` and ``threads``, say which piece of the work a call does.

Sizes and indices are int64, field elements uint64: Numba makes a float64 of the two mixed.
Milliseconds in comments: one thread of a Zen 4 core at 2.6 GHz, dim 25 million, 5 rows of 500,000 columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

from hvd_sketch.hashing import LANES_PER_WORD, MAX_BLOCK, PRIME
from hvd_sketch.kernels.reference import MAGNITUDE_MASK

WORDS = MAX_BLOCK // LANES_PER_WORD  # sign words of the largest block
MAX_NETWORK_ROWS = 9  # medians of more rows are sorted lane by lane
WHOLE_TABLE = -1  # in place of a shard
GROUP = 32  # blocks hashed in one vector loop; the cache keeps their values (32 KiB) from row to row
STRETCH = 2 * GROUP  # blocks estimated into a buffer in the second-level cache (64 KiB), and selected from it there
CHUNK = 1 << 17  # coordinates of u, v and g that go through the caches on the way into the table
MASK_LANES = 64  # lanes searched at once for magnitudes above a threshold
# Which bits of a byte are set, ascending, and zeros up to eight.
SET_BITS = np.array([[*(bit for bit in range(8) if byte >> bit & 1), *[0] * 8][:8] for byte in range(256)], np.uint8)
SUMS = 512  # of two vectors that are looked at at once, before they are written
SUBCOUNTS = 4  # histograms filled in turn, a power of two

Array = np.ndarray
Span = tuple[int, int]  # the first, and the one after the last
Found = tuple[Array, Array]  # positions, and the values (or their bits) there
Feedback = tuple[Array, Array, Array, np.float32]  # u (empty where momentum is 0), v, gradient; momentum
# Coefficients for signs [rows, 4], offsets [rows, 4] and shards [4]; block, columns of a shard, shards.
HashNumbers = tuple[Array, Array, Array, int, int, int]
ShardTable = tuple[Array, int, int, int, HashNumbers]  # flat cells, number of the shard, its coordinates, dim, hash

_PRIME = np.uint64(PRIME)
_PRIME_BITS = np.uint64(31)
_MAGNITUDE = np.uint32(MAGNITUDE_MASK)
_ONE = np.uint64(1)

# --- 16 lanes at a time -----------------------------------------------------------------------------------
# LLVM's vectoriser leaves these loops scalar or adds checks for overlap to every 16 lanes; written as vectors
# they become one AVX-512 instruction each, two of AVX2 or four of NEON.

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_INTS = ir.VectorType(_I32, LANES_PER_WORD)
_FLOATS = ir.VectorType(ir.FloatType(), LANES_PER_WORD)


def _ints(values: list[int]) -> ir.Constant:
    return ir.Constant(_INTS, values)


def _splat(builder: Any, value: Any, lanes: int = LANES_PER_WORD) -> Any:
    ints = ir.VectorType(_I32, lanes)
    undefined = ir.Constant(ints, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ints, [0] * lanes))


def _lanes_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """Pointer to elements ``index …`` of a contiguous array, as many as the vector has."""
    elements = context.make_array(array_type)(context, builder, array)
    if config.BOUNDSCHECK and isinstance(vector, ir.VectorType):
        end = builder.add(index, ir.Constant(_I64, vector.count))
        is_before = builder.icmp_signed("<", index, ir.Constant(_I64, 0))
        is_behind = builder.icmp_signed(">", end, elements.nitems)
        with builder.if_then(builder.or_(is_before, is_behind), likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("lanes out of bounds",))
    return builder.bitcast(builder.gep(elements.data, [index]), vector.as_pointer())


def _signs(builder: Any, word: Any) -> Any:
    """The float -1 in lane l where bit l of the sign word is set, else +1."""
    top = builder.shl(_splat(builder, word), _ints([31 - lane for lane in range(LANES_PER_WORD)]))
    sign = builder.and_(top, _ints([0x80000000] * LANES_PER_WORD))
    return builder.bitcast(builder.or_(sign, _ints([0x3F800000] * LANES_PER_WORD)), _FLOATS)


@intrinsic
def _add_signed(typing: Any, table: Any, cell: Any, values: Any, index: Any, word: Any) -> Any:
    """``table[cell + l] += ±values[index + l]`` for 16 lanes l."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, cell, values, index, word = arguments
        source = _lanes_at(context, builder, signature.args[2], values, index, _FLOATS)
        target = _lanes_at(context, builder, signature.args[0], table, cell, _FLOATS)
        signed = builder.fmul(builder.load(source, align=4), _signs(builder, word))
        builder.store(builder.fadd(builder.load(target, align=4), signed), target, align=4)
        return context.get_dummy_value()

    return types.void(table, types.intp, values, types.intp, types.uint32), generate


@intrinsic
def _store_median(
    typing: Any, out: Any, index: Any, table: Any, cells: Any, lane: Any, words: Any, word: Any, rows: Any
) -> Any:
    """``out[index + l]`` = median over rows j of ``±table[cells[j] + lane + l]`` for 16 lanes l.

    The sign word of row j is ``words[WORDS * j + word]``. Does nothing for more than MAX_NETWORK_ROWS rows.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, index, table, cells, lane, words, word, rows = arguments
        out_type, _, table_type, cells_type, _, words_type, _, _ = signature.args
        cells = context.make_array(cells_type)(context, builder, cells).data
        words = context.make_array(words_type)(context, builder, words).data
        target = _lanes_at(context, builder, out_type, out, index, _FLOATS)
        done = builder.append_basic_block("median_done")
        switch = builder.switch(rows, done)
        for count in range(1, MAX_NETWORK_ROWS + 1):
            case = builder.append_basic_block(f"median_of_{count}")
            switch.add_case(ir.Constant(_I64, count), case)
            builder.position_at_end(case)
            votes = []
            for row in range(count):
                cell = builder.add(builder.load(builder.gep(cells, [ir.Constant(_I64, row)])), lane)
                source = _lanes_at(context, builder, table_type, table, cell, _FLOATS)
                which = builder.add(word, ir.Constant(_I64, WORDS * row))
                signs = _signs(builder, builder.load(builder.gep(words, [which])))
                votes.append(builder.fmul(builder.load(source, align=4), signs))
            builder.store(_median_network(builder, votes), target, align=4)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    args = (out, types.intp, table, cells, types.intp, words, types.intp, types.intp)
    return types.void(*args), generate


def _median_network(builder: Any, votes: list[Any]) -> Any:
    """Min/max code for the median (mean of the middle two), 7 compare-exchanges for 5 rows.

    Forgetful selection: of n // 2 + 2 votes neither the least nor the greatest is the median of n. So both
    are dropped and one more vote is added, again and again.
    """

    def exchange(low: int, high: int) -> None:
        a, b = live[low], live[high]
        less, greater = builder.fcmp_ordered("<", a, b), builder.fcmp_ordered(">", a, b)
        live[low], live[high] = builder.select(less, a, b), builder.select(greater, a, b)  # minps, maxps

    middle = len(votes) // 2 + 2
    live, waiting = votes[:middle], votes[middle:]
    while len(live) > 2:
        for i in range(0, len(live) - 1, 2):
            exchange(i, i + 1)
        for i in range(2, len(live), 2):  # lows, and the unpaired last one
            exchange(0, i)
        last = len(live) - 1
        for i in range(1, last, 2):
            exchange(i, last)
        live = live[1:-1]
        if waiting:
            live.append(waiting.pop())
    if len(live) == 1:
        return live[0]
    return builder.fmul(builder.fadd(*live), ir.Constant(_FLOATS, [0.5] * LANES_PER_WORD))


@intrinsic
def _prefetch(typing: Any, table: Any, cell: Any) -> Any:
    """Begin to load the cache line of ``table[cell]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, cell = arguments
        address = _lanes_at(context, builder, signature.args[0], table, cell, ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, nearest, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
        builder.call(function, [address, read, nearest, data])
        return context.get_dummy_value()

    return types.void(table, types.intp), generate


@intrinsic
def _store_words(typing: Any, words: Any, at: Any, value: Any, slope: Any, curvature: Any, third: Any) -> Any:
    """``words[at + w] = value + w slope + w² curvature + w³ third`` over GF(2^31 - 1) for 16 words w.

    All four below 2^32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, at, *terms = arguments
        wide = ir.VectorType(_I64, WORDS)
        total = ir.Constant(wide, [0] * WORDS)
        for degree, term in enumerate(terms):
            factor = builder.zext(_splat(builder, builder.trunc(term, _I32)), wide)  # so that LLVM multiplies 32 bits
            powers = ir.Constant(wide, [word**degree for word in range(WORDS)])
            total = builder.add(total, builder.mul(factor, powers))
        low = builder.and_(total, ir.Constant(wide, [PRIME] * WORDS))
        folded = builder.add(low, builder.lshr(total, ir.Constant(wide, [31] * WORDS)))
        folded = builder.trunc(folded, _INTS)
        less = builder.sub(folded, _ints([PRIME] * WORDS))  # wraps where it would be negative
        reduced = builder.select(builder.icmp_unsigned("<", less, folded), less, folded)
        builder.store(reduced, _lanes_at(context, builder, signature.args[0], words, at, _INTS), align=4)
        return context.get_dummy_value()

    args = (words, types.intp, types.uint64, types.uint64, types.uint64, types.uint64)
    return types.void(*args), generate


@intrinsic
def _match_above(typing: Any, bits: Any, index: Any, threshold: Any) -> Any:
    """A uint64 whose bit l is set where ``magnitude(bits[index + l])`` is above the threshold."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, index, threshold = arguments
        mask = ir.Constant(_I64, 0)
        for first in range(0, MASK_LANES, LANES_PER_WORD):
            at = builder.add(index, ir.Constant(_I64, first))
            lanes = builder.load(_lanes_at(context, builder, signature.args[0], bits, at, _INTS), align=4)
            lanes = builder.and_(lanes, _ints([MAGNITUDE_MASK] * LANES_PER_WORD))
            found = builder.icmp_unsigned(">", lanes, _splat(builder, threshold))
            found = builder.zext(builder.bitcast(found, ir.IntType(LANES_PER_WORD)), _I64)
            mask = builder.or_(mask, builder.shl(found, ir.Constant(_I64, first)))
        return mask

    return types.uint64(bits, types.intp, types.uint32), generate


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """Position of the lowest set bit of a uint64; MASK_LANES where there is none."""
    defined = ir.Constant(ir.IntType(1), 0)  # also for 0
    return types.intp(types.uint64), lambda context, builder, signature, words: builder.cttz(*words, defined)


@intrinsic
def count_ones(typing: Any, mask: Any) -> Any:
    """How many bits of a uint64 are set."""
    return types.intp(types.uint64), lambda context, builder, signature, words: builder.ctpop(*words)


@intrinsic
def _store_set_bits(typing: Any, out: Any, at: Any, table: Any, eight: Any, base: Any) -> Any:
    """``out[at + i] = base + table[eight, i]`` for 8 elements i, int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, at, table, eight, base = arguments
        bytes_, ints = ir.VectorType(ir.IntType(8), 8), ir.VectorType(_I32, 8)
        row = builder.mul(eight, ir.Constant(_I64, 8))
        data = context.make_array(signature.args[2])(context, builder, table).data
        source = builder.bitcast(builder.gep(data, [row]), bytes_.as_pointer())
        lanes = builder.zext(builder.load(source, align=1), ints)
        bases = _splat(builder, builder.trunc(base, _I32), 8)
        target = _lanes_at(context, builder, signature.args[0], out, at, ints)
        builder.store(builder.add(lanes, bases), target, align=4)
        return context.get_dummy_value()

    return types.void(out, types.intp, table, types.intp, types.intp), generate


@intrinsic
def _atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an int64 that other threads also change; returns the old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, value = arguments
        address = _lanes_at(context, builder, signature.args[0], array, index, _I64)
        return builder.atomic_rmw("add", address, value, "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@njit
def _range_of(thread: int, threads: int, size: int) -> Span:
    """What one of the threads does of ``size`` things."""
    return thread * size // threads, (thread + 1) * size // threads


# --- the hash (hvd_sketch.hashing is its specification) ----------------------------------------------------

# inline="always": called, these three keep LLVM from vectorising the loops over blocks.


@njit(inline="always")
def _fold(value: Any) -> Any:
    return (value & _PRIME) + (value >> _PRIME_BITS)


@njit(inline="always")
def _cubic(c0: Any, c1: Any, c2: Any, c3: Any, x: Any) -> Any:
    """The cubic at ``x`` over GF(2^31 - 1), without a division: 2^31 = 1 there. Nothing reaches 2^64."""
    value = _fold(c3 * x + c2)
    value = _fold(value * x + c1)
    value = _fold(_fold(value * x + c0))
    return value - _PRIME if value >= _PRIME else value


@njit(inline="always")
def _scaled(c0: Any, c1: Any, c2: Any, c3: Any, x: Any, size: int) -> Any:
    """The cubic at ``x`` mapped to [0, size)."""
    return np.intp((_cubic(c0, c1, c2, c3, np.uint64(x)) * np.uint64(size)) >> _PRIME_BITS)


@njit
def _fill_words(words: Array, at: int, coefficients: Array, block: int, size: int) -> None:
    """Sign words of a block, always WORDS of them: ``words[at : at + WORDS]``.

    The cubic is expanded at the first word, x: ``f(x + w) = f(x) + w f'(x) + w² f''(x) / 2 + w³ c3``. The sum stays
    below 2^43 and so is reduced once, not once for each degree.
    """
    c0, c1, c2, c3 = coefficients
    x = np.uint64((block * size) >> 4)
    curvature = _fold(np.uint64(3) * _fold(c3 * x) + c2)
    slope = _fold(_fold((curvature + c2) * x + c1))
    _store_words(words, at, _cubic(c0, c1, c2, c3, x), slope, curvature, c3)


@njit
def _fill_columns(columns: Array, at: int, coefficients: Array, blocks: Array, cols: int) -> None:
    """Column of lane 0 of each block of a group in one row: ``columns[at : at + GROUP]``."""
    c0, c1, c2, c3 = coefficients
    for i in range(GROUP):
        columns[at + i] = _scaled(c0, c1, c2, c3, blocks[i], cols)


@njit(error_model="numpy")
def _fill_whole(blocks: Array, bases: Array, first: int, coefficients: Array, shards: int, cols: int) -> None:
    """Blocks ``first …`` of the vector, and the first cell of their shard in a row of the whole table."""
    c0, c1, c2, c3 = coefficients
    group = first // shards
    place, rotation = first - group * shards, _scaled(c0, c1, c2, c3, group, shards)
    for i in range(GROUP):
        shard = place + rotation
        blocks[i] = first + i
        bases[i] = (shard - shards if shard >= shards else shard) * cols
        place += 1
        if place == shards:
            group += 1
            place, rotation = 0, _scaled(c0, c1, c2, c3, group, shards)


@njit
def _fill_owned(blocks: Array, bases: Array, first: int, coefficients: Array, shards: int, shard: int) -> None:
    """Blocks ``first …`` in the order of a shard's owner, whose table holds no other shard: all ``bases`` are 0."""
    c0, c1, c2, c3 = coefficients
    for i in range(GROUP):
        group = first + i
        place = shard - _scaled(c0, c1, c2, c3, group, shards)
        blocks[i] = group * shards + (place + shards if place < 0 else place)
        bases[i] = 0


@njit
def _negative(words: Array, at: int, bit: int) -> Any:
    """Bit number ``bit`` of a block's sign words ``words[at:]``: 1 for -1."""
    return (words[at + (bit >> 4)] >> np.uint32(bit & 15)) & np.uint32(1)


# --- accumulate --------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, error_model="numpy")
def accumulate(
    table: Array, first_cell: int, cells: int, values: Array, start: int, hash: HashNumbers, thread: int, threads: int
) -> None:
    """Each thread adds the values that fall into its own run of ``cells`` of the flat ``table`` [rows * shards * cols].

    So no thread has a table of its own, nothing is merged, and the order of addition does not depend on ``threads``.
    But each thread reads all values: 2 threads take 15 each, one alone 22. A run continues from row to row: most rows
    belong to one thread, which reads in sequence (19 where the threads halve every row).
    """
    low, high = _range_of(thread, threads, cells)
    _accumulate_cells(table, first_cell + low, first_cell + high, values, start, hash)


@njit(nogil=True, cache=True, error_model="numpy")
def feedback(fed: Feedback, thread: int, threads: int) -> None:
    low, high = _range_of(thread, threads, fed[1].size)
    _feedback_run(fed, low, high)


@njit(nogil=True, cache=True, error_model="numpy")
def feedback_accumulate(
    table: Array, fed: Feedback, start: int, hash: HashNumbers, taken: Array, done: Array, thread: int, threads: int
) -> None:
    """Chunk by chunk, so that v comes from the cache when it is added to the table: 24 instead of 31 on 2 threads.

    At 100 million coordinates, with tables beyond the caches, it gains nothing (115 instead of 107 with 3 rows).

    The first thread to come takes the next piece of a chunk's feedback, and only waits for pieces that others have
    begun: threads may run one after the other. With a barrier after each chunk a call took 2,700 where other processes
    wanted the cores. ``taken`` and ``done`` count each chunk's pieces: int64 [ceil(v.size / CHUNK)], zeros at first.
    """
    low, high = _range_of(thread, threads, table.size)
    v = fed[1]
    pieces = 2 * threads
    for chunk in range(taken.size):
        first = chunk * CHUNK
        count = min(CHUNK, v.size - first)
        piece = _atomic_add(taken, chunk, 1)
        while piece < pieces:
            begin, end = _range_of(piece, pieces, count)
            _feedback_run(fed, first + begin, first + end)
            _atomic_add(done, chunk, 1)
            piece = _atomic_add(taken, chunk, 1)
        while _atomic_add(done, chunk, 0) < pieces:
            pass
        _accumulate_cells(table, low, high, v[first : first + count], start + first, hash)


@njit
def _feedback_run(fed: Feedback, low: int, high: int) -> None:
    """``u <- m * u + g``, ``v <- v + u`` for coordinates ``low … high``.

    With signed indices, each compared with 0, and u read again after it is written, LLVM leaves the loop scalar: a
    million coordinates on a thread of a Zen 3 core, in its caches, take 1.05 instead of 0.22.
    """
    u, v, gradient, momentum = fed
    if u.size:
        for i in range(np.uint64(low), np.uint64(high)):
            new = momentum * u[i] + gradient[i]
            u[i] = new
            v[i] += new
    else:
        for i in range(np.uint64(low), np.uint64(high)):
            v[i] += gradient[i]


@njit(error_model="numpy")
def _accumulate_cells(table: Array, low: int, high: int, values: Array, start: int, hash: HashNumbers) -> None:
    signs, offsets, rotations, block, cols, shards = hash
    row_cells = cols * shards
    stop = start + values.size
    words = np.empty(WORDS, dtype=np.uint32)
    blocks = np.empty(GROUP, dtype=np.int64)
    bases = np.empty(GROUP, dtype=np.int64)
    columns = np.empty(GROUP, dtype=np.int64)
    chosen = np.empty(GROUP, dtype=np.int64)
    end = (stop - 1) // block + 1
    for first in range(start // block, end, GROUP):
        count = min(GROUP, end - first)
        _fill_whole(blocks, bases, first, rotations, shards, cols)
        for row in range(low // row_cells, (high - 1) // row_cells + 1):
            _fill_columns(columns, 0, offsets[row], blocks, cols)
            n = 0
            for i in range(count):  # without a branch, which would be mispredicted every other time
                begin = row * row_cells + bases[i] + columns[i]
                chosen[n] = i
                n += (columns[i] + block > cols) | ((begin < high) & (begin + block > low))
            for c in range(n):
                i = chosen[c]
                if c + 1 < n:  # the next block's cells come from the third-level cache: 22 instead of 25
                    ahead = row * row_cells + bases[chosen[c + 1]] + columns[chosen[c + 1]]
                    for lane in range(0, block, LANES_PER_WORD):
                        _prefetch(table, ahead + lane)
                _fill_words(words, 0, signs[row], blocks[i], block)
                base, column, origin = row * row_cells + bases[i], columns[i], blocks[i] * block
                cell = base + column
                whole = block >= LANES_PER_WORD and column + block <= cols and start <= origin
                if whole and origin + block <= stop and low <= cell and cell + block <= high:
                    for word in range(block >> 4):
                        lane = word * LANES_PER_WORD
                        _add_signed(table, cell + lane, values, origin - start + lane, words[word])
                else:
                    lanes, bit = (max(0, start - origin), min(block, stop - origin)), origin & 15
                    cells, own = table[base : base + cols], (low - base, high - base)
                    _add_lanes(cells, own, column, values, origin - start, words, bit, lanes)


@njit
def _add_lanes(
    cells: Array, own: Span, column: int, values: Array, at: int, words: Array, bit: int, lanes: Span
) -> None:
    """A block that wraps at the end of its shard's ``cells`` in a row, or that is not all in ``values`` and ``own``.

    The thread adds to cells ``own`` only. Lane 0 is at cell ``column``, value ``at`` and bit ``bit`` of the words. Only
    ``lanes`` have values.
    """
    low, high = own
    lane, end = lanes
    while lane < end:
        place = column + lane
        if place >= cells.size:
            place -= cells.size
        fits = lane & 15 == 0 and lane + LANES_PER_WORD <= end and place + LANES_PER_WORD <= cells.size
        if fits and low <= place and place + LANES_PER_WORD <= high:
            _add_signed(cells, place, values, at + lane, words[lane >> 4])
            lane += LANES_PER_WORD
            continue
        if low <= place < high:
            value = values[at + lane]
            cells[place] += -value if _negative(words, 0, bit + lane) else value
        lane += 1


# --- estimate ----------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, error_model="numpy")
def estimate(out: Array, table: Array, start: int, hash: HashNumbers, thread: int, threads: int) -> None:
    """Coordinates ``start …`` from a whole flat table."""
    block = hash[3]
    stop = start + out.size
    first = start // block
    blocks = (stop - 1) // block + 1 - first
    begin, end = _range_of(thread, threads, blocks)
    _estimate_blocks(out, start, table, WHOLE_TABLE, start, stop, hash, first + begin, first + end)


@njit(nogil=True, cache=True, error_model="numpy")
def owned_histogram(counts: Array, shard_table: ShardTable, start: int, shift: int, thread: int, threads: int) -> None:
    """:func:`histogram` of a shard's estimates."""
    table, shard, size, dim, hash = shard_table
    block = hash[3]
    own = counts[thread * SUBCOUNTS : (thread + 1) * SUBCOUNTS]
    begin, end = _range_of(thread, threads, (size + block - 1) // block)
    buffer = np.empty(STRETCH * block, dtype=np.float32)
    for first in range(begin, end, STRETCH):
        last = min(first + STRETCH, end)
        _estimate_blocks(buffer, first * block, table, shard, 0, dim, hash, first, last)
        _count(own, buffer.view(np.uint32), 0, min(last * block, size) - first * block, start, shift)


@njit(nogil=True, cache=True, error_model="numpy")
def owned_above(
    spans: Array, found: Found, shard_table: ShardTable, threshold: int, limit: int, thread: int, threads: int
) -> None:
    """Estimates with magnitude bits above ``threshold``; each thread has an equal piece of both arrays ``found``.

    Even threads fill their piece from its end downwards, odd ones from its start. So the results of two neighbours are
    next to each other, need not be moved, and touch no more memory than they take. ``spans``, int64 [2, threads], gets
    the begin and end of each thread's results. A thread stops beyond ``limit``.
    """
    room, down = found[0].size // threads, thread % 2 == 0
    start = (thread + 1) * room if down else thread * room
    size, block = shard_table[2], shard_table[4][3]
    blocks = _range_of(thread, threads, (size + block - 1) // block)
    at = _keep_above(found, start, down, shard_table, threshold, limit, blocks)
    spans[0, thread] = min(start, at)
    spans[1, thread] = max(start, at)


@njit(error_model="numpy")
def _keep_above(
    found: Found, start: int, down: bool, shard_table: ShardTable, threshold: int, limit: int, blocks: Span
) -> int:
    positions, values = found
    table, shard, size, dim, hash = shard_table
    block = hash[3]
    begin, end = blocks
    buffer = np.empty(STRETCH * block, dtype=np.float32)
    lanes = np.empty(STRETCH * block + 8, dtype=np.int32)
    at = start
    stretches = (end - begin + STRETCH - 1) // STRETCH
    for turn in range(stretches):
        first = begin + STRETCH * (stretches - 1 - turn if down else turn)
        last = min(first + STRETCH, end)
        _estimate_blocks(buffer, first * block, table, shard, 0, dim, hash, first, last)
        count = min(last * block, size) - first * block
        above = _lanes_above(lanes, buffer.view(np.uint32), count, threshold)
        place = at - above if down else at
        at = place if down else at + above
        _write_found(positions[place : place + above], values[place : place + above], lanes, buffer, first * block)
        if abs(at - start) > limit:
            break
    return at


@njit
def _write_found(positions: Array, values: Array, lanes: Array, buffer: Array, first: int) -> None:
    for i in range(positions.size):
        positions[i] = first + lanes[i]
    for i in range(positions.size):
        values[i] = buffer[np.uint32(lanes[i])]


@njit
def _lanes_above(lanes: Array, bits: Array, count: int, threshold: int) -> int:
    """Write which of the first ``count`` are above the threshold; returns how many. Writes up to 8 elements too many.

    Eight lanes at a time, without a branch: the end of a loop over the set bits of a mask varies, and is mispredicted
    (19 instead of 16).
    """
    found = 0
    full = count - count % MASK_LANES
    for index in range(0, full, MASK_LANES):
        found = _store_lanes(lanes, found, index, _match_above(bits, index, np.uint32(threshold)))
    return _store_lanes(lanes, found, full, _mask_above(bits, full, count, threshold))


@njit(inline="always")
def _store_lanes(lanes: Array, found: int, index: int, mask: Any) -> int:
    for lane in range(0, MASK_LANES, 8):
        eight = np.intp((mask >> np.uint64(lane)) & np.uint64(255))
        _store_set_bits(lanes, found, SET_BITS, eight, index + lane)
        found += count_ones(np.uint64(eight))
    return found


@njit(error_model="numpy")
def _estimate_blocks(
    out: Array, zero: int, table: Array, shard: int, start: int, stop: int, hash: HashNumbers, begin: int, end: int
) -> None:
    """Write the estimates of blocks ``begin … end``, of coordinates ``start … stop`` only.

    Blocks are counted in coordinate order with WHOLE_TABLE, and in the owner's order with a shard. ``out[0]`` is
    element ``zero`` in that order.
    """
    signs, offsets, rotations, block, cols, shards = hash
    rows = signs.shape[0]
    row_cells = table.size // rows
    words = np.empty(rows * WORDS, dtype=np.uint32)
    blocks = np.empty(GROUP, dtype=np.int64)
    bases = np.empty(GROUP, dtype=np.int64)
    columns = np.empty(rows * GROUP, dtype=np.int64)
    cells = np.empty(rows, dtype=np.int64)
    for first in range(begin, end, GROUP):
        if shard == WHOLE_TABLE:
            _fill_whole(blocks, bases, first, rotations, shards, cols)
        else:
            _fill_owned(blocks, bases, first, rotations, shards, shard)
        for row in range(rows):
            _fill_columns(columns, row * GROUP, offsets[row], blocks, cols)
        for i in range(min(GROUP, end - first)):
            whole = block >= LANES_PER_WORD and rows <= MAX_NETWORK_ROWS
            for row in range(rows):
                column = columns[row * GROUP + i]
                cells[row] = row * row_cells + bases[i] + column
                whole &= column + block <= cols
                _fill_words(words, row * WORDS, signs[row], blocks[i], block)
                if i + 1 < GROUP:
                    ahead = row * row_cells + bases[i + 1] + columns[row * GROUP + i + 1]
                    for lane in range(0, block, LANES_PER_WORD):
                        _prefetch(table, ahead + lane)
            origin, index = blocks[i] * block, (first + i) * block - zero
            if whole and start <= origin and origin + block <= stop:
                for word in range(block >> 4):
                    lane = word * LANES_PER_WORD
                    _store_median(out, index + lane, table, cells, lane, words, word, rows)
            else:
                lanes = max(0, start - origin), min(block, stop - origin)
                for row in range(rows):
                    cells[row] -= columns[row * GROUP + i]
                _estimate_lanes(out, index, table, cells, columns[i::GROUP], cols, words, origin & 15, lanes)


@njit
def _estimate_lanes(
    out: Array, index: int, table: Array, bases: Array, columns: Array, cols: int, words: Array, bit: int, lanes: Span
) -> None:
    """Any block: one that wraps at ``cols``, only some ``lanes`` of one, or one in a table of many rows."""
    rows = bases.size
    votes = np.empty(rows, dtype=np.float32)
    cells = np.empty(rows, dtype=np.int64)
    lane, end = lanes
    while lane < end:
        fits = rows <= MAX_NETWORK_ROWS and lane & 15 == 0 and lane + LANES_PER_WORD <= end
        for row in range(rows):
            place = columns[row] + lane
            if place >= cols:
                place -= cols
            cells[row] = bases[row] + place
            fits &= place + LANES_PER_WORD <= cols
        if fits:
            _store_median(out, index + lane, table, cells, 0, words, lane >> 4, rows)
            lane += LANES_PER_WORD
            continue
        for row in range(rows):
            vote = table[cells[row]]
            if _negative(words, row * WORDS, bit + lane):
                vote = -vote
            at = row
            while at > 0 and votes[at - 1] > vote:
                votes[at] = votes[at - 1]
                at -= 1
            votes[at] = vote
        middle = votes[rows // 2]
        out[index + lane] = middle if rows & 1 else (votes[rows // 2 - 1] + middle) * np.float32(0.5)
        lane += 1


# --- single elements ---------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, error_model="numpy")
def gather(out: Array, values: Array, indices: Array, thread: int, threads: int) -> None:
    low, high = _range_of(thread, threads, indices.size)
    for i in range(low, high):
        out[i] = values[np.uint64(indices[i])]  # signed, each would be compared with 0: 11 instead of 6


@njit(nogil=True, cache=True, error_model="numpy")
def clear(vector: Array, indices: Array, thread: int, threads: int) -> None:
    low, high = _range_of(thread, threads, indices.size)
    for i in range(low, high):
        vector[np.uint64(indices[i])] = np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def put(vector: Array, start: int, indices: Array, values: Array, thread: int, threads: int) -> None:
    """``vector[indices[i] - start] = values[i]``."""
    low, high = _range_of(thread, threads, indices.size)
    for i in range(low, high):
        vector[np.uint64(indices[i] - start)] = values[i]


# --- selection ---------------------------------------------------------------------------------------------


@njit(inline="always")  # called, it takes a million lanes 0.08 instead of 0.04
def _mask_above(bits: Array, index: int, end: int, threshold: int) -> Any:
    """Which of the lanes ``index …`` below ``end``, at most MASK_LANES, are above the threshold: uint64."""
    if index + MASK_LANES <= end:
        return _match_above(bits, index, np.uint32(threshold))
    mask = np.uint64(0)
    for lane in range(end - index):
        if np.int64(bits[index + lane] & _MAGNITUDE) > threshold:
            mask |= _ONE << np.uint64(lane)
    return mask


@njit(nogil=True, cache=True, error_model="numpy")
def histogram(counts: Array, bits: Array, start: int, shift: int, thread: int, threads: int) -> None:
    """Add to counts, int64 [threads * SUBCOUNTS, bins + 1]; their sum over dimension 0 is the histogram."""
    low, high = _range_of(thread, threads, bits.size)
    _count(counts[thread * SUBCOUNTS : (thread + 1) * SUBCOUNTS], bits, low, high, start, shift)


@njit
def _count(counts: Array, bits: Array, low: int, high: int, start: int, shift: int) -> None:
    bins = counts.shape[1] - 1
    if start > 0:
        _count_above(counts, bits, low, high, start, shift)
        return
    for i in range(np.uint64(low), np.uint64(high)):  # signed, each would be compared with 0: 22 instead of 15
        value = np.int64(bits[i] & _MAGNITUDE)
        # Neighbours often share a bin: taking turns, an addition need not wait for the one before.
        counts[i & np.uint64(SUBCOUNTS - 1), min(value >> shift, np.int64(bins))] += value != 0


@njit
def _count_above(counts: Array, bits: Array, low: int, high: int, start: int, shift: int) -> None:
    """Often few values are in the window, or all are: looks at 64 lanes at a time."""
    bins = counts.shape[1] - 1
    for index in range(low, high, MASK_LANES):
        mask = _mask_above(bits, index, high, start - 1)
        if mask == ~np.uint64(0):
            for i in range(index, index + MASK_LANES):
                value = np.int64(bits[i] & _MAGNITUDE)
                counts[i % SUBCOUNTS, min((value - start) >> shift, np.int64(bins))] += 1
            continue
        while mask != 0:
            i = index + lowest_bit(mask)
            value = np.int64(bits[i] & _MAGNITUDE)
            counts[i % SUBCOUNTS, min((value - start) >> shift, np.int64(bins))] += 1
            mask &= mask - _ONE


@njit(nogil=True, cache=True, error_model="numpy")
def count_above(counts: Array, bits: Array, threshold: int, thread: int, threads: int) -> None:
    """How many values each thread finds above the threshold: counts int64 [threads]."""
    low, high = _range_of(thread, threads, bits.size)
    count = 0
    for index in range(low, high, MASK_LANES):
        count += count_ones(_mask_above(bits, index, high, threshold))
    counts[thread] = count


@njit(nogil=True, cache=True, error_model="numpy")
def select_above(out: Array, starts: Array, bits: Array, threshold: int, thread: int, threads: int) -> None:
    """Positions of values above the threshold; each thread writes from its element of ``starts`` on.

    Whole groups of lanes have a loop of their own: with the last, shorter one in it a million took 0.18, not 0.06.
    """
    low, high = _range_of(thread, threads, bits.size)
    at = starts[thread]
    full = high - (high - low) % MASK_LANES
    for index in range(low, full, MASK_LANES):
        at = _write_lanes(out, at, index, _match_above(bits, index, np.uint32(threshold)))
    _write_lanes(out, at, full, _mask_above(bits, full, high, threshold))


@njit(nogil=True, cache=True, error_model="numpy")
def values_above(spans: Array, found: Found, bits: Array, threshold: int, thread: int, threads: int) -> None:
    """Positions of values above the threshold, and the values, in one pass: each thread into an equal piece of both.

    ``spans``, int64 [2, threads], gets the begin and end of each thread's results. A thread stops when its piece is
    full, and says that it ends one element further.

    Two values of each group of lanes are written, whether the group has more or fewer: the end of a loop over them
    would be mispredicted. So a pass takes as long as reading the values, where few are above.
    """
    low, high = _range_of(thread, threads, bits.size)
    room = found[0].size // threads
    start, stop = thread * room, (thread + 1) * room
    spans[0, thread], spans[1, thread] = start, _keep_all(found, start, stop, bits, low, high, 0, threshold)


@njit(nogil=True, cache=True, error_model="numpy")
def sums_above(
    spans: Array, found: Found, values: Array, addends: Array, threshold: int, thread: int, threads: int
) -> None:
    """:func:`values_above` of sums, a piece of which is in the first-level cache at a time."""
    low, high = _range_of(thread, threads, values.size)
    room = found[0].size // threads
    at, stop = thread * room, (thread + 1) * room
    spans[0, thread] = at
    sums = np.empty(SUMS, dtype=np.float32)
    for first in range(low, high, SUMS):
        count = min(SUMS, high - first)
        _add(sums, values[first : first + count], addends[first : first + count])
        at = _keep_all(found, at, stop, sums.view(np.uint32), 0, count, first, threshold)
        if at > stop:
            break
    spans[1, thread] = at


@njit
def _add(sums: Array, values: Array, addends: Array) -> None:
    for i in range(np.uint64(values.size)):
        sums[i] = values[i] + addends[i]


@njit
def _keep_all(found: Found, at: int, stop: int, bits: Array, low: int, high: int, origin: int, threshold: int) -> int:
    """Write what is above the threshold among ``low … high`` to ``found[at:stop]``; where it ends, or one beyond."""
    for index in range(low, high, MASK_LANES):
        mask = _mask_above(bits, index, high, threshold)
        count = count_ones(mask)
        if count <= 2 and at + 2 <= stop:
            for i in range(2):  # of no bit, the lane is 0
                _keep(found, at + i, index + (lowest_bit(mask) & (MASK_LANES - 1)), origin, bits)
                mask &= mask - _ONE
            at += count
            continue
        if at + count > stop:
            return stop + 1
        while mask != 0:
            _keep(found, at, index + lowest_bit(mask), origin, bits)
            at += 1
            mask &= mask - _ONE
    return at


@njit(inline="always")
def _keep(found: Found, at: int, position: int, origin: int, bits: Array) -> None:
    found[0][np.uint64(at)] = origin + position
    found[1][np.uint64(at)] = bits[np.uint64(position)]


@njit(nogil=True, cache=True, error_model="numpy")
def keep_above(
    kept: Found, starts: Array, positions: Array, bits: Array, threshold: int, thread: int, threads: int
) -> None:
    """The elements of both arrays that :func:`select_above` chooses.

    In one call: a second call waits for its threads once more, 40 ms where their 2 cores have a load of 15. In place:
    with an array of the chosen positions, memory touched for the first time, half of 3 million took 16 instead of 4.
    """
    kept_positions, kept_bits = kept
    select_above(kept_positions, starts, bits, threshold, thread, threads)
    for at in range(np.uint64(starts[thread]), np.uint64(starts[thread + 1])):
        i = np.uint64(kept_positions[at])
        kept_positions[at], kept_bits[at] = positions[i], bits[i]


@njit
def _write_lanes(out: Array, at: int, index: int, mask: Any) -> int:
    while mask != 0:
        out[np.uint64(at)] = index + lowest_bit(mask)
        at += 1
        mask &= mask - _ONE
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def merge_owned(out: Array, positions: Array, ends: Array, blocks: int, coefficients: Array, block: int) -> None:
    """Coordinates, ascending, from the positions of all shards; shard i's positions end at ``ends[i]``."""
    c0, c1, c2, c3 = coefficients
    shards = ends.size
    nexts = np.zeros(shards, dtype=np.int64)
    nexts[1:] = ends[:-1]
    at = 0
    for group in range((blocks + shards - 1) // shards):
        shard = _scaled(c0, c1, c2, c3, group, shards)  # of the group's first block
        first, stop = group * block, (group + 1) * block  # of the positions in this group's block
        for place in range(shards):
            origin = (group * shards + place) * block
            i = nexts[shard]
            while i < ends[shard] and positions[i] < stop:
                out[at] = origin + positions[i] - first
                at += 1
                i += 1
            nexts[shard] = i
            shard = shard + 1 if shard + 1 < shards else 0
