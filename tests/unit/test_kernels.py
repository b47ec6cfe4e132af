"""The Numba kernels against the reference, for any sizes and any number of threads the work is divided among."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.hashing import PRIME, BlockHash, evaluate_cubic
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels import cpu, reference
from tests.support.vectors import (
    SPECIAL,
    hashes,
    magnitude,
    random_integers,
    random_values,
    ranges,
    same_bits,
    sketched,
    vectors,
    windows,
)

BOUNDS_CHECKED = "equal or equals or full_size or chunks or sorted or nothing_to_do"
LANES_OUT_OF_BOUNDS = """
import numba, numpy as np
from hvd_sketch.kernels import _cpu_loops as loops
@numba.njit
def add(table, cell):
    loops._add_signed(table, cell, np.ones(16, dtype=np.float32), 0, np.uint32(0))
add(np.zeros(20, dtype=np.float32), 4)
for cell in (-1, 5):
    try:
        add(np.zeros(20, dtype=np.float32), cell)
    except IndexError:
        continue
    raise AssertionError(f"16 lanes from {cell} on are not within 20 elements")
"""
few_examples = settings(max_examples=80, deadline=None)  # the first one compiles


class PoisonedNumpy:
    """NumPy whose ``empty`` holds NaN (or -1), so that an element nobody writes is noticed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -1, dtype=dtype)


@pytest.fixture(scope="module", autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "np", PoisonedNumpy())
        yield


@contextmanager
def split_for(threads: int) -> Iterator[None]:
    """Split every kernel's work for a number of threads, whatever its size and the machine's threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "threads_for", lambda size: threads)
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
    for shard in range(hash.shards):
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


@few_examples
@given(hashes(), st.integers(0, 100), st.floats(0, 1))
def test_merged_positions_are_sorted_coordinates(hash: BlockHash, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    positions = [np.flatnonzero(random.random(hash.owned_size(shard)) < share) for shard in range(hash.shards)]
    expected = np.sort(np.concatenate([hash.owned_to_global(shard, own) for shard, own in enumerate(positions)]))
    assert cpu.merge_owned(hash, [torch.from_numpy(own) for own in positions]).tolist() == expected.tolist()


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
        ({"MPI_LOCALNRANKS": "16"}, 1),
        ({"MPI_LOCALNRANKS": "4", "OMP_NUM_THREADS": "8"}, numba.config.NUMBA_NUM_THREADS),
    ],
)
def test_each_rank_takes_its_share_of_the_cores(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*cpu.LOCAL_SIZES, *cpu.THREAD_SETTINGS):
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


def test_processes_that_start_at_once_share_a_cold_cache(tmp_path: Any) -> None:
    program = (
        "import torch\n"
        "torch.set_num_threads(3)\n"
        "from hvd_sketch.kernels import _cpu_loops, cpu\n"
        "names = 'accumulate', 'feedback_accumulate', 'estimate', 'owned_above', 'histogram', 'select_above'\n"
        "assert not any(getattr(_cpu_loops, name).signatures for name in names), 'compiled at import'\n"
        "assert int(cpu.magnitude_histogram(torch.ones(1000), 0, 21, 1024).sum()) == 1000\n"
        "assert len(_cpu_loops.histogram.signatures) == 1\n"
        "assert torch.get_num_threads() == 3, 'Numba changed the threads of torch'\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert any(path.suffix == ".nbc" for path in tmp_path.rglob("*"))


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Any) -> None:
    """The tests against the reference once more, every index of the compiled loops checked, and 16 lanes at a time."""
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = os.environ | checked
    pytest_run = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [*pytest_run, __file__, "-k", BOUNDS_CHECKED]
    for arguments in (["-c", LANES_OUT_OF_BOUNDS], tests, [*pytest_run, "tests/unit/test_coding.py"]):
        run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout + run.stderr
