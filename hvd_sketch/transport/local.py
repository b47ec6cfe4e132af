"""Ranks that are threads of one process: for tests, and to simulate many workers on one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch
from torch import Tensor

from hvd_sketch.checks import check_integer
from hvd_sketch.transport.base import Handle, Pending, check_shares, same_color, sum_in_rank_order

T = TypeVar("T")
Combine = Callable[[list[Tensor]], Tensor]


NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


class _Room:
    """What the ranks of one group share: the tensor that each rank shows, and the result for all ranks."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], _Room] = {}
        self.shown: list[Tensor] = [NOTHING] * size
        self.combine: Combine | None = None
        self.combined = NOTHING
        self.all_show = threading.Barrier(size, self._combine, timeout_s)
        self.all_have_read = threading.Barrier(size, timeout=timeout_s)

    def part(self, number: int, color: int, size: int) -> _Room:
        """The room of the ranks of one colour in the ``number``-th split."""
        with self._lock:
            room = self._parts.setdefault((number, color), _Room(size, self._timeout_s))
        if self.all_show.broken:
            room.abort()
        return room

    def abort(self) -> None:
        """Release whoever waits here or in a part, now or later."""
        self.all_show.abort()
        self.all_have_read.abort()
        with self._lock:
            parts = list(self._parts.values())
        for part in parts:
            part.abort()

    def _combine(self) -> None:
        """Make the result for all ranks, once."""
        if self.combine is not None:
            self.combined = self.combine(self.shown)


class LocalTransport:
    """One rank of a group of threads; made by :func:`local_transports`. Sums are in rank order."""

    overlaps = False

    def __init__(self, room: _Room, rank: int) -> None:
        self._room = room
        self._splits = 0
        self.rank, self.size = rank, len(room.shown)

    def stages(self, device: torch.device) -> bool:
        return False

    def allreduce_(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, tensor.copy_, sum_in_rank_order)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        check_shares(tensor, self.size, "reduce_scatter")
        return self._exchange(tensor, lambda _: sum_in_rank_order(self._shown_to_me()))

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        check_shares(tensor, self.size, "reduce_scatter")
        # The sum is made in wait(): of many that were started, one at a time takes memory.
        return Pending(lambda: tensor[0] if self.size == 1 else self.reduce_scatter(tensor))

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_shares(tensor, self.size, "alltoall")
        return self._exchange(tensor, lambda _: torch.stack(self._shown_to_me()))

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, torch.clone, torch.cat)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self._exchange(tensor, tensor.copy_, lambda shown: shown[root].clone())

    def barrier(self) -> None:
        self._room.all_have_read.wait()

    def split(self, color: int) -> LocalTransport:
        """The ranks that give the same colour, in rank order. Communication: collective."""
        members = same_color(self, color)
        self._splits += 1
        return LocalTransport(self._room.part(self._splits, color, len(members)), members.index(self.rank))

    def abort(self) -> None:
        """Release the other ranks, now or at their next collective, with ``BrokenBarrierError``."""
        self._room.abort()

    def _shown_to_me(self) -> list[Tensor]:
        return [tensor[self.rank] for tensor in self._room.shown]

    def _exchange(self, tensor: Tensor, read: Callable[[Tensor], Tensor], combine: Combine | None = None) -> Tensor:
        """Show ``tensor`` to the group, read the combined tensors, and return once all have read."""
        room = self._room
        room.shown[self.rank] = tensor
        room.combine = combine  # the same on all ranks
        room.all_show.wait()
        result = read(room.combined)
        room.all_have_read.wait()
        room.shown[self.rank] = NOTHING  # neither is kept until the next collective
        if self.rank == 0:
            room.combined = NOTHING
        return result


def local_transports(size: int, timeout_s: float = 300.0) -> list[LocalTransport]:
    """``size`` ranks, at least 1, for as many threads of this process.

    Ranks that wait for longer than ``timeout_s`` in one collective raise ``threading.BrokenBarrierError``.
    """
    check_integer("size", size, 1)
    room = _Room(size, timeout_s)
    return [LocalTransport(room, rank) for rank in range(size)]


class LocalRanks:
    """Ranks as threads that run one function after another, until the context ends; see :func:`local_transports`."""

    def __init__(self, size: int, timeout_s: float = 300.0) -> None:
        self.transports = local_transports(size, timeout_s)
        self._pool = ThreadPoolExecutor(size, "local rank")

    def run(self, function: Callable[[LocalTransport], T]) -> list[T]:
        """What ``function(transport)`` returns on every rank, in rank order.

        When one rank raises, the other ranks are released for good. The first failure that is not a consequence of
        another one is raised here.
        """

        def rank_main(transport: LocalTransport) -> T:
            try:
                return function(transport)
            except BaseException:
                transport.abort()
                raise

        futures = [self._pool.submit(rank_main, transport) for transport in self.transports]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        causes = [failure for failure in failures if not isinstance(failure, threading.BrokenBarrierError)]
        for failure in causes or failures:
            raise failure
        return [future.result() for future in futures]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._pool.shutdown()


def run_local(size: int, function: Callable[[LocalTransport], T], timeout_s: float = 300.0) -> list[T]:
    """Run ``function(transport)`` on ``size`` threads; see :meth:`LocalRanks.run`."""
    with LocalRanks(size, timeout_s) as ranks:
        return ranks.run(function)
