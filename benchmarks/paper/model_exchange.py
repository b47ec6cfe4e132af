"""One model's gradients through a simulated or a real exchange, behind one interface.

For every worker of this process: backward, then ``accumulate(worker)``; then ``agree()``, and every ``p.grad`` is the
mean update. Which tensors are exchanged dense ``config.dense_below`` says, as for the library's optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from benchmarks.methods.top_k import CountedTopK, TrueTopK
from benchmarks.paper.experiment import Traffic
from benchmarks.paper.variants import PAPER, Variant, VariantAllreduce
from hvd_sketch import SketchConfig, Transport
from hvd_sketch.config import ALL_DENSE
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.simulate import Simulation

REAL_METHODS = ("dense", "sketched")
METHODS = ("dense", "true_topk", "sketched", "local_topk")
Workers = int | Transport  # so many in this process, or one on each rank


class SimulatedModelExchange(Simulation):
    """All workers in this process; ``method`` is one of :data:`METHODS`, "dense" sends all tensors dense."""

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, workers: int, variant: Variant = PAPER
    ) -> None:
        make = {"true_topk": TrueTopK, "local_topk": CountedTopK}.get(method, partial(VariantAllreduce, variant))
        super().__init__(named, _config_of(method, config), workers, make)
        self.workers: Sequence[int] = range(workers)
        self._method = method

    def traffic(self) -> Traffic:
        """True top-k has the paper's ratio only: it cannot be had without sending everything."""
        known = Traffic.of(self.ledger)
        if self._method == "true_topk":
            return replace(known, wire_bytes_per_step=None, compression_ratio=None)
        return known


class RealModelExchange:
    """This rank's part of the library's exchange; "dense" or "sketched". Communication: collective.

    Attributes:
        workers: this rank alone.
        updated: coordinates of the model that the last step updated.
    """

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, transport: Transport
    ) -> None:
        if method not in REAL_METHODS:
            raise ValueError(f"real ranks have {' and '.join(REAL_METHODS)}, got {method!r}")
        config = _config_of(method, config)
        self.workers: Sequence[int] = [transport.rank]
        self.updated = 0
        self._parameters = [p for _, p in named]
        self._exchange = GradientExchange(named, config, transport)
        self._dense_below = config.dense_below

    def accumulate(self, worker: int) -> None:
        assert worker in self.workers, "every rank has one worker, itself"

    def agree(self) -> None:
        if not self._exchange.average():
            raise FloatingPointError("a gradient is not finite: lower the learning rate")
        self.updated = sum(
            p.numel() if is_dense(p, self._dense_below) else int(p.grad.count_nonzero())
            for p in self._parameters
            if p.grad is not None
        )

    def traffic(self) -> Traffic:
        return Traffic.of(self._exchange.ledger)

    def state_dict(self) -> dict[str, Any]:
        return {"exchange": self._exchange.state_dict(), "ledger": self._exchange.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state["exchange"])
        self._exchange.ledger.load_state_dict(state["ledger"])


def connect_workers(
    workers: Workers, method: str, model: nn.Module, config: SketchConfig, variant: Variant = PAPER
) -> SimulatedModelExchange | RealModelExchange:
    """The exchange of a model's gradients; real ranks have no variants. Communication: collective on real ranks."""
    named = list(model.named_parameters())
    if isinstance(workers, int):
        return SimulatedModelExchange(method, named, config, workers, variant)
    if variant not in (PAPER, replace(PAPER, momentum="none")):
        raise ValueError(f"real ranks have no variants of the algorithm, got {variant}")
    return RealModelExchange(method, named, config, workers)


def count_of(workers: Workers) -> int:
    return workers if isinstance(workers, int) else workers.size


def _config_of(method: str, config: SketchConfig) -> SketchConfig:
    return replace(config, dense_below=ALL_DENSE) if method == "dense" else config
