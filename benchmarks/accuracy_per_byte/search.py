"""The best learning rate of every group: which runs are to be done next, from those that are finished."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.paper.rate_search import FACTOR, beside, rounded

MOST_RATES = 8  # of one grid: it does not grow for ever


def score(record: Record) -> float:
    """Accuracy, or the loss below zero for a task without one; greater is better, diverged is worst."""
    if record["diverged"]:
        return -math.inf
    return record["acc"] if record["acc"] is not None else -record["loss"]


def rates_tried(group: Group, records: Mapping[Run, Record]) -> dict[float, float]:
    """The score of each rate tried with seed 0; the worst where any seed diverged."""
    own = [(run, record) for run, record in records.items() if run.group == group]
    lost = {run.rate for run, record in own if record["diverged"]}
    return {run.rate: -math.inf if run.rate in lost else score(record) for run, record in own if run.seed == 0}


def best_rate(group: Group, records: Mapping[Run, Record]) -> float | None:
    """The rate of the best score of seed 0, the lower of two equal ones; None where nothing was tried."""
    scores = rates_tried(group, records)
    return max(sorted(scores), key=scores.__getitem__) if scores else None


def wanted(group: Group, centre: float, seeds: int, records: Mapping[Run, Record], finer: bool = False) -> list[Run]:
    """What can be run now: the first three rates; then one beyond the edge at which the best is; then other seeds.

    With ``finer`` a rate on either side of the best comes before the other seeds, the root of :data:`FACTOR` away.
    """
    first = [Run(group, rounded(rate), 0) for rate in (centre, centre / FACTOR, centre * FACTOR)]
    if missing := [run for run in first if run not in records]:
        return missing
    scores = rates_tried(group, records)
    best = max(sorted(scores), key=scores.__getitem__)
    if best in (min(scores), max(scores)) and len(scores) < MOST_RATES:
        further = best / FACTOR if best == min(scores) else best * FACTOR
        return [Run(group, rounded(further), 0)]
    if finer and (between := [rate for rate in beside(best) if not _is_near(rate, scores)]):
        return [Run(group, rate, 0) for rate in between]
    others = [Run(group, best, seed) for seed in range(1, seeds)]
    return [run for run in others if run not in records]


def _is_near(rate: float, tried: Iterable[float]) -> bool:
    """Whether a rate was tried already: rounded twice it is not quite equal."""
    return any(math.isclose(rate, other, rel_tol=0.05) for other in tried)
