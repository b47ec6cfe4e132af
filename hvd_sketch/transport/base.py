"""What the exchange asks of a network: seven collectives, equal in meaning on every transport.

Every method except ``rank`` and ``size`` is collective: all ranks call it in the same order with the
same dtype and, where not said otherwise, the same shape. Sums are elementwise over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class Handle(Protocol):
    """A reduce_scatter under way."""

    def wait(self) -> Tensor:
        """Finish it and return this rank's share of the sum; call exactly once, in order of starting.

        The share may use the memory of the tensor that was given.
        """


@runtime_checkable
class Transport(Protocol):
    """One rank's end of the collectives. Tensors are contiguous."""

    @property
    def rank(self) -> int:
        """This rank, ``0 … size - 1``."""

    @property
    def size(self) -> int:
        """How many ranks there are (``W``)."""

    @property
    def overlaps(self) -> bool:
        """Whether a started reduce_scatter continues while this rank computes, so that starting early pays."""

    def stages(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` travel as copies on the host. Communication: none."""

    def allreduce_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; also returned. float32, float64, int32 or int64."""

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        """``tensor`` [size, ...]: returns the sum over ranks of ``tensor[rank]`` as a new tensor [...].

        With ``ordered`` the sum is made in rank order: the same bits on every transport. float32, float64, int32
        or int64.
        """

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        """Begin a :meth:`reduce_scatter`, of the same bits; ``tensor`` must stay untouched until ``wait()`` returns.

        Several may be in flight, and other collectives may run between start and ``wait()``.
        """

    def alltoall(self, tensor: Tensor) -> Tensor:
        """``tensor`` [size, ...], share i for rank i: returns the shares sent to this rank, in rank order."""

    def allgather(self, tensor: Tensor) -> Tensor:
        """Concatenate along dimension 0 in rank order. Sizes of dimension 0 may differ, and be 0."""

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Copy the root's tensor to all ranks, in place; also returned."""

    def barrier(self) -> None:
        """Return once every rank has called it."""


@runtime_checkable
class Splitting(Protocol):
    """A transport whose ranks can form groups."""

    def split(self, color: int) -> Transport:
        """The ranks that give the same colour, in rank order, as a transport. Communication: collective."""


@dataclass(frozen=True)
class Pending:
    """A handle that calls a function to finish."""

    wait: Callable[[], Tensor]


def finished(result: Tensor) -> Handle:
    """The handle of a reduce_scatter that is done already."""
    return Pending(lambda: result)


def sum_in_rank_order(terms: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """``((terms[0] + terms[1]) + terms[2]) + …``, the same bits on every transport; written to ``out`` if given."""
    total = terms[0].clone() if out is None else out.copy_(terms[0])
    for term in terms[1:]:
        total += term
    return total


def mean_over_ranks(transport: Transport, tensor: Tensor) -> Tensor:
    """The mean of a float32 or float64 [n] tensor over ranks, equal bits on all. Communication: collective."""
    own_sum = transport.reduce_scatter(in_equal_shares(tensor, transport.size))
    return transport.allgather(own_sum)[: tensor.numel()].div_(transport.size)


def in_equal_shares(tensor: Tensor, ranks: int) -> Tensor:
    """[n] as [ranks, ceil(n / ranks)], with zeros at the end; no copy where ``ranks`` divides n."""
    missing = -tensor.numel() % ranks
    return (torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor).view(ranks, -1)


def allgather_empty(transport: Transport, tensor: Tensor) -> Tensor:
    """An allgather of tensors whose rows have no elements: their bytes, none, do not say how many rows there are.

    Communication: collective.
    """
    rows = transport.allgather(torch.tensor([len(tensor)], device="cpu"))
    return tensor.new_empty(int(rows.sum()), *tensor.shape[1:])


def peers_of(rank: int, size: int) -> list[int]:
    """All other ranks, from the next one on: the first messages of the ranks all go to different ranks."""
    return [(rank + distance) % size for distance in range(1, size)]


def check_shares(tensor: Tensor, size: int, collective: str) -> None:
    """Refuse a tensor whose first dimension is not one share per rank."""
    if tensor.ndim == 0 or tensor.shape[0] != size:
        raise ValueError(
            f"{collective} needs a tensor with one share for each of the {size} ranks along dimension 0, "
            f"got shape {tuple(tensor.shape)}"
        )


def same_color(transport: Transport, color: int) -> list[int]:
    """The ranks that give the same colour, ascending. Communication: collective."""
    colors = transport.allgather(torch.tensor([color], device="cpu")).tolist()
    return [rank for rank, each in enumerate(colors) if each == color]


def name_ranks(ranks: list[int]) -> str:
    """Ranks in words."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def gather_texts(comm: Transport, text: str) -> list[str]:
    """Every rank's text, in rank order. Communication: collective, all ranks."""
    data = np.frombuffer(text.encode(), dtype=np.uint8).copy()
    sizes = comm.allgather(torch.tensor([len(data)], device="cpu")).tolist()
    gathered = comm.allgather(torch.from_numpy(data)).numpy().tobytes()
    ends = np.cumsum(sizes).tolist()
    return [gathered[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]
