"""Patterns of users' training scripts, over every transport: no rank drifts, none waits in silence."""

from __future__ import annotations

import pytest

from tests.support.harness import launch
from tests.support.patterns import CHECKS
from tests.support.worlds import Job, register

WORLDS = [("torch", 3), ("mpi", 3), ("horovod-gloo", 3), ("horovod-mpi", 2)]
ON_PROCESSES = [
    pytest.param(register(kind, ranks, "tests.support.patterns:check_all"), id=f"{kind}-{ranks}")
    for kind, ranks in WORLDS
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_on_threads(check, ranks: int) -> None:
    needs_others = "drift" in check.__name__ or "forgotten" in check.__name__
    if ranks > 1 or not needs_others:  # one rank differs from nobody
        launch("local", ranks, f"{check.__module__}:{check.__name__}", timeout_s=60)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("job", ON_PROCESSES)
def test_on_processes(job: Job) -> None:
    assert job.results() == [len(CHECKS)] * job.world.ranks
