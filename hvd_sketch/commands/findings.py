"""What ``hvd-sketch doctor`` looks at: each function looks at one thing and says what it found and how to mend it."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hvd_sketch.commands.finding import Finding, finished, output, telling_line
from hvd_sketch.commands.libraries import backends, gpu, horovod, mpi
from hvd_sketch.local_ranks import local_ranks
from hvd_sketch.version import __version__

PACKAGES = ("torch", "numpy", "numba", "mpi4py", "horovod", "triton")
INTERFACES = Path("/sys/class/net")
LEAST_FREE_BYTES = 1 << 30
LOOPBACK = "lo"
BINDERS = (
    *("SLURM_CPU_BIND", "SLURM_CPUS_PER_TASK", "OMPI_MCA_hwloc_base_binding_policy"),
    *("PRTE_MCA_hwloc_default_binding_policy", "I_MPI_PIN_DOMAIN", "HYDRA_BINDING"),
)
OPENMP_BINDERS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
HOSTS_AT_ONCE = 32
SSH_FAILED = 255
MARKER = "hvd_sketch versions:"


def all_findings() -> Iterator[Finding]:
    """Of this process's machine and environment, in a fixed order. Starts no job."""
    yield from (
        packages(),
        mpi(),
        *horovod(),
        backends(),
        transport(),
        gpu(),
        threads(),
        binding(),
        network(),
        kernel_cache(),
        disk(),
    )


def packages() -> Finding:
    """Versions of what the package stands on."""
    told = [f"hvd_sketch {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return Finding("versions", "ok", ", ".join(told))


def transport() -> Finding:
    """What ``transport="auto"`` would choose in this process."""
    from hvd_sketch.transport.choice import choose

    name, reason = choose()
    return Finding('transport="auto"', "ok", f"{name}: {reason}")


def threads() -> Finding:
    """Whether the ranks of this host have more threads than cores.

    A process that may run on some of the cores only was bound there, and other ranks to other cores: it is looked at
    alone. Where OpenMP has bound it, its first thread has one core, which says nothing about the process.
    """
    import torch

    all_cores = os.cpu_count() or 1
    cores = all_cores if openmp_binds() else len(os.sched_getaffinity(0))
    each, local = torch.get_num_threads(), local_ranks()
    if cores < all_cores:
        told, ranks = f"{each} of this process, which may run on {cores} of {all_cores} cores", 1
    elif local is None:
        told, ranks = f"{each} of this process, which no launcher has started, on {cores} cores", 1
    else:
        told, ranks = f"{local} rank{'s' * (local > 1)} of {each} on {cores} cores of this host", local
    if ranks * each <= cores:
        return Finding("threads", "ok", told)
    mend = f"set OMP_NUM_THREADS={max(cores // ranks, 1)}, or give the launchers in launch/ --threads"
    return Finding("threads", "wrong", told + ": more threads than cores", mend)


def binding() -> Finding:
    """The cores on which this process may run, and the variables that can have bound it or its threads."""
    told = f"may run on {ranges(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    asked = [f"{name}={os.environ[name]}" for name in (*BINDERS, *OPENMP_BINDERS) if os.environ.get(name)]
    told = ", ".join([told, *asked])
    if openmp_binds() and (local_ranks() or 1) > 1:
        mend = (
            "unset them, or let the launcher give each rank cores of its own: every rank binds to the first it may use"
        )
        return Finding("binding", "note", told, mend)
    return Finding("binding", "ok", told)


def openmp_binds() -> bool:
    """Whether variables ask OpenMP to bind threads to cores."""
    asked = [os.environ.get(name, "").lower() for name in OPENMP_BINDERS]
    return asked[0] != "false" and any(value not in ("", "none", "disabled") for value in asked)


def ranges(numbers: set[int]) -> str:
    """Whole numbers as ``0-3,8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def network(root: Path = INTERFACES) -> Finding:
    """Interfaces that are up, and their speeds in Mbit/s where the kernel knows them."""
    speeds: dict[str, int | None] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name != LOOPBACK and _read(folder / "operstate") == "up":
            speed = _read(folder / "speed")
            speeds[folder.name] = int(speed) if speed.isdigit() else None
    told = ", ".join(f"{name} {speed or 'of unknown speed'}{' Mbit/s' * bool(speed)}" for name, speed in speeds.items())
    known = {speed for speed in speeds.values() if speed}
    if len(known) > 1:
        fastest = max(speeds, key=lambda name: speeds[name] or 0)
        mend = f"name the one to use: launch/torchrun.sh --interface {fastest}, or GLOO_SOCKET_IFNAME={fastest}"
        return Finding("interfaces", "note", told + ": of different speeds", mend)
    return Finding("interfaces", "ok", told or "none is up but the loopback")


def kernel_cache() -> Finding:
    """Whether compiled kernels can be kept, and are there."""
    import numba

    if numba.config.DISABLE_JIT:
        return Finding("kernel cache", "wrong", "NUMBA_DISABLE_JIT is set: no kernel is compiled", "unset it")
    mend = "set NUMBA_CACHE_DIR to a folder that every rank can write, then run hvd-sketch warm-up"
    try:
        from hvd_sketch.warm_up import cached_kernels, is_warm

        folder = Path(str(cached_kernels()[0].stats.cache_path))
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"doctor-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError, IndexError) as error:
        return Finding("kernel cache", "wrong", f"cannot be written: {error}", mend)
    asked = os.environ.get("NUMBA_CACHE_DIR")
    if asked and not folder.is_relative_to(asked):
        told = f"NUMBA_CACHE_DIR={asked} cannot be written, kernels are kept in {folder}"
        return Finding("kernel cache", "wrong", told, mend)
    if is_warm():
        return Finding("kernel cache", "ok", f"compiled, in {folder}")
    return Finding("kernel cache", "note", f"not compiled yet, in {folder}", "hvd-sketch warm-up (20 s)")


def disk() -> Finding:
    """Room for checkpoints and records, in the current folder."""
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_FREE_BYTES:
        return Finding("disk", "note", f"{free / 1e9:.1f} GB are free here", "make room before checkpoints are written")
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB are free here")


def hosts(names: Sequence[str]) -> list[Finding]:
    """Whether other hosts have this package, in equal versions, at the place of this Python. By ssh, all at once."""
    if not names:
        return []
    versions = "hvd_sketch.__version__, torch.__version__, numpy.__version__"
    command = [sys.executable, "-c", f"import hvd_sketch, torch, numpy; print({MARKER!r}, {versions})"]
    here = _marked(output(*command) or "")
    with ThreadPoolExecutor(HOSTS_AT_ONCE) as pool:
        return list(pool.map(partial(_host, line=shlex.join(command), here=here), names))


def _host(name: str, line: str, here: str) -> Finding:
    """One of the hosts, of which ``line`` prints the versions."""
    done = finished("ssh", "-o", "BatchMode=yes", name, line)
    if done is None or done.returncode == SSH_FAILED:
        told = f"no answer by ssh{': ' * bool(done)}{telling_line(done.stderr) if done else ''}"
        return Finding(f"host {name}", "wrong", told, "ssh without a password must reach every host from this one")
    if done.returncode:
        told = f"no hvd_sketch at this Python's path: {telling_line(done.stderr)}"
        mend = "install hvd_sketch in an environment at the same path on every host"
        return Finding(f"host {name}", "wrong", told, mend)
    there = _marked(done.stdout)
    if there != here:
        told = f"hvd_sketch, torch, numpy are {there} there and {here} here"
        return Finding(f"host {name}", "wrong", told, "install the same versions on every host")
    return Finding(f"host {name}", "ok", f"hvd_sketch, torch, numpy {there}")


def _marked(printed: str) -> str:
    """What follows the marker; a host's ``.bashrc`` may print before it, and its ``.bash_logout`` behind it."""
    lines = printed.rpartition(MARKER)[2].splitlines()
    return lines[0].strip() if lines else ""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a link that is down has no speed
        return ""
