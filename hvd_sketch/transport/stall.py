"""A warning from each rank that waits long for other ranks: it says where a job hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
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
    is_reported: bool = False


class StallWatch:
    """A thread that warns once of every phase that lasts longer than ``stall_s``. Communication: none."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._waits: dict[int, _Wait] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, rank: int, size: int, step: int, phase: str) -> Iterator[None]:
        """Watch the phase that runs inside."""
        if self._thread is None or not self._thread.is_alive():  # as in a process forked from this one
            self._thread = threading.Thread(target=self._look, name="hvd_sketch stall watch", daemon=True)
            self._thread.start()
        wait = _Wait(rank, size, step, phase, time.monotonic())
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
                if waited_s > self._stall_s and not wait.is_reported:
                    wait.is_reported = True
                    _warn(wait, waited_s)


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
