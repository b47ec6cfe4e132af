"""The paper's statements as statistical tests.

Each compares a mean over independent hash seeds with its bound and fails where it lies Z standard errors beyond:
if the statement holds, one comparison fails with probability 3e-5, were the seeds fresh. They are fixed, so a test that
passes once keeps passing until the code changes. Controls show that the comparisons can fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.sketched import SketchedAllreduce
from hvd_sketch.sketch import CountSketch
from hvd_sketch.transport import Transport, run_local

Z = 4.0
DIM, K = 400, 10  # of the vectors of Lemma 1
BATCH = 32  # terms that each rank draws per step of Theorem 4


def _vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(DIM, generator=generator)
    spikes = 0.05 * normal
    spikes[[7, 120, 121, 399]] = torch.tensor([4.0, -4.0, 5.0, 4.5])
    last_ones = torch.zeros(DIM)
    last_ones[-40:] = 1.0
    return {"normal": normal, "cubed": normal**3, "flat": torch.ones(DIM), "spikes": spikes, "last ones": last_ones}


VECTORS = _vectors()


def excess(errors: list[float], bound: float) -> float:
    """By how many standard errors the mean lies above the bound; rounding is forgiven."""
    mean, spread = np.mean(errors), np.std(errors) / math.sqrt(len(errors))
    return float((mean - bound - 1e-6) / max(spread, 1e-9))


def left_over(vector: Tensor, kept: Tensor) -> float:
    """``||g - g~||^2 / ||g||^2`` where g~ is g at the kept coordinates."""
    rest = vector.clone()
    rest[kept] = 0
    return float(rest.square().sum() / vector.square().sum())


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("rows", [4, 5])
def test_heavymix_is_a_contraction(name: str, rows: int) -> None:
    """Lemma 1: ``E ||g - g~||^2 <= (1 - k/d) ||g||^2``; for a flat vector nothing does better."""
    vector = VECTORS[name]
    errors = []
    for seed in range(1500):
        sketch = CountSketch(DIM, rows, 60, seed=seed).accumulate_(vector)
        errors.append(left_over(vector, sketch.heavymix(K, seed)))
    assert excess(errors, 1 - K / DIM) < Z
    if name == "flat":
        assert errors == pytest.approx([1 - K / DIM] * len(errors))


def test_a_random_choice_meets_the_bound_and_a_preference_breaks_it() -> None:
    """Controls: so a HEAVYMIX that favoured some coordinates would fail for some vector."""
    vector = VECTORS["last ones"]
    generator = torch.Generator().manual_seed(0)
    at_random = [left_over(vector, torch.randperm(DIM, generator=generator)[:K]) for _ in range(1500)]
    in_the_first_half = [left_over(vector, torch.randperm(DIM // 2, generator=generator)[:K]) for _ in range(1500)]
    assert abs(excess(at_random, 1 - K / DIM)) < Z
    assert excess(in_the_first_half, 1 - K / DIM) > Z


def test_spikes_are_kept() -> None:
    """Far below Lemma 1: of a vector with four heavy coordinates hardly more than its tail is left."""
    vector = VECTORS["spikes"]
    tail = left_over(vector, vector.abs().topk(4).indices)
    errors = []
    for seed in range(300):
        errors.append(left_over(vector, CountSketch(DIM, 5, 60, seed=seed).accumulate_(vector).heavymix(K, seed)))
    assert tail < 0.02 and excess(errors, 1.5 * tail) < -Z


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7])
def test_every_estimate_is_unbiased(rows: int) -> None:
    """For each of 120 heavy-tailed coordinates: |mean error| below 5 standard errors (all hold: 1 - 7e-5)."""
    vector = VECTORS["cubed"][:120]
    errors = np.stack([_estimate_errors(vector, rows, seed) for seed in range(2500)])
    assert np.abs(_z_scores(errors)).max() < 5


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_the_lower_middle_of_an_even_number_is_biased(rows: int) -> None:
    """What the authors' code takes; the control of the test above."""
    vector = VECTORS["cubed"][:120]
    errors = np.stack([_estimate_errors(vector, rows, seed, lower_middle=True) for seed in range(300)])
    assert np.median(_z_scores(errors)) < -5


def _z_scores(errors: np.ndarray) -> np.ndarray:
    return errors.mean(axis=0) / (errors.std(axis=0) / math.sqrt(len(errors)))


def _estimate_errors(vector: Tensor, rows: int, seed: int, lower_middle: bool = False) -> np.ndarray:
    sketch = CountSketch(len(vector), rows, 30, seed=seed).accumulate_(vector)
    if not lower_middle:
        return (sketch.estimate() - vector).numpy()
    index = np.arange(len(vector))
    hash, table = sketch.hash, sketch.table.numpy()
    votes = np.stack([hash.signs(row, index) * table[row][hash.cells(row, index)] for row in range(rows)])
    return np.sort(votes, axis=0)[(rows - 1) // 2] - vector.numpy()


@dataclass(frozen=True)
class Objective:
    """A smooth function with minimum 0 or above, and a mean of many whose gradients are drawn.

    Attributes:
        gradients: of all ``n`` terms at w: float32 [n, dim].
        value: the mean of the terms at w.
        smoothness: L.
    """

    gradients: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], float]
    smoothness: float


def quadratic(features: Tensor, target: Tensor) -> Objective:
    """Least squares, minimum 0."""
    return Objective(
        lambda w: (features @ (w - target))[:, None] * features,
        lambda w: float((features @ (w - target)).square().mean() / 2),
        _largest_curvature(features),
    )


def robust(features: Tensor, target: Tensor) -> Objective:
    """``r^2 / (2 (1 + r^2))`` of the same residuals: concave beyond 0.58, nowhere more curved than r^2 / 2."""

    def gradients(w: Tensor) -> Tensor:
        r = features @ (w - target)
        return (r / (1 + r.square()).square())[:, None] * features

    def value(w: Tensor) -> float:
        square = (features @ (w - target)).square()
        return float((square / (1 + square)).mean() / 2)

    return Objective(gradients, value, _largest_curvature(features))


def _largest_curvature(features: Tensor) -> float:
    return float(torch.linalg.matrix_norm(features, 2) ** 2 / len(features))


@pytest.mark.parametrize(("make", "steps"), [(quadratic, 250), (robust, 500)])
def test_theorem_4(make: Callable[[Tensor, Tensor], Objective], steps: int) -> None:
    """``E min ||f'||^2 <= 2 f0 / sqrt(T+1) + L G^2 / (2 sqrt(T+1)) + 4 L^2 G^2 (1 - k/d) / ((k/d)^2 (T+1))``.

    Alg. 2 with ``eta = 1 / sqrt(T+1)`` on two ranks that draw terms of their own; G^2 is the largest mean squared norm
    that the averaged gradient had. T is large enough for the bound to demand progress: to a quarter of the start. The
    bound is loose, so the same without error feedback has to do worse.
    """
    dim, ranks = 48, 2
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(256, dim, generator=generator) * torch.logspace(0, -0.7, dim)
    objective = make(features, 0.1 * torch.randn(dim, generator=generator))
    start = torch.zeros(dim)
    least, bounds = [], []
    for seed in range(2):
        norms, second_moments = run_local(ranks, lambda t, seed=seed: _descend(t, objective, start, steps, seed))[0]
        root, share, smooth = math.sqrt(steps + 1), 0.5, objective.smoothness
        variance = max(second_moments)
        bounds.append(
            2 * objective.value(start) / root
            + smooth * variance / (2 * root)
            + 4 * smooth**2 * variance * (1 - share) / (share**2 * (steps + 1))
        )
        least.append(min(norms))
    assert np.mean(bounds) < 0.25 * norms[0], (np.mean(bounds), norms[0])
    assert np.mean(least) < np.mean(bounds), (least, bounds)
    without_feedback, _ = run_local(ranks, lambda t: _descend(t, objective, start, steps, 0, forgets=True))[0]
    assert 2 * least[0] < min(without_feedback), (least, min(without_feedback))


def _descend(
    transport: Transport, objective: Objective, start: Tensor, steps: int, seed: int, forgets: bool = False
) -> tuple[list[float], list[float]]:
    """Squared norm of the gradient, and mean squared norm of the averaged stochastic gradient, before every step."""
    config = SketchConfig.paper(rows=5, cols=48, k=len(start) // 2, candidates="heavymix", momentum=0.0, seed=seed)
    exchange = SketchedAllreduce(config, len(start), transport)
    draw = torch.Generator().manual_seed(100 * seed + transport.rank)
    w, rate, norms, second_moments = start.clone(), 1 / math.sqrt(steps + 1), [], []
    for _ in range(steps):
        gradients = objective.gradients(w)
        mean = gradients.mean(0)
        spread = float((gradients - mean).square().sum(1).mean())
        norms.append(float(mean.square().sum()))
        second_moments.append(norms[-1] + spread / (BATCH * transport.size))
        drawn = torch.randint(len(gradients), (BATCH,), generator=draw)
        update = exchange.step(rate * gradients[drawn].mean(0))
        w[update.indices] -= update.values
        if forgets:
            exchange.residual.zero_()
    return norms, second_moments
