"""From times to the table, the JSON and the plot of ``python -m benchmarks.kernels``."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import new_figure, save_figure
from hvd_sketch.model.gradients import CHECK_EVERY


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    dim: int
    rows: int
    cols: int
    k: int
    oversample: int

    @property
    def candidates(self) -> int:
        return min(self.dim, self.oversample * self.k)


# Timed in turn with steps that are measured in it: the other copy is timed before, in other company.
COPY_BESIDE = "copy beside it"
BESIDE_IT = ("nominated step", "low-rank step")
# Bytes that must move through memory per coordinate; the table is taken to lie in the caches.
# What the GPU kernels must move beyond that, and through which memory, stands in hvd_sketch/kernels/gpu.py.
BYTES_PER_COORDINATE = {
    "copy": 8,
    "finite": 4,
    "feedback": 20,
    "sketch": 4,
    "feedback + sketch": 20,
    "estimate": 4,
    "checksum": 4,
    COPY_BESIDE: 8,
}
MOST_COPIES = {"few-bit codes": 1, "nominated step": 6}
TORCH_PEERS = {"sketch": "torch sketch", "recovery": "torch recovery", "step": "torch step"}
USES_OF_HASH = ("sketch", "feedback + sketch", "estimate")
L2_PROBES = ("L2 read", "L2 add")
# A probe's buffer: read anew by every launch, and well inside the level-2 cache (50 MB on an H100), of which half lies
# at the chip's other side. And how often it is walked in a launch, which alone takes as long as one or two walks.
L2_BUFFER_BYTES, L2_PASSES = 16 << 20, 32


def lines(elapsed: dict[str, list[float]], setting: Setting, l2_bytes: int = 0) -> list[dict]:
    """One record for each operation: its times and what they come to, as __main__.py says."""
    medians = {name: statistics.median(times) for name, times in elapsed.items()}
    copy_bytes_per_ms = BYTES_PER_COORDINATE["copy"] * setting.dim / medians["copy"]
    limits = limits_ms(medians, setting, l2_bytes)
    records = []
    for name, median_ms in medians.items():
        moved = BYTES_PER_COORDINATE.get(name, 0) * setting.dim
        if name in L2_PROBES:
            moved = L2_BUFFER_BYTES * L2_PASSES
        torch_ms = medians.get(TORCH_PEERS.get(name, ""))
        records.append(
            {
                "operation": name,
                "median_ms": median_ms,
                "min_ms": min(elapsed[name]),
                "copies": median_ms / medians[COPY_BESIDE if name in BESIDE_IT else "copy"],
                "bytes": moved or None,
                "bandwidth": moved / median_ms / copy_bytes_per_ms if moved else None,
                "times_torch": torch_ms / median_ms if torch_ms else None,
                "limit": limits[name] / median_ms if name in limits else None,
            }
        )
    return records


def limits_ms(medians: dict[str, float], setting: Setting, l2_bytes: int) -> dict[str, float]:
    """Least times by hvd_sketch/kernels/gpu.py, where L2 was probed and its ``l2_bytes`` hold the table twice."""
    if "L2 read" not in medians or 2 * 4 * setting.rows * setting.cols > l2_bytes:
        return {}
    copy_ms_per_byte = medians["copy"] / BYTES_PER_COORDINATE["copy"]  # for each coordinate
    limits = {}
    for name in USES_OF_HASH:
        probe_ms = medians["L2 read" if name == "estimate" else "L2 add"]
        l2_ms = 4 * setting.rows * setting.dim * probe_ms / (L2_BUFFER_BYTES * L2_PASSES)
        limits[name] = max(BYTES_PER_COORDINATE[name] * copy_ms_per_byte, l2_ms)
    return limits


def print_table(report: dict) -> None:
    print(f"\ndim {report['dim']:,}  rows {report['rows']}  cols {report['cols']:,}  k {report['k']:,}")
    # Title, the record's entry, width and format: columns of which no line has anything are left out.
    columns = [
        ("median ms", "median_ms", 11, ".2f"),
        ("min ms", "min_ms", 9, ".2f"),
        ("copies", "copies", 8, ".2f"),
        ("GB", "bytes", 7, ".2f"),
        ("bandwidth", "bandwidth", 11, ".0%"),
        ("x torch", "times_torch", 9, ".1f"),
        ("limit", "limit", 7, ".0%"),
    ]
    columns = [column for column in columns if any(line[column[1]] for line in report["lines"])]
    print(f"{'':20}" + "".join(f"{title:>{width}}" for title, _, width, _ in columns))
    for line in report["lines"]:
        values = {**line, "bytes": line["bytes"] and line["bytes"] / 1e9}
        cells = (f"{values[key]:{width}{form}}" if values[key] else " " * width for _, key, width, form in columns)
        print(f"{line['operation']:20}{''.join(cells)}".rstrip())
    print_shares(report)


def print_shares(report: dict) -> None:
    """The hash's share of what uses it, what comparing the ranks' parameters adds to a step, and a step's memory."""
    medians = {line["operation"]: line["median_ms"] for line in report["lines"]}
    shares = (f"{medians['hash alone'] / medians[name]:.0%} of {name}" for name in USES_OF_HASH)
    print("the hash alone takes as long as", ", ".join(shares))
    added = medians["checksum"] / CHECK_EVERY / medians["step"]
    print(f"a checksum of as many parameters in one of {CHECK_EVERY} steps adds {added:.2%} to a step")
    copies = {line["operation"]: line["copies"] for line in report["lines"]}
    print("; ".join(f"{name}: {copies[name]:.2f} copies (goal {most})" for name, most in MOST_COPIES.items()))
    extra, allowed = report["step_extra_bytes"], 0.05 * 4 * report["dim"] + 24 * report["oversample"] * report["k"]
    if extra is not None:
        print(f"a step's peak memory beyond u, v, g and the table: {extra / 1e6:.1f} MB (goal {allowed / 1e6:.1f} MB)")


def plot(reports: list[dict], path: Path) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for rows in sorted({report["rows"] for report in reports}):
        of = sorted((r for r in reports if r["rows"] == rows), key=lambda r: r["dim"])
        for name, style in (("feedback + sketch", ":"), ("recovery", "--"), ("step", "-"), ("torch step", "-.")):
            points = [(r["dim"], line["copies"]) for r in of for line in r["lines"] if line["operation"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=".", label=f"{name}, {rows} rows")
    axes.set(xscale="log", yscale="log", xlabel="coordinates", ylabel="time in copies of the vector")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)
