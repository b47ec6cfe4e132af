"""The paper's MNIST experiment: ten one-vs-all linear classifiers, vanilla against sketched SGD, four workers.

In one process the workers are simulated, equal to the real exchange to the bit; on real ranks:
``launch/mpirun.sh -n 4 -- python -m benchmarks.paper.mnist --transport mpi …``. See benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.image_data import load_mnist
from benchmarks.paper.command_line import add_workers, connect, experiment_parser, parse, says_plainly
from benchmarks.paper.experiment import Session, Traffic, logarithmic
from benchmarks.paper.linear_models import (
    CLASSES,
    LOGISTIC,
    SVM,
    Labelled,
    Problem,
    gradient,
    judge,
    lowest_loss,
    with_bias,
)
from benchmarks.paper.model_exchange import Workers, count_of
from benchmarks.paper.simulation import RealExchanges, SimulatedAllreduce, SimulatedMean
from hvd_sketch import DenseAllreduce, SketchConfig, SketchedAllreduce, Transport
from hvd_sketch.transport import run_local

DIM = 28 * 28 + 1
K = 10
SKETCH = partial(SketchConfig.paper, rows=7, cols=40, k=K, oversample=10, deterministic=True)
STEPS = {"small": 1000, "full": 10_000}
LBFGS_ITERATIONS = {"small": 20, "full": 300}
AUDITED_STEPS = 10  # of each simulated run are made by real exchanges first: they must agree, and give the traffic

BETA = 5  # of Theorem 1, above 4
RHO = 4 * BETA / ((BETA - 4) * (BETA + 1) ** 2)
XI = int(1 + (1 + BETA) / (K / DIM * (1 + RHO))) + 1  # 304: the least integer that Theorem 1 allows with this beta
# As printed, 1 / (t + xi) is for mu of about 1. For mu = 0.01 it is 1 / (mu (t + xi)), which must not start above
# 1 / L: L is at most a quarter of ||x||^2, 786 on average.
XI_MU = 20_000


@dataclass(frozen=True)
class Recipe:
    """How one problem is trained, vanilla and sketched alike."""

    problem: Problem
    rate: Callable[[int, int], float]  # ``eta_t`` from t and T
    # ``q_t`` of the average that Alg. 2 puts out; None: the last iterate is judged.
    weight: Callable[[int], float] | None
    # of the exchange. HEAVYMIX has the rate inside the error (Alg. 2), top-k outside (Alg. 3).
    settings: dict[str, Any]

    @property
    def rate_inside(self) -> bool:
        return self.settings["candidates"] == "heavymix"


ALG2 = {"candidates": "heavymix", "momentum": 0.0}
ALG3 = {"candidates": "sketch", "momentum": 0.9}
RECIPES = {
    "logistic-alg2": Recipe(LOGISTIC, lambda t, steps: 1 / (t + XI), lambda t: (t + XI) ** 2, ALG2),
    "logistic-alg2-mu": Recipe(LOGISTIC, lambda t, steps: 100 / (t + XI_MU), lambda t: (t + XI_MU) ** 2, ALG2),
    "svm-alg2": Recipe(SVM, lambda t, steps: (steps + 1) ** -0.5, lambda t: 1, ALG2),  # Theorem 5
    "logistic-alg3": Recipe(LOGISTIC, lambda t, steps: 0.001, None, ALG3),
    "svm-alg3": Recipe(SVM, lambda t, steps: 0.001, None, ALG3),
}
METHODS = ("vanilla", "sketched")


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run."""

    recipe: Recipe
    method: str
    train: Labelled
    test: Labelled
    steps: int
    batch: int  # images per worker and step, drawn with replacement
    seed: int  # of the draws and of the hashes

    def config(self) -> SketchConfig:
        return SKETCH(seed=self.seed, **self.recipe.settings)


Exchange = SimulatedAllreduce | SimulatedMean | RealExchanges


class LinearTraining:
    """A :class:`benchmarks.paper.experiment.Training` of all ten classes; ``workers`` are those of this process."""

    def __init__(self, task: Task, exchange: Exchange, workers: Sequence[int], traffic: Callable[[], Traffic]) -> None:
        self._task, self._exchange, self._workers, self.traffic = task, exchange, workers, traffic
        self._done, self._total_weight = 0, 0.0
        self.weights = torch.zeros(CLASSES, task.train.images.shape[1])
        self._average = torch.zeros_like(self.weights, dtype=torch.float64)

    def step(self) -> float:
        task, recipe = self._task, self._task.recipe
        if recipe.weight is not None:
            weight = recipe.weight(self._done)
            self._total_weight += weight
            self._average.lerp_(self.weights.double(), weight / self._total_weight)
        batches = [self._batch(worker) for worker in self._workers]
        gradients, losses = zip(*(gradient(recipe.problem, self.weights, batch) for batch in batches), strict=True)
        rate, stacked = recipe.rate(self._done, task.steps), torch.stack(gradients)
        update = self._exchange.step(stacked * rate) if recipe.rate_inside else self._exchange.step(stacked) * rate
        self.weights = self.weights - update
        self._done += 1
        return sum(losses) / len(losses)

    def _batch(self, worker: int) -> Labelled:
        draw = np.random.default_rng([self._task.seed, self._done, worker])
        train = self._task.train
        return train.select(torch.from_numpy(draw.integers(0, len(train.labels), self._task.batch)))

    def measure(self) -> dict[str, float]:
        """Objective and error on both sets, of what the algorithm puts out."""
        task = self._task
        judged = self.weights if task.recipe.weight is None else self._average.float()
        measured = {}
        for name, data in (("train", task.train), ("test", task.test)):
            measured[f"{name}_loss"], measured[f"{name}_error"] = judge(task.recipe.problem, judged, data)
        return measured

    def state_dict(self) -> dict[str, Any]:
        own = {"done": self._done, "total_weight": self._total_weight, "average": self._average.clone()}
        return {**own, "weights": self.weights, "exchange": self._exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done, self._total_weight = state["done"], state["total_weight"]
        self._average, self.weights = state["average"].clone(), state["weights"]
        self._exchange.load_state_dict(state["exchange"])


def make_training(task: Task, workers: Workers) -> LinearTraining:
    return simulated_training(task, workers) if isinstance(workers, int) else real_training(task, workers)


def real_training(task: Task, transport: Transport) -> LinearTraining:
    """This rank's part of a training on real ranks. Communication: collective, here and in its steps."""
    make = SketchedAllreduce if task.method == "sketched" else DenseAllreduce
    exchange = partial(make, task.config(), task.train.images.shape[1], transport)
    exchanges = RealExchanges(lambda ledger: exchange(ledger=ledger), CLASSES)
    return LinearTraining(task, exchanges, [transport.rank], exchanges.traffic)


def simulated_training(task: Task, workers: int) -> LinearTraining:
    """All workers in this thread, with the traffic that real exchanges have in the first steps.

    Raises:
        AssertionError: real exchanges between threads do not give the same weights to the bit.
    """
    config, dim = task.config(), task.train.images.shape[1]
    exchange: Exchange = SimulatedMean(config.momentum, dim, CLASSES)
    if task.method == "sketched":
        exchange = SimulatedAllreduce(config, dim, workers, CLASSES)
    traffic: list[Traffic] = []
    training = LinearTraining(task, exchange, range(workers), lambda: traffic[0])
    start = training.state_dict()
    real = run_local(workers, lambda transport: _first_steps(real_training(task, transport)))
    first = _first_steps(training)
    assert all(torch.equal(each.weights, first.weights) for each in real), "simulation and real exchange differ"
    traffic.append(real[0].traffic())
    training.load_state_dict(start)
    return training


def _first_steps(training: LinearTraining) -> LinearTraining:
    for _ in range(AUDITED_STEPS):
        training.step()
    return training


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__ or "")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="default: all")
    told = f"T; several: one training for each (default: {STEPS['small']} at small scale, {STEPS['full']} at full)"
    parser.add_argument("--steps", type=int, nargs="+", metavar="T", help=told)
    parser.add_argument("--batch", type=int, default=32, help="images per worker and step (default: %(default)s)")
    add_workers(parser)
    arguments = parse(parser, steps=AUDITED_STEPS, batch=1, workers=1)
    arguments.steps = arguments.steps or [STEPS[arguments.scale]]
    return arguments


@says_plainly
def main() -> None:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message="oversample")
    transport, workers = connect(arguments)
    train, test = with_bias(load_mnist(arguments.data_dir))
    settings = {"workers": count_of(workers), "batch": arguments.batch, "sketch": "7 x 40", "k": K, "P": 10}
    session = Session(arguments, "mnist", settings, transport)
    choices = product(arguments.recipes, arguments.steps, range(arguments.seeds), METHODS)
    for recipe, steps, seed, method in choices:
        task = Task(RECIPES[recipe], method, train, test, steps, arguments.batch, seed)
        labels = {"recipe": recipe, "method": method, "seed": seed}
        session.run(labels, partial(make_training, task, workers), steps, logarithmic(steps))
    for problem in {RECIPES[recipe].problem.name: RECIPES[recipe].problem for recipe in arguments.recipes}.values():
        labels = {"problem": problem.name, "method": "l-bfgs"}
        if transport.rank == 0 and not session.find(labels):
            session.add(labels, **lowest_loss(problem, train, LBFGS_ITERATIONS[arguments.scale]))


if __name__ == "__main__":
    main()
