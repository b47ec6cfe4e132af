"""A classifier trained by several workers, of which this process computes all or one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.image_data import Images
from benchmarks.paper.experiment import Traffic
from benchmarks.paper.model_exchange import ModelExchange
from hvd_sketch.model.parameters import NamedParameter

JUDGED_IMAGES = 5000  # of the training set: their loss is measured at every point of the curve
EVALUATION_BATCH = 1000
LOSS_CAP = 100.0  # what a diverged training counts with; chance is log(10) = 2.3
PEAK = 5 / 24  # where the learning rate has its peak, as a fraction of all steps: the paper's schedule for CIFAR-10


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run.

    Attributes:
        make_model: without buffers; called under a seeded generator.
        rate: the peak of the schedule.
        batch: images per worker and step, drawn with replacement.
        seed: of the initial weights and the draws.
    """

    make_model: Callable[[], nn.Module]
    images: Images
    rate: float
    steps: int
    batch: int
    seed: int

    def rate_at(self, step: int) -> float:
        """Of a step counted from 1: linear from 0 to the peak and back to 0, both ends left out."""
        return float(np.interp(step, (0, PEAK * self.steps, self.steps + 1), (0, self.rate, 0)))


class ClassifierTraining:
    """One :class:`benchmarks.paper.experiment.Training`.

    Where a gradient is not finite the training has diverged: its weights stay as they are from there on.

    Args:
        connect: from the model's named parameters to their exchange.
        device: where the model and the images lie.
    """

    def __init__(
        self, task: Task, connect: Callable[[Sequence[NamedParameter]], ModelExchange], device: torch.device
    ) -> None:
        self._task, self._device = task, device
        torch.manual_seed(task.seed)
        self.model = task.make_model().to(device)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=task.rate)
        self._exchange = connect(list(self.model.named_parameters()))
        self._done, self._diverged = 0, False

    def step(self) -> float:
        self._done += 1
        if self._diverged:
            return LOSS_CAP
        try:
            losses = [self._backward(worker) for worker in self._exchange.workers]
            self._exchange.agree()
        except FloatingPointError:  # from the exchange, on all ranks
            self._diverged = True
            return LOSS_CAP
        self._optimizer.param_groups[0]["lr"] = self._task.rate_at(self._done)
        self._optimizer.step()
        return _capped(sum(losses) / len(losses))

    def _backward(self, worker: int) -> float:
        """Give one worker's gradient to the exchange; its loss."""
        draw = np.random.default_rng([self._task.seed, self._done, worker])
        data = self._task.images
        batch = torch.from_numpy(draw.integers(0, len(data.train_labels), self._task.batch)).to(self._device)
        self._optimizer.zero_grad()
        loss = cross_entropy(self.model(data.train_images[batch]), data.train_labels[batch])
        loss.backward()
        self._exchange.accumulate(worker)
        return float(loss.detach())

    def measure(self) -> dict[str, float]:
        """The training loss, on the same images every time; at the end also loss and error on the test set."""
        data = self._task.images
        loss, _ = self._judge(data.train_images[:JUDGED_IMAGES], data.train_labels[:JUDGED_IMAGES])
        measured = {"train_loss": loss}
        if self._done == self._task.steps:
            measured["test_loss"], measured["test_error"] = self._judge(data.test_images, data.test_labels)
            measured["diverged"] = float(self._diverged)
        return measured

    @torch.no_grad()
    def _judge(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and error."""
        logits = torch.cat([self.model(part) for part in images.split(EVALUATION_BATCH)])
        error = (logits.argmax(1) != labels).double().mean()
        return _capped(float(cross_entropy(logits, labels))), float(error)

    def traffic(self) -> Traffic:
        return self._exchange.traffic()

    def state_dict(self) -> dict[str, Any]:
        own = {"done": self._done, "diverged": self._diverged, "model": self.model.state_dict()}
        return {**own, "exchange": self._exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done, self._diverged = state["done"], state["diverged"]
        self.model.load_state_dict(state["model"])
        self._exchange.load_state_dict(state["exchange"])


def _capped(loss: float) -> float:
    return loss if loss < LOSS_CAP else LOSS_CAP  # NaN is not below
