"""Transports of one process share a communicator and a hook; what cannot be a transport is refused with a reason."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from tests.support.harness import launch, run_command
from tests.support.worlds import register

pytestmark = pytest.mark.multiprocess

PLAIN_MPIRUN = [f"{sys.prefix}/bin/mpirun", "--oversubscribe"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
JOB_END_LIMIT_S = 60  # most of it starts and 1,100 broadcasts
FAILING_JOB = """
import sys

import torch

sys.excepthook = lambda *error: print("the user's hook saw", error[0].__name__, file=sys.stderr)
from mpi4py import MPI

import hvd_sketch

model = torch.nn.Linear(4, 4)
for epoch in range(1100):
    hvd_sketch.broadcast_parameters(model.state_dict(), 0, "mpi")
if MPI.COMM_WORLD.rank == 1:
    raise RuntimeError("a bug of the user's")
MPI.COMM_WORLD.Barrier()
"""


TARGETS = "tests.support.setup_targets"
MANY = register("mpi", 2, f"{TARGETS}:many_transports", count=1100)
FREED = register("mpi", 3, f"{TARGETS}:freed_with_the_users", cycles=2000)
KEEPS_HOOK = register("mpi", 2, f"{TARGETS}:keeps_the_users_hook", is_last=True)
REFUSED_COMMUNICATORS = register("mpi", 2, f"{TARGETS}:refused_communicators")


# Many transports


def test_transports_on_one_communicator_share_its_duplicate() -> None:
    assert MANY.results() == [{"communicators": 1, "hooks": 1}] * 2


def test_freeing_a_communicator_frees_ours() -> None:
    assert FREED.results() == [{"communicators": 0, "threads": 0}] * 3


def test_a_hook_set_later_is_the_users() -> None:
    assert KEEPS_HOOK.results() == [True] * 2


@pytest.mark.parametrize(
    ("launcher", "ranks"), [(PLAIN_MPIRUN, 3), (["launch/mpirun.sh"], 2)], ids=["mpirun", "launch"]
)
def test_a_failing_rank_ends_the_job_after_many_transports(launcher: list[str], ranks: int, tmp_path) -> None:
    job = tmp_path / "job.py"
    job.write_text(FAILING_JOB)
    start_s = time.monotonic()
    command = [*launcher, "-n", str(ranks), sys.executable, str(job)]
    status, output = run_command(command, timeout_s=120, **AS_ROOT)
    assert status != 0, output
    assert time.monotonic() - start_s < JOB_END_LIMIT_S
    if launcher is PLAIN_MPIRUN:  # mpi4py's runner shows the exception itself
        assert output.count("the user's hook saw RuntimeError") == 1, output
        assert output.count("hvd_sketch: rank 1 failed, ending the job on all ranks") == 1, output


# What is refused


def test_what_is_no_communicator_is_refused() -> None:
    said = REFUSED_COMMUNICATORS.results()
    for rank, messages in enumerate(said):
        for name in ("int", "module", "str"):
            assert messages[name].startswith("TypeError: MPITransport expected a communicator such as MPI.COMM_WORLD")
            assert f"({name}) on rank {rank} of" in messages[name]
        assert messages["inter-communicator"].startswith("ValueError: ") and "Merge()" in messages["inter-communicator"]
        assert messages["freed"].startswith("ValueError: ") and "before the communicator is freed" in messages["freed"]
    assert "COMM_NULL" not in said[0]
    assert said[1]["COMM_NULL"].startswith("ValueError: MPITransport expected a communicator with this rank in it")
    assert "only where `comm != MPI.COMM_NULL`" in said[1]["COMM_NULL"]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("mpi4py.rc.initialize = False; from mpi4py import MPI", "drop the line `mpi4py.rc.initialize = False`"),
        ("from mpi4py import MPI; MPI.Finalize()", "MPI.Finalize() was called on this rank already"),
    ],
    ids=["not initialised", "finalised"],
)
def test_mpi_must_run(before: str, expected: str) -> None:
    """Else the MPI library ends the process, and no Python error says why."""
    program = f"import mpi4py; {before}; import hvd_sketch; hvd_sketch.MPITransport()"
    status, output = run_command([sys.executable, "-c", program], timeout_s=60)
    assert status == 1
    assert "ValueError: transport 'mpi' expected" in output and expected in output


def test_what_is_no_process_set_is_refused() -> None:
    said = launch_unless_refused("horovod-gloo", 2, "tests.support.setup_targets:refused_process_sets")
    for rank, messages in enumerate(said):
        for name in ("int", "list"):
            assert messages[name].startswith("TypeError: HorovodTransport expected an hvd.ProcessSet")
            assert f"({name}) on rank {rank}" in messages[name]
        for name in ("not registered", "registered before a shutdown"):
            assert messages[name].startswith("ValueError: HorovodTransport expected a process set that Horovod knows")
        assert messages["used after a shutdown"] == "ValueError: Horovod has not been initialized; use hvd.init()."
    assert "not in it" not in said[0]
    assert said[1]["not in it"].startswith("ValueError: rank 1 is not in the process set [0]")


def launch_unless_refused(kind: str, ranks: int, target: str) -> list[Any]:
    """A Horovod that begins again after ``hvd.shutdown()`` may look for the others where they were before, and dies.

    One time in four on a busy machine, with nothing of ours in between.
    """
    for _ in range(4):
        try:
            return launch(kind, ranks, target)
        except AssertionError as error:
            if "Connection refused" not in str(error):
                raise
    return launch(kind, ranks, target)
