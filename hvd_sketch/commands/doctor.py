"""``hvd-sketch doctor``: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvd_sketch.commands.findings import Finding, all_findings, hosts
from hvd_sketch.files import replaced

SELF_TEST_S = 90
RANKS = 2
COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}
PATHS = re.compile(r"(?<![\w/])/[\w.+~-]+(?:/[\w.+~-]+)+")  # of two parts at least


def examine(host_names: Sequence[str], self_test: bool) -> list[Finding]:
    """Everything. With ``self_test`` starts jobs of two ranks on this host."""
    return [*all_findings(), *hosts(host_names), *(self_tests() if self_test else ())]


def self_tests() -> Iterator[Finding]:
    """Two ranks under every launcher that is there exchange a few steps."""
    module = ("-m", "hvd_sketch.commands.self_test")
    python = sys.executable
    ranks = str(RANKS)
    lines = {
        "torch": (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *module, "torch"),
        "mpi": ("mpirun", "-n", ranks, "--oversubscribe", "--bind-to", "none", python, "-m", "mpi4py", *module, "mpi"),
        "horovod": ("horovodrun", "--gloo", "-np", ranks, python, *module, "horovod"),
    }
    for name, line in lines.items():
        if shutil.which(line[0]) is None:
            yield Finding(f"self-test, {name}", "note", f"no {line[0]} on PATH", "")
            continue
        yield run_job(f"self-test, {name}", line)


def run_job(name: str, line: Sequence[str]) -> Finding:
    """A command that is to end with status 0, in a time limit."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    _forget_job(environment)
    try:
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=SELF_TEST_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Finding(
            name, "wrong", f"two ranks did not finish in {SELF_TEST_S} s", f"run it yourself: {' '.join(line)}"
        )
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
        return Finding(name, "wrong", f"status {done.returncode}: {last}", f"run it yourself: {' '.join(line)}")
    return Finding(name, "ok", f"{RANKS} ranks agree, nothing is lost")


def _forget_job(environment: dict[str, str]) -> None:
    """Take out what the launcher of a job that this process belongs to has set."""
    for name in list(environment):
        if name.startswith(("OMPI_COMM", "PMIX_", "PMI_", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL")):
            del environment[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)


def show(found: Sequence[Finding], console: Console) -> None:
    """A table, then what is to be done."""
    table = Table(box=None, show_header=False)
    for finding in found:
        table.add_row(f"[{COLOURS[finding.state]}]{finding.state}[/]", finding.name, finding.told)
    console.print(table)
    for finding in found:
        if finding.mend:
            console.print(f"[{COLOURS[finding.state]}]{finding.name}[/]: {finding.mend}", highlight=False)


def as_json(found: Sequence[Finding]) -> str:
    """A list of findings."""
    return json.dumps([asdict(finding) for finding in found], indent=2)


def write_bundle(found: Sequence[Finding], file: Path, names: bool) -> None:
    """One text file to attach to a report of a fault; without ``names`` no host name, no user and no path is in it."""
    text = "".join(f"{f.state:5} {f.name}: {f.told}{' -- ' * bool(f.mend)}{f.mend}\n" for f in found)
    with replaced(file) as draft:
        draft.write_text(text if names else anonymous(text), encoding="utf-8")


def anonymous(text: str) -> str:
    """A text without absolute paths and without this host's name."""
    text = PATHS.sub("<path>", text)
    text = re.sub(r"\bhost [\w.-]+:", "host <name>:", text)
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", text)
