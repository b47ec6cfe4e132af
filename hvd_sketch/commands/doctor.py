"""``hvd-sketch doctor``: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_sketch.commands.finding import Finding
from hvd_sketch.commands.findings import all_findings, hosts
from hvd_sketch.commands.jobs import self_tests

COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}
# The innermost launcher first: srun starts torchrun and mpirun, and not the other way round.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def other_rank() -> str:
    """Why this process need not look and write, "RANK is 1"; "": it is no rank of a job, or its first.

    The launcher that started it counts, where that runs under another one.
    """
    name = next((name for name in RANKS if os.environ.get(name)), None)
    return "" if name is None or os.environ[name] == "0" else f"{name} is {os.environ[name]}"


def host_names(file: Path | None) -> list[str]:
    """The hosts of a host file, of lines ``host slots=N``. Lines that begin with ``#`` are comments."""
    lines = file.read_text().splitlines() if file is not None else []
    return [line.split()[0] for line in lines if line.split("#")[0].strip()]


def examine(names: Sequence[str], self_test: bool) -> list[Finding]:
    """Everything, also of other hosts. With ``self_test`` starts jobs of two ranks on this host."""
    return [*all_findings(), *hosts(names), *(self_tests() if self_test else ())]


def show(found: Sequence[Finding], console: Console) -> None:
    """A table, then what is to be done. Brackets in a text are text."""
    table = Table(box=None, show_header=False)
    for finding in found:
        table.add_row(Text(finding.state, COLOURS[finding.state]), Text(finding.name), Text(finding.told))
    console.print(table)
    for finding in found:
        if finding.mend:
            console.print(Text.assemble((finding.name, COLOURS[finding.state]), f": {finding.mend}"))


def as_json(found: Sequence[Finding]) -> str:
    """A list of findings."""
    return json.dumps([asdict(finding) for finding in found], indent=2)
