"""A thread that keeps MPI's messages moving while this rank computes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from torch import Tensor

from hvd_sketch.transport.base import Handle, Pending

if TYPE_CHECKING:
    from mpi4py import MPI

# Two ranks at 1 Gbit/s, three rows of 4 MB: 109 ms instead of 139 ms where each rank is off the CPU for 30 ms before
# each row (as with a GPU): all rows but the last are hidden. Where it computes on the CPU, 86 to 110 ms instead of
# 112 ms. Polling every 0.3 ms hides no more and takes time from Python: 122 ms.
POLL_INTERVAL_S = 2e-3
PROBES = 8  # one call moves at most 384 KiB to each peer (Open MPI's pipeline over TCP)


class Progress:
    """A thread that calls MPI while handles are waiting: most MPI libraries only move messages inside their functions.

    Needs MPI_THREAD_MULTIPLE.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._in_flight = 0
        self._ended = False
        self._needed = threading.Event()
        self._thread: threading.Thread | None = None

    def drive(self, handle: Handle) -> Handle:
        """A handle whose messages move until its ``wait()``, which moves them itself; call from one thread only."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="hvd_sketch MPI progress", daemon=True)
            self._thread.start()
        self._in_flight += 1
        self._needed.set()

        def wait() -> Tensor:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._needed.clear()
            return handle.wait()

        return Pending(wait)

    def stop(self) -> None:
        """End the thread for good, before its communicator is freed; on return it has made its last call."""
        self._ended = True
        self._needed.set()
        if self._thread is not None:
            self._thread.join()

    def _poll(self) -> None:
        while self._needed.wait() and not self._ended:
            for _ in range(PROBES):
                self._comm.Iprobe()
            time.sleep(POLL_INTERVAL_S)
