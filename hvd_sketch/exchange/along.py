"""Collectives that carry the agreement before a step along, so that it takes no collective of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.agreement import Carry
from hvd_sketch.exchange.candidates import CandidateSource
from hvd_sketch.exchange.candidates.nominate import NominatedCandidates
from hvd_sketch.exchange.candidates.random import RandomCandidates
from hvd_sketch.exchange.feedback import Feedback, Parts
from hvd_sketch.exchange.few_bits import RoundedShares, rounded_shares
from hvd_sketch.transport.metered import MeteredTransport


@dataclass(frozen=True)
class EarlyValues:
    """Values that have travelled with the agreement.

    Attributes:
        candidates: int64 [n], ascending, equal on all ranks.
        shares: what this rank has sent.
        arrived: uint8 [ranks, bytes], the ranks' codes of this rank's share.
        is_finite: whether this rank's v will be finite at the candidates; where it will not be, 0 was sent.
    """

    candidates: Tensor
    shares: RoundedShares
    arrived: Tensor
    is_finite: bool


class Along:
    """What of a sketched exchange can travel before it is known whether all ranks take the step.

    Nominations; and few-bit values at candidates that are known without a word. Both are of v as it will be when the
    gradient has been taken in, while v itself stays as it is: a step that is skipped leaves no trace. With momentum
    nothing travels early.

    Args:
        config: of the exchange.
        source: its candidates'.
        feedback: its v.
        comm: the ranks.
        kernels: a backend for the device of v.
    """

    def __init__(
        self,
        config: SketchConfig,
        source: CandidateSource,
        feedback: Feedback,
        comm: MeteredTransport,
        kernels: ModuleType,
    ) -> None:
        self._feedback, self._comm, self._kernels = feedback, comm, kernels
        self._bits = config.value_bits
        self._nominating = source if isinstance(source, NominatedCandidates) and not config.momentum else None
        is_early = config.value_bits < 32 and not config.momentum
        self._known = source if isinstance(source, RandomCandidates) and is_early else None
        self._values: EarlyValues | None = None

    def carry(self, step: int, parts: Parts | None) -> Carry | None:
        """The collective that carries this step's agreement; None: it travels alone.

        Args:
            step: its number.
            parts: the coordinates that this rank uses, with its gradient where v has not taken it in yet; None: this
                rank cannot take the step.
        """
        self.forget()  # what a step that was not taken has left
        if self._nominating is not None:
            return partial(self._carry_nominations, self._nominating, parts)
        if self._known is not None:
            return partial(self._carry_values, self._known, step, parts)
        return None

    def values(self) -> EarlyValues | None:
        """Values of this step that have travelled already."""
        return self._values

    def forget(self) -> None:
        """What has travelled is not wanted any more."""
        self._values = None
        if self._nominating is not None:
            self._nominating.hear(None)

    def _carry_nominations(self, source: NominatedCandidates, parts: Parts | None, words: Tensor) -> Tensor:
        code = torch.empty(0, dtype=torch.uint8) if parts is None else source.nominate(self._feedback.v, parts)
        with self._comm.phase("agree", self._feedback.v.device):
            every_words, codes = allgather_along(self._comm, words, code)
        source.hear(codes)
        return every_words

    def _carry_values(self, source: RandomCandidates, step: int, parts: Parts | None, words: Tensor) -> Tensor:
        source.begin(step)
        candidates = source.known()
        if parts is None:
            offered, is_finite = torch.zeros(candidates.numel(), device=candidates.device), True
        else:
            offered, is_finite = self._feedback.offer_early(candidates, parts)
        shares = rounded_shares(self._kernels, offered, self._comm.size, self._bits)
        with self._comm.phase("agree"):
            every_words, arrived = alltoall_along(self._comm, words, shares.codes)
        self._values = EarlyValues(candidates, shares, arrived, is_finite)
        return every_words


def allgather_along(comm: MeteredTransport, words: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' words, int64 [ranks, n], and their codes one after the other, uint8 on the CPU.

    Communication: collective; one allgather.

    Args:
        comm: the ranks.
        words: int64 [n] of this rank, on the CPU.
        code: uint8 of this rank, on the CPU, whole words of 8 bytes; the ranks' lengths may differ.
    """
    length = torch.tensor([code.numel()])
    gathered = comm.allgather(torch.cat([length.view(torch.uint8), words.view(torch.uint8), code]))
    every_words, codes = [], []
    at = 0
    while at < gathered.numel():
        length, own_words = gathered[at : at + 8 + words.nbytes].view(torch.int64).split([1, words.numel()])
        at += 8 + words.nbytes
        every_words.append(own_words)
        codes.append(gathered[at : at + int(length)])
        at += int(length)
    if len(every_words) < comm.size:  # by hvd.join(), which adds nothing to an allgather
        raise RuntimeError(
            f"{comm.size - len(every_words)} of {comm.size} ranks left this step, perhaps by hvd.join(), which cannot "
            "stand in for a compressed exchange: put the training loop into 'with optimizer.join():' on every rank"
        )
    return torch.stack(every_words), torch.cat(codes)


def alltoall_along(comm: MeteredTransport, words: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' words, int64 [ranks, n], and the codes that they sent to this rank, uint8 [ranks, bytes].

    Communication: collective; one alltoall.

    Args:
        comm: the ranks.
        words: int64 [n] of this rank, on the CPU.
        codes: uint8 [ranks, bytes], one for each rank, on any device.
    """
    head = words.view(torch.uint8).to(codes.device).expand(comm.size, -1)
    arrived = comm.alltoall(torch.cat([head, codes], dim=1))
    every_words, own_codes = arrived.split([words.nbytes, codes.shape[1]], dim=1)
    return every_words.reshape(-1).cpu().view(torch.int64).view(comm.size, -1), own_codes.contiguous()
