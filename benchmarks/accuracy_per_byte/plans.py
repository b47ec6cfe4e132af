"""Which groups of runs are to be done, most important first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy_per_byte.methods import AHEAD, CROSSED, FIRST, METHODS
from benchmarks.accuracy_per_byte.records import Group
from benchmarks.accuracy_per_byte.tasks import TASKS

OF_ADAM = ("nominate4-lag", "sketch4-lag", "random4-lag", "nominate4-sign", "sketch4-sign", "random4-sign")
LATER = ("lowrank8", "local32", "paper", "powersgd16", "powersgd32", "truetopk")
WINNERS = ("dense", "lowrank4", "nominate4-lag", "nominate4-lag-ahead", "random4-sign")
RIVALS = ("demo", "powersgd16", "lowrank16", "lowrank8", "dense16", "sketch4-sign")
ROUNDS = ("dense-rounds", "nominate4-rounds", "lowrank4-rounds", "sparseloco")
BY_RANKS = ("lowrank4", "nominate4-lag", "nominate4-lag-ahead", "random4-sign", "demo", "sparseloco")
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
    ("cifar", 4, True, 300, 150.0),
    ("mnist", 4, False, 2000, 150.0),
    ("mnist", 4, False, 2000, 60.0),
    ("lm", 4, False, 300, 60.0),
    ("cifar", 4, False, 1500, 60.0),
    ("cifar", 4, True, 300, 60.0),
    ("cifar2m", 4, False, 400, 150.0),
    ("lm", 4, False, 1500, 60.0),
    ("mnist", 4, False, 400, 20.0),
    ("cifar", 4, False, 1500, 20.0),
    ("mnist", 4, False, 400, 500.0),
    ("cifar", 4, False, 1500, 500.0),
    ("cifar", 64, False, 300, 150.0),
    ("lm", 4, False, 1500, 150.0),
)
BEGINNING = TARGETS[:4]
SHORT = [place for place in BEGINNING if place[3] < 1000]  # where all methods come early


def groups_at(places: Iterable[Place], methods: Iterable[str]) -> list[Group]:
    """A group for every place and method; those whose ratio is fixed once for all ratios."""
    methods = list(methods)
    groups = []
    for task, workers, skewed, steps, ratio in places:
        for method in methods:
            groups.append(Group(task, workers, skewed, steps, method, METHODS[method].fixed_ratio or ratio))
    return list(dict.fromkeys(groups))


def targets() -> list[Group]:
    """The first places with the methods that matter most, then with the others; then all places alike."""
    with_adam = [place for place in TARGETS if TASKS[place[0]].adam]
    groups = groups_at(BEGINNING, FIRST) + groups_at(SHORT, LATER)
    groups += groups_at(TARGETS, FIRST) + groups_at(with_adam, OF_ADAM) + groups_at(TARGETS, LATER)
    return list(dict.fromkeys(groups))


def language() -> list[Group]:
    """Language models, most important first: see :mod:`benchmarks.language_model`."""
    groups = groups_at([("lm", 4, False, 300, 60.0)], (*WINNERS, *AHEAD, *RIVALS))
    groups += groups_at([("wikitext", 4, False, 300, 60.0)], WINNERS)
    groups += groups_at([("finetune", 4, False, 300, 60.0)], WINNERS)
    groups += groups_at([("lm", 4, False, 300, 320.0)], ROUNDS)
    groups += groups_at([("lm64", ranks, False, 150, 60.0) for ranks in (4, 16, 64)], BY_RANKS)
    groups += groups_at([("lm", 4, False, steps, 60.0) for steps in (300, 1500)], ("dense-muon", "lowrank4-muon"))
    groups += groups_at([("lm", 4, False, 1500, 60.0)], (*WINNERS, "lowrank4-ahead", "demo"))
    groups += groups_at([("lm", 4, False, 1500, 320.0)], ROUNDS)
    groups += groups_at([("wikitext1m", 4, False, 300, 60.0)], WINNERS)
    return list(dict.fromkeys(groups))


def inner_optimizers() -> list[Group]:
    """Every source into every inner optimizer."""
    names = [name for name in METHODS if name.split("-")[0] in CROSSED and METHODS[name].every == 1]
    names = [name for name in names if not METHODS[name].ahead]
    return groups_at([("lm", 4, False, 300, 60.0)], names)


PLANS = {"targets": targets, "language": language, "inner": inner_optimizers}


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
