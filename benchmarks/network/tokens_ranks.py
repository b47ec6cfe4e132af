"""What tokens.py runs on every host: training steps of a language model with each method, at each network rate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_sketch
from benchmarks.accuracy_per_byte.tasks import TASKS, initial_model, load
from benchmarks.network.clock import over_hosts, read_sent, slowest
from benchmarks.network.lab import shape_together, transport_on_host
from benchmarks.network.records import Record, Records, environment
from benchmarks.network.training import MethodOptimizer
from hvd_sketch import SketchConfig
from hvd_sketch.optim import LagAdamW, SignSGD
from hvd_sketch.transport import Transport

RATIO = 60.0  # of bytes, of what is exchanged in every step
ROUNDS_RATIO = 20.0  # of what is exchanged every 16 steps
EVERY = 16
RATE = 1e-3  # how fast it learns takes no time
Pending = tuple[str, list[str]]  # method, and the rates of the network


@dataclass(frozen=True)
class Method:
    """How a model is stepped on every rank.

    Attributes:
        title: for people.
        wrap: makes the optimizer that exchanges, from AdamW or from one of its own. Communication: collective.
        every: steps from one exchange to the next; as many are timed, or a multiple.
        trained: what it is among the records of :mod:`benchmarks.language_model`: method, and ratio of bytes. None:
            it trains no one model.
        ahead: forward and backward passes are in ``optimizer.ahead()``.
    """

    title: str
    wrap: Callable[[torch.optim.Optimizer, nn.Module, Transport], Any]
    every: int = 1
    trained: tuple[str, float] | None = None
    ahead: bool = False


def _alone(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    return inner


def _dense16(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    named = model.named_parameters()
    return hvd_sketch.DistributedOptimizer(inner, named, compression="bf16", transport=transport)


def _rival(name: str, inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    return MethodOptimizer(name, model, transport, inner)


def _recommended(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    compression = hvd_sketch.recommended(model.parameters(), RATIO, transport.size, optimizer="adamw")
    named = model.named_parameters()
    return hvd_sketch.DistributedOptimizer(inner, named, compression=compression, transport=transport)


def _nominated(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    config = SketchConfig.for_wire_ratio(
        RATIO, hvd_sketch.sketched_dim(model.parameters()), transport.size, candidates="nominate"
    )
    lag_aware = LagAdamW(model.parameters(), RATE)
    return hvd_sketch.DistributedOptimizer(lag_aware, model.named_parameters(), config, transport)


def _random(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    compression = hvd_sketch.recommended(model.parameters(), RATIO, transport.size, optimizer="signsgd")
    signs = SignSGD(model.parameters(), RATE)
    return hvd_sketch.DistributedOptimizer(signs, model.named_parameters(), compression, transport)


def _rounds(inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> Any:
    compression = hvd_sketch.recommended(model.parameters(), ROUNDS_RATIO, transport.size, optimizer="adamw")
    return hvd_sketch.LocalSteps(inner, model.named_parameters(), compression, transport, every=EVERY)


_OF_ROUNDS = EVERY * ROUNDS_RATIO
METHODS = {
    "alone": Method("no exchange at all", _alone),
    "allreduce": Method("dense, the library's allreduce, 32 bit", partial(_rival, "allreduce"), 1, ("dense", 1.0)),
    "dense16": Method("dense, bf16", _dense16, 1, ("dense16", 2.0)),
    "powersgd": Method("PowerSGD of torch, rank 4, 32 bit", partial(_rival, "powersgd"), 1, ("powersgd32", 15.0)),
    "recommended": Method(f"`recommended`, {RATIO:g}x: PowerSGD of 4 bit", _recommended, 1, ("lowrank4", RATIO)),
    "nominate": Method(f"nominated, 4 bit, into LagAdamW, {RATIO:g}x", _nominated, 1, ("nominate4-lag", RATIO)),
    "ahead": Method(
        f"nominated, 4 bit, into LagAdamW, ahead, {RATIO:g}x", _nominated, 1, ("nominate4-lag-ahead", RATIO), True
    ),
    "random": Method(f"random, 4 bit, into SignSGD, {RATIO:g}x", _random, 1, ("random4-sign", RATIO)),
    "rounds": Method(
        f"`LocalSteps`, every {EVERY} steps, {ROUNDS_RATIO:g}x", _rounds, EVERY, ("lowrank4-rounds", _OF_ROUNDS)
    ),
}


def main(transport_name: str, lab: str, pending: list[Pending], data_dir: str, records: str, common: Record) -> None:
    """``common``: what every record says of this call; see tokens.py."""
    torch.set_num_threads(1)
    transport = transport_on_host(transport_name)
    kept = Records(Path(records))
    for method, rates in pending:
        training = Training(common["task"], Path(data_dir), common["batch"], METHODS[method], transport)
        training.run(METHODS[method].every)  # compiles, and makes the optimizer's state
        for rate in rates:
            shape_together(transport, lab, rate)
            measured = training.measure(common["steps"], common["budget_s"])
            if transport.rank == 0:
                about = common | {"method": method, "transport": transport_name, "rate": rate}
                kept.append(about | measured | environment())
                print(about | measured, flush=True)


class Training:
    """One rank's part of a training. All methods are collective."""

    def __init__(self, task: str, data_dir: Path, batch: int, method: Method, transport: Transport) -> None:
        self._data, self._transport, self._method = load(task, data_dir), transport, method
        self._model = initial_model(TASKS[task], self._data.classes, seed=0)
        inner = torch.optim.AdamW(self._model.parameters(), RATE)
        self._optimizer = method.wrap(inner, self._model, transport)
        self._batches = self._data.batches(1, batch, transport.rank, skewed=False)
        self._tokens = transport.size * next(self._batches)[0][0].numel()  # of all ranks, a step

    def run(self, steps: int) -> float:
        """Seconds of some steps on the slowest rank."""
        self._transport.barrier()
        start_s = time.perf_counter()
        for _ in range(steps):
            self._optimizer.zero_grad()
            with self._optimizer.ahead() if self._method.ahead else nullcontext():
                self._data.loss(self._model, next(self._batches)[0]).backward()
            self._optimizer.step()
        self._transport.barrier()
        return slowest(self._transport, time.perf_counter() - start_s)[0]

    def measure(self, least_steps: int, budget_s: float) -> Record:
        """Tokens of all ranks per second, over whole rounds that take at least the budget, after one of them."""
        every = self._method.every
        round_s = self.run(every)
        rounds = max(ceil(least_steps / every), int(budget_s / round_s), 1)
        sent_before = read_sent()
        seconds = self.run(rounds * every)
        sent = (read_sent() - sent_before) // (rounds * every)
        return {
            "tokens": self._tokens,
            "timed_steps": rounds * every,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(self._tokens * rounds * every / seconds, 1),
            "interface": over_hosts(self._transport, sent),
        }


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
