"""Hybrid sharding: ranks that hold equal shards exchange, and ranks that hold different ones step together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.exchange.agreement import Report
from hvd_sketch.exchange.setup import refused_together, tell_values
from hvd_sketch.model.parameters import NamedParameter
from hvd_sketch.model.settings import error_of_settings
from hvd_sketch.shards import is_sharded
from hvd_sketch.transport.base import Transport, gather_texts, name_ranks
from hvd_sketch.transport.stall import watched
from hvd_sketch.transport.torch_transport import TorchTransport

WAY_OUT = (
    "An exchange is between ranks that hold the same shard. Make a mesh of two dimensions, shard along one only, "
    "fully_shard(model, mesh=mesh['shard']), and exchange along the other, transport=TorchTransport(mesh['replicate'])"
)


def require_equal_shards(comm: Transport, named: Sequence[NamedParameter]) -> None:
    """Refuse tensors of which the ranks of a transport hold different shards, or which FSDP averages over them itself.

    Both show in the places of the ranks on a tensor's mesh: where these are equal the mesh does not spread over ranks
    of the transport.

    Communication: collective, all ranks.

    Raises:
        ValueError: on every rank, naming a tensor and the places.
    """
    own = {name: _describe_place(tensor) for name, tensor in named if is_sharded(tensor)}
    with watched(comm, "compare shards"):
        every: list[dict[str, str]] = [json.loads(text) for text in gather_texts(comm, json.dumps(own))]
    for name in dict.fromkeys(name for places in every for name in places):
        places = [each.get(name, "not sharded") for each in every]
        if len(set(places)) > 1:
            raise ValueError(
                f"the mesh of {name!r} extends over the ranks that exchange (seen from rank {comm.rank} of "
                f"{comm.size}): {tell_values(places)}. {WAY_OUT}"
            )


def _describe_place(tensor: Any) -> str:
    mesh = tensor.device_mesh
    placements = ", ".join(map(str, tensor.placements))
    return f"({placements}) at {tuple(mesh.get_coordinate() or ())} of a mesh of shape {tuple(mesh.shape)}"


def shard_number(named: Sequence[NamedParameter]) -> int:
    """Of this rank's shards, from 0: equal on ranks that hold the same. Communication: none."""
    meshes: list[Any] = [tensor.device_mesh for _, tensor in named if is_sharded(tensor)]  # type: ignore[attr-defined]
    number = 0
    if meshes:
        widest = max(meshes, key=lambda mesh: mesh.size())
        for place, size in zip(widest.get_coordinate(), widest.shape, strict=True):
            number = number * size + place
    return number


class ShardRanks:
    """The ranks that hold the other shards of this rank's parameters: all of them take a step, or none.

    Args:
        named: the parameters. Where none is sharded, there are no other ranks and nothing is sent.

    Attributes:
        number: see :func:`shard_number`.

    Communication: all but :meth:`with_replicas` is collective, all ranks of the parameters' meshes.
    """

    def __init__(self, named: Sequence[NamedParameter]) -> None:
        meshes = [tensor.device_mesh for _, tensor in named if is_sharded(tensor)]  # type: ignore[attr-defined]
        groups = [mesh.get_group(number) for mesh in meshes for number in range(mesh.ndim)]
        self._comms = [TorchTransport(group) for group in dict.fromkeys(groups) if group.size() > 1]
        self._job: Transport | None = None
        self.number = shard_number(named)

    def with_replicas(self, comm: Transport) -> Transport:
        """All ranks of all shards and replicas; where nothing is sharded, those of ``comm``.

        Args:
            comm: the ranks that hold the same shards as this one.

        Communication: the first call is collective, all of these ranks; later ones send nothing.
        """
        if not self._comms:
            return comm
        if self._job is None:
            import torch.distributed as dist

            ranks = torch.tensor([dist.get_rank()], device="cpu")
            for each in (*self._comms, comm):
                with watched(each, "find the ranks of all shards"):
                    ranks = each.allgather(ranks)
            everyone = sorted(ranks.tolist())
            is_world = len(everyone) == dist.get_world_size()
            self._job = TorchTransport(None if is_world else dist.new_group(everyone, use_local_synchronization=True))
        return self._job

    @contextmanager
    def refused_together(self) -> Iterator[None]:
        """What the ranks of one shard refuse inside, those of all shards refuse.

        Communication: collective at the end, all ranks of the parameters' meshes.

        Raises:
            ValueError: as :func:`~hvd_sketch.exchange.setup.refused_together`.
        """
        with ExitStack() as stack:
            for comm in self._comms:
                stack.enter_context(refused_together(comm))
            yield

    def agree(self, report: Report) -> Report:
        """A report of all shards together: not finite, or refused, if it is so on any of their ranks.

        Refused also where their optimizers' settings differ.
        """
        for comm in self._comms:
            report = _agree(comm, report)
        return report


def _agree(comm: TorchTransport, report: Report) -> Report:
    settings = 0 if report.of_parameters else report.digest  # parameters differ between shards, settings must not
    own = torch.tensor([[not report.finite, report.refusal is not None, settings]], dtype=torch.int64, device="cpu")
    with watched(comm, "agree with the other shards"):
        every: Tensor = comm.allgather(own)
    bad, refused, digests = every.unbind(1)
    if bool(bad.any()):
        report = replace(report, finite=False)
    if bool(digests.all()) and bool((digests != digests[0]).any()):
        error = error_of_settings(comm, report)
        return replace(report, refusal=report.refusal or error)
    if bool(refused.any()):
        reasons = gather_texts(comm, str(report.refusal or ""))
        refusing = refused.nonzero().flatten().tolist()
        told = f"{name_ranks(refusing)} of {comm.size} that hold shards of one replica cannot take this step: "
        report = replace(report, refusal=report.refusal or RuntimeError(told + reasons[refusing[0]]))
    return report
