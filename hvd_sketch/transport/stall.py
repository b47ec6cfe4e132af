"""A word from each rank that waits long for other ranks: who has not come; and an end where nobody will come."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

from hvd_sketch.transport.attendance import Attendance, Says
from hvd_sketch.transport.base import name_ranks

STALL_VARIABLE, ABORT_VARIABLE = "HVD_SKETCH_STALL_SECONDS", "HVD_SKETCH_STALL_ABORT_SECONDS"
STALL_S = 30.0
LOOKS_PER_STALL = 6
LONGEST_LOOK_S = 5.0
logger = logging.getLogger(__name__)


@dataclass
class _Wait:
    rank: int
    size: int
    step: int | None
    phase: str
    since_s: float
    attendance: Attendance | None
    told: int = -1  # the collective that the others were told of
    reason: str | None = None  # why it cannot end, when it was last looked at
    is_reported: bool = False

    @property
    def place(self) -> str:
        """Where in the program, for messages."""
        return f"phase {self.phase!r}" if self.step is None else f"step {self.step}, phase {self.phase!r}"


class StallWatch:
    """A thread that looks at every phase that lasts long. Communication: no collective.

    A rank that waits tells the others which collective it waits in. After ``stall_s`` it warns once and names the ranks
    that have not come; those that still can show where they are. A phase that cannot end, because a rank has left, ends
    the process: no Python error reaches a thread that waits in a library.

    Args:
        stall_s: after which a phase is long.
        abort_s: after which it ends the process; 0: never.
    """

    def __init__(self, stall_s: float, abort_s: float = 0.0) -> None:
        self._stall_s, self._abort_s = stall_s, abort_s
        self._look_s = min(stall_s / LOOKS_PER_STALL, LONGEST_LOOK_S)
        self._waits: dict[int, _Wait] = {}
        self._late: WeakKeyDictionary[Attendance, tuple[int, float]] = WeakKeyDictionary()  # where, and since when
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(
        self, rank: int, size: int, step: int | None, phase: str, attendance: Attendance | None = None
    ) -> Iterator[None]:
        """Watch the phase that runs inside.

        Args:
            rank, size: this rank, and how many there are.
            step: for messages; None: the phase belongs to no step.
            phase: its name, equal on all ranks.
            attendance: of the ranks, where their transport has one.
        """
        if self._thread is None or not self._thread.is_alive():  # as in a process forked from this one
            self._thread = threading.Thread(target=self._look, name="hvd_sketch stall watch", daemon=True)
            self._thread.start()
        if attendance is not None and attendance not in self._late:
            self._late[attendance] = -1, 0.0
        wait = _Wait(rank, size, step, phase, time.monotonic(), attendance)
        self._waits[id(wait)] = wait
        try:
            yield
        finally:
            del self._waits[id(wait)]

    def _look(self) -> None:
        while True:
            time.sleep(self._look_s)
            waits = list(self._waits.values())
            for wait in waits:
                self._look_at(wait, time.monotonic() - wait.since_s)
            for attendance in list(self._late):
                if attendance not in [wait.attendance for wait in waits]:
                    self._look_for_those_who_wait(attendance)

    def _look_at(self, wait: _Wait, waited_s: float) -> None:
        if waited_s > self._look_s and wait.attendance is not None:
            if wait.told != wait.attendance.begun:
                wait.told = wait.attendance.begun
                wait.attendance.say(Says.WAITS, wait.phase)
            _end_if_hopeless(wait, wait.attendance)
        if waited_s > self._stall_s and not wait.is_reported:
            wait.is_reported = True
            _warn(wait, waited_s)
        if self._abort_s and waited_s > self._abort_s:
            _end(wait, f"it has waited for {waited_s:.0f} s, and {ABORT_VARIABLE} is {self._abort_s:g}")

    def _look_for_those_who_wait(self, attendance: Attendance) -> None:
        """Where others have waited for this rank for long, show what it does, once for each collective."""
        heard = attendance.heard()
        waiting = [r for r, word in heard.items() if word.says == Says.WAITS and word.begun > attendance.begun]
        where, since_s = self._late[attendance]
        if not waiting:
            self._late[attendance] = -1, 0.0
        elif where != attendance.begun:
            self._late[attendance] = attendance.begun, time.monotonic()
        elif since_s and time.monotonic() - since_s > self._stall_s:
            self._late[attendance] = where, 0.0
            logger.warning(
                "rank %d of %d is late: %s for it in an exchange. What it does:",
                *(attendance.rank, attendance.size, f"{name_ranks(sorted(waiting))} wait"),
            )
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _end_if_hopeless(wait: _Wait, attendance: Attendance) -> None:
    """Twice the same reason: it was no moment between two collectives."""
    before, wait.reason = wait.reason, _hopeless(attendance, wait.phase)
    if wait.reason is not None and wait.reason == before:
        _end(wait, wait.reason)


def _hopeless(attendance: Attendance, phase: str) -> str | None:
    """Why the collective that this rank waits in cannot end; None: it still can."""
    heard = attendance.heard()
    joined = [r for r, word in heard.items() if word.says == Says.JOINED and word.begun < attendance.begun]
    if joined:
        return (
            f"{name_ranks(joined)} of {attendance.size} left this step by hvd.join(), which cannot stand in for a "
            "compressed exchange: put the training loop into 'with optimizer.join():' on every rank instead"
        )
    return attendance.elsewhere(phase) or None


def _end(wait: _Wait, reason: str) -> None:
    logger.critical("rank %d of %d ends, in %s: %s", wait.rank, wait.size, wait.place, reason)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _warn(wait: _Wait, waited_s: float) -> None:
    hint = (
        "Not all of them have begun this step: one that ran out of data must go on contributing (put the loop into "
        "'with optimizer.join():' on every rank), one that hangs or waits elsewhere must be looked for."
        if wait.phase == "agree"
        else "Call the same functions in the same order, over the same transport, on every rank."
        if wait.step is None
        else "One of them hangs, or the network does."
    )
    absent = wait.attendance.absent() if wait.attendance is not None else []
    who = (
        f"{name_ranks(absent)}, which {'has' if len(absent) == 1 else 'have'} not come" if absent else "the other ranks"
    )
    logger.warning(
        "rank %d of %d has waited for %.0f s for %s, in %s. %s",
        *(wait.rank, wait.size, waited_s, who, wait.place, hint),
    )


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
