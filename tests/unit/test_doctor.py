"""``hvd-sketch doctor`` names what is wrong, and how to mend it. Every fault is provoked in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_sketch.commands import doctor, findings

TIMEOUT_S = 240
HOSTS = "good slots=2\n# a comment\n\nother slots=2\nbare\n"
SSH = '[ "$3" = good ] && exec sh -c "$4"\n[ "$3" = other ] && echo 0.0.9 2.13.0 2.4 && exit 0\nexit 255'


def examined(*arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status, and the findings by name."""
    command = [sys.executable, "-m", "hvd_sketch", "doctor", "--json", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def command(folder: Path, name: str, script: str) -> None:
    """A program on PATH that answers as another version would."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.multiprocess
def test_a_healthy_machine(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.txt"
    status, found = examined("--bundle", str(bundle))
    assert status == 0 and {finding["state"] for finding in found.values()} <= {"ok", "note"}, found
    assert {"versions", "MPI", "Horovod", "threads", "kernel cache", "disk"} <= found.keys()
    for transport in ("torch", "mpi", "horovod"):
        assert found[f"self-test, {transport}"]["state"] == "ok", found
    text = bundle.read_text()
    assert "Open MPI" in text and "self-test, mpi: 2 ranks agree" in text
    assert sys.prefix not in text and socket.gethostname() not in text


def test_everything_that_is_wrong_is_named(tmp_path: Path) -> None:
    """Open MPI 5 with horovodrun, another MPI than mpi4py's, too many threads, no cache, hosts without the package."""
    programs, hosts = tmp_path / "bin", tmp_path / "hosts"
    command(programs, "mpirun", 'echo "mpirun (Open MPI) 5.0.3"')
    command(programs, "ssh", SSH)
    hosts.write_text(HOSTS)
    status, found = examined(
        *("--no-self-test", "--hosts", str(hosts)),
        PATH=f"{programs}:{os.environ['PATH']}",
        LOCAL_WORLD_SIZE="99",
        NUMBA_CACHE_DIR="/dev/null/kernels",
    )
    assert status == 1
    wrong = {name: (finding["told"], finding["mend"]) for name, finding in found.items() if finding["state"] == "wrong"}
    assert wrong.keys() == {"MPI", "horovodrun --mpi", "threads", "kernel cache", "host other", "host bare"}
    for name, told, mend in (
        ("MPI", "mpirun is of Open MPI 5.0.3", "first on PATH"),
        ("horovodrun --mpi", "Open MPI 5.0.3 does not take", "--gloo"),
        ("threads", "99 ranks", "OMP_NUM_THREADS=1"),
        ("kernel cache", "/dev/null/kernels", "warm-up"),
        ("host other", "0.0.9", "same versions"),
        ("host bare", "no hvd_sketch", "same path"),
    ):
        assert told in wrong[name][0] and mend in wrong[name][1], wrong[name]


def test_what_is_not_installed_is_a_note(tmp_path: Path) -> None:
    for package in ("horovod", "mpi4py", "triton"):
        (tmp_path / f"{package}.py").write_text(f'raise ImportError("{package} is not here")')
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    status, found = examined("--no-self-test", PYTHONPATH=path)
    assert status == 0
    for name, package, mend in (("MPI", "mpi4py", "pip"), ("Horovod", "horovod", "torchrun"), ("GPU", "Triton", "gpu")):
        assert found[name]["state"] == "note" and package in found[name]["told"] and mend in found[name]["mend"], found


def test_interfaces_of_different_speed(tmp_path: Path) -> None:
    for name, state, speed in (("eth0", "up", "1000"), ("ib0", "up", "100000"), ("eth1", "down", ""), ("lo", "up", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
        (tmp_path / name / "speed").write_text(f"{speed}\n")
    found = findings.network(tmp_path)
    assert found.state == "note" and "eth0 1000 Mbit/s, ib0 100000 Mbit/s" in found.told and "ib0" in found.mend
    (tmp_path / "ib0" / "operstate").write_text("down\n")
    assert findings.network(tmp_path).state == "ok"


@pytest.mark.parametrize(
    ("printed", "launcher"),
    [
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to", "Open MPI 4.1.8"),
        ("HYDRA build details:\n    Version:                                 4.2.0\n", "MPICH 4.2.0"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "Intel MPI 2021.11"),
        ("something else", None),
        (None, None),
    ],
)
def test_whose_mpirun_it_is(printed: str | None, launcher: str | None) -> None:
    assert findings.launcher_version(printed) == launcher


def test_a_job_that_fails_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('the network is down', file=sys.stderr); sys.exit(3)"
    found = doctor.run_job("self-test", [sys.executable, "-c", program])
    assert found.state == "wrong" and found.told == "status 3: the network is down" and sys.executable in found.mend
    monkeypatch.setattr(doctor, "SELF_TEST_S", 1)
    hangs = doctor.run_job("self-test", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert hangs.state == "wrong" and "did not finish in 1 s" in hangs.told


def test_a_bundle_has_no_path_and_no_host(tmp_path: Path) -> None:
    told = f"no such file: /home/someone/work/train.py on {socket.gethostname()}"
    found = [findings.Finding("host node17.example.org", "wrong", told, "mend /opt/mpi/bin")]
    doctor.write_bundle(found, tmp_path / "bundle", names=False)
    text = (tmp_path / "bundle").read_text()
    for name in ("someone", socket.gethostname(), "node17", "example", "/opt"):
        assert name not in text
    doctor.write_bundle(found, tmp_path / "bundle", names=True)
    assert told in (tmp_path / "bundle").read_text()
