"""The ranks' collectives where one process holds what all of them would: sums and choices over every rank at once."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.selection import VectorPart, select_largest
from hvd_sketch.transport.base import Finished, Handle, Transport


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


def largest_by_owner(
    kernels: ModuleType, hash: BlockHash, estimates: Tensor, count: int, comm: Transport, floor: int = 0
) -> tuple[Tensor, int]:
    """What the owners choose together among the estimates of all coordinates, float32 [dim].

    Args: as for :func:`hvd_sketch.selection.select_largest`.

    Returns:
        At most ``count`` coordinates that are not zero, int64 ascending; equal magnitudes at the threshold are dealt
        out by (owner, coordinate). And the threshold.
    """
    largest = select_largest(VectorPart(kernels, estimates), count, comm, floor)
    chosen, threshold = largest.positions, largest.threshold
    if threshold == 0:
        return chosen, threshold
    at_least = kernels.select_above(estimates, threshold - 1, 0)
    if at_least.numel() == chosen.numel():
        return chosen, threshold
    above = kernels.select_above(estimates, threshold, 0)
    is_tie = torch.ones_like(at_least, dtype=torch.bool)
    is_tie[torch.searchsorted(at_least, above)] = False
    ties = at_least[is_tie]
    by_owner = torch.argsort(_owners(hash, ties), stable=True)
    taken = ties[by_owner[: count - above.numel()]]
    return torch.cat([above, taken]).sort().values, threshold


def owned_positions(hash: BlockHash, coordinates: Tensor) -> list[Tensor]:
    """Each owner's among ``coordinates`` (int64, ascending), as positions in its own order: int64, on the CPU."""
    coordinates = coordinates.cpu()
    owners = _owners(hash, coordinates)
    # Every group of blocks has one of each owner's.
    positions = coordinates // (hash.block * hash.shards) * hash.block + coordinates % hash.block
    by_owner = torch.argsort(owners, stable=True)
    counts = torch.bincount(owners, minlength=hash.shards).tolist()
    return list(positions[by_owner].split(counts))


def _owners(hash: BlockHash, coordinates: Tensor) -> Tensor:
    """The rank each coordinate belongs to: int64, on the device of ``coordinates``."""
    blocks = coordinates.cpu().numpy() // hash.block
    return torch.from_numpy(hash.shard_of(blocks)).to(coordinates.device)
