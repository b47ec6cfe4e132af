"""Which transport a name means, and which one a job was started for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.horovod import HorovodTransport
from hvd_sketch.transport.local import local_transports
from hvd_sketch.transport.mpi import MPITransport
from hvd_sketch.transport.stall import connecting, process_watch
from hvd_sketch.transport.torch_groups import LAUNCH_VARIABLES
from hvd_sketch.transport.torch_transport import TorchTransport

logger = logging.getLogger(__name__)
TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "torch": TorchTransport,
    "horovod": HorovodTransport,
    "mpi": MPITransport,
}
# Of horovodrun over Gloo and over MPI, where it starts Open MPI's mpirun.
HOROVODRUN_VARIABLES = ("HOROVOD_RANK", "HOROVOD_SIZE")
# How many ranks there are: Open MPI's mpirun; the process managers of MPICH, Intel MPI and MVAPICH; Slurm's srun.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL = "local"
LOOKED_FOR = f"""transport="auto" looked for, in this order:
  horovod  hvd.init() was called
  torch    torch.distributed.init_process_group was called
  horovod  horovodrun's variables {", ".join(HOROVODRUN_VARIABLES)}
  torch    torchrun's variables {", ".join(LAUNCH_VARIABLES)}
  mpi      more than one rank by MPI.COMM_WORLD, where mpi4py runs, or by {", ".join(MPI_SIZES)}
  local    nothing of these: a job of one rank"""


def resolve_transport(transport: str | Transport) -> Transport:
    """A transport from its name, or the transport given.

    ``"auto"`` chooses by what runs already, then by who started the job:

    1. Horovod, where ``hvd.init()`` was called;
    2. torch.distributed, where ``init_process_group`` was called;
    3. Horovod, where horovodrun started the job;
    4. torch.distributed, where torchrun's variables are set;
    5. MPI, where mpi4py runs or mpirun or srun started the job, with more than one rank;
    6. otherwise one rank alone.

    Communication: ``"torch"`` makes a group of its own beside torch's WORLD, ``"mpi"`` duplicates MPI.COMM_WORLD and
    ``"horovod"`` calls ``hvd.init()``; all are collective, once per process.

    Raises:
        ValueError: neither a name nor a transport.
        ImportError: the library for the name is missing. After ``"auto"`` the error also says what was looked for.
    """
    if transport == "auto":
        return _chosen()
    if isinstance(transport, str) and transport in TRANSPORTS:
        return _connected(transport)
    if isinstance(transport, Transport):
        return transport
    raise ValueError(
        f"transport must be 'auto', 'torch', 'horovod', 'mpi' or a Transport, got {transport!r}: a process group goes "
        "into TorchTransport(group), a communicator into MPITransport(comm), a process set into "
        "HorovodTransport(process_set)"
    )


def _chosen() -> Transport:
    """The transport of this job, from what runs and from the environment. Communication: as its constructor."""
    name, reason = choose()
    if name == LOCAL:
        return local_transports(1)[0]
    try:
        return _connected(name)
    except (ImportError, ValueError) as error:
        error.add_note(f'transport="auto" chose {name!r}, because {reason}. {LOOKED_FOR}')
        raise


def _connected(name: str) -> Transport:
    """A transport to which all ranks have come. Communication: as its constructor."""
    with process_watch().over(None, 0, None, connecting(name)):
        transport = TRANSPORTS[name]()
    if transport.size == 1:
        _warn_where_others_started(name)
    return transport


def _warn_where_others_started(name: str) -> None:
    """Tell a rank that is alone by its transport, though its launcher has started several."""
    launchers = {HOROVODRUN_VARIABLES[1]: HOROVODRUN_VARIABLES, "WORLD_SIZE": LAUNCH_VARIABLES}
    launchers |= {variable: (variable,) for variable in MPI_SIZES}
    for size, variables in launchers.items():
        if all(variable in os.environ for variable in variables) and os.environ[size] not in ("", "0", "1"):
            logger.warning(
                "transport=%r has one rank, but %s is %s: every rank would train alone. Leave transport='auto', which "
                "takes what the job was started for, or start it for %s",
                *(name, size, os.environ[size], name),
            )
            return


def choose() -> tuple[str, str]:
    """The name of the transport that this job was started for, and why. Communication: none; imports nothing."""
    if _horovod_runs():
        return "horovod", "hvd.init() was called"
    if _torch_runs():
        return "torch", "torch.distributed.init_process_group was called"
    for name, variables in (("horovod", HOROVODRUN_VARIABLES), ("torch", LAUNCH_VARIABLES)):
        if all(variable in os.environ for variable in variables):
            return name, f"{', '.join(variables)} are set"
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        return "mpi", f"MPI.COMM_WORLD has {mpi.COMM_WORLD.size} ranks"
    for variable in MPI_SIZES:
        if os.environ.get(variable, "1") not in ("", "0", "1"):
            return "mpi", f"{variable} is {os.environ[variable]}"
    return LOCAL, "nothing else was found"


def _horovod_runs() -> bool:
    hvd = sys.modules.get("horovod.torch")
    return hvd is not None and hvd.is_initialized()


def _torch_runs() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
