"""A word from each rank that waits long for other ranks: who has not come; and an end where nobody will come."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary, ref

from hvd_sketch.transport.attendance import Attendance
from hvd_sketch.transport.base import Transport, name_ranks
from hvd_sketch.transport.words import Says

STALL_VARIABLE, ABORT_VARIABLE = "HVD_SKETCH_STALL_SECONDS", "HVD_SKETCH_STALL_ABORT_SECONDS"
STALL_S = 30.0
LOOKS_PER_STALL = 6
LONGEST_LOOK_S = 5.0
logger = logging.getLogger(__name__)


@dataclass
class Wait:
    """A block of code in which a rank waits for others; of nested ones only the innermost is looked at.

    Attributes:
        rank: None: not known yet.
        step: None: it belongs to no step.
        doing: what all ranks do together, in words that are equal on all.
    """

    watch: StallWatch
    rank: int | None
    size: int
    step: int | None
    doing: str
    attendance: Attendance | None
    since_s: float = 0.0
    outer: Wait | None = None  # of the same thread
    told: int = -1  # the collective that the others were told of
    reason: str | None = None  # why it cannot end, when it was last looked at
    is_reported: bool = field(default=False, init=False)

    def __enter__(self) -> None:
        self.since_s = time.monotonic()
        self.outer = self.watch.begin(self)

    def __exit__(self, *error: object) -> None:
        if self.outer is not None:
            self.outer.since_s, self.outer.told, self.outer.reason = time.monotonic(), -1, None
        self.watch.end(self)

    @property
    def who(self) -> str:
        """The rank, for messages."""
        return f"process {os.getpid()}" if self.rank is None else f"rank {self.rank} of {self.size}"

    @property
    def place(self) -> str:
        """Where in the program, for messages."""
        return f"phase {self.doing!r}" if self.step is None else f"step {self.step}, phase {self.doing!r}"


class StallWatch:
    """Two threads that look at every wait that lasts long. Communication: no collective.

    A rank that waits tells the others which collective it waits in. After ``stall_s`` it warns once and names the ranks
    that have not come; those that still can show where they are. A wait that cannot end, because a rank has left, ends
    the process: no Python error reaches a thread that waits in a library.

    One thread looks at the clock, and the other one speaks with the ranks: what carries the words may not answer.

    Args:
        stall_s: after which a wait is long.
        abort_s: after which it ends the process; 0: never.
    """

    def __init__(self, stall_s: float, abort_s: float = 0.0) -> None:
        self._stall_s, self._abort_s = stall_s, abort_s
        self._look_s = min(stall_s / LOOKS_PER_STALL, LONGEST_LOOK_S)
        self._waits: dict[int, Wait] = {}  # the innermost one of every thread
        self._late: WeakKeyDictionary[Attendance, tuple[int, float]] = WeakKeyDictionary()  # where, and since when
        self._threads: dict[str, threading.Thread] = {}
        self._looked_s, self._has_failed = 0.0, False

    def over(
        self, rank: int | None, size: int, step: int | None, doing: str, attendance: Attendance | None = None
    ) -> Wait:
        """Watch the block that runs inside, in which this rank waits for others.

        Args:
            rank, size: this rank, and how many there are; None: not known yet.
            step: for messages; None: it belongs to no step.
            doing: what all ranks do together, in words that are equal on all; the phase of a step.
            attendance: of the ranks, where their transport has one.
        """
        return Wait(self, rank, size, step, doing, attendance)

    def begin(self, wait: Wait) -> Wait | None:
        """A thread waits from now on; returns what it waited in already."""
        for name, look in (("clock", StallWatch._look_at_the_clock), ("ranks", StallWatch._speak)):
            if name not in self._threads or not self._threads[name].is_alive():  # as in a process forked from this one
                thread = threading.Thread(
                    target=_go_on,
                    args=(ref(self), look, self._look_s),
                    name=f"hvd_sketch stall watch, {name}",
                    daemon=True,
                )
                self._threads[name], self._looked_s = thread, time.monotonic()
                thread.start()
        if wait.attendance is not None and wait.attendance not in self._late:
            self._late[wait.attendance] = -1, 0.0
        thread_id = threading.get_ident()
        outer = self._waits.get(thread_id)
        self._waits[thread_id] = wait
        return outer

    def end(self, wait: Wait) -> None:
        """A thread waits no longer."""
        if wait.outer is not None:
            self._waits[threading.get_ident()] = wait.outer
        else:
            self._waits.pop(threading.get_ident(), None)

    def _try(self, look: Callable[[StallWatch], None]) -> None:
        """Look, whatever happens: without the threads that do, a job that cannot end would wait for ever."""
        try:
            look(self)  # whose variables end with it: they would keep the ranks of an elastic job's former worlds
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                with suppress(Exception):  # a closed stream
                    logger.exception("looking at what this rank waits for has failed; it is tried again")

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        gap_s, self._looked_s = now_s - self._looked_s - self._look_s, now_s
        for wait in list(self._waits.values()):
            if gap_s > LONGEST_LOOK_S:  # stopped meanwhile, as a job that its scheduler suspends, it did not wait
                wait.since_s = min(wait.since_s + gap_s, now_s)
            waited_s = now_s - wait.since_s
            if waited_s > self._stall_s and not wait.is_reported:
                wait.is_reported = True
                _warn(wait, waited_s)
            if self._abort_s and waited_s > self._abort_s:
                _end(wait, f"it has waited for {waited_s:.0f} s, and {ABORT_VARIABLE} is {self._abort_s:g}")

    def _speak(self) -> None:
        waits = [wait for wait in list(self._waits.values()) if wait.attendance is not None]
        for attendance in list(self._late):
            attendance.listen()
            attendance.answer()
            if attendance not in [wait.attendance for wait in waits]:
                self._look_for_those_who_wait(attendance)
        for wait in waits:
            if time.monotonic() - wait.since_s > self._look_s:
                _speak_of(wait)

    def _look_for_those_who_wait(self, attendance: Attendance) -> None:
        """Where others have waited for this rank for long, show what it does, once for each collective."""
        words = attendance.heard.items()
        waiting = [r for r, word in words if word.says == Says.WAITS and word.begun > attendance.begun]
        where, since_s = self._late[attendance]
        if not waiting:
            self._late[attendance] = -1, 0.0
        elif where != attendance.begun:
            self._late[attendance] = attendance.begun, time.monotonic()
        elif since_s and time.monotonic() - since_s > self._stall_s:
            self._late[attendance] = where, 0.0
            logger.warning(
                "rank %d of %d is late: %s for it in an exchange. What it does:",
                *(attendance.rank, attendance.size, f"{name_ranks(sorted(waiting))} wait{'s' * (len(waiting) == 1)}"),
            )
            _show_threads()


def _go_on(watch: ref[StallWatch], look: Callable[[StallWatch], None], look_s: float) -> None:
    """Look again and again while the watch is there."""
    while True:
        time.sleep(look_s)
        if (here := watch()) is None:
            return
        here._try(look)
        del here


def _show_threads() -> None:
    """Where every thread is, on the first stream that is a file: what a program puts in stderr's place may be none."""
    for stream in (sys.stderr, sys.__stderr__, 2):
        with suppress(AttributeError, OSError, RuntimeError, ValueError):
            faulthandler.dump_traceback(stream, all_threads=True)  # type: ignore[arg-type]
            return


def _speak_of(wait: Wait) -> None:
    """Tell the others where this rank waits, and end it where they will not come.

    Twice the same reason: it was no moment between two collectives.
    """
    attendance = wait.attendance
    assert attendance is not None
    if wait.told != attendance.begun:
        wait.told = attendance.begun
        attendance.say(Says.WAITS, wait.doing)
    before, wait.reason = wait.reason, _hopeless(attendance, wait.doing)
    if wait.reason is not None and wait.reason == before:
        _end(wait, wait.reason)


def _hopeless(attendance: Attendance, doing: str) -> str | None:
    """Why the collective that this rank waits in cannot end; None: it still can."""
    words = attendance.heard.items()
    joined = [r for r, word in words if word.says == Says.JOINED and word.begun < attendance.begun]
    if joined:
        return (
            f"{name_ranks(joined)} of {attendance.size} left this step by hvd.join(), which cannot stand in for a "
            "compressed exchange: put the training loop into 'with optimizer.join():' on every rank instead"
        )
    return attendance.elsewhere(doing) or None


def _end(wait: Wait, reason: str) -> None:
    try:
        logger.critical("%s ends, in %s: %s", wait.who, wait.place, reason)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # a full disk, or no stream
                stream.flush()
    finally:
        os._exit(1)


def _warn(wait: Wait, waited_s: float) -> None:
    hint = (
        "Not all of them have begun this step: one that ran out of data must go on contributing (put the loop into "
        "'with optimizer.join():' on every rank), one that hangs or waits elsewhere must be looked for."
        if wait.doing == "agree"
        else "Call the same functions in the same order, over the same transport, on every rank."
        if wait.step is None
        else "One of them hangs, or the network does."
    )
    attendance = wait.attendance
    absent = attendance.absent() if attendance is not None and not attendance.is_cut_off else []
    known = attendance.describe_absent() if attendance is not None else ""
    who = (
        f"{name_ranks(absent)}, which {'has' if len(absent) == 1 else 'have'} not come" if absent else "the other ranks"
    )
    logger.warning(
        "%s has waited for %.0f s for %s, in %s. %s", *(wait.who, waited_s, who, wait.place, f"{known} {hint}".strip())
    )


def connecting(library: str) -> str:
    """What ranks do that connect, in words."""
    return f"connecting over {library}, where ranks that were given another transport never arrive"


@contextmanager
def watched(comm: Transport, doing: str, step: int | None = None) -> Iterator[None]:
    """Who waits long for the collectives inside says so.

    Args:
        comm: the ranks that all come here.
        doing: what they do together, in words that are equal on all.
        step: for messages; None: it belongs to no step.
    """
    if comm.size == 1:
        yield
        return
    attendance: Attendance | None = getattr(comm, "attendance", None)
    if attendance is not None:
        attendance.come()
    with process_watch().over(comm.rank, comm.size, step, doing, attendance):
        yield
    if attendance is not None:
        attendance.leave()


@cache
def process_watch() -> StallWatch:
    """The watch of this process. Raises ValueError where the variables are no numbers of seconds."""
    return StallWatch(_seconds(STALL_VARIABLE, STALL_S) or float("inf"), _seconds(ABORT_VARIABLE, 0.0))


def _seconds(variable: str, default: float) -> float:
    given = os.environ.get(variable, "")
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{variable} must be a number of seconds, 0 for never, got {given!r}")
    return seconds
