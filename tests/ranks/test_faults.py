"""A rank that fails in the middle of training ends the job on all ranks, within 30 s and with a non-zero status.

One that has left without a failure does, too, and one that hangs is named.
"""

from __future__ import annotations

import sys
import time

import pytest

from hvd_sketch.transport.stall import ABORT_VARIABLE, STALL_VARIABLE, process_watch
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
        (LAUNCHERS["torch"], "torch", 3, "leave"),
        (WITHOUT_LAUNCHER, "torch", 3, "raise"),
        (WITHOUT_LAUNCHER, "torch", 3, "kill"),
        (PLAIN_MPIRUN, "mpi", 2, "raise"),
        (PLAIN_MPIRUN, "mpi", 3, "kill"),
        (PLAIN_MPIRUN, "mpi", 2, "exit"),
        (PLAIN_MPIRUN, "mpi", 3, "leave"),
        (LAUNCHERS["mpi"], "mpi", 2, "exit"),
        (LAUNCHERS["mpi"], "mpi", 2, "kill"),
        (LAUNCHERS["mpi"], "mpi", 2, "leave"),
        (LAUNCHERS["horovod-gloo"], "horovod", 2, "raise"),
        (LAUNCHERS["horovod-gloo"], "horovod", 3, "kill"),
        (LAUNCHERS["horovod-gloo"], "horovod", 2, "exit"),
        (LAUNCHERS["horovod-gloo"], "horovod", 2, "leave"),
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
    if fault == "leave":
        assert "rank 1" in output


@pytest.mark.parametrize(("launcher", "transport"), [("torch", "torch"), ("mpi", "mpi"), ("horovod-gloo", "horovod")])
def test_a_rank_that_hangs_is_named_and_shows_where_it_is(launcher, transport, tmp_path) -> None:
    job = [sys.executable, "-m", "tests.support.fault_main", transport, "hang", str(tmp_path / "hung_at")]
    limits = {STALL_VARIABLE: "3", ABORT_VARIABLE: "12"}
    status, output = run_command([*LAUNCHERS[launcher], "-n", "3", *job], timeout_s=120, **limits)
    assert status != 0, output
    for rank in (0, 2):
        assert f"rank {rank} of 3 has waited for" in output
    assert "for rank 1, which has not come, in step 3, phase 'agree'" in output
    assert "rank 1 of 3 is late: ranks 0, 2 wait for it" in output and "fault_main.py" in output
    assert f"{ABORT_VARIABLE} is 12" in output


def test_limits_that_are_no_seconds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STALL_VARIABLE, "soon")
    with pytest.raises(ValueError, match=f"{STALL_VARIABLE} must be a number of seconds, 0 for never, got 'soon'"):
        process_watch.__wrapped__()
