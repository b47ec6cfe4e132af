"""Sums over the ranks of which few-bit codes travel, without losing what the rounding leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.exchange.together import allgather_both, alltoall_together
from hvd_sketch.transport.base import in_equal_shares, sum_in_rank_order
from hvd_sketch.transport.metered import MeteredTransport


@dataclass(frozen=True)
class RoundedSum:
    """A sum over the ranks, of numbers that may have been rounded.

    Attributes:
        total: float32 [n], equal on all ranks.
        sent: float32 [n], what this rank has put into it. Over the ranks it adds up to ``total``, up to the rounding of
            float32: an error feedback that keeps the rest loses nothing.
        beside: float32 [m], the sum of the vector that travelled in the same collectives, equal on all ranks; with
            zeros at the end, up to a multiple of the ranks.
    """

    total: Tensor
    sent: Tensor
    beside: Tensor | None = None


@dataclass(frozen=True)
class RoundedShares:
    """One rank's values, rounded, before they travel.

    Attributes:
        codes: uint8 [ranks, bytes], a share for each owner of sums.
        sent: float32 [ranks, share], what the codes stand for.
    """

    codes: Tensor
    sent: Tensor


def sum_in_few_bits(
    comm: MeteredTransport,
    kernels: ModuleType,
    values: Tensor,
    bits: int,
    phases: tuple[str, str] = ("exact", "values"),
    beside: Tensor | None = None,
) -> RoundedSum:
    """Sum float32 [n] over the ranks; codes of ``bits`` bits travel, see :func:`.kernels.reference.quantize`.

    Each rank rounds its values and sends a share to every other rank. A share's owner adds up what arrives, in float32
    and in rank order, rounds the sum and sends it to all. What it rounds off the sum counts as not sent by the owner.

    With 32 bits float32 travels and nothing is rounded: ``sent`` is ``values`` itself.

    Communication: collective: an alltoall (with 32 bits a reduce_scatter) and an allgather, each of n codes; none where
    there is nothing to sum.

    Args:
        comm: the ranks.
        kernels: a backend for the device of ``values``.
        values: finite, also their sum.
        bits: 4, 8, 16 or 32.
        phases: of the two collectives, in the ledger.
        beside: float32 [m], a small vector to sum in the same collectives, without rounding.
    """
    if values.numel() == 0 and beside is None:
        return RoundedSum(values, values)
    if bits == 32:
        return _sum_of_floats(comm, values, phases, beside)
    shares = rounded_shares(kernels, values, comm.size, bits)
    with comm.phase(phases[0]):
        if beside is None:
            arrived, terms = comm.alltoall(shares.codes), None
        else:
            arrived, terms = alltoall_together(comm, shares.codes, in_equal_shares(beside, comm.size))
    return sum_of_shares(comm, kernels, shares, arrived, values.numel(), bits, phases[1], terms)


def _sum_of_floats(
    comm: MeteredTransport, values: Tensor, phases: tuple[str, str], beside: Tensor | None
) -> RoundedSum:
    parts = [values] if beside is None else [values, beside]
    shares = [in_equal_shares(part, comm.size) for part in parts]
    with comm.phase(phases[0]):
        own_sums = comm.reduce_scatter(torch.cat(shares, dim=1) if len(shares) > 1 else shares[0])
    with comm.phase(phases[1]):
        sums = comm.allgather(own_sums.unsqueeze(0)).split([share.shape[1] for share in shares], dim=1)
    return RoundedSum(sums[0].flatten()[: values.numel()], values, *(part.flatten() for part in sums[1:]))


def rounded_shares(kernels: ModuleType, values: Tensor, ranks: int, bits: int) -> RoundedShares:
    """The first half of :func:`sum_in_few_bits`, before anything travels. Communication: none."""
    shares = in_equal_shares(values, ranks)  # [ranks, share]
    codes = kernels.quantize(shares, bits)
    return RoundedShares(codes, kernels.dequantize_sum(codes.unsqueeze(0), shares.shape[1], bits))


def sum_of_shares(
    comm: MeteredTransport,
    kernels: ModuleType,
    shares: RoundedShares,
    arrived: Tensor,
    count: int,
    bits: int,
    phase: str = "values",
    terms: Tensor | None = None,
) -> RoundedSum:
    """The second half of :func:`sum_in_few_bits`, when the codes have arrived.

    Communication: collective; one allgather.

    Args:
        comm, kernels, bits: as there.
        shares: this rank's; overwritten.
        arrived: uint8 [size, bytes], the ranks' codes of this rank's share.
        count: how many values there are.
        phase: of the collective, in the ledger.
        terms: float32 [size, m], what the ranks sent of this rank's share of the vector beside.
    """
    sent, length = shares.sent, shares.sent.shape[1]
    own_sum = kernels.dequantize_sum(arrived.unsqueeze(1), length, bits)  # [1, share]
    codes, beside = kernels.quantize(own_sum, bits), None
    with comm.phase(phase):
        if terms is None:
            rounded = comm.allgather(codes)  # [size, bytes]
        else:
            rounded, sums = allgather_both(comm, codes[0], sum_in_rank_order(list(terms)))
            beside = sums.flatten()
    total = kernels.dequantize_sum(rounded.unsqueeze(0), length, bits)  # [size, share]
    sent[comm.rank] += total[comm.rank] - own_sum[0]
    return RoundedSum(total.view(-1)[:count], sent.view(-1)[:count], beside)
