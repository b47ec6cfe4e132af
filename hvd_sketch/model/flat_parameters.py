"""A model's gradients as one vector: taken up from ``p.grad``, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.exchange.feedback import Limits
from hvd_sketch.kernels import load_backend
from hvd_sketch.model.parameters import NamedParameter, dtype_of_gradient
from hvd_sketch.shards import is_sharded, local

Place = tuple[Tensor, int, int]  # a parameter, and where it starts and stops in the vector
MIN_ALONE = 1 << 16  # elements; a slice costs the exchange two kernel calls, 25 us each


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

    @property
    def half_dtype(self) -> torch.dtype | None:
        """The dtype of 16 bits that all parameters and their gradients have, in which these travel without a loss."""
        (dtype, *others) = {dtype for p in self.parameters for dtype in (p.dtype, dtype_of_gradient(p))}
        return dtype if not others and dtype is not None and dtype.itemsize == 2 else None

    def limits(self, scale: float = 1.0) -> Limits:
        """How large an element of the vector may be so that ``scale`` times it fits its parameter's dtype."""
        most = torch.finfo(self.dtype).max
        largest = [min(torch.finfo(p.dtype).max, most) / scale for p in self.parameters]
        return Limits(self._starts[1:], torch.tensor(largest, dtype=self.dtype, device=self.device))

    def name(self, coordinate: int) -> str:
        """The parameter and the element that a coordinate is."""
        number = int(torch.searchsorted(self._starts, coordinate, right=True)) - 1
        return f"element {coordinate - int(self._starts[number])} of {self._names[number]!r}"

    def views_of(self, vector: Tensor) -> list[Tensor]:
        """For each parameter its part of a vector [dim], in its shape. No copies."""
        return [
            vector[start:stop].view(shape) for (_, start, stop), shape in zip(self._places, self.shapes, strict=True)
        ]

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

        All of it is written, for it holds this rank's gradient: on a GPU in two launches for all parameters of one
        dtype, and without waiting for it. One whose memory is in another order is written by way of a copy.

        Args:
            indices: int64 [n], ascending, in ``0 … dim - 1``.
            values: float32 [n].
            used: for each parameter whether it gets a gradient; ``p.grad`` of the others becomes None. Default: all.
        """
        gradients = self.writable_gradients(used)
        ordered = [
            g if g is None or g.is_contiguous() else torch.empty(g.shape, dtype=g.dtype, device=g.device)
            for g in gradients
        ]
        present = [gradient for gradient in ordered if gradient is not None]
        if present:
            torch._foreach_zero_(present)
        for dtype in dict.fromkeys(gradient.dtype for gradient in present):
            alike = [gradient if gradient is not None and gradient.dtype == dtype else None for gradient in ordered]
            load_backend(None, self.device).scatter_(alike, self._starts, indices, values)
        for gradient, in_order in zip(gradients, ordered, strict=True):
            if gradient is not None and in_order is not None and in_order is not gradient:
                gradient.copy_(in_order)

    @torch.no_grad()
    def unpack_dense(self, values: Tensor, used: Sequence[bool] | None = None) -> None:
        """Set every ``p.grad`` to its part of ``values``, ``dtype`` [dim]; see :meth:`unpack_sparse`."""
        gradients = zip(self.writable_gradients(used), self._places, strict=True)
        pairs = [(g, values[start:stop].view(g.shape)) for g, (_, start, stop) in gradients if g is not None]
        if pairs:
            targets, sources = zip(*pairs, strict=True)
            torch._foreach_copy_(targets, sources)  # in few launches on a GPU

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


def separate_gradients(parameters: Iterable[Tensor]) -> None:
    """Copy gradients whose stretches of memory overlap: what is written to one may change another.

    As autograd leaves those of ``a.view(-1) + b.view(-1)``. Communication: none.
    """
    stretches = []
    for parameter in parameters:  # in every step: each call of a tensor's here takes 0.2 us
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.strided:
            held = local(gradient)
            stretches.append((held.data_ptr(), held.nbytes if held.is_contiguous() else _extent_bytes(held), parameter))
    end = 0
    for start, extent_bytes, parameter in sorted(stretches, key=itemgetter(0)):
        if start < end and parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
        end = max(end, start + extent_bytes)


def _extent_bytes(tensor: Tensor) -> int:
    """From a tensor's first element to behind its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


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
