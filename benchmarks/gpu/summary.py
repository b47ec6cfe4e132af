"""OUT/summary.md: what a call of ``run_all.sh`` has found. ``python -m benchmarks.gpu.summary OUT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import markdown
from benchmarks.gpu.record import Record, read
from hvd_sketch.files import replaced

NOT_MEASURED = "not measured"
STEP_LIMITS_MS = {"H200": 3.0, "H100": 4.5}  # of a whole local step, 100 M coordinates, 3 rows
LEAST_LIMIT = 0.5  # of the derived bound that accumulate and estimate shall reach
MOST_OVER_DENSE = 1.1
GOAL_DIM, GOAL_ROWS = 100_000_000, 3


def sections(folder: Path) -> Iterator[str]:
    """In Markdown."""
    record = read(folder)
    path = folder / "kernels.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.exists() else []
    machine = record.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    title = "Rehearsal" if machine.get("rehearsal") else "Record of a GPU"
    yield f"# {title}\n\n{machine.get('device')}; {versions}; commit {machine.get('commit')}."
    if record.get("notes"):
        yield "\n".join(f"- {note}" for note in record["notes"])
    yield "## Parts\n\n" + _parts(record)
    yield "## Goals\n\n" + _goals(record, kernels, str(machine.get("device")))
    yield "## Kernels\n\n" + (_kernels(kernels) or NOT_MEASURED)
    for name, table in (("Coding", _coding), ("Ranks", _ranks), ("Training step", _steps)):
        yield f"## {name}\n\n" + (table(record) or NOT_MEASURED)
    for part in ("training", "language"):
        yield f"## {record.get(part, {}).get('title', part)}\n\n" + (_training(record.get(part, {})) or NOT_MEASURED)


def _parts(record: Record) -> str:
    rows = [
        (name, "passed" if part["status"] == 0 else f"status {part['status']}", str(part["seconds"]))
        for name, part in record.items()
        if isinstance(part, dict) and "status" in part
    ]
    return markdown("part | result | seconds", rows)


def _goals(record: Record, kernels: list[Record], device: str) -> str:
    lines = _lines_of(kernels, GOAL_DIM, GOAL_ROWS)
    goal_ms = next((ms for name, ms in STEP_LIMITS_MS.items() if name in device), None)
    steps = {row["exchange"]: row for row in record.get("steps", {}).get("rows", [])}
    profile = record.get("steps", {}).get("profile, sketched 20x")
    rows = []
    if "step" in lines:
        rows.append(("whole local step, 100 M, 3 rows", f"{goal_ms} ms", f"{lines['step']['median_ms']:.2f} ms"))
    for name in ("sketch", "estimate"):
        if lines.get(name, {}).get("limit"):
            rows.append((f"{name}, of its limit", f"{LEAST_LIMIT:.0%}", f"{lines[name]['limit']:.0%}"))
    if profile:
        goal = f"{profile['collectives']:.1f}, one per collective"
        rows.append(("waits of the host in a step", goal, f"{profile['host_waits']:.1f}"))
    if "sketched 20x" in steps:
        found = f"{steps['sketched 20x']['over_dense']:.3f}"
        rows.append(("training step, sketched 20x over dense", str(MOST_OVER_DENSE), found))
    return markdown("what | goal | found", rows) if rows else NOT_MEASURED


def _lines_of(kernels: list[Record], dim: int, rows: int) -> dict[str, Record]:
    """The operations of one setting by name."""
    setting = next((one for one in kernels if one["dim"] == dim and one["rows"] == rows), {"lines": []})
    return {line["operation"]: line for line in setting["lines"]}


def _kernels(kernels: list[Record]) -> str:
    if not kernels:
        return ""
    names = [line["operation"] for line in kernels[0]["lines"]]
    head = " | ".join(["operation", *(f"{s['dim'] / 1e6:g} M, {s['rows']} rows" for s in kernels)])
    settings = [_lines_of(kernels, s["dim"], s["rows"]) for s in kernels]
    rows = [(name, *(_cell(lines[name]) if name in lines else "" for lines in settings)) for name in names]
    told = "Milliseconds, copies of the vector, share of the derived limit (which is none where a launch takes longer)."
    return f"{told}\n\n" + markdown(head, rows)


def _cell(line: Record) -> str:
    limit = f", {line['limit']:.0%}" if line["limit"] else ""
    return f"{line['median_ms']:.3f}, {line['copies']:.2f}{limit}"


def _coding(record: Record) -> str:
    part = record.get("coding", {})
    rows = [
        [f"{row['count']:,}", *(f"{ms:.2f}" for n, ms in row.items() if n != "count")] for row in part.get("rows", [])
    ]
    if not rows:
        return ""
    names = [name for name in part["rows"][0] if name != "count"]
    return f"Milliseconds; positions below {part['span']:,}, the codes of {part['ranks']} ranks.\n\n" + markdown(
        " | ".join(["positions", *names]), rows
    )


def _ranks(record: Record) -> str:
    jobs = {name: job for name, job in record.get("ranks", {}).items() if isinstance(job, dict)}
    rows = [
        (
            f"{name}, {job['ranks']} ranks",
            f"{row['dim']:,}",
            row["method"],
            f"{row['ms']:.2f}",
            f"{row['collectives']:g}",
            f"{row['staged_bytes'] / 1e6:.2f}",
        )
        for name, job in jobs.items()
        for row in job["rows"]
    ]
    return markdown("carrier | coordinates | method | ms | collectives | MB staged", rows) if rows else ""


def _steps(record: Record) -> str:
    part = record.get("steps", {})
    rows = [(row["exchange"], f"{row['ms']:.2f}", f"{row['over_dense']:.3f}") for row in part.get("rows", [])]
    if not rows:
        return ""
    profiles = [
        f"{name}: {p['device_us']:.0f} µs on the device, {p['launches']:.0f} launches, {p['host_waits']:.1f} waits"
        for name, p in part.items()
        if name.startswith("profile")
    ]
    table = markdown("exchange | ms | over dense", rows)
    return f"ResNet-9, batch {part['batch']}.\n\n{table}\n\n" + "  \n".join(profiles)


def _training(part: dict[str, Any]) -> str:
    rows = [
        (
            row["method"],
            f"{row['ratio']:g}",
            f"{row['matrix_ratio']:.0f}" if row["matrix_ratio"] else "",
            "diverged"
            if row["diverged"]
            else f"{row['acc']:.1f} %"
            if row["acc"] is not None
            else f"{row['loss']:.3f}",
            f"{row['steps']}",
            f"{row['seconds'] / row['steps'] * 1e3:.0f}",
        )
        for row in part.get("rows", [])
    ]
    head = "method | ratio asked | ratio | result | steps | ms a step, four workers"
    return markdown(head, rows) if rows else ""


def main() -> None:
    folder = Path(sys.argv[1])
    text = "\n\n".join(sections(folder)) + "\n"
    with replaced(folder / "summary.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
