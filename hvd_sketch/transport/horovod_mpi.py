"""MPI under a Horovod that runs over it: usable until Horovod ends it, which it does in a thread of its own."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.mpi import MPITransport
from hvd_sketch.transport.mpi_setup import import_mpi


class MPIUnderHorovod(MPITransport):
    """MPI that ends on all ranks with the program of one: no rank may leave a collective before all have come."""

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        result = super().broadcast_(tensor, root)
        self.barrier()
        return result

    def say_ended(self) -> None:
        """Tell ranks that wait for this one that MPI ends. Communication: no collective."""
        self._channel.say_ended()


class MPILife:
    """Holds back the end of MPI inside of the ``with`` block, which must hold every collective.

    A Horovod that has initialised MPI calls ``MPI_Finalize`` in its background thread, on all ranks as soon as Horovod
    ends on one of them. Under a rank that waits in MPI, that would end the process. ``MPI_Finalize`` deletes the
    attributes of ``MPI_COMM_SELF`` before anything else (MPI 3.1, 8.7.1); there it waits for this rank. Then it frees
    our communicators, which ends what else uses them: the threads that move and watch messages.

    Raises:
        RuntimeError: on entering: MPI is over.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._connected: dict[tuple[int, ...], tuple[Any, MPIUnderHorovod]] = {}
        self._condition = threading.Condition()
        self._inside, self._is_over = 0, False
        mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=lambda *_: self._end()), self)

    def __enter__(self) -> None:
        with self._condition:
            if self._is_over:
                raise RuntimeError(
                    "MPI, which carries the data of this Horovod job, has ended on all ranks: one of them has called "
                    "hvd.shutdown(), or its program is over. Make as many steps on every rank, and before "
                    "hvd.shutdown()"
                )
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def connect(self, world_ranks: tuple[int, ...]) -> MPIUnderHorovod:
        """These ranks of MPI_COMM_WORLD, in this order.

        Communication: collective for them the first time, then none.
        """
        with self:
            if world_ranks not in self._connected:
                world = self._mpi.COMM_WORLD
                comm = world.Create_group(world.group.Incl(world_ranks))
                self._connected[world_ranks] = comm, MPIUnderHorovod(comm)
            return self._connected[world_ranks][1]

    def _end(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._inside)
            self._is_over = True
        for comm, transport in self._connected.values():
            transport.say_ended()
            comm.Free()


@cache
def mpi_life(mpi: Any) -> MPILife:
    """The process's. Communication: none."""
    return MPILife(mpi)


def connect_over_mpi(hvd: Any, own: HorovodCollectives, is_wanted: bool) -> tuple[MPIUnderHorovod, MPILife] | None:
    """The ranks by MPI, in the same order; None: not every rank wants it, or can use the MPI that Horovod runs over.

    Communication: collective, by Horovod's own collectives and MPI.

    Args:
        hvd: ``horovod.torch``, initialised.
        own: Horovod's own collectives on the ranks.
        is_wanted: by this rank.
    """
    mpi = _mpi_of(hvd) if is_wanted else None
    world_ranks = own.allgather(torch.tensor([-1 if mpi is None else mpi.COMM_WORLD.rank], device="cpu")).tolist()
    if mpi is None or -1 in world_ranks or len(set(world_ranks)) < own.size:
        return None
    life = mpi_life(mpi)
    return life.connect(tuple(world_ranks)), life


def _mpi_of(hvd: Any) -> Any | None:
    """``mpi4py.MPI`` where Horovod runs over the same library, which several threads may call; otherwise None."""
    if not hvd.mpi_enabled():
        return None
    try:
        import mpi4py

        initialize, mpi4py.rc.initialize = mpi4py.rc.initialize, False  # of a library that is not Horovod's
        try:
            mpi = import_mpi()
        finally:
            mpi4py.rc.initialize = initialize
    except (ImportError, ValueError):
        return None
    return mpi if mpi.Query_thread() == mpi.THREAD_MULTIPLE else None
