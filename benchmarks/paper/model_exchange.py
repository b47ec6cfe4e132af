"""One model's gradients through a simulated or a real exchange, behind one interface.

For every worker of this process: backward, then ``accumulate(worker)``; then ``agree()``, and every ``p.grad`` is the
mean update. Which tensors are exchanged dense ``config.dense_below`` says, as for the library's optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from benchmarks.methods.top_k import CountedTopK, TrueTopK
from benchmarks.paper.experiment import Traffic
from benchmarks.paper.variants import PAPER, Variant, VariantAllreduce
from hvd_sketch import CommLedger, SketchConfig, Transport
from hvd_sketch.config import ALL_DENSE
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.simulate import Simulation

METHODS = ("dense", "true_topk", "sketched", "local_topk")


class ModelExchange(Protocol):
    """Between all workers, some of which are in this process.

    Attributes:
        workers: those of this process.
        updated: coordinates of the model that the last step updated.
    """

    @property
    def workers(self) -> Sequence[int]: ...

    @property
    def updated(self) -> int: ...

    def accumulate(self, worker: int) -> None:
        """Take in ``p.grad`` of all parameters, from the backward pass of one of this process' workers.

        Raises:
            FloatingPointError: it is not finite, in a simulation.
        """

    def agree(self) -> None:
        """Make every ``p.grad`` the mean update. Communication: collective.

        Raises:
            FloatingPointError: a gradient was not finite, on all real ranks.
        """

    def traffic(self) -> Traffic:
        """Of the steps so far. Communication: none."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SimulatedModelExchange(Simulation):
    """All workers in this process.

    Args:
        method: one of :data:`METHODS`; "dense" sends all tensors dense.
        named: the model's parameters.
        config: of the exchange.
        workers: how many.
        variant: of the algorithm.
    """

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, workers: int, variant: Variant = PAPER
    ) -> None:
        make = {"true_topk": TrueTopK, "local_topk": CountedTopK}.get(method, partial(VariantAllreduce, variant))
        super().__init__(named, _config_of(method, config), workers, make)
        self._method = method

    @property
    def workers(self) -> Sequence[int]:
        return range(self.ranks)

    def traffic(self) -> Traffic:
        """True top-k has the paper's ratio only: it cannot be had without sending everything."""
        known = _traffic(self.ledger)
        if self._method == "true_topk":
            return replace(known, wire_bytes_per_step=None, compression_ratio=None)
        return known


class RealModelExchange:
    """This rank's part of the library's exchange; "dense" or "sketched". Communication: collective."""

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, transport: Transport
    ) -> None:
        config = _config_of(method, config)
        self.workers, self.updated = [transport.rank], 0
        self._parameters = [p for _, p in named]
        self._exchange = GradientExchange(named, config, transport)
        self._dense_below = config.dense_below

    def accumulate(self, worker: int) -> None:
        assert worker in self.workers, "every rank has one worker, itself"

    def agree(self) -> None:
        if not self._exchange.average():
            raise FloatingPointError("a gradient is not finite: lower the learning rate")
        self.updated = sum(self._updated_in(parameter) for parameter in self._parameters)

    def _updated_in(self, parameter: Any) -> int:
        return parameter.numel() if is_dense(parameter, self._dense_below) else int(parameter.grad.count_nonzero())

    def traffic(self) -> Traffic:
        return _traffic(self._exchange.ledger)

    def state_dict(self) -> dict[str, Any]:
        return {"exchange": self._exchange.state_dict(), "ledger": self._exchange.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state["exchange"])
        self._exchange.ledger.load_state_dict(state["ledger"])


def _config_of(method: str, config: SketchConfig) -> SketchConfig:
    return replace(config, dense_below=ALL_DENSE) if method == "dense" else config


def _traffic(ledger: CommLedger) -> Traffic:
    totals = ledger.totals()
    per_step = totals.wire_bytes / max(totals.steps, 1)
    return Traffic(per_step, ledger.compression_ratio(), ledger.paper_compression_ratio())
