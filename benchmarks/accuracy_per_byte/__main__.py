"""Command line of the comparison: see ``benchmarks/accuracy_per_byte/__init__.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.accuracy_per_byte import records, report
from benchmarks.accuracy_per_byte.methods import FIRST, METHODS
from benchmarks.accuracy_per_byte.plans import PLANS, crossed
from benchmarks.accuracy_per_byte.schedule import run_all
from benchmarks.accuracy_per_byte.subjects import IMAGES, Subject
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.paper.command_line import says_plainly

RESULTS = Path(__file__).parents[1] / "results" / "accuracy_per_byte" / "runs.jsonl"


def parser(name: str) -> argparse.ArgumentParser:
    """Of all arguments of ``python -m name``."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description="Accuracy at equal wire bytes.")
    made.add_argument("--data-dir", type=Path, help="folder with mnist/, cifar10/ and text/")
    made.add_argument("--plan", choices=PLANS, help="groups of runs in order of priority")
    made.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="in place of a plan (default: mnist)")
    told = "of methods.py (default: the main ones)"
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(FIRST), metavar="METHOD", help=told)
    made.add_argument("--ratios", nargs="+", type=float, default=[150.0], help="times fewer bytes (default: 150)")
    made.add_argument("--workers", nargs="+", type=int, default=[4], help="ranks (default: 4)")
    made.add_argument("--skewed", action="store_true", help="every rank has two or three classes only")
    made.add_argument("--steps", type=int, help="default: the task's own")
    made.add_argument("--seeds", type=int, default=3, help="runs at the best rate (default: %(default)s)")
    made.add_argument("--finer", action="store_true", help="also rates a factor of 1.41 on either side of the best")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="records (default: %(default)s)")
    made.add_argument("--minutes", type=float, help="after which no run is started")
    made.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    made.add_argument("--report", action="store_true", help="only the table and the figures, beside the records")
    made.add_argument("--folder", type=Path, help="of the report (default: beside the records)")
    return made


def parse(name: str, **defaults: Any) -> argparse.Namespace:
    """What the user gave, refused where it cannot work."""
    made = parser(name)
    made.set_defaults(**defaults)
    arguments = made.parse_args()
    if arguments.data_dir is None and not arguments.report:
        made.error("--data-dir is needed to train")
    if arguments.tasks or not arguments.plan:
        arguments.plan, arguments.tasks = None, arguments.tasks or ["mnist"]
    without_adam = [name for name in arguments.tasks or () if not TASKS[name].adam]
    unfit = [name for name in arguments.methods if METHODS[name].is_for_text]
    if without_adam and unfit:
        made.error(f"--methods {' '.join(unfit)} are for tasks with Adam, not for {' '.join(without_adam)}")
    for name in ("seeds", "processes", "steps", "workers"):
        given = getattr(arguments, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            made.error(f"--{name} must be at least 1, got {given}")
    return arguments


def compare(name: str, subject: Subject, **defaults: Any) -> None:
    """Run what is missing, then write the report; ``defaults`` are those of the arguments."""
    arguments = parse(name, **defaults)
    if not arguments.report:
        chosen = arguments.tasks, arguments.methods, arguments.ratios, arguments.workers
        groups = PLANS[arguments.plan]() if arguments.plan else crossed(*chosen, arguments.skewed, arguments.steps)
        limits = {"finer": arguments.finer, "processes": arguments.processes, "minutes": arguments.minutes}
        run_all(groups, arguments.seeds, arguments.data_dir, arguments.out, **limits)
    print(report.write(records.read(arguments.out), arguments.folder or arguments.out.parent, subject))


@says_plainly
def main() -> None:
    compare("benchmarks.accuracy_per_byte", IMAGES)


if __name__ == "__main__":
    main()
