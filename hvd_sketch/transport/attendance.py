"""What ranks tell each other outside of a collective that does not end: who waits in it, and who will not come."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hvd_sketch.transport.base import name_ranks
from hvd_sketch.transport.processes import Fate, Process
from hvd_sketch.transport.words import Says, Word

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0002, 0.02  # between two looks at who has come to a meeting
LOOK_UP_S = 0.2  # between two looks at the processes of this host
SILENT_S = 15.0  # without an answer from another host: a rank is named
# Then it counts as lost. Not earlier: a rank that writes or unpickles a large file may not run any other thread.
LOST_S = 600.0
LONGEST_GAP_S = 6.0  # between two times that this rank listens; of a longer one it was stopped itself
UNANSWERED_S = 1.0  # what is known of the others is old
LAST_WORD_S = 2.0  # how long the end of a program may wait for the others to be told


class Attendance(ABC):
    """One rank's view of who has come. But for :meth:`meet` nothing is collective, and nothing waits for another rank.

    Args:
        rank, size: this rank, and how many there are.
        carrier: what carries the words and where, in words.

    Attributes:
        rank, size, carrier: as given.
        begun: how many collectives this rank has begun; all ranks begin the same ones in the same order.
        heard: what each other rank has said last, if anything, when :meth:`listen` was called last.
        failure: what happened to the carrier; "": it works.
    """

    def __init__(self, rank: int, size: int, carrier: str) -> None:
        self.rank, self.size, self.carrier = rank, size, carrier
        self.begun = self._under_way = 0
        self.heard: dict[int, Word] = {}
        self.failure = ""
        self._said = Word(Says.WAITS, 0, process=Process.of(os.getpid()))
        self._silent_s: dict[int, float] = {}  # how long this rank has listened without hearing anything new
        self._listened_s = self._looked_up_s = time.monotonic()
        self._asks_since_s: float | None = None  # since when this rank waits for the carrier
        self._fates: dict[int, Fate] = {}  # of ranks of this host
        self._lock = threading.Lock()
        self._is_over = False
        mine, process = weakref.ref(self), os.getpid()  # the hook must not keep a communicator alive

        def end() -> None:
            alive = mine()
            if alive is not None and os.getpid() == process:  # not that of a forked one
                alive.say(Says.ENDED)

        self._end = end
        atexit.register(end)

    def come(self) -> None:
        """This rank begins a collective."""
        self.begun += 1
        self._under_way += 1

    def leave(self) -> None:
        """This rank has ended a collective that it had begun: the others can, without it."""
        self._under_way -= 1

    def meet(self, place: str) -> None:
        """Return once all ranks have come to the same place in the program, which no step leads through.

        Ranks that are in different places would take each other's messages for their own.

        Args:
            place: what all ranks are about to do together, in words.

        Raises:
            RuntimeError: a rank waits elsewhere, its program is over, or it is lost; what carries the words is gone.

        Communication: collective.
        """
        self.come()
        self.say(Says.WAITS, place)
        pause_s = FIRST_PAUSE_S
        while True:
            self.listen()
            elsewhere = self.elsewhere(place)
            if not elsewhere and not self.absent():
                self.leave()
                return
            if not elsewhere and self.failure:
                elsewhere = f"{self.carrier} is gone ({self.failure}): the process or the host that had it has ended"
            if elsewhere:
                raise RuntimeError(f"rank {self.rank} of {self.size} has come to {place!r}, but {elsewhere}")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)

    def elsewhere(self, place: str) -> str:
        """Who will not come to the collective that this rank waits in, and why, in words; "": nobody is known."""
        ended = [r for r, word in self.heard.items() if word.says == Says.ENDED and word.begun < self.begun]
        if ended:
            return (
                f"the program of {name_ranks(ended)} is over: make as many steps on every rank, or put the training "
                "loop into 'with optimizer.join():' on every rank"
            )
        absent = self.absent()
        over = [r for r in absent if self._fates.get(r) == Fate.OVER]
        if over:
            return f"{name_ranks(over)} ended{'' if self.failure else ' without a word: killed, or crashed'}"
        lost = [r for r in absent if self._silence(r) > LOST_S]
        if lost:
            return f"nothing was heard of {name_ranks(lost)} for {LOST_S:.0f} s: the host or the network is lost"
        places = {r: w.place for r, w in self.heard.items() if w.begun == self.begun and w.says == Says.WAITS}
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
        """Tell the others, together with :attr:`begun`; in vain where the carrier is gone already.

        Args:
            says: what is told.
            place: where this rank waits, in words that are equal on all ranks that have come there.
        """
        if not self._lock.acquire(timeout=LAST_WORD_S if says == Says.ENDED else -1):
            return  # a thread waits for a carrier that does not answer
        try:
            if not self._is_over:
                self._silent_s.clear()  # from here on the others can know that they are waited for
                begun = self.begun - (self._under_way if says == Says.ENDED else 0)  # what it leaves cannot end
                self._say(Word(says, begun, place, process=self._said.process))
            self._is_over = self._is_over or says == Says.ENDED  # soon after, what carries it is taken down
        finally:
            self._lock.release()

    def answer(self) -> None:
        """Where others wait for this rank, show them that it is there; what it has said stays as it is."""
        awaited = [r for r, word in self.heard.items() if word.says == Says.WAITS and word.begun > self._said.begun]
        with self._lock:
            if awaited and not self._is_over:
                self._say(replace(self._said, answers=self._said.answers + 1))

    def _say(self, word: Word) -> None:
        self._said = word
        self._try(lambda: self._tell(word))

    def _try(self, speak: Callable[[], None]) -> None:
        if not self.failure:
            try:
                speak()
            except RuntimeError as error:
                self.failure = str(error).split("\n", 1)[0] or type(error).__name__

    def listen(self) -> None:
        """Bring :attr:`heard` up to date, and what is known of the ranks that have not come.

        Waits while the carrier does not answer.
        """
        with self._lock:
            if self._is_over:
                return
            before, self._asks_since_s = self.heard, time.monotonic()
            gap_s = min(self._asks_since_s - self._listened_s, LONGEST_GAP_S)
            self._look_up()  # first: a process that ends by itself says so before
            self._try(self._listen)
            for rank, word in self.heard.items():
                self._silent_s[rank] = self._silent_s.get(rank, 0.0) + gap_s if word == before.get(rank) else 0.0
            self._listened_s, self._asks_since_s = time.monotonic(), None

    def _look_up(self) -> None:
        if time.monotonic() - self._looked_up_s > LOOK_UP_S:
            self._fates = {r: self.heard[r].process.fate() for r in self.absent() if r in self.heard}
            self._looked_up_s = time.monotonic()

    def absent(self) -> list[int]:
        """The ranks that have not said that they wait where this one does."""
        heard, others = self.heard, (r for r in range(self.size) if r != self.rank)
        return [r for r in others if r not in heard or heard[r].begun < self.begun]

    def describe_absent(self) -> str:
        """What is known of the ranks that have not come, or why nothing is, in words; "": nothing strange."""
        absent = self.absent()
        stopped = [r for r in absent if self._fates.get(r) == Fate.STOPPED]
        silent = [r for r in absent if self._silence(r) > SILENT_S]
        told = []
        if self.is_cut_off:
            what = f"is gone ({self.failure})" if self.failure else f"has not answered for {self._unanswered_s():.0f} s"
            told.append(f"Who has come is not known: {self.carrier} {what}.")
        if stopped:
            told.append(f"{name_ranks(stopped).capitalize()} is stopped, by a signal or a debugger.")
        if silent:
            s, who = min(map(self._silence, silent)), name_ranks(silent).capitalize()
            told.append(f"{who} has not answered for {s:.0f} s: stopped, or its host lost.")
        return " ".join(told)

    @property
    def is_cut_off(self) -> bool:
        """Whether the carrier is gone, or does not answer."""
        return bool(self.failure) or self._unanswered_s() > UNANSWERED_S

    def _unanswered_s(self) -> float:
        return time.monotonic() - (self._asks_since_s or time.monotonic())

    def _silence(self, rank: int) -> float:
        """How long nothing was heard of a rank of another host that has answered before, in seconds."""
        word = self.heard.get(rank)
        if word is None or (word.begun, word.answers) == (0, 0):  # nothing looks at who waits there yet
            return 0.0
        is_near = self._fates.get(rank, Fate.UNKNOWN) != Fate.UNKNOWN
        return 0.0 if is_near else self._silent_s.get(rank, 0.0)

    def close(self) -> None:
        """Neither tell nor listen any more; on return no thread does."""
        atexit.unregister(self._end)
        with self._lock:
            self._is_over = True
            self.failure = self.failure or "it was closed"

    @abstractmethod
    def _tell(self, word: Word) -> None: ...

    @abstractmethod
    def _listen(self) -> None:
        """Bring ``heard`` up to date."""


class StoreAttendance(Attendance):
    """By a store of torch's that the ranks share for nothing else. All have made theirs before one listens."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(rank, size, _describe(store))
        # A connection of its own: on the given one the user may wait for ranks, and nobody else gets a word in.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._tell(self._said)  # there is something to be read of every rank

    def _tell(self, word: Word) -> None:
        self._store.set(str(self.rank), word.encode())

    def _listen(self) -> None:
        peers = [rank for rank in range(self.size) if rank != self.rank]
        told = self._store.multi_get([str(rank) for rank in peers])
        self.heard = {rank: Word.decode(word) for rank, word in zip(peers, told, strict=True)}


class MPIAttendance(Attendance):
    """By messages of MPI that nobody waits for. Needs MPI_THREAD_MULTIPLE.

    Args:
        mpi: ``mpi4py.MPI``.
        comm: a communicator for nothing else.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        super().__init__(comm.rank, comm.size, "MPI")
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
        heard = dict(self.heard)
        while self._comm.Iprobe(status=status):
            message = np.empty(status.Get_count(self._mpi.BYTE), dtype=np.uint8)
            self._comm.Recv(message, status.source)
            heard[status.source] = Word.decode(message.tobytes())
        self.heard = heard


def _describe(store: Any) -> str:
    """Where a store of torch's is, in words."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    at = f" at {store.host}:{store.port}" if hasattr(store, "port") else ""
    return f"the store{at} by which the ranks met, on the host of rank 0,"
