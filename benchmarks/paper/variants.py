"""Departures from Alg. 3 of the paper, as small overrides of the library's exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hvd_sketch import SketchConfig, SketchedAllreduce, SparseUpdate, Transport
from hvd_sketch.exchange.candidates.sketch import SketchCandidates
from hvd_sketch.exchange.feedback import Feedback
from hvd_sketch.transport.base import Handle, finished, sum_in_rank_order


@dataclass(frozen=True)
class Variant:
    """Departures from Alg. 3 of the paper; the defaults are the paper's algorithm."""

    fresh_hashes: bool = True  # False: the hash of step 0 in every step
    # "before" the sketch, on every rank; "after" the selection, ``u <- m u + mean update``, one u for all, and updates
    # are dense; or "none"
    momentum: Literal["before", "after", "none"] = "before"
    masking: bool = True  # False: u is kept where v was sent
    # what every rank's table is rounded to before the sum, which is float32
    table_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


PAPER = Variant()


class VariantAllreduce(SketchedAllreduce):
    """The sketched exchange with a variant's departures; ``config.momentum`` is the factor, wherever it is applied."""

    def __init__(
        self, variant: Variant, config: SketchConfig, dim: int, transport: Transport, device: Any = "cpu", **more: Any
    ) -> None:
        before = config if variant.momentum == "before" else replace(config, momentum=0.0)
        super().__init__(before, dim, transport, device, **more)
        if not variant.masking:
            self._feedback = _Unmasked(dim, before.momentum, device, transport.size, self._limits)
        if not variant.fresh_hashes or variant.table_dtype != "float32":
            if config.candidates != "sketch":
                raise ValueError(f"hashes and tables vary with candidates 'sketch' only, got {config.candidates!r}")
            self._source = _Departing(variant, before, dim, self._comm, self._device)
            self._predictors = [self._source.predictor, self._predictor]
        self._factor = config.momentum
        self._late_u = torch.zeros(dim if variant.momentum == "after" else 0, device=device)

    def agree(self) -> SparseUpdate:
        update = super().agree()
        if not self._late_u.numel():
            return update
        self._late_u.mul_(self._factor).index_add_(0, update.indices, update.values)
        return SparseUpdate(None, self._late_u.clone())

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        return {**super().state_dict(consolidated), "late_u": self._late_u.clone()}

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        load, late_u = super().read_state(state), state["late_u"]

        def take_over() -> None:
            load()
            self._late_u.copy_(late_u)

        return take_over


class _Unmasked(Feedback):
    def clear_(self, indices: Tensor) -> None:
        kept = self.u[indices]
        super().clear_(indices)
        self.u[indices] = kept


class _Departing(SketchCandidates):
    def __init__(self, variant: Variant, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fresh_hashes, self._dtype = variant.fresh_hashes, getattr(torch, variant.table_dtype)

    def begin(self, step: int) -> None:
        super().begin(step if self._fresh_hashes else 0)

    def _start_reduce_scatter(self, row: Tensor) -> Handle:
        if self._dtype == torch.float32:
            return super()._start_reduce_scatter(row)
        shares: Sequence[Tensor] = list(self._comm.alltoall(row.to(self._dtype)).float())
        return finished(sum_in_rank_order(shares))
