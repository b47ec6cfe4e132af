"""What test_torch_transport.py runs on every rank: on groups and meshes, and from wrong ones."""

from __future__ import annotations

import gc
import os
import time
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch import DistributedOptimizer, SketchConfig, SketchedAllreduce, broadcast_parameters
from hvd_sketch.transport import TorchTransport
from tests.support.group_main import EXCHANGE
from tests.support.setup_targets import error_of, message_of
from tests.support.targets import run_steps
from tests.support.toy import flat


def meshes(transport: TorchTransport) -> dict[str, Any]:
    """Two by two ranks: sums along each dimension, and what is said to a dimension that there is not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    along = {
        "replicate": TorchTransport(mesh["replicate"]),
        "shard": TorchTransport(mesh, "shard"),
        "number": TorchTransport(mesh, 0),
    }
    assert along["number"]._host is along["replicate"]._host, "one group of ours for one of the user's"
    sums = {name: over.allreduce_(torch.tensor([10.0**transport.rank])).item() for name, over in along.items()}
    said = {
        "no dimension": message_of(lambda: TorchTransport(mesh)),
        "no such": message_of(lambda: TorchTransport(mesh, "nodes")),
        "no such number": message_of(lambda: TorchTransport(mesh, 2)),
        "dim of a group": message_of(lambda: TorchTransport(dist.group.WORLD, "shard")),
    }
    return {"sums": sums, "said": said, "places": [(over.rank, over.size) for over in along.values()]}


def beside_the_users_traffic(transport: TorchTransport) -> bool:
    """Whether sums are right while the user's own collectives and messages are under way, in another order."""
    mine, users = torch.full((transport.size, 1000), 1.0), torch.full((100_000,), 2.0)
    if transport.rank % 2:
        handle, work = transport.start_reduce_scatter(mine), dist.all_reduce(users, async_op=True)
    else:
        work, handle = dist.all_reduce(users, async_op=True), transport.start_reduce_scatter(mine)
    left, right = (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size
    incoming = torch.zeros(1)
    sending = dist.isend(torch.tensor([float(transport.rank)]), right)
    dist.recv(incoming, left)
    sending.wait()
    total = handle.wait()
    work.wait()
    return bool((total == transport.size).all() and (users == 2 * transport.size).all() and incoming.item() == left)


def many_groups(transport: TorchTransport, cycles: int) -> dict[str, int]:
    """Threads left of ``cycles`` groups that the user made and destroyed again."""
    threads = _threads()
    for _ in range(cycles):
        group = dist.new_group(list(range(transport.size)))
        assert TorchTransport(group)._host is TorchTransport(group)._host
        TorchTransport(group).barrier()
        dist.destroy_process_group(group)
        del group
    gc.collect()
    deadline_s = time.monotonic() + 20
    while _threads() > threads and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert transport.allreduce_(torch.ones(1)).item() == transport.size, "WORLD's own must live on"
    return {"threads": _threads() - threads}


def _threads() -> int:
    """Of the process, those of C++ too."""
    return len(os.listdir("/proc/self/task"))


def refused_groups(transport: TorchTransport) -> dict[str, str]:
    """What TorchTransport says to things that are no group for it, on three ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
    rank = transport.rank
    wrong: dict[str, Any] = {"int": 3, "list": [0, 1], "not in it": pairs[(rank + 1) % 3]}
    said = {name: message_of(lambda given=given: TorchTransport(given)) for name, given in wrong.items()}
    whole = dist.new_group([0, 1, 2])
    said["two groups"] = message_of(lambda: TorchTransport([whole, whole, pairs[1]][rank]))
    dist.barrier()
    said["in a circle"] = message_of(lambda: TorchTransport(pairs[rank]))
    dist.barrier()
    twin = dist.new_group([0, 1, 2])
    said["twins"] = message_of(lambda: TorchTransport(twin if rank else whole))
    dist.barrier()
    assert TorchTransport(whole).allreduce_(torch.ones(1)).item() == 3, "the right group is taken afterwards"
    dist.destroy_process_group(whole)
    said["destroyed"] = message_of(lambda: TorchTransport(whole))
    return said


def does_not_come(transport: TorchTransport) -> dict[str, Any]:
    """What rank 0 says where rank 1 stays away, and rank 1 where rank 0 has given up; then both come."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    said = []
    for waiting in (0, 1):
        said.append(error_of(lambda: TorchTransport(group)) if transport.rank == waiting else "")
        dist.barrier()
    return {"said": said, "sum": TorchTransport(group).allreduce_(torch.ones(1)).item()}


def kept_waiting(transport: TorchTransport) -> list[str]:
    """What rank 0 says where rank 1 stays away from a collective, in a step of an exchange; and its notes."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    exchange = SketchedAllreduce(SketchConfig(cols=300, k=20), 2000, TorchTransport(group))
    exchange.step(torch.ones(2000))
    said = []
    if transport.rank == 0:
        try:
            exchange.step(torch.ones(2000))
        except RuntimeError as error:
            said = [str(error), *getattr(error, "__notes__", [])]
    dist.barrier()
    return said


def exchanges_along_a_mesh(transport: TorchTransport) -> dict[str, Any]:
    """A few steps of an exchange on two by two ranks, along "replicate"."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return run_steps(TorchTransport(mesh["replicate"]), **EXCHANGE)


def trains_under_no_sync(transport: TorchTransport) -> dict[str, torch.Tensor]:
    """Parameters of a model and of its copy in DDP, after the same steps; and a gradient before it was exchanged."""
    inputs = torch.randn(10, 16, 40, generator=torch.Generator().manual_seed(transport.rank))
    plain = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 30))
    broadcast_parameters(plain.state_dict())
    wrapped = DistributedDataParallel(deepcopy(plain))
    result = {}
    for name, model in (("plain", plain), ("ddp", wrapped)):
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), SketchConfig(k=300, candidates="nominate"))
        for batch in inputs:
            optimizer.zero_grad()
            with wrapped.no_sync():
                model(batch).square().mean().backward()
            result["own gradient"] = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step()
        result[name] = flat(model)
    return result


def begins_again(transport: TorchTransport) -> list[float]:
    """Sums in a world that was ended and begun again, and of the transport made before."""
    store = dist.PrefixStore("again", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    sums = [transport.allreduce_(torch.ones(1)).item()]  # its group is not torch's to end
    dist.init_process_group("gloo", store=store, rank=transport.rank, world_size=transport.size)
    return [*sums, TorchTransport().allreduce_(torch.ones(1)).item()]
