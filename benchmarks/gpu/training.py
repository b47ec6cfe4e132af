"""ResNet-9 and the language model of 124 M at equal wire bytes, four simulated workers on one GPU.

``python -m benchmarks.gpu.training OUT DATA_DIR training``, or ``language``. A first run of some steps tells how many
steps of every method fit into the seconds of the variable ``BUDGET_S``; all methods then take equally many, at the
learning rate in the middle of the first grid of :mod:`benchmarks.accuracy_per_byte`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_per_byte import tasks
from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group, Run
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.accuracy_per_byte.training import begin, train
from benchmarks.gpu.record import add
from benchmarks.paper.resnet9 import ResNet9

WORKERS = 4
TRIED_STEPS = 4
REHEARSED_RATIO = 100.0  # at most: the model of a rehearsal is so small that its factors of rank 1 take more bytes
RESERVE = 0.85  # of the time that is left: evaluations take the rest
# Method and ratio, the most important first.
RESNET9 = [
    ("dense", 1.0),
    ("paper", 20.0),
    ("nominate4", 150.0),
    ("lowrank4", 150.0),
    ("sketch4", 150.0),
    ("paper", 10.0),
]
LANGUAGE = [("dense", 1.0), ("lowrank4", 60.0), ("nominate4-lag-ahead", 60.0)]
PARTS = {"training": ("resnet9", RESNET9), "language": ("wikitext124m", LANGUAGE)}


def steps_that_fit(task: str, methods: Sequence[tuple[str, float]], data_dir: Path, seconds: float) -> int:
    """Of each method in turn, by the time that the slowest takes of those that can train."""
    step_s = 0.0
    for method, ratio in methods:
        try:
            step_s = max(step_s, seconds_of_step(task, method, ratio, data_dir))
        except Exception:  # the others are still worth their time
            traceback.print_exc()
    if not step_s:
        sys.exit(f"{task}: no method can train")
    print(f"{task}: {step_s * 1e3:.0f} ms a step of the slowest method", flush=True)
    return max(min(int(seconds * RESERVE / len(methods) / step_s), TASKS[task].steps), 2)


def seconds_of_step(task: str, method: str, ratio: float, data_dir: Path) -> float:
    """Of four workers together, once everything is compiled."""
    group = Group(task, WORKERS, False, TASKS[task].steps, method, ratio)
    training = begin(Run(group, METHODS[method].first_rate(TASKS[task], group.steps), 0), data_dir)
    training.step()
    _finish_work()
    started = time.perf_counter()
    for _ in range(TRIED_STEPS):
        training.step()
    _finish_work()
    return (time.perf_counter() - started) / TRIED_STEPS


def _finish_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(out: Path, data_dir: Path, part: str, is_rehearsal: bool) -> None:
    """Train by every method, and keep each result as it comes."""
    started, budget_s = time.monotonic(), float(os.environ.get("BUDGET_S", "600"))
    torch.set_float32_matmul_precision("high")  # as people train
    task, methods = PARTS[part]
    if is_rehearsal:
        _shrink()
    else:
        steps_that_fit(task, methods[:1], data_dir, 1.0)  # the data, and the first use of everything
    left_s = budget_s - (time.monotonic() - started)
    steps = 2 if is_rehearsal else steps_that_fit(task, methods, data_dir, left_s)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for method, ratio in methods:
        group = Group(task, WORKERS, False, steps, method, ratio)
        nominal = min(ratio, REHEARSED_RATIO) if is_rehearsal else ratio
        try:  # without the trial that sets the bytes right: the record has those that were sent
            rows.append(train(Run(group, METHODS[method].first_rate(TASKS[task], steps), 0), data_dir, nominal))
        except Exception:
            traceback.print_exc()
            failed.append(method)
            continue
        print(rows[-1], flush=True)
        add(out, part, title=TASKS[task].title, rows=rows)
    if failed:
        sys.exit(f"{part}: {', '.join(failed)} failed")


def _shrink() -> None:
    """Models of a size that a CPU trains in seconds."""
    small = {"resnet9": lambda classes: ResNet9(4), "wikitext124m": TASKS["wikitext"].make_model}
    for name, make in small.items():
        tasks.TASKS[name] = replace(TASKS[name], make_model=make, per_worker=2)
    tasks.TASKS["wikitext124m"] = replace(TASKS["wikitext124m"], load=TASKS["wikitext"].load)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    run(arguments.out, arguments.data_dir, arguments.part, arguments.rehearse)


if __name__ == "__main__":
    main()
