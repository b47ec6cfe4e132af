"""The CIFAR-10 experiment's figure: accuracy against compression, and what grows with the workers; and its tables."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Run = dict[str, Any]
NAMES = {"dense": "dense", "true_topk": "true top-k", "sketched": "sketched", "local_topk": "local top-k"}
COLOURS = {"dense": "black", "true_topk": "tab:green", "sketched": "tab:orange", "local_topk": "tab:blue"}


class Seeds:
    """The runs that differ in their seed alone."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.method, self.setting, self.workers = (runs[0][name] for name in ("method", "setting", "workers"))

    def mean(self, figure: str) -> float | None:
        """None where the method has no such figure."""
        found = [run[figure] if figure in run else run["final"][figure] for run in self.runs]
        return None if None in found else float(np.mean(found))

    def accuracies(self) -> tuple[float, float, float]:
        """Mean, least and greatest of the test accuracy, in per cent."""
        found = [100 * run["final"]["test_accuracy"] for run in self.runs]
        return float(np.mean(found)), min(found), max(found)


def by_seeds(runs: list[Run], part: str) -> list[Seeds]:
    """In the order of the runs."""
    together: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run["part"] == part:
            together[run["method"], run["setting"], run["workers"], run["steps"]].append(run)
    return [Seeds(group) for group in together.values()]


def draw(runs: list[Run], path: Path) -> str:
    """Write the figure; returns the tables as Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    accuracy, sweep = by_seeds(runs, "accuracy"), by_seeds(runs, "workers")
    _draw_accuracy(axes[0], accuracy)
    _draw_growth(axes[1], sweep, "updated_per_step", "updated parameters per step")
    _draw_growth(axes[2], sweep, "wire_bytes_per_step", "bytes per worker and step")
    figure.savefig(path, dpi=90)
    return "\n\n".join(table(group) for group in (accuracy, sweep) if group)


def _draw_accuracy(ax: Any, groups: list[Seeds]) -> None:
    """Means, with bars from the least to the greatest seed."""
    for method in dict.fromkeys(group.method for group in groups):
        own = sorted((g for g in groups if g.method == method), key=lambda g: g.mean("paper_compression_ratio") or 0)
        means, least, greatest = np.array([group.accuracies() for group in own]).T
        spread = np.stack([means - least, greatest - means])
        ratios = [group.mean("paper_compression_ratio") for group in own]
        style = {"color": COLOURS[method], "label": NAMES[method], "capsize": 3, "linewidth": 1}
        ax.errorbar(ratios, means, spread, fmt="o-" if method == "true_topk" else "o", **style)
    ax.set(xscale="log", xlabel="compression, as the paper counts", ylabel="test accuracy (%)")
    _finish(ax)


def _draw_growth(ax: Any, groups: list[Seeds], figure: str, label: str) -> None:
    for method in dict.fromkeys(group.method for group in groups):
        own = sorted((group for group in groups if group.method == method), key=lambda group: group.workers)
        workers, values = [group.workers for group in own], [group.mean(figure) for group in own]
        ax.plot(workers, values, "o-", color=COLOURS[method], label=NAMES[method], linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="workers", ylabel=label)
    _finish(ax)


def _finish(ax: Any) -> None:
    ax.grid(alpha=0.3, which="both")
    if ax.has_data():
        ax.legend(fontsize=8)


def table(groups: list[Seeds]) -> str:
    """One line per method, setting and number of workers: means over seeds."""
    lines = [
        "| method | setting | workers | test accuracy | updated per step | wire bytes per step | ratio | "
        "the paper's ratio | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        mean, least, greatest = group.accuracies()
        cells = [
            *(NAMES[group.method], group.setting, str(group.workers)),
            f"{mean:.1f} % ({least:.1f}–{greatest:.1f})",
            _told(group.mean("updated_per_step"), ",.0f"),
            _told(group.mean("wire_bytes_per_step"), ",.0f"),
            *(_told(group.mean(name), ".2f", "×") for name in ("compression_ratio", "paper_compression_ratio")),
            str(len(group.runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(value: float | None, format: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{format}}{unit}"
