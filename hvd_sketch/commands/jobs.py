"""Jobs of two ranks under every launcher that is here: ``hvd-sketch doctor``'s self-tests."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple

from hvd_sketch.commands.finding import Finding, imported, output, telling_line
from hvd_sketch.commands.libraries import OPEN_MPI, launcher_version
from hvd_sketch.transport.open_mpi import locate_open_mpi

TIME_LIMIT_S = 90
END_LIMIT_S = 10  # for a job that was told to end
RANKS = "2"
DETAILS_LINES = 20
OPEN_MPI_OPTIONS = ("--oversubscribe", "--bind-to", "none")
# What launchers tell the processes that they start. Settings of the user, such as OMPI_MCA_btl, are not among them.
OF_LAUNCHERS = (
    *("OMPI_APP_", "OMPI_ARGV", "OMPI_COMM", "OMPI_FILE_", "OMPI_FIRST_", "OMPI_NUM_APP", "OMPI_UNIVERSE_"),
    *("OMPI_MCA_ess", "OMPI_MCA_orte_", "OMPI_MCA_pmix", "OMPI_MCA_plm", "PRTE_LAUNCHED", "PMIX_", "PMI_"),
    *("MPI_LOCAL", "HYDI_", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    *("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_", "HOROVOD_CROSS_", "HOROVOD_GLOO_", "HOROVOD_HOSTNAME"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "MASTER_ADDR", "MASTER_PORT"),
)
OF_TORCHRUN = ("RANK", "WORLD_SIZE")
IN_ALLOCATION = ("SLURM_JOB_ID", "SLURM_JOBID")
ALLOCATION = (*IN_ALLOCATION, "SLURM_CONF", "SLURM_CLUSTER_NAME")  # srun joins the job by them


class Job(NamedTuple):
    """A command line that is to end with status 0.

    Attributes:
        launcher: as a user calls it.
        package: that its ranks need.
        line: the words of the command line.
    """

    launcher: str
    package: str
    line: Sequence[str]


def self_tests() -> Iterator[Finding]:
    """Two ranks under every launcher exchange a few steps. What cannot be tried is a note."""
    for job in jobs():
        name, program = f"self-test, {job.launcher}", job.line[0]
        if shutil.which(program) is None:
            yield Finding(name, "note", f"no {program} on PATH")
        elif find_spec(job.package) is None:
            yield Finding(name, "note", f"{job.package} is not installed")
        elif program == "srun" and not any(os.environ.get(variable) for variable in IN_ALLOCATION):
            yield Finding(name, "note", "not tried outside of a Slurm job", "salloc -n 2, then hvd-sketch doctor there")
        else:
            yield run_job(name, job.line)


def jobs() -> list[Job]:
    """One for each launcher, those among it that are not here; without srun where that is not."""
    python = sys.executable
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS)
    vendor = launcher_version(output("mpirun", "--version")) or ""
    options = OPEN_MPI_OPTIONS if vendor.startswith(OPEN_MPI) else ()
    mpi_rank = (python, "-m", "mpi4py", *_of_a_rank("mpi"))
    found = [
        Job("torchrun", "torch", (*torchrun, *_of_a_rank("torch"))),
        Job("mpirun", "mpi4py", ("mpirun", "-n", RANKS, *options, *mpi_rank)),
    ]
    for controller in controllers():
        line = ("horovodrun", f"--{controller}", "-np", RANKS, python, *_of_a_rank("horovod"))
        found.append(Job(f"horovodrun --{controller}", "horovod", line))
    if shutil.which("srun"):
        found.append(Job("srun", "mpi4py", ("srun", "--overlap", "-n", RANKS, *mpi_rank)))
    return found


def controllers() -> list[str]:
    """The options of horovodrun that this Horovod can follow."""
    hvd = imported("horovod.torch", before=locate_open_mpi)
    if isinstance(hvd, Exception):
        return ["gloo"]  # one self-test says that it is not here, or fails
    return ["gloo"] * hvd.gloo_built() + ["mpi"] * (hvd.mpi_built() and shutil.which("mpirun") is not None)


def _of_a_rank(transport: str) -> tuple[str, ...]:
    return ("-m", "hvd_sketch.commands.self_test", transport, RANKS)


def run_job(name: str, line: Sequence[str]) -> Finding:
    """A command that is to end with status 0, in a time limit; all its processes end with it."""
    by_hand = f"run it yourself: {shlex.join(line)}"
    process = subprocess.Popen(
        line,
        env=environment_of_a_job(line[0]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed = "".join(process.communicate(timeout=TIME_LIMIT_S))
    except subprocess.TimeoutExpired:
        told = f"{RANKS} ranks did not finish in {TIME_LIMIT_S} s"
        return Finding(name, "wrong", told, by_hand, _last_lines(_ended(process)))
    if process.returncode:
        told = f"status {process.returncode}: {telling_line(printed)}"
        return Finding(name, "wrong", told, by_hand, _last_lines(printed))
    return Finding(name, "ok", f"{RANKS} ranks agree, nothing is lost")


def environment_of_a_job(program: str) -> dict[str, str]:
    """This process's variables without those of the launcher that may have started it: a job of its own."""
    kept = ALLOCATION if program == "srun" else ()
    of_this_job = [
        name for name in os.environ if name in OF_TORCHRUN or (name.startswith(OF_LAUNCHERS) and name not in kept)
    ]
    return {
        **{name: value for name, value in os.environ.items() if name not in of_this_job},
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def _ended(process: subprocess.Popen[str]) -> str:
    """End a job and what it has started: launchers end their ranks when told so. Returns what was printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return "".join(process.communicate(timeout=END_LIMIT_S))
        except subprocess.TimeoutExpired:
            continue
    return ""


def _last_lines(printed: str) -> str:
    return "\n".join(printed.splitlines()[-DETAILS_LINES:])
