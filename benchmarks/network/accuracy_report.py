"""What time_to_accuracy.py shows of its records: one table in Markdown, and a plot of accuracy against bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Record, grouped, markdown, new_figure, save_figure
from benchmarks.network.bandwidth_report import LABELS, LINES
from benchmarks.network.lab import bits_per_s


def table(records: Sequence[Record]) -> str:
    """One row for each method; the fastest at each rate over a transport in bold."""
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    best: dict[tuple[str, str], float] = {}
    for record in records:
        if record["reached"]:
            where = record["transport"], record["rate"]
            best[where] = min(best.get(where, math.inf), record["seconds"]["median"])
    times = " | ".join(f"s at {rate}" for rate in rates)
    head = f" | learning rate | momentum | steps | {times} | MB sent per host | ratio"
    rows = []
    for (transport, method), own in grouped(records, "transport", "method").items():
        by_rate = {record["rate"]: record for record in own}
        seconds = [_seconds(by_rate.get(rate), best.get((transport, rate))) for rate in rates]
        about = [
            f"{LABELS[method]}, {transport}",
            _rate(own[0]),
            f"{own[0]['momentum']:g}",
            str(own[0]["steps"]),
        ]
        sent = f"{own[0]['interface']['mean_bytes'] / 1e6:.1f}"
        rows.append([*about, *seconds, sent, f"{own[0]['ratio']:.1f}"])
    return markdown(head, rows)


def _rate(record: Record) -> str:
    """The learning rate; marked where one beyond it was not tried."""
    rate, tried = record["learning_rate"], record["learning_rates"]
    return f"{rate:g}" + (" (edge of the grid)" if rate in (min(tried), max(tried)) else "")


def _seconds(record: Record | None, best: float | None) -> str:
    if record is None:
        return ""
    if not record["reached"]:
        return f"not reached ({record['accuracy']:.2%})"
    seconds = record["seconds"]["median"]
    return f"**{seconds:.1f}**" if seconds == best else f"{seconds:.1f}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Each method once: accuracy and bytes are alike at all rates and over all transports."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for (method,), (record, *_) in grouped(records, "method").items():
        megabytes = [wire_bytes / 1e6 for _, _, wire_bytes, _ in record["curve"]]
        accuracy = [point[-1] for point in record["curve"]]
        style = {**LINES[method], "linestyle": "-", "markevery": max(len(accuracy) // 12, 1)}
        axes.plot(megabytes, accuracy, markersize=5, label=LABELS[method], **style)
    axes.set(xscale="log", xlabel="MB sent by each host so far (ledger)", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path, dpi=120)
