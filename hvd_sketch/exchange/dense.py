"""The mean of the whole gradient: what a sketch competes with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import all_finite
from hvd_sketch.exchange.base import Exchange, Options, Ranges, SparseUpdate
from hvd_sketch.transport.base import Transport, in_equal_shares, mean_over_ranks, sum_in_rank_order

logger = logging.getLogger(__name__)
MOST_BESIDE = 1 << 16  # elements: to copy more beside what another exchange sends takes longer than two collectives


class DenseAllreduce(Exchange):
    """The mean of the whole gradient by reduce_scatter and allgather.

    The interface is that of :class:`~hvd_sketch.exchange.sketched.SketchedAllreduce`; every coordinate is sent in every
    step. Unlike an MPI allreduce it gives equal bits on all ranks. With a config that has momentum,
    ``u <- m * u + mean``.

    Communication, arguments, errors: as for SketchedAllreduce; ``config`` may be None (momentum 0).

    Args:
        dtype: of the gradient and of the mean, float32 or float64.
        wire_dtype: what travels, where it is not ``dtype``: float16, in which each rank's gradient and the mean are
            rounded, and limited to what it holds; sums are made in ``dtype``.

    What is limited, here or by the parameters' own dtypes, is lost: this rank warns of it, once.
    """

    holds_gradient = True

    def __init__(
        self,
        config: Compression | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        self.config = config
        self.dtype, self._wire_dtype = dtype, wire_dtype
        self._momentum = config.momentum if config is not None else 0.0
        self._u = torch.zeros(dim if self._momentum else 0, dtype=dtype, device=device)
        self._gradient: Tensor = torch.empty(0, dtype=torch.float32, device="cpu")
        self._sum: Tensor | None = None  # of the gradients, made by another exchange
        self._unused: Ranges = ()
        self._has_warned = False

    @property
    def residual(self) -> Tensor:
        """Zeros: nothing stays behind."""
        return torch.zeros(self.dim, dtype=self.dtype, device=self._device)

    @property
    def velocity(self) -> Tensor:
        """u, ``dtype`` [dim], equal on all ranks."""
        return self._u if self._momentum else self.residual

    def step(self, gradient: Tensor | Sequence[Tensor], finite: bool = True) -> SparseUpdate:
        """See :meth:`Exchange.step`. ``indices`` are all of ``0 … dim - 1``."""
        update = super().step(gradient, finite)
        if update.skipped:
            return update
        return SparseUpdate(torch.arange(self.dim, device=self._device), update.values)

    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        self._gradient = (torch.cat(list(gradient)) if len(gradient) > 1 else gradient[0]).detach().contiguous()
        self._unused = unused

    def mean(self, gradient: Tensor, unused: Ranges = ()) -> Tensor:
        """Deprecated: :meth:`accumulate`, then :meth:`agree`. Communication: collective."""
        warnings.warn("mean() is deprecated: call accumulate(), then agree()", DeprecationWarning, stacklevel=2)
        self.accumulate([gradient], unused)
        return self.agree().values

    def offer(self, takes_step: bool = True) -> Tensor | None:
        """The gradient that was accumulated, float32 [dim], for another exchange to sum beside what it sends.

        None where it is better sent alone; equal on all ranks. Of a rank that cannot take the step zeros.
        Communication: none.
        """
        is_small = self.dim <= MOST_BESIDE and self.dtype == torch.float32 and self._wire_dtype is None
        if not is_small:
            return None
        return self._gradient if takes_step else torch.zeros(self.dim, dtype=torch.float32, device=self._device)

    def take_sum(self, total: Tensor) -> None:
        """The sum over ranks of what :meth:`offer` gave, float32 [dim], for :meth:`agree`. Communication: none."""
        self._sum = total

    def agree(self) -> SparseUpdate:
        """The mean over ranks with momentum, ``dtype`` [dim], finite; ``indices`` are None."""
        mean = self._gradient
        if self.dim:  # otherwise only the agreement travels, as for a rank of which FSDP2 has sharded nothing
            with self._comm.phase("dense"):
                mean = self._mean(mean)
        self._gradient, self._sum = torch.empty(0, dtype=torch.float32, device="cpu"), None
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.dim)
        if self._momentum:
            mean = self._with_momentum(mean)
        self.count_step()
        return SparseUpdate(None, self._limit_(mean))

    def _mean(self, gradient: Tensor) -> Tensor:
        if self._wire_dtype is not None:
            self._warn_of(gradient, torch.finfo(self._wire_dtype).max)
            return _rounded_mean(self._comm, gradient, self._wire_dtype)
        mean = mean_over_ranks(self._comm, gradient) if self._sum is None else self._sum / self._comm.size
        if all_finite([mean]):
            return mean
        # The sum overflowed, on all ranks alike, and the mean does not.
        return mean_over_ranks(self._comm, gradient / self._comm.size).mul_(self._comm.size)

    def _with_momentum(self, mean: Tensor) -> Tensor:
        """``u <- m * u + mean``; u of unused coordinates stays. A copy of u."""
        largest = torch.finfo(self.dtype).max
        fresh = (self._u * self._momentum).add_(mean).clamp_(-largest, largest)
        for start, stop in self._unused:
            fresh[start:stop] = self._u[start:stop]
        self._u.copy_(fresh)
        return fresh

    def _limit_(self, mean: Tensor) -> Tensor:
        """The mean, limited to what the parameters' dtypes hold; in its own memory."""
        for start, stop, largest in zip(*self._runs, strict=True):
            if largest < torch.finfo(self.dtype).max:
                self._warn_of(mean[start:stop], largest)
                mean[start:stop].clamp_(-largest, largest)
        return mean

    def _warn_of(self, values: Tensor, largest: float) -> None:
        """Tell once of values that will be limited; only float16's are worth a pass over them."""
        if self._has_warned or largest > torch.finfo(torch.float16).max or not values.numel():
            return
        beyond = float(torch.stack(torch.aminmax(values)).abs().max())
        if beyond > largest:
            self._has_warned = True
            logger.warning(
                "rank %d: a gradient of %.3g does not fit its float16 (limit: %.3g): it was limited, and what is "
                "beyond is lost. Lower the loss scale or the learning rate, clip gradients, or take bfloat16",
                *(self._comm.rank, beyond, largest),
            )

    @cached_property
    def _runs(self) -> tuple[list[int], list[int], list[float]]:
        ends = self._limits.ends.tolist()
        return [0, *ends[:-1]], ends, self._limits.largest.tolist()

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """See :meth:`Exchange.state_dict`; u is equal on all ranks, so both kinds load at any world size."""
        return {**self._counters(None), "u": self._u.clone()}

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        saved = self._saved(state)
        has_momentum = bool(self._momentum and saved.entry("u", Tensor).numel())
        u = saved.tensor("u", self._u) if has_momentum else None

        def take_over() -> None:
            self._load_counters(saved)
            self._u.copy_(u) if u is not None else self._u.zero_()  # at zero where it was saved without

        return take_over

    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        if self._u.numel():
            self._transport.broadcast_(self._u, root)


def _rounded_mean(comm: Transport, gradient: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """The mean over ranks of a vector of which ``wire_dtype`` travels. Communication: collective."""
    largest = torch.finfo(wire_dtype).max
    rounded = gradient.clamp(-largest, largest).to(wire_dtype)
    shares = comm.alltoall(in_equal_shares(rounded, comm.size))
    terms = list(shares.to(gradient.dtype))
    own_mean = sum_in_rank_order(terms) / comm.size
    if not all_finite([own_mean]):  # the sum overflowed, and the mean does not
        own_mean = sum_in_rank_order([term / comm.size for term in terms])
    own_mean.clamp_(-largest, largest)  # by rounding up
    return comm.allgather(own_mean.to(wire_dtype))[: gradient.numel()].to(gradient.dtype)
