"""What test_hybrid_sharding.py runs on every rank: FSDP2 inside of "nodes", our exchange between them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD

from hvd_sketch import (
    DistributedOptimizer,
    LocalSteps,
    broadcast_optimizer_state,
    broadcast_parameters,
    load_checkpoint,
    save_checkpoint,
)
from hvd_sketch.config import Compression, SketchConfig
from hvd_sketch.optim import LagAdamW, SignSGD
from hvd_sketch.shards import local
from hvd_sketch.transport import TorchTransport
from tests.support.layers import COMPRESSIONS, build, loss_of
from tests.support.setup_targets import error_of
from tests.support.toy import flat

STEPS = 12


def mesh_of() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def sharded(
    mesh: DeviceMesh, compression: Compression | None, seed: int = 0, **settings: Any
) -> tuple[nn.Module, DistributedOptimizer]:
    model = build(seed)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["shard"])
    return model, wrapped(model, compression, TorchTransport(mesh["replicate"]), **settings)


def wrapped(
    model: nn.Module, compression: Compression | None, transport: TorchTransport, **settings: Any
) -> DistributedOptimizer:
    inner = SGD(model.parameters(), lr=0.3, momentum=0.5)
    return DistributedOptimizer(inner, model.named_parameters(), compression, transport, **settings)


def train(model: nn.Module, optimizer: DistributedOptimizer, rank: int, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def shards(model: nn.Module) -> Tensor:
    """What this rank holds."""
    return torch.cat([local(parameter).detach().flatten() for parameter in model.parameters()])


def whole(model: nn.Module) -> Tensor:
    """The whole model, gathered. Communication: collective."""
    return torch.cat([parameter.full_tensor().detach().flatten() for parameter in model.parameters()])


def trains(transport: TorchTransport) -> dict[str, Any]:
    mesh = mesh_of()
    results: dict[str, Any] = {}
    for name, compression in COMPRESSIONS.items():
        model, optimizer = sharded(mesh, compression, check_every=1)
        train(model, optimizer, transport.rank)
        results[name] = {"shards": shards(model), "whole": whole(model), "ledger": optimizer.ledger.totals()}
    plain = build()
    optimizer = wrapped(plain, None, transport)
    train(plain, optimizer, transport.rank)
    results["unsharded"] = flat(plain)
    return results


def skips_together(transport: TorchTransport) -> dict[str, Any]:
    """A gradient that is NaN in one shard of one replica."""
    model, optimizer = sharded(mesh_of(), COMPRESSIONS["nominated"])
    train(model, optimizer, transport.rank, range(2))
    before = shards(model)
    optimizer.zero_grad()
    loss_of(model, transport.rank, 2).backward()
    if transport.rank == 0:
        local(model[0].weight.grad)[0, 0] = float("nan")
    optimizer.step()
    is_nan = all(bool(local(parameter.grad).isnan().all()) for parameter in model.parameters())
    return {"moved": not torch.equal(before, shards(model)), "skipped": optimizer.skipped_steps, "nan": is_nan}


def one_refuses(transport: TorchTransport) -> str:
    """What is said where the gradient of one shard cannot be exchanged."""
    model, optimizer = sharded(mesh_of(), None)
    loss_of(model, transport.rank, 0).backward()
    if transport.rank == 3:
        weight: Any = model[0].weight
        weight.grad = DTensor.from_local(
            local(weight.grad), weight.device_mesh, [Partial()], shape=weight.shape, stride=weight.stride()
        )
    return error_of(optimizer.step)


def schedules_drift(transport: TorchTransport) -> str:
    """What is said where the rate of one shard of one replica has been lowered."""
    model, optimizer = sharded(mesh_of(), None)
    train(model, optimizer, transport.rank, range(3))
    if transport.rank == 3:
        optimizer.param_groups[0]["lr"] /= 2
    loss_of(model, transport.rank, 3).backward()
    return error_of(optimizer.step)


def drifts(transport: TorchTransport) -> str:
    """What is said after one rank has changed its shard."""
    model, optimizer = sharded(mesh_of(), None, check_every=1)
    train(model, optimizer, transport.rank, range(2))
    if transport.rank == 3:
        local(model[2].weight)[0, 0] += 1
    return error_of(optimizer.step)


def takes_over(transport: TorchTransport) -> tuple[Tensor, Tensor]:
    """Parameters of a replica that went on, and of one that has got everything from it."""
    mesh = mesh_of()
    replica = mesh.get_coordinate()[0]
    along = TorchTransport(mesh["replicate"])
    model, optimizer = sharded(mesh, COMPRESSIONS["dense"], seed=0)
    train(model, optimizer, transport.rank, range(3))
    later, its = sharded(mesh, COMPRESSIONS["dense"], seed=replica)
    if replica == 0:
        later.load_state_dict(model.state_dict())
        its.load_state_dict(deepcopy(optimizer.state_dict()))  # torch shares the tensors of a state otherwise
    broadcast_parameters(later.state_dict(), 0, along)
    broadcast_optimizer_state(its, 0, along)
    for each, its_optimizer in ((model, optimizer), (later, its)):
        train(each, its_optimizer, transport.rank, range(3, 5))
    return shards(model), shards(later)


def goes_on(transport: TorchTransport, folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters of a whole training, and of its second half from a checkpoint, by kind of checkpoint."""
    mesh = mesh_of()
    results = {}
    for kind, save, load in (
        ("plain", save_plain, load_plain),
        ("save_checkpoint", save_ours, load_ours),
        ("torch.distributed.checkpoint", save_dcp, load_dcp),
    ):
        where = f"{folder}/{kind}"
        model, optimizer = sharded(mesh, COMPRESSIONS["sketched"])
        train(model, optimizer, transport.rank, range(3))
        save(where, model, optimizer)
        train(model, optimizer, transport.rank, range(3, 6))
        transport.barrier()
        resumed, its = sharded(mesh, COMPRESSIONS["sketched"], seed=1)
        load(where, resumed, its)
        train(resumed, its, transport.rank, range(3, 6))
        results[kind] = (shards(model), shards(resumed))
    return results


def save_plain(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    Path(where).mkdir(exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{where}/{dist.get_rank()}.pt")


def load_plain(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    saved = torch.load(f"{where}/{dist.get_rank()}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def save_ours(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    save_checkpoint(where, model, optimizer, extra={"epoch": 7}, own={"rank": dist.get_rank()})


def load_ours(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    done = load_checkpoint(where, model, optimizer)
    assert done is not None and (done.step, done.ranks, done.extra) == (3, 4, {"epoch": 7})
    assert done.own == {"rank": dist.get_rank()}


def save_dcp(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    """As in docs/training.md."""
    of_model, of_inner = get_state_dict(model, optimizer.inner)
    exchange = {f"rank {dist.get_rank()}": optimizer.state_dict()["hvd_sketch"]}
    dcp.save({"model": of_model, "optimizer": of_inner, "exchange": exchange}, checkpoint_id=where)


def load_dcp(where: str, model: nn.Module, optimizer: DistributedOptimizer) -> None:
    """As in docs/training.md."""
    of_model, of_inner = get_state_dict(model, optimizer.inner)
    own = f"rank {dist.get_rank()}"
    state = {"model": of_model, "optimizer": of_inner, "exchange": {own: optimizer.state_dict()["hvd_sketch"]}}
    dcp.load(state, checkpoint_id=where)
    set_state_dict(model, optimizer.inner, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    optimizer.load_state_dict({**optimizer.inner.state_dict(), "hvd_sketch": state["exchange"][own]})


def goes_on_with_fewer_replicas(transport: TorchTransport, folder: str) -> dict[str, Any]:
    """A checkpoint of two replicas, loaded by each replica for itself."""
    mesh = mesh_of()
    model, optimizer = sharded(mesh, COMPRESSIONS["nominated"])
    train(model, optimizer, transport.rank, range(3))
    save_checkpoint(f"{folder}/fewer", model, optimizer)
    residuals = TorchTransport(mesh["replicate"]).allreduce_(optimizer.exchange.residual.clone())
    alone = dist.new_group([transport.rank], use_local_synchronization=True)
    later, _ = sharded(mesh, None, seed=1)
    its = wrapped(later, COMPRESSIONS["nominated"], TorchTransport(alone))
    done = load_checkpoint(f"{folder}/fewer", later, its)
    assert done is not None
    torch.testing.assert_close(its.exchange.residual, residuals / 2)
    train(later, its, transport.rank, range(3, 4))
    same = torch.equal(local(later[0].weight), local(model[0].weight))
    plain = build()
    said = error_of(lambda: load_checkpoint(f"{folder}/fewer", plain, wrapped(plain, None, transport)))
    return {"step": done.step, "own": done.own, "is trained on": not same, "to an unsharded model": said}


def other_optimizers(transport: TorchTransport) -> dict[str, Tensor]:
    """What this rank holds at the end, by optimizer."""
    mesh = mesh_of()
    along = TorchTransport(mesh["replicate"])
    results = {}
    for make in (LagAdamW, SignSGD, torch.optim.AdamW):
        model, _ = sharded(mesh, None)
        inner = make(model.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(
            inner, model.named_parameters(), COMPRESSIONS["nominated"], along, check_every=1
        )
        train(model, optimizer, transport.rank)
        results[make.__name__] = shards(model)
    model, _ = sharded(mesh, None)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    local_steps = LocalSteps(inner, model.named_parameters(), None, along, every=3)
    train(model, local_steps, transport.rank, range(6))
    results["LocalSteps"] = shards(model)
    model, _ = sharded(mesh, None)
    inner = LagAdamW(model.parameters(), lr=0.01)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), COMPRESSIONS["nominated"], along, check_every=1)
    for step in range(STEPS):
        optimizer.zero_grad()
        with optimizer.ahead():
            loss_of(model, transport.rank, step).backward()
        optimizer.step()
    results["ahead"] = shards(model)
    return results


def clips(transport: TorchTransport) -> tuple[Tensor, Tensor]:
    """Parameters trained with clipped averages, sharded and not."""
    plain = build()
    results = []
    for model, optimizer in (sharded(mesh_of(), None), (plain, wrapped(plain, None, transport))):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, transport.rank, step).backward()
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            with optimizer.skip_synchronize():
                optimizer.step()
        results.append(whole(model) if model is not plain else shards(model))
    return results[0], results[1]


def joins(transport: TorchTransport) -> Tensor:
    """Replica 1 has more batches than replica 0."""
    mesh = mesh_of()
    model, optimizer = sharded(mesh, COMPRESSIONS["nominated"])
    with optimizer.join():
        train(model, optimizer, transport.rank, range(2 + 2 * mesh.get_coordinate()[0]))
    return shards(model)


def tensor_parallel() -> tuple[DeviceMesh, nn.Module, DistributedOptimizer]:
    """Two layers over the mesh's last dimension, sharded along the one before."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 16, bias=False))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return mesh, model, DistributedOptimizer(inner, model.named_parameters(), None, TorchTransport(mesh["replicate"]))


def goes_on_with_tensor_parallelism(transport: TorchTransport, folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters of a whole training, and of one whose state was broadcast or loaded on the way."""

    def train_on(model: nn.Module, optimizer: DistributedOptimizer, place: int, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + place))
            optimizer.zero_grad()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()

    mesh, model, optimizer = tensor_parallel()
    along, place = TorchTransport(mesh["replicate"]), mesh.get_coordinate()[1]
    train_on(model, optimizer, place, range(3))
    save_checkpoint(f"{folder}/tensor parallel", model, optimizer)
    train_on(model, optimizer, place, range(3, 6))
    _, told, its = tensor_parallel()
    train_on(told, its, place, range(3))
    broadcast_optimizer_state(its, 0, along)  # of the one replica
    train_on(told, its, place, range(3, 6))
    _, loaded, its = tensor_parallel()
    load_checkpoint(f"{folder}/tensor parallel", loaded, its)
    train_on(loaded, its, place, range(3, 6))
    return {"broadcast": (shards(model), shards(told)), "checkpoint": (shards(model), shards(loaded))}


def holds_nothing(transport: TorchTransport, folder: str) -> dict[str, Any]:
    """A head of two classes, trained over four shards: ranks 2 and 3 have no element of it."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    along = TorchTransport(mesh["replicate"])
    results: dict[str, Any] = {}
    for name in ("plain", *COMPRESSIONS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 2))
        model[0].requires_grad_(False)
        fully_shard(model[0], mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if name != "plain":
            optimizer = DistributedOptimizer(optimizer, model.named_parameters(), COMPRESSIONS[name], along)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + transport.rank))
            model(x).square().mean().backward()
            optimizer.step()
        results[name] = local(model[2].weight).detach().clone()
        if name == "low rank":
            save_checkpoint(f"{folder}/nothing", model, optimizer)
            done = load_checkpoint(f"{folder}/nothing", model, optimizer)
            results["loaded"] = done is not None and done.step
    return results


def by_fsdp1(keeps_parameters: bool) -> nn.Module:
    return FullyShardedDataParallel(build(), use_orig_params=keeps_parameters, device_id=torch.device("cpu"))


def refused_by_one_shard(transport: TorchTransport) -> str:
    """Of three rows two are on the first rank of a replica: more coordinates than the other holds."""
    mesh = mesh_of()
    model = nn.Linear(64, 3, bias=False)
    fully_shard(model, mesh=mesh["shard"])
    compression = SketchConfig(k=100, candidates="nominate", dense_below=1)
    return error_of(lambda: wrapped(model, compression, TorchTransport(mesh["replicate"])))


def refused(transport: TorchTransport) -> dict[str, str]:
    """What is said to parameters that are sharded another way."""
    mesh = mesh_of()
    along = TorchTransport(mesh["replicate"])
    everywhere, hybrid, in_part, partial = build(), build(), build(), build()
    fully_shard(everywhere, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(hybrid, mesh=mesh)
    fully_shard(in_part[0], mesh=mesh["shard"])
    sums = DTensor.from_local(partial[0].weight.detach(), mesh["shard"], [Partial()])
    partial[0].weight = nn.Parameter(sums)
    model = build()
    fully_shard(model, mesh=mesh["shard"])
    return {
        "everywhere": error_of(lambda: wrapped(everywhere, None, transport)),
        "by FSDP": error_of(lambda: wrapped(hybrid, None, along)),
        "along the shards": error_of(lambda: wrapped(model, None, TorchTransport(mesh["shard"]))),
        "by default": error_of(lambda: wrapped(model, None, transport)),
        "in part": error_of(lambda: wrapped(in_part, None, along)),
        "partial": error_of(lambda: wrapped(partial[0], None, along)),
        "broadcast": error_of(lambda: broadcast_parameters(model.state_dict(), 0, transport)),
        "FSDP1, False": error_of(lambda: wrapped(by_fsdp1(False), None, transport)),
        "FSDP1, True": error_of(lambda: wrapped(by_fsdp1(True), None, transport)),
    }
