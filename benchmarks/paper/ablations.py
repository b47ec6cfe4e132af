"""What the Sketched-SGD paper leaves open: hashes, rows, momentum, oversampling, selection, wire formats and large k.

Every setting is trained at several learning rates and judged at its best: the grid grows where that lies at its edge.
In one process all workers are simulated, equal to real exchanges to the bit; what the library can do runs on real
ranks, too: ``launch/mpirun.sh -n 4 -- python -m benchmarks.paper.ablations --transport mpi …``.
See benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import nn

from benchmarks.image_data import Images, load_images
from benchmarks.models import MODELS
from benchmarks.paper.ablation_settings import GROUPS, Budget, Group, Setting
from benchmarks.paper.classifier import ClassifierTraining, Task
from benchmarks.paper.command_line import (
    add_device,
    add_workers,
    connect,
    experiment_parser,
    is_simulated,
    parse,
    says_plainly,
)
from benchmarks.paper.experiment import Session
from benchmarks.paper.model_exchange import Workers, count_of
from benchmarks.paper.rate_search import Search, search_rates
from hvd_sketch import Transport, sketched_dim

STEPS = {"small": 180, "full": 2000}
MODEL = {"mnist": ("mlp", 200), "cifar10": ("cnn", 64)}  # and its width, by data set
# Peaks of the schedule, tried first. Momentum 0.9 adds every gradient up ten times, and goes stale while it waits in v.
FIRST_RATES = {"none": (0.4, 0.8, 1.6), "before": (0.01, 0.02, 0.04), "after": (0.01, 0.02, 0.04)}
FIRST_RATES_OF_MOST = (0.16, 0.32, 0.64)  # with momentum before, where a sixteenth of all coordinates or more is sent
EXTENSIONS = 6  # of the grid, at most
POINTS = 10  # of a curve


@dataclass(frozen=True)
class Bench:
    """What is common to all runs of a call."""

    images: Images
    model: str
    hidden: int
    batch: int
    steps: int
    seeds: int
    workers: Workers
    transport: Transport
    rates: Sequence[float] | None  # of every setting, instead of a search

    def make_model(self) -> nn.Module:
        return MODELS[self.model](self.images.train_images.shape[1], self.hidden)

    def budget(self) -> Budget:
        return Budget(sketched_dim(self.make_model().parameters()), count_of(self.workers))

    def training(self, setting: Setting, rate: float, seed: int) -> ClassifierTraining:
        """Communication: collective on real ranks, here and in its steps."""
        task = Task(self.make_model, self.images, rate, self.steps, self.batch, seed)
        return ClassifierTraining(task, self.workers, setting.method, setting.library_config(seed), setting.variant)

    def loss_at(self, session: Session, setting: Setting, rate: float) -> float:
        """The final training loss, mean over seeds, equal on all ranks. Communication: collective."""
        points = {round(self.steps * (i + 1) / POINTS) for i in range(POINTS)}
        losses = []
        for seed in range(self.seeds):
            labels = {"setting": setting.name, "rate": rate, "seed": seed}
            run = session.run(labels, partial(self.training, setting, rate, seed), self.steps, points)
            losses.append(run["final"]["train_loss"] if self.transport.rank == 0 else 0.0)
        return float(self.transport.broadcast_(torch.tensor([mean(losses)], dtype=torch.float64)))

    def run_group(self, session: Session, name: str, group: Group) -> None:
        """Search the rate of every setting. Communication: collective."""
        for label, setting in group.items():
            labels = {"group": name, "label": label, "setting": setting.name, "steps": self.steps}
            if session.find(labels):
                continue
            loss_at = partial(self.loss_at, session, setting)
            if self.rates:
                search = Search({rate: loss_at(rate) for rate in self.rates})
            else:
                search = search_rates(first_rates(setting, self.budget().dim), loss_at, EXTENSIONS)
            losses = {f"{rate:g}": search.losses[rate] for rate in sorted(search.losses)}
            figures = {"best_rate": search.best, "at_edge": search.at_edge, "loss_by_rate": losses}
            session.add(labels, **figures, fields=setting.described())


def first_rates(setting: Setting, dim: int) -> Sequence[float]:
    """Where the search begins, to be short; see :data:`FIRST_RATES`."""
    sends_most = setting.method == "dense" or 16 * setting.config.k >= dim
    if setting.variant.momentum == "before" and sends_most:
        return FIRST_RATES_OF_MOST
    return FIRST_RATES[setting.variant.momentum]


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__ or "")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    told = f"default: {STEPS['small']} at small scale, {STEPS['full']} at full"
    parser.add_argument("--steps", type=int, help=told)
    parser.add_argument("--rates", type=float, nargs="+", help="of every setting, instead of a search")
    parser.add_argument("--batch", type=int, default=64, help="images per worker and step (default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="width of the model (default: 200 on MNIST, 64 on CIFAR-10)")
    add_workers(parser)
    add_device(parser)
    arguments = parse(parser, steps=1, batch=1, workers=1, hidden=1)
    arguments.steps = arguments.steps or STEPS[arguments.scale]
    if arguments.rates and min(arguments.rates) <= 0:
        parser.error(f"--rates must be above 0, got {min(arguments.rates):g}")
    return arguments


def make_bench(arguments: argparse.Namespace) -> Bench:
    transport, workers = connect(arguments)
    images = load_images(arguments.data_dir).to(arguments.device)
    model, hidden = MODEL[images.name]
    sizes = arguments.hidden or hidden, arguments.batch, arguments.steps, arguments.seeds
    return Bench(images, model, *sizes, workers, transport, arguments.rates)


@says_plainly
def main() -> None:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message="oversample")
    bench = make_bench(arguments)
    budget = bench.budget()
    settings = {name: getattr(bench, name) for name in ("model", "hidden", "batch", "seeds", "rates")}
    settings |= {"dim": budget.dim, "workers": budget.workers}
    session = Session(arguments, f"ablations_{bench.images.name}", settings, bench.transport)
    for name in arguments.groups:
        group = GROUPS[name](budget)
        possible = {label: s for label, s in group.items() if is_simulated(arguments) or s.is_real}
        bench.run_group(session, name, possible)


if __name__ == "__main__":
    main()
