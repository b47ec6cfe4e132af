"""The MNIST experiment: its simulation equals real ranks to the bit, and an interruption changes no figure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.paper import mnist_figure
from benchmarks.paper.experiment import INTERRUPTED, checkpoint_path
from benchmarks.paper.linear_models import (
    CLASSES,
    LOGISTIC,
    SVM,
    Labelled,
    Problem,
    gradient,
    judge,
    lowest_loss,
    smoothed_hinge,
)
from benchmarks.paper.mnist import BETA, DIM, RECIPES, RHO, XI, XI_MU, K, Task, simulated_training
from benchmarks.paper.simulation import RealExchanges, SimulatedAllreduce, SimulatedMean
from hvd_sketch import CountSketch, DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.transport import run_local
from tests.support.harness import run_command
from tests.support.paper import interrupt, runs, write_mnist
from tests.support.plain import from_the_edge

PROBLEMS = 3
CONFIGS: list[dict[str, Any]] = [
    {"rows": 7, "cols": 40, "k": 10, "oversample": 10, "candidates": "heavymix", "momentum": 0.0},
    {"rows": 7, "cols": 40, "k": 10, "oversample": 10, "momentum": 0.9},
    {"rows": 4, "cols": 61, "k": 30, "oversample": 2, "momentum": 0.0, "seed": 3},
    {"rows": 1, "cols": 12, "k": 40, "candidates": "heavymix", "momentum": 0.5},
]


def gradients(step: int, workers: int, dim: int) -> torch.Tensor:
    """Float32 [workers, PROBLEMS, dim]: heavy-tailed; few whole numbers, with ties and zeros; and nearly all zero."""
    draw = np.random.default_rng([9, step])
    values = draw.standard_normal((workers, PROBLEMS, dim)) ** 3
    values[:, 1] = values[:, 1].round().clip(-2, 2)
    values[:, 2] *= np.arange(dim) < 4
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("settings", CONFIGS)
def test_the_simulation_equals_real_exchanges(settings: dict[str, Any], workers: int) -> None:
    dim, steps = 201, 6
    config = SketchConfig.paper(deterministic=True, **settings)
    simulated = SimulatedAllreduce(config, dim, workers, PROBLEMS)

    def real(transport):
        exchanges = RealExchanges(lambda ledger: SketchedAllreduce(config, dim, transport, ledger=ledger), PROBLEMS)
        return [exchanges.step(gradients(s, workers, dim)[transport.rank][None]) for s in range(steps)]

    expected = run_local(workers, real)[0]
    for step in range(steps):
        assert torch.equal(simulated.step(gradients(step, workers, dim)), expected[step]), step
        assert expected[step].any(dim=1).all()


def test_the_simulated_mean_equals_real_exchanges() -> None:
    workers, dim = 4, 201
    config = SketchConfig.paper(cols=4, k=1, momentum=0.9, deterministic=True)
    simulated = SimulatedMean(0.9, dim, PROBLEMS)

    def real(transport):
        exchanges = RealExchanges(lambda ledger: DenseAllreduce(config, dim, transport, ledger=ledger), PROBLEMS)
        return [exchanges.step(gradients(s, workers, dim)[transport.rank][None]) for s in range(4)]

    for step, expected in enumerate(run_local(workers, real)[0]):
        assert torch.equal(simulated.step(gradients(step, workers, dim)), expected)


def small_set(images: int = 64, dim: int = 20) -> Labelled:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (images,), generator=draw)
    return Labelled(torch.randn(images, dim, generator=draw) + labels[:, None] * 0.1, labels)


@pytest.mark.parametrize("problem", [LOGISTIC, SVM, smoothed_hinge(0.1)], ids=lambda p: p.name)
def test_gradients_are_those_of_the_objective(problem) -> None:
    data = small_set()
    weights = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(2)).requires_grad_()
    objective = problem.loss(data.targets() * (data.images @ weights.T)).mean(0).sum()
    (objective + problem.l2 / 2 * weights.square().sum()).backward()
    with torch.no_grad():
        computed, loss = gradient(problem, weights, data)
    assert torch.allclose(computed, weights.grad, atol=1e-6)
    assert loss == pytest.approx(judge(problem, weights.detach(), data)[0], rel=1e-5)


@pytest.mark.parametrize("problem", [LOGISTIC, SVM], ids=lambda p: p.name)
def test_lowest_loss_lies_below_what_training_reaches(problem) -> None:
    data = small_set(400)
    found = lowest_loss(problem, data, 100)
    weights = torch.zeros(CLASSES, 20)
    for step in range(3000):
        weights -= gradient(problem, weights, data)[0] / math.sqrt(step + 10)
    reached = judge(problem, weights, data)[0]
    assert found["least"] <= reached + 1e-6 and found["least"] <= found["reached"] + 1e-6
    assert reached - found["least"] < 0.01


def test_the_rate_satisfies_theorem_1() -> None:
    assert BETA > 4 and XI > 1 + (1 + BETA) / (K / DIM * (1 + RHO)) >= XI - 1
    assert RECIPES["logistic-alg2"].rate(0, 100) == 1 / XI
    assert RECIPES["logistic-alg2-mu"].rate(0, 100) <= 1 / ((DIM + 1) / 4)


@pytest.mark.parametrize("method", ["vanilla", "sketched"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_algorithm_of_the_paper(name: str, method: str) -> None:
    """The rates, the weights of the average, and Alg. 2 and 3 themselves, written out without the exchange."""
    train, workers, steps, horizon = small_set(200, DIM), 2, 6, 500
    task = Task(RECIPES[name], method, train, train, horizon, 8, seed=3)
    training = simulated_training(task, workers)
    exact = method == "vanilla"
    written_out = alg3 if name.endswith("alg3") else alg2
    problem = SVM if name.startswith("svm") else LOGISTIC
    batches = [[batch_of(train, 3, t, worker) for worker in range(workers)] for t in range(steps)]
    rates_and_weights = {
        "logistic-alg2": [(1 / (t + 304), (t + 304) ** 2) for t in range(steps)],
        "logistic-alg2-mu": [(1 / (0.01 * (t + XI_MU)), (t + XI_MU) ** 2) for t in range(steps)],
        "svm-alg2": [(1 / math.sqrt(horizon + 1), 1)] * steps,
    }.get(name, [(0.001, 0)] * steps)
    last, judged = written_out(problem, batches, rates_and_weights, exact)
    for _ in range(steps):
        training.step()
    assert torch.allclose(training.weights, last, rtol=1e-4, atol=1e-7) and bool(last.any())
    assert training.measure()["train_loss"] == pytest.approx(judge(problem, judged, train)[0], rel=1e-5)


Batches = list[list[Labelled]]  # of every step, of every worker
RatesAndWeights = list[tuple[float, float]]  # eta_t and q_t of every step


def batch_of(train: Labelled, seed: int, step: int, worker: int) -> Labelled:
    return train.select(torch.from_numpy(np.random.default_rng([seed, step, worker]).integers(0, len(train.labels), 8)))


def alg2(problem: Problem, batches: Batches, planned: RatesAndWeights, exact: bool) -> tuple[Tensor, Tensor]:
    """The last iterate, and the average with weights q_t / Q_T; without a sketch everything is sent."""
    weights, average = torch.zeros(CLASSES, DIM), torch.zeros(CLASSES, DIM)
    errors = [torch.zeros(CLASSES, DIM) for _ in batches[0]]
    for step, (batch, (rate, weight)) in enumerate(zip(batches, planned, strict=True)):
        average += weight * weights
        corrected = [rate * gradient(problem, weights, own)[0] + a for own, a in zip(batch, errors, strict=True)]
        sent = torch.full((CLASSES, DIM), exact)
        if not exact:
            for total, mask in zip(sum(corrected), sent, strict=True):
                table = CountSketch(DIM, 7, 40, 3, step, shards=len(batch)).accumulate_(total)
                mask[table.heavymix(10, 3)] = True
        errors = [torch.where(sent, 0, own) for own in corrected]
        weights = weights - torch.where(sent, sum(corrected) / len(batch), 0)
    return weights, average / sum(weight for _, weight in planned)


def alg3(problem: Problem, batches: Batches, planned: RatesAndWeights, exact: bool) -> tuple[Tensor, Tensor]:
    """The last iterate, twice: nothing is averaged."""
    weights = torch.zeros(CLASSES, DIM)
    u, v = ([torch.zeros(CLASSES, DIM) for _ in batches[0]] for _ in range(2))
    for step, (batch, (rate, _)) in enumerate(zip(batches, planned, strict=True)):
        for worker, own in enumerate(batch):
            u[worker] = 0.9 * u[worker] + gradient(problem, weights, own)[0]
            v[worker] = u[worker] if exact else v[worker] + u[worker]
        update = sum(v)
        if not exact:
            for total, *kept in zip(update, *u, *v, strict=True):
                table = CountSketch(DIM, 7, 40, 3, step, shards=len(batch)).accumulate_(total)
                likely = torch.tensor(from_the_edge(table.estimate().tolist(), 10 * 10))
                chosen = likely[total[likely].abs().topk(10).indices]
                rest = torch.ones(DIM, dtype=torch.bool).index_fill_(0, chosen, False)
                total[rest] = 0
                for own in kept:
                    own[chosen] = 0
        weights = weights - rate * update / len(batch)
    return weights, weights


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def command(data_dir: Path, figures: Path, *more: str) -> list[str]:
    common = ["--data-dir", str(data_dir), "--seeds", "1", "--json", str(figures)]
    return [sys.executable, "-m", "benchmarks.paper.mnist", *common, *more]


@pytest.mark.multiprocess
def test_real_ranks_equal_the_simulation(data_dir: Path, tmp_path: Path) -> None:
    """Four ranks under mpirun: every loss and error at every point, and the bytes."""
    simulated, real = tmp_path / "simulated.json", tmp_path / "real.json"
    recipes = ["--steps", "10", "--recipes", "logistic-alg2", "svm-alg3"]
    for line in (
        command(data_dir, simulated, *recipes),
        ["launch/mpirun.sh", "-n", "4", "--", *command(data_dir, real, *recipes, "--transport", "mpi")],
    ):
        status, output = run_command(line, timeout_s=120)
        assert status == 0, output
    trained = [run for run in runs(real) if "curve" in run]
    assert len(trained) == 4 and trained == [run for run in runs(simulated) if "curve" in run]
    assert trained[0]["curve"][0]["train_loss"] > 1.2 * trained[0]["final"]["train_loss"]
    lines = mnist_figure.draw(json.loads(real.read_text())["runs"], tmp_path / "figure.png").splitlines()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    error = trained[0]["final"]["train_error"]
    assert len(lines) == 2 + 2 * 3 and lines[2].startswith(f"| logistic-alg2 | vanilla | {100 * error:.3g} %")


@pytest.mark.multiprocess
def test_resuming_after_ctrl_c_gives_the_same_figures(data_dir: Path, tmp_path: Path) -> None:
    """Interrupted in the second of two runs, with a momentum and a residual."""
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    recipe = ["--steps", "400", "--recipes", "logistic-alg3"]
    status, output = run_command(command(data_dir, whole, *recipe), timeout_s=120)
    assert status == 0, output
    assert interrupt(command(data_dir, broken, *recipe), broken.with_suffix(".log.jsonl"), '"sketched"') == INTERRUPTED
    assert len(runs(broken)) == 1
    events = [json.loads(line) for line in broken.with_suffix(".log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "interrupted" and 0 < events[-1]["step"] < 400
    status, output = run_command(command(data_dir, broken, *recipe, "--batch", "8", "--resume"), timeout_s=120)
    assert status != 0 and "--resume" in output and "repeat the arguments" in output
    status, output = run_command(command(data_dir, broken, *recipe, "--resume"), timeout_s=120)
    assert status == 0, output
    assert runs(broken) == runs(whole)
    assert not list(tmp_path.glob("*.checkpoint*"))


@pytest.mark.multiprocess
def test_real_ranks_resume_after_ctrl_c(data_dir: Path, tmp_path: Path) -> None:
    """mpirun hands it on as SIGTERM; every rank goes on from its own checkpoint."""
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    recipe = ["--steps", "120", "--recipes", "logistic-alg3", "--checkpoint-every", "20", "--transport", "mpi"]
    on_ranks = ["launch/mpirun.sh", "-n", "2", "--"]
    status, output = run_command([*on_ranks, *command(data_dir, whole, *recipe)], timeout_s=120)
    assert status == 0, output
    again = [*on_ranks, *command(data_dir, broken, *recipe)]
    assert interrupt(again, broken.with_suffix(".log.jsonl"), '"sketched"') != 0
    saved = [torch.load(checkpoint_path(broken, rank)) for rank in range(2)]
    assert len({one["done"] for one in saved}) == 1 and 0 < saved[0]["done"] < 120
    status, output = run_command([*again, "--resume"], timeout_s=120)
    assert status == 0, output
    assert runs(broken) == runs(whole)
    assert not list(tmp_path.glob("*.checkpoint*"))
