"""The Triton kernels against the reference: on a GPU, or, where there is none, under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import gpu, reference
from tests.support.few_bits import dithers, segments
from tests.support.vectors import SPECIAL, hashes, magnitude, random_integers, random_values, ranges, vectors, windows

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
FAR = 1 << 34  # a dim whose coordinates do not fit in 32 bits

some_examples = settings(
    max_examples=30 if HAS_GPU else 15, deadline=None
)  # one takes a second: to interpret, or to compile
few_examples = settings(max_examples=6 if HAS_GPU else 3, deadline=None)  # of each of five windows


class PoisonedTorch:
    """torch whose ``empty`` holds NaN or -1, so that an element nobody writes is noticed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(
            size if isinstance(size, tuple) else (size,),
            torch.nan if dtype.is_floating_point else 255 if dtype == torch.uint8 else -1,
            dtype=dtype,
            device=device,
        )


@pytest.fixture(scope="module", autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "torch", PoisonedTorch())
        yield


def on_device(*tensors: Tensor) -> list[Tensor]:
    """Copies, which the kernels may write to."""
    return [tensor.to(DEVICE, copy=True) for tensor in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return torch.equal(a.cpu().nan_to_num(nan=12345.0), b.cpu().nan_to_num(nan=12345.0))


def same_chosen(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal positions and values, but for zeros at the end of ours."""
    size = expected[0].numel()
    rest = ours[1][size:]
    return (
        torch.equal(ours[0][:size].cpu(), expected[0]) and same_numbers(ours[1][:size], expected[1]) and not rest.any()
    )


def a_table(hash: BlockHash) -> Tensor:
    return random_integers(hash.rows * hash.shards * hash.shard_cols, 1).view(hash.table_shape)


def expected_table(hash: BlockHash, values: Tensor, start: int, rows: range | None = None) -> Tensor:
    table = a_table(hash)
    reference.accumulate_(hash, table, values, start, rows)
    return table


@st.composite
def some_rows(draw: st.DrawFn, hash: BlockHash) -> range | None:
    start, stop = sorted((draw(st.integers(0, hash.rows)), draw(st.integers(0, hash.rows))))
    return draw(st.sampled_from([None, range(start, stop)]))


@some_examples
@given(st.data(), hashes())
def test_atomic_table_equals_the_reference(data: st.DataObject, hash: BlockHash) -> None:
    start, stop = data.draw(ranges(hash.dim))
    rows = data.draw(some_rows(hash))
    values = random_integers(stop - start)  # whose sums are exact in any order
    table, on_gpu = on_device(a_table(hash), values)
    gpu.accumulate_atomic_(hash, table, on_gpu, start, rows)
    assert torch.equal(table.cpu(), expected_table(hash, values, start, rows))


def gather_work(hash: BlockHash, size: int, rows: int) -> int:
    """Programs, and landings they walk through: what the interpreter's time goes into."""
    return rows * (hash.shards * hash.shard_cols // hash.block + 2 * size // hash.block)


@settings(some_examples if HAS_GPU else few_examples)
@given(st.data(), hashes(most_cols=5_000 if HAS_GPU else 500))  # every block of a row is a program
def test_gathered_table_has_the_reference_bits(data: st.DataObject, hash: BlockHash) -> None:
    start, stop = data.draw(ranges(hash.dim))
    rows = data.draw(some_rows(hash))
    if not HAS_GPU and gather_work(hash, stop - start, hash.rows) > 500:
        rows = range(hash.rows - 1, hash.rows)
        stop = min(stop, start + 100 * hash.block)
    values = random_values(stop - start)
    table, on_gpu = on_device(a_table(hash), values)
    gpu.accumulate_gather_(hash, table, on_gpu, start, rows)
    assert same_bits(table, expected_table(hash, values, start, rows))


@pytest.mark.parametrize("cols", [1024, 1025, 1279, 1281])
def test_gathered_blocks_that_wrap(cols: int) -> None:
    """Whole lists, and a last one longer than a block by 1, 255, and 1 again."""
    hash = BlockHash(20_000, 1, cols)
    assert hash.block == 256
    values = random_values(hash.dim)
    table, on_gpu = on_device(a_table(hash), values)
    gpu.accumulate_gather_(hash, table, on_gpu, 0)
    assert same_bits(table, expected_table(hash, values, 0))


@some_examples
@given(st.data(), hashes(), st.booleans())
def test_feedback_has_the_reference_bits(data: st.DataObject, hash: BlockHash, momentum: bool) -> None:
    start, stop = data.draw(ranges(hash.dim))
    u, v, gradient = (random_values(stop - start, seed) for seed in range(3))
    table, *ours = on_device(a_table(hash), u, v, gradient)
    expected = a_table(hash)
    gpu.feedback_accumulate_(hash, table, ours[0] if momentum else None, *ours[1:], 0.9 * momentum, start)
    reference.feedback_accumulate_(hash, expected, u if momentum else None, v, gradient, 0.9 * momentum, start)
    assert same_bits(ours[0], u)
    assert same_bits(ours[1], v)
    assert same_bits(ours[2], gradient)
    assert torch.allclose(table.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [0, 1, 1024, 3000])
def test_feedback_alone(size: int, momentum: float) -> None:
    u, v, gradient = (random_values(size, seed) for seed in range(3))
    ours = on_device(u, v, gradient)
    gpu.feedback_(ours[0] if momentum else None, *ours[1:], momentum)
    reference.feedback_(u if momentum else None, v, gradient, momentum)
    assert all(same_bits(a, b) for a, b in zip(ours, (u, v, gradient), strict=True))


@pytest.mark.parametrize("with_feedback", [False, True])
def test_deterministic_algorithms_use_no_atomics(monkeypatch: pytest.MonkeyPatch, with_feedback: bool) -> None:
    hash = BlockHash(2_000, 2, 300)
    values = random_values(hash.dim)
    table, on_gpu, zeros = on_device(a_table(hash), values, torch.zeros(hash.dim))
    monkeypatch.setattr(gpu.sums, "accumulate", None)
    torch.use_deterministic_algorithms(True)
    try:
        if with_feedback:
            gpu.feedback_accumulate_(hash, table, None, zeros, on_gpu, 0.0, 0)
        else:
            gpu.accumulate_(hash, table, on_gpu, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(table, expected_table(hash, values, 0))


def check_estimates(hash: BlockHash, table: Tensor, start: int, stop: int) -> None:
    (ours,) = on_device(table)
    expected = reference.estimate(hash, table, start, stop)
    assert same_numbers(gpu.estimate(hash, ours, start, stop), expected)
    for shard in {0, hash.shards - 1}:
        positions, values = gpu.owned_above(hash, ours[:, shard].contiguous(), shard, 0)
        expected_positions, expected = reference.owned_above(hash, table[:, shard].contiguous(), shard, 0)
        assert positions.tolist() == expected_positions.tolist() and same_numbers(values, expected)


@some_examples
@given(st.data(), hashes(10_000 if HAS_GPU else 3_000))
def test_estimates_equal_the_reference(data: st.DataObject, hash: BlockHash) -> None:
    check_estimates(hash, expected_table(hash, random_values(hash.dim), 0), *data.draw(ranges(hash.dim)))


@pytest.mark.parametrize("rows", range(1, 12) if HAS_GPU else (1, 2, 3, 4, 5, 9, 10))  # interpreted, many take long
def test_median_of_any_number_of_rows(rows: int) -> None:
    """Also of votes that are not finite, or zero: there are few others."""
    hash = BlockHash(1_000 if HAS_GPU else 300, rows, 400 if HAS_GPU else 120)
    random = np.random.default_rng(rows)
    special = torch.from_numpy(random.choice(np.array(SPECIAL, dtype=np.float32), hash.table_shape))
    with np.errstate(invalid="ignore", over="ignore"):
        check_estimates(hash, special, 0, hash.dim)
        check_estimates(hash, torch.where(special.isnan(), special, a_table(hash)), 0, hash.dim)


@pytest.mark.parametrize("which", range(5))
@few_examples
@given(st.data(), hashes(10_000 if HAS_GPU else 3_000), st.booleans())
def test_selection_from_estimates_equals_the_reference(
    which: int, data: st.DataObject, hash: BlockHash, poison: bool
) -> None:
    shard = data.draw(st.integers(0, hash.shards - 1))
    table = expected_table(hash, random_values(hash.dim), 0)[:, shard].contiguous()
    if poison:
        table[:, ::3] = np.inf
    (ours,) = on_device(table)
    estimates = reference.estimate_owned(hash, table, shard)
    value = data.draw(st.sampled_from([1.0, np.inf, *estimates[:100].tolist()]))
    window = windows(value)[which]
    expected_counts = reference.owned_histogram(hash, table, shard, *window)
    assert torch.equal(gpu.owned_histogram(hash, ours, shard, *window).cpu(), expected_counts)
    limit = max(int(expected_counts.sum()) + data.draw(st.sampled_from([0, 5, -1])), 0)
    counts, kept = gpu.owned_histogram_kept(hash, ours, shard, *window, limit)
    _, expected = reference.owned_histogram_kept(hash, table, shard, *window, limit)
    assert torch.equal(counts.cpu(), expected_counts)
    assert expected is not None and same_chosen(kept, expected)
    threshold = magnitude(value) + data.draw(st.integers(-1, 0))
    expected = reference.owned_above(hash, table, shard, threshold)
    size = data.draw(st.sampled_from([None, expected[0].numel(), expected[0].numel() + 3]))
    assert same_chosen(gpu.owned_above(hash, ours, shard, threshold, size), expected)


@some_examples
@given(st.data(), st.one_of(vectors(), st.builds(random_integers, st.integers(1000, 5000))))
def test_selection_from_a_vector_equals_the_reference(data: st.DataObject, values: Tensor) -> None:
    (ours,) = on_device(values)
    value = data.draw(st.sampled_from([*SPECIAL, *values[:100].tolist()]))
    for window in windows(value):
        counts = gpu.magnitude_histogram(ours, *window)
        assert torch.equal(counts.cpu(), reference.magnitude_histogram(values, *window))
    threshold = magnitude(value) + data.draw(st.integers(-1, 0))
    expected = reference.select_above(values, threshold)
    positions = torch.arange(values.numel(), dtype=torch.int32) * 3
    for size in (None, expected.numel()):
        assert torch.equal(gpu.select_above(ours, threshold, size).cpu(), expected)
        kept = gpu.keep_above(*on_device(positions), ours, threshold, size)
        for got, right in zip(kept, reference.keep_above(positions, values, threshold), strict=True):
            assert torch.equal(got.cpu().view(torch.int32), right.view(torch.int32))
    for size in (expected.numel() + 2, expected.numel() // 2):
        found, kept = (tensor.cpu() for tensor in gpu.first_above(ours, threshold, size))
        count = min(size, expected.numel())
        assert torch.equal(found[:count], expected[:count]) and same_bits(kept[:count], values[expected[:count]])
        assert len(kept) == size and not kept[count:].any()


@pytest.mark.parametrize("start", [FAR - 1000, 3 * 2**31 + 7, 2**31 - 400])
@pytest.mark.parametrize("cols", [140, 4000])  # blocks of 16 and 256
def test_coordinates_beyond_31_bits(start: int, cols: int) -> None:
    hash = BlockHash(FAR, 2, cols, 2)
    stop = start + (60 if cols == 140 else 1000)
    values = random_integers(stop - start)
    expected = expected_table(hash, values, start)
    for accumulate_ in (gpu.accumulate_atomic_, gpu.accumulate_gather_):
        table, on_gpu = on_device(a_table(hash), values)
        accumulate_(hash, table, on_gpu, start)
        assert torch.equal(table.cpu(), expected)
    assert torch.equal(
        gpu.estimate(hash, *on_device(expected), start, stop).cpu(), reference.estimate(hash, expected, start, stop)
    )


def test_nothing_to_do() -> None:
    hash = BlockHash(10, 2, 7, 7)
    table, nothing = on_device(torch.ones(hash.table_shape), torch.empty(0))
    gpu.accumulate_atomic_(hash, table, nothing, 10)
    gpu.accumulate_gather_(hash, table, nothing, 10)
    assert bool((table == 1).all())
    assert gpu.estimate(hash, table, 4, 4).numel() == 0
    tiny = BlockHash(1, 1, 7, 7)
    (cell,) = on_device(torch.ones(1, 1))
    chosen = [gpu.owned_above(tiny, cell, shard, 1) for shard in range(7)]
    assert sorted(pair[0].numel() for pair in chosen) == [0] * 6 + [1]
    kept = [gpu.owned_histogram_kept(tiny, cell, shard, 1, 21, 16, 2) for shard in range(7)]
    assert sorted(int(counts.sum()) for counts, _ in kept) == [0] * 6 + [1]
    assert gpu.select_above(nothing, 0).numel() == 0
    assert int(gpu.magnitude_histogram(nothing, 0, 21, 1024).sum()) == 0


def test_shards_of_too_many_columns_are_refused() -> None:
    hash = BlockHash(100, 1, 2**31)
    with pytest.raises(ValueError, match="32 bits"):
        gpu.estimate(hash, *on_device(torch.zeros(1, 1, 1)), 0, 100)


@some_examples
@given(st.data(), st.lists(st.integers(0, 700), min_size=1, max_size=9), st.sampled_from([*gpu.DTYPES]))
def test_scatter_equals_the_reference(data: st.DataObject, sizes: list[int], dtype: torch.dtype) -> None:
    starts = torch.tensor([0, *sizes]).cumsum(0)
    share = data.draw(st.sampled_from([0, 0.01, 0.5, 1]))
    indices = (torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)) < share).nonzero().flatten()
    values = (random_values if HAS_GPU else random_integers)(len(indices))  # the interpreter cuts bfloat16 off
    is_let_alone = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    ours = [torch.ones(size, dtype=dtype, device=DEVICE) for size in sizes]
    theirs = [torch.ones(size, dtype=dtype) for size in sizes]
    mine, right = (
        [None if alone else target for target, alone in zip(targets, is_let_alone, strict=True)]
        for targets in (ours, theirs)
    )
    gpu.scatter_(mine, *(tensor.to(DEVICE) for tensor in (starts, indices, values)))
    reference.scatter_(right, starts, indices, values)
    assert all(torch.equal(mine.cpu(), right) for mine, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", gpu.CHUNKS)
@some_examples
@given(segments(), dithers(), st.integers(1, 3))
def test_few_bit_codes_have_the_reference_bits(bits: int, values: Tensor, dither: int | None, terms: int) -> None:
    length = values.shape[1]
    (ours,) = on_device(values)
    assert torch.equal(gpu.quantize(ours, bits, dither).cpu(), reference.quantize(values, bits, dither))
    packed = torch.stack([reference.quantize(values * (0.3 * i + 0.1), bits, dither) for i in range(terms)])
    (codes,) = on_device(packed)
    assert same_bits(gpu.dequantize_sum(codes, length, bits), reference.dequantize_sum(packed, length, bits))


@pytest.mark.parametrize("size", [0, 1, 1500])
def test_subtraction_has_the_reference_bits(size: int) -> None:
    expected, sent = random_values(4000), random_values(size, 1)
    indices = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(4000)[:size]))
    ours, *arguments = on_device(expected, indices, sent)
    gpu.subtract_at_(ours, *arguments)
    reference.subtract_at_(expected, indices, sent)
    assert same_bits(ours, expected)


@pytest.mark.slow
@pytest.mark.daily
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, by Triton and ptxas, with neither spilled registers nor sums rounded once instead of twice."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this triton carries no CUDA tools")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.gpu_compile_main"],
        env=environment, capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    every = json.loads(run.stdout)
    kernels = [kernel for kernel in every if kernel["architecture"] == "sm_90"]
    assert {kernel["architecture"] for kernel in every} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for architecture in ("sm_80", "sm_100", "gfx942"):
        some = {kernel["name"] for kernel in every if kernel["architecture"] == architecture}
        assert some >= {"accumulate", "gather", "write_chosen", "quantize", "scatter", "lag_adam"}
    names = {kernel["name"] for kernel in kernels}
    assert names == {
        "feedback",
        "accumulate",
        "list_landings",
        "gather",
        "estimate",
        "histogram",
        "count",
        "write_chosen",
        "scatter",
        "quantize",
        "dequantize_sum",
        "subtract_at",
        "lag_adam",
        "hash_tiles",  # of benchmarks/kernels/gpu_probes.py, as is the next
        "walk_tiles",
    }
    # Triton 3.6 keeps one address of scatter on the stack.
    assert [kernel for kernel in kernels if kernel["STACK"] > 8 or kernel["LOCAL"]] == []
    # In a vector: of a matrix not every compiler gives neighbouring threads neighbouring cells.
    shapes = [shape for kernel in kernels if kernel["name"] == "accumulate" for shape in kernel["added"]]
    assert shapes and set(shapes) == {str(gpu.TILE)}
    instructions = {name: {i for k in kernels if k["name"] == name for i in k["instructions"]} for name in names}
    # The division of quantize is made of FFMA.
    for name in ("feedback", "accumulate", "dequantize_sum"):
        assert not any(i.startswith("FFMA") for i in instructions[name]), "m * u + g must be rounded twice"
        assert any(i.startswith("FMUL") for i in instructions[name])
    assert any(i.startswith("RED") for i in instructions["accumulate"])
    assert not any(i.startswith("ATOM") for i in instructions["accumulate"]), "returns what nobody reads"
