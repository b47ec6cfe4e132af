"""Checks of several tests in one launch: starting processes takes longer than most checks.

A test file registers its jobs when it is imported, so that a run of one file launches the jobs of this file alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hvd_sketch.transport import Transport
from tests.support.harness import launch, resolve


@dataclass(eq=False)
class Job:
    """One function on all ranks of a world."""

    world: World
    target: str
    kwargs: dict[str, Any]
    is_last: bool

    def results(self) -> list[Any]:
        """What it returned, in rank order; AssertionError with all output if any job of its world failed."""
        return [rank[self.world.jobs.index(self)] for rank in self.world.results()]


@dataclass
class World:
    """Jobs that one launch runs, one after the other."""

    kind: str
    ranks: int
    jobs: list[Job] = field(default_factory=list)
    _outcome: list[Any] | AssertionError | None = None

    def results(self) -> list[list[Any]]:
        if self._outcome is None:
            self.jobs.sort(key=lambda job: job.is_last)
            jobs = [(job.target, job.kwargs) for job in self.jobs]
            try:
                self._outcome = launch(self.kind, self.ranks, f"{__name__}:run", timeout_s=600, jobs=jobs)
            except AssertionError as error:
                self._outcome = error
        if isinstance(self._outcome, AssertionError):
            raise self._outcome
        return self._outcome


_worlds: dict[tuple[str, int], World] = {}


def register(kind: str, ranks: int, target: str, is_last: bool = False, **kwargs: Any) -> Job:
    """Have ``target`` run on ``ranks`` ranks of ``kind`` (see harness.LAUNCHERS) with the first test that asks.

    Args:
        is_last: it leaves the process in a state that other jobs should not meet.
    """
    world = _worlds.setdefault((kind, ranks), World(kind, ranks))
    job = Job(world, target, kwargs, is_last)
    world.jobs.append(job)
    return job


def run(transport: Transport, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Each job with a transport of its own."""
    results = []
    for target, kwargs in jobs:
        print(f"rank {transport.rank}: {target} {kwargs}", flush=True)  # shown if it fails
        results.append(resolve(target)(type(transport)(), **kwargs))
        transport.barrier()
    return results
