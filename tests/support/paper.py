"""What tests of several experiments in benchmarks/paper need: small data, what a run showed, and an interruption."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.experiment import INTERRUPTED
from tests.support.harness import run_command, started, wait_until


def write_mnist(folder: Path) -> Path:
    """MNIST's four files with few images, a blob per class in noise; returns the folder."""
    draw = np.random.default_rng(0)
    blobs = draw.integers(0, 256, (10, 784))
    for part, count in (("train", 300), ("t10k", 100)):
        labels = draw.integers(0, 10, count, dtype=np.uint8)
        images = (blobs[labels] + draw.integers(0, 256, (count, 784))) // 2
        header = struct.pack(">4i", 0x0803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x0801, count) + labels.tobytes())
    return folder


def runs(results: Path) -> list[dict[str, Any]]:
    """What a session's runs showed, without what differs from call to call."""
    found = json.loads(results.read_text())["runs"]
    return [{name: figure for name, figure in run.items() if name not in ("seconds", "commit")} for run in found]


def interrupt(line: list[str], log: Path, text: str) -> int:
    """Ctrl-C once a command has written a text into its log; the exit status."""
    with started(line, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: log.exists() and text in log.read_text(), 100)
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=30)


def log_of_a_resumption(command: list[str], folder: Path, text: str) -> list[dict[str, Any]]:
    """Interrupt a command once its log has a text, resume it, compare with a whole one; the log of both parts."""
    whole, broken = folder / "whole.json", folder / "broken.json"
    status, output = run_command([*command, "--json", str(whole)], timeout_s=150)
    assert status == 0, output
    log = broken.with_suffix(".log.jsonl")
    assert interrupt([*command, "--json", str(broken)], log, text) == INTERRUPTED
    status, output = run_command([*command, "--json", str(broken), "--resume"], timeout_s=150)
    assert status == 0, output
    assert runs(broken) == runs(whole)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line.get("event") == "interrupted" for line in lines)
    return lines
