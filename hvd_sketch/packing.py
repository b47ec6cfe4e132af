"""A model's gradients as flat float32 vectors: named, split into sketched and dense, exchanged, put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.agreement import all_finite
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce
from hvd_sketch.transport.base import Transport
from hvd_sketch.volume import CommLedger

NamedParameter = tuple[str, Tensor]


def is_dense(parameter: Tensor, dense_below: int) -> bool:
    """Whether a tensor is exchanged dense: fewer than ``dense_below`` elements, or at most one dimension."""
    return parameter.numel() < dense_below or parameter.ndim <= 1


def sketched_dim(parameters: Iterable[Tensor | NamedParameter], dense_below: int = 1024) -> int:
    """How many coordinates of a model are sketched, for ``SketchConfig.for_compression(ratio, dim)``.

    Args:
        parameters: ``model.parameters()`` or ``model.named_parameters()``. Those that require no gradient
            are left out.
        dense_below: as in ``SketchConfig``.

    Communication: none.
    """
    tensors = (entry[1] if isinstance(entry, tuple) else entry for entry in parameters)
    return sum(p.numel() for p in tensors if p.requires_grad and not is_dense(p, dense_below))


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
    given = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in given):
        raise ValueError("named_parameters must be (name, parameter) pairs: pass model.named_parameters()")
    repeated = sorted(name for name, times in Counter(name for name, _ in given).items() if times > 1)
    if repeated:
        raise ValueError(
            f"named_parameters holds more than one parameter named {', '.join(map(repr, repeated))}: "
            "put a prefix before the names of each model"
        )
    names: dict[Tensor, str] = {}
    for name, parameter in given:
        names.setdefault(parameter, name)  # tied weights come under several names
    unnamed = [f"{place} (shape {tuple(p.shape)})" for p, place in places.items() if p not in names]
    if unnamed:
        raise ValueError(
            f"named_parameters lacks {len(unnamed)} of the optimizer's parameters: {', '.join(unnamed[:5])}: "
            "pass the named_parameters() of every model the optimizer trains, or leave them out"
        )
    return [(names[parameter], parameter) for parameter in places]


def check_exchangeable(named: Sequence[NamedParameter]) -> None:
    """Refuse parameters that do not fit into one float32 vector on one device.

    Raises:
        ValueError: no parameters, a dtype that is not real floating point, or more than one device.
    """
    if not named:
        raise ValueError(
            "the optimizer holds no parameter that requires a gradient, so there is nothing to exchange: "
            "check requires_grad, and that the optimizer was given this model's parameters"
        )
    for name, parameter in named:
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; gradients are exchanged as real float32, so give "
                f"its real and imaginary parts as float parameters of their own, or train it with an "
                f"optimizer of its own"
            )
    devices = {parameter.device: name for name, parameter in named}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(
            f"all parameters must be on one device, got {where}: move the model to one device before "
            f"wrapping its optimizer, or wrap one optimizer for each device"
        )


class FlatParameters:
    """Several parameters seen as one float32 vector ``[dim]``, laid end to end in the order given.

    A parameter whose ``requires_grad`` is switched off later counts as zeros; its ``p.grad`` is let alone.

    Attributes:
        dim: number of coordinates.
        dense_bytes: bytes of the gradients in the parameters' own dtypes.
        device: of the parameters and of the vector.

    Communication: none, in any method.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.device = parameters[0].device
        self._starts = torch.tensor([0] + [p.numel() for p in parameters], device=self.device).cumsum(0)
        starts = self._starts.tolist()
        self._parts = list(zip(parameters, starts, starts[1:], strict=False))  # parameter, start, stop
        self.dim: int = starts[-1]
        self.dense_bytes = sum(p.numel() * p.element_size() for p in parameters)
        # Kept over the steps: at 25 M coordinates, 2 threads, filling a fresh buffer took 88 ms, this one 19.
        self._buffer = torch.empty(self.dim, device=self.device)

    @torch.no_grad()
    def pack(self, weight_decay: float = 0.0, inverse_scale: Tensor | None = None) -> Tensor:
        """``g <- inverse_scale * p.grad + weight_decay * p``, a missing ``p.grad`` counting as zeros.

        Any dtype and memory format; sparse gradients are added up densely. ``p.grad`` is not changed.

        Args:
            weight_decay: added for every parameter, also where only other ranks have a gradient.
            inverse_scale: float32 [], undoes a loss scale in float32.

        Returns:
            float32 [dim]: a buffer that the next call overwrites.
        """
        for parameter, start, stop in self._parts:
            part = self._buffer[start:stop].view(parameter.shape)
            gradient = parameter.grad if parameter.requires_grad else None
            if gradient is None:
                part.zero_()
            elif gradient.layout == torch.strided:
                part.copy_(gradient)
            else:
                part.copy_(gradient.to(torch.float32).to_dense())  # entries that meet are added in float32
        if inverse_scale is not None:
            self._buffer.mul_(inverse_scale)
        if weight_decay:
            for parameter, start, stop in self._parts:
                if parameter.requires_grad:
                    self._buffer[start:stop].view(parameter.shape).add_(parameter, alpha=weight_decay)
        return self._buffer

    @torch.no_grad()
    def unpack_sparse(self, indices: Tensor, values: Tensor) -> None:
        """Set every ``p.grad`` to zeros but for ``values`` at ``indices``; created where absent.

        Args:
            indices: int64 [n], ascending, in ``0 … dim - 1``.
            values: float32 [n].
        """
        cuts = torch.searchsorted(indices, self._starts).tolist()
        for (parameter, start, _), (first, last) in zip(self._parts, pairwise(cuts), strict=True):
            if parameter.requires_grad:
                gradient = _writable_gradient(parameter).zero_()
                if first < last:
                    _scatter_(gradient, indices[first:last] - start, values[first:last])

    @torch.no_grad()
    def unpack_dense(self, values: Tensor) -> None:
        """Set every ``p.grad`` to its part of ``values``, float32 [dim]; created where absent."""
        for parameter, start, stop in self._parts:
            if parameter.requires_grad:
                _writable_gradient(parameter).copy_(values[start:stop].view(parameter.shape))


def _writable_gradient(parameter: Tensor) -> Tensor:
    """``p.grad``, made anew where it is absent, sparse, or several of its elements share memory."""
    gradient = parameter.grad
    if gradient is None or gradient.layout != torch.strided or _elements_share_memory(gradient):
        gradient = parameter.grad = torch.empty_like(parameter)
    return gradient.detach()


def _elements_share_memory(tensor: Tensor) -> bool:
    # As expand() leaves it: writing into one element would change others.
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _scatter_(gradient: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write ``values`` at flat, row-major ``indices``, whatever the memory format."""
    values = values.to(gradient.dtype)
    if gradient.is_contiguous():
        gradient.view(-1)[indices] = values
    else:
        gradient[torch.unravel_index(indices, gradient.shape)] = values


class GradientExchange:
    """The sketched and the dense exchange of one model's gradients, in one fixed order on all ranks.

    Attributes:
        sketched: None where nothing is sketched.
        dense: None where nothing goes dense; with sketched tensors beside, it averages in the same step.
        ledger: of both.

    Communication: the constructor, :meth:`average` and ``state_dict(consolidated=True)`` are collective.
    """

    def __init__(self, named: Sequence[NamedParameter], config: SketchConfig | None, transport: Transport) -> None:
        # Without a config everything goes dense.
        sketched = [(name, p) for name, p in named if config and not is_dense(p, config.dense_below)]
        dense = [(name, p) for name, p in named if not config or is_dense(p, config.dense_below)]
        self.ledger = CommLedger()
        self.sketched: SketchedAllreduce | None = None
        self.dense: DenseAllreduce | None = None
        self._weight_decay = config.weight_decay if config is not None else 0.0
        ways = (("sketched", sketched), ("dense", dense))
        self._layout = [[way, name, list(p.shape)] for way, pairs in ways for name, p in pairs]
        # Both compare all parameters: then the first already finds a rank that would not build the second.
        described = [(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in named]
        common: dict[str, Any] = {"parameters": described, "ledger": self.ledger}
        if sketched and config is not None:
            flat = self._flat = FlatParameters([p for _, p in sketched])
            self.sketched = SketchedAllreduce(
                config, flat.dim, transport, flat.device, dense_bytes=flat.dense_bytes, **common
            )
        if dense:
            flat = self._dense_flat = FlatParameters([p for _, p in dense])
            self.dense = DenseAllreduce(
                config, flat.dim, transport, flat.device, dense_bytes=flat.dense_bytes, **common
            )

    @property
    def skipped_steps(self) -> int:
        """How many calls of :meth:`average` all ranks skipped."""
        part = self.sketched or self.dense
        return part.skipped_steps if part is not None else 0

    def average(self, inverse_scale: Tensor | None = None, finite: bool = True) -> bool:
        """Average all gradients over the ranks into ``p.grad``; False if all ranks skip instead.

        Args:
            inverse_scale: see :meth:`FlatParameters.pack`; may differ between ranks.
            finite: this rank's verdict on anything else; False on one rank makes all skip.
        """
        if self.sketched is None:
            return self._average_dense(inverse_scale, finite)
        if self.dense is not None:
            beside = self._dense_flat.pack(self._weight_decay, inverse_scale)
            finite = finite and all_finite([beside])
        update = self.sketched.step(self._flat.pack(self._weight_decay, inverse_scale), finite)
        if update.skipped:
            return False
        self._flat.unpack_sparse(update.indices, update.values)
        if self.dense is not None:
            self._dense_flat.unpack_dense(self.dense.mean(beside))
        return True

    def _average_dense(self, inverse_scale: Tensor | None, finite: bool) -> bool:
        assert self.dense is not None
        gradient = self._dense_flat.pack(self._weight_decay, inverse_scale)
        if not self.dense.begin_step(gradient, finite):
            return False
        self._dense_flat.unpack_dense(self.dense.mean(gradient))
        return True

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """The states of both exchanges and the layout they belong to."""
        states = {"sketched": self.sketched, "dense": self.dense}
        saved = {way: part.state_dict(consolidated) if part else None for way, part in states.items()}
        return {"layout": self._layout, **saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises ValueError where it was saved for other tensors."""
        if state["layout"] != self._layout:
            pairs = enumerate(zip_longest(state["layout"], self._layout))
            at, (theirs, ours) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint was saved for other tensors: tensor {at} is {theirs} there and {ours} here. "
                f"Build the optimizer with the same names, order and dense_below, or delete the checkpoint's "
                f"'hvd_sketch' entry to go on without residuals"
            )
        for way, part in (("sketched", self.sketched), ("dense", self.dense)):
            if part is not None:
                part.load_state_dict(state[way])

    def __repr__(self) -> str:
        parts = (("sketched", self.sketched), ("dense", self.dense))
        return ", ".join(f"{part.dim} coordinates {way}" for way, part in parts if part is not None)
