"""Trainings on a pretended CUDA device and on the CPU: ``python -m tests.support.pretend_cuda_main LIBRARY CARRIER``.

CARRIER is "local", two ranks that are threads, or "torch", for a rank under torchrun. Prints of every case, as JSON:
the largest difference of parameters from the CPU's and between the ranks; and of the first rank's step with the fewest
waits its collectives and where its host waited for the device.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.pretend_cuda import load

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    load(Path(sys.argv[1]))

import copy
import logging
import threading

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvd_sketch
from hvd_sketch import LowRankConfig, SketchConfig
from hvd_sketch.optim import LagAdamW
from hvd_sketch.transport import Transport, resolve_transport, run_local
from tests.support.pretend_cuda.install import install

STEPS = 4
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
device: Any = None


def make_model() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8), nn.Linear(8, 10))


DIM = sum(parameter.numel() for parameter in make_model().parameters())
NOMINATED = SketchConfig.for_wire_ratio(20, DIM, 2, candidates="nominate")
SKETCHED = SketchConfig(rows=3, cols=300, k=60, oversample=1, momentum=0.0, value_bits=4)
PAPER = SketchConfig.paper(rows=3, cols=300, k=60, oversample=4)


class Training:
    """Of one rank."""

    def __init__(self, transport: Transport, model: nn.Module, on: torch.device) -> None:
        self.transport, self.model, self.on = transport, model, on
        draw = torch.Generator().manual_seed(transport.rank)
        self.images = torch.randn(2 * STEPS, 8, 3, 8, 8, generator=draw)
        self.labels = torch.randint(10, (2 * STEPS, 8), generator=draw)
        self.calmest: tuple[int, list[str]] | None = None  # a step's collectives and waits

    def wrapped(self, config: Any, make: Callable[..., Any], **options: Any) -> Any:
        named = list(self.model.named_parameters())
        optimizer = make(self.model.parameters())
        return hvd_sketch.DistributedOptimizer(
            optimizer, named, compression=config, transport=self.transport, **options
        )

    def loss(self, step: int) -> Tensor:
        return cross_entropy(self.model(self.images[step].to(self.on)), self.labels[step].to(self.on))

    def backward(self, optimizer: Any, step: int) -> None:
        optimizer.zero_grad()
        self.loss(step).backward()

    def take(self, optimizer: Any) -> None:
        waits = device.waits.setdefault(threading.get_ident(), [])
        collectives, waited = optimizer.ledger.totals().collectives, len(waits)
        optimizer.step()
        of_step = optimizer.ledger.totals().collectives - collectives, waits[waited:]
        if self.calmest is None or len(of_step[1]) < len(self.calmest[1]):  # a prediction may not hold in one of them
            self.calmest = of_step


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3)


def lag_adam(parameters: Any) -> Any:
    return LagAdamW(parameters, lr=1e-3)


def steps_of(config: Any, make: Callable[..., Any] = sgd) -> Callable[[Training], None]:
    def run(training: Training) -> None:
        optimizer = training.wrapped(config, make)
        for step in range(STEPS):
            training.backward(optimizer, step)
            training.take(optimizer)

    return run


def clipped(training: Training) -> None:
    optimizer = training.wrapped(NOMINATED, sgd)
    for step in range(STEPS):
        training.backward(optimizer, step)
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()


def scaled(training: Training) -> None:
    optimizer = training.wrapped(NOMINATED, sgd)
    scaler = torch.amp.GradScaler(training.on.type, init_scale=8.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(training.loss(step)).backward()
        scaler.step(optimizer)
        scaler.update()


def accumulated(training: Training) -> None:
    optimizer = training.wrapped(NOMINATED, sgd, backward_passes_per_step=2)
    for step in range(STEPS):
        optimizer.zero_grad()
        for half in range(2):
            training.loss(2 * step + half).div(2).backward()
        optimizer.step()


def saved_and_loaded(training: Training) -> None:
    optimizer = training.wrapped(NOMINATED, adam)
    for step in range(STEPS):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = training.wrapped(NOMINATED, adam)
            optimizer.load_state_dict(state)
        training.backward(optimizer, step)
        optimizer.step()


def local_steps(training: Training) -> None:
    model, transport = training.model, training.transport
    named = list(model.named_parameters())
    optimizer = hvd_sketch.LocalSteps(
        sgd(model.parameters()), named, compression=NOMINATED, transport=transport, every=2
    )
    for step in range(STEPS):
        training.backward(optimizer, step)
        optimizer.step()


def ahead(training: Training) -> None:
    optimizer = training.wrapped(NOMINATED, lag_adam)
    for step in range(STEPS):
        optimizer.zero_grad()
        with optimizer.ahead():
            training.loss(step).backward()
        optimizer.step()


def damaged(training: Training) -> None:
    """A gradient that is missing, one that is not finite, and one that is very large."""
    optimizer = training.wrapped(SKETCHED, sgd)
    for step in range(STEPS):
        training.backward(optimizer, step)
        weight = training.model[4].weight
        if step == 1:
            weight.grad = None
        elif step == 2 and training.transport.rank == 0:
            weight.grad[0, 0] = float("nan")
        elif step == 3:
            weight.grad[0, 0] = 3e38
        optimizer.step()


CASES: dict[str, Callable[[Training], None]] = {
    "dense": steps_of(None, adam),
    "sketch": steps_of(SKETCHED),
    "paper": steps_of(PAPER),
    "owners choose": steps_of(SketchConfig(rows=3, cols=900, k=700, value_bits=32, oversample=2, momentum=0.0)),
    "heavymix": steps_of(SketchConfig(rows=3, cols=300, k=60, oversample=1, momentum=0.0, candidates="heavymix")),
    "nominate": steps_of(NOMINATED),
    "random": steps_of(SketchConfig.for_wire_ratio(20, DIM, 2, candidates="random", residual_decay=0.95)),
    "low rank": steps_of(LowRankConfig(ratio=20), adam),
    "clipped": clipped,
    "scaled": scaled,
    "accumulated": accumulated,
    "saved and loaded": saved_and_loaded,
    "local steps": local_steps,
    "ahead": ahead,
    "damaged": damaged,
}


def run_all(carrier: str) -> None:
    transports = [resolve_transport("torch")] if carrier == "torch" else None
    for name, case in CASES.items():
        of_cuda, of_cpu = (_trained(case, on, transports) for on in (CUDA, CPU))
        parameters = torch.stack([own for own, _ in of_cuda])
        from_cpu = (parameters - torch.stack([own for own, _ in of_cpu])).abs().max()
        if transports:
            parameters = transports[0].allgather(parameters)
            from_cpu = transports[0].allgather(from_cpu.view(1)).max()
        collectives, waits = of_cuda[0][1] or (0, [])
        result = {
            "from_cpu": float(from_cpu),
            "between_ranks": float((parameters[0] - parameters[1]).abs().max()),
            "collectives": collectives,
            "waits": waits,
        }
        if transports is None or transports[0].rank == 0:
            print(json.dumps({"case": name, **result}), flush=True)


def _trained(
    case: Callable[[Training], None], on: torch.device, transports: Any
) -> list[tuple[Tensor, tuple[int, list[str]] | None]]:
    """Of every rank in this process its parameters, and what the calmest step has."""
    models = [make_model().to(on) for _ in range(1 if transports else 2)]  # not in threads: torch draws for all of them

    def rank_main(transport: Transport) -> tuple[Tensor, tuple[int, list[str]] | None]:
        model = models[0] if transports else models[transport.rank]
        training = Training(transport, model, on)
        case(training)
        parameters = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
        return parameters, training.calmest

    return [rank_main(transport) for transport in transports] if transports else run_local(2, rank_main)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if sys.argv[2] == "torch":
        torch.distributed.init_process_group("gloo")
    device = install()
    run_all(sys.argv[2])
    if sys.argv[2] == "torch":
        torch.distributed.destroy_process_group()
