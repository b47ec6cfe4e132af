"""What test_ddp_hook.py runs on every rank: models in DDP with our communication hook, beside plain ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from logging.handlers import QueueHandler
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from hvd_sketch import DDPState, DistributedOptimizer, LocalSteps, LowRankConfig, SketchConfig, ddp_hook
from hvd_sketch.config import Compression
from hvd_sketch.transport import TorchTransport
from tests.support.setup_targets import error_of, message_of
from tests.support.toy import flat

STEPS = 20
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}  # one for each matrix
NOMINATED = SketchConfig(k=300, candidates="nominate")


@contextmanager
def logged() -> Iterator[list[str]]:
    """What this package warns of inside; to be read afterwards."""
    records: Queue[logging.LogRecord] = Queue()
    handler = QueueHandler(records)
    lines: list[str] = []
    logging.getLogger("hvd_sketch").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("hvd_sketch").removeHandler(handler)
        while not records.empty():
            lines.append(records.get().getMessage())


class Branching(nn.Module):
    """One of two branches takes part in a pass, and a third one never does; convolutions are channels-last."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 32, 3).to(memory_format=torch.channels_last)
        self.branches = nn.ModuleList(nn.Linear(32 * 4, 20) for _ in range(3))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        return self.branches[branch](self.first(inputs).tanh().flatten(1))


def loss_of(model: nn.Module, rank: int, step: int, branch: int = 0) -> Tensor:
    inputs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(100 * rank + step))
    return model(inputs, branch).square().mean()


def wrapped(model: nn.Module, compression: Compression | None, max_skips: int = 25) -> DistributedOptimizer:
    inner = SGD(model.parameters(), lr=0.3, momentum=0.5)
    return DistributedOptimizer(inner, model.named_parameters(), compression, max_skips=max_skips)


def hooked(
    compression: Compression | None, scaler: Any = None, max_skips: int = 25, **settings: Any
) -> tuple[DistributedDataParallel, DistributedOptimizer]:
    model = DistributedDataParallel(Branching(), **{**SMALL_BUCKETS, **settings})
    optimizer = wrapped(model, compression, max_skips)
    model.register_comm_hook(DDPState(model, optimizer, scaler), ddp_hook)
    return model, optimizer


def trained(model: nn.Module, optimizer: DistributedOptimizer, branch_of: Callable[[int], int], rank: int) -> Tensor:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step, branch_of(step)).backward()
        optimizer.step()
    return flat(model)


def trains_as_a_plain_model(transport: TorchTransport) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters after the same steps of a model with the hook and of a plain one, by case."""
    rank = transport.rank
    cases: dict[str, tuple[Compression | None, dict[str, Any], Callable[[int], int]]] = {
        "nominated": (NOMINATED, {"find_unused_parameters": True}, lambda step: 0),
        "sketched, views": (
            SketchConfig(cols=600, k=300),
            {"gradient_as_bucket_view": True, "find_unused_parameters": True},
            lambda step: 0,
        ),
        "low rank, another branch on every rank": (
            LowRankConfig(rank=2),
            {"find_unused_parameters": True},
            lambda step: (rank + step) % 2,
        ),
        "dense, views, a branch now and then": (
            None,
            {"gradient_as_bucket_view": True, "find_unused_parameters": True},
            lambda step: int(step % 3 == rank),
        ),
        "static graph": (NOMINATED, {"static_graph": True}, lambda step: 0),
    }
    results = {}
    for name, (compression, settings, branch_of) in cases.items():
        plain = Branching()
        expected = trained(plain, wrapped(plain, compression), branch_of, rank)
        results[name] = (trained(*hooked(compression, **settings), branch_of, rank), expected)
    return results


def accumulates(transport: TorchTransport) -> tuple[Tensor, Tensor]:
    """Three passes a step, two of them under no_sync(); of the hook and of a plain model."""
    model, optimizer = hooked(NOMINATED, find_unused_parameters=True)
    plain = Branching()
    beside = wrapped(plain, NOMINATED)
    for step in range(5):
        optimizer.zero_grad()
        with model.no_sync():
            for part in (0, 1):
                loss_of(model, transport.rank, 3 * step + part).backward()
        loss_of(model, transport.rank, 3 * step + 2).backward()
        optimizer.step()
        beside.zero_grad()
        for part in range(3):
            loss_of(plain, transport.rank, 3 * step + part).backward()
        beside.step()
    assert optimizer.ledger.totals() == beside.ledger.totals(), "one exchange a step"
    return flat(model), flat(plain)


def skips(transport: TorchTransport) -> dict[str, Any]:
    """A step in which one rank's gradient is NaN, with momentum that must not move anything; what too many raise."""
    model, optimizer = hooked(NOMINATED, max_skips=2, find_unused_parameters=True)
    for step in range(3):
        optimizer.zero_grad()
        before = flat(model)
        loss = loss_of(model, transport.rank, step)
        (loss * float("nan") if (transport.rank, step) == (1, 2) else loss).backward()
        gradient = model.module.first.weight.grad.clone()
        optimizer.step()
    said = ""
    for _ in range(2):
        optimizer.zero_grad()
        said = error_of(lambda: (loss_of(model, transport.rank, 3) * float("nan")).backward())
    return {
        "moved": not torch.equal(before, flat(model)),
        "said": said,
        "is nan": bool(gradient.isnan().all()),
        "skipped": optimizer.skipped_steps,
    }


def goes_on_from_its_state(transport: TorchTransport) -> tuple[Tensor, Tensor]:
    """Parameters of a training, and of its second half from the state in the middle."""
    model, optimizer = hooked(NOMINATED, find_unused_parameters=True)
    later, resumed = hooked(NOMINATED, find_unused_parameters=True)
    for step in range(10):
        if step == 5:
            later.load_state_dict(model.state_dict())
            resumed.load_state_dict(deepcopy(optimizer.state_dict()))
        for each, its in ((model, optimizer), (later, resumed))[: 1 + (step >= 5)]:
            its.zero_grad()
            loss_of(each, transport.rank, step).backward()
            its.step()
    return flat(model), flat(later)


def with_a_scaler(transport: TorchTransport) -> dict[str, Any]:
    """A loss scale that doubles every other step and halves after an overflow leaves no trace in the residuals."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    model, optimizer = hooked(NOMINATED, scaler=scaler, find_unused_parameters=True)
    plain, beside = hooked(NOMINATED, find_unused_parameters=True)
    scales = []
    for step in range(8):
        factor = float("inf") if (transport.rank, step) == (0, 5) else 1.0
        beside.zero_grad()
        (loss_of(plain, transport.rank, step) * factor).backward()
        beside.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, transport.rank, step) * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, transport.rank, step)).backward()
    try:
        scaler.step(optimizer)
        said = ""
    except RuntimeError as error:
        said = str(error)
    return {"scaled": flat(model), "plain": flat(plain), "scales": scales, "said": said}


def joins(transport: TorchTransport) -> dict[str, Any]:
    """In DDP's join() rank 0 has fewer batches in each epoch; equal to a plain model in the optimizer's own join()."""
    batches = range(2 + 2 * transport.rank)
    plain = Branching()
    beside = wrapped(plain, NOMINATED)
    model, optimizer = hooked(NOMINATED, find_unused_parameters=True)
    for epoch in range(2):
        with model.join():
            for step in batches:
                loss_of(model, transport.rank, step + 10 * epoch).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        with beside.join():
            for step in batches:
                loss_of(plain, transport.rank, step + 10 * epoch).backward()
                beside.step()
                beside.zero_grad(set_to_none=False)
        optimizer.state_dict(consolidated=True)
        states = [state["momentum_buffer"].flatten() for state in optimizer.inner.state.values()]
        every = transport.allgather(torch.cat(states)).view(transport.size, -1)
        assert torch.equal(every[0], every[1]), "between the epochs, too, where a checkpoint is saved"
    return {"hook": flat(model), "plain": flat(plain)}


def warned(transport: TorchTransport) -> dict[str, str]:
    """What is logged of gradients that were averaged before, of equal data, and of an exchange in vain."""

    def said_of(
        model: nn.Module, optimizer: DistributedOptimizer, data_of: int, in_vain: bool = False, factor: float = 1
    ) -> str:
        with logged() as lines:
            for step in range(3):
                optimizer.zero_grad()
                (factor * loss_of(model, data_of, step)).backward()
                if not in_vain:
                    optimizer.step()
        return "\n".join(lines)

    settings: dict[str, Any] = {"find_unused_parameters": True}
    averaging, plain, idle = DistributedDataParallel(Branching(), **settings), Branching(), Branching()
    compiled = DistributedDataParallel(Branching(), **settings)
    DDPState(torch.compile(compiled), wrapped(compiled, NOMINATED))
    return {
        "averaged before": said_of(averaging, wrapped(averaging, NOMINATED), transport.rank),
        "equal data": said_of(plain, wrapped(plain, NOMINATED), 0),
        "hook": said_of(*hooked(NOMINATED, **settings), transport.rank),
        "skipped": said_of(*hooked(NOMINATED, **settings), transport.rank, in_vain=True, factor=float("nan")),
        "only weight decay": said_of(idle, wrapped(idle, replace(NOMINATED, weight_decay=0.1)), 0, factor=0),
        "in vain": said_of(*hooked(NOMINATED, **settings), transport.rank, in_vain=True),
        "cleared by the model": said_of_a_gan(transport.rank, lambda model: model.zero_grad()),
        "filled with zeros": said_of_a_gan(transport.rank, lambda model: model.zero_grad(set_to_none=False)),
        "added up": said_of_a_gan(transport.rank, lambda model: None),
    }


def said_of_a_gan(rank: int, clear: Callable[[nn.Module], None]) -> str:
    """A pass whose gradients are cleared by the model, or added to those of the next one, before each that is used."""
    model, optimizer = hooked(NOMINATED, find_unused_parameters=True)
    with logged() as lines:
        for step in range(3):
            loss_of(model, rank, 2 * step).backward()
            clear(model)
            loss_of(model, rank, 2 * step + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
    return "\n".join(lines)


def refused(transport: TorchTransport) -> dict[str, str]:
    """What is said to models and optimizers that do not go together."""
    plain = Branching()
    of_plain = wrapped(plain, NOMINATED)
    model = DistributedDataParallel(deepcopy(plain))
    part = wrapped(model.module.first, None)
    embedding = DistributedDataParallel(nn.Sequential(nn.Embedding(10, 4, sparse=True)))
    alone = torch.distributed.new_group([transport.rank], use_local_synchronization=True)
    in_group = DistributedDataParallel(deepcopy(plain), process_group=alone)
    cases: dict[str, Callable[[], object]] = {
        "plain": lambda: DDPState(plain, of_plain),
        "part": lambda: DDPState(model, part),
        "sparse": lambda: DDPState(embedding, wrapped(embedding, None)),
        "rounds": lambda: DDPState(model, LocalSteps(SGD(model.parameters(), 0.1), None, None, transport, every=2)),
        "group": lambda: DDPState(in_group, wrapped(in_group, None)),
        "again": lambda: DDPState(hooked(None)[0], of_plain),
        "join": lambda: hooked(None)[1].join().__enter__(),
        "one rank": lambda: DDPState([plain, model][transport.rank > 0], wrapped(model, None)),
    }
    return {name: message_of(case) for name, case in cases.items()}
