"""How many bytes a step sends, from its settings alone.

All are ring bytes: what a collective moves past one rank, without the factor ``(ranks - 1) / ranks`` (see
:mod:`hvd_sketch.ledger`). A dense ring allreduce of float32 has 8 per coordinate.
"""

from __future__ import annotations

from math import log2
from typing import Protocol

from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels.reference import packed_bytes
from hvd_sketch.kernels.selection import histogram_bins, looks
from hvd_sketch.ledger import RING_PASSES
from hvd_sketch.rank_grid import MESSAGE_BYTES, grid_of, is_grid, passes

DENSE_BYTES = 4 * RING_PASSES["allreduce"]  # of a coordinate
COUNTER_BITS = 62  # of an int64 that are filled with counters: sums of them stay positive
# Sums above the threshold that is expected, for each of the k largest: 1.02 to 1.1 with k = 10,000 of 1 M coordinates
# from the third step on.
CHOSEN_AND_MORE = 1.1
CODE_OVERHEAD_BYTES = 20  # a rank's code of positions: its first word, and padding of two streams to whole words


class Settings(Protocol):
    """What of a ``SketchConfig`` decides about bytes."""

    @property
    def k(self) -> int: ...

    @property
    def cols(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def candidates(self) -> str: ...

    @property
    def value_bits(self) -> int: ...

    @property
    def table_bits(self) -> int: ...

    @property
    def chooses(self) -> bool: ...

    @property
    def has_table(self) -> bool: ...

    def candidate_count(self, dim: int) -> int: ...


def all_sums_travel(candidates: int, k: int) -> bool:
    """Whether every candidate's sum is sent: the largest alone would save less than the bytes of a message's time."""
    return 4 * candidates <= _choosing_bytes(candidates, k) + MESSAGE_BYTES


def step_bytes(settings: Settings, dim: int, ranks: int, can_split: bool = True) -> float:
    """Ring bytes of a step of one sketched exchange, everything counted; nominations are taken to be distinct.

    Args:
        can_split: whether the transport can be split, so that many ranks form a grid; here and below.
    """
    count = settings.candidate_count(dim)
    return (
        agreement_bytes(ranks, can_split=can_split)
        + table_bytes(settings, ranks, can_split)
        + _finding_bytes(settings, dim, ranks, can_split)
        + _values_bytes(settings, count, ranks, can_split)
    )


def agreement_bytes(ranks: int, parameters: int = 0, can_split: bool = True) -> int:
    """Ring bytes of the agreement before a step, of which ``parameters`` say whether they have a gradient."""
    payload_bytes = 8 * (ranks + counter_words(ranks, parameters))
    return round(RING_PASSES["allreduce"] * payload_bytes * _passes("allreduce", payload_bytes, ranks, can_split))


def counter_words(ranks: int, counters: int) -> int:
    """How many int64 hold as many counters, none of which exceeds ``ranks``."""
    return ceil_div(counters, COUNTER_BITS // ranks.bit_length())


def table_bytes(settings: Settings, ranks: int, can_split: bool = True) -> int:
    """Ring bytes of the table: each rank's shard of every row."""
    if not settings.has_table:
        return 0
    payload_bytes = settings.rows * ranks * coded_bytes(settings.cols // ranks, settings.table_bits)
    return round(summed_bytes(payload_bytes, settings.table_bits, ranks, can_split))


def summed_bytes(payload_bytes: float, bits: int, ranks: int, can_split: bool = True) -> float:
    """Ring bytes that bring every rank's values to those that sum a share each; below 32 bits by an alltoall."""
    return payload_bytes if bits == 32 else payload_bytes * _passes("alltoall", payload_bytes, ranks, can_split)


def _passes(collective: str, payload_bytes: float, ranks: int, can_split: bool) -> float:
    return passes(collective, payload_bytes, grid_of(ranks)) if can_split and is_grid(ranks) else 1.0


def coded_bytes(count: int, bits: int) -> int:
    """What values of ``bits`` bits take, scales included."""
    return 4 * count if bits == 32 else packed_bytes(count, bits)


def position_bytes(mean_gap: float) -> float:
    """What a position takes in a Rice code, for gaps that are geometrically distributed."""
    return (log2(max(mean_gap, 1)) + 1.5) / 8


def _finding_bytes(settings: Settings, dim: int, ranks: int, can_split: bool) -> float:
    """To agree on the candidates."""
    count = settings.candidate_count(dim)
    codes = CODE_OVERHEAD_BYTES * ranks
    if settings.candidates == "random":
        return 0
    if settings.candidates == "nominate":
        named = ranks * ceil_div(count, ranks)
        return codes + named * position_bytes(dim * ranks / named)
    histogram = _histogram_bytes(count, ranks, can_split)
    histograms = histogram if settings.chooses else 0.0  # one: where it begins is expected
    if settings.candidates == "heavymix":
        histograms = 8 * settings.rows * ranks + looks(count) * histogram  # and the rows' norms
    return codes + count * position_bytes(dim / count) + histograms


def _values_bytes(settings: Settings, count: int, ranks: int, can_split: bool) -> float:
    """The candidates' values, and back what is updated."""
    if settings.candidates == "nominate":
        count = ranks * ceil_div(count, ranks)
    one_way = ranks * coded_bytes(ceil_div(count, ranks), settings.value_bits)
    there = summed_bytes(one_way, settings.value_bits, ranks, can_split)
    if not settings.chooses or all_sums_travel(count, settings.k):
        return there + one_way
    return there + _choosing_bytes(count, settings.k)


def _choosing_bytes(candidates: int, k: int) -> float:
    return candidates / 8 + min(4 * CHOSEN_AND_MORE * k, 4 * candidates)


def _histogram_bytes(k: int, ranks: int, can_split: bool) -> float:
    payload_bytes = 4 * histogram_bins(k)
    return RING_PASSES["allreduce"] * payload_bytes * _passes("allreduce", payload_bytes, ranks, can_split)
