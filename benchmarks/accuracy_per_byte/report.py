"""The table and the figures of the records: every method at its best learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.accuracy_per_byte.by_optimizer import crossed, has_row
from benchmarks.accuracy_per_byte.by_ranks import LINES, draw_by_ranks
from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group, Record, Run, mean, results_of
from benchmarks.accuracy_per_byte.search import best_rate, rates_tried
from benchmarks.accuracy_per_byte.subjects import IMAGES, Subject
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.figures import (
    draw_bars,
    grouped,
    markdown,
    new_figure,
    plain_logarithmic,
    save_figure,
    shared_legend,
    spread,
    told,
)
from hvd_sketch.files import replaced

HEAD = "method | result, mean (least–greatest) | learning rate | seeds | ratio, matrices | ratio, all | bytes per step"
BESIDE = 1.03  # in a figure, from one method to the next


def best_runs(records: Mapping[Run, Record]) -> dict[Group, list[Record]]:
    """Of every group the runs at its best rate, by seed."""
    of_group: dict[Group, list[Record]] = {}
    for group in dict.fromkeys(run.group for run in records):
        best = best_rate(group, records)
        own = {run.seed: record for run, record in records.items() if run.group == group and run.rate == best}
        if own:
            of_group[group] = [own[seed] for seed in sorted(own)]
    return of_group


def write(records: Mapping[Run, Record], folder: Path, subject: Subject = IMAGES) -> str:
    """Write ``README.md`` and figures for each task of a subject to a folder; returns the text."""
    best = {group: runs for group, runs in best_runs(records).items() if subject.has(TASKS[group.task])}
    parts = [subject.introduction]
    for (task,), own in grouped([{"task": group.task, "group": group} for group in best], "task").items():
        groups = [entry["group"] for entry in own]
        parts.append(f"## {TASKS[task].title}\n")
        _draw(task, {group: best[group] for group in groups if has_row(group.method)}, folder / f"{task}.png")
        parts.append(f"![{_measure(task)} over bytes]({task}.png)\n")
        if draw_by_ranks({group: best[group] for group in groups}, _measure(task), folder / f"{task}-ranks.png"):
            parts.append(f"![{_measure(task)} and bytes by the number of ranks]({task}-ranks.png)\n")
        parts += _tables(groups, best, records)
    text = "\n".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "README.md") as draft:
        draft.write_text(text, encoding="utf-8")
    return text


def _tables(groups: list[Group], best: Mapping[Group, list[Record]], records: Mapping[Run, Record]) -> list[str]:
    """A table for each place, methods in the order of :data:`METHODS`; of a fixed ratio in every table of its place."""
    parts = []
    places = dict.fromkeys((g.workers, g.skewed, g.steps, g.ratio) for g in groups if not METHODS[g.method].fixed_ratio)
    places = places or dict.fromkeys((g.workers, g.skewed, g.steps, g.ratio) for g in groups)
    for workers, skewed, steps, ratio in sorted(places, key=lambda place: (place[2], place[0], place[1], place[3])):
        here = [g for g in groups if (g.workers, g.skewed, g.steps) == (workers, skewed, steps)]
        here = [g for g in here if g.ratio == ratio or METHODS[g.method].fixed_ratio]
        here.sort(key=lambda g: list(METHODS).index(g.method))
        labels = ", label-skewed" if skewed else ""
        parts.append(f"### {ratio:g} times fewer bytes, {workers} ranks{labels}, {steps} steps\n")
        rows = [_row(group, best[group], records) for group in here if has_row(group.method)]
        parts += [markdown(HEAD, rows) + "\n", *crossed(here, best, records)]
    return parts


def _row(group: Group, runs: list[Record], records: Mapping[Run, Record]) -> list[str]:
    results = results_of(runs)
    unit, form = ("", ".4f") if TASKS[group.task].adam else (" %", ".2f")
    reached = spread(results, form, unit) if len(results) else "diverged"
    if 0 < len(results) < len(runs):
        reached += f", {len(runs) - len(results)} diverged"
    tried = rates_tried(group, records)
    rate = runs[0]["rate"]
    open_edge = " (edge of the grid)" if rate in (min(tried), max(tried)) else ""
    return [
        METHODS[group.method].title,
        reached,
        f"{rate:g}{open_edge}",
        str(len(runs)),
        *(told(mean(runs, name), form) for name, form in (("matrix_ratio", ".1f"), ("compression_ratio", ".1f"))),
        told(mean(runs, "wire_bytes_per_step"), ",.0f"),
    ]


def _measure(task: str) -> str:
    return "test loss" if TASKS[task].adam else "test accuracy (%)"


def _draw(task: str, best: Mapping[Group, list[Record]], path: Path) -> None:
    """One axis for each number of ranks, steps and kind of data."""
    places = sorted({(group.steps, group.workers, group.skewed) for group in best})
    figure = new_figure(1 + 4.6 * len(places), 5)
    axes = figure.subplots(1, len(places), squeeze=False)[0]
    for ax, (steps, workers, skewed) in zip(axes, places, strict=True):
        here = {g: runs for g, runs in best.items() if (g.steps, g.workers, g.skewed) == (steps, workers, skewed)}
        _draw_place(ax, here)
        ax.set(xscale="log", xlabel="kB per step and rank", ylabel=_measure(task))
        low, high = ax.get_xlim()
        ax.set_xlim(low / 2, high * 2)  # at one ratio all methods have nearly the same bytes
        plain_logarithmic(ax.xaxis, unit=1000)
        ax.set_title(f"{workers} ranks, {steps} steps{', label-skewed' if skewed else ''}", fontsize=10)
        ax.grid(alpha=0.3)
    shared_legend(figure, axes, columns=2 * len(places))
    figure.suptitle(fill(TASKS[task].title, 50 * len(places)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=90)


def _draw_place(ax: Any, best: Mapping[Group, list[Record]]) -> None:
    """Methods of one ratio side by side: they have nearly the same bytes."""
    present = [name for name in METHODS if name != "dense" and any(g.method == name for g in best)]
    for name, method in METHODS.items():
        own = [(mean(runs, "wire_bytes_per_step"), results_of(runs)) for g, runs in best.items() if g.method == name]
        points = sorted(((x, values) for x, values in own if x is not None and len(values)), key=lambda point: point[0])
        if not points:
            continue
        if name == "dense":
            ax.axhline(points[0][1].mean(), color="black", linestyle=":", label="dense")
            continue
        aside = BESIDE ** (present.index(name) - (len(present) - 1) / 2)
        style = {**LINES[name], "label": method.title, "linewidth": 1, "markersize": 6}
        draw_bars(ax, [x * aside for x, _ in points], [values for _, values in points], **style)
