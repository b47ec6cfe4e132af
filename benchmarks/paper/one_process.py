"""The ranks' collectives where one process holds what all of them would: sums and choices over every rank at once."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.coding import Shortlist
from hvd_sketch.coding.host import encode_shortlist
from hvd_sketch.exchange.threshold import Cut
from hvd_sketch.hashing import BlockHash
from hvd_sketch.transport.base import Finished, Handle


class OneProcess:
    """A transport of ``size`` ranks whose only caller holds the data of all: what arrives is summed already.

    Put behind a ``MeteredTransport``, it counts the collectives that as many real ranks issue.
    """

    rank = 0
    overlaps = False

    def __init__(self, size: int) -> None:
        self.size = size

    def stages(self, device: torch.device) -> bool:
        return False

    def allreduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return tensor

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        return Finished(tensor)

    def alltoall(self, tensor: Tensor) -> Tensor:
        return tensor

    def allgather(self, tensor: Tensor) -> Tensor:
        """The other ranks have zeros."""
        return torch.cat([tensor, tensor.new_zeros((self.size - 1) * len(tensor), *tensor.shape[1:])])

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        return tensor

    def barrier(self) -> None:
        pass


def propose(kernels: ModuleType, hash: BlockHash, estimates: Tensor, cut: Cut) -> list[Shortlist]:
    """What each owner takes of the estimates of all coordinates, float32 [dim]: coordinates instead of positions."""
    taken = kernels.select_above(estimates, cut.threshold, 0)
    if cut.ties:
        at_least = kernels.select_above(estimates, cut.threshold - 1, 0)
        is_tie = torch.ones_like(at_least, dtype=torch.bool)
        is_tie[torch.searchsorted(at_least, taken)] = False
        ties = at_least[is_tie]
        dealt = ties[torch.argsort(_owners(hash, ties), stable=True)[: cut.ties]]
        taken = torch.cat([taken, dealt]).sort().values
    owners = _owners(hash, taken)
    counts = torch.bincount(owners, minlength=hash.shards).tolist()
    by_owner = taken[torch.argsort(owners, stable=True)].split(counts)
    return [_shortlist(own.cpu(), estimates[own].cpu(), cut) for own in by_owner]


def _shortlist(coordinates: Tensor, values: Tensor, cut: Cut) -> Shortlist:
    doubtful = cut.doubtful(values)
    return Shortlist(coordinates, doubtful, values[doubtful])


def encoded_bytes(hash: BlockHash, shortlist: Shortlist) -> int:
    """The length of what an owner sends."""
    return encode_shortlist(replace(shortlist, positions=in_own_order(hash, shortlist.positions))).numel()


def in_own_order(hash: BlockHash, coordinates: Tensor) -> Tensor:
    """One owner's coordinates, int64, as positions in its own order: every group of blocks has one of each owner's."""
    return coordinates // (hash.block * hash.shards) * hash.block + coordinates % hash.block


def _owners(hash: BlockHash, coordinates: Tensor) -> Tensor:
    """The rank each coordinate belongs to: int64, on the device of ``coordinates``."""
    blocks = coordinates.cpu().numpy() // hash.block
    return torch.from_numpy(hash.shard_of(blocks)).to(coordinates.device)
