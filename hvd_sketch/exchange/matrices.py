"""The tensors of a gradient as matrices, and the rank that each one's factors get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor, isqrt, prod

import torch
from torch import Tensor

from hvd_sketch.config import LowRankConfig
from hvd_sketch.hashing import ceil_div
from hvd_sketch.wire_bytes import DENSE_BYTES, coded_bytes, summed_bytes

WHOLE_BELOW = 1 << 16  # entries: a vector with fewer is no matrix, but a row, and goes whole


@dataclass(frozen=True)
class Matrix:
    """Coordinates ``start … stop - 1`` of a vector as a matrix M, row after row, approximated by ``left^T right``.

    The last row may be shorter than the others; what it lacks counts as zeros. A factor's columns come one after the
    other: ``left`` is float32 [rank, rows], ``right`` float32 [rank, cols]. No method communicates.
    """

    start: int
    stop: int
    rows: int
    cols: int
    rank: int

    @property
    def is_whole(self) -> bool:
        """Whether it is a row: its left factor is the number 1, and its right one is all there is."""
        return self.rows == 1

    def times_right_(self, out: Tensor, vector: Tensor, right: Tensor) -> None:
        """Columns of ``M right^T``, written to ``out``, float32 [rank, rows]."""
        whole, rest = self._parts(vector)
        if not rest.numel():
            torch.mm(right, whole.t(), out=out)
            return
        out[:, :-1] = right @ whole.t()
        out[:, -1] = right[:, : rest.numel()] @ rest

    def times_left_(self, out: Tensor, vector: Tensor, left: Tensor) -> None:
        """Columns of ``M^T left^T``, written to ``out``, float32 [rank, cols]."""
        whole, rest = self._parts(vector)
        torch.mm(left[:, : len(whole)], whole, out=out)
        if rest.numel():
            out[:, : rest.numel()].addr_(left[:, -1], rest)

    def subtract_product_(self, vector: Tensor, left: Tensor, right: Tensor) -> None:
        """``M <- M - left^T right`` in ``vector``."""
        whole, rest = self._parts(vector)
        whole.addmm_(left[:, : len(whole)].t(), right, alpha=-1)
        if rest.numel():
            rest.addmv_(right[:, : rest.numel()].t(), left[:, -1], alpha=-1)

    def _parts(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The whole rows [n, cols] and what there is of a shorter last one."""
        end = self.stop - (self.stop - self.start) % self.cols
        return vector[self.start : end].view(-1, self.cols), vector[end : self.stop]


def as_matrices(shapes: Sequence[tuple[int, ...]], config: LowRankConfig) -> list[Matrix]:
    """A matrix for every tensor that has an element, in order.

    Args:
        shapes: of the tensors that make up a vector, one after the other.
        config: says the ranks.

    Raises:
        ValueError: the ratio is too high for a rank of 1, see :func:`ranks_for_ratio`.
    """
    stops = list(accumulate(map(prod, shapes)))
    spans = [(stop - prod(shape), stop) for shape, stop in zip(shapes, stops, strict=True) if prod(shape)]
    sides = [sides_of(shape) for shape in shapes if prod(shape)]
    if config.ratio is not None:
        ranks = ranks_for_ratio([shape for shape in shapes if prod(shape)], config.ratio, config.value_bits)
    else:
        assert config.rank is not None, "a LowRankConfig has a ratio or a rank"
        ranks = [min(config.rank, rows, cols) for rows, cols in sides]
    return [Matrix(*span, *of, rank) for span, of, rank in zip(spans, sides, ranks, strict=True)]


def sides_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor's matrix: its first dimension, and all others.

    Where one of them is 1, the tensor is a vector: a row, or with :data:`WHOLE_BELOW` entries or more a nearly square
    matrix that they are filled into, whose last row may be shorter. Without an element there is no matrix: (0, 0).
    """
    entries = prod(shape)
    if not entries:
        return 0, 0
    rows = shape[0] if shape else 1
    if min(rows, entries // rows) > 1:
        return rows, entries // rows
    if entries < WHOLE_BELOW:
        return 1, entries
    cols = isqrt(entries - 1) + 1
    return ceil_div(entries, cols), cols


def ranks_for_ratio(shapes: Sequence[tuple[int, ...]], ratio: float, bits: int) -> list[int]:
    """The rank of every tensor's matrix so that all factors together take a ``ratio``-th of a dense ring allreduce.

    Each gets a rank of 1. Then, in turn, those with most entries per byte first, each gets one more while the bytes
    suffice, up to its smaller side.

    Args:
        shapes: of tensors that have at least one element.
        ratio: bytes of the dense allreduce over those of the factors.
        bits: of a factor's entry.

    Raises:
        ValueError: there are too few bytes for a rank of 1 each.
    """
    sides = list(map(sides_of, shapes))
    entries = list(map(prod, shapes))
    costs = [least_bytes([shape], bits) for shape in shapes]
    dense, least = DENSE_BYTES * sum(entries), sum(costs)
    left = int(dense / ratio * (1 + 1e-12)) - least  # a ratio that was made from a number of bytes leaves as many
    if left < 0:
        raise ValueError(
            f"a ratio of {ratio:g} leaves {dense / ratio:.0f} bytes per step, but factors of rank 1 take {least}: the "
            f"highest ratio possible is {floor(1000 * dense / least) / 1000:.3f} with values of {bits} bits"
        )
    ranks = [1] * len(sides)
    growing = sorted(range(len(sides)), key=lambda number: -entries[number] / costs[number])
    while growing:
        # Rounds in which each gets one more, at once: with 10^12 entries there are thousands.
        whole = min(left // sum(costs[number] for number in growing), *(min(sides[n]) - ranks[n] for n in growing))
        for number in growing:
            ranks[number] += whole
            left -= whole * costs[number]
        still_growing = []
        for number in growing:
            if ranks[number] < min(sides[number]) and costs[number] <= left:
                ranks[number] += 1
                left -= costs[number]
                still_growing.append(number)
        growing = still_growing
    return ranks


def least_bytes(shapes: Sequence[tuple[int, ...]], bits: int) -> int:
    """Ring bytes of factors of rank 1 of tensors of some shapes, with values of ``bits`` bits, scales included."""
    sent = [[cols] if rows == 1 else [rows, cols] for rows, cols in map(sides_of, shapes)]
    # To the owners of the sums, and back.
    return sum(2 * coded_bytes(length, bits) for lengths in sent for length in lengths)


def factor_bytes(shapes: Sequence[tuple[int, ...]], config: LowRankConfig, ranks: int) -> float:
    """Ring bytes of the factors of a step between ``ranks`` ranks, what goes twice in a grid counted twice."""
    sent = [(0 if m.is_whole else m.rank * m.rows, m.rank * m.cols) for m in as_matrices(shapes, config)]
    one_way = [sum(coded_bytes(count, config.value_bits) for count in factors) for factors in zip(*sent, strict=True)]
    return sum(summed_bytes(each, config.value_bits, ranks) + each for each in one_way)


def within_bytes(shapes: Sequence[tuple[int, ...]], most_bytes: float, ranks: int, bits: int) -> LowRankConfig | None:
    """The configuration whose factors take at most so many ring bytes; None where those of rank 1 take more."""
    dense, least = DENSE_BYTES * sum(map(prod, shapes)), least_bytes(shapes, bits)

    def taking(own_bytes: float) -> LowRankConfig:
        return LowRankConfig(ratio=dense / own_bytes, value_bits=bits)

    def fits(own_bytes: float) -> bool:
        return factor_bytes(shapes, taking(own_bytes), ranks) <= most_bytes

    if least > most_bytes or not fits(least):
        return None
    if fits(most_bytes):  # nothing travels twice
        return taking(most_bytes)
    low, high = float(least), most_bytes
    while high / low > 1.001:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return taking(low)
