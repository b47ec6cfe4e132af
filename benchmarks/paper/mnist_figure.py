"""The MNIST experiment's figure, log-log with the rates of Theorems 1 and 5, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.paper.mnist import METHODS, RECIPES

Run = dict[str, Any]
Floats = npt.NDArray[np.float64]
COLOURS = {"vanilla": "tab:blue", "sketched": "tab:orange"}
# The leading term of the bound on f - f*, as a power of the number of steps: Theorem 1, Theorem 5. Alg. 3 has none.
RATES = {"logistic-alg2": -1.0, "logistic-alg2-mu": -1.0, "svm-alg2": -0.5}


class Curves:
    """The runs of one recipe and method: the longest, one row per seed, and the ends of the shorter ones."""

    def __init__(self, runs: list[Run], recipe: str, method: str) -> None:
        self._all = [run for run in runs if run.get("recipe") == recipe and run["method"] == method]
        longest = max((run["steps"] for run in self._all), default=0)
        self.runs = [run for run in self._all if run["steps"] == longest]
        searches = [run for run in runs if run.get("problem") == RECIPES[recipe].problem.name]
        self._least = min(searches, key=lambda run: run["reached"])["least"] if searches else 0.0

    @property
    def steps(self) -> Floats:
        return np.array([point["step"] for point in self.runs[0]["curve"]], dtype=np.float64)

    def of(self, metric: str) -> Floats:
        """[seeds, points]; ``gap`` is the training objective above the lowest that L-BFGS finds possible."""
        if metric == "gap":
            return self.of("train_loss") - self._least
        return np.array([[point[metric] for point in run["curve"]] for run in self.runs])

    def slope(self) -> float:
        """Of the mean gap over the last decade of steps, on log-log axes, by least squares."""
        late = self.steps >= self.steps[-1] / 10
        return _slope(self.steps[late], self.of("gap").mean(0)[late])

    def ends(self) -> tuple[Floats, Floats]:
        """Every T trained for, ascending, and the mean gap at its end."""
        horizons = sorted({run["steps"] for run in self._all})
        losses = [[run["final"]["train_loss"] for run in self._all if run["steps"] == end] for end in horizons]
        return np.array(horizons, dtype=np.float64), np.array([np.mean(of) for of in losses]) - self._least


def _slope(steps: Floats, gaps: Floats) -> float:
    return float(np.polyfit(np.log(steps), np.log(gaps), 1)[0])


def draw(runs: list[Run], path: Path) -> str:
    """Write the figure; returns the table as Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recipes = [recipe for recipe in RECIPES if Curves(runs, recipe, "sketched").runs]
    size = (3.2 * len(recipes), 6)
    figure, axes = pyplot.subplots(2, len(recipes), sharex=True, squeeze=False, figsize=size, layout="constrained")
    for recipe, (upper, lower) in zip(recipes, axes.T, strict=True):
        upper.set_title(recipe)
        for method in METHODS:
            curves = Curves(runs, recipe, method)
            _draw_band(upper, curves, "gap", method, "-", f"{method}, slope {curves.slope():.2f}")
            _draw_ends(upper, curves, method)
            _draw_band(lower, curves, "train_error", method, "-", f"{method}, training")
            _draw_band(lower, curves, "test_error", method, ":", f"{method}, test")
        _draw_rate(upper, Curves(runs, recipe, "vanilla"), RATES.get(recipe))
        lower.set_xlabel("steps")
        for ax in (upper, lower):
            ax.set(xscale="log", yscale="log")
            ax.grid(alpha=0.3, which="both")
            ax.legend(fontsize=6.5, loc="upper right")
    axes[0, 0].set_ylabel("training objective above the minimum")
    axes[1, 0].set_ylabel("error (fraction)")
    figure.savefig(path, dpi=90)
    return table(runs, recipes)


def _draw_band(ax: Any, curves: Curves, metric: str, method: str, style: str, label: str) -> None:
    """The mean over seeds, and all that lies between the seeds."""
    values = curves.of(metric)
    ax.plot(curves.steps, values.mean(0), style, color=COLOURS[method], label=label, linewidth=1.2)
    ax.fill_between(curves.steps, values.min(0), values.max(0), color=COLOURS[method], alpha=0.2, linewidth=0)


def _draw_ends(ax: Any, curves: Curves, method: str) -> None:
    """What trainings of other lengths reach, where the rate depends on the length."""
    horizons, gaps = curves.ends()
    if len(horizons) > 1:
        late = horizons >= horizons[-1] / 10
        label = f"{method}, ends of T steps, {_slope(horizons[late], gaps[late]):.2f}"
        ax.plot(horizons, gaps, "o", color=COLOURS[method], markersize=4, label=label)


def _draw_rate(ax: Any, curves: Curves, power: float | None) -> None:
    """The bound's leading term, through the middle of the last decade."""
    if power is None:
        return
    late = curves.steps[curves.steps >= curves.steps[-1] / 30]
    middle = int(np.searchsorted(curves.steps, curves.steps[-1] / 10**0.5))
    theory = curves.of("gap").mean(0)[middle] * (late / curves.steps[middle]) ** power
    ax.plot(late, theory, "--", color="black", linewidth=1, label=f"theory, slope {power:g}")


def table(runs: list[Run], recipes: list[str]) -> str:
    """One line per recipe and method, means over seeds; difference: sketched over vanilla of the means."""
    lines = [
        "| recipe | method | training error | test error | training objective | slope | wire bytes per step | ratio | "
        "the paper's ratio | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        vanilla, sketched = (Curves(runs, recipe, method) for method in METHODS)
        lines += [_line(recipe, method, Curves(runs, recipe, method)) for method in METHODS]
        differences = [_difference(sketched, vanilla, m) for m in ("train_error", "test_error", "train_loss")]
        lines.append(f"| | difference | {' | '.join(differences)} | | | | | |")
    return "\n".join(lines)


def _line(recipe: str, method: str, curves: Curves) -> str:
    def spread(metric: str, unit: str, scale: float) -> str:
        final = scale * curves.of(metric)[:, -1]
        return f"{final.mean():.3g}{unit} ({final.min():.3g}–{final.max():.3g})"

    run = curves.runs[0]
    cells = [
        recipe,
        method,
        *(spread("train_error", " %", 100), spread("test_error", " %", 100), spread("train_loss", "", 1)),
        f"{curves.slope():.2f}",
        f"{run['wire_bytes_per_step']:,.0f}",
        f"{run['compression_ratio']:.2f}×",
        f"{run['paper_compression_ratio']:.2f}×",
        str(len(curves.runs)),
    ]
    return f"| {' | '.join(cells)} |"


def _difference(sketched: Curves, vanilla: Curves, metric: str) -> str:
    return f"{sketched.of(metric)[:, -1].mean() / vanilla.of(metric)[:, -1].mean() - 1:+.1%}"
