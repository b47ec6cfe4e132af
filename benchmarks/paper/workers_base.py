"""What all exchanges of workers.py share: variants, the order of calls, and u and v of every worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.paper.one_process import OneProcess
from hvd_sketch import CommLedger, CountSketch, SketchConfig
from hvd_sketch.exchange.agreement import agreement_bytes, all_finite
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.feedback import Feedback
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.transport.metered import MeteredTransport


@dataclass(frozen=True)
class Variant:
    """Departures from Alg. 3 of the paper; the defaults are the paper's algorithm.

    Attributes:
        fresh_hashes: False: the hash of step 0 in every step.
        momentum: "before" the sketch, on every worker; "after" the selection, ``u <- m u + mean update``, one u for
            all, and updates are dense; or "none".
        masking: False: u is kept where v was sent.
        table_dtype: what every worker's table is rounded to before the sum, which is float32.
    """

    fresh_hashes: bool = True
    momentum: Literal["before", "after", "none"] = "before"
    masking: bool = True
    table_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


PAPER = Variant()


class Workers:
    """What all methods share: the order of calls, the ledger, and the momentum after the selection.

    Args:
        config: equal for all workers; ``seed``, ``k`` and ``momentum`` are read by all methods.
        dim: length of a gradient.
        workers: how many.
        device: where gradients and all that is kept lie.
        variant: see :class:`Variant`.
        ledger: to share one with another exchange.
        begins_steps: False where an exchange that shares the ledger does.
        parameters: of how many the ranks tell each other whether they have gradients.

    Attributes:
        updated: how many coordinates the last step agreed on.
    """

    def __init__(
        self,
        config: SketchConfig,
        dim: int,
        workers: int,
        device: torch.device | str = "cpu",
        variant: Variant = PAPER,
        ledger: CommLedger | None = None,
        begins_steps: bool = True,
        parameters: int = 0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.config, self.dim, self.workers, self.variant = config, dim, workers, variant
        self.ledger = ledger if ledger is not None else CommLedger(max_records=0)
        self.updated = 0
        self._device = torch.device(device)
        self._kernels = load_backend(None, self._device)
        self._comm = MeteredTransport(OneProcess(workers), self.ledger)
        self._begins_steps, self._parameters = begins_steps, parameters
        self._step, self._next = 0, 0  # the next worker to be added
        self._late_u = torch.zeros(dim if variant.momentum == "after" else 0, device=device)

    def add(self, worker: int, gradient: Tensor | Sequence[Tensor]) -> None:
        """Take in a worker's gradient; workers come in the order 0, 1, …

        Args:
            worker: whose.
            gradient: float32 [dim], or consecutive parts of it, as for ``SketchedAllreduce.step``; not modified.

        Raises:
            ValueError: another worker's turn, or another length.
            FloatingPointError: it is not finite. (Real exchanges skip the step; in an experiment it is a failure.)
        """
        parts = [gradient] if isinstance(gradient, Tensor) else list(gradient)
        if worker != self._next:
            raise ValueError(f"workers come in order and once per step: expected {self._next}, got {worker}")
        if sum(map(len, parts)) != self.dim:
            raise ValueError(f"expected a gradient of {self.dim} coordinates, got {sum(map(len, parts))}")
        if not all_finite(parts):
            raise FloatingPointError(
                f"step {self._step}: the gradient of worker {worker} is not finite: lower the learning rate"
            )
        self._take_in(worker, [part.detach() for part in parts])
        self._next += 1

    def finish(self) -> SparseUpdate:
        """The mean update of the step, equal on all workers, after :meth:`add` for every worker."""
        if self._next != self.workers:
            raise ValueError(f"{self.workers} workers take part, but only {self._next} were added")
        if self._begins_steps:
            self.ledger.begin_step()
            self._record("agree", "allreduce", agreement_bytes(self.workers, self._parameters), torch.int64)
        update = self._agree()
        self._step, self._next, self.updated = self._step + 1, 0, update.indices.numel()
        return self._with_late_momentum(update) if self.variant.momentum == "after" else update

    def _with_late_momentum(self, update: SparseUpdate) -> SparseUpdate:
        self._late_u.mul_(self.config.momentum).index_add_(0, update.indices, update.values)
        return SparseUpdate(torch.arange(self.dim, device=self._device), self._late_u.clone())

    def _take_in(self, worker: int, parts: list[Tensor]) -> None:
        raise NotImplementedError

    def _agree(self) -> SparseUpdate:
        raise NotImplementedError

    def _record(self, phase: str, collective: str, payload_bytes: int, dtype: torch.dtype = torch.float32) -> None:
        self.ledger.record(phase, collective, dtype, payload_bytes, self.workers)

    def _record_allgather(self, phase: str, payload_bytes: int, dtype: torch.dtype = torch.float32) -> None:
        self._record(phase, "allgather", payload_bytes, dtype)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit."""
        return {"step": self._step, "late_u": self._late_u.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._next = state["step"], 0
        self._late_u.copy_(state["late_u"])


class FeedbackWorkers(Workers):
    """The base of all methods that send a part and keep the rest: u and v of every worker."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        momentum = self.config.momentum if self.variant.momentum == "before" else 0.0
        self._feedbacks = [Feedback(self.dim, momentum, self._device) for _ in range(self.workers)]

    def _add_feedback(self, feedback: Feedback, parts: list[Tensor], sketch: CountSketch | None = None) -> None:
        """u and v of one worker; from the last part to the first, as real exchanges do."""
        stop = self.dim
        for part in reversed(parts):
            stop -= part.numel()
            feedback.add_(part.contiguous(), stop, sketch)

    def _clear(self, feedback: Feedback, indices: Tensor) -> None:
        if self.variant.masking:
            feedback.clear_(indices)
        else:
            feedback.v.index_fill_(0, indices, 0)

    def _clear_all(self, indices: Tensor) -> None:
        for feedback in self._feedbacks:
            self._clear(feedback, indices)

    def _largest(self, values: Tensor) -> Tensor:
        """The k largest by magnitude, fewer where fewer are not zero: int64, ascending; ties to the lower index."""
        return top_k(values, self.config.k)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "feedbacks": [_on_cpu(feedback.state_dict()) for feedback in self._feedbacks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for feedback, saved in zip(self._feedbacks, state["feedbacks"], strict=True):
            feedback.load_state_dict(saved)


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of u and v of 256 workers beside the originals would not fit into a GPU of 24 GiB."""
    return {name: kept.cpu() for name, kept in state.items()}
