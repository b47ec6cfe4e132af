"""Kernel calls on several threads: torch's own OpenMP threads, or Python threads of ours.

Numba's threads (``parallel=True``) are not used, because they belong to the user's process as well. Once its OpenMP
pool runs, forked workers of a DataLoader that use Numba die. Starting the pool changes the number of torch's threads.
Its workqueue ends a process that enters it from two threads.

Torch's threads have just computed the gradient and wait for more work for some milliseconds without sleeping: a step of
25 million coordinates on two cores takes 50 ms on torch's threads, and 57 ms on others that share the cores with them.

The caller never depends on a helper: it runs every index that no other thread has begun. Threads that start late, are
busy with another call or cannot be started only cost time.

Python runs signal handlers, such as the one of Ctrl-C, between the instructions of the main thread, and any of them may
raise. Then the caller begins no more indices, waits until the other threads have left the kernel, and raises.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

ENTRY = ctypes.CFUNCTYPE(None, ctypes.py_object)
LAST_WAIT_S = 1.0  # for the helpers to end, when the program does
POLLS = 100  # before a caller sleeps until a helper ends: threads end together, and to be woken takes 20 us


def run_on_threads(threads: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Call ``kernel(*arguments, thread, threads)`` for thread = 0 … threads - 1, in parallel where threads are free.

    No index ``thread`` runs twice. Any number of threads may call this at the same time. On return, and when this
    raises, no thread is in the kernel.

    Raises:
        BaseException: what a kernel or a signal handler raised, one of them where several did. Some indices may not
            have run then.
    """
    if threads == 1:
        kernel(*arguments, 0, 1)
        return
    call = _Call(threads, partial(kernel, *arguments))
    torch_threads = torch.get_num_threads()
    if _team.suits(threads, torch_threads):
        call.run_on_team(torch_threads)
    else:
        call.run_on_helpers()


class _Call:
    """The indices of one call. The first thread that takes an index runs it."""

    def __init__(self, threads: int, kernel: Callable[[int, int], None]) -> None:
        self._threads = threads
        self._kernel = kernel
        self._waiting = list(range(threads - 1, -1, -1))
        self._helping: list[threading.Lock] = []  # one for each helper that has come, locked while the helper is here
        self._error: BaseException | None = None

    def run_on_team(self, size: int) -> None:
        visits = [self._visit() for _ in range(size)]
        for visit in visits:
            next(visit)
        _team.run(visits)
        self._raise_error()
        self._work()  # in case that no thread came

    def run_on_helpers(self) -> None:
        try:
            _helpers.offer(self._help, self._threads - 1)
            self._work()
        except BaseException as error:
            self._error = error
        while True:  # whatever signals arrive: helpers write to the caller's arrays
            try:
                self._wait_for_helpers()
                break
            except BaseException as error:
                self._error = error
        self._raise_error()

    def _work(self) -> None:
        """Run indices until none is waiting."""
        while True:
            try:
                thread = self._waiting.pop()
            except IndexError:
                return
            self._kernel(thread, self._threads)

    def _visit(self) -> Iterator[None]:
        """What a thread of the team does at the second ``next``, which raises nothing.

        OpenMP calls a function that nobody could catch an exception of. A signal handler may raise at the beginning of
        a function, before any ``try``; a generator that has been started continues inside its ``try``.
        """
        try:
            yield
            self._work()
        except GeneratorExit:  # the team had fewer threads
            return
        except BaseException as error:
            self._error = error
        yield

    def _help(self) -> None:
        """Work as a helper. A helper that comes after the caller's end finds no index."""
        here = threading.Lock()
        with here:
            self._helping.append(here)  # before taking an index: the caller clears the indices, then looks who is here
            try:
                self._work()
            except BaseException as error:  # belongs to the caller
                self._error = error

    def _wait_for_helpers(self) -> None:
        """Return when no helper is in the kernel, nor will enter it. May be called again after an interruption."""
        self._waiting.clear()
        for here in self._helping:
            for _ in range(POLLS):
                if not here.locked():
                    break
                time.sleep(0)  # lets others have the GIL
            with here:
                pass

    def _raise_error(self) -> None:
        try:
            if self._error is not None:
                raise self._error
        finally:
            self._error = None  # the traceback refers to this call, and this call to the arrays


class _Team:
    """The threads of the OpenMP library that torch computes with."""

    def __init__(self) -> None:
        self._parallel = _find_gomp_parallel()
        self._entry = ENTRY(next)

    @property
    def is_usable(self) -> bool:
        return self._parallel is not None

    def suits(self, threads: int, torch_threads: int) -> bool:
        """Whether to run ``threads`` indices on a team. A team always has as many threads as torch uses."""
        # A smaller team ends the threads that it leaves out, and torch's next operation starts others: with 8 threads,
        # a sum of 4 million values by torch and a call on two took 5.9 ms, and 0.6 ms with all 8 in the team.
        # But threads without an index have to get the GIL, too: 20 us each, on two cores. So they must be the minority.
        return self.is_usable and threads <= torch_threads < 2 * threads

    def forget(self) -> None:
        """OpenMP's threads do not survive a fork, and the library does not notice."""
        self._parallel = None

    def run(self, visits: list[Iterator[None]]) -> None:
        """Call ``next`` of each visit on a thread of its own, one of them the caller's; returns when all have ended.

        Some visits are left out where OpenMP gives fewer threads, as it does to callers within a team.
        """
        assert self._parallel is not None
        self._parallel(self._entry, map(next, visits), len(visits), 0)


def _find_gomp_parallel() -> Callable[..., None] | None:
    """``GOMP_parallel``, which starts a parallel region. GNU's, LLVM's and Intel's libraries have it."""
    bundled = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    for path in [*map(str, bundled), None]:  # None: whatever is loaded for all
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ENTRY, ctypes.py_object, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


class _Helpers:
    """Daemon threads, started when first needed, that wait for work until the program ends."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A forked child has none of its parent's threads, and their locks may have been held at the fork."""
        self._offers: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_over = False

    def offer(self, work: Callable[[], None], count: int) -> None:
        """Ask ``count`` threads to call ``work``; returns at once. When the program ends there are none."""
        if len(self._threads) < count and not self._is_over:
            self._start(count)
        for _ in range(min(count, len(self._threads))):
            self._offers.put(work)

    def end(self) -> None:
        """End the threads, for good, and wait for them.

        The interpreter unwinds daemon threads that still run when it ends, which C++ on their stacks may not survive.
        """
        self._is_over = True
        threads, self._threads = self._threads, []
        for _ in threads:
            self._offers.put(None)
        until_s = time.monotonic() + LAST_WAIT_S
        for thread in threads:
            thread.join(max(until_s - time.monotonic(), 0.0))

    def _start(self, count: int) -> None:
        with self._starting:
            while len(self._threads) < count:
                thread = threading.Thread(target=_serve, args=[self._offers], name="hvd_sketch kernels", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit of the system, or the interpreter is ending
                    return
                self._threads.append(thread)  # last: a signal in between leaves one uncounted, never one missing


def _serve(offers: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := offers.get()) is not None:
        work()
        del work  # it would keep the call's arrays until the next one


_helpers, _team = _Helpers(), _Team()
atexit.register(_helpers.end)
os.register_at_fork(after_in_child=_helpers.forget)
os.register_at_fork(after_in_child=_team.forget)
