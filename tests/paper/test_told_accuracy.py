"""What documentation and warnings tell of accuracy is what the records in benchmarks/results say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest

from benchmarks.accuracy_per_byte import records, report, search
from benchmarks.accuracy_per_byte.__main__ import RESULTS
from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group
from benchmarks.accuracy_per_byte.tasks import TASKS
from hvd_sketch.model import shown
from tests.support.harness import ROOT

FINISHED = [
    *(
        ("mnist", ratio, 4, steps, skewed)
        for ratio, steps, skewed in (
            *((20, 400, False), (60, 400, False), (150, 400, False), (500, 400, False), (150, 400, True)),
            (150, 2000, False),
        )
    ),
    *(
        ("cifar", ratio, ranks, steps, skewed)
        for ratio, ranks, steps, skewed in (
            *((150, 4, 300, False), (150, 16, 300, False), (60, 4, 1500, False), (150, 4, 1500, False)),
            *((60, 4, 300, True), (150, 4, 300, True)),
        )
    ),
    ("cifar2m", 1000, 4, 400, False),
    *(("lm", 60, 4, steps, False) for steps in (300, 1500)),
    *((task, 60, 4, 300, False) for task in ("wikitext", "wikitext1m", "finetune")),
]  # tables whose searches are finished
SAME = 0.2  # per cent: less than seeds differ by
RULES = {
    "low rank | SGD with Nesterov momentum": "lowrank4",
    "nominated | SGD with Nesterov momentum": "nominate4",
    "sketched | SGD without momentum": "sketch4",
    "random | SGD without momentum": "random4",
    "low rank | Adam, AdamW": "lowrank4",
    "low rank | Muon": "lowrank4-muon",
    "nominated, with `ahead()` | `LagAdamW`": "nominate4-lag-ahead",
    "nominated | `LagAdamW`": "nominate4-lag",
    "sketched, `residual_decay=0.95` | `SignSGD`": "sketch4-sign",
    "random, `residual_decay=0.95` | `SignSGD`": "random4-sign",
}


def test_what_is_recommended_for_sgd_wins_but_where_the_documentation_says() -> None:
    best = report.best_runs(records.read(RESULTS))
    lost = []
    for task, ratio, ranks, steps, skewed in FINISHED:
        if TASKS[task].adam:
            continue
        place = [Group(task, ranks, skewed, steps, method, float(ratio)) for method in METHODS]
        means = {g.method: float(records.results_of(best[g]).mean()) for g in place if len(best.get(g, ())) == 3}
        assert {"lowrank4", "nominate4", "sketch4", "random4"} <= set(means)
        if means["lowrank4"] < max(means.values()) - SAME:
            lost.append((task, ratio, ranks, steps, skewed))
    assert lost == [("cifar", 150, 4, 300, True)], "docs/choosing.md names the tables in which another source wins"


OF_EXCHANGE = {shown.LOW_RANK: "lowrank4", "nominate": "nominate4", "sketch": "sketch4", "random": "random4"}
OF_OPTIMIZER = {"Adam": "", "AdamW": "", "LagAdamW": "-lag", "Muon": "-muon", "Lion": "-lion"}


def test_losses_of_which_a_warning_tells_are_what_the_records_say() -> None:
    best = report.best_runs(records.read(RESULTS))
    told = {OF_EXCHANGE[exchange] + OF_OPTIMIZER[name]: loss for (name, exchange), loss in shown.LOSSES.items()}
    told |= {f"dense{OF_OPTIMIZER[name]}": loss for name, loss in shown.DENSE_LOSSES.items()}
    for method, loss in {**told, "dense": shown.DENSE_LOSS}.items():
        group = Group("lm", 4, False, 300, method, METHODS[method].fixed_ratio or 60.0)
        assert records.results_of(best[group]).mean() == pytest.approx(loss, abs=0.006), method


@pytest.mark.parametrize(("rule", "method"), RULES.items())
def test_the_rule_for_learning_rates_is_what_the_records_say(rule: str, method: str) -> None:
    page = (ROOT / "docs" / "choosing.md").read_text()
    told = re.search(rf"\| {re.escape(rule)} \| ([\d.]+)(?: to ([\d.]+))?[ ,]", page)
    assert told, rule
    least, most = float(told[1]), float(told[2] or told[1])
    kept, factors = records.read(RESULTS), []
    for task, ratio, ranks, steps, skewed in FINISHED:
        dense = "dense-muon" if method.endswith("muon") else "dense"
        groups = [Group(task, ranks, skewed, steps, *of) for of in ((method, float(ratio)), (dense, 1.0))]
        own_rate, dense_rate = (search.best_rate(group, kept) for group in groups)
        is_searched = all(len(search.rates_tried(group, kept)) > 2 for group in groups)
        if TASKS[task].adam == ("Adam" in rule or "Muon" in rule or "Sign" in rule) and is_searched:
            assert own_rate and dense_rate, "a finished search has a best rate"
            factors.append(own_rate / dense_rate)
    assert factors, "no records of finished searches"
    assert 0.9 * least < min(factors) and max(factors) < 1.1 * most, factors


@cache
def means() -> dict[Group, float]:
    """Of all groups the mean result at the best rate."""
    best = report.best_runs(records.read(RESULTS))
    return {group: float(results.mean()) for group, runs in best.items() if len(results := records.results_of(runs))}


def rows_of(page: str, head: str) -> Iterator[list[str]]:
    """The cells of the table whose first line begins so, without marks of bold type."""
    lines = iter((ROOT / page).read_text().replace("**", "").splitlines())
    next(line for line in lines if line.startswith(head))
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


# The columns of the README's table: task, ratio, ranks, steps, whether skewed.
COLUMNS = [
    ("mnist", 150.0, 4, 400, False),
    ("mnist", 150.0, 4, 400, True),
    ("cifar", 150.0, 4, 1500, False),
    ("cifar", 150.0, 16, 300, False),
    ("cifar2m", 1000.0, 4, 400, False),
]
ROWS = [("dense",), ("lowrank4",), ("nominate4",), ("random4",), ("local8", "local4")]


def test_the_readmes_table_is_what_the_records_say() -> None:
    rows = list(rows_of("README.md", "| fewer bytes than a dense ring |"))
    assert len(rows) == len(ROWS)
    for methods, (_, *cells) in zip(ROWS, rows, strict=True):
        for (task, ratio, ranks, steps, skewed), cell in zip(COLUMNS, cells, strict=True):
            groups = [Group(task, ranks, skewed, steps, name, METHODS[name].fixed_ratio or ratio) for name in methods]
            assert cell.split("; ") == [f"{means()[group]:.1f}" for group in groups], (methods, task)


AHEAD = ["nominate4-lag", "nominate4", "sketch4-lag", "random4-lag", "lowrank4", "dense"]


def test_the_table_of_step_ahead_is_what_the_records_say() -> None:
    rows = list(rows_of("docs/language_models.md", "| into | 300 steps |"))
    assert len(rows) == len(AHEAD)
    for method, (_, *cells) in zip(AHEAD, rows, strict=True):
        told = []
        for steps, name in product((300, 1500), (method, f"{method}-ahead")):
            group = Group("lm", 4, False, steps, name, 1.0 if name == "dense" else 60.0)
            told.append(f"{means()[group]:.2f}" if group in means() else "")
        assert cells == told, method


PAIRS = ["dense", "lowrank4", "nominate4", "random4", "sketch4"]
SUFFIXES = ["-sgd", "", "-lag", "-muon", "-lion", "-sign"]


def test_the_table_of_every_exchange_into_every_optimizer_is_what_the_records_say() -> None:
    rows = list(rows_of("docs/language_models.md", "| into | dense |"))
    assert len(rows) == len(SUFFIXES)
    for suffix, (_, *cells) in zip(SUFFIXES, rows, strict=True):
        groups = [
            Group("lm", 4, False, 300, exchange + suffix, 1.0 if exchange == "dense" else 60.0) for exchange in PAIRS
        ]
        assert cells == [f"{means()[group]:.2f}" if group in means() else "" for group in groups], suffix
