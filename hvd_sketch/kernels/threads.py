"""Parts of a kernel call on several threads: torch's own OpenMP threads, or plain Python threads of ours.

Numba's threads (``parallel=True``) are not used, because they belong to the user's process as well. Once its OpenMP
pool runs, forked workers of a DataLoader that use Numba die; starting it changes the number of torch's threads; and
its workqueue ends a process that enters it from two threads.

Torch's threads are those that have just computed the gradient. They wait for more work without sleeping for some
milliseconds, in which other threads would have to share the cores with them: a step of 25 million coordinates on two
cores takes 50 ms on torch's threads and 57 ms beside them.

The caller needs no helper to come to an end: it takes every part that no other thread has begun. So threads that start
late, that are busy with another caller's parts or that cannot be started cost time only.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
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
    if _team.is_usable:
        _team.run(call.work, parts)
    else:
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


class _Team:
    """The threads of the OpenMP library that torch computes with."""

    def __init__(self) -> None:
        self._parallel = _find_gomp_parallel()

    @property
    def is_usable(self) -> bool:
        return self._parallel is not None

    def forget(self) -> None:
        """OpenMP's threads do not survive a fork, and the library does not notice."""
        self._parallel = None

    def run(self, work: Callable[[], None], count: int) -> None:
        """Call ``work`` on ``count`` threads, the caller's among them, or on fewer; returns when all have ended."""
        assert self._parallel is not None
        self._parallel(ENTRY(lambda _: work()), None, count, 0)


def _find_gomp_parallel() -> Callable[..., None] | None:
    """``GOMP_parallel``, which starts a parallel region: GNU's library has it, and those of LLVM and Intel, too."""
    bundled = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    for path in [*map(str, bundled), None]:  # None: whatever is loaded for all
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ENTRY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


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


_helpers, _team = _Helpers(), _Team()
os.register_at_fork(after_in_child=_helpers.forget)
os.register_at_fork(after_in_child=_team.forget)
