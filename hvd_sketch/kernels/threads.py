"""Parts of a kernel call on several threads: plain Python threads, which compiled code without the GIL keeps busy.

Numba's own threads (``parallel=True``) are not used, because they belong to the user's process as well. Once its OpenMP
pool runs, forked workers of a DataLoader that use Numba die; starting it changes the number of torch's threads; and
its workqueue ends a process that enters it from two threads.

The caller needs no helper to come to an end: it takes every part that no other thread has begun. So threads that start
late, that are busy with another caller's parts or that cannot be started cost time only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

POLLS = 100  # before a caller sleeps until the last part ends: parts end together, and to be woken takes 20 us


def run_parts(parts: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Call ``kernel(*arguments, part, parts)`` for every part, on as many threads where they are free.

    Any number of threads may call this at the same time. Returns when all parts have ended.

    Raises:
        BaseException: what a part raised, the first where several did.
    """
    if parts == 1:
        kernel(*arguments, 0, 1)
        return
    call = _Call(parts, partial(kernel, *arguments))
    _helpers.offer(call.work, parts - 1)
    call.work()
    call.wait()


class _Call:
    """The parts of one call; each is begun by the first thread that takes it."""

    def __init__(self, parts: int, kernel: Callable[[int, int], None]) -> None:
        self._parts = parts
        self._kernel = kernel
        self._waiting = list(range(parts - 1, -1, -1))
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(self) -> None:
        """Run parts until none is waiting."""
        while True:
            try:
                part = self._waiting.pop()
            except IndexError:
                return
            try:
                self._kernel(part, self._parts)
            except BaseException as error:  # belongs to the caller, whichever thread met it
                self._ended.put(error)
            else:
                self._ended.put(None)

    def wait(self) -> None:
        for _ in range(POLLS):
            if self._ended.qsize() == self._parts:
                break
            time.sleep(0)  # lets others have the GIL
        errors = [self._ended.get() for _ in range(self._parts)]
        for error in errors:
            if error is not None:
                raise error


class _Helpers:
    """Daemon threads, started when first needed, that wait for work for as long as the process lives."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A forked child has none of its parent's threads, and their locks may have been held when it was made."""
        self._offers: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._starting = threading.Lock()
        self._count = 0

    def offer(self, work: Callable[[], None], count: int) -> None:
        """Ask ``count`` threads to call ``work``; returns at once."""
        if self._count < count:
            self._start(count)
        for _ in range(min(count, self._count)):
            self._offers.put(work)

    def _start(self, count: int) -> None:
        with self._starting:
            while self._count < count:
                thread = threading.Thread(target=_serve, args=[self._offers], name="hvd_sketch kernels", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit of the system, or the interpreter is ending
                    return
                self._count += 1


def _serve(offers: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        offers.get()()  # in no variable, which would keep the call's arrays until the next one


_helpers = _Helpers()
os.register_at_fork(after_in_child=_helpers.forget)
