"""Training one model with one method until it is good enough, with time, steps and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hvd_sketch
from benchmarks.image_data import Images
from benchmarks.methods import FEW_BIT_RATIO, METHODS
from benchmarks.network.clock import read_sent
from hvd_sketch import LowRankConfig, SketchConfig
from hvd_sketch.config import Compression
from hvd_sketch.transport import Transport


def _paper(ratio: float, model: nn.Module, ranks: int) -> Compression:
    return SketchConfig.for_compression(ratio, hvd_sketch.sketched_dim(model.parameters()), momentum=0.0)


def _nominated(model: nn.Module, ranks: int) -> Compression:
    dim = hvd_sketch.sketched_dim(model.parameters())
    return SketchConfig.for_wire_ratio(FEW_BIT_RATIO, dim, ranks, candidates="nominate")


def _low_rank(model: nn.Module, ranks: int) -> Compression:
    return LowRankConfig(ratio=FEW_BIT_RATIO)


def _recommended(model: nn.Module, ranks: int) -> Compression:
    return hvd_sketch.recommended(model.parameters(), FEW_BIT_RATIO, ranks)


# How ours compress, from the model and the number of ranks.
OURS: dict[str, Callable[[nn.Module, int], Compression]] = {
    "sketch20": partial(_paper, 20.0),
    "sketch100": partial(_paper, 100.0),
    "nominate150": _nominated,
    "lowrank150": _low_rank,
    "recommended": _recommended,
}


@dataclass(frozen=True)
class Rate:
    """How SGD steps."""

    learning_rate: float
    momentum: float  # Nesterov's, after the exchange

    def sgd(self, parameters: Iterable[Tensor]) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, self.learning_rate, self.momentum, nesterov=self.momentum > 0)


@dataclass
class Course:
    """How a training went. Seconds and bytes are of training steps alone, without the evaluations in between."""

    reached: bool = False  # whether the target was
    step_s: list[float] = field(default_factory=list)  # of each step, this rank's
    # after each evaluation: steps, seconds, wire bytes by the ledger, accuracy as a fraction
    curve: list[tuple[int, float, int, float]] = field(default_factory=list)
    # bytes and packets this host's interface sent, int64 [2]
    sent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    ratio: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.step_s)


class MethodOptimizer:
    """An optimizer of torch on what a method makes of the gradients."""

    def __init__(self, method: str, model: nn.Module, transport: Transport, inner: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        dim = sum(parameter.numel() for parameter in parameters)
        self._gradient = torch.zeros(dim)
        pieces = self._gradient.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)  # backward adds to it in place
        described = [(name, tuple(parameter.shape), "float32") for name, parameter in model.named_parameters()]
        self._method = METHODS[method](transport, dim, described)
        self.ledger = self._method.ledger
        self._inner = inner

    def zero_grad(self) -> None:
        self._gradient.zero_()

    def step(self) -> None:
        mean = self._method.step(self._gradient).values
        self._gradient.copy_(mean)
        self._inner.step()


def make_optimizer(method: str, model: nn.Module, transport: Transport, rate: Rate) -> Any:
    """Ours as a user would make it; the others the leanest way."""
    inner, named = rate.sgd(model.parameters()), model.named_parameters()
    if method not in OURS:
        return MethodOptimizer(method, model, transport, inner)
    compression = OURS[method](model, transport.size)
    # A rate of the grid that diverges ends with a bad accuracy, not with an error.
    return hvd_sketch.DistributedOptimizer(inner, named, compression=compression, transport=transport, max_skips=0)


@dataclass
class Task:
    """What to train, until when. ``batch`` is that of one rank."""

    data: Images
    make_model: Callable[[], nn.Module]
    target: float
    batch: int
    most_steps: int
    steps_between: int
    seed: int = 0


def train(task: Task, method: str, rate: Rate, transport: Transport, most_steps: int | None = None) -> Course:
    """Until the target or ``most_steps``. Communication: collective; all ranks see the same accuracy."""
    torch.manual_seed(task.seed)
    model = task.make_model()
    hvd_sketch.broadcast_parameters(model.named_parameters(), 0, transport)
    optimizer = make_optimizer(method, model, transport, rate)
    batches = endless_batches(len(task.data.train_labels), task.batch, task.seed, transport)
    course = Course()
    while not course.reached and course.steps < (most_steps or task.most_steps):
        transport.barrier()
        sent_before = read_sent()
        for _ in range(task.steps_between):
            start_s = time.perf_counter()
            _step(model, optimizer, task.data, next(batches))
            course.step_s.append(time.perf_counter() - start_s)
        transport.barrier()
        course.sent += read_sent() - sent_before
        accuracy = evaluate(model, task.data, transport)
        wire_bytes = optimizer.ledger.totals().wire_bytes
        course.curve.append((course.steps, round(sum(course.step_s), 4), wire_bytes, accuracy))
        course.reached = accuracy >= task.target
    course.ratio = optimizer.ledger.compression_ratio()
    return course


def _step(model: nn.Module, optimizer: Any, data: Images, batch: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
    optimizer.step()


def endless_batches(images: int, batch: int, seed: int, transport: Transport) -> Iterator[Tensor]:
    """This rank's share of shuffles that all ranks know.

    Raises:
        ValueError: on every rank: a share has no whole batch.
    """
    if images // transport.size < batch:
        raise ValueError(
            f"{images} training images on {transport.size} ranks have no batch of {batch} each: "
            f"ask for at most {images // transport.size}, or for fewer ranks"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        own = torch.randperm(images, generator=generator)[transport.rank :: transport.size]
        yield from (part for part in own.split(batch) if len(part) == batch)


@torch.no_grad()
def evaluate(model: nn.Module, data: Images, transport: Transport) -> float:
    """Test accuracy as a fraction, every rank judging its share. Collective."""
    share = slice(transport.rank, None, transport.size)
    pairs = zip(data.test_images[share].split(500), data.test_labels[share].split(500), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    return int(transport.allreduce_(torch.tensor([right]))) / len(data.test_labels)
