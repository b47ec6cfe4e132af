"""Numba code of low-rank factors; :mod:`hvd_sketch.kernels.low_rank` calls it.

Every operation is rounded on its own and in a fixed order: all CPUs give the same bits. Sums of products run in eight
lanes, which every CPU can add as a vector. All that these kernels call is in this one file, because Numba's on-disk
cache only notices changes of the file of the cached function.
"""

from __future__ import annotations

import numpy as np
from numba import njit

Array = np.ndarray

LEAST_REST = 2.0**-20  # of a column's length that is left beside the columns before it: less is float32's rounding
STRETCH = 1024  # columns of a product at a time: the right factor's slice then stays in the first cache


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

    Args:
        out: float32 [entries], rows of ``cols`` entries; the last row may be shorter.
        left: float32 [rank, rows].
        right: float32 [rank, cols].
    """
    cols = right.shape[1]
    rows = left.shape[1]
    for row in range(thread * rows // threads, (thread + 1) * rows // threads):
        count = min(cols, out.size - row * cols)
        for first in range(0, count, STRETCH):
            last = min(first + STRETCH, count)
            _row_of_product(out[row * cols + first : row * cols + last], left, row, right, first, last)


@njit(error_model="numpy")
def _row_of_product(out: Array, left: Array, row: int, right: Array, first: int, last: int) -> None:
    count, rank = np.uint64(out.size), len(right)
    out[:] = np.float32(0)
    whole = rank // 4 * 4
    for j in range(0, whole, 4):  # four at a time write the row a quarter as often
        a, b, c, d = left[j, row], left[j + 1, row], left[j + 2, row], left[j + 3, row]
        of_a, of_b = right[j][first:last], right[j + 1][first:last]
        of_c, of_d = right[j + 2][first:last], right[j + 3][first:last]
        for i in range(count):
            out[i] = (((out[i] + a * of_a[i]) + b * of_b[i]) + c * of_c[i]) + d * of_d[i]
    for j in range(whole, rank):
        a, of_a = left[j, row], right[j][first:last]
        for i in range(count):
            out[i] += a * of_a[i]
