"""A word from each rank that waits long for other ranks: where a job hangs, and its end where that is for ever."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

STALL_S = 30.0
POLLS_PER_STALL = 6  # how often the thread looks
logger = logging.getLogger(__name__)


@dataclass
class _Wait:
    rank: int
    size: int
    step: int
    phase: str
    since_s: float
    find_reason: Callable[[], str | None] | None
    reason: str | None = None  # when it was last asked for
    is_reported: bool = False


class StallWatch:
    """A thread that warns once of every phase that lasts longer than ``stall_s``. Communication: none.

    It ends the process where a phase cannot end: no Python error reaches a thread that waits in a library.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._waits: dict[int, _Wait] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(
        self, rank: int, size: int, step: int, phase: str, find_reason: Callable[[], str | None] | None = None
    ) -> Iterator[None]:
        """Watch the phase that runs inside.

        Args:
            rank, size, step, phase: for messages.
            find_reason: says why the phase cannot end, or None while it can; called after a while, from a thread.
        """
        if self._thread is None or not self._thread.is_alive():  # as in a process forked from this one
            self._thread = threading.Thread(target=self._look, name="hvd_sketch stall watch", daemon=True)
            self._thread.start()
        wait = _Wait(rank, size, step, phase, time.monotonic(), find_reason)
        self._waits[id(wait)] = wait
        try:
            yield
        finally:
            del self._waits[id(wait)]

    def _look(self) -> None:
        while True:
            time.sleep(self._stall_s / POLLS_PER_STALL)
            for wait in list(self._waits.values()):
                waited_s = time.monotonic() - wait.since_s
                if waited_s > self._stall_s / POLLS_PER_STALL and wait.find_reason is not None:
                    _end_if_hopeless(wait)
                if waited_s > self._stall_s and not wait.is_reported:
                    wait.is_reported = True
                    _warn(wait, waited_s)


def _end_if_hopeless(wait: _Wait) -> None:
    """Twice the same reason: it was no moment between two collectives."""
    assert wait.find_reason is not None
    before, wait.reason = wait.reason, wait.find_reason()
    if wait.reason is None or wait.reason != before:
        return
    logger.critical(
        "rank %d of %d ends, in step %d, phase %r: %s", wait.rank, wait.size, wait.step, wait.phase, wait.reason
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _warn(wait: _Wait, waited_s: float) -> None:
    hint = (
        "Not all of them have begun this step: one that ran out of data must go on contributing (put the loop into "
        "'with optimizer.join():' on every rank), one that hangs or waits elsewhere must be looked for."
        if wait.phase == "agree"
        else "One of them hangs, or the network does."
    )
    logger.warning(
        "rank %d of %d has waited for %.0f s for the other ranks, in step %d, phase %r. %s",
        *(wait.rank, wait.size, waited_s, wait.step, wait.phase, hint),
    )


@cache
def process_watch() -> StallWatch:
    """The watch of this process."""
    return StallWatch(STALL_S)
