"""The ranks' collectives where one process holds what all of them would: sums and choices over every rank at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.coding.host import encode_positions
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


def split_by_owner(hash: BlockHash, coordinates: Tensor) -> list[Tensor]:
    """Ascending coordinates, int64, of every owner apart."""
    owners = _owners(hash, coordinates)
    counts = torch.bincount(owners, minlength=hash.shards).tolist()
    return list(coordinates[torch.argsort(owners, stable=True)].split(counts))


def encoded_bytes(hash: BlockHash, coordinates: Tensor) -> int:
    """How many bytes all owners send to name ascending coordinates, int64."""
    owned = enumerate(split_by_owner(hash, coordinates.cpu()))
    return sum(encode_positions(in_own_order(hash, own), hash.owned_size(owner)).numel() for owner, own in owned)


def in_own_order(hash: BlockHash, coordinates: Tensor) -> Tensor:
    """One owner's coordinates, int64, as positions in its own order: every group of blocks has one of each owner's."""
    return coordinates // (hash.block * hash.shards) * hash.block + coordinates % hash.block


def _owners(hash: BlockHash, coordinates: Tensor) -> Tensor:
    """The rank each coordinate belongs to: int64, on the device of ``coordinates``."""
    blocks = coordinates.cpu().numpy() // hash.block
    return torch.from_numpy(hash.shard_of(blocks)).to(coordinates.device)
