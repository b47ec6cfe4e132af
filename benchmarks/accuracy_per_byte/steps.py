"""Training step by step: simulated ranks exchange gradients, a plain optimizer follows, bytes are from the ledger."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.accuracy_per_byte.data import Batch, Data
from benchmarks.accuracy_per_byte.inner import make_inner
from benchmarks.accuracy_per_byte.methods import METHODS, Place, matrices, place_of
from benchmarks.accuracy_per_byte.records import Run
from benchmarks.accuracy_per_byte.settings import dense_bytes
from benchmarks.accuracy_per_byte.tasks import TASKS, Task, initial_model
from hvd_sketch import Simulation
from hvd_sketch.ledger import CommLedger
from hvd_sketch.wire_bytes import DENSE_BYTES

JUDGED_AFTER = 61  # steps; then a loss well above that of the first step is a divergence


class Training:
    """A model, its optimizer and the exchange of its gradients.

    Args:
        run: what to train.
        data: of the task.
        nominal_ratio: asked of the method's settings; default: the group's own.
        start: the weights to begin with; default: those of the seed.

    Attributes:
        model: of rank 0.
    """

    def __init__(
        self, run: Run, data: Data, nominal_ratio: float | None = None, start: dict[str, Tensor] | None = None
    ) -> None:
        group = run.group
        self.run, self.data, self.task, self.method = run, data, TASKS[group.task], METHODS[group.method]
        self.model = initial_model(self.task, data.classes, run.seed)
        if start is not None:
            self.model.load_state_dict(start)
        named = list(self.model.named_parameters())
        ratio = (nominal_ratio or group.ratio) / self.method.every
        self._begin(place_of(named, group.workers, ratio, run.seed))
        self._batches = data.batches(group.workers, self.task.batch(group.workers), run.seed, group.skewed)
        self._first_loss = math.nan
        self.done = 0
        self.gradient_s = 0.0  # time spent in the model itself

    def _begin(self, place: Place) -> None:
        """Make the exchange and what steps after it."""
        self.simulation: Simulation = self.method.simulate(list(self.model.named_parameters()), place, self.task.adam)
        self.optimizer = optimizer_for(self.task, self.model, self.run.group.method)
        self.simulation.prepare(self.optimizer)

    @property
    def ledger(self) -> CommLedger:
        """Of rank 0."""
        return self.simulation.ledger

    def step(self) -> bool:
        """One step of all workers; False if the training has diverged."""
        losses = []
        for worker, batch in enumerate(next(self._batches)):
            with self.simulation.ahead(worker, self.optimizer) if self.method.ahead else nullcontext():
                losses.append(self._differentiate(self.model, batch))
            if not self._accumulate(worker, losses[-1]):
                return False
        self.simulation.agree()
        set_rate(self.optimizer, rate_at(self.run, self.done))
        self.optimizer.step()
        return self._goes_on(losses)

    def finish(self) -> None:
        """After the last step: all ranks have the same parameters."""

    def _differentiate(self, model: nn.Module, batch: Batch) -> float:
        """Leave a batch's gradients with the parameters; returns its loss."""
        model.zero_grad()
        started = time.perf_counter()
        loss = self.data.loss(model, batch)
        loss.backward()
        self.gradient_s += time.perf_counter() - started
        return float(loss.detach())

    def _goes_on(self, losses: list[float]) -> bool:
        """Count a step; False if the training has diverged."""
        loss_now = sum(losses) / len(losses)
        if self.done == 0:
            self._first_loss = loss_now
        self.done += 1
        return self.done <= JUDGED_AFTER or loss_now <= max(2 * self._first_loss, 3)

    def _accumulate(self, worker: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return False
        try:
            self.simulation.accumulate(worker)
        except FloatingPointError:
            return False
        return True

    def matrix_ratio(self) -> float:
        """Bytes of a dense ring allreduce of the matrices over those sent for them, so far.

        The dense exchange of the other tensors shares the ledger; its bytes are known and taken off. A method that
        compresses them, too, has the whole model's ratio.
        """
        if self.method.takes_all:
            return self.ledger.compression_ratio()
        sizes = [p.numel() for p in self.model.parameters()]
        dim = sum(p.numel() for p in matrices(list(self.model.named_parameters())))
        sent = DENSE_BYTES * sum(sizes) / self.ledger.compression_ratio()
        rest = sum(sizes) - dim
        return DENSE_BYTES * dim / (sent - dense_bytes(rest, self.run.group.workers) / self.method.every)


def optimizer_for(task: Task, model: nn.Module, method: str) -> torch.optim.Optimizer:
    """What goes with a method; its rate is set in every step."""
    parameters: list[Tensor] = list(model.parameters())
    if task.adam:
        return make_inner(METHODS[method].inner, model, task.weight_decay)
    momentum = {"momentum": 0.9, "nesterov": True} if METHODS[method].kind == "nesterov" else {}
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=task.weight_decay, **momentum)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def rate_at(run: Run, step: int) -> float:
    """The learning rate of a step, from 0: up over the first tenth, and down all the way."""
    steps = run.group.steps
    down = 0.55 + 0.45 * math.cos(math.pi * step / steps) if TASKS[run.group.task].cosine else 1 - step / steps
    return run.rate * min(1, (step + 1) / max(steps // 10, 1)) * down
