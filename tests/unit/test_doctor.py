"""``hvd-sketch doctor`` names what is wrong, and how to mend it. Every fault is provoked in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
import torch
from rich.console import Console

from hvd_sketch import warm_up
from hvd_sketch.commands import doctor, finding, findings, libraries
from hvd_sketch.local_ranks import LOCAL_SIZES

TIMEOUT_S = 240
HOSTS = "good slots=2\n# a comment\n\nloud slots=2\nother slots=2\nbare\naway\n"
SSH = """[ "$3" = good ] && exec sh -c "$4"
[ "$3" = loud ] && { printf 'Gr\\374\\337e\\n'; sh -c "$4"; printf 'Bis bald\\n'; exit 0; }
[ "$3" = other ] && echo 0.0.9 2.13.0 2.4 && exit 0
[ "$3" = bare ] && echo "ModuleNotFoundError: No module named 'hvd_sketch'" >&2 && exit 1
echo "ssh: connect to host away port 22: No route to host" >&2
exit 255"""
TOGETHER = """touch "$HERE/$3"
for _ in $(seq 100); do [ "$(ls "$HERE" | wc -l)" = 4 ] && echo together && exit 0; sleep 0.1; done
exit 1"""


def examined(*arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status, and the findings by name."""
    command = [sys.executable, "-m", "hvd_sketch", "doctor", "--json", "--no-self-test", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, {found["name"]: found for found in json.loads(done.stdout)}


def command(folder: Path, name: str, script: str) -> None:
    """A program on PATH that answers as another version would."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_everything_that_is_wrong_is_named(tmp_path: Path) -> None:
    """Open MPI 5 with horovodrun, another MPI than mpi4py's, too many threads, no cache, hosts without the package."""
    programs, hosts = tmp_path / "bin", tmp_path / "hosts"
    command(programs, "mpirun", 'echo "mpirun (Open MPI) 5.0.3"')
    command(programs, "ssh", SSH)
    hosts.write_text(HOSTS)
    status, found = examined(
        *("--hosts", str(hosts)),
        PATH=f"{programs}:{os.environ['PATH']}",
        LOCAL_WORLD_SIZE="99",
        NUMBA_CACHE_DIR="/dev/null/kernels",
    )
    assert status == 1 and found["host good"]["state"] == "ok"
    wrong = {name: (about["told"], about["mend"]) for name, about in found.items() if about["state"] == "wrong"}
    for name, told, mend in (
        ("MPI", "mpirun is of Open MPI 5.0.3", "first on PATH"),
        ("horovodrun --mpi", "Open MPI 5.0.3 does not take", "--gloo"),
        ("threads", "99 ranks", "OMP_NUM_THREADS=1"),
        ("kernel cache", "/dev/null/kernels", "warm-up"),
        ("host other", "0.0.9", "same versions"),
        ("host bare", "No module named 'hvd_sketch'", "same path"),
        ("host away", "No route to host", "ssh without a password"),
    ):
        assert told in wrong[name][0] and mend in wrong.pop(name)[1], found[name]
    assert not wrong


def test_what_is_broken_is_wrong(tmp_path: Path) -> None:
    """mpi4py that was built for MPICH, where Open MPI is; Horovod of another torch; OpenMP that binds ranks."""
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").touch()
    (tmp_path / "horovod" / "torch.py").write_text('raise ImportError("undefined symbol: _ZN2at")')
    status, found = examined(
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
        MPI4PY_MPIABI="mpich",
        OMP_PROC_BIND="spread",
        OMP_NUM_THREADS="1",
        LOCAL_WORLD_SIZE="2",
    )
    assert status == 1 and {name for name, about in found.items() if about["state"] == "wrong"} == {"MPI", "Horovod"}
    mpi, horovod = found["MPI"], found["Horovod"]
    assert "was built for MPICH" in mpi["told"] and "libmpi.so.12" in mpi["told"] and "--no-binary" in mpi["mend"]
    assert "undefined symbol" in horovod["told"] and "this torch" in horovod["mend"]
    assert "OMP_PROC_BIND=spread" in found["binding"]["told"] and "the first" in found["binding"]["mend"]


def test_kernels_that_are_not_compiled_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    found = findings.kernel_cache()
    assert (found.state, found.mend) == ("wrong", "unset it") and "NUMBA_DISABLE_JIT is set" in found.told
    warm_up._marker.cache_clear()
    with pytest.raises(ValueError, match="NUMBA_DISABLE_JIT is set: unset it on every rank"):
        warm_up.warm_up()


def test_what_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, module in (("mpi4py", "mpi4py.MPI"), ("horovod", "horovod.torch"), ("triton", "triton")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
    found = (libraries.mpi(), *libraries.horovod(), libraries.gpu())
    for about, package, mend in zip(found, ("mpi4py", "horovod", "Triton"), ("pip", "torchrun", "gpu"), strict=True):
        assert about.state == "note" and package in about.told and mend in about.mend, about


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
    ("built", "printed", "launcher", "state"),
    [
        ("Open MPI 4.1.8", "mpirun (Open MPI) 4.1.8\n\nReport bugs to", "Open MPI 4.1.8", "ok"),
        ("Open MPI 4.1.8", "mpirun (Open MPI) 5.0.3\n\nReport bugs to", "Open MPI 5.0.3", "wrong"),
        ("Open MPI 5.0.0", "mpirun (Open MPI) 5.0.0rc12\n", "Open MPI 5.0.0", "ok"),
        ("Open MPI 4.1.8", "HYDRA build details:\n    Version:         4.2.0\n", "MPICH 4.2.0", "wrong"),
        ("MPICH 3.4.0", "HYDRA build details:\n    Version:             3.4\n", "MPICH 3.4", "ok"),
        ("MPICH 3.4.0", "HYDRA build details:\n    Version:           4.1a1\n", "MPICH 4.1", "wrong"),
        (
            *("Intel MPI 2021.11.0", "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005"),
            *("Intel MPI 2021.11", "ok"),
        ),
        ("MPICH 4.2.0", "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build", "Intel MPI 2021.11", "note"),
        ("MVAPICH 3.0.0", "HYDRA build details:\n    Version:        4.0.3\n", "MPICH 4.0.3", "note"),
        ("Open MPI 4.1.8", "something else", None, None),
        ("Open MPI 4.1.8", None, None, None),
    ],
)
def test_whether_an_mpirun_is_that_of_an_mpi(
    built: str, printed: str | None, launcher: str | None, state: str | None
) -> None:
    assert libraries.launcher_version(printed) == launcher
    if launcher is not None:
        assert libraries.compared(built, launcher) == state


def test_no_mpirun_is_a_note_where_srun_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert libraries.mpi().state == "wrong"
    command(tmp_path, "srun", "exit 0")
    found = libraries.mpi()
    assert found.state == "note" and "no mpirun, but srun" in found.told and "--mpi=pmix" in found.mend


@pytest.mark.parametrize(
    ("cores", "each", "variables", "state", "told"),
    [
        (16, 16, {}, "ok", "no launcher has started"),
        (16, 4, {"LOCAL_WORLD_SIZE": "4"}, "ok", "4 ranks of 4 on 16 cores"),
        (16, 8, {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "wrong", "4 ranks of 8 on 16 cores"),
        (4, 4, {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "ok", "4 of this process, which may run on 4 of 16 cores"),
        (1, 4, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "wrong", "4 of this process, which may run on 1 of 16 cores"),
        (16, 16, {"SLURM_NTASKS_PER_NODE": "4"}, "ok", "no launcher"),  # of a batch script, before srun
    ],
)
def test_threads_and_cores(
    cores: int, each: int, variables: dict[str, str], state: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*LOCAL_SIZES, "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(findings.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(findings.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr("torch.get_num_threads", lambda: each)
    found = findings.threads()
    assert found.state == state and told in found.told, found
    assert found.state == "ok" or f"OMP_NUM_THREADS={max(cores // 4, 1)}" in found.mend


def test_cores_are_told_as_ranges() -> None:
    assert findings.ranges({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"
    assert findings.ranges(os.sched_getaffinity(0)) in findings.binding().told


@pytest.mark.parametrize(
    ("asked", "built", "state", "told"),
    [
        ("", {"MPI", "Gloo"}, "ok", "MPI, unless horovodrun"),
        ("", {"Gloo"}, "ok", "Gloo, unless horovodrun"),
        ("", set(), "wrong", "none"),
        ("MPI", {"MPI"}, "ok", "MPI, by HOROVOD_CONTROLLER"),
        ("mpi", {"Gloo"}, "wrong", "built without MPI"),
    ],
)
def test_what_horovod_talks_over(
    asked: str, built: set[str], state: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", asked)
    found = libraries.controller({name: name in built for name in ("MPI", "Gloo")})
    assert found.state == state and told in found.told


def test_hosts_are_asked_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four answers when all four were asked."""
    command(tmp_path / "bin", "ssh", TOGETHER)
    (tmp_path / "asked").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path / "asked"))
    monkeypatch.setattr(findings, "output", lambda *command: "together\n")  # the versions here
    found = findings.hosts(["a", "b", "c", "d"])
    assert [about.name for about in found] == ["host a", "host b", "host c", "host d"]
    assert {about.state for about in found} == {"ok"}, found


def test_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    told = "needs hvd_sketch[gpu], not [/tmp/x] and not [red]this[/red]"
    doctor.show([finding.Finding("GPU [0]", "wrong", told, f"mend: {told}")], Console(width=200))
    shown = capsys.readouterr().out
    assert shown.count(told) == 2 and shown.count("GPU [0]") == 2


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("Traceback\n  raise\nValueError: no route\nRuntimeError: peer lost\n=====\n", "ValueError: no route"),
        ("[1]<stderr>:torch.cuda.OutOfMemoryError: 2 GiB\nx.errors.ChildFailedError: \n", "OutOfMemoryError: 2 GiB"),
        ("There are not enough slots\n-----------\n\n", "There are not enough slots"),
        ("======\n123\n", "nothing was printed"),
    ],
)
def test_the_line_that_says_why(printed: str, told: str) -> None:
    assert finding.telling_line(printed) == told


def test_a_gpu_that_torch_does_not_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command(tmp_path, "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3, 550.54.15"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = libraries.gpu()
    assert found.state == "note" and "does not use NVIDIA H100 80GB HBM3, driver 550.54.15" in found.told


def test_the_gpus_and_what_drives_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine without one: what torch would say of it."""
    command(tmp_path, "nvidia-smi", 'echo "550.54.15"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    told = libraries.gpu().told
    assert told.startswith("NVIDIA H100 80GB HBM3, 79 GiB; driver 550.54.15, CUDA 12.8")


@pytest.mark.parametrize("kind", ["absent", "folder", "binary"])
def test_a_host_file_that_cannot_be_read_is_bad_use(tmp_path: Path, kind: str) -> None:
    hosts = tmp_path / "hosts"
    if kind == "folder":
        hosts.mkdir()
    if kind == "binary":
        hosts.write_bytes(bytes(range(128, 256)))
    command = [sys.executable, "-m", "hvd_sketch", "doctor", "--no-self-test", "--hosts", str(hosts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2 and "--hosts" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, ""),
        ({"RANK": "0", "SLURM_PROCID": "2"}, ""),  # of srun torchrun
        ({"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0"}, "OMPI_COMM_WORLD_RANK is 1"),
        ({"RANK": "", "SLURM_PROCID": "3"}, "SLURM_PROCID is 3"),
    ],
)
def test_one_rank_looks_and_the_others_say_that_they_do_not(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in doctor.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert doctor.other_rank() == told


def test_another_rank_says_so() -> None:
    command = [sys.executable, "-m", "hvd_sketch", "doctor"]
    done = subprocess.run(command, env=os.environ | {"RANK": "1"}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (0, "") and "RANK is 1, so that rank 0 alone looks" in done.stderr


def test_a_cache_that_has_no_folder_is_told_with_what_to_set() -> None:
    """As in a container where neither the package's folder nor the home can be written."""
    without = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    nowhere = without | {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    command = [sys.executable, "-m", "hvd_sketch", "--version"]
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "set NUMBA_CACHE_DIR to one that all ranks can write" in done.stderr, done.stderr
