"""Patterns of users' training scripts, over every transport: no rank drifts, none waits in silence."""

from __future__ import annotations

import pytest

from tests.support import patterns
from tests.support.harness import launch

CHECKS = [value for name, value in vars(patterns).items() if name.startswith("check_") and name != "check_all"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_on_threads(check, ranks: int) -> None:
    needs_others = "drift" in check.__name__ or "forgotten" in check.__name__
    if ranks > 1 or not needs_others:  # one rank differs from nobody
        launch("local", ranks, f"tests.support.patterns:{check.__name__}", timeout_s=60)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "ranks"), [("mpi", 2), ("mpi", 3), ("horovod-gloo", 2), ("horovod-gloo", 3), ("horovod-mpi", 2)]
)
def test_on_processes(kind: str, ranks: int) -> None:
    assert launch(kind, ranks, "tests.support.patterns:check_all", timeout_s=300) == [len(CHECKS)] * ranks
