"""Training in rounds: every rank steps by itself, and all exchange what has become of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from benchmarks.accuracy_per_byte.methods import Place
from benchmarks.accuracy_per_byte.steps import Training, optimizer_for, rate_at, set_rate
from hvd_sketch import LocalSteps
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import LocalTransport
from hvd_sketch.transport.local import LocalRanks


class RoundsTraining(Training):
    """Ranks with a model each, stepped by the library's own :class:`hvd_sketch.LocalSteps`."""

    def _begin(self, place: Place) -> None:
        self._models = [self.model, *(deepcopy(self.model) for _ in range(place.ranks - 1))]
        self._threads = LocalRanks(place.ranks)
        kind = type("LocalSteps", (LocalSteps,), {"_make": staticmethod(self._make_exchange(place))})
        config = self.method.config(place, adam=True)

        def wrap(transport: LocalTransport) -> LocalSteps:
            model = self._models[transport.rank]
            inner = optimizer_for(self.task, model, self.run.group.method)
            rounds = {"every": self.method.every, "outer": self.method.outer}
            return kind(inner, model.named_parameters(), config, transport, **rounds)

        self._optimizers: list[LocalSteps] = self._threads.run(wrap)

    def _make_exchange(self, place: Place) -> Callable[..., Any]:
        return self.method.make(place) if self.method.make else make_exchange

    @property
    def ledger(self) -> CommLedger:
        return self._optimizers[0].ledger

    def step(self) -> bool:
        losses = [self._differentiate(*each) for each in zip(self._models, next(self._batches), strict=True)]
        if not torch.tensor(losses).isfinite().all():
            return False
        for optimizer in self._optimizers:
            set_rate(optimizer, rate_at(self.run, self.done))
        self._threads.run(lambda transport: self._optimizers[transport.rank].step())
        return self._goes_on(losses)

    def finish(self) -> None:
        if self.done % self.method.every:
            self._threads.run(lambda transport: self._optimizers[transport.rank].sync())
