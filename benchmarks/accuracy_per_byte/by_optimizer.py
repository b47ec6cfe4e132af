"""The table of every exchange into every optimizer, at one place and ratio."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from benchmarks.accuracy_per_byte.methods import CROSSED, METHODS
from benchmarks.accuracy_per_byte.records import Group, Record, Run, results_of
from benchmarks.accuracy_per_byte.search import rates_tried
from benchmarks.figures import markdown

OPTIMIZERS = {
    "sgd": "SGD",
    "adam": "Adam",
    "lag": "LagAdamW",
    "muon": "Muon beside AdamW",
    "lion": "Lion",
    "sign": "SignSGD after a residual of which 0.95 stays",
}
INTRODUCTION = """Every exchange into every optimizer: the result, and in brackets its learning rate. One seed where
none else is told. SGD has a Nesterov momentum of 0.9 after dense, nominated and low-rank exchanges. LagAdamW steps as
Adam after dense and low-rank ones.
"""


def has_row(method: str) -> bool:
    """Whether a method has a row of its own in the other tables: it is no mere cell of this one."""
    source, _, optimizer = method.partition("-")
    is_cell = source in CROSSED and optimizer in ("sgd", "lion", "muon")
    return not is_cell or method in ("dense-muon", "lowrank4-muon")


def crossed(groups: list[Group], best: Mapping[Group, list[Record]], records: Mapping[Run, Record]) -> list[str]:
    """The parts of a report on the groups of one place and ratio; none where no compressed method is crossed there."""
    if all(has_row(group.method) or METHODS[group.method].fixed_ratio for group in groups):
        return []
    cells = {group.method: _cell(best[group], rates_tried(group, records)) for group in groups}
    titles = [METHODS[source].title for source in CROSSED]
    rows = [
        [title, *(cells.get(_method(source, optimizer), "") for source in CROSSED)]
        for optimizer, title in OPTIMIZERS.items()
    ]
    return [INTRODUCTION, markdown("|".join(["into", *titles]), rows) + "\n"]


def _method(source: str, optimizer: str) -> str:
    return source if optimizer == "adam" else f"{source}-{optimizer}"


def _cell(runs: list[Record], tried: Collection[float]) -> str:
    results, rate = results_of(runs), runs[0]["rate"]
    if not len(results):
        return "diverged"
    seeds = f", {len(results)} seeds" if len(results) > 1 else ""
    open_edge = ", edge of the grid" if rate in (min(tried), max(tried)) else ""
    return f"{results.mean():.3f} ({rate:g}{open_edge}{seeds})"
