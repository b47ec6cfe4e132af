"""What stochastic rounding of the tables does to an estimate: docs/design.md, "Few-bit tables", as statistical tests.

As in test_theory.py, a statement fails where it is Z standard errors beyond its bound; the seeds are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.candidates.sketch import SketchCandidates
from hvd_sketch.kernels import reference
from hvd_sketch.kernels.reference import CHUNKS, LARGEST_CODES
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import LocalTransport, run_local
from hvd_sketch.transport.metered import MeteredTransport

Z = 4.0
RANKS, DIM, COLS, STEPS = 3, 20_000, 3 * 256, 1500  # 26 coordinates a cell: nearly normal
FOLLOWED = 120  # coordinates whose estimates are looked at
BITS = [4, 8]


@dataclass(frozen=True)
class Run:
    """Of every step, each with hashes and dithers of its own, what one row says.

    Attributes:
        estimates: of the first coordinates, from the few-bit tables: float64 [STEPS, FOLLOWED].
        exact: the same from the tables themselves.
        squares: mean over all cells of the squared rounding error of their sum: float64 [STEPS].
        bounds: mean over all cells of the bound on its variance: float64 [STEPS].
    """

    estimates: np.ndarray
    exact: np.ndarray
    squares: np.ndarray
    bounds: np.ndarray


@cache
def vector_of(rank: int) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(rank))


@cache
def true_sum() -> np.ndarray:
    return torch.stack([vector_of(rank) for rank in range(RANKS)]).double().sum(dim=0).numpy()


def largest_variance(table: Tensor, bits: int) -> float:
    """Mean over the cells of a rank's table, [rows, shards, columns]: scale^2 / 4, from the largest of each chunk."""
    cells = table.double().abs().view(-1, table.shape[-1])
    chunks = cells.view(len(cells), -1, CHUNKS[bits])
    scales = chunks.amax(dim=-1) / LARGEST_CODES[bits] * (1 + 2**-7)
    return float(scales.square().mean() / 4)


def follow(transport: LocalTransport, bits: int) -> Run:
    config = SketchConfig(rows=1, cols=COLS, k=10, table_bits=bits)
    comm = MeteredTransport(transport, CommLedger(), False)
    source = SketchCandidates(config, DIM, comm, torch.device("cpu"))
    rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []
    for step in range(STEPS):
        source.begin(step)
        assert source.sketch is not None
        hash, table = source.sketch.hash, source.sketch.accumulate_(vector_of(transport.rank)).table
        rounded = transport.allgather(source._sum_in_few_bits(bits)).view(hash.table_shape)
        exact = transport.allreduce_(table.clone())
        bound = transport.allreduce_(torch.tensor([largest_variance(table, bits)], dtype=torch.float64))
        found, expected = (reference.estimate(hash, sums, 0, FOLLOWED).double().numpy() for sums in (rounded, exact))
        rows.append((found, expected, float((rounded - exact).double().square().mean()), float(bound)))
    return Run(*map(np.array, zip(*rows, strict=True)))


@cache
def run(bits: int) -> Run:
    return run_local(RANKS, lambda transport: follow(transport, bits), 300)[0]


def z_scores(errors: np.ndarray) -> np.ndarray:
    return errors.mean(axis=0) / (errors.std(axis=0) / np.sqrt(len(errors)))


def excess(values: np.ndarray, bound: float) -> float:
    """By how many standard errors the mean is above the bound."""
    return float((values.mean() - bound) / (values.std() / np.sqrt(len(values))))


@pytest.mark.parametrize("bits", BITS)
def test_a_rows_estimates_stay_unbiased(bits: int) -> None:
    """Of the sum: |mean error| below 5 standard errors for each coordinate; and so is what rounding alone adds."""
    assert np.abs(z_scores(run(bits).estimates - true_sum()[:FOLLOWED])).max() < 5
    assert np.abs(z_scores(run(bits).estimates - run(bits).exact)).max() < 5


@pytest.mark.parametrize("bits", BITS)
def test_the_added_variance_is_below_the_bound(bits: int) -> None:
    """Of a cell: the sum over ranks of scale^2 / 4; an estimate is a cell, up to its sign."""
    whole = run(bits)
    assert excess(whole.squares - whole.bounds, 0) < -Z
    added = (whole.estimates - whole.exact) ** 2
    assert excess(added.mean(axis=1) - whole.bounds, 0) < -Z
    sketch = ((true_sum() ** 2).sum() - true_sum()[:FOLLOWED] ** 2) / COLS
    total = (whole.estimates - true_sum()[:FOLLOWED]) ** 2
    assert excess((total - sketch).mean(axis=1), whole.bounds.mean()) < Z


@pytest.mark.parametrize(("bits", "share"), [(4, 0.024), (8, 1.0e-4)])
def test_the_added_variance_beside_the_sketch_s_own(bits: int, share: float) -> None:
    """With normal cells, and ranks whose vectors are independent: about scale^2 / 6 from each."""
    sketch = (true_sum() ** 2).sum() / COLS
    assert run(bits).squares.mean() / sketch == pytest.approx(share, rel=0.15)


def test_rounding_to_the_nearest_is_biased() -> None:
    """The control: of values below half a scale nothing arrives."""
    values = torch.full((1, 64), 0.4)
    values[0, 0] = 7.0
    rounded = reference.dequantize_sum(reference.quantize(values, 4).unsqueeze(0), 64, 4)
    assert not rounded[0, 1:].any()
