"""The exchange over real processes: equal to threads, and equal on all ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hvd_sketch.config import SketchConfig
from tests.support.harness import launch
from tests.support.plain import PlainSketchedSGD
from tests.support.targets import integer_gradient
from tests.support.worlds import register

pytestmark = pytest.mark.multiprocess

WORLDS = [
    *(("torch", ranks) for ranks in (1, 2, 3, 4)),
    *[("mpi", 4), ("mpi", 3), ("horovod-gloo", 2), ("horovod-mpi", 2)],
]
DIM, STEPS = 1500, 5
INTEGERS = {"cols": 160, "k": 25, "momentum": 0.0}
FEW_BITS = {"oversample": 1, "momentum": 0.0, "value_bits": 4, "table_bits": 8}  # summed in rank order always
CASES: list[dict[str, Any]] = [
    {"dim": 20_011, "steps": 4, "config": {"cols": 900, "k": 150, "deterministic": True}},
    {"dim": 20_011, "steps": 4, "config": {"cols": 900, "k": 20, "deterministic": True, "candidates": "heavymix"}},
    {"dim": 200_003, "steps": 3, "config": {"cols": 9000, "k": 20_000, "oversample": 8, "deterministic": True}},
    {"dim": 20_011, "steps": 4, "config": {"cols": 900, "k": 300, **FEW_BITS}},
    {"dim": 20_011, "steps": 4, "config": {"k": 300, "candidates": "nominate", **FEW_BITS}},
    {"dim": 20_011, "steps": 4, "config": {"k": 600, "candidates": "random", **FEW_BITS}},
    {"dim": DIM, "steps": STEPS, "config": INTEGERS, "integers": True},
    {"dim": 2, "steps": 2, "config": {"cols": 8, "k": 1}, "integers": True},
]


TARGET = "tests.support.targets:everything"
JOBS = {world: register(*world, TARGET, cases=CASES) for world in WORLDS}


@cache
def on_threads(ranks: int) -> list[dict[str, Any]]:
    return launch("local", ranks, TARGET, timeout_s=240, cases=CASES)


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_after_fifty_steps_all_ranks_hold_the_same_bits(kind: str, ranks: int) -> None:
    parameters = [result["parameters"] for result in JOBS[kind, ranks].results()]
    assert torch.isfinite(parameters[0]).all()
    assert all(torch.equal(parameters[0], other) for other in parameters[1:])


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
@pytest.mark.parametrize("case", range(6))
def test_deterministic_sums_give_the_bits_of_threads(kind: str, ranks: int, case: int) -> None:
    for ours, local in zip(JOBS[kind, ranks].results(), on_threads(ranks), strict=True):
        ours, local = ours["cases"][case], local["cases"][case]
        for name in ("indices", "values"):
            assert all(map(torch.equal, ours[name], local[name]))
        assert torch.equal(ours["residual"], local["residual"]) and torch.equal(ours["velocity"], local["velocity"])
        assert ours["records"] == local["records"], "the ledger does not depend on the transport"


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_whole_numbers_agree_with_the_plain_algorithm(kind: str, ranks: int) -> None:
    plain = PlainSketchedSGD(SketchConfig.paper(**INTEGERS), DIM, ranks)
    for step in range(STEPS):
        expected = plain.step([integer_gradient(DIM, rank, step).tolist() for rank in range(ranks)])
        for result in JOBS[kind, ranks].results():
            assert result["cases"][6]["indices"][step].tolist() == list(expected)
            assert result["cases"][6]["values"][step].tolist() == torch.tensor(list(expected.values())).tolist()
