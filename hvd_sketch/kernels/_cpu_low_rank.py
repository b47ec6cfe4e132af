"""Numba code of low-rank factors; :mod:`hvd_sketch.kernels.low_rank` calls it.

Every operation is rounded on its own and in a fixed order: all CPUs give the same bits. Sums of products run in eight
lanes, which every CPU can add as a vector. All that these kernels call is in this one file, because Numba's on-disk
cache only notices changes of the file of the cached function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Array = np.ndarray

LEAST_REST = 2.0**-20  # of a column's length that is left beside the columns before it: less is float32's rounding
LANES = 16  # columns of a tile of a product
TILE_ROWS = 6  # of a tile: with AVX2 its sums are in 12 of 16 registers
PANELS = 6144  # floats of the right factor at a time: they stay in the first cache

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@njit(nogil=True, cache=True, error_model="numpy")
def orthonormalize(factor: Array) -> None:
    """Gram-Schmidt in float64, done twice, of the columns of a matrix.

    Args:
        factor: float32 [rank, length], the columns one after the other; changed in place. A column that depends on
            those before it becomes zeros.
    """
    rank, length = factor.shape
    columns = factor.astype(np.float64)
    for j in range(rank):
        column = columns[j]
        before = np.sqrt(_dot(column, column))
        for _ in range(2):
            for i in range(j):
                _add_multiple(column, -_dot(columns[i], column), columns[i])
        rest = np.sqrt(_dot(column, column))
        if rest > LEAST_REST * before:
            for k in range(np.uint64(length)):
                column[k] /= rest
        else:
            column[:] = 0.0
        factor[j] = column.astype(np.float32)


@njit(error_model="numpy")
def _dot(left: Array, right: Array) -> float:
    a = b = c = d = e = f = g = h = 0.0
    whole = left.size // 8 * 8
    for block in range(np.uint64(whole // 8)):
        i = np.uint64(8) * np.uint64(block)
        a += left[i] * right[i]
        b += left[i + np.uint64(1)] * right[i + np.uint64(1)]
        c += left[i + np.uint64(2)] * right[i + np.uint64(2)]
        d += left[i + np.uint64(3)] * right[i + np.uint64(3)]
        e += left[i + np.uint64(4)] * right[i + np.uint64(4)]
        f += left[i + np.uint64(5)] * right[i + np.uint64(5)]
        g += left[i + np.uint64(6)] * right[i + np.uint64(6)]
        h += left[i + np.uint64(7)] * right[i + np.uint64(7)]
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for last in range(whole, left.size):
        total += left[last] * right[last]
    return total


@njit(error_model="numpy")
def _add_multiple(target: Array, factor: float, other: Array) -> None:
    for i in range(np.uint64(target.size)):
        target[i] += factor * other[i]


@njit(nogil=True, cache=True, error_model="numpy")
def product(out: Array, left: Array, right: Array, thread: int, threads: int) -> None:
    """``out <- left^T right``, the multiples of each row of ``right`` added in order; threads divide the rows of it.

    Tile by tile: their sums stay in registers until they are whole. What tiles need of both factors is copied before,
    one behind the other.

    Args:
        out: float32 [entries], rows of ``cols`` entries; the last row may be shorter.
        left: float32 [rank, rows].
        right: float32 [rank, cols].
    """
    rank, cols = right.shape
    low, high = thread * left.shape[1] // threads, (thread + 1) * left.shape[1] // threads
    stretch = max(1, PANELS // (rank * LANES)) * LANES
    panels, few = np.empty(rank * stretch, dtype=np.float32), np.empty(rank * TILE_ROWS, dtype=np.float32)
    tile = np.empty(TILE_ROWS * LANES, dtype=np.float32)
    for start in range(0, cols, stretch):
        stop = min(start + stretch, cols)
        for col in range(start, stop, LANES):
            _copy_columns(panels[rank * (col - start) :], right, col, LANES)
        for row in range(low, high, TILE_ROWS):
            count = min(TILE_ROWS, high - row)
            _copy_columns(few, left, row, TILE_ROWS)
            for col in range(start, stop, LANES):
                at, first = row * cols + col, rank * (col - start)
                if count == TILE_ROWS and col + LANES <= stop and at + (TILE_ROWS - 1) * cols + LANES <= out.size:
                    _tile_of_product(out, at, cols, few, panels, first, rank)
                    continue
                _tile_of_product(tile, 0, LANES, few, panels, first, rank)
                for i in range(count):
                    begin = at + i * cols
                    for lane in range(min(LANES, stop - col, out.size - begin)):
                        out[begin + lane] = tile[LANES * i + lane]


@njit(error_model="numpy")
def _copy_columns(to: Array, factor: Array, first: int, count: int) -> None:
    """Columns ``first … first + count - 1`` of a factor, row after row; zeros for those that it does not have."""
    rank, length = factor.shape
    for j in range(np.uint64(rank)):
        at, row = j * np.uint64(count), factor[j]
        if first + count <= length:
            for i in range(np.uint64(count)):
                to[at + i] = row[np.uint64(first) + i]
        else:
            for i in range(count):
                to[at + np.uint64(i)] = row[first + i] if first + i < length else np.float32(0)


@intrinsic
def _tile_of_product(typing: Any, out: Any, at: Any, stride: Any, left: Any, right: Any, first: Any, rank: Any) -> Any:
    """``out[at + i * stride + l]`` = sum over k of ``left[TILE_ROWS * k + i] * right[first + LANES * k + l]``.

    For TILE_ROWS i and LANES lanes l. Of compiled loops LLVM keeps the sums in memory.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, at, stride, left, right, first, rank = arguments
        out, left, right = (
            context.make_array(signature.args[number])(context, builder, arguments[number]).data for number in (0, 3, 4)
        )
        zeros = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(TILE_ROWS)]
        with cgutils.for_range(builder, rank) as loop:
            begin = builder.add(first, builder.mul(loop.index, ir.Constant(_I64, LANES)))
            of_right = builder.load(_lanes_at(builder, right, begin), align=4)
            for row, sum_of_row in enumerate(sums):
                number = builder.add(builder.mul(loop.index, ir.Constant(_I64, TILE_ROWS)), ir.Constant(_I64, row))
                factor = _splat(builder, builder.load(builder.gep(left, [number])))
                builder.store(builder.fadd(builder.load(sum_of_row), builder.fmul(factor, of_right)), sum_of_row)
        for row, sum_of_row in enumerate(sums):
            target = _lanes_at(builder, out, builder.add(at, builder.mul(stride, ir.Constant(_I64, row))))
            builder.store(builder.load(sum_of_row), target, align=4)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, left, right, types.intp, types.intp), generate


def _lanes_at(builder: Any, data: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))
