"""The search for a threshold, over ranks and on one, against a plain sort."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.exchange.threshold import (
    LocalValues,
    Magnitudes,
    ShardEstimates,
    ThresholdPredictor,
    find_threshold,
)
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import load_backend, reference
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.kernels.selection import Threshold, histogram_bins, search, top_k
from hvd_sketch.transport import LocalTransport, local_transports, run_local

KERNELS = load_backend(None, torch.device("cpu"))
BOUNDS = (0, 1, 1 << 20, 0x3F800000, 0x7F000000, MAGNITUDE_MASK)  # hardly any of them a good guess


def bits_of(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.int32) & MAGNITUDE_MASK


def predicted(threshold: Threshold) -> int:
    predictor = ThresholdPredictor()
    predictor.update(threshold.edge)
    return predictor.lower_bound()


def largest(values: Tensor, count: int) -> list[int]:
    """By a plain sort: infinities and NaN first, zeros never, of equal magnitudes the lower position."""
    bits = bits_of(values)
    order = sorted((i for i in range(len(bits)) if bits[i]), key=lambda i: (-int(bits[i]), i))
    return sorted(order[:count])


def check_threshold(shares: list[Tensor], count: int, thresholds: list[Threshold], taken: list[Tensor]) -> None:
    """At least ``count`` and all from the edge upwards; the excess is in the boundary bin, which is small."""
    bits = [bits_of(share) for share in shares]
    every = np.concatenate(bits)
    edge, upper, excess = thresholds[0].edge, thresholds[0].upper, thresholds[0].excess
    for own, share, threshold, positions in zip(bits, shares, thresholds, taken, strict=True):
        assert (threshold.edge, threshold.upper, threshold.excess) == (edge, upper, excess), "ranks differ"
        assert threshold.own == positions.numel()
        assert positions.tolist() == np.flatnonzero((own >= edge) & (own != 0)).tolist(), share
    number = sum(positions.numel() for positions in taken)
    assert number == min(count, int((every != 0).sum())) + excess
    if excess:
        in_bin = every[(every >= edge) & (every < upper)]
        assert (every >= upper).sum() < count <= number
        bins = histogram_bins(count)
        assert len(in_bin) <= 64 + 4 * bins or len(set(in_bin.tolist())) == 1


def find_everywhere(shares: list[Magnitudes], count: int, lower_bound: int = 0) -> tuple[list[Threshold], list[Tensor]]:
    def main(transport: LocalTransport) -> tuple[Threshold, Tensor]:
        own = shares[transport.rank]
        threshold = find_threshold(own, count, transport, lower_bound)
        return threshold, own.above(threshold)[0]

    thresholds, taken = zip(*run_local(len(shares), main, timeout_s=30), strict=True)
    return list(thresholds), list(taken)


def check(shares: list[Tensor], count: int) -> None:
    local = [LocalValues(KERNELS, share) for share in shares]
    thresholds, taken = find_everywhere(local, count)
    check_threshold(shares, count, thresholds, taken)
    for bound in (predicted(thresholds[0]), *BOUNDS[1:]):
        again = find_everywhere(local, count, bound)[1]
        assert all(map(torch.equal, again, taken)), "the lower bound decides nothing"
    assert top_k(shares[0], count).tolist() == largest(shares[0], count)


@pytest.mark.parametrize("limit", [0, 100, 10_000])
@pytest.mark.parametrize(("ranks", "whole_numbers"), [(1, False), (2, True), (3, False), (4, True)])
def test_estimates_are_judged_as_if_they_were_in_memory(ranks: int, whole_numbers: bool, limit: int) -> None:
    """Whatever the lower bound, too high ones too, and however few estimates a rank may keep."""
    hash = BlockHash(9001, 3, 1200, ranks)
    values = torch.randn(hash.dim, generator=torch.Generator().manual_seed(ranks)) ** 3
    table = torch.zeros(hash.table_shape)
    KERNELS.accumulate_(hash, table, values.round() if whole_numbers else values, 0)
    tables = [table[:, rank].contiguous() for rank in range(ranks)]
    owned = [reference.estimate_owned(hash, own, rank) for rank, own in enumerate(tables)]
    for count in (0, 1, 30, 800, 20_000):
        for bound in (0, 1 << 20, 0x3F800000, 0x7F000000):
            limits = [limit if rank % 2 == 0 else 50 for rank in range(ranks)]
            shares = [ShardEstimates(KERNELS, hash, tables[rank], rank, limits[rank]) for rank in range(ranks)]
            check_threshold(owned, count, *find_everywhere(list(shares), count, bound))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_random_floats_of_many_sizes(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    for length, count in [(0, 3), (1, 1), (7, 3), (1000, 1), (1000, 999), (5000, 313)]:
        check([torch.randn(length + rank, generator=generator) ** 5 for rank in range(ranks)], count)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ties_zeros_and_non_finite(ranks: int) -> None:
    special = torch.tensor([0.0, -0.0, 2.0, -2.0, 2.0, 1.0, float("inf"), float("nan"), 1e-45, -float("inf"), 2.0])
    for count in range(0, 11 * ranks + 2, 3):
        check([special.roll(rank) for rank in range(ranks)], count)
    check([torch.ones(1000)] * ranks, 7)  # equal ones are taken together


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 1.5, 3e38, 1e-40, -7.0]), max_size=12), min_size=1, max_size=4),
    st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_any_small_vectors(lists: list[list[float]], count: int) -> None:
    check([torch.tensor(values, dtype=torch.float32) for values in lists], count)


@given(st.lists(st.floats(width=32), max_size=300), st.integers(0, 320))
@settings(max_examples=200, deadline=None)
def test_top_k_is_exact(values: list[float], count: int) -> None:
    vector = torch.tensor(values, dtype=torch.float32)
    assert top_k(vector, count).tolist() == largest(vector, count)


@pytest.mark.parametrize(("length", "count"), [(3000, 40), (200_000, 10_000)])
def test_one_histogram_is_enough_where_the_threshold_is_predicted(length: int, count: int) -> None:
    """And what is taken beyond ``count`` is little."""
    vector = torch.randn(length, generator=torch.Generator().manual_seed(0))
    (alone,) = local_transports(1)
    bound = predicted(find_threshold(LocalValues(KERNELS, vector), count, alone))
    looks = []

    def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
        looks.append(start)
        counts = KERNELS.magnitude_histogram(vector * 1.02, start, shift, bins)
        return counts, counts

    threshold = search(look, count, bound)
    assert len(looks) == 1
    assert threshold.excess <= 10 + count / 20


@pytest.mark.parametrize(("bound", "count", "histograms"), [(0x40000000, 3, 1), (0x30000000, 4, 4)])
def test_a_bound_that_just_as_many_reach_is_not_given_up(bound: int, count: int, histograms: int) -> None:
    """Near below the threshold, or so far that further looks have to begin there."""
    vector = torch.tensor([4.0, -3.0, 2.0, 0.5, 6e-10])
    looks = []

    def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
        looks.append(start)
        counts = KERNELS.magnitude_histogram(vector, start, shift, bins)
        return counts, counts

    threshold = search(partial(look), count, bound)
    assert threshold.own == count and min(looks) >= bound
    assert len(looks) == histograms


def test_no_magnitude_is_predicted_beyond_nan() -> None:
    predictor = ThresholdPredictor()
    for edge in (1, MAGNITUDE_MASK):
        predictor.update(edge)
    assert predictor.lower_bound() == MAGNITUDE_MASK
    nothing = reference.magnitude_histogram(torch.ones(3), predictor.lower_bound(), 12, 2048)
    assert int(nothing.sum()) == 0
