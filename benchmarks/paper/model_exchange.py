"""One model's gradients through a simulated or a real exchange, behind one interface.

For every worker of this process: backward, then ``add(worker)``; then ``finish()``, and every ``p.grad`` is the mean
update. Which tensors are exchanged dense ``config.dense_below`` says, as for the library's optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from benchmarks.paper.exchanges import counts
from benchmarks.paper.experiment import Traffic
from benchmarks.paper.workers import METHODS, PAPER, DenseWorkers, Variant
from hvd_sketch import CommLedger, SketchConfig, Transport
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.model.parameters import FlatParameters, NamedParameter, is_dense

ALL_DENSE = 1 << 62  # as dense_below: no tensor is larger


class ModelExchange(Protocol):
    """Between all workers, some of which are in this process.

    Attributes:
        workers: those of this process.
        updated: coordinates of the model that the last step updated.
    """

    workers: Sequence[int]
    updated: int

    def add(self, worker: int) -> None:
        """Take in ``p.grad`` of all parameters, from the backward pass of one of this process' workers."""

    def finish(self) -> None:
        """Make every ``p.grad`` the mean update. Communication: collective."""

    def traffic(self) -> Traffic:
        """Of the steps so far. Communication: none."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SimulatedModelExchange:
    """All workers in this process.

    Args:
        method: a key of :data:`benchmarks.paper.workers.METHODS`; "dense" sends all tensors dense.
        named: the model's parameters.
        config: of the exchange.
        workers: how many.
        variant: of the algorithm.
    """

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, workers: int, variant: Variant = PAPER
    ) -> None:
        dense_below = ALL_DENSE if method == "dense" else config.dense_below
        main = [(name, p) for name, p in named if not is_dense(p, dense_below)]
        beside = [(name, p) for name, p in named if is_dense(p, dense_below)]
        self.workers, self.updated = range(workers), 0
        self._method, self._weight_decay = method, config.weight_decay
        self._ledger = CommLedger(max_records=0)
        self._flats = [FlatParameters(main, apart=True)] if main else []
        self._flats += [FlatParameters(beside)] if beside else []
        makes = [METHODS[method]] * bool(main) + [DenseWorkers] * bool(beside)
        self._exchanges = [
            make(config, flat.dim, workers, flat.device, variant, self._ledger, number == 0, len(named))
            for number, (make, flat) in enumerate(zip(makes, self._flats, strict=True))
        ]

    def add(self, worker: int) -> None:
        for flat, exchange in zip(self._flats, self._exchanges, strict=True):
            exchange.add(worker, flat.pack(self._weight_decay))

    def finish(self) -> None:
        for flat, exchange in zip(self._flats, self._exchanges, strict=True):
            update = exchange.finish()
            if update.indices.numel() == flat.dim:
                flat.unpack_dense(update.values)
            else:
                flat.unpack_sparse(update.indices, update.values)
        self.updated = sum(exchange.updated for exchange in self._exchanges)

    def traffic(self) -> Traffic:
        """True top-k has the paper's ratio only: it cannot be had without sending everything."""
        known = _traffic(self._ledger)
        if self._method == "true_topk":
            return replace(known, wire_bytes_per_step=None, compression_ratio=None)
        return known

    def state_dict(self) -> dict[str, Any]:
        saved = [exchange.state_dict() for exchange in self._exchanges]
        return {"exchanges": saved, "ledger": counts(self._ledger)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for exchange, saved in zip(self._exchanges, state["exchanges"], strict=True):
            exchange.load_state_dict(saved)
        vars(self._ledger).update(state["ledger"])


class RealModelExchange:
    """This rank's part of the library's exchange; "dense" or "sketched". Communication: collective."""

    def __init__(
        self, method: str, named: Sequence[NamedParameter], config: SketchConfig, transport: Transport
    ) -> None:
        if method == "dense":
            config = replace(config, dense_below=ALL_DENSE)
        self.workers, self.updated = [transport.rank], 0
        self._parameters = [p for _, p in named]
        self._exchange = GradientExchange(named, config, transport)
        self._dense_below = config.dense_below

    def add(self, worker: int) -> None:
        assert worker in self.workers, "every rank has one worker, itself"

    def finish(self) -> None:
        if not self._exchange.average():
            raise FloatingPointError("a gradient is not finite: lower the learning rate")
        self.updated = sum(self._updated_in(parameter) for parameter in self._parameters)

    def _updated_in(self, parameter: Any) -> int:
        return parameter.numel() if is_dense(parameter, self._dense_below) else int(parameter.grad.count_nonzero())

    def traffic(self) -> Traffic:
        return _traffic(self._exchange.ledger)

    def state_dict(self) -> dict[str, Any]:
        return {"exchange": self._exchange.state_dict(), "ledger": counts(self._exchange.ledger)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state["exchange"])
        vars(self._exchange.ledger).update(state["ledger"])


def _traffic(ledger: CommLedger) -> Traffic:
    totals = ledger.totals()
    per_step = totals.wire_bytes / max(totals.steps, 1)
    return Traffic(per_step, ledger.compression_ratio(), ledger.paper_compression_ratio())
