"""A classifier trained by several workers, of which this process computes all or one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.image_data import Images
from benchmarks.paper.model_exchange import Workers
from benchmarks.paper.model_training import ModelTraining
from benchmarks.paper.variants import Variant
from hvd_sketch import SketchConfig

JUDGED_IMAGES = 5000  # of the training set: their loss is measured at every point of the curve
EVALUATION_BATCH = 1000
LOSS_CAP = 100.0  # what a diverged training counts with; chance is log(10) = 2.3
PEAK = 5 / 24  # where the learning rate has its peak, as a fraction of all steps: the paper's schedule for CIFAR-10


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run."""

    make_model: Callable[[], nn.Module]  # without buffers; called under a seeded generator
    images: Images
    rate: float  # the peak of the schedule
    steps: int
    batch: int  # images per worker and step, drawn with replacement
    seed: int  # of the initial weights and the draws

    def rate_at(self, step: int) -> float:
        """Of a step counted from 1: linear from 0 to the peak and back to 0, both ends left out."""
        return float(np.interp(step, (0, PEAK * self.steps, self.steps + 1), (0, self.rate, 0)))


class ClassifierTraining(ModelTraining):
    """Of a task, on the device where its images are.

    Where a gradient is not finite the training has diverged: its weights stay as they are from there on.
    """

    def __init__(self, task: Task, workers: Workers, method: str, config: SketchConfig, variant: Variant) -> None:
        self._task, self._device = task, task.images.train_images.device
        torch.manual_seed(task.seed)
        super().__init__(task.make_model().to(self._device), workers, method, config, variant)
        self._diverged = False

    def step(self) -> float:
        if not self._diverged:
            try:
                return _capped(super().step())
            except FloatingPointError:  # from the exchange, on all ranks
                self._diverged = True
        self._done += 1
        return LOSS_CAP

    def backward(self, worker: int) -> float:
        draw = np.random.default_rng([self._task.seed, self._done + 1, worker])
        data = self._task.images
        batch = torch.from_numpy(draw.integers(0, len(data.train_labels), self._task.batch)).to(self._device)
        loss = cross_entropy(self.model(data.train_images[batch]), data.train_labels[batch])
        loss.backward()
        return float(loss.detach())

    def rate(self) -> float:
        return self._task.rate_at(self._done + 1)

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

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "diverged": self._diverged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._diverged = state["diverged"]


def _capped(loss: float) -> float:
    return loss if loss < LOSS_CAP else LOSS_CAP  # NaN is not below
