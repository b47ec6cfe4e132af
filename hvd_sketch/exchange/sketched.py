"""One step of Sketched-SGD as a parameter server without a server."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.agreement import Gather, Report
from hvd_sketch.exchange.base import Options, Ranges, SparseUpdate
from hvd_sketch.exchange.candidates import CandidateSource, load_source
from hvd_sketch.exchange.early import EarlyMessages, EarlyValues
from hvd_sketch.exchange.feedback import Parts
from hvd_sketch.exchange.few_bits import RoundedSum, sum_in_few_bits, sum_of_shares
from hvd_sketch.exchange.residual import ResidualExchange, from_the_last
from hvd_sketch.exchange.threshold import SECOND_MARGIN, LocalValues, ThresholdPredictor, find_threshold
from hvd_sketch.exchange.together import allgather_with_code
from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.transport.base import Transport, in_equal_shares
from hvd_sketch.transport.staging import to_device, to_host, to_host_together
from hvd_sketch.warm_up import warm_up
from hvd_sketch.wire_bytes import all_sums_travel

logger = logging.getLogger(__name__)


class SketchedAllreduce(ResidualExchange):
    """Sketched gradient exchange with error feedback (paper, Alg. 3; Alg. 2 with ``candidates="heavymix"``,
    momentum 0 and gradients multiplied by the learning rate beforehand).

    Communication: the constructor and :meth:`step` are collective, all ranks in the same order.

    Args: see :class:`~hvd_sketch.exchange.base.Exchange`.

    Raises:
        ValueError: on every rank: they were set up differently; ``k > dim``; ``cols`` below the number of ranks.
    """

    def __init__(
        self,
        config: SketchConfig,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        if config.k > dim:
            raise ValueError(f"k must be at most dim, got k={config.k} for dim={dim}: lower k, or exchange dense")
        if config.has_table and config.chooses and config.candidate_count(dim) == dim and transport.rank == 0:
            # No Python warning, of which a filter can make an error: on this rank alone, and the others would wait.
            logger.warning(
                "oversample * k = %d reaches dim %d: every coordinate whose estimate is not zero is a candidate, and "
                "the sketch is sent for next to nothing. Lower oversample or k, or exchange dense (sketch=None)",
                *(config.oversample * config.k, dim),
            )
        # No rank compiles inside the first step. Few positions are coded on the host for a device, too.
        warm_up(logger.warning if transport.rank == 0 else None)
        self._kernels = load_backend(None, self._device)
        self._coding = load_coding(self._kernels)
        self._source: CandidateSource = load_source(config.candidates)(config, dim, self._comm, self._device)
        self._predictor = ThresholdPredictor()  # of the k-th largest sum
        self._predictors = [self._source.predictor, self._predictor]
        self._ranges: Ranges = ()  # that were accumulated, the last first
        self._early = EarlyMessages(config, self._source, self._feedback, self._comm, self._kernels)

    def _gather_reports(self, report: Report, gradient: Sequence[Tensor], unused: Ranges) -> Gather | None:
        takes_step = report.finite and report.refusal is None and not report.held
        parts = _parts(self.dim, gradient, unused) if takes_step else None
        return self._early.gather(self._step, parts, self._beside(takes_step))

    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        """``u <- m * u + g``, ``v <- v + u``, and the sketch of v (paper, Alg. 3, lines 1 to 3).

        Where the transport overlaps, the sketch is made in :meth:`agree`, each row while the one before travels.
        """
        slices = from_the_last(gradient, unused)
        self._ranges = [(start, start + values.numel()) for start, values in slices]
        self._unused = unused
        self._source.begin(self._step)
        for start, values in slices:
            self._feedback.add_(values, start, self._source.sketch)

    def exchange(self, parts: Sequence[Tensor], unused: Ranges = ()) -> SparseUpdate:
        """Deprecated: :meth:`accumulate`, then :meth:`agree`. Communication: collective."""
        warnings.warn("exchange() is deprecated: call accumulate(), then agree()", DeprecationWarning, stacklevel=2)
        self.accumulate(parts, unused)
        return self.agree()

    def agree(self) -> SparseUpdate:
        """The k coordinates with the largest exact sums among the candidates, fewer where fewer are not zero.

        With ``P = 1`` all candidates; with few-bit values also where their sums are zero.
        """
        early = self._early.values()
        if early is not None:
            return self._finish_early(early)
        candidates = self._source.find(self._feedback.v, self._ranges)  # line 4: top-Pk of the summed sketches
        if self._unused:
            candidates = candidates[_is_used(candidates, self._unused)]
        offered = self._offer(candidates)
        if self.config.value_bits < 32:
            bits, own = self.config.value_bits, offered[: candidates.numel()]
            summed = sum_in_few_bits(self._comm, self._kernels, own, bits, beside=self._beside())
            self._sum_beside(summed.beside)
            return self._finish(candidates, self._take_off(candidates, summed))
        shares, beside = offered.view(self._comm.size, -1), self._beside()
        with self._comm.phase("exact"):  # lines 5 and 6: second round, exact values
            if beside is None:
                own_sums, own_beside = self._comm.reduce_scatter(shares), None
            else:
                both = torch.cat([shares, in_equal_shares(beside, self._comm.size)], dim=1)
                own_sums, own_beside = self._comm.reduce_scatter(both).tensor_split([shares.shape[1]])
        positions, sums = self._top_k_sums(own_sums, candidates.numel(), own_beside)
        indices = candidates.index_select(0, to_device(positions, self._device))
        self._feedback.clear_(indices)  # line 8: zero u and v where they were sent
        return self._finish(indices, to_device(sums, self._device))

    def _finish_early(self, early: EarlyValues) -> SparseUpdate:
        """The update of values that have travelled with the agreement."""
        if not early.is_finite:
            self._count_reset(self._feedback.reset_nonfinite_())
        candidates, bits = early.candidates, self.config.value_bits
        summed = sum_of_shares(
            self._comm, self._kernels, early.shares, early.arrived, candidates.numel(), bits, terms=early.terms
        )
        self._sum_beside(summed.beside)
        if self._unused:
            is_used = _is_used(candidates, self._unused)
            candidates, summed = candidates[is_used], RoundedSum(summed.total[is_used], summed.sent[is_used])
        return self._finish(candidates, self._take_off(candidates, summed))

    def _finish(self, indices: Tensor, sums: Tensor) -> SparseUpdate:
        if self.config.residual_decay < 1:
            self._feedback.decay_(self.config.residual_decay, self._ranges)
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, self.config.paper_floats(self.dim))
        self.count_step()
        return SparseUpdate(indices, sums / self._comm.size)

    def count_step(self) -> None:
        super().count_step()
        self._early.forget()

    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        self._early.forget()  # was of this rank's step, and its v
        super()._take_over(root, consolidated, at_same_step, predictions)

    def _offer(self, candidates: Tensor) -> Tensor:
        """What this rank gives of v at the candidates: float32 [n], and zeros up to a multiple of the ranks.

        Finite, and so is the sum: every rank offers of its v what fits, and has reset what is not finite.
        """
        size, count = self._comm.size, candidates.numel()
        own = torch.empty(size * ceil_div(count, size), dtype=torch.float32, device=self._device)
        if not self._feedback.offer(candidates, own[:count]):
            self._count_reset(self._feedback.reset_nonfinite_())
            self._feedback.offer(candidates, own[:count])
        own[count:] = 0
        return own

    def _take_off(self, candidates: Tensor, summed: RoundedSum) -> Tensor:
        """Take from v what was sent of it. Returns the sums over ranks, float32 [n], equal on all ranks."""
        sent, total = summed.sent, summed.total
        excess = self._feedback.excess(candidates, total)
        if excess is not None:  # by rounding up
            total = total - excess
            sent = sent - excess if self._comm.rank == 0 else sent
        self._feedback.subtract_(candidates, sent)
        return total

    def _top_k_sums(self, own_sums: Tensor, candidates: int, own_beside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions among the candidates, ascending, and sums, of the k largest; equal on all ranks.

        Sums that are zero are not kept. All ranks pick for themselves, of every sum, or where that is many bytes of
        those above a threshold, which come with one bit per candidate.
        """
        k = self.config.k if self.config.chooses else candidates
        if all_sums_travel(candidates, k):
            if own_beside is None:
                own_sums = to_host(own_sums)  # so few that the host picks
            else:
                own_sums, own_beside = to_host_together(own_sums, own_beside)
            sums = self._gather(own_sums, own_beside)
            positions = top_k(sums, k)
            return positions, sums.index_select(0, positions)
        return self._choose_above(own_sums, own_beside)

    def _choose_above(self, own_sums: Tensor, own_beside: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k largest. Owners send all sums above the expected threshold; where those are too few, they find it."""
        k, expected = self.config.k, self._predictor.lower_bound()
        if expected:
            positions, sums = self._gather_above(own_sums, expected, own_beside)
            if len(sums) >= k:
                chosen = top_k(sums, k, expected)
                positions, sums = positions.index_select(0, chosen), sums.index_select(0, chosen)
                self._predictor.update(int(sums.abs().min().view(torch.int32)))
                return positions, sums
            own_beside = None  # has travelled
        with self._comm.phase("choose", self._device):
            bound = max(expected - SECOND_MARGIN, 0)
            threshold = find_threshold(LocalValues(self._kernels, own_sums), k, self._comm, bound)
        self._predictor.update(threshold.edge)
        positions, sums = self._gather_above(own_sums, threshold.edge, own_beside)
        if not threshold.excess:
            return positions, sums
        chosen = top_k(sums, k, threshold.edge)
        return positions.index_select(0, chosen), sums.index_select(0, chosen)

    def _gather_above(self, own_sums: Tensor, edge: int, own_beside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions among the candidates, ascending, and sums, of those from ``edge`` upwards; equal on all ranks."""
        own_positions = self._kernels.select_above(own_sums, edge - 1)
        gathered = self._gather(self._coding.encode_choice(own_positions, own_sums), own_beside)
        positions, sums = self._coding.decode_choices(gathered, self._comm.size, own_sums.numel(), self._device)
        return positions, to_device(sums, self._device)

    def _gather(self, own: Tensor, own_beside: Tensor | None) -> Tensor:
        """What all ranks give, [n] on the CPU, one after the other; with it their sums of the companion's vector."""
        with self._comm.phase("values", self._device):
            if own_beside is None:
                return self._comm.allgather(own)
            sums, gathered = allgather_with_code(self._comm, own_beside.cpu(), own.view(torch.uint8))
        self._sum_beside(to_device(sums.flatten(), self._device))
        return gathered.view(own.dtype)


def _parts(dim: int, gradient: Sequence[Tensor], unused: Ranges) -> Parts:
    """Slices of a gradient without the coordinates that are unused; without a gradient, what is used of ``dim``."""
    if not gradient:
        bounds = [0, *(bound for pair in unused for bound in pair), dim]
        return [(start, stop, None) for start, stop in zip(bounds[::2], bounds[1::2], strict=True) if start < stop]
    slices = reversed(from_the_last(gradient, unused))
    return [(start, start + values.numel(), values) for start, values in slices]


def _is_used(candidates: Tensor, unused: Ranges) -> Tensor:
    """Which candidates are not in any of the ranges: bool [n]."""
    bounds = torch.tensor([bound for pair in unused for bound in pair], device=candidates.device)
    return torch.bucketize(candidates, bounds, right=True) % 2 == 0
