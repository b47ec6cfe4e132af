"""The translation experiment's figure, validation loss over steps and over bytes, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.paper.translation import METHODS
from benchmarks.paper.translation_models import MODELS

Run = dict[str, Any]
COLOURS = dict(zip(METHODS, ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))


def draw(runs: list[Run], path: Path) -> str:
    """Write the figure; returns the table as Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [model for model in MODELS if any(run["model"] == model for run in runs)]
    size = (9, 3.4 * len(models))
    figure, axes = pyplot.subplots(len(models), 2, sharey="row", squeeze=False, figsize=size, layout="constrained")
    for model, (by_steps, by_bytes) in zip(models, axes, strict=True):
        for method in METHODS:
            if chosen := _of(runs, model, method):
                steps = np.array([point["step"] for point in chosen[0]["curve"]])
                _draw_band(by_steps, steps, chosen)
                if METHODS[method].real:
                    _draw_band(by_bytes, steps * chosen[0]["wire_bytes_per_step"] / 1e6, chosen)
        by_steps.set(title=model, xlabel="steps", ylabel="validation loss (nats per token)")
        by_bytes.set(title=model, xlabel="MB that one rank sends", xscale="log")
        for ax in (by_steps, by_bytes):
            ax.grid(alpha=0.3, which="both")
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return table(runs, models)


def _of(runs: list[Run], model: str, method: str) -> list[Run]:
    """One per seed, of the longest training."""
    chosen = [run for run in runs if run["model"] == model and run["method"] == method]
    longest = max((run["steps"] for run in chosen), default=0)
    return [run for run in chosen if run["steps"] == longest]


def _draw_band(ax: Any, places: npt.NDArray[Any], runs: list[Run]) -> None:
    """The mean over seeds, and all that lies between the seeds."""
    losses = np.array([[point["valid_loss"] for point in run["curve"]] for run in runs])
    method = runs[0]["method"]
    ax.plot(places, losses.mean(0), color=COLOURS[method], label=method, linewidth=1.2)
    ax.fill_between(places, losses.min(0), losses.max(0), color=COLOURS[method], alpha=0.2, linewidth=0)


def table(runs: list[Run], models: list[str]) -> str:
    """One line per model and method, means over seeds; the difference in BLEU is to the uncompressed training."""
    lines = [
        "| model | method | test BLEU | difference | validation loss | perplexity | steps | "
        "wire bytes per rank and step | ratio | the paper's ratio | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        dense = _of(runs, model, "uncompressed")
        lines += [_line(chosen, dense) for method in METHODS if (chosen := _of(runs, model, method))]
    return "\n".join(lines)


def _line(runs: list[Run], dense: list[Run]) -> str:
    def values(of: list[Run], metric: str) -> npt.NDArray[np.float64]:
        return np.array([run["final"][metric] for run in of])

    def spread(metric: str, digits: int) -> str:
        found = values(runs, metric)
        mean, least, most = (f"{x:.{digits}f}" for x in (found.mean(), found.min(), found.max()))
        return f"{mean} ({least}–{most})" if len(found) > 1 else mean

    first = runs[0]
    bleu, of_dense = values(runs, "test_bleu").mean(), values(dense, "test_bleu")
    cells = [
        *(first["model"], first["method"], spread("test_bleu", 2)),
        f"{bleu - of_dense.mean():+.2f}" if len(dense) and first["method"] != "uncompressed" else "",
        *(spread("valid_loss", 3), spread("valid_perplexity", 2), f"{first['steps']:,}"),
        *_bytes(first),
        f"{first['paper_compression_ratio']:.2f}×",
        str(len(runs)),
    ]
    return f"| {' | '.join(cells)} |"


def _bytes(run: Run) -> tuple[str, str]:
    """True top-k exists in a simulation only."""
    if not METHODS[run["method"]].real:
        return "–", "–"
    return f"{run['wire_bytes_per_step']:,.0f}", f"{run['compression_ratio']:.2f}×"
