"""A model's gradients as flat vectors: named, split into sketched and dense, taken up and put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hvd_sketch.exchange.feedback import Limits
from hvd_sketch.kernels import load_backend
from hvd_sketch.shards import is_sharded, local

NamedParameter = tuple[str, Tensor]
Place = tuple[Tensor, int, int]  # a parameter, and where it starts and stops in the vector
FLAT_FACTOR = 64  # 65,536 elements by default: more than a bias or a norm has, but for vocabularies
MIN_ALONE = 1 << 16  # elements; a slice costs the exchange two kernel calls, 25 us each


def is_dense(parameter: Tensor, dense_below: int) -> bool:
    """Whether a tensor is exchanged dense: this rank holds fewer than ``dense_below`` elements of it.

    With one dimension 64 times as many: biases and norms of any width go dense, a model's flattened weights do not.
    """
    return local(parameter).numel() < dense_below * (FLAT_FACTOR if parameter.ndim <= 1 else 1)


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
        ValueError: no parameters, some without memory, partial sums, some sharded and some not, a dtype that is not
            real floating point, or more than one device.
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
        if is_sharded(parameter) and any(p.is_partial() for p in parameter.placements):  # type: ignore[attr-defined]
            raise ValueError(
                f"parameter {name!r} is a DTensor with a partial placement, a sum that has not been made: give it "
                "another one by redistribute() before wrapping its optimizer"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; gradients are exchanged as real float32, so give "
                f"its real and imaginary parts as float parameters of their own, or train it with an "
                f"optimizer of its own"
            )
    whole = [name for name, parameter in named if not is_sharded(parameter)]
    if 0 < len(whole) < len(named):
        raise ValueError(
            f"parameters {', '.join(map(repr, whole[:5]))} are not sharded, and others are: nobody averages their "
            "gradients over the ranks of a mesh. Apply fully_shard to the whole model, without ignored_params"
        )
    devices = {parameter.device: name for name, parameter in named}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(
            f"all parameters must be on one device, got {where}: move the model to one device before "
            f"wrapping its optimizer, or wrap one optimizer for each device"
        )


class FlatParameters:
    """Several parameters seen as one vector ``[dim]``, end to end in the order given; of DTensors the local shards.

    Args:
        named: at least one parameter, with its name for messages.
        in_slices: whether the vector may come in slices, a large parameter alone in its own, which then is its
            ``p.grad`` itself and needs no copy.
        dtype: of the vector: float32, or float64.

    Attributes:
        parameters: as given.
        shapes: of what this rank holds of each.
        dim: number of coordinates.
        dtype: of the vector.
        dense_bytes: bytes of the gradients in the parameters' own dtypes.
        device: of the parameters and of the vector.
        slices: for each slice the parameters it is made of, with where each starts and stops in the vector.

    Communication: none, in any method.
    """

    def __init__(
        self, named: Sequence[NamedParameter], in_slices: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.parameters = [parameter for _, parameter in named]
        self.dtype = dtype
        self.device = self.parameters[0].device
        self._names = [name for name, _ in named]
        self._kinds = [_kind(p) for p in self.parameters]
        self.shapes = [tuple(local(p).shape) for p in self.parameters]
        self._starts = torch.tensor([0, *map(prod, self.shapes)], device=self.device).cumsum(0)
        starts = self._starts.tolist()
        self._places = list(zip(self.parameters, starts, starts[1:], strict=False))
        self.slices = _in_slices(self._places) if in_slices else [self._places]
        self.dim: int = starts[-1]
        self.dense_bytes = sum(local(p).nbytes for p in self.parameters)
        # Kept over the steps: at 25 M coordinates, 2 threads, filling a fresh buffer took 88 ms, this one 19.
        self._buffers: list[Tensor | None] = [None] * len(self.slices)

    def limits(self, scale: float = 1.0) -> Limits:
        """How large an element of the vector may be so that ``scale`` times it fits its parameter's dtype."""
        most = torch.finfo(self.dtype).max
        largest = [min(torch.finfo(p.dtype).max, most) / scale for p in self.parameters]
        return Limits(self._starts[1:], torch.tensor(largest, dtype=self.dtype, device=self.device))

    def name(self, coordinate: int) -> str:
        """The parameter and the element that a coordinate is."""
        number = int(torch.searchsorted(self._starts, coordinate, right=True)) - 1
        return f"element {coordinate - int(self._starts[number])} of {self._names[number]!r}"

    def unused(self, used: Sequence[bool]) -> list[tuple[int, int]]:
        """The coordinates of those parameters that are not used, as ranges; neighbours are not joined."""
        places = zip(self._places, used, strict=True)
        return [(start, stop) for (_, start, stop), is_used in places if not is_used and stop > start]

    def check_unchanged(self) -> None:
        """Refuse parameters that are no longer what they were at construction.

        Raises:
            ValueError: the shape, dtype or device of one has changed; a gradient is placed on another way than its
                parameter.
        """
        for name, parameter, before in zip(self._names, self.parameters, self._kinds, strict=True):
            now = _kind(parameter)
            if now != before:
                raise ValueError(
                    f"parameter {name!r} was {_tell_kind(before)} when the optimizer was wrapped, and is "
                    f"{_tell_kind(now)} now: change the model first, then make its optimizer and wrap it"
                )
            if is_sharded(parameter) and parameter.grad is not None:
                _check_placements(name, parameter)

    def pack(self, weight_decay: float = 0.0, inverse_scale: Tensor | None = None) -> list[Tensor]:
        """All slices in order."""
        return [self._pack_slice(i, weight_decay, inverse_scale) for i in range(len(self.slices))]

    @torch.no_grad()
    def _pack_slice(self, number: int, weight_decay: float = 0.0, inverse_scale: Tensor | None = None) -> Tensor:
        """``g <- inverse_scale * p.grad + weight_decay * p``, a missing ``p.grad`` counting as zeros.

        Any dtype and memory format; sparse gradients are added up densely. ``p.grad`` is not changed.

        Args:
            number: which of :attr:`slices`.
            weight_decay: added for every parameter, also where only other ranks have a gradient.
            inverse_scale: float32 [], undoes a loss scale in the vector's dtype.

        Returns:
            ``dtype`` [n]: memory of ``p.grad``, or a buffer that the next call overwrites; not to be written to.
        """
        places = self.slices[number]
        if len(places) == 1 and not weight_decay and inverse_scale is None:
            as_it_lies = _plain_gradient(places[0][0], self.dtype)
            if as_it_lies is not None:
                return as_it_lies
        first, last = places[0][1], places[-1][2]
        buffer = self._buffers[number]
        if buffer is None:
            buffer = self._buffers[number] = torch.empty(last - first, dtype=self.dtype, device=self.device)
        alike: list[tuple[Tensor, Tensor]] = []  # copied together, in one launch on a GPU
        for parameter, start, stop in places:
            held = local(parameter)
            target = buffer[start - first : stop - first].view(held.shape)
            gradient = _local_gradient(parameter)
            if gradient is None:
                target.zero_()
            elif gradient.layout != torch.strided:
                target.copy_(gradient.to(self.dtype).to_dense())  # entries that meet are added in the vector's dtype
            elif gradient.is_contiguous():
                alike.append((target, gradient))
            else:
                target.copy_(gradient)
        if alike:
            targets, gradients = zip(*alike, strict=True)
            torch._foreach_copy_(targets, gradients)
        if inverse_scale is not None:
            buffer.mul_(inverse_scale)
        if weight_decay:
            for parameter, start, stop in places:
                held = local(parameter)
                buffer[start - first : stop - first].view(held.shape).add_(held, alpha=weight_decay)
        return buffer

    @torch.no_grad()
    def unpack_sparse(self, indices: Tensor, values: Tensor, used: Sequence[bool] | None = None) -> None:
        """Set every ``p.grad`` to zeros but for ``values`` at ``indices``; created where absent.

        All of it is written, for it holds this rank's gradient: on a GPU in two launches for all contiguous parameters
        of one dtype, and without waiting for it; where one is not contiguous, it is waited for once.

        Args:
            indices: int64 [n], ascending, in ``0 … dim - 1``.
            values: float32 [n].
            used: for each parameter whether it gets a gradient; ``p.grad`` of the others becomes None. Default: all.
        """
        gradients = self.writable_gradients(used)
        present = [gradient for gradient in gradients if gradient is not None]
        if present:
            torch._foreach_zero_(present)
        for dtype in dict.fromkeys(gradient.dtype for gradient in present):
            alike = [g if g is not None and g.is_contiguous() and g.dtype == dtype else None for g in gradients]
            load_backend(None, self.device).scatter_(alike, self._starts, indices, values)
        if all(gradient.is_contiguous() for gradient in present):
            return
        for gradient, (start, first, last) in zip(gradients, self._bounds(indices), strict=True):
            if gradient is not None and not gradient.is_contiguous():
                places = torch.unravel_index(indices[first:last] - start, gradient.shape)
                gradient[places] = values[first:last].to(gradient.dtype)

    @torch.no_grad()
    def unpack_dense(self, values: Tensor, used: Sequence[bool] | None = None) -> None:
        """Set every ``p.grad`` to its part of ``values``, ``dtype`` [dim]; see :meth:`unpack_sparse`."""
        for gradient, (_, start, stop) in zip(self.writable_gradients(used), self._places, strict=True):
            if gradient is not None:
                gradient.copy_(values[start:stop].view(gradient.shape))

    @torch.no_grad()
    def fill_gradients(self, value: float, used: Sequence[bool] | None = None) -> None:
        """Set every element of every ``p.grad`` to ``value``; see :meth:`unpack_sparse`."""
        for gradient in self.writable_gradients(used):
            if gradient is not None:
                gradient.fill_(value)

    def writable_gradients(self, used: Sequence[bool] | None) -> list[Tensor | None]:
        """``p.grad`` of every parameter that is used; the others have none from now on."""
        gradients: list[Tensor | None] = []
        for parameter, is_used in zip(self.parameters, used or [True] * len(self.parameters), strict=True):
            if not is_used:
                parameter.grad = None
            gradients.append(_writable_gradient(parameter) if is_used else None)
        return gradients

    def _bounds(self, indices: Tensor) -> Iterator[tuple[int, int, int]]:
        """Where each parameter starts in the vector, and from where to where in ``indices`` its own lie."""
        bounds = torch.searchsorted(indices, self._starts).tolist()
        for (_, start, _), (first, last) in zip(self._places, pairwise(bounds), strict=True):
            yield start, first, last


Kind = tuple[torch.dtype, torch.Size, torch.device]


def _kind(parameter: Tensor) -> Kind:
    return parameter.dtype, local(parameter).shape, parameter.device


def _tell_kind(kind: Kind) -> str:
    dtype, shape, device = kind
    return f"{str(dtype).removeprefix('torch.')} of {tuple(shape)} on {device}"


def _in_slices(places: list[Place]) -> list[list[Place]]:
    """Large parameters alone, small ones together with their neighbours: alike on every rank."""
    slices: list[list[Place]] = []
    for place in places:
        is_small = _length(place) < MIN_ALONE
        if is_small and slices and _length(slices[-1][-1]) < MIN_ALONE:
            slices[-1].append(place)
        else:
            slices.append([place])
    return slices


def _length(place: Place) -> int:
    return place[2] - place[1]


def _check_placements(name: str, parameter: Any) -> None:
    if parameter.grad.placements != parameter.placements:
        there, here = (tuple(map(str, tensor.placements)) for tensor in (parameter, parameter.grad))
        raise ValueError(
            f"parameter {name!r} is placed {there} on its mesh, and its gradient {here}: "
            "p.grad = p.grad.redistribute(placements=p.placements) before the step"
        )


def _local_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank holds of ``p.grad``: the memory itself."""
    return None if parameter.grad is None else local(parameter.grad)


def _plain_gradient(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``p.grad`` as ``dtype`` [n] if it lies so in memory."""
    gradient = _local_gradient(parameter)
    if gradient is None or gradient.layout != torch.strided:
        return None
    is_plain = gradient.dtype == dtype and gradient.is_contiguous()
    return gradient.detach().view(-1) if is_plain else None


def _writable_gradient(parameter: Tensor) -> Tensor:
    """``p.grad``, a new one where it is absent, sparse, or several of its elements share memory."""
    gradient = _local_gradient(parameter)
    if gradient is None or gradient.layout != torch.strided or _elements_share_memory(gradient):
        parameter.grad = torch.empty_like(parameter)
        gradient = local(parameter.grad)
    return gradient.detach()


def _elements_share_memory(tensor: Tensor) -> bool:
    # As expand() leaves it: writing into one element would change others.
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
