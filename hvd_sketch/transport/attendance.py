"""What ranks tell each other outside of a collective that does not end: who waits in it, and who will not come."""

from __future__ import annotations

import atexit
import json
import threading
import time
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from hvd_sketch.transport.base import name_ranks

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0002, 0.02  # between two looks at who has come to a meeting


class Says(IntEnum):
    """What a rank says of itself."""

    WAITS = 0  # in the collective that it has begun last
    ENDED = 1  # its program is over
    JOINED = 2  # it is in hvd.join()


@dataclass(frozen=True)
class Word:
    """What a rank has said last.

    Attributes:
        says: what it is about.
        begun: how many collectives it had begun by then.
        place: what it waits in, the last of them; "": it has not said.
    """

    says: Says
    begun: int
    place: str = ""

    def encode(self) -> bytes:
        return json.dumps([self.says, self.begun, self.place]).encode()

    @staticmethod
    def decode(data: bytes) -> Word:
        says, begun, place = json.loads(data)
        return Word(Says(says), begun, place)


class Attendance(ABC):
    """One rank's view of who has come. But for :meth:`meet` nothing is collective, and nothing waits for another rank.

    Args:
        rank, size: this rank, and how many there are.

    Attributes:
        rank, size: as given.
        begun: how many collectives this rank has begun; all ranks begin the same ones in the same order.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.begun = rank, size, 0
        self._heard: dict[int, Word] = {}
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

    def meet(self, place: str) -> None:
        """Return once all ranks have come to the same place in the program, which no step leads through.

        Ranks that are in different places would take each other's messages for their own.

        Args:
            place: what all ranks are about to do together, in words.

        Raises:
            RuntimeError: a rank waits elsewhere, or its program is over.

        Communication: collective.
        """
        self.come()
        self.say(Says.WAITS, place)
        pause_s = FIRST_PAUSE_S
        while True:
            elsewhere = self.elsewhere(place)
            if elsewhere:
                raise RuntimeError(f"rank {self.rank} of {self.size} has come to {place!r}, but {elsewhere}")
            if not self.absent():
                return
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)

    def elsewhere(self, place: str) -> str:
        """Who will not come to the collective that this rank waits in, and why, in words; "": nobody is known."""
        heard = self.heard()
        ended = [r for r, word in heard.items() if word.says == Says.ENDED and word.begun < self.begun]
        if ended:
            return (
                f"the program of {name_ranks(ended)} is over: make as many steps on every rank, or put the training "
                "loop into 'with optimizer.join():' on every rank"
            )
        places = {r: word.place for r, word in heard.items() if word.begun == self.begun and word.says == Says.WAITS}
        others = sorted(set(places.values()) - {"", place})
        if others:
            ranks = {other: [r for r, where in places.items() if where == other] for other in others}
            told = "; ".join(f"in {other!r}: {name_ranks(sorted(ranks[other]))}" for other in others)
            return (
                f"others wait elsewhere, {told}. Make as many steps, and call the same functions in the same order, on "
                "every rank"
            )
        return ""

    def say(self, says: Says, place: str = "") -> None:
        """Tell the others, together with :attr:`begun`; in vain where what carries it is gone already.

        Args:
            says: what is told.
            place: where this rank waits, in words that are equal on all ranks that have come there.
        """
        with self._lock, suppress(RuntimeError):
            if not self._is_over:
                self._tell(Word(says, self.begun, place))
            self._is_over = self._is_over or says == Says.ENDED  # soon after, what carries it is taken down

    def heard(self) -> dict[int, Word]:
        """What each other rank has said last, if anything."""
        with self._lock, suppress(RuntimeError):
            if not self._is_over:
                self._listen()
        return dict(self._heard)

    def absent(self) -> list[int]:
        """The ranks that have not said that they wait where this one does."""
        heard = self.heard()
        return [r for r in range(self.size) if r != self.rank and (r not in heard or heard[r].begun < self.begun)]

    def close(self) -> None:
        """Neither tell nor listen any more; on return no thread does."""
        atexit.unregister(self._end)
        with self._lock:
            self._is_over = True

    @abstractmethod
    def _tell(self, word: Word) -> None: ...

    @abstractmethod
    def _listen(self) -> None:
        """Bring ``_heard`` up to date."""


class StoreAttendance(Attendance):
    """By a store of torch's that the ranks share for nothing else. All have made theirs before one listens."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._store = store
        self._tell(Word(Says.WAITS, 0))  # there is something to be read of every rank

    def _tell(self, word: Word) -> None:
        self._store.set(str(self.rank), word.encode())

    def _listen(self) -> None:
        peers = [rank for rank in range(self.size) if rank != self.rank]
        told = self._store.multi_get([str(rank) for rank in peers])
        self._heard = {rank: Word.decode(word) for rank, word in zip(peers, told, strict=True)}


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

    def _tell(self, word: Word) -> None:
        if self._mpi.Is_finalized():
            return
        self._leaving = [(request, memory) for request, memory in self._leaving if not request.Test()]
        message = np.frombuffer(word.encode(), dtype=np.uint8)
        for peer in range(self.size):
            if peer != self.rank:
                self._leaving.append((self._comm.Isend(message, peer), message))

    def _listen(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(status=status):
            message = np.empty(status.Get_count(self._mpi.BYTE), dtype=np.uint8)
            self._comm.Recv(message, status.source)
            self._heard[status.source] = Word.decode(message.tobytes())
