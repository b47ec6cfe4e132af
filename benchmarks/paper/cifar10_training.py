"""One training of ResNet-9 on CIFAR-10, its workers simulated in this process or one on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.image_data import Images
from benchmarks.paper.model_exchange import Workers, count_of
from benchmarks.paper.model_training import ModelTraining
from benchmarks.paper.resnet9 import Augmentation, ResNet9
from hvd_sketch import SketchConfig

PEAK_AT = 5 / 24  # of the training: epoch 5 of 24
STATISTICS_IMAGES = 2000  # from which the statistics of batch norm are made for a measurement
TEST_BATCH = 500


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run."""

    method: str
    config: SketchConfig
    data: Images  # images as float32 [n, 3, 32, 32], all on one device
    width: int
    steps: int
    batch: int  # images of all workers together; each has an equal share and normalises by its own
    rate: float
    seed: int  # of the weights, the order of the images, their augmentation and the hashes

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_labels) // self.batch

    def rate_at(self, step: int) -> float:
        """Linear from 0 to the peak and back to 0 at the end; of the middle of a step, so that none is lost."""
        done = (step + 0.5) / self.steps
        return self.rate * (done / PEAK_AT if done < PEAK_AT else (1 - done) / (1 - PEAK_AT))


class Cifar10Training(ModelTraining):
    """Of a task, between all workers. Communication: collective on real ranks."""

    def __init__(self, task: Task, workers: Workers) -> None:
        self._task, self._share = task, task.batch // count_of(workers)
        torch.manual_seed(task.seed)
        # Channels last: 0.9 instead of 1.5 ms per image on one core, width 8.
        model = ResNet9(task.width).to(task.data.train_images.device, memory_format=torch.channels_last)
        super().__init__(model, workers, task.method, task.config)

    def step(self) -> float:
        task = self._task
        order, epoch_step = divmod(self._done, task.steps_per_epoch)
        images = torch.from_numpy(np.random.default_rng([task.seed, order, 0]).permutation(len(task.data.train_labels)))
        self._images = images[epoch_step * task.batch : (epoch_step + 1) * task.batch]
        self._changes = Augmentation.draw(np.random.default_rng([task.seed, self._done, 1]), task.batch)
        return super().step()

    def backward(self, worker: int) -> float:
        start, stop = worker * self._share, (worker + 1) * self._share
        data, own = self._task.data, self._images[start:stop]
        batch = self._changes.part(start, stop).apply(data.train_images, own)
        logits = self.model(batch.contiguous(memory_format=torch.channels_last))
        loss = cross_entropy(logits, data.train_labels[own.to(batch.device)])
        loss.backward()
        return float(loss.detach())

    def rate(self) -> float:
        return self._task.rate_at(self._done)

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
