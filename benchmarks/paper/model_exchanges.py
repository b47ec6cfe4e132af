"""A whole model's gradients, matrices sketched and the rest dense: of simulated workers, or of real ranks.

Either way ``p.grad`` holds a worker's gradient before :meth:`ModelExchange.add` and, after
:meth:`ModelExchange.finish`, the update that all workers agreed on::

    for worker in exchange.own_workers:
        ...  # its gradient into p.grad
        exchange.add(worker)
    exchange.finish()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from benchmarks.paper.experiment import Traffic
from benchmarks.paper.workers import DenseWorkers, Workers
from hvd_sketch import CommLedger, SketchConfig, Transport
from hvd_sketch.gradients import GradientExchange
from hvd_sketch.packing import FlatParameters, is_dense


class ModelExchange(Protocol):
    """Attributes:
    own_workers: whose gradients this process computes, in the order in which they are added.
    workers: of all processes together.
    ledger: of the steps since it was made.
    """

    own_workers: Sequence[int]
    workers: int
    ledger: CommLedger

    def add(self, worker: int) -> None: ...

    def finish(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SimulatedModelExchange:
    """All workers in this process.

    Args:
        method: of :data:`benchmarks.paper.workers.METHODS`, for what ``config.dense_below`` does not leave dense.
    """

    def __init__(self, model: nn.Module, config: SketchConfig, method: type[Workers], workers: int) -> None:
        self.own_workers, self.workers = range(workers), workers
        self.ledger = CommLedger(max_records=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        ways = [(method, [p for p in trained if not is_dense(p, config.dense_below)])]
        ways.append((DenseWorkers, [p for p in trained if is_dense(p, config.dense_below)]))
        self._parts: list[tuple[FlatParameters, Workers]] = []
        for way, parameters in ways:
            if parameters:
                flat = FlatParameters(parameters, apart=way is not DenseWorkers)
                options = {"device": flat.device, "ledger": self.ledger, "begins_steps": not self._parts}
                self._parts.append((flat, way(config, flat.dim, workers, **options)))

    def add(self, worker: int) -> None:
        for flat, exchange in self._parts:
            exchange.add(worker, flat.pack())

    def finish(self) -> None:
        for flat, exchange in self._parts:
            update = exchange.finish()
            flat.unpack_sparse(update.indices, update.values)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [exchange.state_dict() for _, exchange in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for (_, exchange), saved in zip(self._parts, state["parts"], strict=True):
            exchange.load_state_dict(saved)


class RealModelExchange:
    """This rank's part, through what ``DistributedOptimizer`` uses. Communication: collective, but ``add``."""

    def __init__(self, model: nn.Module, config: SketchConfig, transport: Transport) -> None:
        self.own_workers, self.workers = [transport.rank], transport.size
        named: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._gradients = GradientExchange(named, config, transport)
        self.ledger = self._gradients.ledger

    def add(self, worker: int) -> None:
        """Nothing to do: there is one worker, and its gradient is where it belongs."""

    def finish(self) -> None:
        """Raises FloatingPointError on all ranks if a gradient is not finite on any."""
        if not self._gradients.average():
            raise FloatingPointError("a gradient is not finite on some rank: lower the learning rate")

    def state_dict(self) -> dict[str, Any]:
        return self._gradients.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gradients.load_state_dict(state)


class TrafficCount:
    """Of all steps of a training, also over interruptions. A ledger counts from when it was made."""

    def __init__(self, exchange: ModelExchange, dim: int) -> None:
        self._ledger, self._workers, self._dim = exchange.ledger, exchange.workers, dim
        self._before = {"steps": 0, "wire_bytes": 0}

    def traffic(self) -> Traffic:
        counts = self.state_dict()
        wire_bytes = counts["wire_bytes"] / counts["steps"]
        dense_wire_bytes = 2 * 4 * self._dim * (self._workers - 1) / self._workers
        return Traffic(wire_bytes, dense_wire_bytes / wire_bytes, self._ledger.paper_compression_ratio())

    def state_dict(self) -> dict[str, int]:
        totals = self._ledger.totals()
        now = {"steps": totals.steps, "wire_bytes": totals.wire_bytes}
        return {name: before + now[name] for name, before in self._before.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        now = self._ledger.totals()
        self._before = {
            "steps": state["steps"] - now.steps,
            "wire_bytes": state["wire_bytes"] - now.wire_bytes,
        }
