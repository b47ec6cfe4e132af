"""The data of the tasks: what each worker's batches are, and how a model is judged.

Batches are those of the study that chose the methods, image for image: one shuffled order dealt to the workers in turn,
or, label-skewed, draws with replacement from the classes that a worker has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.accuracy_per_byte.models import CONTEXT
from benchmarks.image_data import Images, load_cifar10, read_cifar10, read_mnist
from benchmarks.paper.resnet9 import SIDE, Augmentation, ResNet9

CLASSES = 10
BYTES = 256
SHAKESPEARE = "tinyshakespeare_input.txt"
STATISTICS_IMAGES = 2000  # from which the statistics of batch norm are made
DATA_SEED = 1000  # plus the run's: of the order of the data
Batch = tuple[Tensor, Tensor]  # inputs and what to predict


class Data(Protocol):
    """Training and test examples."""

    @property
    def classes(self) -> int:
        """That a model tells apart."""

    def batches(self, workers: int, per_worker: int, seed: int, skewed: bool) -> Iterator[list[Batch]]:
        """For ever, the batches of all workers for one step."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch, differentiable."""

    def evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        """Accuracy on the test set in per cent (None where it is not the measure), and the mean loss."""


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 [n, ...]; a model gets ``(image - offset) / scale``."""

    train: Batch
    test: Batch
    offset: float
    scale: float
    classes: int = CLASSES

    def batches(self, workers: int, per_worker: int, seed: int, skewed: bool) -> Iterator[list[Batch]]:
        draw = torch.Generator().manual_seed(DATA_SEED + seed)
        images, labels = self.train
        chosen = self._from_pools(workers, per_worker, draw) if skewed else self._in_turn(per_worker, draw)
        while True:
            yield [(images[index], labels[index]) for index in (next(chosen) for _ in range(workers))]

    def _in_turn(self, count: int, draw: torch.Generator) -> Iterator[Tensor]:
        """Indices of one batch after the other, shuffled afresh where the rest is too short."""
        while True:
            order = torch.randperm(len(self.train[1]), generator=draw)
            yield from (order[at : at + count] for at in range(0, len(order) - count + 1, count))

    def _from_pools(self, workers: int, count: int, draw: torch.Generator) -> Iterator[Tensor]:
        """Indices of the workers' batches in turn; each worker has two or three classes."""
        labels = self.train[1]
        if workers <= CLASSES:
            has = [labels * workers // CLASSES == worker for worker in range(workers)]
        else:
            has = [(labels == w % CLASSES) | (labels == (w + 3) % CLASSES) for w in range(workers)]
        pools = [torch.nonzero(of_worker).flatten() for of_worker in has]
        while True:
            yield from (pool[torch.randint(len(pool), (count,), generator=draw)] for pool in pools)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return model((images.float() - self.offset) / self.scale)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(self._logits(model, batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        images, labels = self.test
        logits = torch.cat([self._logits(model, part) for part in images.split(1000)])
        accuracy = 100 * (logits.argmax(1) == labels).double().mean()
        return float(accuracy), float(cross_entropy(logits, labels))


@dataclass(frozen=True)
class AugmentedImages:
    """Of a large model: float32 [n, 3, 32, 32] on its device; those to train with are shifted, flipped and cut."""

    images: Images
    classes: int = CLASSES

    def batches(self, workers: int, per_worker: int, seed: int, skewed: bool) -> Iterator[list[Batch]]:
        if skewed:
            raise ValueError("augmented images come in one order for all workers: leave --skewed out")
        images, labels, count = self.images.train_images, self.images.train_labels, workers * per_worker
        draw = np.random.default_rng(DATA_SEED + seed)
        while True:
            order = torch.from_numpy(draw.permutation(len(labels))).to(labels.device)
            for chosen in order.split(count):
                if len(chosen) == count:
                    changed = Augmentation.draw(draw, count).apply(images, chosen)
                    changed = changed.contiguous(memory_format=torch.channels_last)
                    yield list(zip(changed.split(per_worker), labels[chosen].split(per_worker), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        assert isinstance(model, ResNet9), "its batch norms have no statistics before"
        model.set_statistics(self.images.train_images[:STATISTICS_IMAGES])
        model.eval()
        logits = torch.cat([model(part) for part in self.images.test_images.split(1000)])
        model.train()
        labels = self.images.test_labels
        accuracy = 100 * (logits.argmax(1) == labels).double().mean()
        return float(accuracy), float(cross_entropy(logits, labels))


@dataclass(frozen=True)
class TextData:
    """Characters as int64 [n], to train with and to judge by, in sequences of ``context``."""

    train: Tensor
    test: Tensor
    classes: int
    context: int = CONTEXT

    def batches(self, workers: int, per_worker: int, seed: int, skewed: bool) -> Iterator[list[Batch]]:
        if skewed:
            raise ValueError("text has no labels to skew: leave --skewed out for the language model")
        draw = torch.Generator().manual_seed(DATA_SEED + seed)
        while True:
            yield [self._windows(self.train, per_worker, draw) for _ in range(workers)]

    def _windows(self, text: Tensor, count: int, draw: torch.Generator) -> Batch:
        """Sequences from random places, and the same one character later."""
        starts = torch.randint(len(text) - self.context - 1, (count,), generator=draw).tolist()
        windows = torch.stack([text[start : start + self.context + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = (characters.to(next(model.parameters()).device) for characters in batch)
        return cross_entropy(model(inputs).reshape(-1, self.classes), targets.reshape(-1))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        inputs, targets = self._windows(self.test, 256, torch.Generator().manual_seed(7))
        losses = [float(self.loss(model, part)) for part in zip(inputs.split(64), targets.split(64), strict=True)]
        return None, sum(losses) / len(losses)


def mnist(data_dir: Path) -> ImageData:
    """Flat images, from 0 to 1."""
    train_images, train_labels, test_images, test_labels = map(_tensor, read_mnist(data_dir / "mnist"))
    train, test = (train_images.flatten(1), train_labels.long()), (test_images.flatten(1), test_labels.long())
    return ImageData(train, test, offset=0, scale=255)


def cifar10(data_dir: Path) -> ImageData:
    """Colour images [3, 32, 32], about standardised."""
    train_images, train_labels, test_images, test_labels = map(_tensor, read_cifar10(data_dir / "cifar10"))
    train = train_images.view(-1, 3, 32, 32), train_labels.long()
    return ImageData(train, (test_images.view(-1, 3, 32, 32), test_labels.long()), offset=120, scale=62)


def augmented_cifar10(data_dir: Path) -> AugmentedImages:
    """CIFAR-10 for a model on :func:`device_of_large`."""
    flat, shape = load_cifar10(data_dir / "cifar10"), (-1, 3, SIDE, SIDE)
    train, test = flat.train_images.view(shape), flat.test_images.view(shape)
    images = Images(flat.name, train, flat.train_labels, test, flat.test_labels)
    return AugmentedImages(images.to(torch.device(device_of_large())))


def device_of_large() -> str:
    """Where large models are trained: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def shakespeare(data_dir: Path) -> TextData:
    """Tiny Shakespeare, character by character; the last tenth judges."""
    text = (data_dir / "text" / SHAKESPEARE).read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([numbers[character] for character in text])
    cut = int(len(characters) * 0.9)
    return TextData(characters[:cut], characters[cut:], len(numbers))


def shakespeare_bytes(data_dir: Path) -> TextData:
    """Tiny Shakespeare, byte by byte: with the classes of :func:`wikitext`."""
    characters = _bytes_of(data_dir, SHAKESPEARE)
    cut = int(len(characters) * 0.9)
    return TextData(characters[:cut], characters[cut:], BYTES)


def wikitext(data_dir: Path, context: int = CONTEXT) -> TextData:
    """WikiText-2, byte by byte: its validation part of 1.1 MB trains, its test part judges."""
    train, test = (_bytes_of(data_dir, f"wikitext2_{part}.txt") for part in ("valid", "test"))
    return TextData(train, test, BYTES, context)


def _bytes_of(data_dir: Path, name: str) -> Tensor:
    return torch.frombuffer(bytearray((data_dir / "text" / name).read_bytes()), dtype=torch.uint8).long()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())
