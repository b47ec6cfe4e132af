"""What travels with the agreement before a step, so that it takes no collective of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.agreement import Gather
from hvd_sketch.exchange.candidates import CandidateSource
from hvd_sketch.exchange.candidates.nominate import NominatedCandidates
from hvd_sketch.exchange.candidates.random import RandomCandidates
from hvd_sketch.exchange.feedback import Feedback, Parts
from hvd_sketch.exchange.few_bits import RoundedShares, rounded_shares
from hvd_sketch.exchange.together import allgather_with_code, alltoall_together
from hvd_sketch.transport.base import in_equal_shares
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.staging import to_device


@dataclass(frozen=True)
class EarlyValues:
    """Values that have travelled with the agreement.

    Attributes:
        candidates: int64 [n], ascending, equal on all ranks.
        shares: what this rank has sent.
        arrived: uint8 [ranks, bytes], the ranks' codes of this rank's share.
        terms: float32 [ranks, m], what the ranks sent of this rank's share of the vector beside; None: there is none.
        is_finite: whether this rank's v will be finite at the candidates; where it will not be, 0 was sent.
    """

    candidates: Tensor
    shares: RoundedShares
    arrived: Tensor
    terms: Tensor | None
    is_finite: bool


class EarlyMessages:
    """What of a sketched exchange can travel before it is known whether all ranks take the step.

    Nominations; and few-bit values at candidates that every rank draws for itself. Both are of v as it will be when the
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
        self._drawing = source if isinstance(source, RandomCandidates) and is_early else None
        self._values: EarlyValues | None = None

    def gather(self, step: int, parts: Parts | None, beside: Tensor | None = None) -> Gather | None:
        """The collective in which this step's agreement travels; None: it travels alone.

        Args:
            step: its number.
            parts: the coordinates that this rank uses, with its gradient where v has not taken it in yet; None: this
                rank cannot take the step.
            beside: float32 [n], a small vector to be summed; it travels where values do.
        """
        self.forget()  # what a step that was not taken has left
        if self._nominating is not None:
            return partial(self._with_nominations, self._nominating, parts)
        if self._drawing is not None:
            return partial(self._with_values, self._drawing, step, parts, beside)
        return None

    def values(self) -> EarlyValues | None:
        """Values of this step that have travelled already."""
        return self._values

    def forget(self) -> None:
        """What has travelled is not wanted any more."""
        self._values = None
        if self._nominating is not None:
            self._nominating.take_codes(None)

    def _with_nominations(self, source: NominatedCandidates, parts: Parts | None, words: Tensor) -> Tensor:
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        code = nothing if parts is None else source.nominate(self._feedback.v, parts)
        with self._comm.phase("agree", self._feedback.v.device):
            every_words, codes = allgather_with_code(self._comm, words, code)
        source.take_codes(codes)
        return every_words

    def _with_values(
        self, source: RandomCandidates, step: int, parts: Parts | None, beside: Tensor | None, words: Tensor
    ) -> Tensor:
        source.begin(step)
        candidates = source.draw()
        if parts is None:
            offered, is_finite = torch.zeros(candidates.numel(), dtype=torch.float32, device=candidates.device), True
        else:
            offered, is_finite = self._feedback.offer_early(candidates, parts)
        shares = rounded_shares(self._kernels, offered, self._comm.size, self._bits)
        own = [to_device(words, shares.codes.device).expand(self._comm.size, -1), shares.codes]
        if beside is not None:
            own.append(in_equal_shares(beside, self._comm.size))
        with self._comm.phase("agree"):
            every_words, arrived, *terms = alltoall_together(self._comm, *own)
        self._values = EarlyValues(candidates, shares, arrived, terms[0] if terms else None, is_finite)
        return every_words.cpu()
