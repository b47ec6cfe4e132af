"""The loss of a language model over the seconds that its training takes on an emulated network.

Losses are those of :mod:`benchmarks.language_model`: the same exchanges, between simulated ranks. Seconds are all steps
of such a training at the speed that :mod:`benchmarks.network.tokens` has measured with as many hosts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy_per_byte.by_ranks import LINES
from benchmarks.accuracy_per_byte.records import Group, results_of
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.figures import (
    Floats,
    Record,
    draw_bars,
    grouped,
    markdown,
    new_figure,
    plain_logarithmic,
    save_figure,
    shared_legend,
    spread,
)
from benchmarks.network.lab import bits_per_s
from benchmarks.network.tokens_ranks import METHODS

PANEL = ("transport", "hosts", "rate")


@dataclass(frozen=True)
class Point:
    """A whole training on one network: how long it takes, and the losses of its seeds at its end."""

    steps: int
    seconds: float
    losses: Floats


def points(record: Record, best: Mapping[Group, Sequence[Record]]) -> list[Point]:
    """Of the trainings of a measured method, the shortest first; none where there is no record of one.

    Args:
        record: of tokens.py: a method's speed on one network.
        best: the runs at the best rate, see :func:`benchmarks.accuracy_per_byte.report.best_runs`.
    """
    trained, seconds_per_step = METHODS[record["method"]].trained, record["tokens"] / record["tokens_per_s"]
    found = [
        Point(group.steps, group.steps * seconds_per_step, results_of(runs))
        for group, runs in best.items()
        if (group.method, group.ratio) == trained and _is_of(group, record)
    ]
    return sorted((point for point in found if len(point.losses)), key=lambda point: point.steps)


def _is_of(group: Group, record: Record) -> bool:
    """Whether a training has the steps that were timed: the same model, hosts and batch."""
    same_batch = TASKS[group.task].batch(group.workers) == record["batch"]
    return (group.task, group.workers) == (record["task"], record["hosts"]) and same_batch and not group.skewed


def table(records: Sequence[Record], best: Mapping[Group, Sequence[Record]]) -> str:
    """A row for each method, number of hosts and length of the training: the loss, and its seconds on every network."""
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    rows = []
    for (_, _, method), own in grouped(records, "transport", "hosts", "method").items():
        by_rate = {record["rate"]: {point.steps: point for point in points(record, best)} for record in own}
        for steps in sorted({steps for of_rate in by_rate.values() for steps in of_rate}):
            at = [of_rate[steps] for of_rate in by_rate.values()]
            seconds = [f"{by_rate[rate][steps].seconds:,.0f}" if rate in by_rate else "" for rate in rates]
            loss = spread(at[0].losses, ".3f")
            rows.append([METHODS[method].title, str(own[0]["hosts"]), str(steps), loss, *seconds])
    return markdown(f"method | hosts | steps | loss | {' | '.join(f's at {rate}' for rate in rates)}", rows)


def plot(records: Sequence[Record], best: Mapping[Group, Sequence[Record]], path: Path) -> bool:
    """A panel for each network; of every method a point for each length of its training.

    Returns:
        Whether there is any; otherwise nothing is drawn.
    """
    panels = {key: drawn for key, own in grouped(records, *PANEL).items() if (drawn := list(_lines(own, best)))}
    if not panels:
        return False
    figure = new_figure(2 + 3 * len(panels), 4.6)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    by_network = sorted(panels.items(), key=lambda panel: (*panel[0][:2], bits_per_s(panel[0][2])))
    for ax, ((transport, hosts, rate), lines) in zip(axes, by_network, strict=True):
        for method, of_method in lines:
            trained = METHODS[method].trained
            assert trained is not None, "it has points"
            style = {**LINES[trained[0]], "label": METHODS[method].title.replace("`", ""), "linewidth": 1}
            draw_bars(ax, [point.seconds for point in of_method], [point.losses for point in of_method], **style)
        ax.set(xscale="log", xlabel="seconds of the training", title=f"{hosts} hosts, {rate}, {transport}")
        plain_logarithmic(ax.xaxis)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test loss at its end")
    shared_legend(figure, axes, columns=3)
    save_figure(figure, path, dpi=90)
    return True


def _lines(records: Sequence[Record], best: Mapping[Group, Sequence[Record]]) -> Iterator[tuple[str, Sequence[Point]]]:
    for record in records:
        if found := points(record, best):
            yield record["method"], found
