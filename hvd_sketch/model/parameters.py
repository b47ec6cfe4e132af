"""A model's parameters: named, split into sketched and dense, refused where they cannot be exchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hvd_sketch.shards import is_sharded, local

NamedParameter = tuple[str, Tensor]
FLAT_FACTOR = 64  # 65,536 elements by default: more than a bias or a norm has, but for vocabularies


def is_dense(parameter: Tensor, dense_below: int) -> bool:
    """Whether a tensor is exchanged dense: this rank holds fewer than ``dense_below`` elements of it.

    With one dimension 64 times as many: biases and norms of any width go dense, a model's flattened weights do not.
    """
    return local(parameter).numel() < dense_below * (FLAT_FACTOR if parameter.ndim <= 1 else 1)


def dtype_of_gradient(parameter: Tensor) -> torch.dtype | None:
    """What ``p.grad`` is held to; None: any. From torch 2.13 on it may differ from the parameter's own dtype."""
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", parameter.dtype)
    return dtype


def describe_dtype(parameter: Tensor) -> str:
    """In words, for the comparison of ranks: what travels may depend on both."""
    own, of_gradient = parameter.dtype, dtype_of_gradient(parameter)
    told = str(own).removeprefix("torch.")
    return told if of_gradient == own else f"{told} with gradients of {of_gradient or 'any dtype'}"


def sketched_dim(parameters: Iterable[Tensor | NamedParameter], dense_below: int = 1024) -> int:
    """How many coordinates of a model are sketched, for ``SketchConfig.for_compression(ratio, dim)``.

    Of sharded parameters (DTensors) those that this rank holds.

    Args:
        parameters: ``model.parameters()`` or ``model.named_parameters()``. Those that require no gradient
            are left out.
        dense_below: as in ``SketchConfig``.

    Communication: none.
    """
    tensors = (entry[1] if isinstance(entry, tuple) else entry for entry in parameters)
    return sum(local(p).numel() for p in tensors if p.requires_grad and not is_dense(p, dense_below))


def name_parameters(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[NamedParameter] | None
) -> list[NamedParameter]:
    """``(name, parameter)`` for all that the optimizer holds and that require a gradient, in its own order.

    Args:
        optimizer: whose ``param_groups`` decide what is exchanged, and in which order.
        named_parameters: may hold more than the optimizer; None names them ``parameter.<group>.<index>``.

    Raises:
        ValueError: two parameters of one name, or a parameter of the optimizer without a name.
    """
    places: dict[Tensor, str] = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if parameter.requires_grad:
                places.setdefault(parameter, f"parameter.{i}.{j}")
    if named_parameters is None:
        return [(place, parameter) for parameter, place in places.items()]
    given = list(named_parameters) if isinstance(named_parameters, Iterable) else [None]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in given):
        raise ValueError("named_parameters must be (name, parameter) pairs: pass model.named_parameters()")
    repeated = sorted(name for name, times in Counter(name for name, _ in given).items() if times > 1)
    if repeated:
        raise ValueError(
            f"named_parameters holds more than one parameter named {', '.join(map(repr, repeated))}: "
            "put a prefix before the names of each model"
        )
    names = first_names(given)
    unnamed = [f"{place} (shape {tuple(p.shape)})" for p, place in places.items() if p not in names]
    if unnamed:
        raise ValueError(
            f"named_parameters lacks {len(unnamed)} of the optimizer's parameters: {', '.join(unnamed[:5])}: "
            "pass the named_parameters() of every model the optimizer trains, or leave them out"
        )
    return [(names[parameter], parameter) for parameter in places]


def first_names(named: Iterable[NamedParameter]) -> dict[Tensor, str]:
    """Each parameter with its first name, in order: tied weights come under several."""
    names: dict[Tensor, str] = {}
    for name, parameter in named:
        names.setdefault(parameter, name)
    return names


def check_exchangeable(named: Sequence[NamedParameter]) -> None:
    """Refuse parameters that do not fit into one float32 vector on one device.

    Raises:
        ValueError: no parameters, some without memory, FSDP1's, partial sums, some sharded and some not, a dtype that
            is not real floating point, or more than one device.
    """
    if not named:
        raise ValueError(
            "the optimizer holds no parameter that requires a gradient, so there is nothing to exchange: "
            "check requires_grad, and that the optimizer was given this model's parameters"
        )
    for name, parameter in named:
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet: run one forward pass of the model before wrapping its optimizer"
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on the meta device and has no memory: make the model on a device, or call "
                "model.to_empty(device=...) and initialise it, before wrapping its optimizer"
            )
        if getattr(parameter, "_fsdp_flattened", False):  # also where it is a view of a flat parameter
            raise ValueError(
                f"parameter {name!r} belongs to FullyShardedDataParallel (FSDP1), whose ranks hold different shards "
                "under one name: shard the model by fully_shard (FSDP2) along one dimension of a mesh, and exchange "
                "along the other, transport=TorchTransport(mesh['replicate'])"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; gradients are exchanged as real float32, so give "
                f"its real and imaginary parts as float parameters of their own, or train it with an "
                f"optimizer of its own"
            )
    _check_shards(named)
    devices = {parameter.device: name for name, parameter in named}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(
            f"all parameters must be on one device, got {where}: move the model to one device before "
            f"wrapping its optimizer, or wrap one optimizer for each device"
        )


def _check_shards(named: Sequence[NamedParameter]) -> None:
    for name, parameter in named:
        if is_sharded(parameter) and any(p.is_partial() for p in parameter.placements):  # type: ignore[attr-defined]
            raise ValueError(
                f"parameter {name!r} is a DTensor with a partial placement, a sum that has not been made: give it "
                "another one by redistribute() before wrapping its optimizer"
            )
    whole = [name for name, parameter in named if not is_sharded(parameter)]
    if 0 < len(whole) < len(named):
        raise ValueError(
            f"parameters {', '.join(map(repr, whole[:5]))} are not sharded, and others are: nobody averages their "
            "gradients over the ranks of a mesh. Apply fully_shard to the whole model, without ignored_params"
        )
