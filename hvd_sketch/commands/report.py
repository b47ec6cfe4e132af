"""``hvd-sketch report``: what runs have done, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_sketch.files import replaced, require_other
from hvd_sketch.report.charts import charts
from hvd_sketch.report.page import page
from hvd_sketch.report.runs import Run, logs_of, read_run
from hvd_sketch.report.tables import configuration, figures, summary
from hvd_sketch.units import told_bytes


def write_report(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write a page about the runs that some logs tell of.

    Args:
        paths: logs of rank 0; those of its other ranks may be among them.
        output: is replaced.

    Returns:
        What was written, for JSON: the page, its size in bytes, and the figures of each run.

    Raises:
        ValueError: a file is no log; Plotly is not installed; the page would replace a log.
        OSError: the page could not be written.
    """
    try:
        from plotly.offline import get_plotlyjs  # not before: few have it
    except ImportError as error:
        raise ValueError("hvd-sketch report needs Plotly: pip install 'hvd_sketch[report]'") from error
    require_other(output, [log for path in paths for log in logs_of(path).values()])
    runs = read_runs(firsts_of(paths))
    names = [run.name for run in runs]
    text = page(", ".join(names), [summary(runs), configuration(runs)], charts(runs), names, get_plotlyjs())
    data = text.encode()
    with replaced(output) as draft:
        draft.write_bytes(data)
    return {"page": str(output), "page_bytes": len(data), "runs": [figures(run) for run in runs]}


def told(written: dict[str, Any]) -> str:
    """The same in words."""
    names, steps = ", ".join(run["name"] for run in written["runs"]), sum(run["steps"] for run in written["runs"])
    return f"{written['page']}: {names}, {steps:,} steps, {told_bytes(written['page_bytes'])}"


def firsts_of(paths: Sequence[Path]) -> list[Path]:
    """Those of some logs that are not of another rank of one of them, as ``run*.jsonl`` names them all."""
    others = {log.resolve() for path in paths for rank, log in logs_of(path).items() if rank}
    return [path for path in paths if path.resolve() not in others]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of some logs; those of one name are told apart by their folders. Raises ValueError."""
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]
