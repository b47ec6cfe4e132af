"""The ablations: every variant as few lines of torch, groups at equal bytes, the search, resumption, real ranks."""

from __future__ import annotations

import io
import sys
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.image_data import load_images
from benchmarks.paper import make_figures
from benchmarks.paper.ablation_settings import GROUPS, NO_MOMENTUM, OVERSAMPLE, Budget, Setting
from benchmarks.paper.ablations import Bench
from benchmarks.paper.experiment import INTERRUPTED
from benchmarks.paper.model_exchange import SimulatedModelExchange
from benchmarks.paper.rate_search import Search, search_rates
from benchmarks.paper.variants import PAPER, Variant
from hvd_sketch import CountSketch, SketchConfig, local_transports
from tests.support.harness import run_command
from tests.support.paper import interrupt, runs, write_mnist
from tests.support.plain import from_the_edge

DIM, WORKERS, STEPS = 1013, 4, 4
CONFIG = SketchConfig.paper(rows=3, cols=160, k=40, oversample=3, momentum=0.9, seed=5)
BUDGETS = [Budget(198_800, 4), Budget(300_000, 2), Budget(1_000_000, 8)]


def gradients(step: int, dim: int = DIM) -> Tensor:
    """Float32 [workers, dim], heavy-tailed."""
    values = np.random.default_rng([6, step]).standard_normal((WORKERS, dim)) ** 3
    return torch.from_numpy(values.astype(np.float32))


def simulated(config: SketchConfig, variant: Variant, method: str = "sketched", dim: int = DIM) -> list[Tensor]:
    """The updates of some steps, float32 [dim] each."""
    parameter = nn.Parameter(torch.zeros(dim))
    exchange = exchange_of(Setting(config, variant, method), [("w", parameter)], WORKERS, config.seed)
    updates = []
    for step in range(STEPS):
        for worker, gradient in enumerate(gradients(step, dim)):
            parameter.grad = gradient.clone()
            exchange.accumulate(worker)
        exchange.agree()
        updates.append(parameter.grad.clone())
    return updates


def exchange_of(setting: Setting, named: list[tuple[str, Tensor]], workers: int, seed: int) -> SimulatedModelExchange:
    config = replace(setting.library_config(seed), dense_below=0)
    return SimulatedModelExchange(setting.method, named, config, workers, setting.variant)


def plain(config: SketchConfig, variant: Variant) -> list[Tensor]:
    """The same, written out."""
    u, v, late = torch.zeros(WORKERS, DIM), torch.zeros(WORKERS, DIM), torch.zeros(DIM)
    updates = []
    for step in range(STEPS):
        u = u * (config.momentum if variant.momentum == "before" else 0) + gradients(step)
        v = v + u
        shape = (DIM, config.rows, config.cols, config.seed, step if variant.fresh_hashes else 0, WORKERS)
        summed = CountSketch(*shape, backend="reference")
        for own in v:
            table = CountSketch(*shape, backend="reference").accumulate_(own).table
            summed.table += table.to(getattr(torch, variant.table_dtype))
        is_topk = config.candidates == "sketch"
        if is_topk:
            found = torch.tensor(from_the_edge(summed.estimate().tolist(), config.oversample * config.k))
        else:
            found = summed.heavymix(config.k, config.seed)
        exact = v[0, found] + v[1, found] + v[2, found] + v[3, found]
        largest = exact.abs().topk(config.k).indices
        update = torch.zeros(DIM).index_copy_(0, found[largest], exact[largest] / WORKERS)
        v[:, found[largest]] = 0
        if variant.masking:
            u[:, found[largest]] = 0
        late = late * config.momentum + update
        updates.append(late if variant.momentum == "after" else update)
    return updates


VARIANTS = [
    PAPER,
    NO_MOMENTUM,
    Variant(momentum="after"),
    Variant(masking=False),
    Variant(fresh_hashes=False),
    Variant(table_dtype="float16"),
    Variant(table_dtype="bfloat16"),
    Variant(fresh_hashes=False, masking=False, table_dtype="bfloat16"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rows", [3, 4])
def test_variants_are_what_they_say(variant: Variant, rows: int) -> None:
    config = replace(CONFIG, rows=rows)
    for ours, expected in zip(simulated(config, variant), plain(config, variant), strict=True):
        assert torch.equal(ours, expected)


def test_heavymix_is_what_it_says() -> None:
    config = replace(CONFIG, candidates="heavymix")
    for ours, expected in zip(simulated(config, NO_MOMENTUM), plain(config, NO_MOMENTUM), strict=True):
        assert torch.equal(ours, expected) and ours.count_nonzero() == config.k


def test_at_k_equal_to_d_masking_cancels_momentum() -> None:
    """Masked it is SGD without momentum; not masked it is momentum SGD; both as the dense exchange has them."""
    everything = replace(CONFIG, k=DIM)
    plain_sgd = simulated(CONFIG, NO_MOMENTUM, "dense")
    momentum_sgd = simulated(CONFIG, PAPER, "dense")
    for masked, expected in zip(simulated(everything, PAPER), plain_sgd, strict=True):
        assert torch.equal(masked, expected)
    for unmasked, expected in zip(simulated(everything, Variant(masking=False)), momentum_sgd, strict=True):
        assert torch.allclose(unmasked, expected, atol=1e-4)
    assert not torch.allclose(plain_sgd[1], momentum_sgd[1], atol=1e-2)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_groups_vary_one_thing_at_equal_floats(budget: Budget) -> None:
    base = budget.base()
    floats = base.config.paper_floats(budget.dim)
    assert abs(base.config.paper_compression_ratio(budget.dim) / 40 - 1) < 0.2
    assert base.config.oversample == OVERSAMPLE and base.variant == NO_MOMENTUM
    for group in (budget.rows(), budget.share(), budget.hashes(), budget.momentum()):
        assert {setting.config.paper_floats(budget.dim) for setting in group.values()} == {floats}
        assert base.name in {setting.name for setting in group.values()} and len(group) > 2
    for setting in budget.rows().values():
        assert setting.config.rows * setting.config.cols == budget.table
        assert setting.config.cols % budget.workers == 0  # nothing of the table is left unused
    for group in (budget.hashes(), budget.momentum()):
        assert {setting.config for setting in group.values()} == {base.config}


def sent_bytes(setting: Setting, budget: Budget) -> Counter[str]:
    """What one rank sends in three steps as the exchange records it, by phase, once thresholds are predicted."""
    parameter = nn.Parameter(torch.zeros(budget.dim))
    exchange = exchange_of(setting, [("w", parameter)], budget.workers, 0)
    exchange.ledger.records = deque()
    for step in range(8):
        if step == 5:
            exchange.ledger.records.clear()
        for worker in range(budget.workers):
            values = np.random.default_rng([step, worker]).standard_normal(budget.dim) ** 3
            parameter.grad = torch.from_numpy(values.astype(np.float32))
            exchange.accumulate(worker)
        exchange.agree()
    sent: Counter[str] = Counter()
    for record in exchange.ledger.records:
        sent[record.phase] += record.wire_bytes
    return sent


@pytest.mark.parametrize("group", ["share_of_bytes", "heavymix"])
def test_groups_at_equal_bytes(group: str) -> None:
    """All that is sent: indices and histograms, too."""
    budget = BUDGETS[0]
    sent = {label: sent_bytes(setting, budget) for label, setting in GROUPS[group](budget).items()}
    base = sent["top-Pk" if group == "heavymix" else f"P {OVERSAMPLE}"].total()
    assert len(sent) > 2 and all(abs(phases.total() / base - 1) < 0.05 for phases in sent.values()), sent


def test_tables_of_16_bits_at_equal_bytes() -> None:
    budget = BUDGETS[0]
    tables = {label: sent_bytes(setting, budget)["sketch"] for label, setting in budget.wire().items()}
    assert tables["float32"] == 3 * 4 * budget.table * (budget.workers - 1) / budget.workers
    for name in ("float16", "bfloat16"):
        assert tables[f"{name}, same bytes"] == tables["float32"] == 2 * tables[f"{name}, same size"]


def test_k_reaches_d() -> None:
    for budget in BUDGETS:
        group = budget.k_to_d()
        for masking in (True, False):
            ks = [setting.config.k for setting in group.values() if setting.variant.masking is masking]
            assert ks == sorted(ks) and ks[-1] == budget.dim and budget.k in ks and len(ks) >= 4


def test_names_are_as_different_as_settings() -> None:
    settings = [setting for make in GROUPS.values() for setting in make(BUDGETS[0]).values()]
    assert len({setting.name for setting in settings}) == len(set(settings))
    real = {setting.name for setting in settings if setting.is_real}
    assert BUDGETS[0].base().name in real and len(real) < len(set(settings))


@pytest.mark.parametrize("best", [0.01, 0.05, 0.3, 0.9, 10.0])
def test_the_search_finds_the_best_rate(best: float) -> None:
    """However far from the first rates; and none that was tried is better."""
    asked: list[float] = []

    def loss_at(rate: float) -> float:
        asked.append(rate)
        return abs(np.log(rate / best)) if rate < 4 * best else 100.0

    found = search_rates((0.2, 0.4, 0.8), loss_at, 6)
    assert found.losses[found.best] == min(found.losses.values()) and not found.at_edge
    assert abs(np.log2(found.best / best)) < 0.26  # half a step of the refined grid
    assert len(asked) == len(set(asked)) == len(found.losses)


def test_the_search_says_when_it_stopped_at_an_edge() -> None:
    found = search_rates((0.1, 0.2), lambda rate: 1 / rate, 1)
    assert sorted(found.losses) == [0.1, 0.2, 0.283, 0.4, 0.566] and found.best == 0.566 and found.at_edge
    assert Search({0.2: 1.0, 0.1: 1.0, 0.4: 2.0}).best == 0.1


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def bench(data_dir: Path, steps: int) -> Bench:
    return Bench(load_images(data_dir), "mlp", 16, 8, steps, 1, WORKERS, local_transports(1)[0], None)


def test_going_on_from_a_checkpoint_gives_the_same_figures(data_dir: Path) -> None:
    own = bench(data_dir, 6)
    setting = own.budget().base().with_variant(momentum="after", table_dtype="bfloat16")
    whole, first, second = (own.training(setting, 0.4, seed=1) for _ in range(3))
    losses = [whole.step() for _ in range(6)]
    assert losses[:3] == [first.step() for _ in range(3)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    assert losses[3:] == [second.step() for _ in range(3)]
    assert whole.measure() == second.measure() and whole.traffic() == second.traffic()
    assert "test_error" in whole.measure() and "test_error" not in first.measure()


def test_a_training_that_diverges_keeps_its_weights(data_dir: Path) -> None:
    own = bench(data_dir, 12)
    training = own.training(own.budget().base(), 1e30, seed=0)
    losses = [training.step() for _ in range(12)]
    measured = training.measure()
    assert measured["diverged"] and measured["train_loss"] == losses[-1] == 100.0
    assert np.isfinite(losses).all()


def command(data_dir: Path, results: Path, *more: str) -> list[str]:
    common = ["--data-dir", str(data_dir), "--seeds", "1", "--json", str(results), "--hidden", "16", "--batch", "8"]
    return [sys.executable, "-m", "benchmarks.paper.ablations", *common, *more]


@pytest.mark.multiprocess
def test_real_ranks_equal_the_simulation(data_dir: Path, tmp_path: Path) -> None:
    """Four ranks under mpirun: dense and sketched, k up to d, the loss after every step, and the bytes."""
    simulation, real = tmp_path / "simulation.json", tmp_path / "real.json"
    asked = ["--steps", "6", "--groups", "baselines", "rows", "k", "--rates", "0.2"]
    mpirun = ["launch/mpirun.sh", "-n", str(WORKERS), "--"]
    for line in (
        command(data_dir, simulation, *asked),
        [*mpirun, *command(data_dir, real, *asked, "--transport", "mpi")],
    ):
        status, output = run_command(line, timeout_s=120)
        assert status == 0, output
    trained = [run for run in runs(real) if "curve" in run]
    assert len(trained) > 12 and all(run in runs(simulation) for run in trained)
    assert all([point["step"] for point in run["curve"]] == [1, 2, 3, 4, 5, 6] for run in trained)
    assert len({run["final"]["train_loss"] for run in trained}) > 12
    check_figure(runs(simulation), tmp_path / "ablations_mnist.png")


def check_figure(found: list[dict[str, Any]], path: Path) -> None:
    """A line for every setting of every group, also of two calls that overlap; and a figure."""
    lines = make_figures.DRAW[path.stem](found + found[:5], path).splitlines()
    assert all(line.endswith("| 1 |") for line in lines[2:])
    assert len(lines) == 2 + sum("group" in run for run in found)
    assert len({line.count("|") for line in lines}) == 1
    assert path.stat().st_size > 10_000


@pytest.mark.multiprocess
def test_an_interrupted_search_goes_on_to_the_same_figures(data_dir: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of a grid."""
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    asked = ["--steps", "10", "--groups", "heavymix"]
    status, output = run_command(command(data_dir, whole, *asked), timeout_s=120)
    assert status == 0, output
    log = broken.with_suffix(".log.jsonl")
    assert interrupt(command(data_dir, broken, *asked), log, "heavymix") == INTERRUPTED
    assert 3 < len(runs(broken)) < len(runs(whole))
    status, output = run_command(command(data_dir, broken, *asked, "--resume"), timeout_s=120)
    assert status == 0, output
    assert runs(broken) == runs(whole)
    check_best_rates(runs(whole))


def check_best_rates(found: list[dict[str, Any]]) -> None:
    """What is reported as best has the lowest loss of all trainings of the setting."""
    for summary in (run for run in found if "group" in run):
        losses = {
            run["rate"]: run["final"]["train_loss"]
            for run in found
            if run.get("rate") and run["setting"] == summary["setting"]
        }
        assert losses[summary["best_rate"]] == min(losses.values())
        assert {float(rate): loss for rate, loss in summary["loss_by_rate"].items()} == losses
