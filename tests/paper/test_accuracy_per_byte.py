"""Accuracy per byte: methods meet their bytes, runs are real exchanges, and a search is done once, at the best rate."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy_per_byte import records, report, search
from benchmarks.accuracy_per_byte.methods import METHODS, place_of
from benchmarks.accuracy_per_byte.plans import groups_at, targets
from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.accuracy_per_byte.schedule import known_ratio, run_all
from benchmarks.accuracy_per_byte.steps import Training, optimizer_for, rate_at, set_rate
from benchmarks.accuracy_per_byte.subjects import TEXT
from benchmarks.accuracy_per_byte.tasks import TASKS, initial_model, load
from benchmarks.accuracy_per_byte.training import train
from benchmarks.methods.top_k import CodedTopK
from hvd_sketch import LowRankConfig, Simulation, SketchConfig, recommended
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.transport import run_local
from tests.support.paper import write_mnist

SENT = [
    name for name, m in METHODS.items() if m.is_sent and not m.fixed_ratio and (not m.is_for_text or name == "demo")
]
WORKERS, STEPS = 4, 24


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    write_mnist(folder / "mnist")
    return folder


def group_of(method: str, ratio: float = 150.0, steps: int = STEPS) -> Group:
    return Group("mnist", WORKERS, False, steps, method, ratio)


@pytest.mark.parametrize("method", SENT)
def test_a_method_meets_the_ratio_by_its_ledger(method: str, data_dir: Path) -> None:
    record = train(Run(group_of(method), 0.1, 0), data_dir)
    assert record["matrix_ratio"] == pytest.approx(150, rel=0.05)
    assert not record["diverged"] and 0 <= record["acc"] <= 100
    share = record["compression_ratio"] / record["matrix_ratio"]
    assert share == 1 if METHODS[method].takes_all else 0.7 < share < 0.85  # 522 biases beside 268,800 elements


WINNERS = [
    ("mnist", 150.0, 4, "sgd", "lowrank4", 150.0),
    ("cifar", 60.0, 4, "sgd", "lowrank4", 60.0),
    ("cifar", 150.0, 4, "sgd", "lowrank4", 150.0),
    ("cifar", 150.0, 16, "sgd", "lowrank4", 150.0),
    ("cifar2m", 1000.0, 4, "sgd", "lowrank4", 1000.0),
    ("lm", 60.0, 4, "adam", "lowrank4", 60.0),
    ("lm", 60.0, 4, "muon", "lowrank4-muon", 60.0),
    ("lm", 60.0, 4, "signsgd", "random4-sign", 35.9),
    ("wikitext", 60.0, 4, "adamw", "lowrank4", 60.0),
]  # of the tables: task, ratio of what is compressed, ranks, optimizer, method, ratio of the whole model


@pytest.mark.parametrize(("task", "ratio", "ranks", "optimizer", "method", "of_all"), WINNERS)
def test_recommended_is_what_wins_in_the_tables(
    task: str, ratio: float, ranks: int, optimizer: Any, method: str, of_all: float
) -> None:
    classes = {"lm": 65, "wikitext": 256}.get(task, 10)
    named = list(initial_model(TASKS[task], classes, 0).named_parameters())
    config = recommended(named, ratio, ranks, optimizer)
    of_table = METHODS[method].config(place_of(named, ranks, ratio, 0))
    if isinstance(config, LowRankConfig):
        assert replace(config, ratio=ratio) == of_table
    else:
        assert config == of_table
    simulation = Simulation(named, config, ranks)
    for rank in range(ranks):
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        simulation.accumulate(rank)
    simulation.agree()
    assert simulation.ledger.compression_ratio() == pytest.approx(of_all, rel=0.03)


def test_a_diverged_run_has_no_accuracy(data_dir: Path) -> None:
    record = train(Run(group_of("random4", steps=80), 1e4, 0), data_dir)
    assert record["diverged"] and record["acc"] is None and record["loss"] is None


def parameters_of_real_ranks(run: Run, data_dir: Path, steps: int) -> list[torch.Tensor]:
    """What rank 0 of as many threads has after some steps of the library's own exchange."""
    data, task, group = load("mnist", data_dir), TASKS["mnist"], run.group
    of_steps = list(islice(data.batches(WORKERS, task.batch(WORKERS), run.seed, group.skewed), steps))
    models = [initial_model(task, data.classes, run.seed) for _ in range(WORKERS)]
    place = place_of(list(models[0].named_parameters()), WORKERS, group.ratio, run.seed)
    config = METHODS[group.method].config(place)

    def rank_main(transport: Any) -> list[torch.Tensor]:
        model = models[transport.rank]
        optimizer = optimizer_for(task, model, group.method)
        deterministic = replace(config, deterministic=True) if config is not None else None
        exchange = GradientExchange(list(model.named_parameters()), deterministic, transport)
        for step, batches in enumerate(of_steps):
            optimizer.zero_grad()
            data.loss(model, batches[transport.rank]).backward()
            assert exchange.average()
            set_rate(optimizer, rate_at(run, step))
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    return run_local(WORKERS, rank_main)[0]


@pytest.mark.parametrize("method", ["lowrank4", "nominate4", "sketch4", "random4", "paper", "dense"])
def test_a_run_equals_real_ranks(method: str, data_dir: Path) -> None:
    steps, run = 5, Run(group_of(method), 0.1, 1)
    training = Training(run, load("mnist", data_dir))
    start = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(steps):
        assert training.step()
    for expected, parameter, before in zip(
        parameters_of_real_ranks(run, data_dir, steps), training.model.parameters(), start, strict=True
    ):
        assert torch.equal(expected, parameter.detach()) and not torch.equal(before, parameter.detach())


@pytest.mark.parametrize("method", ["powersgd32", "powersgd16", "local8", "truetopk"])
def test_a_competitor_trains_alike_every_time(method: str, data_dir: Path) -> None:
    trained = []
    for _ in range(2):
        training = Training(Run(group_of(method), 0.1, 0), load("mnist", data_dir))
        for _ in range(3):
            assert training.step()
        trained.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    assert torch.equal(*trained)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_coded_local_top_k_sends_or_keeps_everything(bits: int) -> None:
    dim, k = 3000, 50
    config = SketchConfig(k=k, value_bits=bits, candidates="random")
    drawn = torch.randn(WORKERS, dim, generator=torch.Generator().manual_seed(1)) ** 3

    def rank_main(transport: Any) -> tuple[torch.Tensor, torch.Tensor]:
        exchange = CodedTopK(config, dim, transport)
        update = exchange.step(drawn[transport.rank])
        return update.values, exchange.residual

    ranks = run_local(WORKERS, rank_main)
    assert all(torch.equal(update, ranks[0][0]) for update, _ in ranks)
    kept = sum(residual for _, residual in ranks)
    assert torch.allclose(kept + WORKERS * ranks[0][0], drawn.sum(0), atol=1e-4)
    assert k <= int(ranks[0][0].count_nonzero()) <= WORKERS * k


def record_of(run: Run, acc: float | None) -> Record:
    traffic = {"matrix_ratio": run.group.ratio, "compression_ratio": 100.0, "wire_bytes_per_step": 1000.0}
    result = {"acc": acc, "loss": None if acc is None else 1.0, "diverged": acc is None, "nominal_ratio": 1.0}
    return {**run.labels, **result, **traffic, "seconds": 0.1, "gradient_s": 0.1}


def best_at(peak: float, run: Run) -> Record:
    """Accuracy falls off on both sides of a rate; twice above it the run diverges."""
    return record_of(run, None if run.rate > 2 * peak else 90 - abs(run.rate - peak) + run.seed)


def trained_to_the_end(peak: float, seeds: int, finer: bool = False) -> list[Run]:
    """All runs of a search, in order."""
    group, done = group_of("nominate4"), dict[Run, Record]()
    while new := search.wanted(group, 0.2, seeds, done, finer):
        done[new[0]] = best_at(peak, new[0])
    return list(done)


@pytest.mark.parametrize(
    ("peak", "rates"),
    [
        (0.2, [0.2, 0.1, 0.4]),
        (0.8, [0.2, 0.1, 0.4, 0.8, 1.6]),
        (0.05, [0.2, 0.1, 0.4, 0.05, 0.025]),
        (0.01, [0.2, 0.1, 0.4, 0.05, 0.025, 0.0125, 0.00625]),
    ],
)
def test_the_grid_grows_until_its_best_is_inside(peak: float, rates: list[float]) -> None:
    done = trained_to_the_end(peak, seeds=3)
    assert [run.rate for run in done if run.seed == 0] == rates
    assert [run.seed for run in done[-2:]] == [1, 2] and len({run.rate for run in done[-2:]}) == 1
    assert done[-1].rate == min(rates, key=lambda rate: abs(rate - peak))


def test_a_grid_does_not_grow_for_ever() -> None:
    assert sum(run.seed == 0 for run in trained_to_the_end(1e-9, seeds=1)) == search.MOST_RATES


@pytest.mark.parametrize(
    ("peak", "rates"),
    [
        (0.2, [0.2, 0.1, 0.4, 0.141, 0.283]),
        (0.28, [0.2, 0.1, 0.4, 0.141, 0.283]),  # 0.283 / 1.41 was tried: it is 0.2
        (0.56, [0.2, 0.1, 0.4, 0.8, 0.283, 0.566]),
    ],
)
def test_a_finer_grid_has_rates_beside_the_best(peak: float, rates: list[float]) -> None:
    done = trained_to_the_end(peak, seeds=2, finer=True)
    assert [run.rate for run in done if run.seed == 0] == rates
    assert (done[-1].rate, done[-1].seed) == (min(rates, key=lambda rate: abs(rate - peak)), 1)


def quick(run: Run, data_dir: Path, nominal_ratio: float | None) -> Record:
    return best_at(0.4, run)


def refuse(run: Run, data_dir: Path, nominal_ratio: float | None) -> Record:
    raise AssertionError(f"{run} was done before")


def only_dense(run: Run, data_dir: Path, nominal_ratio: float | None) -> Record:
    if run.group.method != "dense":
        raise ValueError("the highest ratio possible is 49")
    return best_at(0.2, run)


def test_a_ratio_that_a_method_cannot_meet_is_told_and_others_go_on(tmp_path: Path) -> None:
    told = list[str]()
    groups = groups_at([("mnist", 4, False, 400, 150.0)], ["lowrank4", "dense"])
    run_all(groups, 1, tmp_path, tmp_path / "runs.jsonl", processes=1, tell=told.append, train=only_dense)
    assert ["the highest ratio possible is 49" in line for line in told] == [True] * 3 + [False] * 3
    assert {run.group.method for run in records.read(tmp_path / "runs.jsonl")} == {"dense"}


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path) -> None:
    path, told = tmp_path / "deep" / "runs.jsonl", list[str]()
    groups = groups_at([("mnist", 4, False, 400, 150.0)], ["nominate4", "dense"])
    run_all(groups, 2, tmp_path, path, processes=1, tell=told.append, train=quick)
    whole = records.read(path)
    assert len(told) == len(whole) == 4 + 1 + 4 + 1
    assert all(record["commit"] for record in whole.values())
    run_all(groups, 2, tmp_path, path, processes=1, tell=told.append, train=refuse)
    text = path.read_text()
    path.write_text(text[:-10])  # a crash while the last run was being written
    assert len(records.read(path)) == len(whole) - 1
    run_all(groups, 2, tmp_path, path, processes=1, tell=told.append, train=quick)
    assert records.read(path).keys() == whole.keys() and len(told) == len(whole) + 1
    run_all(groups, 3, tmp_path, path, processes=1, minutes=0, tell=told.append, train=refuse)


@pytest.mark.parametrize(("method", "later"), [("nominate4", 142 * 150 / 140), ("lowrank4", 142)])
def test_bytes_are_set_right_by_the_first_whole_run(method: str, later: float) -> None:
    (group,), done = groups_at([("mnist", 4, False, 400, 150.0)], [method]), dict[Run, Record]()
    first, *others = search.wanted(group, 0.2, 1, done)
    assert known_ratio(first, done) is None
    done[first] = {**best_at(0.2, first), "nominal_ratio": 142.0, "matrix_ratio": 140.0}
    for run in others:
        assert known_ratio(run, done) == pytest.approx(later, rel=0.005)
        done[run] = {**best_at(0.2, run), "nominal_ratio": later, "matrix_ratio": 150.0}
    done[first] = {**done[first], "diverged": True}
    assert known_ratio(others[0], done) == 142


def test_the_table_has_the_best_rate_and_the_spread_of_its_seeds(tmp_path: Path) -> None:
    runs = [*trained_to_the_end(0.4, seeds=3), Run(group_of("dense", 1.0), 0.2, 0)]
    made = {run: best_at(0.4, run) for run in runs}
    text = report.write(made, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1][:4] == ["nominated, 4 bit", "91.00 % (90.00–92.00)", "0.4", "3"]
    assert rows[2][0] == "dense" and "edge" in rows[2][2]
    assert (tmp_path / "README.md").read_text() == text and (tmp_path / "mnist.png").stat().st_size > 5000


def test_a_table_has_every_exchange_into_every_optimizer(tmp_path: Path) -> None:
    def losing(method: str, rate: float, loss: float) -> tuple[Run, Record]:
        run = Run(Group("lm", 4, False, 300, method, METHODS[method].fixed_ratio or 60.0), rate, 0)
        return run, {**best_at(rate, run), "acc": None, "loss": loss}

    made = dict(losing("nominate4-muon", rate, loss) for rate, loss in ((0.1, 2.5), (0.2, 2.25), (0.4, 2.75)))
    made |= dict([losing("dense", 0.2, 2.0), losing("sketch4-lion", 0.2, 3.0)])
    text = report.write(made, tmp_path, TEXT)
    assert "| into | dense | low rank, 4 bit | nominated, 4 bit | sketch, 4 bit | random, 4 bit |" in text
    assert "| Muon beside AdamW | | | 2.250 (0.2) | | |" in text
    assert "| Lion | | | | 3.000 (0.2, edge of the grid) | |" in text
    assert "| nominated, 4 bit, Muon |" not in text, "only in the table of pairs"
    without = report.write({run: record for run, record in made.items() if run.group.method == "dense"}, tmp_path, TEXT)
    assert "| into |" not in without


def test_the_plan_begins_with_what_matters_most() -> None:
    groups = targets()
    first = groups[:7]
    assert {(group.task, group.steps) for group in first} == {("mnist", 400)}
    assert {group.method for group in first} > {"lowrank4", "nominate4", "sketch4", "random4", "dense"}
    assert json.loads(json.dumps(Run(first[0], 0.1, 0).labels)) == Run(first[0], 0.1, 0).labels
    assert len(set(groups)) == len(groups)
    others = ("lowrank8", "local32", "paper", "powersgd16", "powersgd32", "truetopk")
    places = [("mnist", 400), ("cifar", 300), ("cifar2m", 400)]
    after_beginning = [(group.task, group.steps, group.method) for group in groups[28:46]]
    assert after_beginning == [(*place, method) for place in places for method in others]
