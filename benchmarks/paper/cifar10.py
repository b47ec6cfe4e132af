"""The paper's CIFAR-10 experiment: ResNet-9 with dense, true top-k, sketched and local top-k exchanges.

In one process the workers are simulated, equal to the real exchange to the bit; on real ranks:
``launch/mpirun.sh -n 4 -- python -m benchmarks.paper.cifar10 --transport mpi …``. See benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.image_data import Images, load_cifar10
from benchmarks.paper.cifar10_training import Cifar10Training, Task
from benchmarks.paper.command_line import (
    add_device,
    connect,
    experiment_parser,
    given,
    is_simulated,
    parse,
    says_plainly,
)
from benchmarks.paper.experiment import Labels, Session
from benchmarks.paper.model_exchange import METHODS
from benchmarks.paper.resnet9 import SIDE, ResNet9
from hvd_sketch import SketchConfig, sketched_dim

POINTS = 4  # of a run's curve; measuring one takes as long as 70 steps at small scale
# Dense are biases and batch norms alone, less than 1 % of the model, as in the paper.
EXCHANGE = {"weight_decay": 5e-4, "dense_below": 16, "deterministic": True}  # dense: norms and biases, of at most 512
REAL_METHODS = ("dense", "sketched")
SIZES = ("width", "epochs", "train_images", "batch", "sweep_steps", "sweep_batch")  # that an argument may change


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment."""

    width: int
    epochs: int
    train_images: int
    batch: int  # images per step, all workers together
    rate: float  # the learning rate at its peak, for the mean gradient of a batch
    momentum: float  # inside the exchange
    workers: list[int]  # how many; the first is that of the part "accuracy"
    sweep_steps: int  # of the part "workers"
    sweep_batch: int
    # fields of the configurations compared; ``ratio`` stands for ``SketchConfig.for_compression``
    sketches: list[dict[str, Any]]


SCALES = {
    "small": Scale(8, 3, 25_000, 32, 0.5, 0.0, [4, 16, 64, 256], 120, 256, [{"ratio": 10}, {"ratio": 20}]),
    "full": Scale(
        *(64, 24, 50_000, 512, 0.4, 0.9, [4, 16, 64, 256], 24 * 97, 512),
        sketches=[
            *({"ratio": ratio} for ratio in (10, 20)),
            *(
                {"k": k, "rows": 3, "cols": cols, "oversample": oversample}
                for k in (50_000, 100_000)
                for cols, oversample in ((100_000, 4), (200_000, 2), (200_000, 4), (200_000, 8), (400_000, 4))
            ),
        ],
    ),
}


@dataclass(frozen=True)
class Choice:
    """One method with its configuration, in one part of the experiment."""

    part: str
    method: str
    config: SketchConfig
    workers: int

    def labels(self, seed: int) -> Labels:
        """What tells runs apart."""
        own = {"part": self.part, "method": self.method, "setting": self.setting()}
        return {**own, "workers": self.workers, "seed": seed}

    def setting(self) -> str:
        c = self.config
        if self.method == "dense":
            return "all"
        is_sketched = self.method == "sketched"
        return f"k {c.k:,}" + (f", sketch {c.rows} × {c.cols:,}, P {c.oversample}" if is_sketched else "")


def choices(methods: Sequence[str], scale: Scale, parts: Sequence[str]) -> Iterator[Choice]:
    """All that is trained: methods and configurations side by side, then two methods on more and more workers."""
    configs = [config_of({"momentum": scale.momentum, **fields}, scale.width) for fields in scale.sketches]
    of_method = {"dense": configs[:1], "true_topk": list({c.k: c for c in configs}.values()), "sketched": configs}
    if "accuracy" in parts:
        for method in methods:
            yield from (Choice("accuracy", method, config, scale.workers[0]) for config in of_method.get(method, ()))
    if "workers" in parts:
        for method in (m for m in methods if m in ("sketched", "local_topk")):
            yield from (Choice("workers", method, configs[0], workers) for workers in scale.workers)


def config_of(fields: dict[str, Any], width: int) -> SketchConfig:
    """A configuration for the model of a width; ``ratio`` among its fields is that of the whole model."""
    given = {name: value for name, value in fields.items() if name != "ratio"} | EXCHANGE
    if "ratio" not in fields:
        return SketchConfig.paper(**given)
    total = sum(p.numel() for p in ResNet9(width).parameters())
    sketched = sketched_dim(ResNet9(width).parameters(), given["dense_below"])
    floats = 2 * total / fields["ratio"] - 2 * (total - sketched)
    if floats <= 0:
        most = total / (total - sketched)
        raise ValueError(f"expected ratios below {most:.0f}, where all goes into dense tensors, got {fields['ratio']}")
    return SketchConfig.for_compression(2 * sketched / floats, sketched, **given)


def load_data(arguments: argparse.Namespace, images: int) -> Images:
    """The first ``images`` of the training set, which is in no order, and the whole test set."""
    data, shape = load_cifar10(arguments.data_dir), (-1, 3, SIDE, SIDE)
    train = data.train_images[:images].view(shape), data.train_labels[:images]
    return Images(data.name, *train, data.test_images.view(shape), data.test_labels).to(arguments.device)


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__ or "")
    parts, told = ["accuracy", "workers"], "default: both; workers has one seed"
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help=told)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--workers", type=int, nargs="+", help="W; the first is that of the part 'accuracy'")
    told = "the paper's compression ratios, instead of the scale's"
    parser.add_argument("--ratios", type=float, nargs="+", help=told)
    for name in ("k", "cols", "rows", "oversample"):
        parser.add_argument(f"--{name}", type=int, help="of one sketch instead of the scale's; k and cols together")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the scale's")
    parser.add_argument("--rate", type=float, help="peak of the learning rate, instead of the scale's")
    parser.add_argument("--momentum", type=float, help="inside the exchange, instead of the scale's")
    add_device(parser)
    arguments = parse(parser, **dict.fromkeys(SIZES, 1), workers=1, ratios=1, rate=0)
    if arguments.ratios and arguments.k is not None:
        parser.error("--ratios sets k and cols: give either --ratios or --k and --cols")
    if (arguments.k is None) != (arguments.cols is None):
        parser.error("--k and --cols are given together, or neither")
    if not is_simulated(arguments) and not set(arguments.methods) & set(REAL_METHODS):
        parser.error(f"on real ranks there are {' and '.join(REAL_METHODS)}, got --methods {arguments.methods}")
    return arguments


def check_sizes(scale: Scale) -> None:
    """Say what cannot work before hours of training, not after them.

    Raises:
        ValueError: a batch that cannot be divided among the workers, or larger than the training set.
    """
    for batch, workers in ((scale.batch, scale.workers[:1]), (scale.sweep_batch, scale.workers)):
        uneven = [count for count in workers if batch % count]
        if uneven:
            raise ValueError(f"a batch of {batch} has no equal parts for {uneven} workers: change --[sweep-]batch")
        if batch > scale.train_images:
            images = f"the {scale.train_images} training images"
            raise ValueError(f"a batch of {batch} is more than {images}: change --[sweep-]batch")


def scale_of(arguments: argparse.Namespace) -> Scale:
    """The scale asked for, with what was given in its place."""
    sketches = SCALES[arguments.scale].sketches
    if arguments.ratios:
        sketches = [{"ratio": ratio} for ratio in arguments.ratios]
    elif arguments.k is not None:
        sketches = [{"k": arguments.k, "cols": arguments.cols}]
    shape = given(arguments, "rows", "oversample")
    own = given(arguments, *SIZES, "rate", "momentum", "workers")
    own["sketches"] = [{**sketch, **shape} for sketch in sketches]
    return replace(SCALES[arguments.scale], **own)


@says_plainly
def main() -> None:
    arguments = parse_arguments()
    transport, _ = connect(arguments)
    scale, methods, parts = scale_of(arguments), arguments.methods, arguments.parts
    if not is_simulated(arguments):
        scale = replace(scale, workers=[transport.size], sweep_batch=transport.size)
        methods, parts = [method for method in methods if method in REAL_METHODS], ["accuracy"]
    data = load_data(arguments, scale.train_images)
    scale = replace(scale, train_images=len(data.train_labels))
    check_sizes(scale)
    chosen = list(choices(methods, scale, parts))
    if not chosen:
        raise ValueError(f"nothing to train: --parts {' '.join(parts)} has none of --methods {' '.join(methods)}")
    settings = asdict(scale) | {"test_images": len(data.test_labels)}
    session = Session(arguments, "cifar10", settings, transport)
    for choice in chosen:
        steps, batch, seeds = scale.epochs * (scale.train_images // scale.batch), scale.batch, arguments.seeds
        if choice.part == "workers":
            steps, batch, seeds = scale.sweep_steps, scale.sweep_batch, 1
        for seed in range(seeds):
            config = replace(choice.config, seed=seed)
            task = Task(choice.method, config, data, scale.width, steps, batch, scale.rate, seed)
            make = partial(Cifar10Training, task, choice.workers if is_simulated(arguments) else transport)
            session.run(choice.labels(seed), make, steps, {-(-steps * i // POINTS) for i in range(1, POINTS + 1)})


if __name__ == "__main__":
    main()
