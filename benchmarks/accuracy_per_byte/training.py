"""One run: a model trained by simulated ranks, plain optimizer after the exchange, bytes from the ledger."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy_per_byte.data import Batch, Data
from benchmarks.accuracy_per_byte.inner import make_inner
from benchmarks.accuracy_per_byte.methods import METHODS, Place, matrices, place_of
from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.accuracy_per_byte.settings import dense_bytes
from benchmarks.accuracy_per_byte.tasks import BASE_WORKERS, TASKS, Task, initial_model, load
from benchmarks.paper.rate_search import rounded
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

        The dense exchange of the other tensors shares the ledger; its bytes are known and taken off.
        """
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
    if METHODS[method].kind == "nesterov":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
    return torch.optim.SGD(parameters, lr=0.1)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def rate_at(run: Run, step: int) -> float:
    """The learning rate of a step, from 0: up over the first tenth, and down all the way."""
    steps = run.group.steps
    down = 0.55 + 0.45 * math.cos(math.pi * step / steps) if TASKS[run.group.task].cosine else 1 - step / steps
    return run.rate * min(1, (step + 1) / max(steps // 10, 1)) * down


def begin(run: Run, data_dir: Path, nominal_ratio: float | None = None) -> Training:
    """What a run begins as; arguments as for :func:`train`."""
    from benchmarks.accuracy_per_byte.rounds import RoundsTraining

    task = TASKS[run.group.task]
    start = weights_of(task.begins_with, data_dir) if task.begins_with else None
    kind = RoundsTraining if METHODS[run.group.method].every > 1 else Training
    return kind(run, load(run.group.task, data_dir), nominal_ratio, start)


@lru_cache(maxsize=1)
def weights_of(task: str, data_dir: Path) -> dict[str, Tensor]:
    """Of a task's model after a dense training at its first rate, of seed 0; once per process."""
    group = Group(task, BASE_WORKERS, False, TASKS[task].steps, "dense", 1.0)
    training = begin(Run(group, METHODS["dense"].first_rate(TASKS[task], group.steps), 0), data_dir)
    while training.done < group.steps:
        assert training.step(), "the first rate of a task does not diverge"
    return training.model.state_dict()


def train(run: Run, data_dir: Path, nominal_ratio: float | None = None) -> Record:
    """Train to the end or until it diverges; returns the record, without the commit.

    Args:
        run: what to train.
        data_dir: the folder of all data sets.
        nominal_ratio: of an earlier run of the group, to save the trial; see :func:`find_nominal_ratio`.
    """
    started = time.perf_counter()
    data = load(run.group.task, data_dir)
    nominal = nominal_ratio or find_nominal_ratio(run.group, data_dir)
    training = begin(run, data_dir, nominal)
    loaded = time.perf_counter()
    diverged = False
    while training.done < run.group.steps and not diverged:
        diverged = not training.step()
    training.finish()
    trained_s = time.perf_counter() - loaded
    acc, loss = data.evaluate(training.model)
    diverged = diverged or not math.isfinite(loss)
    figures = {"acc": None if diverged or acc is None else round(acc, 3), "loss": None if diverged else round(loss, 5)}
    times = {"setup_s": loaded - started, "seconds": trained_s, "gradient_s": training.gradient_s}
    return {
        **run.labels,
        **figures,
        "diverged": diverged,
        **_traffic(training),
        "nominal_ratio": nominal,
        **{name: round(value, 2) for name, value in times.items()},
    }


def _traffic(training: Training) -> Record:
    """Measured bytes; None for a method that exists in a simulation only, or before the first step."""
    if not METHODS[training.run.group.method].is_sent or not training.done:
        return {"matrix_ratio": None, "compression_ratio": None, "wire_bytes_per_step": None}
    ledger = training.ledger
    return {
        "matrix_ratio": round(training.matrix_ratio(), 2),
        "compression_ratio": round(ledger.compression_ratio(), 2),
        "wire_bytes_per_step": round(ledger.totals().wire_bytes / training.done, 1),
    }


def find_nominal_ratio(group: Group, data_dir: Path) -> float:
    """What to ask of a method's settings so that the measured ratio is the group's.

    Where the settings alone do not say, the bytes are measured in a trial: the first steps of the run of seed 0, at the
    rate in the middle of the first grid.
    """
    method = METHODS[group.method]
    if not method.trial:
        return group.ratio
    run = Run(group, method.first_rate(TASKS[group.task], group.steps), 0)
    trial = begin(run, data_dir)
    rounds = max(int(group.steps * method.trial) // method.every, 1)
    while trial.done < rounds * method.every and trial.step():
        pass
    return rounded(group.ratio**2 / trial.matrix_ratio())
