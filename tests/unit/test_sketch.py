"""CountSketch: linear, mergeable, unbiased, and as good as a table under an ideal random hash."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit

from hvd_sketch.sketch import CountSketch, fill_at_random


def whole_numbers(dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-50, 50, (dim,), generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def test_linear_and_mergeable() -> None:
    a, b = whole_numbers(3001, 1), whole_numbers(3001, 2)
    settings = {"dim": 3001, "rows": 3, "cols": 500, "seed": 9, "step": 4, "shards": 3}
    separate = CountSketch(**settings).accumulate_(a).merge_(CountSketch(**settings).accumulate_(b))
    together = CountSketch(**settings).accumulate_(a + b)
    in_slices = CountSketch(**settings)
    for start, stop in [(0, 1), (1, 700), (700, 1234), (1234, 3001)]:
        in_slices.accumulate_((a + b)[start:stop], start)
    assert separate.table.shape == (3, 3, 166)
    assert torch.equal(separate.table, together.table) and torch.equal(in_slices.table, together.table)
    assert torch.equal(together.estimate(700, 1234), together.estimate()[700:1234])


@pytest.mark.parametrize("name", ["dim", "rows", "cols", "seed", "step", "shards"])
def test_different_sketches_do_not_merge(name: str) -> None:
    settings = {"dim": 100, "rows": 2, "cols": 40, "seed": 0, "step": 0, "shards": 2}
    with pytest.raises(ValueError, match=f"{name} is {settings[name]} here, {settings[name] + 1} there"):
        CountSketch(**settings).merge_(CountSketch(**{**settings, name: settings[name] + 1}))


def test_zero_hashes_afresh() -> None:
    sketch = CountSketch(1000, 3, 100).accumulate_(torch.ones(1000))
    before = sketch.table.clone()
    assert torch.equal(sketch.zero_().accumulate_(torch.ones(1000)).table, before)
    sketch.zero_(step=1)
    assert not sketch.table.any() and sketch.hash.step == 1
    assert not torch.equal(sketch.accumulate_(torch.ones(1000)).table, before)


def test_wide_tables_recover_exactly() -> None:
    values = torch.zeros(5000)
    values[[3, 77, 4999]] = torch.tensor([5.0, -8.0, 2.0])
    sketch = CountSketch(5000, 5, 50_000).accumulate_(values)
    assert torch.equal(sketch.estimate(), values)
    assert sketch.top(2).tolist() == [3, 77] and sketch.top(100).tolist() == [3, 77, 4999]
    assert sketch.top(0).numel() == 0
    assert sketch.norm() == pytest.approx(math.sqrt(93))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7])
def test_estimates_are_unbiased(rows: int) -> None:
    """Over seeds the mean error is zero within 4.5 standard errors; the lower middle of an even count is not."""
    values = torch.randn(600, generator=torch.Generator().manual_seed(1))
    seeds = 800
    errors = np.empty(seeds)
    for seed in range(seeds):
        sketch = CountSketch(600, rows, 50, seed=seed).accumulate_(values)
        errors[seed] = float((sketch.estimate() - values).mean())
    assert abs(errors.mean()) < 4.5 * errors.std() / math.sqrt(seeds)


@pytest.mark.parametrize("shards", [1, 4])
def test_norm_is_an_ams_estimate(shards: int) -> None:
    """E[sum of squares of a row] = ||x||^2, and its variance is at most 2 ||x||^4 / cols (4-wise signs)."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2))
    true, cols, seeds = float(values.norm() ** 2), 80, 1500
    squares = np.array(
        [CountSketch(2000, 1, cols, seed=s, shards=shards).accumulate_(values).norm() ** 2 for s in range(seeds)]
    )
    deviation = true * math.sqrt(2 / cols)
    assert abs(squares.mean() - true) < 4.5 * deviation / math.sqrt(seeds)
    assert squares.std() < 1.15 * deviation


def test_heavymix_keeps_the_heavy_and_draws_the_rest_evenly() -> None:
    dim, k, draws = 60, 20, 3000
    values = torch.full((dim,), 0.01)
    heavy = [5, 17, 41]
    values[heavy] = torch.tensor([10.0, -12.0, 9.0])
    sketch = CountSketch(dim, 5, 4000).accumulate_(values)
    counts = np.zeros(dim)
    for seed in range(draws):
        chosen = sketch.heavymix(k, seed)
        assert chosen.numel() == k and bool((chosen.diff() > 0).all())
        counts[chosen.numpy()] += 1
    others = np.setdiff1d(np.arange(dim), heavy)
    assert (counts[heavy] == draws).all()
    expected = draws * (k - 3) / (dim - 3)
    spread = math.sqrt(expected * (1 - (k - 3) / (dim - 3)))
    assert np.abs(counts[others] - expected).max() < 4.5 * spread
    assert torch.equal(sketch.heavymix(k, 1), sketch.heavymix(k, 1))
    assert sketch.heavymix(dim, 0).tolist() == list(range(dim))


def test_heavymix_trims_to_the_k_largest() -> None:
    """Estimates can make more than k coordinates heavy: here every one, since the norm comes out too small."""
    sketch = CountSketch(8, 1, 8)
    sketch.table[0, 0] = torch.arange(8.0)
    largest = sketch.top(1)
    assert sketch.heavymix(1, 0).tolist() == largest.tolist()


def test_fill_at_random_draws_pairs_evenly() -> None:
    """Every pair of the five others is as likely: Floyd's algorithm, mapped past the heavy ones."""
    counts: dict[tuple[int, ...], int] = {}
    draws = 4000
    for seed in range(draws):
        chosen = tuple(fill_at_random(torch.tensor([0, 3]), 4, 7, seed, 0).tolist())
        assert chosen[0] == 0 and 3 in chosen
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == 10
    assert max(abs(n - draws / 10) for n in counts.values()) < 4.5 * math.sqrt(draws * 0.09)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.accumulate_(torch.ones(11)), "0 to 11 are not within 0 to 10"),
        (lambda s: s.accumulate_(torch.ones(2), start=9), "9 to 11"),
        (lambda s: s.accumulate_(torch.ones(2, dtype=torch.float64)), "float32 vector, got torch.float64"),
        (lambda s: s.accumulate_(torch.ones(2, 2)), "float32 vector"),
        (lambda s: s.estimate(3, 2), "3 to 2"),
        (lambda s: s.top(-1), "must not be negative"),
        (lambda s: s.heavymix(11, 0), "between 1 and dim 10"),
    ],
)
def test_bad_arguments(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(CountSketch(10, 2, 5))
    with pytest.raises(ValueError, match="backend must be"):
        CountSketch(10, 2, 5, backend="abacus")


# Recall: how many of the k heavy coordinates are among the k largest estimates, ours against an ideal random hash
# in the same test. An ideal hash does not care where the heavy ones lie, so one ideal serves all layouts.


def recall(estimates: torch.Tensor, heavy: torch.Tensor) -> float:
    found = estimates.abs().topk(heavy.numel()).indices
    return float(torch.isin(found, heavy).to(torch.float64).mean())


@njit(cache=True)
def ideal_estimates(values: np.ndarray, rows: int, cols: int, seed: int) -> np.ndarray:
    """Estimates under fully random buckets and signs, from the first row, the first two, …: [rows, dim]."""
    np.random.seed(seed)
    dim = len(values)
    bucket = np.empty((rows, dim), dtype=np.int32)
    sign = np.empty((rows, dim), dtype=np.float32)
    table = np.zeros((rows, cols), dtype=np.float32)
    for row in range(rows):
        for i in range(dim):
            cell = np.random.randint(2 * cols)
            bucket[row, i] = cell >> 1
            sign[row, i] = 1 - 2 * (cell & 1)
            table[row, cell >> 1] += sign[row, i] * values[i]
    estimates = np.empty((rows, dim), dtype=np.float32)
    votes = np.empty(rows, dtype=np.float32)
    for i in range(dim):
        for row in range(rows):
            vote = sign[row, i] * table[row, bucket[row, i]]
            place = row
            while place > 0 and votes[place - 1] > vote:  # keep the votes sorted
                votes[place] = votes[place - 1]
                place -= 1
            votes[place] = vote
            estimates[row, i] = (votes[row // 2] + votes[(row + 1) // 2]) / 2
    return estimates


def noisy(dim: int, heavy: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    values = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    values[heavy] = size * values[heavy].sign()
    return values


@pytest.mark.slow
def test_recall_equals_an_ideal_hash_wherever_the_heavy_lie() -> None:
    """A [2048, 1024] weight at 4 shards: a heavy column (its stride is 4 blocks), clusters, and spread out.

    Clusters collide whole, which spreads the recall of ours: it gets more seeds. The fewer the clusters, the less
    evenly they load the shards: 8 of 256 cost 0.0075, 16 of 128 cost 0.0035.
    """
    dim, k, cols, seeds, ideal_seeds = 2048 * 1024, 2048, 60_000, 32, 28
    layouts = {
        "column": torch.arange(2048) * 1024 + 137,
        "clustered": (torch.arange(16)[:, None] * 131_072 + 1000 + torch.arange(128)).flatten(),
        "spread": torch.randperm(dim, generator=torch.Generator().manual_seed(0))[:k].sort().values,
    }
    size = 2.2 * math.sqrt(dim / cols)
    all_rows = range(1, 6)  # 7 in the next test
    ideal = np.empty((len(all_rows), ideal_seeds))
    for seed in range(ideal_seeds):
        values = noisy(dim, layouts["spread"], size, seed)
        estimates = torch.from_numpy(ideal_estimates(values.numpy(), max(all_rows), cols, seed))
        ideal[:, seed] = [recall(estimate, layouts["spread"]) for estimate in estimates]
    ours = np.empty((len(layouts), len(all_rows), seeds))
    for seed in range(seeds):
        for j, heavy in enumerate(layouts.values()):
            most = CountSketch(dim, max(all_rows), cols, seed=seed, shards=4)
            most.accumulate_(noisy(dim, heavy, size, seed))
            for i, rows in enumerate(all_rows):
                sketch = CountSketch(dim, rows, cols, seed=seed, shards=4)
                sketch.table = most.table[:rows]  # more rows keep the first ones
                ours[j, i, seed] = float(torch.isin(sketch.top(k), heavy).to(torch.float64).mean())
    check_recall(ours, ideal)


def test_recall_of_a_tiny_table() -> None:
    """7 rows x 40 columns at dim 785, the paper's MNIST setting: blocks are short and few."""
    dim, rows, cols, seeds = 785, 7, 40, 6000
    heavy = {"spread": torch.arange(10) * 78 + 3, "clustered": torch.arange(10) + 300}
    size = 1.8 * math.sqrt(dim / cols)
    ideal = np.empty((1, seeds))
    ours = np.empty((2, 1, seeds))
    for seed in range(seeds):
        values = noisy(dim, heavy["spread"], size, seed)
        estimates = torch.from_numpy(ideal_estimates(values.numpy(), rows, cols, seed))
        ideal[0, seed] = recall(estimates[-1], heavy["spread"])
        for j, where in enumerate(heavy.values()):
            values = noisy(dim, where, size, seed)
            sketch = CountSketch(dim, rows, cols, seed=seed).accumulate_(values)
            ours[j, 0, seed] = recall(sketch.estimate(), where)
    check_recall(ours, ideal)


def check_recall(ours: np.ndarray, ideal: np.ndarray) -> None:
    """``ours`` [layouts, rows, seeds] within 0.01 of ``ideal`` [rows, seeds] on average, standard errors <= 0.002."""
    for recalls in (ours, ideal):
        assert (recalls.std(axis=-1) / math.sqrt(recalls.shape[-1])).max() <= 0.002
    assert 0.2 < ideal.mean() < 0.95, "the test says nothing where all or none are found"
    difference = ours.mean(axis=-1) - ideal.mean(axis=-1)
    assert np.abs(difference).max() <= 0.01, difference.round(4).tolist()
