"""The Numba kernels that count, select, scatter and gather against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import cpu, reference
from tests.support.cpu_kernels import few_examples, poisoned, split_for
from tests.support.vectors import SPECIAL, hashes, magnitude, random_values, same_bits, vectors, windows


@pytest.fixture(scope="module", autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned():
        yield


@few_examples
@given(st.data(), vectors(), st.integers(1, 5))
def test_histogram_equals_the_reference(data: st.DataObject, values: Tensor, threads: int) -> None:
    value = data.draw(st.sampled_from([*SPECIAL, *values.tolist()]))
    for window in windows(value):
        with split_for(threads):
            counts = cpu.magnitude_histogram(values, *window)
        assert torch.equal(counts, reference.magnitude_histogram(values, *window))


@few_examples
@given(st.data(), vectors(), st.integers(1, 5))
def test_selection_equals_the_reference(data: st.DataObject, values: Tensor, threads: int) -> None:
    value = data.draw(st.sampled_from([*SPECIAL, *values.tolist()]))
    threshold = magnitude(value) + data.draw(st.integers(-1, 0))
    with split_for(threads):
        chosen = cpu.select_above(values, threshold)
    assert torch.equal(chosen, reference.select_above(values, threshold))
    assert bool((values[chosen] != 0).all())
    for dtype in (torch.int32, torch.int64):
        positions = 3 * torch.arange(values.numel(), dtype=dtype)
        with split_for(threads):
            kept, kept_values = cpu.keep_above(positions.clone(), values.clone(), threshold)
        assert torch.equal(kept, positions[chosen])
        assert torch.equal(kept_values.view(torch.int32), values[chosen].view(torch.int32))


@few_examples
@given(st.data(), vectors(), st.integers(1, 5))
def test_selected_values_equal_the_reference(data: st.DataObject, values: Tensor, threads: int) -> None:
    value = data.draw(st.sampled_from([*SPECIAL, *values.tolist()]))
    threshold = magnitude(value) + data.draw(st.integers(-1, 0))
    expected = reference.values_above(values, threshold, values.numel())
    assert expected is not None
    for limit in {0, expected[0].numel() - 1, expected[0].numel(), values.numel()} - {-1}:
        with split_for(threads):
            found = cpu.values_above(values, threshold, limit)
        assert (found is None) == (expected[0].numel() > limit)
        assert (reference.values_above(values, threshold, limit) is None) == (found is None)
        if found is not None:
            assert torch.equal(found[0], expected[0]) and same_bits(found[1], expected[1])


@few_examples
@given(st.data(), st.lists(st.integers(0, 90), min_size=1, max_size=6), st.integers(1, 5))
def test_scatter_equals_the_reference(data: st.DataObject, sizes: list[int], threads: int) -> None:
    starts = torch.tensor([0, *sizes]).cumsum(0)
    share = data.draw(st.sampled_from([0, 0.1, 1]))
    indices = (torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)) < share).nonzero().flatten()
    values = random_values(len(indices))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    left_alone = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    ours, theirs = (
        [None if alone else torch.ones(size, 1, dtype=dtype) for size, alone in zip(sizes, left_alone, strict=True)]
        for _ in range(2)
    )
    with split_for(threads):
        cpu.scatter_(ours, starts, indices, values)
    reference.scatter_(theirs, starts, indices, values)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine is right is None or torch.equal(mine, right)


@few_examples
@given(st.data(), vectors(), st.integers(1, 5))
def test_single_elements_equal_the_reference(data: st.DataObject, values: Tensor, threads: int) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    indices = torch.from_numpy(np.flatnonzero(random.random(values.numel()) < data.draw(st.floats(0, 1))))
    cleared = values.clone()
    reference.clear_(cleared, indices)
    picked = reference.gather(values, indices, out=torch.empty(indices.numel()))
    with split_for(threads):
        assert same_bits(cpu.gather(values, indices, out=torch.empty(indices.numel())), picked)
        cpu.clear_(values, indices)
    assert same_bits(values, cleared) and not bool(values[indices].any())


@pytest.mark.parametrize("threshold", [-1, 0])
def test_zeros_are_never_selected(threshold: int) -> None:
    values = torch.tensor([0.0, 1e-45, -0.0, -3.0] * 40)
    assert torch.equal(cpu.select_above(values, threshold), values.nonzero().flatten())


@few_examples
@given(hashes(), st.integers(0, 100), st.floats(0, 1))
def test_merged_positions_are_sorted_coordinates(hash: BlockHash, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    positions = [np.flatnonzero(random.random(hash.owned_size(shard)) < share) for shard in range(hash.shards)]
    expected = np.sort(np.concatenate([hash.owned_to_global(shard, own) for shard, own in enumerate(positions)]))
    assert cpu.merge_owned(hash, [torch.from_numpy(own) for own in positions]).tolist() == expected.tolist()
