"""A small training in which one rank fails at one point; what test_table.py runs on every rank.

Arguments: transport, or "horovod-own" for Horovod's own collectives; ``<act>@<point>``, see ACTS and POINTS, a key of
EXTRA_STEPS, or "survive"; folder for checkpoints and the time of the failure, or of a normal end. It is rank 1 that
fails, or with ``<act>@<point> of rank 0`` that one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_sketch.model.checkpoint as checkpoint
from hvd_sketch import DistributedOptimizer, SketchConfig, broadcast_parameters, save_checkpoint
from hvd_sketch.transport import HorovodTransport, Transport, resolve_transport
from hvd_sketch.transport.base import Handle
from hvd_sketch.transport.forwarding import ForwardingTransport

RANK_VARIABLES = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
FAILING_RANK, FAILING_STEP = 1, 3
OF_RANK_0 = " of rank 0"
IN_STEP = ("agree", "second", "third", "fourth", "fifth", "last")  # before a step's 1st to 5th collective, and its last
POINTS = (
    *("start", "connected", "set-up", "broadcast", "data", "backward"),
    *IN_STEP,
    *("in flight", "accumulate", "averaged", "update", "save"),
)
NOTE = "failed_at"


def fail() -> None:
    raise RuntimeError("rank 1 fails on purpose")


ACTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "raise": fail,
    "exit 3": partial(sys.exit, 3),
    "exit 0": partial(sys.exit, 0),
    "hang": partial(time.sleep, 1000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
EXTRA_STEPS = {"one step more": 1, "one step less": -1, "end early": -1}  # of rank 1, without any other failure


class Fault:
    """What happens to this rank, and when.

    Args:
        act: a key of ACTS.
        point: where.
        folder: where the time is noted.
        rank: to which.
    """

    def __init__(self, act: str, point: str, folder: Path, rank: int = FAILING_RANK) -> None:
        self._act, self._point, self._folder = act, point, folder
        self.is_armed = next(os.environ[v] for v in RANK_VARIABLES if v in os.environ) == str(rank)

    def reach(self, point: str) -> None:
        if self.is_armed and point == self._point:
            (self._folder / NOTE).write_text(str(time.time()))
            ACTS[self._act]()


class Fatal(ForwardingTransport):
    """Reaches a point before each collective, and after starting one."""

    def __init__(self, inner: Transport, fault: Fault) -> None:
        super().__init__(inner)
        self.attendance = getattr(inner, "attendance", None)
        self.before: Callable[[], None] = lambda: None
        self._fault = fault

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        self.before()
        handle = super().start_reduce_scatter(tensor, ordered)
        self._fault.reach("in flight")
        return handle

    def allreduce_(self, tensor: Tensor) -> Tensor:
        self.before()
        return super().allreduce_(tensor)

    def allgather(self, tensor: Tensor) -> Tensor:
        self.before()
        return super().allgather(tensor)

    def alltoall(self, tensor: Tensor) -> Tensor:
        self.before()
        return super().alltoall(tensor)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        self.before()
        return super().reduce_scatter(tensor, ordered)


class Job:
    """Model, optimizer and transport of one rank."""

    def __init__(self, name: str, fault: Fault, folder: Path) -> None:
        fault.reach("start")
        self._fault, self._folder = fault, folder
        own = name == "horovod-own"
        self._transport = Fatal(HorovodTransport(carrier="horovod") if own else resolve_transport(name), fault)
        self.rank = self._transport.rank
        fault.reach("connected")
        self._transport.before = partial(fault.reach, "set-up")
        self._model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 30))
        inner = torch.optim.SGD(self._model.parameters(), lr=0.1)
        sketch = SketchConfig.paper(cols=300, k=60, momentum=0.0)
        self._optimizer = DistributedOptimizer(inner, self._model.named_parameters(), sketch, self._transport)
        exchange: Any = self._optimizer.exchange
        exchange.accumulate = partial(self._accumulate, exchange.accumulate)
        self._now = fault  # of the step that is under way
        self._transport.before = partial(fault.reach, "broadcast")
        broadcast_parameters(self._model.state_dict(), 0, self._transport)
        self._transport.before = lambda: None

    def step(self, step: int) -> None:
        fault = self._fault if step == FAILING_STEP else Fault("kill", "nowhere", self._folder)
        self._now = fault
        fault.reach("data")
        self._optimizer.zero_grad()
        loss = self._model(torch.randn(16, 40)).square().mean()
        loss.register_hook(lambda gradient: fault.reach("backward"))
        loss.backward()
        collectives = iter(IN_STEP[:-1])
        self._transport.before = lambda: fault.reach(next(collectives, "last"))
        self._optimizer.synchronize()
        self._transport.before = lambda: None
        fault.reach("averaged")
        self._optimizer.register_step_pre_hook(lambda *arguments: fault.reach("update"))
        with self._optimizer.skip_synchronize():
            self._optimizer.step()

    def _accumulate(self, accumulate: Callable[..., None], *arguments: Any) -> None:
        self._now.reach("accumulate")
        accumulate(*arguments)

    def save(self) -> None:
        save_checkpoint(self._folder / "checkpoints", self._model, self._optimizer)


def write_then_fail(fault: Fault, write: Callable[..., Any], *arguments: Any) -> Any:
    """Reach a point when a file of a checkpoint is written, and the manifest is not."""
    written = write(*arguments)
    fault.reach("save")
    return written


def train(job: Job, act: str, folder: Path, fault: Fault) -> None:
    """Steps and two checkpoints; where rank 1 makes another number of steps than the others, it notes the time."""
    is_odd = act in EXTRA_STEPS and job.rank == FAILING_RANK
    job.step(0)
    job.save()
    checkpoint.write_state = partial(write_then_fail, fault, checkpoint.write_state)
    if is_odd:
        (folder / NOTE).write_text(str(time.time()))
    for step in range(1, FAILING_STEP + 1 + is_odd * EXTRA_STEPS.get(act, 0)):
        job.step(step)
    if is_odd and act == "end early":
        return
    job.save()
    for step in range(FAILING_STEP + 1, FAILING_STEP + 4):
        job.step(step)


def main(name: str, what: str, path: str) -> None:
    folder = Path(path)
    if what == "survive":
        from tests.faults.survived import check_all

        transport = resolve_transport(name)
        print(f"rank {transport.rank} passed {check_all(transport, folder)} checks")
        (folder / NOTE).write_text(str(time.time()))
        return
    act, _, point = what.removesuffix(OF_RANK_0).partition("@")
    fault = Fault(act, point, folder, 0 if what.endswith(OF_RANK_0) else FAILING_RANK)
    train(Job(name, fault, folder), act, folder, fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
