"""Collectives on one backend of torch.distributed: by messages between two ranks, or by the backend's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.transport.base import peers_of, sum_in_rank_order

FIRST_BYTES = 128 * 1024  # the most that an allgather's first message has; whoever has more sends a second one
LENGTH_BYTES = 8  # of the sender's whole vector, at the beginning of the first message
# An allreduce of so many bytes on all ranks together is one allgather, not a ring's 2 * (size - 1) rounds: 4 ranks on 2
# cores take 1.0 instead of 2.5 ms for 4 KiB.
SMALL_SUM_BYTES = 16 * 1024
SHARE, FIRST, REST = range(3)  # tags of messages, whose order is kept for each tag


class Carrier(ABC):
    """Collectives of contiguous tensors in memory that the backend reads; all ranks call them in the same order.

    Raises:
        RuntimeError: a rank has ended, or kept this one waiting for longer than the group's timeout.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._rank, self._size = backend.rank(), backend.size()

    @abstractmethod
    def start_alltoall(self, tensor: Tensor) -> Callable[[], Tensor]:
        """``tensor`` [size, ...], share i for rank i. The function returned waits for the shares, and returns them."""

    def start_sum(self, tensor: Tensor, total: Tensor, ordered: bool) -> Callable[[], Tensor]:
        """``tensor`` [size, ...]. The function returned waits, and returns ``total``: the sum of ``tensor[rank]``.

        With ``ordered`` the sum is made in rank order.
        """
        receive = self.start_alltoall(tensor)
        return lambda: sum_in_rank_order(list(receive()), out=total)

    @abstractmethod
    def allgather(self, tensor: Tensor) -> Tensor:
        """uint8 vectors of any lengths, concatenated in rank order."""

    def allreduce_(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        self._finish(self._backend.allreduce([tensor]), "an allreduce")

    def broadcast_(self, tensor: Tensor, root: int) -> None:
        """Copy the root's uint8 vector to all ranks, in place."""
        from torch.distributed.distributed_c10d import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = root
        self._finish(self._backend.broadcast([tensor], options), f"a broadcast from rank {root}")

    def _finish(self, work: Any, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"rank {self._rank} of {self._size} waited in vain for {what}: {error}") from error


class DirectMessages(Carrier):
    """Each share goes directly to the rank that needs it: the bytes of a ring without its rounds. For Gloo.

    Messages move while this rank computes. Those between two ranks arrive in the order of sending, so several
    collectives may be under way. Gloo's own alltoall does the same in a thread of its own, which must be woken: 0.20
    instead of 0.13 ms for 256 bytes on 2 ranks. Its reduce_scatter takes 15 instead of 6 to 7 ms for shares of 1 MB, 4
    ranks on 2 cores.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        # The messages of an allgather; its own, too.
        first = torch.empty(self._size, FIRST_BYTES, dtype=torch.uint8, device="cpu")
        self._first = list(first)
        self._lengths = first.view(torch.int64)[:, 0]
        self._arriving = self._await_first()

    def start_alltoall(self, tensor: Tensor) -> Callable[[], Tensor]:
        received = torch.empty_like(tensor)
        messages = []
        if tensor.numel() > 0:
            messages += self._receive(SHARE, ((peer, received[peer]) for peer in reversed(self._peers())))
            messages += self._send(SHARE, ((peer, tensor[peer]) for peer in self._peers()))
        received[self._rank] = tensor[self._rank]

        def wait() -> Tensor:
            self._finish_all(messages)
            return received

        return wait

    def allgather(self, tensor: Tensor) -> Tensor:
        # A receiver need not know the length of a message, only a bound, so no round is spent on the lengths. What is
        # beyond the bound follows in a second message.
        room = FIRST_BYTES - LENGTH_BYTES
        own, length = self._first[self._rank], tensor.numel()
        self._lengths[self._rank] = length
        own[LENGTH_BYTES:][:length] = tensor[:room]
        leaving = self._send(FIRST, ((peer, own[: LENGTH_BYTES + length]) for peer in self._peers()))
        if length > room:
            leaving += self._send(REST, ((peer, tensor[room:]) for peer in self._peers()))
        self._finish_all(self._arriving)
        lengths = self._lengths.tolist()
        whole = torch.empty(sum(lengths), dtype=torch.uint8, device="cpu")
        slots = whole.split(lengths)
        long = [peer for peer in reversed(self._peers()) if lengths[peer] > room]
        arriving = self._receive(REST, ((peer, slots[peer][room:]) for peer in long))
        for slot, first in zip(slots, self._first, strict=True):
            slot[:room] = first[LENGTH_BYTES:][: len(slot)]
        self._arriving = self._await_first()
        slots[self._rank][room:] = tensor[room:]
        self._finish_all(arriving + leaving)
        return whole

    def _await_first(self) -> list[tuple[Any, str]]:
        """Ask for the messages of the next allgather beforehand: with 2 ranks it takes 0.12 instead of 0.30 ms."""
        return self._receive(FIRST, ((peer, self._first[peer]) for peer in reversed(self._peers())))

    def allreduce_(self, tensor: Tensor) -> None:
        if tensor.nbytes * self._size > SMALL_SUM_BYTES:
            super().allreduce_(tensor)
            return
        terms = self.allgather(tensor.view(-1).view(torch.uint8)).view(tensor.dtype).view(self._size, *tensor.shape)
        sum_in_rank_order(list(terms), out=tensor)

    def _peers(self) -> list[int]:
        return peers_of(self._rank, self._size)

    def _receive(self, tag: int, into: Iterable[tuple[int, Tensor]]) -> list[tuple[Any, str]]:
        return [(self._backend.recv([tensor], peer, tag), f"a message from rank {peer}") for peer, tensor in into]

    def _send(self, tag: int, shares: Iterable[tuple[int, Tensor]]) -> list[tuple[Any, str]]:
        return [(self._backend.send([tensor], peer, tag), f"rank {peer} to take a message") for peer, tensor in shares]

    def _finish_all(self, messages: Iterable[tuple[Any, str]]) -> None:
        for work, what in messages:
            self._finish(work, what)


class DeviceCollectives(Carrier):
    """The backend's own collectives, in the device's current stream. For NCCL, with which only one rank has
    exchanged on a GPU yet.
    """

    def start_sum(self, tensor: Tensor, total: Tensor, ordered: bool) -> Callable[[], Tensor]:
        if ordered:
            return super().start_sum(tensor, total, ordered)
        work = self._backend._reduce_scatter_base(total.view(-1), tensor.view(-1))
        return lambda: self._received(work, "a reduce_scatter", total)

    def start_alltoall(self, tensor: Tensor) -> Callable[[], Tensor]:
        received = torch.empty_like(tensor)
        work = self._backend.alltoall_base(received.view(-1), tensor.view(-1), [], [])
        return lambda: self._received(work, "an alltoall", received)

    def allgather(self, tensor: Tensor) -> Tensor:
        lengths = self._gather(torch.tensor([tensor.numel()], device=tensor.device)).tolist()
        padded = tensor.new_zeros(max(lengths))
        padded[: tensor.numel()] = tensor
        parts = self._gather(padded).view(self._size, -1) if len(padded) else padded.expand(self._size, 0)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def _gather(self, tensor: Tensor) -> Tensor:
        """Equal lengths."""
        gathered = tensor.new_empty(self._size * tensor.numel())
        return self._received(self._backend._allgather_base(gathered, tensor), "an allgather", gathered)

    def _received(self, work: Any, what: str, tensor: Tensor) -> Tensor:
        self._finish(work, what)
        return tensor
