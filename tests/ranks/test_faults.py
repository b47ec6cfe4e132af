"""A rank that fails in the middle of training ends the job on all ranks, within 30 s and with a non-zero status."""

from __future__ import annotations

import sys
import time

import pytest

from tests.support.harness import LAUNCHERS, run_command

pytestmark = pytest.mark.multiprocess
# Without our launch script the transport alone must end the job.
PLAIN_MPIRUN = ["bash", "-c", 'source launch/env.sh && exec mpirun --oversubscribe "$@"', "mpirun"]
# Nobody ends the other ranks: called with -n N COMMAND.
WITHOUT_LAUNCHER = [
    "bash",
    "-c",
    """
    source launch/env.sh
    export WORLD_SIZE=$2 MASTER_ADDR=localhost RANK
    MASTER_PORT=$(python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
    export MASTER_PORT
    for ((RANK = 0; RANK < WORLD_SIZE; RANK++)); do "${@:3}" & pids+=($!); done
    for pid in "${pids[@]}"; do wait $pid || ((failed += 1)); done
    ((failed == 0))
    """,
    "ranks",
]


@pytest.mark.parametrize(
    ("launcher", "transport", "ranks", "fault"),
    [
        (LAUNCHERS["torch"], "torch", 2, "raise"),
        (LAUNCHERS["torch"], "torch", 2, "exit"),
        (LAUNCHERS["torch"], "torch", 3, "kill"),
        (WITHOUT_LAUNCHER, "torch", 3, "raise"),
        (WITHOUT_LAUNCHER, "torch", 3, "kill"),
        (PLAIN_MPIRUN, "mpi", 2, "raise"),
        (PLAIN_MPIRUN, "mpi", 3, "kill"),
        (LAUNCHERS["mpi"], "mpi", 2, "exit"),
        (LAUNCHERS["mpi"], "mpi", 2, "kill"),
        (LAUNCHERS["horovod-gloo"], "horovod", 2, "raise"),
        (LAUNCHERS["horovod-gloo"], "horovod", 3, "kill"),
        (LAUNCHERS["horovod-gloo"], "horovod", 2, "exit"),
        (LAUNCHERS["horovod-mpi"], "horovod", 2, "raise"),
        (LAUNCHERS["horovod-mpi"], "horovod", 2, "kill"),
    ],
)
def test_one_failing_rank_ends_the_job(launcher, transport, ranks, fault, tmp_path) -> None:
    note = tmp_path / "failed_at"
    job = [sys.executable, "-m", "tests.support.fault_main", transport, fault, str(note)]
    status, output = run_command([*launcher, "-n", str(ranks), *job], timeout_s=120)
    assert note.exists(), f"rank 1 did not come to its failure:\n{output}"
    assert status != 0, output
    assert time.time() - float(note.read_text()) < 30, output
    if fault == "raise":
        assert "rank 1 fails on purpose" in output
