"""One training of ResNet-9 on CIFAR-10, its workers simulated in this process or one on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.paper.experiment import Traffic
from benchmarks.paper.model_exchange import ModelExchange, RealModelExchange, SimulatedModelExchange
from benchmarks.paper.resnet9 import Augmentation, ResNet9
from hvd_sketch import SketchConfig, Transport

PEAK_AT = 5 / 24  # of the training: epoch 5 of 24
STATISTICS_IMAGES = 2000  # from which the statistics of batch norm are made for a measurement
TEST_BATCH = 500


@dataclass(frozen=True)
class Cifar10:
    """Images float32 [n, 3, 32, 32], standardised, and labels int64 [n], all on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run.

    Attributes:
        seed: of the weights, the order of the images, their augmentation and the hashes.
    """

    method: str
    config: SketchConfig
    data: Cifar10
    width: int
    steps: int
    batch: int
    rate: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_labels) // self.batch

    def rate_at(self, step: int) -> float:
        """Linear from 0 to the peak and back to 0 at the end; of the middle of a step, so that none is lost."""
        done = (step + 0.5) / self.steps
        return self.rate * (done / PEAK_AT if done < PEAK_AT else (1 - done) / (1 - PEAK_AT))


class Cifar10Training:
    """One :class:`benchmarks.paper.experiment.Training`.

    Args:
        connect: from the model's named parameters to their exchange.
        workers: all that take part; each has an equal share of every batch and normalises by its own.
    """

    def __init__(self, task: Task, connect: Callable[[list[tuple[str, Tensor]]], ModelExchange], workers: int) -> None:
        self._task, self._share = task, task.batch // workers
        torch.manual_seed(task.seed)
        device = task.data.train_images.device
        # Channels last: 0.9 instead of 1.5 ms per image on one core, width 8.
        self.model = ResNet9(task.width).to(device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=task.rate)
        self._exchange = connect(list(self.model.named_parameters()))
        self._done = self._updated = 0

    def step(self) -> float:
        task = self._task
        order, epoch_step = divmod(self._done, task.steps_per_epoch)
        images = torch.from_numpy(np.random.default_rng([task.seed, order, 0]).permutation(len(task.data.train_labels)))
        images = images[epoch_step * task.batch : (epoch_step + 1) * task.batch]
        changes = Augmentation.draw(np.random.default_rng([task.seed, self._done, 1]), task.batch)
        losses = [self._backward(worker, images, changes) for worker in self._exchange.workers]
        self._exchange.agree()
        self._optimizer.param_groups[0]["lr"] = task.rate_at(self._done)
        self._optimizer.step()
        self._done += 1
        self._updated += self._exchange.updated
        return float(torch.stack(losses).mean())

    def _backward(self, worker: int, images: Tensor, changes: Augmentation) -> Tensor:
        """Give one worker's gradient to the exchange; its loss, float32 []."""
        start, stop = worker * self._share, (worker + 1) * self._share
        data, own = self._task.data, images[start:stop]
        self._optimizer.zero_grad()
        batch = changes.part(start, stop).apply(data.train_images, own).contiguous(memory_format=torch.channels_last)
        loss = cross_entropy(self.model(batch), data.train_labels[own.to(batch.device)])
        loss.backward()
        self._exchange.accumulate(worker)
        return loss.detach()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """On the test set, and how many coordinates a step has updated on average."""
        data = self._task.data
        self.model.set_statistics(data.train_images[:STATISTICS_IMAGES])
        self.model.eval()
        logits = torch.cat([self.model(images) for images in data.test_images.split(TEST_BATCH)])
        self.model.train()
        accuracy = (logits.argmax(1) == data.test_labels).double().mean()
        loss = cross_entropy(logits, data.test_labels)
        return {
            "test_loss": float(loss),
            "test_accuracy": float(accuracy),
            "updated_per_step": self._updated / max(self._done, 1),
        }

    def traffic(self) -> Traffic:
        return self._exchange.traffic()

    def state_dict(self) -> dict[str, Any]:
        own = {"done": self._done, "updated": self._updated, "model": self.model.state_dict()}
        return {**own, "exchange": self._exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done, self._updated = state["done"], state["updated"]
        self.model.load_state_dict(state["model"])
        self._exchange.load_state_dict(state["exchange"])


def make_training(task: Task, workers: int, transport: Transport | None) -> Cifar10Training:
    """All workers in this process, or, with a transport, this rank's alone. Communication: collective then."""

    def connect(named: list[tuple[str, Tensor]]) -> ModelExchange:
        if transport is None:
            return SimulatedModelExchange(task.method, named, task.config, workers)
        return RealModelExchange(task.method, named, task.config, transport)

    return Cifar10Training(task, connect, workers)
