"""What time_to_accuracy.py runs on every host: search each method's learning rate, or train with it at each rate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks.image_data import hold_out, load_images
from benchmarks.models import MODELS
from benchmarks.network.clock import over_hosts, quantiles, slowest
from benchmarks.network.lab import UNSHAPED, shape_together, transport_on_host
from benchmarks.network.records import Record, Records, environment
from benchmarks.network.training import Course, Rate, Task, train
from hvd_sketch.transport import Transport

# method, its learning rate and momentum or None to search for them, and rates of the network without a record
Pending = tuple[str, dict[str, float] | None, list[str]]


def main(
    transport_name: str, lab: str, pending: list[Pending], data_dir: str | None, records: str, common: Record
) -> None:
    """``common``: what every record says of this call; see time_to_accuracy.py."""
    torch.set_num_threads(1)
    transport = transport_on_host(transport_name)
    kept = Records(Path(records))
    data = load_images(Path(data_dir) if data_dir else None)
    make_model = partial(MODELS[common["model"]], data.train_images.shape[1], common["hidden"])
    task = Task(data, make_model, *(common[name] for name in ("target", "batch", "most_steps", "steps_between")))
    found: dict[str, Rate] = {}
    for method, known, _ in pending:
        if known is None:
            shape_together(transport, lab, UNSHAPED)
            grid = [Rate(*each) for each in product(common["learning_rates"], common["momenta"])]
            searched = search(task, method, grid, transport)
            known = {name: searched[name] for name in ("learning_rate", "momentum")}
            about = {"method": method, "transport": transport_name} | common
            keep(kept, transport, about | {"search": True} | searched)
        found[method] = Rate(**known)
    for rate in dict.fromkeys(rate for _, _, rates in pending for rate in rates):
        shape_together(transport, lab, rate)
        methods = {method: found[method] for method, _, rates in pending if rate in rates}
        for method, measured in measure(task, methods, common["seeds"], transport).items():
            about = {"method": method, "transport": transport_name} | common
            keep(kept, transport, about | {"rate": rate} | asdict(found[method]) | measured)


def search(task: Task, method: str, grid: list[Rate], transport: Transport) -> Record:
    """The rate of the grid that reaches the target in the fewest steps, judged on held-out training images.

    Where none does, the one with the best accuracy in the end.
    """
    judged = replace(task, data=hold_out(task.data))
    steps: dict[Rate, int] = {}
    accuracy: dict[Rate, float] = {}
    limit = task.most_steps
    for rate in grid:
        course = train(judged, method, rate, transport, limit)
        accuracy[rate] = max(point[-1] for point in course.curve)
        if course.reached:
            limit = steps[rate] = course.steps
    best = min(grid, key=lambda each: (steps.get(each, task.most_steps + 1), -accuracy[each]))
    tried = [[each.learning_rate, each.momentum, steps.get(each), round(accuracy[each], 4)] for each in grid]
    return asdict(best) | {"tried": tried}


def measure(task: Task, methods: dict[str, Rate], seeds: int, transport: Transport) -> dict[str, Record]:
    """Training runs of each method on the whole training set: wall time, steps, bytes.

    The methods take turns, a seed each: so all of them see the machine in the same moods.
    """
    courses: dict[str, list[Course]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method, rate in methods.items():
            courses[method].append(train(replace(task, seed=seed), method, rate, transport))
    return {method: summary(each, transport) for method, each in courses.items()}


def summary(courses: list[Course], transport: Transport) -> Record:
    """What a record says of a method's runs, one for each seed. Communication: collective.

    Bytes and the curve are those of the run with the median number of steps.
    """
    seeds = len(courses)
    middle = sorted(courses, key=lambda course: course.steps)[seeds // 2]
    seconds = [slowest(transport, sum(course.step_s))[0] for course in courses]
    return {
        "reached": all(course.reached for course in courses),
        "seconds": quantiles(seconds) | {"repeats": seeds},
        "step_seconds": quantiles([step_s for course in courses for step_s in course.step_s]),
        "steps": round(sum(course.steps for course in courses) / seeds),
        "accuracy": round(sum(course.curve[-1][-1] for course in courses) / seeds, 4),
        "ledger_wire_bytes": middle.curve[-1][2],
        "interface": over_hosts(transport, middle.sent),
        "ratio": round(middle.ratio, 2),
        "curve": middle.curve,
    }


def keep(records: Records, transport: Transport, record: Record) -> None:
    if transport.rank == 0:
        records.append(record | environment())
        print({name: value for name, value in record.items() if name != "curve"}, flush=True)
    transport.barrier()


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
