"""The Numba kernels of tables and feedback against the reference, for any sizes and any number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise, product

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.hashing import PRIME, BlockHash, evaluate_cubic
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels import cpu, reference
from hvd_sketch.local_ranks import LOCAL_SIZES
from tests.support.cpu_kernels import few_examples, poisoned, split_for
from tests.support.vectors import (
    hashes,
    magnitude,
    random_integers,
    random_values,
    ranges,
    same_bits,
    sketched,
    windows,
)


@pytest.fixture(scope="module", autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned():
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@few_examples
@given(st.data(), hashes(), st.integers(1, 5))
def test_table_equals_the_reference(data: st.DataObject, hash: BlockHash, threads: int) -> None:
    start, stop = data.draw(ranges(hash.dim))
    for values in (random_integers(stop - start), random_values(stop - start)):
        table = random_integers(hash.rows * hash.shards * hash.shard_cols, 1).view(hash.table_shape)
        expected = table.clone()
        with split_for(threads):
            cpu.accumulate_(hash, table, values, start)
        reference.accumulate_(hash, expected, values, start)
        assert torch.equal(table, expected)


@few_examples
@given(st.data(), hashes(), st.integers(1, 5))
def test_estimates_equal_the_reference(data: st.DataObject, hash: BlockHash, threads: int) -> None:
    start, stop = data.draw(ranges(hash.dim))
    table = sketched(reference, hash, random_values(hash.dim))
    whole = reference.estimate(hash, table, 0, hash.dim)
    with split_for(threads):
        assert torch.equal(cpu.estimate(hash, table, 0, hash.dim), whole)
        assert torch.equal(cpu.estimate(hash, table, start, stop), whole[start:stop])


def every_owned(hash: BlockHash, shard_table: Tensor, shard: int) -> tuple[Tensor, Tensor]:
    return cpu.owned_above(hash, shard_table, shard, 0)


@few_examples
@given(st.data(), hashes(), st.integers(1, 5))
def test_owned_estimates_equal_the_reference(data: st.DataObject, hash: BlockHash, threads: int) -> None:
    table = sketched(reference, hash, random_integers(hash.dim))  # whole numbers: many tie
    whole = reference.estimate(hash, table, 0, hash.dim)
    for shard in {data.draw(st.integers(0, hash.shards - 1)), hash.shards - 1}:
        own_table = table[:, shard].contiguous()
        own = reference.estimate_owned(hash, own_table, shard)
        assert own.numel() == hash.owned_size(shard)
        assert torch.equal(own, whole[hash.owned_to_global(shard, np.arange(own.numel()))])
        value = data.draw(st.sampled_from([0.0, 1e30, *own[:20].tolist()]))
        threshold = magnitude(value) + data.draw(st.integers(-1, 0))
        with split_for(threads):
            found = cpu.owned_above(hash, own_table, shard, threshold)
        expected = reference.owned_above(hash, own_table, shard, threshold)
        assert found[0].tolist() == expected[0].tolist() and torch.equal(found[1], expected[1])
        for window, limit in product(windows(value), (hash.dim, 10)):
            expected_counts = reference.owned_histogram(hash, own_table, shard, *window)
            with split_for(threads):
                assert torch.equal(cpu.owned_histogram(hash, own_table, shard, *window), expected_counts)
                counts, kept = cpu.owned_histogram_kept(hash, own_table, shard, *window, limit)
            assert torch.equal(counts, expected_counts)
            assert (kept is None) == (int(counts.sum()) > limit)
            if kept is not None:
                _, expected = reference.owned_histogram_kept(hash, own_table, shard, *window, limit)
                assert kept[0].tolist() == expected[0].tolist() and torch.equal(kept[1], expected[1])


@few_examples
@given(st.data(), hashes(), st.integers(1, 5), st.sampled_from([None, 0.9, 0.3]))
def test_feedback_equals_the_reference(
    data: st.DataObject, hash: BlockHash, threads: int, momentum: float | None
) -> None:
    """u, v and the table to the bit, fused and alone, in chunks of any size."""
    start, stop = data.draw(ranges(hash.dim))
    gradient = random_values(stop - start, 1)
    before = [random_values(stop - start, seed) for seed in (2, 3)]
    u, v = (x.clone() for x in before)
    expected_table = torch.zeros(hash.table_shape)
    velocity = u if momentum else None
    reference.feedback_accumulate_(hash, expected_table, velocity, v, gradient, momentum, start)
    for fused in (True, False):
        our_u, our_v = (x.clone() for x in before)
        table = torch.zeros(hash.table_shape)
        velocity = our_u if momentum else None
        with split_for(threads):
            if fused:
                cpu.feedback_accumulate_(hash, table, velocity, our_v, gradient, momentum, start)
            else:
                cpu.feedback_(velocity, our_v, gradient, momentum)
                for row in range(hash.rows):
                    cpu.accumulate_(hash, table, our_v, start, range(row, row + 1))
        assert torch.equal(our_u, u) and torch.equal(our_v, v) and torch.equal(table, expected_table)


def test_feedback_over_several_chunks() -> None:
    hash = BlockHash(3 * loops.CHUNK + 77, 3, 5000)
    tables = torch.zeros(2, *hash.table_shape)
    gradient, v, u = (random_values(hash.dim, seed) for seed in range(3))
    ours, theirs = (u.clone(), v.clone()), (u.clone(), v.clone())
    for kernels, table, (u, v) in ((cpu, tables[0], ours), (reference, tables[1], theirs)):
        kernels.feedback_accumulate_(hash, table, u, v, gradient, 0.9, 0)
    assert torch.equal(tables[0], tables[1]) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("rows", [*range(1, 10), 11, 12])
@pytest.mark.parametrize(("cols", "shards"), [(9000, 1), (1100, 1), (4201, 3)])
def test_blocks_of_full_size(rows: int, cols: int, shards: int) -> None:
    hash = BlockHash(80_003, rows, cols, shards)
    assert hash.block == 256
    table = sketched(cpu, hash, random_values(hash.dim))
    assert torch.equal(table, sketched(reference, hash, random_values(hash.dim)))
    assert torch.equal(cpu.estimate(hash, table, 0, hash.dim), reference.estimate(hash, table, 0, hash.dim))
    positions, estimates = every_owned(hash, table[:, -1].contiguous(), shards - 1)
    expected = reference.estimate_owned(hash, table[:, -1].contiguous(), shards - 1)
    assert torch.equal(estimates, expected[positions]) and bool((expected != 0).sum() == positions.numel())


@pytest.mark.parametrize("block", [0, 1, 2**26 + 3, 2**27 - 2])  # the last one's words end below PRIME
def test_sign_words_of_extreme_coefficients(block: int) -> None:
    """The largest the field has, so that what must stay below 2^64 and 2^32 comes closest to it."""
    words = np.zeros(loops.WORDS, dtype=np.uint32)
    for coefficients in product([0, 1, PRIME - 1], repeat=4):
        numbers = np.array(coefficients, dtype=np.uint64)
        loops._fill_words(words, 0, numbers, block, 256)
        expected = evaluate_cubic(numbers, block * loops.WORDS + np.arange(loops.WORDS))
        assert words.tolist() == expected.tolist(), (coefficients, block)


def test_accumulating_in_slices_equals_at_once() -> None:
    hash = BlockHash(20_000, 3, 900, 2)
    for values in (random_integers(hash.dim), random_values(hash.dim)):
        pieces = torch.zeros(hash.table_shape)
        bounds = [0, 1, 1, 17, 300, 4096, 4097, 19_999, 20_000]
        for start, stop in pairwise(bounds):
            cpu.accumulate_(hash, pieces, values[start:stop], start)
        assert same_bits(pieces, sketched(cpu, hash, values))


def test_nothing_to_do() -> None:
    hash = BlockHash(10, 2, 7, 7)
    table = torch.ones(hash.table_shape)
    cpu.accumulate_(hash, table, torch.empty(0), 10)
    assert bool((table == 1).all())
    assert cpu.estimate(hash, table, 4, 4).numel() == 0
    tiny = BlockHash(1, 1, 7, 7)
    sizes = [every_owned(tiny, torch.ones(1, 1), shard)[0].numel() for shard in range(7)]
    assert sizes == [int(cpu.owned_histogram(tiny, torch.ones(1, 1), shard, 0, 20, 2048).sum()) for shard in range(7)]
    assert sorted(sizes) == [0] * 6 + [1]
    assert cpu.select_above(torch.empty(0), 0).numel() == 0
    assert int(cpu.magnitude_histogram(torch.empty(0), 0, 21, 1024).sum()) == 0


@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_tables_that_are_not_finite(poison: float) -> None:
    hash = BlockHash(10_000, 4, 600)
    table = sketched(cpu, hash, random_values(hash.dim))
    table[1, 0, ::3] = poison
    estimates = cpu.estimate(hash, table, 0, hash.dim)
    assert estimates.shape == (hash.dim,)
    chosen = cpu.select_above(torch.full((100,), poison), 0x3F800000)
    assert torch.equal(chosen, torch.arange(100))


def test_thread_count_changes_no_bit() -> None:
    hash = BlockHash(2 * cpu.MIN_PER_THREAD + 777, 3, 20_000, 2)
    values = random_values(hash.dim)
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            table = sketched(cpu, hash, values)
            estimates = cpu.estimate(hash, table, 0, hash.dim)
            counts = cpu.magnitude_histogram(estimates, 0, 21, 1024)
            positions, kept = every_owned(hash, table[:, 1].contiguous(), 1)
            chosen = cpu.select_above(estimates, 0x3F800000)
            results.append((table, estimates, counts.int(), chosen.int(), positions, kept))
    assert all(same_bits(one, two) for one, two in zip(*results, strict=True))
    assert same_bits(results[0][0], sketched(reference, hash, values))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 2),
        ({"HOROVOD_LOCAL_SIZE": "3"}, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"MPI_LOCALNRANKS": "16"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 2),
        ({"LOCAL_WORLD_SIZE": "", "OMPI_COMM_WORLD_LOCAL_SIZE": "x", "HOROVOD_LOCAL_SIZE": "0"}, 8),
        ({"LOCAL_WORLD_SIZE": "0", "MPI_LOCALNRANKS": "4"}, 2),
        ({"MPI_LOCALNRANKS": "4", "OMP_NUM_THREADS": "8"}, numba.config.NUMBA_NUM_THREADS),
    ],
)
def test_each_rank_takes_its_share_of_the_cores(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*LOCAL_SIZES, *cpu.THREAD_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cpu._share_of_cores.cache_clear()
    assert cpu._share_of_cores() == expected
    cpu._share_of_cores.cache_clear()


def test_callers_in_several_python_threads() -> None:
    hash = BlockHash(2 * cpu.MIN_PER_THREAD, 3, 10_000)

    def work(seed: int) -> list[Tensor]:
        table = sketched(cpu, hash, random_values(hash.dim, seed))
        estimates = cpu.estimate(hash, table, 0, hash.dim)
        return [table, estimates, cpu.select_above(estimates, magnitude(2.0)).int()]

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, [*range(4)] * 4, timeout=60))
    for seed, result in enumerate(together):
        assert all(same_bits(a, b) for a, b in zip(alone[seed % 4], result, strict=True))
