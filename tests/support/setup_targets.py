"""What test_transport_setup.py runs on every rank: transports made again and again, and made from the wrong things."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from hvd_sketch.transport import HorovodTransport, MPITransport


def many_transports(transport: MPITransport, count: int) -> dict[str, Any]:
    """After ``count`` more transports: how many communicators they use, and how many hooks of ours are chained."""
    from mpi4py import MPI

    used = [transport._comm]
    for _ in range(count):
        comm = MPITransport()._comm
        if all(MPI.Comm.Compare(comm, known) != MPI.IDENT for known in used):
            used.append(comm)
    return {"communicators": len(used), "hooks": _chained_hooks()}


def _chained_hooks() -> int:
    ours, hook = 0, sys.excepthook
    while hook.__module__ == "hvd_sketch.transport.mpi_setup":
        ours, hook = ours + 1, inspect.getclosurevars(hook).nonlocals["previous"]
    return ours


def freed_with_the_users(transport: MPITransport, cycles: int) -> dict[str, int]:
    """How many duplicates and threads are left of ``cycles`` communicators that the user made and freed again."""
    from mpi4py import MPI

    threads = threading.active_count()
    left = 0
    for cycle in range(cycles):
        group = MPI.COMM_WORLD.Split(color=0, key=MPI.COMM_WORLD.rank)
        on_group = MPITransport(group)
        if cycle % 100 == 0:  # which starts the thread that drives messages
            on_group.start_reduce_scatter(torch.ones(on_group.size, 1)).wait()
            parts = [
                on_group.split(color) for color in (on_group.rank % 2, on_group.rank % 2 + 7, 0, on_group.rank % 2)
            ]
            used = [MPI.Comm.Compare(part._comm, parts[0]._comm) == MPI.IDENT for part in parts]
            assert used == [True, True, False, True], "parts of the same ranks share a communicator"
        copy = group.Dup()
        assert MPI.Comm.Compare(MPITransport(copy)._comm, on_group._comm) != MPI.IDENT, "a copy is another communicator"
        copy.Free()
        group.Free()
        left += sum(each._comm != MPI.COMM_NULL for each in (on_group, *parts))
    assert transport.allreduce_(torch.ones(1)).item() == transport.size, "COMM_WORLD's own must live on"
    return {"communicators": left, "threads": threading.active_count() - threads}


def keeps_the_users_hook(transport: MPITransport) -> bool:
    def of_the_user(*error: Any) -> None: ...

    sys.excepthook = of_the_user
    MPITransport()
    return sys.excepthook is of_the_user


def refused_communicators(transport: MPITransport) -> dict[str, str]:
    """What MPITransport says to things that are no communicator for it."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    only_first = world.Create(world.group.Incl([0]))
    halves = world.Split(color=world.rank % 2, key=world.rank)
    between = halves.Create_intercomm(0, world, 1 - world.rank % 2)
    wrong = {"int": 3, "module": MPI, "str": "world", "inter-communicator": between}
    if world.rank > 0:
        wrong["COMM_NULL"] = only_first
    freed = world.Dup()
    freed.Free()
    wrong["freed"] = freed
    return {name: message_of(lambda comm=comm: MPITransport(comm)) for name, comm in wrong.items()}


def refused_process_sets(transport: HorovodTransport) -> dict[str, str]:
    """What HorovodTransport says to things that are no process set for it."""
    import horovod.torch as hvd

    wrong = {"int": 3, "list": [0, 1], "not registered": hvd.ProcessSet([0, 1])}
    said = {name: message_of(lambda given=given: HorovodTransport(given)) for name, given in wrong.items()}
    hvd.shutdown()
    only_first = hvd.ProcessSet([0])
    hvd.init(process_sets=[only_first])
    if hvd.rank() > 0:
        said["not in it"] = message_of(lambda: HorovodTransport(only_first))
    hvd.barrier()  # one rank's shutdown ends Horovod on all
    hvd.shutdown()
    said["used after a shutdown"] = message_of(lambda: transport.rank)
    hvd.init()
    said["registered before a shutdown"] = message_of(lambda: HorovodTransport(only_first))
    assert HorovodTransport().allreduce_(torch.ones(1)).item() == hvd.size()
    return said


def message_of(call: Callable[[], object]) -> str:
    """The TypeError or ValueError that a call ends with."""
    try:
        return f"no error, but {call()!r}"
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def error_of(call: Callable[[], object]) -> str:
    """As :func:`message_of`, also an OSError or a RuntimeError; empty where there is none."""
    try:
        call()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
