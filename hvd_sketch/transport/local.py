"""Local: the ranks are threads of one process. For tests, and to simulate many workers on one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hvd_sketch.transport.base import Handle, check_parts, sum_in_rank_order

T = TypeVar("T")


class _Room:
    """What the ranks of one group share: a barrier, and a slot per rank to show a tensor in."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)


class LocalTransport:
    """One rank of a group of threads; made by :func:`local_transports`. Sums are in rank order."""

    def __init__(self, room: _Room, rank: int) -> None:
        self._room = room
        self._rank = rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._room.slots)

    @property
    def overlaps(self) -> bool:
        return False

    def stages(self, device: torch.device) -> bool:
        return False

    def allreduce_(self, tensor: Tensor) -> Tensor:
        total = self._exchange(tensor, sum_in_rank_order)
        return tensor.copy_(total)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        check_parts(tensor, self.size, "reduce_scatter")
        mine = self._rank
        return self._exchange(tensor, lambda shown: sum_in_rank_order([part[mine] for part in shown]))

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        check_parts(tensor, self.size, "reduce_scatter")
        return _Postponed(self, tensor)

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_parts(tensor, self.size, "alltoall")
        mine = self._rank
        return self._exchange(tensor, lambda shown: torch.stack([part[mine] for part in shown]))

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, torch.cat)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        source = self._exchange(tensor, lambda shown: shown[root].clone())
        return tensor.copy_(source)

    def barrier(self) -> None:
        self._room.barrier.wait()

    def abort(self) -> None:
        """Release the other ranks, now or at their next collective, with ``BrokenBarrierError``."""
        self._room.barrier.abort()

    def _exchange(self, tensor: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Show ``tensor`` to the group, read the group's, and leave once all have read."""
        self._room.slots[self._rank] = tensor
        self._room.barrier.wait()
        result = read([shown for shown in self._room.slots if shown is not None])
        self._room.barrier.wait()
        return result


class _Postponed:
    """A reduce_scatter that is made when it is waited for: of many started, one sum at a time takes memory."""

    def __init__(self, transport: LocalTransport, tensor: Tensor) -> None:
        self._transport, self._tensor = transport, tensor

    def wait(self) -> Tensor:
        return self._tensor[0] if self._transport.size == 1 else self._transport.reduce_scatter(self._tensor)


def local_transports(size: int, timeout_s: float = 300.0) -> list[LocalTransport]:
    """``size`` ranks for as many threads of this process.

    Args:
        size: how many ranks, at least 1.
        timeout_s: after so long in one collective the waiting ranks raise ``threading.BrokenBarrierError``.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    room = _Room(size, timeout_s)
    return [LocalTransport(room, rank) for rank in range(size)]


def run_local(size: int, function: Callable[[LocalTransport], T], timeout_s: float = 300.0) -> list[T]:
    """Run ``function(transport)`` on ``size`` threads; returns the results in rank order.

    When one rank raises, the others are released and the first failure that is not a mere consequence
    is raised here.
    """

    def rank_main(transport: LocalTransport) -> T:
        try:
            return function(transport)
        except BaseException:
            transport.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_main, t) for t in local_transports(size, timeout_s)]
    failures = [future.exception() for future in futures]
    causes = [f for f in failures if f is not None and not isinstance(f, threading.BrokenBarrierError)]
    for failure in causes or failures:
        if failure is not None:
            raise failure
    return [future.result() for future in futures]
