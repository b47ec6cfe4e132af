"""The paper's CIFAR-10 experiment: ResNet-9 with dense, true top-k, sketched and local top-k exchanges.

In one process the workers are simulated, equal to the real exchange to the bit; on real ranks:
``launch/mpirun.sh -n 4 -- python -m benchmarks.paper.cifar10 --transport mpi …``. See benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.image_data import load_images
from benchmarks.paper.experiment import Labels, Session, Traffic, add_arguments, check_arguments
from benchmarks.paper.model_exchange import ModelExchange, RealModelExchange, SimulatedModelExchange
from benchmarks.paper.resnet9 import SIDE, Augmentation, ResNet9
from benchmarks.paper.workers import METHODS
from hvd_sketch import SketchConfig, sketched_dim
from hvd_sketch.transport import local_transports, resolve_transport

PEAK_AT = 5 / 24  # of the training: epoch 5 of 24
STATISTICS_IMAGES = 2000  # from which the statistics of batch norm are made for a measurement
TEST_BATCH = 500
POINTS = 8  # of a run's curve
# Dense are biases and batch norms alone, less than 1 % of the model, as in the paper.
EXCHANGE = {"momentum": 0.9, "weight_decay": 5e-4, "dense_below": 0, "deterministic": True}
REAL_METHODS = ("dense", "sketched")


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment.

    Attributes:
        batch: images per step, all workers together.
        rate: the learning rate at its peak, for the mean gradient of a batch.
        sketches: fields of the configurations compared; ``ratio`` stands for ``SketchConfig.for_compression``.
        sweep_steps: of the trainings that differ in the number of workers.
        workers: of those; the first is that of all others.
    """

    width: int
    epochs: int
    sweep_steps: int
    train_images: int
    batch: int
    rate: float
    workers: tuple[int, ...]
    sketches: tuple[dict[str, Any], ...]


SCALES = {
    "small": Scale(8, 2, 200, 50_000, 128, 0.2, (4, 16, 64), ({"ratio": 10}, {"ratio": 20})),
    "full": Scale(
        *(64, 24, 24 * 97, 50_000, 512, 0.4, (4, 16, 64, 256)),
        sketches=tuple(
            {"k": k, "rows": 3, "cols": cols, "oversample": oversample}
            for k in (50_000, 100_000)
            for cols, oversample in ((100_000, 4), (200_000, 2), (200_000, 4), (200_000, 8), (400_000, 4))
        ),
    ),
}


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
        self._exchange.finish()
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
        self._exchange.add(worker)
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


@dataclass(frozen=True)
class Choice:
    """One method with its configuration, in one part of the experiment."""

    part: str
    method: str
    config: SketchConfig
    workers: int

    def labels(self, seed: int) -> Labels:
        """What tells runs apart."""
        return {
            "part": self.part,
            "method": self.method,
            "setting": self.setting(),
            "workers": self.workers,
            "seed": seed,
        }

    def setting(self) -> str:
        c = self.config
        if self.method == "dense":
            return "all"
        is_sketched = self.method == "sketched"
        return f"k {c.k:,}" + (f", sketch {c.rows} × {c.cols:,}, P {c.oversample}" if is_sketched else "")


def choices(methods: Sequence[str], scale: Scale, parts: Sequence[str]) -> Iterator[Choice]:
    """All that is trained: methods and configurations side by side, then two methods on more and more workers."""
    configs = [_config(fields, scale.width) for fields in scale.sketches]
    first = scale.workers[0]
    if "accuracy" in parts:
        for method in (m for m in methods if m != "local_topk"):
            for config in (
                configs[:1] if method == "dense" else configs if method == "sketched" else _one_per_k(configs)
            ):
                yield Choice("accuracy", method, config, first)
    if "workers" in parts:
        for method in (m for m in methods if m in ("sketched", "local_topk")):
            for workers in scale.workers:
                yield Choice("workers", method, configs[0], workers)


def _one_per_k(configs: Sequence[SketchConfig]) -> list[SketchConfig]:
    return list({config.k: config for config in configs}.values())


def _config(fields: dict[str, Any], width: int) -> SketchConfig:
    given = {name: value for name, value in fields.items() if name != "ratio"} | EXCHANGE
    if "ratio" not in fields:
        return SketchConfig(**given)
    total = sum(p.numel() for p in ResNet9(width).parameters())
    sketched = sketched_dim(ResNet9(width).parameters(), given["dense_below"])
    floats = 2 * total / fields["ratio"] - 2 * (total - sketched)  # the ratio is that of the whole model
    return SketchConfig.for_compression(2 * sketched / floats, sketched, **given)


def load_data(arguments: argparse.Namespace, images: int) -> Cifar10:
    """The first ``images`` of the training set, which is in no order, and the whole test set."""
    data, shape = load_images(arguments.data_dir), (-1, 3, SIDE, SIDE)
    if data.name != "cifar10":
        raise ValueError(f"--data-dir {arguments.data_dir}: expected CIFAR-10's binary version, found {data.name}")
    put = partial(torch.Tensor.to, device=arguments.device)
    train = put(data.train_images[:images].view(shape)), put(data.train_labels[:images])
    return Cifar10(*train, put(data.test_images.view(shape)), put(data.test_labels))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "workers"), default=["accuracy", "workers"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--workers", type=int, nargs="+", help="W; the first is that of the part 'accuracy'")
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="the paper's compression ratios, instead of the scale's"
    )
    for name in ("k", "cols", "rows", "oversample"):
        parser.add_argument(f"--{name}", type=int, help="of one sketch instead of the scale's; k and cols together")
    for name in ("width", "epochs", "sweep-steps", "train-images", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the scale's")
    parser.add_argument("--rate", type=float, help="peak of the learning rate, instead of the scale's")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--transport", choices=("simulation", "mpi", "horovod"), default="simulation")
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    if (arguments.k is None) != (arguments.cols is None):
        parser.error("--k and --cols are given together, or neither")
    return arguments


def scale_of(arguments: argparse.Namespace) -> Scale:
    """The scale asked for, with what was given in its place."""
    given = {
        name: getattr(arguments, name)
        for name in ("width", "epochs", "sweep_steps", "train_images", "batch", "rate")
        if getattr(arguments, name) is not None
    }
    if arguments.workers:
        given["workers"] = tuple(arguments.workers)
    shape = {name: getattr(arguments, name) for name in ("rows", "oversample") if getattr(arguments, name) is not None}
    if arguments.ratios:
        given["sketches"] = tuple({"ratio": ratio, **shape} for ratio in arguments.ratios)
    elif arguments.k is not None:
        given["sketches"] = ({"k": arguments.k, "cols": arguments.cols, **shape},)
    return replace(SCALES[arguments.scale], **given)


def main() -> None:
    arguments = parse_arguments()
    simulated, device = arguments.transport == "simulation", torch.device(arguments.device)
    transport = local_transports(1)[0] if simulated else resolve_transport(arguments.transport)
    if device.type == "cpu":
        torch.set_num_threads(1)  # every rank rounds alike
    scale, methods, parts = scale_of(arguments), arguments.methods, arguments.parts
    if not simulated:
        scale = replace(scale, workers=(transport.size,))
        methods, parts = [method for method in methods if method in REAL_METHODS], ["accuracy"]
    data = load_data(arguments, scale.train_images)
    session = Session(arguments, "cifar10", asdict(scale) | {"test_images": len(data.test_labels)}, transport, device)
    for choice in choices(methods, scale, parts):
        for seed in range(arguments.seeds if choice.part == "accuracy" else 1):
            config = replace(choice.config, seed=seed)
            steps = (
                scale.sweep_steps if choice.part == "workers" else scale.epochs * (scale.train_images // scale.batch)
            )
            task = Task(choice.method, config, data, scale.width, steps, scale.batch, scale.rate, seed)
            make = partial(_training, task, choice.workers, None if simulated else transport)
            session.run(choice.labels(seed), make, steps, {-(-steps * i // POINTS) for i in range(1, POINTS + 1)})


def _training(task: Task, workers: int, transport: Any) -> Cifar10Training:
    def connect(named: list[tuple[str, Tensor]]) -> ModelExchange:
        if transport is None:
            return SimulatedModelExchange(task.method, named, task.config, workers)
        return RealModelExchange(task.method, named, task.config, transport)

    return Cifar10Training(task, connect, workers)


if __name__ == "__main__":
    main()
