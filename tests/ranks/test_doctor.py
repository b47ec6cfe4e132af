"""The self-tests of ``hvd-sketch doctor``: real jobs of two ranks."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from hvd_sketch.commands import jobs
from tests.support.harness import run_command

pytestmark = pytest.mark.multiprocess
LIMIT_S = 240
SLURM = ["SLURM_JOB_ID=1", "SLURM_JOBID=1", "SLURM_JOB_NODELIST=nowhere", "SLURM_TASKS_PER_NODE=2", "SLURM_NNODES=1"]
ALONE = """while [ "$1" != "$RANK_PROGRAM" ]; do shift; done
exec "$@"
"""
SRUN = """shift
exec "$MPIRUN" --oversubscribe --bind-to none "$@"
"""


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}")
    (folder / name).chmod(0o755)


@pytest.mark.daily
def test_a_healthy_machine_looked_at_by_all_ranks_of_a_job(tmp_path: Path) -> None:
    """Both ranks of a job under torchrun, mpirun and what looks like Slurm run it: one looks, prints and writes."""
    file, bundle = tmp_path / "found.json", tmp_path / "bundle.txt"
    doctor = f"{sys.executable} -m hvd_sketch doctor --json --bundle {bundle} >>{file}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line = ["mpirun", "-n", "1", "--bind-to", "none", "env", *SLURM, *torchrun, "sh", "-c", doctor]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    status, printed = run_command(line, LIMIT_S, **root)
    assert status == 0, printed + file.read_text()
    found = {finding["name"]: finding for finding in json.loads(file.read_text())}
    assert {finding["state"] for finding in found.values()} <= {"ok", "note"}, found
    assert {"versions", "MPI", "Horovod", "threads", "binding", "kernel cache", "disk"} <= found.keys()
    assert found['transport="auto"']["told"].startswith("torch")
    assert "built with MPI, Gloo" in found["Horovod"]["told"] and "MPI" in found["Horovod's controller"]["told"]
    for launcher in ("torchrun", "mpirun", "horovodrun --gloo", "horovodrun --mpi"):
        assert found[f"self-test, {launcher}"]["state"] == "ok", found
    text = bundle.read_text()
    assert "Open MPI" in text and "self-test, mpirun: 2 ranks agree" in text
    assert sys.prefix not in text and socket.gethostname() not in text


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_rank_that_raises_is_told_with_its_error(launcher: str, tmp_path: Path) -> None:
    """Launchers end with rulers and with words of their own."""
    (tmp_path / "broken.py").write_text("raise OSError('the network is down')")
    (job,) = [job for job in jobs.jobs() if job.launcher == launcher]
    start = job.line[: job.line.index("-m", 1 + job.line.index("-m") if launcher == "torchrun" else 0)]
    runner = ["-m", "mpi4py"] if launcher == "mpirun" else []
    found = jobs.run_job("self-test", [*start, *runner, str(tmp_path / "broken.py")])
    # Both ranks write at the same time: one's first line may stand behind the other's last.
    assert found.state == "wrong" and found.told.startswith("status 1: OSError: the network is down"), found
    assert len(found.details.splitlines()) == jobs.DETAILS_LINES and str(tmp_path) in found.mend


def test_launchers_of_another_mpi_and_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an mpirun starts ranks that do not find each other, each of them is alone, and nothing else fails."""
    monkeypatch.setenv("MPIRUN", str(Path(sys.executable).with_name("mpirun")))
    monkeypatch.setenv("RANK_PROGRAM", sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command(tmp_path, "mpirun", 'if [ "$1" = --version ]; then echo "HYDRA Version: 4.2.0"; exit 0; fi\n' + ALONE)
    command(tmp_path, "srun", SRUN)
    by_launcher = {job.launcher: job.line for job in jobs.jobs()}
    assert "--oversubscribe" not in by_launcher["mpirun"]
    alone = jobs.run_job("mpirun", by_launcher["mpirun"])
    assert alone.state == "wrong" and "expected 2 ranks, rank 0 finds 1" in alone.told, alone
    slurm = jobs.run_job("srun", by_launcher["srun"])
    assert slurm.state == "ok", slurm


def test_srun_is_tried_in_an_allocation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no mpirun, no horovodrun
    monkeypatch.setattr(jobs, "run_job", lambda name, line: jobs.Finding(name, "ok", line[0]))
    command(tmp_path, "srun", "exit 0")
    states = {finding.name: (finding.state, finding.told) for finding in jobs.self_tests()}
    assert states["self-test, mpirun"] == ("note", "no mpirun on PATH")
    assert states["self-test, srun"] == ("note", "not tried outside of a Slurm job")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [finding.state for finding in jobs.self_tests() if finding.name == "self-test, srun"] == ["ok"]


def test_a_job_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TIME_LIMIT_S", 1)
    script = f"sleep 60 & echo $! >{tmp_path}/child; echo waiting; wait; echo done"
    found = jobs.run_job("self-test", ["sh", "-c", script])
    assert found.state == "wrong" and "did not finish in 1 s" in found.told and found.details == "waiting"
    process = Path("/proc", (tmp_path / "child").read_text())
    deadline_s = time.monotonic() + 10
    while process.exists() and "Z" not in (process / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline_s, "the child still runs"
        time.sleep(0.05)


def test_a_job_has_the_environment_of_its_own_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "OMPI_MCA_orte_tag": "x", "HOROVOD_GLOO_IFACE": "x"}
    job |= {"SLURM_NTASKS": "4", "PMIX_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    own = {"OMPI_MCA_btl": "tcp,self", "HOROVOD_CYCLE_TIME": "5", "NCCL_DEBUG": "INFO", "RANKING": "x"}
    for name, value in (job | own | {"SLURM_JOB_ID": "7"}).items():
        monkeypatch.setenv(name, value)
    of_mpirun, of_srun = jobs.environment_of_a_job("mpirun"), jobs.environment_of_a_job("srun")
    assert not (job | {"SLURM_JOB_ID": "7"}).keys() & of_mpirun.keys() and own.items() <= of_mpirun.items()
    assert of_srun["SLURM_JOB_ID"] == "7" and not job.keys() & of_srun.keys()
