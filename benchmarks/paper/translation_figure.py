"""The translation experiment's figure, validation loss over steps and over bytes, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import (
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
    styles_of,
    told,
)
from benchmarks.paper.translation import METHODS
from benchmarks.paper.translation_models import MODELS

LINES = styles_of(dict(zip(METHODS, ("dense", "topk", "paper", "paper"), strict=True)))
HEAD = (
    "model | method | test BLEU | difference | validation loss | perplexity | steps | "
    "wire bytes per rank and step | ratio | the paper's ratio | seeds"
)
ByMethod = dict[str, list[Record]]


def draw(runs: list[Record], path: Path) -> str:
    """Write the figure; returns the table as Markdown."""
    models = {model: found for model in MODELS if (found := _by_method(runs, model))}
    figure = new_figure(9, 3.4 * len(models))
    axes = figure.subplots(len(models), 2, sharey="row", squeeze=False)
    for (model, by_method), (by_steps, by_bytes) in zip(models.items(), axes, strict=True):
        for method, own in by_method.items():
            steps, losses = steps_of(own[0]), curves(own, "valid_loss")
            style = LINES[method]["linestyle"], LINES[method]["color"]
            draw_band(by_steps, steps, losses, *style, method)
            if METHODS[method].real:
                megabytes = steps * own[0]["wire_bytes_per_step"] / 1e6
                draw_band(by_bytes, megabytes, losses, *style, method)
        by_steps.set(title=model, xlabel="steps", ylabel="validation loss (nats per token)")
        by_bytes.set(title=model, xlabel="MB that one rank sends", xscale="log")
        for ax in (by_steps, by_bytes):
            ax.grid(alpha=0.3, which="both")
            ax.legend(fontsize=7)
    save_figure(figure, path, dpi=90)
    return markdown(HEAD, [_row(by_method, method) for by_method in models.values() for method in by_method])


def _by_method(runs: list[Record], model: str) -> ByMethod:
    """One per seed, of the longest training."""
    own = [run for run in runs if run["model"] == model]
    chosen = {method: longest(run for run in own if run["method"] == method) for method in METHODS}
    return {method: found for method, found in chosen.items() if found}


def _row(by_method: ByMethod, method: str) -> Sequence[str]:
    """Means over seeds; the difference in BLEU is to the uncompressed training."""
    runs, dense = by_method[method], by_method.get("uncompressed")
    first, bleu = runs[0], final(runs, "test_bleu")
    is_compared = dense and method != "uncompressed"
    is_real = METHODS[method].real  # true top-k exists in a simulation only
    return [
        *(first["model"], method, spread(bleu, ".2f")),
        f"{bleu.mean() - final(dense, 'test_bleu').mean():+.2f}" if is_compared else "",
        *(spread(final(runs, "valid_loss"), ".3f"), spread(final(runs, "valid_perplexity"), ".2f")),
        f"{first['steps']:,}",
        told(first["wire_bytes_per_step"] if is_real else None, ",.0f"),
        told(first["compression_ratio"] if is_real else None, ".2f", "×"),
        *(f"{first['paper_compression_ratio']:.2f}×", str(len(runs))),
    ]
