"""The distributed selection against a plain sort."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_sketch.exchange.threshold import Cut, Expectation, OwnedEstimates, VectorPart, find_cut, select_largest
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import load_backend, reference
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.transport import local_transports, run_local

KERNELS = load_backend(None, torch.device("cpu"))


def plain_selection(parts: list[torch.Tensor], count: int) -> list[list[int]]:
    """Sort by magnitude, then rank, then position; zeros are left out, infinities and NaN come first."""

    def key(item):
        rank, position, value = item
        bits = int(np.float32(value).view(np.int32)) & 0x7FFFFFFF
        return (-bits, rank, position)

    items = [(r, i, v) for r, part in enumerate(parts) for i, v in enumerate(part.tolist()) if v != 0]
    chosen = sorted(items, key=key)[:count]
    return [sorted(i for r, i, _ in chosen if r == rank) for rank in range(len(parts))]


def expected_floor(cut: Cut) -> int:
    expected = Expectation()
    expected.learn(cut)
    return expected.floor()


class Asked(VectorPart):
    """Counts the histograms."""

    times = 0

    def histogram(self, start, shift, bins):
        self.times += 1
        return super().histogram(start, shift, bins)


def check(parts: list[torch.Tensor], count: int) -> None:
    def main(transport):
        part = VectorPart(KERNELS, parts[transport.rank])
        cut = find_cut(part, count, transport)
        return [select_largest(part, count, transport, floor).tolist() for floor in (0, expected_floor(cut))]

    for rank, found in enumerate(run_local(len(parts), main, timeout_s=30)):
        assert found == 2 * [plain_selection(parts, count)[rank]]


@pytest.mark.parametrize("limit", [0, 100, 10_000])
@pytest.mark.parametrize(("ranks", "whole_numbers"), [(1, False), (2, True), (3, False), (4, True)])
def test_estimates_are_judged_as_if_they_lay_in_memory(ranks: int, whole_numbers: bool, limit: int) -> None:
    """Whatever the floor, too high ones too, and however few estimates a rank may keep."""
    hash = BlockHash(9001, 3, 1200, ranks)
    values = torch.randn(hash.dim, generator=torch.Generator().manual_seed(ranks)) ** 3
    table = torch.zeros(hash.table_shape)
    KERNELS.accumulate_(hash, table, values.round() if whole_numbers else values, 0)
    own_tables = [table[:, rank].contiguous() for rank in range(ranks)]
    owned = [reference.estimate_owned(hash, own, rank) for rank, own in enumerate(own_tables)]

    def main(transport, count, floor):
        rank = transport.rank
        part = OwnedEstimates(KERNELS, hash, own_tables[rank], rank, limit if rank % 2 == 0 else 50)
        return find_cut(part, count, transport), select_largest(part, count, transport, floor).tolist()

    for count in (0, 1, 30, 800, 20_000):
        expected = plain_selection(owned, count)
        cuts = [cut for cut, _ in run_local(ranks, partial(main, count=count, floor=0), timeout_s=30)]
        assert len({(cut.threshold, cut.doubtful_to, cut.surplus) for cut in cuts}) == 1, "ranks differ in the cut"
        for floor in {expected_floor(cuts[0]), 1 << 20, 0x3F800000, 0x7F000000}:
            found = run_local(ranks, partial(main, count=count, floor=floor), timeout_s=30)
            assert [positions for _, positions in found] == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_random_floats_of_many_sizes(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    for length, count in [(0, 3), (1, 1), (7, 3), (1000, 1), (1000, 999), (5000, 313)]:
        parts = [torch.randn(length + rank, generator=generator) ** 5 for rank in range(ranks)]
        check(parts, count)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ties_zeros_and_non_finite(ranks: int) -> None:
    special = torch.tensor([0.0, -0.0, 2.0, -2.0, 2.0, 1.0, float("inf"), float("nan"), 1e-45, -float("inf"), 2.0])
    for count in range(0, 11 * ranks + 2, 3):
        check([special.roll(rank) for rank in range(ranks)], count)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 1.5, 3e38, 1e-40, -7.0]), max_size=12), min_size=1, max_size=4),
    st.integers(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_any_small_vectors(lists: list[list[float]], count: int) -> None:
    check([torch.tensor(values, dtype=torch.float32) for values in lists], count)


@pytest.mark.parametrize(("length", "count"), [(3000, 40), (200_000, 10_000)])
def test_one_histogram_is_enough_where_the_threshold_is_expected(length: int, count: int) -> None:
    """And what is too much is little."""
    vector = torch.randn(length, generator=torch.Generator().manual_seed(0))
    (alone,) = local_transports(1)
    floor = expected_floor(find_cut(VectorPart(KERNELS, vector), count, alone))
    asked = Asked(KERNELS, vector * 1.02)
    cut = find_cut(asked, count, alone, floor)
    assert asked.times == 1
    assert cut.surplus <= 64 + count / 10


@pytest.mark.parametrize(("floor", "count", "histograms"), [(0x40000000, 3, 1), (0x30000000, 4, 2)])
def test_a_guess_that_just_as_many_reach_is_not_given_up(floor: int, count: int, histograms: int) -> None:
    """Near below the threshold, or so far that a second look has to begin there."""
    (alone,) = local_transports(1)
    asked = Asked(KERNELS, torch.tensor([4.0, -3.0, 2.0, 0.5, 6e-10]))
    assert select_largest(asked, count, alone, floor).tolist() == list(range(count))
    assert asked.times == histograms


def test_no_magnitude_is_expected_beyond_nan() -> None:
    expected = Expectation()
    for threshold in (1, MAGNITUDE_MASK):
        expected.learn(Cut(threshold, taken=0))
    assert expected.floor() == MAGNITUDE_MASK
    nothing = reference.magnitude_histogram(torch.ones(3), expected.floor(), 12, 2048)
    assert int(nothing.sum()) == 0
