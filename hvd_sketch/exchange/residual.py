"""Exchanges with error feedback: what a rank produced and has not sent yet stays with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import all_finite
from hvd_sketch.exchange.base import Exchange, Options, Ranges
from hvd_sketch.exchange.dense import DenseAllreduce
from hvd_sketch.exchange.feedback import Feedback
from hvd_sketch.exchange.setup import require_equal
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.transport.base import Transport, mean_over_ranks
from hvd_sketch.transport.stall import watched

logger = logging.getLogger(__name__)
Slices = Sequence[tuple[int, Tensor]]  # (start, values): slices of a vector, the last first


class ResidualExchange(Exchange):
    """Keeps momentum u and residual v: their state, and how another rank takes them over.

    Communication, arguments, errors: see :class:`~hvd_sketch.exchange.base.Exchange`.

    Attributes:
        companion: the dense exchange of the same model's small tensors. Its vector is summed in collectives of this
            one, where both say so; :meth:`agree` of this one comes first. None: there is none.
    """

    def __init__(
        self,
        config: Compression,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        self.config: Any = config  # of the subclass's kind
        self.companion: DenseAllreduce | None = None
        self._feedback = Feedback(
            dim, config.momentum, device, transport.size, self._limits, few_bits=config.value_bits < 32
        )
        self._unused: Ranges = ()  # of the step that is under way
        self._predictors: list[ThresholdPredictor] = []  # in checkpoints: they save messages

    @property
    def residual(self) -> Tensor:
        """v, float32 [dim]: what this rank produced and has not sent yet. The tensor itself, not a copy."""
        return self._feedback.v

    @property
    def velocity(self) -> Tensor:
        """u, float32 [dim]: this rank's momentum."""
        return self._feedback.u

    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        """``u <- m * u + g``, ``v <- v + u``; see :meth:`Exchange.accumulate`."""
        self._unused = unused
        for start, values in from_the_last(gradient, unused):
            self._feedback.add_(values, start)

    def _beside(self, takes_step: bool = True) -> Tensor | None:
        """The companion's vector, to be summed in collectives of this exchange; None: nothing is."""
        return self.companion.offer(takes_step) if self.companion is not None else None

    def _sum_beside(self, total: Tensor | None) -> None:
        """Hand the companion its sum, float32 [n] with zeros at the end, if it has been made."""
        if total is not None and self.companion is not None:
            self.companion.take_sum(total[: self.companion.dim])

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """See :meth:`Exchange.state_dict`: step number, u and v, and the last thresholds."""
        self._count_reset(self._feedback.reset_nonfinite_())  # as the next step would; what is saved is finite
        saved: dict[str, Any] = self._feedback.state_dict()
        if consolidated:  # without the thresholds: sums over more ranks are larger
            require_equal(self._transport, {"step": self._step}, "make a consolidated state")
            with watched(self._transport, "make a consolidated state"):
                saved = {name: self._mean(kept) for name, kept in saved.items()}
        else:
            saved["thresholds"] = tuple(predictor.edges for predictor in self._predictors)
        counters = self._counters(None if consolidated else self._comm.rank)
        return {**counters, "config": asdict(self.config), **saved}

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """See :meth:`Exchange.read_state`. u starts at zero where it was saved without momentum."""
        saved = self._saved(state)
        kept = {"v": saved.tensor("v", self._feedback.v)}
        if self._feedback.momentum and saved.entry("config", Mapping).get("momentum"):
            kept["u"] = saved.tensor("u", self._feedback.u)
        thresholds = [(0, 0)] * len(self._predictors)
        if saved.entry("rank") is not None and saved.entry("config", Mapping) == asdict(self.config):
            # Of another configuration they may be a rank's own, where here all must have the same.
            thresholds = saved.pairs("thresholds", len(self._predictors))

        def take_over() -> None:
            self._load_counters(saved)
            self._feedback.load_state_dict(kept)
            for predictor, edges in zip(self._predictors, thresholds, strict=True):
                predictor.edges = edges

        return take_over

    def _mean(self, kept: Tensor) -> Tensor:
        """The mean over ranks, also where the sum overflows. Communication: collective."""
        mean = mean_over_ranks(self._transport, kept)
        if all_finite([mean]):
            return mean
        return mean_over_ranks(self._transport, kept / self._comm.size).mul_(self._comm.size)

    def _predictions(self) -> list[int]:
        return [edge for predictor in self._predictors for edge in predictor.edges]

    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        for number, predictor in enumerate(self._predictors):
            predictor.edges = predictions[2 * number], predictions[2 * number + 1]
        if consolidated:
            for kept in self._feedback.tensors():
                self._transport.broadcast_(kept, root)
        elif not at_same_step:
            self._feedback.zero_()
            logger.warning(
                "rank %d goes on from rank %d's checkpoint with residuals of zero: save "
                "state_dict(consolidated=True), or one checkpoint for each rank, to keep them",
                *(self._comm.rank, root),
            )


def from_the_last(gradient: Sequence[Tensor], unused: Ranges) -> Slices:
    """``(start, values)`` of the slices, the last first, contiguous, without the coordinates that are unused.

    Backward passes finish the last first: it may still be in the cache.
    """
    starts = accumulate((values.numel() for values in gradient), initial=0)
    slices = []
    for first, values in zip(starts, (values.detach().contiguous() for values in gradient), strict=False):
        last = first + values.numel()
        at = first
        for start, stop in unused:
            if start < last and stop > first:
                slices.append((at, values[at - first : max(start, at) - first]))
                at = min(stop, last)
        slices.append((at, values[at - first :]))
    return [(start, values) for start, values in reversed(slices) if values.numel()]
