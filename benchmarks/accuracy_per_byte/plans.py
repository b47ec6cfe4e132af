"""Which groups of runs are to be done, most important first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy_per_byte.methods import FIRST, METHODS
from benchmarks.accuracy_per_byte.records import Group
from benchmarks.accuracy_per_byte.tasks import TASKS

OF_ADAM = tuple(name for name, method in METHODS.items() if method.inner != "adam")  # for tasks with Adam
LATER = tuple(name for name in METHODS if name not in (*FIRST, *OF_ADAM))
# Task, ranks, whether skewed, steps, ratio.
Place = tuple[str, int, bool, int, float]
TARGETS: Sequence[Place] = (
    ("mnist", 4, False, 400, 150.0),
    ("cifar", 4, False, 300, 150.0),
    ("cifar", 4, False, 1500, 150.0),
    ("cifar2m", 4, False, 400, 1000.0),
    ("mnist", 4, True, 400, 150.0),
    ("cifar", 16, False, 300, 150.0),
    ("mnist", 4, False, 400, 60.0),
    ("cifar", 4, False, 1500, 60.0),
    ("cifar2m", 4, False, 400, 150.0),
    ("lm", 4, False, 300, 60.0),
    ("lm", 4, False, 1500, 60.0),
    ("mnist", 4, False, 400, 20.0),
    ("cifar", 4, False, 1500, 20.0),
    ("mnist", 4, False, 400, 500.0),
    ("cifar", 4, False, 1500, 500.0),
    ("cifar", 64, False, 300, 150.0),
    ("lm", 4, False, 1500, 150.0),
)


def groups_at(places: Iterable[Place], methods: Iterable[str]) -> list[Group]:
    """A group for every place and method; the dense exchange once for all ratios."""
    methods = list(methods)
    groups = []
    for task, workers, skewed, steps, ratio in places:
        for method in methods:
            groups.append(Group(task, workers, skewed, steps, method, 1.0 if method == "dense" else ratio))
    return list(dict.fromkeys(groups))


def targets() -> list[Group]:
    """Every place with the methods that matter most, in order of priority; then those for Adam; then the others."""
    with_adam = [place for place in TARGETS if TASKS[place[0]].adam]
    return groups_at(TARGETS, FIRST) + groups_at(with_adam, OF_ADAM) + groups_at(TARGETS, LATER)


PLANS = {"targets": targets}


def crossed(
    tasks: Sequence[str],
    methods: Sequence[str],
    ratios: Sequence[float],
    workers: Sequence[int],
    skewed: bool,
    steps: int | None,
) -> list[Group]:
    """Every combination of what the command line names; steps default to the task's own."""
    places = [
        (task, ranks, skewed, steps or TASKS[task].steps, ratio)
        for task in tasks
        for ranks in workers
        for ratio in ratios
    ]
    return groups_at(places, methods)
