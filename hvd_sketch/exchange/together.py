"""Collectives that carry several things at once: a collective costs time however little it sends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.transport.metered import MeteredTransport


def alltoall_together(comm: MeteredTransport, *tensors: Tensor) -> list[Tensor]:
    """What an alltoall makes of each of some tensors [ranks, n], of any dtypes and widths, on one device.

    Communication: collective; one alltoall.
    """
    arrived = comm.alltoall(torch.cat([_bytes_of(tensor) for tensor in tensors], dim=1))
    return _apart(arrived, *tensors)


def allgather_both(comm: MeteredTransport, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' [n] and [m], on one device, as [ranks, n] and [ranks, m]; equally long on all ranks.

    Communication: collective; one allgather.
    """
    first, second = first.unsqueeze(0), second.unsqueeze(0)
    gathered = comm.allgather(torch.cat([_bytes_of(first), _bytes_of(second)], dim=1))
    both = _apart(gathered, first, second)
    return both[0], both[1]


def allgather_with_code(comm: MeteredTransport, head: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' heads, [ranks, n], and their codes one after the other, uint8.

    Communication: collective; one allgather. It also brings each code's length, in 8 bytes.

    Args:
        comm: the ranks.
        head: [n] of this rank, of any dtype, on the CPU; equally long on all ranks.
        code: uint8 of this rank, on the CPU; the ranks' lengths may differ.
    """
    length = torch.tensor([code.numel()], device="cpu")
    gathered = comm.allgather(_joined([length.view(torch.uint8), _bytes_of(head), code]))
    heads, codes = [], []
    at = 0
    while at < gathered.numel():
        length, own_head, rest = gathered[at:].tensor_split([8, 8 + head.nbytes])
        heads.append(own_head.clone().view(head.dtype))
        codes.append(rest[: int(length.clone().view(torch.int64))])
        at += 8 + head.nbytes + codes[-1].numel()
    return torch.stack(heads), _joined(codes)


def _joined(parts: list[Tensor]) -> Tensor:
    """Bytes on the CPU, one after the other. torch.cat wakes all of its threads for them, which can take 5 ms."""
    joined = torch.empty(sum(part.numel() for part in parts), dtype=torch.uint8, device="cpu")
    np.concatenate([part.numpy() for part in parts], out=joined.numpy())
    return joined


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _apart(joined: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Bytes [ranks, …] as the tensors that they were; copies, because bytes may lie where no number may."""
    parts = joined.split([tensor[0].nbytes for tensor in tensors], dim=1)
    apart = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [part.view(tensor.dtype) for part, tensor in zip(apart, tensors, strict=True)]
