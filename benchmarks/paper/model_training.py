"""What the trainings of models share: workers' gradients, their exchange, plain SGD, and a checkpoint of all that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from benchmarks.paper.experiment import Traffic
from benchmarks.paper.model_exchange import Workers, connect_workers
from benchmarks.paper.variants import PAPER, Variant
from hvd_sketch import SketchConfig


class ModelTraining(ABC):
    """A :class:`benchmarks.paper.experiment.Training`; subclasses make gradients, give the rate, and measure.

    ``model`` is the same on all ranks. ``method``, ``config`` and ``variant`` are those of the exchange.
    """

    def __init__(
        self, model: nn.Module, workers: Workers, method: str, config: SketchConfig, variant: Variant = PAPER
    ) -> None:
        self.model = model
        self._exchange = connect_workers(workers, method, model, config, variant)
        self._done = self._updated = 0

    @abstractmethod
    def backward(self, worker: int) -> float:
        """Add one worker's gradient to ``p.grad``; returns its loss."""

    @abstractmethod
    def rate(self) -> float:
        """The learning rate of the step under way."""

    @abstractmethod
    def measure(self) -> dict[str, float]: ...

    def step(self) -> float:
        losses = []
        for worker in self._exchange.workers:
            self.model.zero_grad()
            losses.append(self.backward(worker))
            self._exchange.accumulate(worker)
        self._exchange.agree()
        rate = self.rate()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(parameter.grad, alpha=rate)
        self._done += 1
        self._updated += self._exchange.updated
        return sum(losses) / len(losses)

    def traffic(self) -> Traffic:
        return self._exchange.traffic()

    def state_dict(self) -> dict[str, Any]:
        own = {"done": self._done, "updated": self._updated, "model": self.model.state_dict()}
        return {**own, "exchange": self._exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done, self._updated = state["done"], state["updated"]
        self.model.load_state_dict(state["model"])
        self._exchange.load_state_dict(state["exchange"])
