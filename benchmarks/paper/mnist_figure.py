"""The MNIST experiment's figure, log-log with the rates of Theorems 1 and 5, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import (
    Floats,
    Record,
    curves,
    draw_band,
    final,
    longest,
    markdown,
    new_figure,
    save_figure,
    spread,
    steps_of,
)
from benchmarks.paper.mnist import METHODS, RECIPES
from hvd_sketch.commands.styles import STYLES

COLOURS = {"vanilla": STYLES["dense"].color, "sketched": STYLES["paper"].color}
# The leading term of the bound on f - f*, as a power of the number of steps: Theorem 1, Theorem 5. Alg. 3 has none.
RATES = {"logistic-alg2": -1.0, "logistic-alg2-mu": -1.0, "svm-alg2": -0.5}
HEAD = (
    "recipe | method | training error | test error | training objective | slope | wire bytes per step | ratio | "
    "the paper's ratio | seeds"
)


class Curves:
    """The runs of one recipe and method: the longest, one row per seed, and the ends of the shorter ones."""

    def __init__(self, runs: list[Record], recipe: str, method: str) -> None:
        self._all = [run for run in runs if run.get("recipe") == recipe and run["method"] == method]
        self.runs, self.colour = longest(self._all), COLOURS[method]
        self.steps = steps_of(self.runs[0]) if self.runs else np.empty(0)
        searches = [run for run in runs if run.get("problem") == RECIPES[recipe].problem.name]
        self._least = min(searches, key=lambda run: run["reached"])["least"] if searches else 0.0

    def gap(self) -> Floats:
        """[seeds, points]: the training objective above the lowest that L-BFGS finds possible."""
        return curves(self.runs, "train_loss") - self._least

    def slope(self) -> float:
        """Of the mean gap over the last decade of steps, on log-log axes, by least squares."""
        return _slope(self.steps, self.gap().mean(0))

    def ends(self) -> tuple[Floats, Floats]:
        """Every T trained for, ascending, and the mean gap at its end."""
        horizons = sorted({run["steps"] for run in self._all})
        losses = [final((run for run in self._all if run["steps"] == end), "train_loss").mean() for end in horizons]
        return np.array(horizons, dtype=np.float64), np.array(losses) - self._least


def _slope(steps: Floats, gaps: Floats) -> float:
    late = steps >= steps[-1] / 10
    return float(np.polyfit(np.log(steps[late]), np.log(gaps[late]), 1)[0])


def draw(runs: list[Record], path: Path) -> str:
    """Write the figure; returns the table as Markdown."""
    recipes = [recipe for recipe in RECIPES if Curves(runs, recipe, "sketched").runs]
    figure = new_figure(3.2 * len(recipes), 6)
    axes = figure.subplots(2, len(recipes), sharex=True, squeeze=False)
    for recipe, (upper, lower) in zip(recipes, axes.T, strict=True):
        upper.set_title(recipe)
        for method in METHODS:
            _draw_method(upper, lower, Curves(runs, recipe, method), method)
        if recipe in RATES:
            _draw_rate(upper, Curves(runs, recipe, "vanilla"), RATES[recipe])
        lower.set_xlabel("steps")
        for ax in (upper, lower):
            ax.set(xscale="log", yscale="log")
            ax.grid(alpha=0.3, which="both")
            _draw_legend(ax)
    axes[0, 0].set_ylabel("training objective above the minimum")
    axes[1, 0].set_ylabel("error (fraction)")
    save_figure(figure, path, dpi=90)
    return markdown(HEAD, [row for recipe in recipes for row in _rows(runs, recipe)])


def _draw_method(upper: Any, lower: Any, own: Curves, method: str) -> None:
    draw_band(upper, own.steps, own.gap(), "-", own.colour, f"{method}, slope {own.slope():.2f}")
    horizons, gaps = own.ends()
    if len(horizons) > 1:  # what trainings of other lengths reach, where the rate depends on the length
        label = f"{method}, ends of T steps, {_slope(horizons, gaps):.2f}"
        upper.plot(horizons, gaps, "o", color=own.colour, markersize=4, label=label)
    draw_band(lower, own.steps, curves(own.runs, "train_error"), "-", own.colour, f"{method}, training")
    draw_band(lower, own.steps, curves(own.runs, "test_error"), ":", own.colour, f"{method}, test")


def _draw_rate(ax: Any, own: Curves, power: float) -> None:
    """The bound's leading term, through the middle of the last decade."""
    late = own.steps[own.steps >= own.steps[-1] / 30]
    middle = int(np.searchsorted(own.steps, own.steps[-1] / 10**0.5))
    theory = own.gap().mean(0)[middle] * (late / own.steps[middle]) ** power
    ax.plot(late, theory, "--", color="0.5", linewidth=1.5, label=f"theory, slope {power:g}")


def _draw_legend(ax: Any) -> None:
    """Below the lines, with room for one that is long."""
    drawn = ax.legend(fontsize=6.5, loc="lower left")
    if len(drawn.get_texts()) > 4:
        low, high = ax.get_ylim()
        ax.set_ylim(bottom=low * (low / high) ** 0.4)


def _rows(runs: list[Record], recipe: str) -> list[Sequence[str]]:
    """One per method, means over seeds; then the difference, sketched over vanilla of the means."""
    vanilla, sketched = (Curves(runs, recipe, method) for method in METHODS)
    metrics = ("train_error", "test_error", "train_loss")
    ratios = (final(sketched.runs, name).mean() / final(vanilla.runs, name).mean() for name in metrics)
    differences = ["", "difference", *(f"{ratio - 1:+.1%}" for ratio in ratios), *[""] * 5]
    return [_row(recipe, "vanilla", vanilla), _row(recipe, "sketched", sketched), differences]


def _row(recipe: str, method: str, own: Curves) -> Sequence[str]:
    run = own.runs[0]
    return [
        *(recipe, method),
        *(spread(100 * final(own.runs, f"{part}_error"), ".3g", " %") for part in ("train", "test")),
        *(spread(final(own.runs, "train_loss"), ".3g"), f"{own.slope():.2f}", f"{run['wire_bytes_per_step']:,.0f}"),
        *(f"{run['compression_ratio']:.2f}×", f"{run['paper_compression_ratio']:.2f}×", str(len(own.runs))),
    ]
