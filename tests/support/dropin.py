"""What scripts written for ``hvd.DistributedOptimizer`` do, run by test_horovod_dropin.py under horovodrun.

Every ``check_*`` trains beside Horovod's own optimizer, or calls what Horovod offers beside it; after each all ranks
hold equal bits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import DistributedOptimizer, LocalSteps, LowRankConfig, SketchConfig, broadcast_optimizer_state
from hvd_sketch.config import Compression
from hvd_sketch.transport import Transport
from tests.support.ddp_targets import logged
from tests.support.patterns.training import assert_equal_everywhere, loss, network, saved_and_loaded, wrap

SKETCH = SketchConfig.paper(cols=200, k=40, momentum=0.0, dense_below=100)
NOMINATED = SketchConfig(k=40, candidates="nominate", dense_below=100)
COMPRESSIONS = (None, SKETCH, NOMINATED, LowRankConfig(rank=1, dense_below=100))
DECAYED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.1, centered=True),
}


def check_all(transport: Transport) -> int:
    """Run every check; returns how many ran."""
    checks = [value for name, value in globals().items() if name.startswith("check_") and name != "check_all"]
    for check in checks:
        check(transport)
        transport.barrier()
    return len(checks)


def train(make: Callable[..., Any], rank: int, options: Callable[[nn.Module], dict[str, Any]]) -> nn.Module:
    """Three steps of one network by an optimizer that ``make`` wraps, with options that may name its parameters."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = options(model)
    optimizer = make(inner, named_parameters=model.named_parameters(), **given)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(given.get("backward_passes_per_step", 1)):
            loss(model, rank, 10 * step + part).backward()
        optimizer.step()
    return model


def assert_same_parameters(left: nn.Module, right: nn.Module) -> None:
    for ours, theirs in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


def beside_horovods(t: Transport, trained_by: Callable[[Callable[..., Any]], nn.Module]) -> None:
    """Dense, two ranks have the bits of Horovod's own; sketched, all ranks have equal ones."""
    model = trained_by(DistributedOptimizer)
    assert t.size == 2, "the sum of two numbers is the same in any order"
    assert_same_parameters(model, trained_by(hvd.DistributedOptimizer))
    assert_equal_everywhere(t, model)
    assert_equal_everywhere(t, trained_by(partial(DistributedOptimizer, sketch=SKETCH)))


# --- the arguments


def signatures() -> Iterator[Callable[[nn.Module], dict[str, Any]]]:
    parameters = inspect.signature(hvd.DistributedOptimizer).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("optimizer", "named_parameters")}
    assert len(defaults) == 8, "what Horovod 0.28 takes"
    for changed in (
        {},
        {"op": hvd.Sum},
        {"gradient_predivide_factor": 2.0},
        {"num_groups": 2},
        {"groups": 2},
        {"backward_passes_per_step": 2},
        {"sparse_as_dense": False},
    ):
        yield lambda model, changed=changed: {**defaults, **changed}
    yield lambda model: {"groups": [[model[0].weight, model[0].bias], [model[2].weight]]}


def check_every_argument_of_horovods(t: Transport) -> None:
    for options in signatures():
        beside_horovods(t, lambda make, options=options: train(make, t.rank, options))


def check_half_precision_halves_the_bytes(t: Transport) -> None:
    """The mean is within float16's rounding of what each rank sends, and of the mean itself."""
    sent_bytes, means = {}, {}
    for compression in (hvd.Compression.none, hvd.Compression.fp16):
        model = network()
        optimizer = wrap(t, model, None, compression=compression)
        loss(model, t.rank, 0).backward()
        largest = torch.cat([p.grad.flatten() for p in model.parameters()]).abs()
        optimizer.synchronize()
        means[compression] = torch.cat([p.grad.flatten() for p in model.parameters()])
        with optimizer.skip_synchronize():
            optimizer.step()
        sent_bytes[compression] = sum(r.payload_bytes for r in optimizer.ledger.records if r.phase == "dense")
        assert_equal_everywhere(t, model)
    assert sent_bytes[hvd.Compression.fp16] * 2 == sent_bytes[hvd.Compression.none]
    error = (means[hvd.Compression.fp16] - means[hvd.Compression.none]).abs()
    allowed = t.allreduce_(largest) * 2.0**-11 + 2.0**-24  # float16 has 11 bits; its smallest number is 2^-24
    assert bool((error <= allowed).all()) and bool(error.any())


def check_half_precision_beside_a_sketch(t: Transport) -> None:
    """Biases go dense, at half the bytes and by themselves; the sketch's exact values stay float32."""
    phases = {}
    for compression in (hvd.Compression.none, hvd.Compression.fp16):
        model = network()
        optimizer = wrap(t, model, SKETCH, compression=compression)
        for step in range(3):
            optimizer.zero_grad()
            loss(model, t.rank, step).backward()
            optimizer.step()
        assert_equal_everywhere(t, model)
        phases[compression] = {
            phase: sum(r.payload_bytes for r in optimizer.ledger.records if r.phase == phase)
            for phase in ("dense", "sketch", "exact")
        }
    full, half = phases[hvd.Compression.none], phases[hvd.Compression.fp16]
    beside = full["exact"] - half["exact"]  # float32, one way; "dense" is both ways
    assert half["dense"] == beside > 0 and full["dense"] == 0 and half["sketch"] == full["sketch"]


def check_sparse_embeddings(t: Transport) -> None:
    def trained_by(make: Callable[..., Any]) -> nn.Module:
        model = nn.Embedding(40, 8, sparse=True)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 320).view(40, 8))
        inner = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
        optimizer = make(inner, sparse_as_dense=True)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0, model=model)
        for step in range(3):
            optimizer.zero_grad()
            rows = torch.tensor([[1, 2, 4, 5], [4, 3, 2, 9]]) + 10 * t.rank + step
            model(rows).square().sum().backward()
            optimizer.step()
        return model

    beside_horovods(t, trained_by)


# --- what cannot be followed


class _Bfloat16Compressor:
    """A user's own, of the interface of Horovod's."""


def check_a_join_that_all_ranks_call(t: Transport) -> None:
    """As at the end of a program of Horovod's; and what comes after it is exchanged as before."""
    model = network()
    optimizer = wrap(t, model, SKETCH)
    for step in range(2):
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.step()
        hvd.join()
    assert_equal_everywhere(t, model)


def check_an_elastic_job_is_told_of_its_own_state(t: Transport) -> None:
    """horovodrun sets the variable; Horovod's TorchState would let ranks that come wait for ever."""
    model = network()
    with pytest.MonkeyPatch.context() as patch, logged() as told:
        patch.setenv("HOROVOD_ELASTIC", "1")
        for transport in ("auto", t):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), transport=transport)
            LocalSteps(torch.optim.SGD(model.parameters(), lr=0.1), every=2, transport=transport)
    assert len(told) == 2 * (t.rank == 0), told
    assert all("hvd_sketch.elastic.SketchState, in place of Horovod's TorchState" in text for text in told)


def check_what_is_refused_says_why(t: Transport) -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "op must be hvd.Average or hvd.Sum .*got adasum: sketches can only be added", {"op": hvd.Adasum}),
        (ValueError, "got min: sketches can only be added", {"op": hvd.Min}),
        (ValueError, "got max: sketches can only be added", {"op": hvd.Max}),
        (ValueError, "got product: sketches can only be added", {"op": hvd.Product}),
        (ValueError, "compression must be .*got _Bfloat16Compressor: .*sketch=", {"compression": _Bfloat16Compressor}),
        (ValueError, "taken by name", {"sketch": hvd.Compression.fp16}),  # the third argument of Horovod's
        (ValueError, "means nothing for a sum", {"op": hvd.Sum, "gradient_predivide_factor": 2.0}),
        (ValueError, "must be positive", {"gradient_predivide_factor": 0.0}),
        (ValueError, "groups must be an integer of at least 0", {"groups": -1}),
        (ValueError, "MPITransport", {"process_set": hvd.global_process_set, "transport": "mpi"}),
        (ValueError, "MPITransport", {"process_set": hvd.global_process_set, "transport": t}),
    ]
    for kind, message, options in refused:
        model = network()
        with pytest.raises(kind, match=message):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), **options)
    model = nn.Embedding(4, 3, sparse=True)
    with pytest.raises(ValueError, match="sparse_as_dense=True"):
        DistributedOptimizer(torch.optim.SparseAdam(list(model.parameters())))


def check_what_one_rank_refuses_all_refuse(t: Transport) -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    told = "got adasum" if t.rank == 1 else "rank 1 of 2 could not be set up: .*got adasum"
    with pytest.raises(ValueError, match=told):
        DistributedOptimizer(inner, op=hvd.Adasum if t.rank == 1 else hvd.Average)


# --- hvd.broadcast_optimizer_state


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [torch.as_tensor(value) for state in optimizer.state_dict()["state"].values() for value in state.values()]


def check_horovods_broadcast_of_a_fresh_optimizer(t: Transport) -> None:
    """No parameter moves, also by weight decay; all ranks get the root's learning rate."""
    for make in DECAYED.values():
        for sketch in COMPRESSIONS:
            model = network()
            inner = make(model.parameters())
            optimizer = DistributedOptimizer(inner, model.named_parameters(), sketch, t)
            inner.param_groups[0]["lr"] *= 1 + t.rank
            hvd.broadcast_optimizer_state(optimizer, root_rank=1)
            assert_same_parameters(model, network())
            assert optimizer.param_groups[0]["lr"] == inner.defaults["lr"] * 2
            two_steps(t, model, optimizer)


def check_broadcasts_after_rank_0_has_loaded(t: Transport) -> None:
    ours = partial(broadcast_optimizer_state, transport=t)
    horovods = hvd.broadcast_optimizer_state
    for name, broadcast in (("SGD", horovods), ("AdamW", horovods), ("SGD", ours)):
        for sketch in COMPRESSIONS:
            for consolidated in (True, False):
                resume_on_rank_0(t, DECAYED[name], broadcast, sketch, consolidated)


def resume_on_rank_0(
    t: Transport,
    make: Callable[..., torch.optim.Optimizer],
    broadcast: Callable[..., None],
    sketch: Compression | None,
    consolidated: bool,
) -> None:
    model = network()
    optimizer = DistributedOptimizer(make(model.parameters()), model.named_parameters(), sketch, t)
    two_steps(t, model, optimizer)
    state = optimizer.state_dict(consolidated=consolidated)
    saved = saved_and_loaded({"model": model.state_dict(), "optimizer": state})
    resumed = network()
    other = DistributedOptimizer(make(resumed.parameters()), resumed.named_parameters(), sketch, t)
    if t.rank == 0:
        resumed.load_state_dict(saved["model"])
        other.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch's state goes on in the tensors it is given
    hvd.broadcast_parameters(resumed.state_dict(), root_rank=0)
    broadcast(other, root_rank=0)
    assert_same_parameters(resumed, model)
    assert all(map(torch.equal, _state_of(other), _state_of(optimizer)))
    two_steps(t, resumed, other)
    if consolidated:  # as if every rank had loaded it
        optimizer.load_state_dict(saved["optimizer"])
        two_steps(t, model, optimizer)
        assert_same_parameters(resumed, model)


def two_steps(t: Transport, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.step()
    assert_equal_everywhere(t, model)


def check_our_broadcast_of_a_plain_optimizers_checkpoint(t: Transport) -> None:
    """A job that was trained with Horovod's own optimizer goes on with ours."""
    model = network()
    theirs = hvd.DistributedOptimizer(DECAYED["SGD"](model.parameters()), model.named_parameters())
    two_steps(t, model, theirs)
    for sketch in COMPRESSIONS:
        resumed = network()  # without the hooks of Horovod's own
        resumed.load_state_dict(model.state_dict())
        ours = DistributedOptimizer(DECAYED["SGD"](resumed.parameters()), resumed.named_parameters(), sketch, t)
        if t.rank == 0:
            ours.load_state_dict(saved_and_loaded(theirs.state_dict()))
        broadcast_optimizer_state(ours, 0, t)
        assert all(map(torch.equal, _state_of(ours.inner), _state_of(theirs)))
        two_steps(t, resumed, ours)


# --- gradients that come and go


def check_two_networks_that_take_turns(t: Transport) -> None:
    """As a generator and a discriminator do: each is frozen while the other trains."""

    def trained_by(make: Callable[..., Any]) -> nn.Module:
        both = nn.ModuleList([network(), nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))])
        with torch.no_grad():
            for parameter in both[1].parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))
        optimizers = [make(torch.optim.SGD(m.parameters(), lr=0.05), m.named_parameters()) for m in both]
        for step in range(6):
            for i, part in enumerate(both):
                part.requires_grad_(step % 2 == i)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(nn.Sequential(*both), t.rank, step).backward()
            optimizers[step % 2].step()
        return both

    beside_horovods(t, trained_by)


def check_ranks_that_use_different_layers(t: Transport) -> None:
    """Horovod's test_force_allreduce: what a rank does not use counts as zeros."""

    def trained_by(make: Callable[..., Any]) -> nn.Module:
        model = nn.ModuleList([network(), network()])
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model.named_parameters())
        for step in range(3):
            optimizer.zero_grad()
            loss(model[t.rank], t.rank, step).backward()
            optimizer.step()
            assert all(p.grad is not None for p in model.parameters())
        return model

    beside_horovods(t, trained_by)


# --- with a launch of their own


def leave_by_horovods_join(transport: Transport, candidates: str, levels: int) -> None:
    """Rank 0 has fewer batches and calls hvd.join(), as for Horovod's own optimizer."""
    model = network()
    sketch = SKETCH if candidates == "sketch" else SketchConfig(k=40, candidates=candidates, dense_below=100)
    optimizer = wrap(transport, model, sketch, levels=levels)
    for step in range(2 + transport.rank):
        optimizer.zero_grad()
        loss(model, transport.rank, step).backward()
        optimizer.step()
    hvd.join()


def process_sets(transport: Transport) -> dict[str, Any]:
    """Ranks 0 and 2 in one set, rank 1 outside of it: what each has after three steps, dense and sketched."""
    members = hvd.add_process_set([0, 2])
    trained = {}
    for name, sketch in (("dense", None), ("sketched", SKETCH)):
        make = partial(DistributedOptimizer, sketch=sketch)
        trained[name] = train(make, transport.rank, lambda model: {"process_set": members}).state_dict()
    trained["horovod"] = train(
        hvd.DistributedOptimizer, transport.rank, lambda model: {"process_set": members}
    ).state_dict()
    plain = train(lambda inner, named_parameters: inner, transport.rank, lambda model: {}).state_dict()
    transport.barrier()
    return {**trained, "alone": plain}
