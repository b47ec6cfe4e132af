"""One failing rank ends the job, and ranks see what they should."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import script
from tests.support.harness import run_command

JOB_END_LIMIT_S = 30
FAULT = """
import os, pathlib, signal, sys
fault, moment, marker = sys.argv[1:]
names = "RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"
rank = next(os.environ[name] for name in names if name in os.environ)

def reach(here):
    if rank == "1" and moment == here:
        pathlib.Path(marker).touch()
        if fault == "raise":
            raise RuntimeError("boom")
        if fault == "exit":
            sys.exit(3)
        os.kill(os.getpid(), signal.Signals[fault])

reach("before")
"""
FAULT_MPI = """
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
reach("inside")
MPI.COMM_WORLD.Barrier()
"""
FAULT_HOROVOD = """
import horovod.torch as hvd
import torch
hvd.init()
hvd.allreduce(torch.ones(3), name="first")
reach("inside")
hvd.allreduce(torch.ones(3), name="second")
"""
FAULT_TORCH = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
reach("inside")
dist.barrier()
"""


def run_faulty(folder: Path, launcher: list[str], command: list[str], fault: str, moment: str) -> str:
    """The output of a job with a fault, which must end in time, and not with status 0."""
    marker = folder / "marker"
    status, output = run_command(
        [*launcher, "--", *command, fault, moment, str(marker)], timeout_s=120, PYTHONPATH=str(folder)
    )
    assert marker.exists(), output
    assert status != 0, output
    elapsed_s = time.time() - marker.stat().st_mtime
    assert elapsed_s < JOB_END_LIMIT_S, f"the job ended {elapsed_s:.1f} s after its fault:\n{output}"
    return output


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["before", "inside"])
@pytest.mark.parametrize("fault", ["raise", "exit", "SIGKILL", "SIGSEGV"])
def test_failing_rank_ends_the_job_under_mpirun(tmp_path, fault, moment):
    job = script(tmp_path / "job.py", FAULT + FAULT_MPI)
    output = run_faulty(tmp_path, ["launch/mpirun.sh", "-n", "3"], [sys.executable, str(job)], fault, moment)
    assert ("RuntimeError: boom" in output) == (fault == "raise")


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["before", "inside"])
@pytest.mark.parametrize("fault", ["raise", "exit", "SIGKILL", "SIGSEGV"])
def test_failing_rank_ends_the_job_under_torchrun(tmp_path, fault, moment):
    job = script(tmp_path / "job.py", FAULT + FAULT_TORCH)
    output = run_faulty(tmp_path, ["launch/torchrun.sh", "-n", "3"], [sys.executable, str(job)], fault, moment)
    assert ("RuntimeError: boom" in output) == (fault == "raise")


@pytest.mark.multiprocess
@pytest.mark.parametrize("form", [["-m", "job"], ["-c", "import job"]], ids=["module", "command"])
def test_failing_module_or_command_ends_the_job_under_mpirun(tmp_path, form):
    script(tmp_path / "job.py", FAULT + FAULT_MPI)
    run_faulty(tmp_path, ["launch/mpirun.sh", "-n", "3"], [sys.executable, *form], "raise", "inside")


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["before", "inside"])
@pytest.mark.parametrize("fault", ["raise", "exit", "SIGKILL"])
@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_failing_rank_ends_the_job_under_horovodrun(tmp_path, controller, fault, moment):
    job = script(tmp_path / "job.py", FAULT + FAULT_HOROVOD)
    launcher = ["launch/horovodrun.sh", controller, "-n", "2"]
    run_faulty(tmp_path, launcher, [sys.executable, str(job)], fault, moment)


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", ["torchrun.sh", "mpirun.sh", "horovodrun.sh"])
def test_ranks_see_their_threads_and_the_users_variables(tmp_path, launcher):
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys\n"
        "names = 'OMP_NUM_THREADS', 'NUMBA_NUM_THREADS', 'HVD_SKETCH_TEST'\n"
        "ranks = 'RANK', 'HOROVOD_RANK', 'OMPI_COMM_WORLD_RANK'\n"
        "rank = next(os.environ[name] for name in ranks if name in os.environ)\n"
        "open(f'{sys.argv[1]}/{rank}', 'w').write(' '.join(os.environ[name] for name in names))\n"
    )
    status, output = run_command(
        [f"launch/{launcher}", "-n", "2", "--threads", "2", "--", sys.executable, str(job), str(tmp_path)],
        timeout_s=60,
        HVD_SKETCH_TEST="a b",
    )
    assert status == 0, output
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 2 a b"] * 2
