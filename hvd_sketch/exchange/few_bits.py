"""Sums over the ranks of which few-bit codes travel, without losing what the rounding leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from hvd_sketch.transport.base import in_equal_shares
from hvd_sketch.transport.metered import MeteredTransport


@dataclass(frozen=True)
class RoundedSum:
    """A sum over the ranks, of numbers that may have been rounded.

    Attributes:
        total: float32 [n], equal on all ranks.
        sent: float32 [n], what this rank has put into it. Over the ranks it adds up to ``total``, up to the rounding of
            float32: an error feedback that keeps the rest loses nothing.
    """

    total: Tensor
    sent: Tensor


def sum_in_few_bits(
    comm: MeteredTransport,
    kernels: ModuleType,
    values: Tensor,
    bits: int,
    phases: tuple[str, str] = ("exact", "values"),
) -> RoundedSum:
    """Sum float32 [n] over the ranks; codes of ``bits`` bits travel, see :func:`.kernels.reference.quantize`.

    Each rank rounds its values and sends a share to every other rank. A share's owner adds up what arrives, in float32
    and in rank order, rounds the sum and sends it to all. What it rounds off the sum counts as not sent by the owner.

    With 32 bits float32 travels and nothing is rounded: ``sent`` is ``values`` itself.

    Communication: collective: an alltoall (with 32 bits a reduce_scatter) and an allgather, each of n codes.

    Args:
        comm: the ranks.
        kernels: a backend for the device of ``values``.
        values: finite, also their sum.
        bits: 4, 8, 16 or 32.
        phases: of the two collectives, in the ledger.
    """
    shares = in_equal_shares(values, comm.size)  # [size, share]
    if bits == 32:
        with comm.phase(phases[0]):
            exact_sum = comm.reduce_scatter(shares)  # [share]
        with comm.phase(phases[1]):
            return RoundedSum(comm.allgather(exact_sum)[: values.numel()], values)
    length = shares.shape[1]
    codes = kernels.quantize(shares, bits)
    sent = kernels.dequantize_sum(codes.unsqueeze(0), length, bits)
    with comm.phase(phases[0]):
        arrived = comm.alltoall(codes)  # [size, bytes]
    own_sum = kernels.dequantize_sum(arrived.unsqueeze(1), length, bits)  # [1, share]
    with comm.phase(phases[1]):
        rounded = comm.allgather(kernels.quantize(own_sum, bits))  # [size, bytes]
    total = kernels.dequantize_sum(rounded.unsqueeze(0), length, bits)  # [size, share]
    sent[comm.rank] += total[comm.rank] - own_sum[0]
    return RoundedSum(total.view(-1)[: values.numel()], sent.view(-1)[: values.numel()])
