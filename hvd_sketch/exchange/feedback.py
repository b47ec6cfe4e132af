"""Error feedback: the momentum u and the residual v that every rank keeps to itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.exchange.agreement import all_finite
from hvd_sketch.kernels import load_backend
from hvd_sketch.sketch import CountSketch
from hvd_sketch.transport.staging import to_device

# The largest float32 but for rounding: W addends of a W-th of it each have a finite sum.
LARGEST_SUM = torch.finfo(torch.float32).max * (1 - 2**-20)
LEAST_KEPT = 1e-30  # of a residual that decays: it would come to subnormal numbers, which are slow, and stay there
LINE_BYTES = 64  # of a cache line, and of a vector of AVX-512
ROUNDED_UP = 1 + 2**-6  # a code stands for at most so many times the value: scales are rounded up to a bfloat16

# Start, stop and gradient of coordinates, ascending; where the gradient is None, v has taken it in.
Parts = Sequence[tuple[int, int, Tensor | None]]


@dataclass(frozen=True)
class Limits:
    """How large the elements of a mean may be so that the parameters' dtypes hold them."""

    ends: Tensor  # int64 [n], ascending: where run i of coordinates ends
    largest: Tensor  # [n], in the dtype of the mean: the largest magnitude in each run

    def at(self, indices: Tensor) -> Tensor:
        """The limit of every index, int64 [m]: float32 [m]."""
        return self.largest.index_select(0, torch.searchsorted(self.ends, indices, right=True))


def no_limits(dim: int, device: torch.device | str) -> Limits:
    """What float32 itself can hold."""
    largest = torch.finfo(torch.float32).max
    return Limits(torch.tensor([dim], device=device), torch.tensor([largest], dtype=torch.float32, device=device))


class Feedback:
    """``u <- m * u + g``, ``v <- v + u`` (paper, Alg. 3, lines 1 and 2), and zero both where v was sent (line 8).

    With momentum 0, u is g itself and is not kept. Of a v that is too large for the sum or for the parameter's dtype,
    :meth:`offer` gives what fits, and the rest stays in v.

    Args:
        size: how many ranks' offers are added.
        few_bits: whether offers are rounded to few-bit codes, which may stand for a little more.
        limits: of the mean over the ranks; default: what float32 holds.

    Attributes:
        momentum: ``m``.
        v: float32 [dim], the residual: everything produced here and not sent yet.
    """

    def __init__(
        self,
        dim: int,
        momentum: float,
        device: torch.device | str,
        size: int = 1,
        limits: Limits | None = None,
        few_bits: bool = False,
    ) -> None:
        self.momentum = momentum
        self.v = _zeros(dim, device)
        self._u = _zeros(dim if momentum else 0, device)
        self._kernels = load_backend(None, self.v.device)
        limits = limits if limits is not None else no_limits(dim, device)
        largest = LARGEST_SUM / size / (ROUNDED_UP if few_bits else 1)
        self._limits = Limits(limits.ends, limits.largest.clamp(max=largest))
        self._least_limit = float(self._limits.largest.min())
        self._size = size
        self._held_back: tuple[Tensor, Tensor] | None = None  # coordinates, and what of v was not offered there

    @property
    def u(self) -> Tensor:
        """float32 [dim], the momentum; zeros where momentum is 0."""
        return self._u if self.momentum else torch.zeros_like(self.v)

    def add_(self, values: Tensor, start: int = 0, sketch: CountSketch | None = None) -> None:
        """Take in coordinates ``start …`` of a gradient, float32 [n]; with ``sketch``, add their new v to it."""
        u, v = self._slices_of(start, start + values.numel())
        if sketch is None:
            self._kernels.feedback_(u, v, values, self.momentum)
        else:
            self._kernels.feedback_accumulate_(sketch.hash, sketch.table, u, v, values, self.momentum, start)

    def _slices_of(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        return self._u[start:stop] if self.momentum else None, self.v[start:stop]

    def offer_early(self, indices: Tensor, parts: Parts) -> tuple[Tensor, bool]:
        """What v will be at ``indices`` when the gradient has been taken in, with momentum 0, limited to what fits.

        Args:
            indices: int64 [n], ascending.
            parts: with the gradient that v has not taken in yet.

        Returns:
            float32 [n], with 0 where v will not be finite and has to be reset; whether it will be finite everywhere.
        """
        values = self._kernels.gather(
            self.v, indices, out=torch.empty(indices.numel(), dtype=torch.float32, device=self.v.device)
        )
        bounds = to_device(torch.tensor([part[:2] for part in parts], device="cpu").view(-1, 2), values.device)
        places = torch.searchsorted(indices, bounds).tolist()  # of all parts, for which a device is waited for once
        for (start, _, gradient), (first, last) in zip(parts, places, strict=True):
            if gradient is not None:
                values[first:last] += gradient[indices[first:last] - start]
        largest = largest_of(values)
        if largest <= self._least_limit:
            return values, True
        is_finite = largest < float("inf")
        if not is_finite:
            values.masked_fill_(~torch.isfinite(values), 0)
        limits = self._limits.at(indices)
        return torch.minimum(torch.maximum(values, -limits), limits), is_finite

    def offer(self, indices: Tensor, out: Tensor) -> bool:
        """Write v at ``indices`` (int64 [n]) to ``out`` (float32 [n]), limited to what fits.

        False where v is not finite at one of them: then nothing can be offered before :meth:`reset_nonfinite_`.
        """
        self._held_back = None
        self._kernels.gather(self.v, indices, out=out)
        largest = largest_of(out)
        if largest > self._least_limit:
            limits = self._limits.at(indices)
            exceeding = (out.abs() > limits).nonzero().flatten()
            offered = torch.minimum(torch.maximum(out, -limits), limits)
            self._held_back = indices[exceeding], out[exceeding] - offered[exceeding]
            out.copy_(offered)
        return largest < float("inf")

    def clear_(self, indices: Tensor) -> None:
        """Zero u and v at coordinates that were sent (momentum factor masking and error reset).

        Where only some of v was offered, v keeps the rest.
        """
        for kept in (self.v, self._u) if self.momentum else (self.v,):
            self._kernels.clear_(kept, indices)
        if self._held_back is not None:
            coordinates, rest = self._held_back
            sent = torch.isin(coordinates, indices)
            self.v[coordinates[sent]] = rest[sent]

    def subtract_(self, indices: Tensor, sent: Tensor) -> None:
        """Take what was sent, float32 [n], from v at ``indices``, and zero u there."""
        self._kernels.subtract_at_(self.v, indices, sent)
        if self.momentum:
            self._kernels.clear_(self._u, indices)

    def decay_(self, factor: float, ranges: Iterable[tuple[int, int]]) -> None:
        """``v <- factor * v`` in ranges of coordinates; what comes near to 0 becomes 0."""
        for start, stop in ranges:
            kept = self.v[start:stop].mul_(factor)
            torch.ops.aten.hardshrink.out(kept, LEAST_KEPT, out=kept)

    def excess(self, indices: Tensor, sums: Tensor) -> Tensor | None:
        """What of sums over all ranks, float32 [n], does not fit the parameters' dtypes.

        None where all does; on a device zeros, for which nobody waits.
        """
        if self._kernels.ON_HOST and largest_of(sums) <= self._least_limit * self._size:
            return None
        limits = self._limits.at(indices) * self._size
        return sums - torch.minimum(torch.maximum(sums, -limits), limits)

    def reset_nonfinite_(self) -> Tensor:
        """Zero u and v wherever one of them is NaN or infinite; returns where: int64 [n], ascending."""
        kept = (self.v, self._u) if self.momentum else (self.v,)
        if all_finite(kept):
            return torch.empty(0, dtype=torch.int64, device=self.v.device)
        damaged = ~torch.isfinite(self.v)
        if self.momentum:
            damaged |= ~torch.isfinite(self._u)
        for tensor in kept:
            tensor.masked_fill_(damaged, 0)
        return damaged.nonzero().flatten()

    def zero_(self) -> None:
        """Forget u and v."""
        self.v.zero_()
        self._u.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what is kept: v, and u where there is momentum."""
        return {"v": self.v.clone()} | ({"u": self._u.clone()} if self.momentum else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved v and u; u starts at zero where it was saved without momentum."""
        self.v.copy_(state["v"])
        if self.momentum:
            self._u.copy_(state["u"]) if "u" in state else self._u.zero_()

    def tensors(self) -> list[Tensor]:
        """v, and u where there is momentum: the memory itself."""
        return [self.v, self._u] if self.momentum else [self.v]


def largest_of(values: Tensor) -> float:
    """The greatest magnitude, NaN if one is NaN, 0 of no values; without a vector beside them."""
    return float(torch.stack(torch.aminmax(values)).abs().max()) if values.numel() else 0.0


def aligned_zeros(dim: int) -> np.ndarray:
    """float32 [dim], zeros in memory of a CPU that products of matrices are fast on.

    NumPy asks for huge pages, torch does not: reading a million of 25 million takes 5.9 instead of 7.5 ms. But large
    arrays of NumPy's begin 16 bytes into a cache line. There ``addmm_`` took three times as long with AVX-512.
    """
    memory = np.zeros(dim + LINE_BYTES // 4 - 1, dtype=np.float32)
    first = -memory.ctypes.data % LINE_BYTES // 4
    return memory[first : first + dim]


def _zeros(dim: int, device: torch.device | str) -> Tensor:
    return torch.from_numpy(aligned_zeros(dim)).to(device)
