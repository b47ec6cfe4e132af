"""Equal starting points: parameters and optimizer state from one rank to all, as bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hvd_sketch.exchange.setup import refused_together, require_equal
from hvd_sketch.model.mesh import require_equal_shards
from hvd_sketch.shards import globalized, is_sharded, local, localized
from hvd_sketch.transport import Transport, resolve_transport
from hvd_sketch.transport.stall import watched

# Horovod takes 9 to 16 ms for one tiny collective, so small tensors travel together.
BUCKET_BYTES = 64 * 2**20
UNSAFE = -1


@runtime_checkable
class Wrapped(Protocol):
    """An optimizer around another one, with a state of its own: a ``DistributedOptimizer``."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that was wrapped."""

    @property
    def place(self) -> tuple[int, int]:
        """Rank and size of its transport."""

    def check_take_over(self, root_rank: int) -> None:
        """Raise ValueError where this rank cannot :meth:`take_over_state` now. Communication: none."""

    def take_over_state(self, root_rank: int) -> None:
        """Take over from the root what belongs to no rank alone. Communication: collective, all ranks."""


def broadcast_parameters(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    root_rank: int = 0,
    transport: str | Transport = "auto",
) -> None:
    """Copy the root's tensors to all ranks, in place, in the order given; of DTensors the local shards.

    Args:
        params: ``model.state_dict()``, or pairs as from ``model.named_parameters()``; any dtype and strides.
        root_rank: the rank whose values all get.
        transport: as for :class:`~hvd_sketch.DistributedOptimizer`.

    Communication: collective, all ranks.

    Raises:
        ValueError: on every rank: names, shapes or dtypes differ between ranks; something is no dense tensor, or a
            DTensor that is sharded over these ranks; there is no rank ``root_rank``.
    """
    comm = resolve_transport(transport)
    entries = list(params.items() if isinstance(params, Mapping) else params)
    # Compared before anything is refused: what is refused is then refused on every rank.
    described = {f"tensor {i}": _describe(entry) for i, entry in enumerate(entries)}
    require_equal(comm, {"root_rank": root_rank, **described}, "broadcast parameters")
    _check_root(comm, root_rank)
    _check_tensors(entries)
    if any(is_sharded(tensor) for _, tensor in entries):
        require_equal_shards(comm, entries)
    broadcast_tensors([_once(local(tensor)) for _, tensor in entries], root_rank, comm)


def broadcast_tensors(tensors: list[Tensor], root_rank: int, comm: Transport) -> None:
    """Copy the root's tensors to all ranks, in place; equal shapes and dtypes. Communication: collective, all ranks."""
    with watched(comm, "broadcast tensors"):
        for bucket in _buckets(tensors):
            _broadcast_bucket(bucket, root_rank, comm)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, transport: str | Transport = "auto"
) -> None:
    """Give all ranks the root's optimizer state: learning rates, momenta, step counts.

    Of a ``DistributedOptimizer`` also the exchange's: the number of the step, momentum that is equal on all ranks, and
    the residuals that the root has loaded from a ``state_dict(consolidated=True)``. Other residuals belong to their
    rank: one at the root's step keeps its own, one at another step begins with zeros.

    Args:
        optimizer: holding the same parameters on every rank. Modified; on the root it loads its own state again, as
            from a checkpoint.
        root_rank, transport: as for :func:`broadcast_parameters`.

    Communication: collective, all ranks.

    Raises:
        ValueError: on every rank: the optimizers differ in kind, groups or shapes; the root's state holds
            what ``torch.save`` or ``torch.load(weights_only=True)`` refuses; there is no rank ``root_rank``.
    """
    comm = resolve_transport(transport)
    wrapped = optimizer if isinstance(optimizer, Wrapped) else None
    compared = {"root_rank": root_rank, "is wrapped": wrapped is not None, **_optimizer_fields(optimizer)}
    require_equal(comm, compared, "broadcast an optimizer's state")
    _check_root(comm, root_rank)
    with refused_together(comm):
        if wrapped is not None and wrapped.place != (comm.rank, comm.size):
            rank, size = wrapped.place
            raise ValueError(
                f"the optimizer is rank {rank} of {size} of its own transport, and rank {comm.rank} of {comm.size} of "
                "this one: pass the transport of its process set or communicator, and the root_rank there"
            )
        if wrapped is not None:
            wrapped.check_take_over(root_rank)
    _broadcast_state(optimizer if wrapped is None else wrapped.inner, root_rank, comm)
    if wrapped is not None:
        wrapped.take_over_state(root_rank)


def _broadcast_state(optimizer: torch.optim.Optimizer, root_rank: int, comm: Transport) -> None:
    state = broadcast_state(optimizer.state_dict() if comm.rank == root_rank else None, root_rank, comm)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The root, too: loading gives a state the dtype of its parameter, which it need not have had.
    optimizer.load_state_dict(globalized(state, like=parameters))


def broadcast_state(state: dict[str, Any] | None, root_rank: int, comm: Transport) -> dict[str, Any]:
    """The root's state on all ranks, with :func:`~hvd_sketch.shards.localized` tensors on the CPU, as from a file.

    Communication: collective, all ranks.

    Raises:
        ValueError: on every rank: it cannot be saved, or others could not load it safely.
    """
    data = _serialized(state) if state is not None else None
    with watched(comm, "broadcast a state"):
        length = int(comm.broadcast_(torch.tensor([UNSAFE if data is None else data.numel()], device="cpu"), root_rank))
    if length == UNSAFE:
        raise ValueError(
            f"the optimizer state of rank {root_rank} holds objects that torch.save or "
            "torch.load(weights_only=True) refuses: keep to tensors, numbers, strings, lists and dicts in "
            "param_groups and state"
        )
    if data is None:
        data = torch.empty(length, dtype=torch.uint8, device="cpu")
    with watched(comm, "broadcast a state"):
        comm.broadcast_(data, root_rank)
    return _deserialized(data)


def _check_root(comm: Transport, root_rank: int) -> None:
    if not 0 <= root_rank < comm.size:
        raise ValueError(f"root_rank must be in 0 … {comm.size - 1}, the ranks there are, got {root_rank}")


def _describe(entry: Any) -> str:
    if not isinstance(entry, tuple) or len(entry) != 2:
        return type(entry).__name__
    name, tensor = entry
    if not isinstance(tensor, Tensor):
        return f"{name} {type(tensor).__name__}"
    sharded = " of a DTensor" if is_sharded(tensor) else ""
    repeated = f", repeated from {tuple(_once(tensor).shape)}" if _once(tensor) is not tensor else ""
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.layout}{sharded}{repeated}"


def _once(tensor: Tensor) -> Tensor:
    """Without the dimensions that ``expand()`` has made: their elements are the same memory."""
    if is_sharded(tensor) or tensor.layout != torch.strided:
        return tensor
    for dim in reversed(range(tensor.dim())):
        tensor = tensor.select(dim, 0) if tensor.stride(dim) == 0 and tensor.shape[dim] > 1 else tensor
    return tensor


def _check_tensors(entries: list[Any]) -> None:
    for entry in entries:
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise ValueError(
                f"params must be a state_dict or (name, tensor) pairs, got {type(entry).__name__}: pass "
                "model.state_dict() or model.named_parameters()"
            )
        if not isinstance(entry[1], Tensor) or entry[1].layout != torch.strided:
            raise ValueError(
                f"every value must be a dense tensor, got {_describe(entry)}: leave it out, as by "
                "{name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}"
            )


def _optimizer_fields(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What must be equal for one optimizer to take over the other's state."""
    fields: dict[str, object] = {"optimizer": type(optimizer).__name__, "groups": len(optimizer.param_groups)}
    for i, group in enumerate(optimizer.param_groups):
        fields[f"parameters of group {i}"] = [(tuple(p.shape), str(p.dtype)) for p in group["params"]]
    return fields


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of up to ``BUCKET_BYTES`` together, cut by sizes alone: equally on all ranks."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        size_bytes = tensor.numel() * tensor.element_size()
        if bucket and filled + size_bytes > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += size_bytes
    if filled:
        yield bucket


@torch.no_grad()
def _broadcast_bucket(tensors: list[Tensor], root_rank: int, comm: Transport) -> None:
    device = tensors[0].device
    data = torch.cat([_bytes_of(tensor.to(device)) for tensor in tensors])
    comm.broadcast_(data, root_rank)
    if comm.rank == root_rank:
        return
    start = 0
    for tensor in tensors:
        stop = start + tensor.numel() * tensor.element_size()
        # A copy of its own: memory of a wider dtype must begin at a multiple of its size.
        tensor.copy_(data[start:stop].clone().view(tensor.dtype).view(tensor.shape))
        start = stop


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _serialized(state: dict[str, Any]) -> Tensor | None:
    """The state as uint8 [n], or None if it cannot be saved, or others could not load it safely."""
    file = io.BytesIO()
    try:
        torch.save(localized(state), file)
        data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        _deserialized(data)
    except Exception:  # picklers and unpicklers raise whatever they like
        return None
    return data


def _deserialized(data: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
