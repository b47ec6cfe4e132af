"""What ranks tell each other outside of a collective that does not end: who waits in it, and who will not come."""

from __future__ import annotations

import atexit
import threading
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from enum import IntEnum
from typing import Any

import numpy as np


class Says(IntEnum):
    """What a rank says of itself."""

    WAITS = 0  # in the collective that it has begun last
    ENDED = 1  # its program is over
    JOINED = 2  # it is in hvd.join()


class Attendance(ABC):
    """One rank's view of who has come. Nothing here is collective, and nothing waits for another rank.

    Args:
        rank, size: this rank, and how many there are.

    Attributes:
        rank, size: as given.
        begun: how many collectives this rank has begun; all ranks begin the same ones in the same order.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.begun = rank, size, 0
        self._heard: dict[int, tuple[Says, int]] = {}
        self._lock = threading.Lock()
        self._is_over = False
        mine = weakref.ref(self)  # the hook must not keep a communicator alive

        def end() -> None:
            alive = mine()
            if alive is not None:
                alive.say(Says.ENDED)

        self._end = end
        atexit.register(end)

    def come(self) -> None:
        """This rank begins a collective."""
        self.begun += 1

    def say(self, says: Says) -> None:
        """Tell the others, together with :attr:`begun`; in vain where what carries it is gone already."""
        with self._lock, suppress(RuntimeError):
            if not self._is_over:
                self._tell(says, self.begun)
            self._is_over = self._is_over or says == Says.ENDED  # soon after, what carries it is taken down

    def heard(self) -> dict[int, tuple[Says, int]]:
        """What each other rank has said last, if anything, and what it had begun by then."""
        with self._lock, suppress(RuntimeError):
            if not self._is_over:
                self._listen()
        return dict(self._heard)

    def absent(self) -> list[int]:
        """The ranks that have not said that they wait where this one does."""
        heard = self.heard()
        return [r for r in range(self.size) if r != self.rank and heard.get(r, (Says.WAITS, 0))[1] < self.begun]

    def close(self) -> None:
        """Neither tell nor listen any more; on return no thread does."""
        atexit.unregister(self._end)
        with self._lock:
            self._is_over = True

    @abstractmethod
    def _tell(self, says: Says, begun: int) -> None: ...

    @abstractmethod
    def _listen(self) -> None:
        """Bring ``_heard`` up to date."""


class StoreAttendance(Attendance):
    """By a store of torch's that the ranks share for nothing else."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._store = store

    def _tell(self, says: Says, begun: int) -> None:
        self._store.set(str(self.rank), f"{says:d} {begun}")

    def _listen(self) -> None:
        for rank in range(self.size):
            if rank != self.rank and self._store.check([str(rank)]):
                says, begun = map(int, self._store.get(str(rank)).split())
                self._heard[rank] = Says(says), begun


class MPIAttendance(Attendance):
    """By messages of MPI that nobody waits for. Needs MPI_THREAD_MULTIPLE.

    Args:
        mpi: ``mpi4py.MPI``.
        comm: a communicator for nothing else.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        super().__init__(comm.rank, comm.size)
        self._mpi, self._comm = mpi, comm
        self._leaving: list[tuple[Any, np.ndarray]] = []  # messages under way, and their memory

    def close(self) -> None:
        """Also frees the communicator. Communication: collective, as ``Comm.Free`` is."""
        super().close()
        if not self._mpi.Is_finalized():
            self._comm.Free()

    def _tell(self, says: Says, begun: int) -> None:
        if self._mpi.Is_finalized():
            return
        self._leaving = [(request, memory) for request, memory in self._leaving if not request.Test()]
        message = np.array([says, begun], dtype=np.int64)
        for peer in range(self.size):
            if peer != self.rank:
                self._leaving.append((self._comm.Isend(message, peer), message))

    def _listen(self) -> None:
        status, message = self._mpi.Status(), np.empty(2, dtype=np.int64)
        while self._comm.Iprobe(status=status):
            self._comm.Recv(message, status.source)
            says, begun = message.tolist()
            self._heard[status.source] = Says(says), begun
