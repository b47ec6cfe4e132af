"""What time_to_accuracy.py shows of its records: one table in Markdown, and a plot of accuracy against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.network.bandwidth_report import LABELS
from benchmarks.network.lab import bits_per_s
from benchmarks.network.records import Record

STYLES = {"mpi": "-", "horovod": "--"}


def table(records: Sequence[Record]) -> str:
    """One row for each method; the fastest at each rate in bold."""
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record["transport"], record["method"]), {})[record["rate"]] = record
    best = {rate: min((r["seconds"]["median"] for r in of(records, rate) if r["reached"]), default=0) for rate in rates}
    lines = [
        f"| | learning rate | steps | {' | '.join(f's at {rate}' for rate in rates)} | MB sent per host | ratio |",
        f"|---|---|---|{'---|' * (len(rates) + 2)}",
    ]
    for (transport, method), by_rate in rows.items():
        any_ = next(iter(by_rate.values()))
        cells = " | ".join(_seconds(by_rate.get(rate), best[rate]) for rate in rates)
        megabytes = any_["interface"]["mean_bytes"] / 1e6
        lines.append(
            f"| {LABELS[method]}, {transport} | {any_['learning_rate']:g} | {any_['steps']} | {cells} | "
            f"{megabytes:.1f} | {any_['ratio']:.1f} |"
        )
    return "\n".join(lines)


def of(records: Sequence[Record], rate: str) -> list[Record]:
    return [record for record in records if record["rate"] == rate]


def _seconds(record: Record | None, best: float) -> str:
    if record is None:
        return ""
    if not record["reached"]:
        return f"not reached ({record['accuracy']:.2%})"
    seconds = record["seconds"]["median"]
    return f"**{seconds:.1f}**" if seconds == best else f"{seconds:.1f}"


def plot(records: Sequence[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    shown = {(record["transport"], record["method"]): record for record in records}  # bytes are alike at all rates
    for (transport, method), record in shown.items():
        megabytes = [wire_bytes / 1e6 for _, _, wire_bytes, _ in record["curve"]]
        accuracy = [point[-1] for point in record["curve"]]
        color, line = f"C{list(LABELS).index(method)}", STYLES[transport]
        axes.plot(megabytes, accuracy, line, color=color, marker=".", label=f"{LABELS[method]}, {transport}")
    axes.set(xscale="log", xlabel="MB sent by each host so far (ledger)", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
