"""Numba code of the CPU kernels; :mod:`hvd_sketch.kernels.cpu` calls it.

All that these kernels call lies in this one file, because Numba's on-disk cache notices changes of the file of the
cached function only. (``hvd_sketch.coding`` compiles its own loops and takes :func:`lowest_bit` and
:func:`count_ones` from here: who changes those has to touch its files, too.) Nothing is compiled at import.

Sizes and indices are int64, field elements uint64: of the two mixed Numba would make a float64.
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
STRETCH = 2 * GROUP  # blocks estimated into a buffer that the second-level cache holds (64 KiB), then judged there
CHUNK = 1 << 17  # coordinates of u, v and g that go through the caches on the way into the table
MASK_LANES = 64  # lanes searched at once for magnitudes above a threshold
# Which bits of a byte are set, ascending, and zeros up to eight.
SET_BITS = np.array([[*(bit for bit in range(8) if byte >> bit & 1), *[0] * 8][:8] for byte in range(256)], np.uint8)
SUBCOUNTS = 4  # histograms filled in turn, a power of two

Array = np.ndarray
# Coefficients for signs [rows, 4], offsets [rows, 4] and shards [4]; block, columns of a shard, shards.
HashNumbers = tuple[Array, Array, Array, int, int, int]

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


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _ints([0] * LANES_PER_WORD))


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

    Forgetful selection: of n // 2 + 2 votes neither the least nor the greatest is the median of n, so both
    are dropped and one more vote is taken in.
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
    """Ask for the cache line of ``table[cell]``."""

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

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.intp(types.uint64), generate


@intrinsic
def count_ones(typing: Any, mask: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), generate


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
        undefined = ir.Constant(ints, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(base, _I32), ir.Constant(_I32, 0))
        bases = builder.shuffle_vector(first, undefined, ir.Constant(ints, [0] * 8))
        target = _lanes_at(context, builder, signature.args[0], out, at, ints)
        builder.store(builder.add(lanes, bases), target, align=4)
        return context.get_dummy_value()

    return types.void(out, types.intp, table, types.intp, types.intp), generate


@intrinsic
def _atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an int64 that other threads use too; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, value = arguments
        address = _lanes_at(context, builder, signature.args[0], array, index, _I64)
        return builder.atomic_rmw("add", address, value, "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


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
    """Sign words of a block, as many as the largest has: ``words[at : at + WORDS]``.

    By the cubic's expansion at the first word, x: ``f(x + w) = f(x) + w f'(x) + w² f''(x) / 2 + w³ c3``, which stays
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
    """Blocks ``first …`` in the order of a shard's owner; its part of the table holds no other shard."""
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
    table: Array, first_cell: int, cells: int, values: Array, start: int, hash: HashNumbers, part: int, parts: int
) -> None:
    """Each part adds whatever falls into its own run of ``cells`` of the flat ``table`` [rows * shards * cols].

    So there is no private table, nothing to merge, and one order of addition whatever ``parts`` is. The price
    is that each part reads the values: 2 parts take 15 each, one alone 22. A run goes on from row to row,
    so that most rows belong to one part, which reads in sequence (parts that halve every row: 19).
    """
    low, high = first_cell + part * cells // parts, first_cell + (part + 1) * cells // parts
    _accumulate_cells(table, low, high, values, start, hash)


@njit(nogil=True, cache=True, error_model="numpy")
def feedback(u: Array, v: Array, gradient: Array, momentum: float, part: int, parts: int) -> None:
    _feedback_run(u, v, gradient, momentum, part * v.size // parts, (part + 1) * v.size // parts)


@njit(nogil=True, cache=True, error_model="numpy")
def feedback_accumulate(
    table: Array,
    u: Array,
    v: Array,
    gradient: Array,
    momentum: float,
    start: int,
    hash: HashNumbers,
    taken: Array,
    done: Array,
    part: int,
    parts: int,
) -> None:
    """Chunk by chunk, so that v comes from the cache when it is added to the table: 24 instead of 31 on 2 threads.

    At 100 million coordinates, with tables beyond the caches, it gains nothing (115 instead of 107 with 3 rows).

    Whichever part comes first takes the next piece of a chunk's feedback, and waits only for pieces that others have
    begun: parts may run one after the other. With a barrier after each chunk a call took 2,700 where other processes
    wanted the cores. ``taken`` and ``done`` count each chunk's pieces: int64 [ceil(v.size / CHUNK)], zeros at first.
    """
    low, high = part * table.size // parts, (part + 1) * table.size // parts
    pieces = 2 * parts
    for chunk in range(taken.size):
        first = chunk * CHUNK
        count = min(CHUNK, v.size - first)
        piece = _atomic_add(taken, chunk, 1)
        while piece < pieces:
            begin, end = first + piece * count // pieces, first + (piece + 1) * count // pieces
            _feedback_run(u, v, gradient, momentum, begin, end)
            _atomic_add(done, chunk, 1)
            piece = _atomic_add(taken, chunk, 1)
        while _atomic_add(done, chunk, 0) < pieces:
            pass
        _accumulate_cells(table, low, high, v[first : first + count], start + first, hash)


@njit
def _feedback_run(u: Array, v: Array, gradient: Array, momentum: float, low: int, high: int) -> None:
    """``u`` is empty where momentum is 0.

    With signed indices, each compared with 0, and u read again after it is written, LLVM leaves the loop scalar: a
    million coordinates on a thread of a Zen 3 core, in its caches, take 1.05 instead of 0.22.
    """
    if u.size:
        for i in range(np.uint64(low), np.uint64(high)):
            fed = momentum * u[i] + gradient[i]
            u[i] = fed
            v[i] += fed
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
                    _add_lanes(table, low, high, base, column, cols, values, start, origin, block, words)


@njit
def _add_lanes(
    table: Array,
    low: int,
    high: int,
    base: int,
    column: int,
    cols: int,
    values: Array,
    start: int,
    origin: int,
    block: int,
    words: Array,
) -> None:
    """A block that wraps at ``cols``, or lies only in part within the values or the part's cells."""
    lane = max(0, start - origin)
    end = min(block, start + values.size - origin)
    first_bit = origin & 15  # blocks below 16 share a sign word
    while lane < end:
        place = column + lane
        if place >= cols:
            place -= cols
        cell, index = base + place, origin - start + lane
        fits = lane & 15 == 0 and lane + LANES_PER_WORD <= end and place + LANES_PER_WORD <= cols
        if fits and low <= cell and cell + LANES_PER_WORD <= high:
            _add_signed(table, cell, values, index, words[lane >> 4])
            lane += LANES_PER_WORD
            continue
        if low <= cell < high:
            value = values[index]
            table[cell] += -value if _negative(words, 0, first_bit + lane) else value
        lane += 1


# --- estimate ----------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, error_model="numpy")
def estimate(out: Array, table: Array, start: int, hash: HashNumbers, part: int, parts: int) -> None:
    """Coordinates ``start …`` from a whole flat table."""
    block = hash[3]
    stop = start + out.size
    first = start // block
    blocks = (stop - 1) // block + 1 - first
    begin, end = first + part * blocks // parts, first + (part + 1) * blocks // parts
    _estimate_blocks(out, start, table, WHOLE_TABLE, start, stop, hash, begin, end)


@njit(nogil=True, cache=True, error_model="numpy")
def owned_histogram(
    counts: Array,
    table: Array,
    shard: int,
    size: int,
    dim: int,
    hash: HashNumbers,
    start: int,
    shift: int,
    part: int,
    parts: int,
) -> None:
    """:func:`histogram` of a shard's ``size`` estimates from its part of the table, flat."""
    own = counts[part * SUBCOUNTS : (part + 1) * SUBCOUNTS]
    blocks = (size + hash[3] - 1) // hash[3]
    _count_owned(own, table, shard, size, dim, hash, start, shift, part * blocks // parts, (part + 1) * blocks // parts)


@njit(error_model="numpy")
def _count_owned(
    counts: Array,
    table: Array,
    shard: int,
    size: int,
    dim: int,
    hash: HashNumbers,
    start: int,
    shift: int,
    begin: int,
    end: int,
) -> None:
    block = hash[3]
    buffer = np.empty(STRETCH * block, dtype=np.float32)
    for first in range(begin, end, STRETCH):
        last = min(first + STRETCH, end)
        _estimate_blocks(buffer, first * block, table, shard, 0, dim, hash, first, last)
        _count(counts, buffer.view(np.uint32), 0, min(last * block, size) - first * block, start, shift)


@njit(nogil=True, cache=True, error_model="numpy")
def owned_above(
    spans: Array,
    positions: Array,
    values: Array,
    room: int,
    table: Array,
    shard: int,
    size: int,
    dim: int,
    hash: HashNumbers,
    threshold: int,
    limit: int,
    part: int,
    parts: int,
) -> None:
    """Estimates of magnitude bits above ``threshold``, each part's in ``room`` of its own.

    Even parts fill theirs from its end downwards, odd ones from the start: what two neighbours find lies together,
    need not be moved, and touches no more memory than it takes. Where each part's begin and end goes to ``spans``,
    int64 [2, parts]. A part stops beyond ``limit``.
    """
    block = hash[3]
    blocks = (size + block - 1) // block
    begin, end = part * blocks // parts, (part + 1) * blocks // parts
    down = part % 2 == 0
    start = (part + 1) * room if down else part * room
    at = _keep_above(positions, values, start, down, table, shard, size, dim, hash, threshold, limit, begin, end)
    spans[0, part] = min(start, at)
    spans[1, part] = max(start, at)


@njit(error_model="numpy")
def _keep_above(
    positions: Array,
    values: Array,
    start: int,
    down: bool,
    table: Array,
    shard: int,
    size: int,
    dim: int,
    hash: HashNumbers,
    threshold: int,
    limit: int,
    begin: int,
    end: int,
) -> int:
    block = hash[3]
    buffer = np.empty(STRETCH * block, dtype=np.float32)
    lanes = np.empty(STRETCH * block + 8, dtype=np.int32)
    at = start
    stretches = (end - begin + STRETCH - 1) // STRETCH
    for turn in range(stretches):
        first = begin + STRETCH * (stretches - 1 - turn if down else turn)
        last = min(first + STRETCH, end)
        _estimate_blocks(buffer, first * block, table, shard, 0, dim, hash, first, last)
        count = min(last * block, size) - first * block
        found = _lanes_above(lanes, buffer.view(np.uint32), count, threshold)
        place = at - found if down else at
        at = place if down else at + found
        _write_found(positions[place : place + found], values[place : place + found], lanes, buffer, first * block)
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
    """Which of the first ``count`` lie above the threshold; returns how many. Writes up to 8 elements too many.

    Eight lanes at a time, without a branch: a loop over the set bits of a mask ends each time at another place than
    the time before, and is mispredicted (19 instead of 16).
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
    """Blocks ``begin … end`` in coordinate order or, for ``shard`` >= 0, in its owner's; ``out[0]`` is number ``zero``
    in that order. Only coordinates ``start … stop`` are written."""
    signs, offsets, rotations, block, cols, shards = hash
    rows = signs.shape[0]
    row_cells = table.size // rows
    words = np.empty(rows * WORDS, dtype=np.uint32)
    votes = np.empty(rows, dtype=np.float32)
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
                _estimate_lanes(out, index, table, cells, columns[i::GROUP], cols, words, origin & 15, lanes, votes)


@njit
def _estimate_lanes(
    out: Array,
    index: int,
    table: Array,
    bases: Array,
    columns: Array,
    cols: int,
    words: Array,
    first_bit: int,
    lanes: tuple[int, int],
    votes: Array,
) -> None:
    """A block that wraps at ``cols`` or is wanted in part, or a block of any number of rows."""
    rows = bases.size
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
            if _negative(words, row * WORDS, first_bit + lane):
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
def gather(out: Array, values: Array, indices: Array, part: int, parts: int) -> None:
    for i in range(part * indices.size // parts, (part + 1) * indices.size // parts):
        out[i] = values[np.uint64(indices[i])]  # signed, each would be compared with 0: 11 instead of 6


@njit(nogil=True, cache=True, error_model="numpy")
def clear(vector: Array, indices: Array, part: int, parts: int) -> None:
    for i in range(part * indices.size // parts, (part + 1) * indices.size // parts):
        vector[np.uint64(indices[i])] = np.float32(0)


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
def histogram(counts: Array, bits: Array, start: int, shift: int, part: int, parts: int) -> None:
    """Add to counts int64 [parts * SUBCOUNTS, bins + 1], which are to be summed."""
    own = counts[part * SUBCOUNTS : (part + 1) * SUBCOUNTS]
    _count(own, bits, part * bits.size // parts, (part + 1) * bits.size // parts, start, shift)


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
    """Often few values are in the window, or all are: found 64 lanes at a time."""
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
def count_above(counts: Array, bits: Array, threshold: int, part: int, parts: int) -> None:
    """How many of each part are above the threshold: int64 [parts]."""
    low, high = part * bits.size // parts, (part + 1) * bits.size // parts
    count = 0
    for index in range(low, high, MASK_LANES):
        count += count_ones(_mask_above(bits, index, high, threshold))
    counts[part] = count


@njit(nogil=True, cache=True, error_model="numpy")
def select_above(out: Array, starts: Array, bits: Array, threshold: int, part: int, parts: int) -> None:
    """Positions of what is above the threshold; each part writes from its ``starts`` on.

    Whole groups of lanes in a loop of their own: with the last, cut one in it, a million took 0.18, not 0.06.
    """
    low, high = part * bits.size // parts, (part + 1) * bits.size // parts
    at = starts[part]
    full = high - (high - low) % MASK_LANES
    for index in range(low, full, MASK_LANES):
        at = _write_lanes(out, at, index, _match_above(bits, index, np.uint32(threshold)))
    _write_lanes(out, at, full, _mask_above(bits, full, high, threshold))


@njit(nogil=True, cache=True, error_model="numpy")
def keep_above(
    kept: Array,
    kept_bits: Array,
    starts: Array,
    positions: Array,
    bits: Array,
    threshold: int,
    part: int,
    parts: int,
) -> None:
    """What :func:`select_above` chooses, of both arrays.

    In one call: a second one waits for its threads once more, 40 ms where their 2 cores have a load of 15. In place:
    with a second output, memory touched for the first time, half of 3 million took 16 instead of 4 on a thread there.
    """
    select_above(kept, starts, bits, threshold, part, parts)
    for at in range(np.uint64(starts[part]), np.uint64(starts[part + 1])):
        i = np.uint64(kept[at])
        kept[at], kept_bits[at] = positions[i], bits[i]


@njit
def _write_lanes(out: Array, at: int, index: int, mask: Any) -> int:
    while mask != 0:
        out[np.uint64(at)] = index + lowest_bit(mask)
        at += 1
        mask &= mask - _ONE
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def merge_owned(out: Array, positions: Array, ends: Array, blocks: int, coefficients: Array, block: int) -> None:
    """Positions of all shards, one shard's after the other's up to ``ends``, as coordinates in ascending order."""
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
