"""What is trained: a model on data for a number of steps, with the learning rates to begin a search at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.accuracy_per_byte import data
from benchmarks.accuracy_per_byte.data import Data
from benchmarks.accuracy_per_byte.models import CONTEXT, HEADS, Transformer, large_cnn, small_cnn
from benchmarks.models import mlp
from benchmarks.paper.resnet9 import ResNet9

BASE_WORKERS = 4  # up to so many have ``per_worker`` examples each; more share as many
Kind = Literal["nesterov", "plain", "masked"]  # where the momentum is: after the exchange, nowhere, before it
ADAM_RATE = 0.004


@dataclass(frozen=True)
class Task:
    """What to train.

    Attributes:
        name: as the command line and the records have it.
        title: for people.
        make_model: from the number of classes; called under a seeded generator.
        load: from the folder of all data sets.
        steps: by default.
        per_worker: examples in a worker's batch, up to :data:`BASE_WORKERS` workers.
        rates: where to begin the search, by the kind of momentum; for a quarter of CIFAR's long run and more.
        long_factor: of the rates with momentum from ``long`` steps on.
        long: steps.
        adam: the optimizer is Adam, or what a method has in its place; the loss is the measure, not the accuracy.
        weight_decay: of Adam decoupled, of matrices; of SGD in the gradient, of all.
        cosine: the learning rate falls to a tenth along a cosine, not to zero along a line.
        begins_with: the name of a task: its model, trained dense, is the start. Empty: random weights are.
        is_large: trained on a GPU where there is one.
    """

    name: str
    title: str
    make_model: Callable[[int], nn.Module]
    load: Callable[[Path], Data]
    steps: int
    rates: Mapping[Kind, float]
    per_worker: int = 32
    long: int = 1000
    long_factor: float = 0.5
    adam: bool = False
    weight_decay: float = 0.0
    cosine: bool = False
    begins_with: str = ""
    is_large: bool = False

    @property
    def device(self) -> str:
        """Where to train."""
        return data.device_of_large() if self.is_large else "cpu"

    def batch(self, workers: int) -> int:
        """Examples per worker and step."""
        return self.per_worker if workers <= BASE_WORKERS else max(self.per_worker * BASE_WORKERS // workers, 1)

    def centre(self, kind: Kind, steps: int) -> float:
        """The learning rate in the middle of the first grid."""
        is_long = steps >= self.long and kind != "plain" and not self.adam
        return self.rates[kind] * (self.long_factor if is_long else 1)


def _cifar(name: str, title: str, make: Callable[[], nn.Module], steps: int, rates: Mapping[Kind, float]) -> Task:
    return Task(name, title, lambda classes: make(), data.cifar10, steps, rates)


def _resnet9() -> Task:
    """Of the paper: 24 epochs of batches of 512."""
    rates: Mapping[Kind, float] = {"nesterov": 0.4, "plain": 3.2, "masked": 0.4}
    options: Mapping[str, Any] = {"per_worker": 128, "long_factor": 1.0, "weight_decay": 5e-4, "is_large": True}

    def make(classes: int) -> nn.Module:
        return ResNet9(64).to(memory_format=torch.channels_last)

    title = "CIFAR-10, ResNet-9 of 6.6 M, augmented"
    return Task("resnet9", title, make, data.augmented_cifar10, 24 * 97, rates, **options)


def _text(name: str, title: str, make: Callable[[int], nn.Module] = Transformer, **options: Any) -> Task:
    """With Adam; the small model on tiny Shakespeare unless told otherwise."""
    rates: Mapping[Kind, float] = dict.fromkeys(("nesterov", "plain", "masked"), options.pop("rate", ADAM_RATE))
    defaults = {"load": data.shakespeare, "steps": 1500, "rates": rates, "per_worker": 4}
    return Task(name, title, make, adam=True, **(defaults | options))


def _wikitext(name: str, size: str, width: int, blocks: int, rate: float, **options: Any) -> Task:
    """As language models are trained today, byte by byte: AdamW, warm-up and cosine."""
    context = options.pop("context", CONTEXT)
    make = partial(Transformer, width=width, blocks=blocks, heads=max(width // 64, HEADS), context=context)
    title = f"WikiText-2, byte transformer of {size}, AdamW, cosine"
    load = partial(data.wikitext, context=context)
    return _text(name, title, make, load=load, rate=rate, weight_decay=0.1, cosine=True, **options)


TASKS = {
    task.name: task
    for task in (
        Task(
            "mnist",
            "MNIST, MLP of 269 k",
            lambda classes: mlp(784, 256),
            data.mnist,
            400,
            {"nesterov": 0.2, "plain": 1.6, "masked": 0.4},
        ),
        _cifar("cifar", "CIFAR-10, CNN of 139 k", small_cnn, 300, {"nesterov": 0.1, "plain": 0.8, "masked": 0.2}),
        _cifar("cifar2m", "CIFAR-10, CNN of 2.0 M", large_cnn, 400, {"nesterov": 0.05, "plain": 0.8, "masked": 0.1}),
        _resnet9(),
        _text("lm", "tiny Shakespeare, character transformer of 240 k, Adam"),
        _text("lm64", "tiny Shakespeare, character transformer of 240 k, Adam, 64 sequences a step", per_worker=16),
        _wikitext("wikitext", "0.3 M", 96, 2, ADAM_RATE, steps=300),
        _wikitext("wikitext1m", "1.0 M", 192, 2, ADAM_RATE / 2, steps=300),
        _wikitext("wikitext10m", "10.9 M", 384, 6, 1e-3, steps=1000, context=256, is_large=True),
        _wikitext("wikitext124m", "126 M", 896, 13, 6e-4, steps=2000, context=512, is_large=True),
        _text(
            "finetune",
            "tiny Shakespeare after WikiText-2, byte transformer of 0.3 M, AdamW, cosine",
            load=data.shakespeare_bytes,
            rate=ADAM_RATE / 4,
            **{"steps": 300, "weight_decay": 0.1, "cosine": True, "begins_with": "wikitext"},
        ),
    )
}


@lru_cache(maxsize=2)
def load(task: str, data_dir: Path) -> Data:
    """The data of a task, once per process."""
    return TASKS[task].load(data_dir)


def initial_model(task: Task, classes: int, seed: int) -> nn.Module:
    """With the weights that a seed gives."""
    torch.manual_seed(seed)
    return task.make_model(classes).to(task.device)
