"""torch.compile: models and optimizer steps are compiled, the exchange between them is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from hvd_sketch.transport import run_local
from tests.support.compiled_targets import compiles
from tests.support.worlds import register

TARGETS = "tests.support.compiled_targets"
TWO = register("torch", 2, f"{TARGETS}:compiles", names=["nominated"])
IN_DDP = register("torch", 2, f"{TARGETS}:compiles", names=["nominated"], in_ddp=True)


def assert_compiled(result: dict[str, Any]) -> None:
    torch.testing.assert_close(result["compiled"], result["plain"], rtol=1e-5, atol=1e-6)
    assert result["graphs"] >= 3, "forward pass and inner step, at least"
    assert any("GradientExchange.average" in reason for reason in result["breaks"]), result["breaks"]


@pytest.mark.parametrize("compression", ["dense", "sketched"])
def test_on_one_rank(compression: str) -> None:
    (results,) = run_local(1, partial(compiles, names=[compression]), 120)
    assert_compiled(results[compression])


@pytest.mark.multiprocess
def test_on_two_ranks() -> None:
    results = [result["nominated"] for result in TWO.results()]
    for result in results:
        assert_compiled(result)
        assert torch.equal(result["compiled"], results[0]["compiled"])


@pytest.mark.multiprocess
def test_a_compiled_ddp_model_with_our_hook() -> None:
    results = [result["nominated"] for result in IN_DDP.results()]
    for result in results:
        torch.testing.assert_close(result["compiled"], result["plain"], rtol=1e-5, atol=1e-6)
        assert torch.equal(result["compiled"], results[0]["compiled"])
