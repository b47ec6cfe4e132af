"""What test_levels.py runs on every rank: DistributedOptimizer with levels=2, on ranks that are told their hosts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from hvd_sketch import (
    DistributedOptimizer,
    SketchConfig,
    broadcast_optimizer_state,
    broadcast_parameters,
    load_checkpoint,
    save_checkpoint,
)
from hvd_sketch.config import Compression
from hvd_sketch.model.levels import HOST_VARIABLE
from hvd_sketch.transport import Transport
from tests.support.setup_targets import error_of, message_of
from tests.support.toy import Toy, flat, integers
from tests.support.wire import Scales

STEPS = 6
COMPRESSIONS: dict[str, Compression | None] = {
    "dense": None,
    "paper": SketchConfig.paper(cols=40, k=10, oversample=2, momentum=0.5, dense_below=8),
    "nominated": SketchConfig(k=12, candidates="nominate", dense_below=8, value_bits=32),
}


@contextmanager
def on_host(number: int) -> Iterator[None]:
    """As a rank on a host of its own."""
    os.environ[HOST_VARIABLE] = f"host {number}"
    try:
        yield
    finally:
        del os.environ[HOST_VARIABLE]


def wrapped(
    model: nn.Module, transport: Transport, hosts: list[int], name: str, **settings: Any
) -> DistributedOptimizer:
    inner = SGD(model.parameters(), lr=1.0)
    with on_host(hosts[transport.rank]):
        return DistributedOptimizer(
            inner, model.named_parameters(), COMPRESSIONS[name], transport, levels=2, check_every=1, **settings
        )


def train(model: Toy, optimizer: DistributedOptimizer, rank: int, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.backward(rank, step)
        optimizer.step()


def trains(transport: Transport, hosts: list[int]) -> dict[str, Any]:
    """Parameters, residual and bytes of this rank, by compression; and parameters of sums."""
    results: dict[str, Any] = {}
    for name in COMPRESSIONS:
        model = Toy()
        optimizer = wrapped(model, transport, hosts, name)
        train(model, optimizer, transport.rank)
        residual = optimizer.exchange.residual.clone() if optimizer.exchange is not None else None
        results[name] = {"parameters": flat(model), "residual": residual, "totals": optimizer.ledger.totals()}
    model = Toy()
    train(model, wrapped(model, transport, hosts, "dense", op="sum"), transport.rank)
    results["sums"] = flat(model)
    return results


def hosts_alone(transport: Transport, name: str, hosts: list[int]) -> dict[str, Any]:
    """What the leader of a host must come to: one level, one rank a host, with the mean of the host's ranks."""
    model = Toy()
    inner = SGD(model.parameters(), lr=1.0)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), COMPRESSIONS[name], transport)
    mine = [rank for rank, host in enumerate(hosts) if host == transport.rank]
    weight = len(set(hosts)) / len(hosts)  # 1 / ranks of this host, where all hosts have as many
    for step in range(STEPS):
        for parameter, *of_ranks in zip(model.parameters(), *(integers(rank, step) for rank in mine), strict=True):
            parameter.grad = sum(of_ranks) * weight
        optimizer.step()
    residual = optimizer.exchange.residual.clone() if optimizer.exchange is not None else None
    return {"parameters": flat(model), "residual": residual, "totals": optimizer.ledger.totals()}


HOSTS = [0, 0, 1, 1]


def skips(transport: Transport) -> dict[str, Any]:
    """A gradient that is NaN on a rank that is no leader."""
    model = Toy()
    optimizer = wrapped(model, transport, HOSTS, "nominated")
    train(model, optimizer, transport.rank, range(2))
    before = flat(model)
    optimizer.zero_grad()
    model.backward(transport.rank, 2, factor=float("nan") if transport.rank == 3 else 1.0)
    optimizer.step()
    is_nan = all(bool(gradient.isnan().all()) for gradient in model.gradients())
    moved = not torch.equal(before, flat(model))
    train(model, optimizer, transport.rank, range(3, 4))
    return {"moved": moved, "nan": is_nan, "skipped": optimizer.skipped_steps, "parameters": flat(model)}


def parts_used(transport: Transport) -> tuple[Tensor, list[bool]]:
    """A parameter that one rank uses, which is no leader, and one that nobody uses."""
    model = Toy()
    optimizer = wrapped(model, transport, HOSTS, "nominated")
    for step in range(3):
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        model.other.grad = None
        if transport.rank != 3:
            model.bias.grad = None
        optimizer.step()
    return flat(model), [parameter.grad is not None for parameter in model.parameters()]


def refuses(transport: Transport) -> list[str]:
    """What is said where one rank cannot take a step, and where skipped steps are too many."""
    model = Toy()
    optimizer = wrapped(model, transport, HOSTS, "dense")
    model.backward(transport.rank, 0)
    if transport.rank == 3:
        model.double()
    said = [error_of(optimizer.step)]
    model = Toy()
    optimizer = wrapped(model, transport, HOSTS, "dense", max_skips=1)
    for _ in range(2):
        model.backward(transport.rank, 0, factor=float("nan"))
        said.append(error_of(optimizer.step))
    return said


def clips(transport: Transport) -> tuple[Tensor, Tensor]:
    """Parameters by clipped averages, with two levels and with one."""
    results = []
    for levels in (2, 1):
        model = Toy()
        with on_host(HOSTS[transport.rank]):
            inner = SGD(model.parameters(), lr=1.0)
            optimizer = DistributedOptimizer(inner, model.named_parameters(), None, transport, levels=levels)
        for step in range(3):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            assert optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
            model.backward(transport.rank, step)
            assert optimizer.synchronize()
            optimizer.step()  # warns, and exchanges nothing again
        results.append(flat(model))
    return results[0], results[1]


def joins(transport: Transport) -> tuple[Tensor, Tensor]:
    """Rank r has r batches more than rank 0; with two levels and with one."""
    results = []
    for levels in (2, 1):
        model = Toy()
        with on_host(HOSTS[transport.rank]):
            inner = SGD(model.parameters(), lr=1.0, momentum=0.5)
            options: dict[str, Any] = {"levels": levels, "check_every": 1}
            optimizer = DistributedOptimizer(inner, model.named_parameters(), None, transport, **options)
        with optimizer.join():
            train(model, optimizer, transport.rank, range(1 + transport.rank))
        results.append(flat(model))
    return results[0], results[1]


def decays(transport: Transport, batches: list[int]) -> Tensor:
    """Weights without a gradient, of which the sketch takes half away in every step, for ranks that run out of data."""
    model = Toy()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    everything = sum(p.numel() for p in model.parameters())
    sketch = SketchConfig(k=everything, candidates="nominate", value_bits=32, weight_decay=0.5, dense_below=0)
    with on_host(HOSTS[transport.rank]):
        optimizer = DistributedOptimizer(
            SGD(model.parameters(), lr=1.0), model.named_parameters(), sketch, transport, levels=2
        )
    with optimizer.join():
        for _ in range(batches[transport.rank]):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    return flat(model)


def goes_on(transport: Transport, folder: str) -> dict[str, Any]:
    """From checkpoints of all ranks, from each rank's own state, and from rank 0's."""
    model = Toy()
    optimizer = wrapped(model, transport, HOSTS, "paper")
    train(model, optimizer, transport.rank, range(3))
    save_checkpoint(f"{folder}/levels", model, optimizer)
    own, everyone = optimizer.state_dict(), optimizer.state_dict(consolidated=True)
    at = flat(model)
    train(model, optimizer, transport.rank, range(3, 5))
    results: dict[str, Any] = {"whole": flat(model)}
    for way in ("checkpoint", "elsewhere", "own", "consolidated", "broadcast"):
        later = Toy()
        its = wrapped(later, transport, HOSTS if way != "elsewhere" else [0, 1, 0, 1], "paper")
        if way in ("checkpoint", "elsewhere"):
            done = load_checkpoint(f"{folder}/levels", later, its)
            assert done is not None and (done.step, done.ranks) == (3, 4)
        else:
            nn.utils.vector_to_parameters(
                at.clone() if way != "broadcast" or transport.rank == 0 else at * 0, later.parameters()
            )
        if way in ("own", "consolidated"):
            its.load_state_dict(own if way == "own" else everyone)
        if way == "broadcast":
            if transport.rank == 0:
                its.load_state_dict(everyone)
            broadcast_parameters(later.state_dict(), 0, transport)
            results["wrong root"] = error_of(lambda its=its: broadcast_optimizer_state(its, 1, transport))
            broadcast_optimizer_state(its, 0, transport)
        train(later, its, transport.rank, range(3, 5))
        results[way], results[f"steps, {way}"] = flat(later), its.exchanges
    return results


def one_host(transport: Transport) -> tuple[Tensor, bool]:
    model = Toy()
    optimizer = DistributedOptimizer(
        SGD(model.parameters(), lr=1.0), model.named_parameters(), COMPRESSIONS["paper"], transport, levels=2
    )
    train(model, optimizer, transport.rank, range(1))
    return flat(model), optimizer.exchange is None


def refused(transport: Transport) -> dict[str, str]:
    model = Toy()
    return {
        "sparse": message_of(lambda: wrapped(model, transport, HOSTS, "dense", sparse_as_dense=True)),
        "levels": message_of(
            lambda: DistributedOptimizer(SGD(model.parameters(), lr=1.0), None, None, transport, levels=3)  # type: ignore[arg-type]
        ),
        "of one rank": message_of(
            lambda: DistributedOptimizer(
                SGD(model.parameters(), lr=1.0), None, None, transport, levels=1 + (transport.rank == 2)
            )
        ),
    }


def weighs(transport: Transport) -> dict[str, Any]:
    """What this host's interface sends in a few dense steps with one level and with two, and what the ledger says."""
    result: dict[str, Any] = {"host": socket.gethostname()}
    for levels in (1, 2):
        model = nn.Linear(1000, 1000, bias=False)
        inner = SGD(model.parameters(), lr=0.0)
        optimizer = DistributedOptimizer(inner, None, None, transport, check_every=0, levels=levels)
        gradient = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(transport.rank))
        scales = Scales(transport)
        with scales.weigh("steps"):
            for _ in range(3):
                model.weight.grad = gradient.clone()
                optimizer.step()
        sent, packets, _ = scales.weighed["steps"]
        result[str(levels)] = {"sent": (sent, packets), "modelled": optimizer.ledger.totals().wire_bytes}
    return result
