"""One step of Sketched-SGD as a parameter server without a server, and its dense peer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.agreement import all_finite
from hvd_sketch.exchange.base import Exchange, Options, Ranges, SparseUpdate
from hvd_sketch.exchange.candidates.sketch import CandidateSource, SketchCandidates
from hvd_sketch.exchange.feedback import Feedback
from hvd_sketch.exchange.threshold import LocalValues, ThresholdPredictor, find_threshold
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import histogram_bins, top_k
from hvd_sketch.ledger import RING_PASSES
from hvd_sketch.transport.base import Transport, in_equal_parts, mean_over_ranks, sum_in_rank_order
from hvd_sketch.transport.staging import to_device
from hvd_sketch.warm_up import warm_up

logger = logging.getLogger(__name__)
ROUND_BYTES = 8192  # what a round of a collective costs, told in bytes: 65 microseconds at 1 Gbit/s


def all_sums_travel(candidates: int, k: int) -> bool:
    """Whether sending every candidate's sum takes less time than to choose the k largest together first."""
    choosing_bytes = candidates / 8 + 4 * k + 4 * RING_PASSES["allreduce"] * histogram_bins(k)
    return 4 * candidates <= choosing_bytes + ROUND_BYTES


class SketchedAllreduce(Exchange):
    """Sketched gradient exchange with error feedback (paper, Alg. 3; Alg. 2 with ``selection="heavymix"``,
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
        if config.selection == "topk" and config.oversample * config.k > dim and transport.rank == 0:
            warnings.warn(
                f"oversample * k = {config.oversample * config.k} exceeds dim {dim}: every coordinate is a "
                "candidate in every step, and the sketch is sent for nothing",
                stacklevel=2,
            )
        if self._device.type == "cpu":
            warm_up(logger.warning if transport.rank == 0 else None)  # no rank compiles inside the first step
        self.config = config
        self._feedback = Feedback(dim, config.momentum, device, transport.size, self._limits)
        self._kernels = load_backend(None, self._device)
        self._coding = load_coding(self._kernels)
        self._predictor = ThresholdPredictor()  # of the exact sums kept
        self._candidates: CandidateSource = SketchCandidates(config, dim, self._comm, device)

    @property
    def residual(self) -> Tensor:
        """v, float32 [dim]: what this rank produced and has not sent yet. The tensor itself, not a copy."""
        return self._feedback.v

    @property
    def velocity(self) -> Tensor:
        """u, float32 [dim]: this rank's momentum."""
        return self._feedback.u

    def step(self, gradient: Tensor | Sequence[Tensor], finite: bool = True) -> SparseUpdate:
        """Exchange one gradient: :meth:`begin_step`, then :meth:`exchange`.

        Args:
            gradient: float32 [dim], this rank's, or consecutive parts of it; not modified. Sums are made from the last
                part to the first, the order in which backward passes finish them.
            finite: False if this rank found anything else not finite that belongs to the step.

        Returns:
            The k coordinates with the largest exact sums among the candidates, fewer where fewer are not zero.
        """
        parts = [gradient] if isinstance(gradient, Tensor) else gradient
        agreed = self.begin_step(self._report_of(parts, torch.float32, finite))
        return self.exchange(parts) if agreed.goes_on else self._nothing()

    def exchange(self, parts: Sequence[Tensor], unused: Ranges = ()) -> SparseUpdate:
        """The rest of a step that has begun.

        Args:
            parts: as for :meth:`step`.
            unused: coordinates that no rank has a gradient of, the same on every rank. Their u and v are left alone,
                and nothing of them is sent.

        Communication: collective.
        """
        # u <- m u + g, v <- v + u, and the top-Pk of the summed sketches of v
        gradient = _from_the_last([part.detach().contiguous() for part in parts], unused)
        candidates = self._candidates.find(self._feedback, gradient, self._step - 1)
        if unused:
            candidates = _without(candidates, unused)
        own_sums = self._sum_exactly(candidates)  # second round: exact values
        positions, sums = self._keep_largest(own_sums, candidates.numel())
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, self.config.paper_floats(self.dim))
        indices = candidates.index_select(0, to_device(positions, self._device))
        self._feedback.clear_(indices)  # zero u and v where they were sent
        return SparseUpdate(indices, to_device(sums, self._device) / self._comm.size)

    def _sum_exactly(self, candidates: Tensor) -> Tensor:
        """Sums of v over ranks at this rank's part of the candidates: float32 [ceil(n / size)], zeros at the end.

        They are finite: every rank offers of its v what fits, and has reset what is not finite.
        """
        size = self._comm.size
        count = candidates.numel()
        part = -(-count // size)
        own = torch.empty(size * part, dtype=torch.float32, device=self._device)
        if not self._feedback.offer(candidates, own[:count]):
            self._count_reset(self._feedback.reset_nonfinite_())
            self._feedback.offer(candidates, own[:count])
        own[count:] = 0
        with self._comm.phase("exact"):
            return self._comm.start_reduce_scatter(own.view(size, part)).wait()  # which may use its memory

    def _keep_largest(self, own_sums: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
        """Positions among the candidates, ascending, and sums, on the CPU, of the k largest; equal on all ranks.

        Sums that are zero are not kept. Either every sum travels and all ranks pick for themselves, or owners
        pick together and send one bit per candidate and the k sums: whichever takes less time.
        """
        k = self.config.k
        if all_sums_travel(candidates, k):
            with self._comm.phase("values", self._device):
                sums = self._comm.allgather(own_sums.cpu())  # so few that the host picks
            positions = top_k(sums, k)
            return positions, sums.index_select(0, positions)
        return self._choose_together(own_sums)

    def _choose_together(self, own_sums: Tensor) -> tuple[Tensor, Tensor]:
        values = LocalValues(self._kernels, own_sums)
        with self._comm.phase("choose", self._device):
            threshold = find_threshold(values, self.config.k, self._comm, self._predictor.lower_bound())
        self._predictor.update(threshold)
        own_positions, _ = values.above(threshold)
        with self._comm.phase("values", self._device):
            gathered = self._comm.allgather(self._coding.encode_choice(own_positions, own_sums))
        positions, sums = self._coding.decode_choices(gathered, self._comm.size, own_sums.numel(), self._device)
        if not threshold.excess:
            return positions, sums
        chosen = top_k(sums, self.config.k)
        return positions.index_select(0, to_device(chosen, self._device)), sums.index_select(0, chosen)

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """What is needed to go on: step number, u and v, and the last thresholds, which save messages.

        Args:
            consolidated: False: this rank's own, to be loaded by the same rank of a job of the same size; going
                on from it is bitwise. True: the mean of u and v over ranks, equal everywhere, to be loaded by
                every rank of a job of any size; the averaged update that is still to come stays the same.

        Communication: none, or collective with ``consolidated`` (not counted in the ledger).
        """
        saved: dict[str, Any] = self._feedback.state_dict()
        if consolidated:  # without the thresholds: sums over more ranks are larger
            saved = {name: mean_over_ranks(self._transport, kept) for name, kept in saved.items()}
        else:
            saved["thresholds"] = self._candidates.predictor.edges, self._predictor.edges
        counters = self._counters(None if consolidated else self._comm.rank)
        return {**counters, "config": asdict(self.config), **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; every rank must load the same kind. Communication: none.

        Raises:
            ValueError: it is of another dim, or it is one rank's own and this is another rank or world size.
        """
        self._load_counters(state)
        self._feedback.load_state_dict(state)
        self._count_reset(self._feedback.reset_nonfinite_())
        thresholds = state.get("thresholds", ((0, 0), (0, 0)))
        self._candidates.predictor.edges, self._predictor.edges = map(tuple, thresholds)

    def _thresholds(self) -> list[int]:
        return [*self._candidates.predictor.edges, *self._predictor.edges]

    def _take_over(self, root: int, anyones: bool, at_same_step: bool, thresholds: list[int]) -> None:
        self._candidates.predictor.edges = thresholds[0], thresholds[1]
        self._predictor.edges = thresholds[2], thresholds[3]
        if anyones:
            for kept in self._feedback.tensors():
                self._transport.broadcast_(kept, root)
        elif not at_same_step:
            self._feedback.zero_()
            logger.warning(
                "rank %d goes on from rank %d's checkpoint with residuals of zero: save "
                "state_dict(consolidated=True), or one checkpoint for each rank, to keep them",
                *(self._comm.rank, root),
            )


class DenseAllreduce(Exchange):
    """The mean of the whole gradient by reduce_scatter and allgather: what a sketch competes with.

    The interface is that of :class:`SketchedAllreduce`; every coordinate is sent in every step. Unlike an MPI
    allreduce it gives equal bits on all ranks. With a config that has momentum, ``u <- m * u + mean``.

    Communication, arguments, errors: as for SketchedAllreduce; ``config`` may be None (momentum 0).

    Args:
        dtype: of the gradient and of the mean, float32 or float64.
        wire_dtype: what travels, where it is not ``dtype``: float16, in which each rank's gradient and the mean are
            rounded, and cut where they do not fit; sums are made in ``dtype``.
    """

    def __init__(
        self,
        config: SketchConfig | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}: there is nothing to exchange")
        self.config = config
        self._dtype, self._wire_dtype = dtype, wire_dtype
        self._momentum = config.momentum if config is not None else 0.0
        self._u = torch.zeros(dim if self._momentum else 0, dtype=dtype, device=device)

    @property
    def residual(self) -> Tensor:
        """Zeros: nothing stays behind."""
        return torch.zeros(self.dim, dtype=self._dtype, device=self._device)

    @property
    def velocity(self) -> Tensor:
        """u, ``dtype`` [dim], equal on all ranks."""
        return self._u if self._momentum else self.residual

    def step(self, gradient: Tensor, finite: bool = True) -> SparseUpdate:
        """Exchange one gradient; see :meth:`SketchedAllreduce.step`. ``indices`` are all of ``0 … dim - 1``."""
        if not self.begin_step(self._report_of([gradient], self._dtype, finite)).goes_on:
            return self._nothing()
        return SparseUpdate(torch.arange(self.dim, device=self._device), self.mean(gradient))

    def mean(self, gradient: Tensor, unused: Ranges = ()) -> Tensor:
        """The mean over ranks with momentum, ``dtype`` [dim], in a step that has begun; finite.

        Args:
            unused: coordinates that no rank has a gradient of: their u is left alone. The same on every rank.

        Communication: collective.
        """
        with self._comm.phase("dense"):
            mean = self._mean(gradient.detach().contiguous())
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.dim)
        if self._momentum:
            largest = torch.finfo(self._dtype).max
            fresh = (self._u * self._momentum).add_(mean).clamp_(-largest, largest)
            for start, stop in unused:
                fresh[start:stop] = self._u[start:stop]
            self._u.copy_(fresh)
            mean = fresh
        return self._cut(mean)

    def _mean(self, gradient: Tensor) -> Tensor:
        if self._wire_dtype is not None:
            return _rounded_mean(self._comm, gradient, self._wire_dtype)
        mean = mean_over_ranks(self._comm, gradient)
        if all_finite([mean]):
            return mean
        # The sum overflowed, on all ranks alike, and the mean does not.
        return mean_over_ranks(self._comm, gradient / self._comm.size).mul_(self._comm.size)

    def _cut(self, mean: Tensor) -> Tensor:
        """The mean, cut to what the parameters' dtypes hold; in its own memory."""
        for start, stop, largest in zip(*self._runs, strict=True):
            if largest < torch.finfo(self._dtype).max:
                mean[start:stop].clamp_(-largest, largest)
        return mean

    @cached_property
    def _runs(self) -> tuple[list[int], list[int], list[float]]:
        ends = self._limits.ends.tolist()
        return [0, *ends[:-1]], ends, self._limits.largest.tolist()

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """As :meth:`SketchedAllreduce.state_dict`; u is equal on all ranks, so both kinds load at any world size."""
        return {**self._counters(None), "u": self._u.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_counters(state)
        saved = state["u"]
        if self._momentum:  # starts at zero where it was saved without
            self._u.copy_(saved) if saved.numel() else self._u.zero_()
            damaged = ~torch.isfinite(self._u)
            self._u.masked_fill_(damaged, 0)
            self._count_reset(damaged.nonzero().flatten())

    def _take_over(self, root: int, anyones: bool, at_same_step: bool, thresholds: list[int]) -> None:
        if self._momentum:
            self._transport.broadcast_(self._u, root)


def _rounded_mean(comm: Transport, gradient: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """The mean over ranks of a vector of which ``wire_dtype`` travels. Communication: collective."""
    largest = torch.finfo(wire_dtype).max
    rounded = gradient.clamp(-largest, largest).to(wire_dtype)
    parts = comm.alltoall(in_equal_parts(rounded, comm.size))
    own_mean = sum_in_rank_order(list(parts.to(gradient.dtype))) / comm.size
    return comm.allgather(own_mean.to(wire_dtype))[: gradient.numel()].to(gradient.dtype)


def _from_the_last(parts: Sequence[Tensor], unused: Ranges) -> list[tuple[int, Tensor]]:
    """``(start, values)`` of the parts, the last first, without the coordinates that are unused."""
    starts = accumulate((part.numel() for part in parts), initial=0)
    pieces = []
    for first, part in zip(starts, parts, strict=False):
        last = first + part.numel()
        at = first
        for start, stop in unused:
            if start < last and stop > first:
                pieces.append((at, part[at - first : max(start, at) - first]))
                at = min(stop, last)
        pieces.append((at, part[at - first :]))
    return [(start, piece) for start, piece in reversed(pieces) if piece.numel()]


def _without(candidates: Tensor, unused: Ranges) -> Tensor:
    """The candidates that are not in any of the ranges."""
    bounds = torch.tensor([bound for pair in unused for bound in pair], device=candidates.device)
    return candidates[torch.bucketize(candidates, bounds, right=True) % 2 == 0]
