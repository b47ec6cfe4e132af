"""Exchanges among some of a job's ranks: a process group, a communicator, a Horovod process set."""

from __future__ import annotations

import sys

import pytest
import torch

from hvd_sketch.transport import run_local
from tests.support.group_main import EXCHANGE, FIRST
from tests.support.harness import LAUNCHERS, run_command
from tests.support.targets import run_steps

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("launcher", "kind", "ranks"),
    [
        ("torch", "torch", 4),
        ("mpi", "mpi", 4),
        ("horovod-gloo", "horovod", 3),
        ("horovod-mpi", "horovod", 3),
    ],
)
def test_a_group_exchanges_as_threads_do(launcher: str, kind: str, ranks: int, tmp_path) -> None:
    job = [sys.executable, "-m", "tests.support.group_main", kind, str(tmp_path)]
    status, output = run_command([*LAUNCHERS[launcher], "-n", str(ranks), "--", *job], timeout_s=120)
    assert status == 0, output
    for group in (FIRST, [rank for rank in range(ranks) if rank not in FIRST]):
        for place, local in enumerate(run_local(len(group), lambda t: run_steps(t, **EXCHANGE))):
            result = torch.load(tmp_path / f"{group[place]}.pt", weights_only=False)
            assert (result["rank"], result["size"]) == (place, len(group))
            for name in ("indices", "values"):
                assert all(map(torch.equal, result[name], local[name]))
            assert torch.equal(result["residual"], local["residual"])
