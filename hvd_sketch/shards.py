"""Tensors of which every rank holds a shard (DTensors, as of FSDP2): the shard itself, and states that hold some.

Nothing here communicates, and nothing imports DTensor, which takes a second, unless there is one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SHARD = "hvd_sketch_shard"  # key of a shard in a state: see localized
REPLICATED = -1  # in place of the dimension that a placement shards


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient: the memory itself. A plain tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return held.detach()


def localized(state: Any) -> Any:
    """A state of dicts, lists and tuples with local shards in place of DTensors, for :func:`globalized`.

    Raises:
        ValueError: a DTensor is partial, a sum over ranks that has not been made, or placed in a way that is not known.
    """
    if type(state) in (dict, OrderedDict):
        return _like(state, {key: localized(value) for key, value in state.items()})
    if type(state) in (list, tuple):
        return type(state)(map(localized, state))
    if not is_sharded(state):
        return state
    partial = [str(placement) for placement in state.placements if placement.is_partial()]
    if partial:
        raise ValueError(f"a DTensor of shape {tuple(state.shape)} is {partial[0]}: redistribute it before it is saved")
    dims = [_described(placement) for placement in state.placements]
    return {SHARD: local(state), "shape": tuple(state.shape), "dims": dims, "mesh": _describe_mesh(state)}


def _like(state: dict[Any, Any], entries: dict[Any, Any]) -> Any:
    """A mapping of the same class; a module's with the versions by which ``load_state_dict`` knows older states."""
    made: Any = type(state)(entries)
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata
    return made


def _described(placement: Any) -> int | list[int]:
    """A placement in numbers: the dimension that is sharded; with two numbers, FSDP2's over tensor parallelism."""
    if hasattr(placement, "split_factor"):  # torch's _StridedShard, which in some versions says that it is no shard
        return [placement.dim, placement.split_factor]
    if placement.is_shard():
        return int(placement.dim)
    if placement.is_replicate():
        return REPLICATED
    raise ValueError(f"a DTensor is placed as {placement}, which a state cannot hold: redistribute it to Shard")


def globalized(state: Any, like: Iterable[Tensor]) -> Any:
    """What :func:`localized` was made of, on the meshes of this process.

    Args:
        state: may hold no shard.
        like: tensors on the meshes that are needed, as the model's parameters.

    Raises:
        ValueError: a shard is of a mesh of other dimensions, or is none of its tensor's on this rank.
    """
    meshes = {_describe_mesh(tensor): tensor.device_mesh for tensor in like if is_sharded(tensor)}  # type: ignore[attr-defined]
    return _globalized(state, meshes)


def _globalized(state: Any, meshes: Mapping[str, Any]) -> Any:
    if type(state) in (dict, OrderedDict):
        if SHARD in state:
            return _dtensor(state, meshes)
        return _like(state, {key: _globalized(value, meshes) for key, value in state.items()})
    if type(state) in (list, tuple):
        return type(state)(_globalized(value, meshes) for value in state)
    return state


def _dtensor(saved: Mapping[str, Any], meshes: Mapping[str, Any]) -> Tensor:
    if saved["mesh"] not in meshes:
        known = ", ".join(meshes) or "none: no parameter is sharded here"
        raise ValueError(
            f"the state holds a shard of a mesh of {saved['mesh']}, and the model's parameters are on {known}: shard "
            "the model as it was when the state was saved"
        )
    from torch.distributed.tensor import DTensor

    mesh = meshes[saved["mesh"]]
    placements = [_placement(dim) for dim in saved["dims"]]
    shape = torch.Size(saved["shape"])
    stride = torch.empty(shape, device="meta").stride()
    shard = saved[SHARD].to(mesh.device_type)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def _placement(described: int | list[int]) -> Any:
    """The placement of :func:`_described`."""
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    if isinstance(described, list):
        dim, split_factor = described
        return _StridedShard(dim, split_factor=split_factor)
    return Replicate() if described == REPLICATED else Shard(described)


def _describe_mesh(tensor: Any) -> str:
    """Names and sizes of the dimensions of its mesh: equal on all replicas."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or range(mesh.ndim)
    return ", ".join(f"{name}: {size}" for name, size in zip(names, mesh.shape, strict=True))
