"""What a method needs so that its matrices take the bytes of a wire ratio.

Budgets are ring bytes per step of all ranks' common payload, ``8 * dim / ratio``, in which every byte counts: also the
agreement before each step. See :mod:`hvd_sketch.wire_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from hvd_sketch.ledger import RING_PASSES
from hvd_sketch.wire_bytes import CODE_OVERHEAD_BYTES, DENSE_BYTES, agreement_bytes, coded_bytes, position_bytes

POWERSGD_GAIN = 2  # torch compresses a matrix only where its factors have less than half of its elements
Shape = tuple[int, ...]
TOLERANCE = 1.05  # by which an integer rank may exceed the budget


def budget_of(ratio: float, dim: int, ranks: int) -> float:
    """Ring bytes per step that are left beside the agreement."""
    return DENSE_BYTES * dim / ratio - agreement_bytes(ranks)


def dense_bytes(dim: int, ranks: int) -> int:
    """Ring bytes of the dense exchange of ``dim`` elements, cut into equal shares."""
    return DENSE_BYTES * ranks * -(-dim // ranks)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, by bisection.

    Raises:
        ValueError: not even 1 fits.
    """
    if not fits(1):
        raise ValueError("the ratio leaves too few bytes for one coordinate: lower it")
    least, above = 1, most + 1
    while above - least > 1:
        middle = (least + above) // 2
        least, above = (middle, above) if fits(middle) else (least, middle)
    return least


def local_count(ratio: float, dim: int, ranks: int, bits: int) -> int:
    """How many coordinates every rank sends in :class:`benchmarks.methods.top_k.CodedTopK`."""

    def own_bytes(n: int) -> float:
        return CODE_OVERHEAD_BYTES + n * position_bytes(dim / n) + coded_bytes(n, bits)

    return largest(lambda n: ranks * own_bytes(n) <= budget_of(ratio, dim, ranks), dim)


def true_count(ratio: float, dim: int, ranks: int) -> int:
    """How many coordinates of the true sum: each a position, and float32 values there and back."""
    return largest(lambda k: k * (position_bytes(dim / k) + DENSE_BYTES) <= budget_of(ratio, dim, ranks), dim)


def powersgd_rank(ratio: float, shapes: Sequence[Shape], ranks: int, value_bytes: int) -> int:
    """The rank whose bytes are nearest below the budget, at least 1. Torch has one rank for all matrices."""
    budget = TOLERANCE * budget_of(ratio, sum(map(prod, shapes)), ranks)
    rank = 1
    while rank < 64 and powersgd_bytes(shapes, rank + 1, value_bytes) <= budget:
        rank += 1
    return rank


def powersgd_bytes(shapes: Sequence[Shape], rank: int, value_bytes: int) -> int:
    """Ring bytes of a step: two allreduces of factors, or one of the matrix itself."""
    sent = 0
    for shape in shapes:
        rows, cols = shape[0], prod(shape[1:])
        own_rank = min(rows, cols, rank)
        factors = (rows + cols) * own_rank
        sent += factors if factors * POWERSGD_GAIN < rows * cols else rows * cols
    return RING_PASSES["allreduce"] * value_bytes * sent
