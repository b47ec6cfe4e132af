"""PowerSGD: each matrix of the gradient travels as two thin factors, of few-bit values."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from math import prod
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.config import LowRankConfig
from hvd_sketch.exchange.base import Options, SparseUpdate
from hvd_sketch.exchange.feedback import LARGEST_SUM, aligned_zeros, largest_of
from hvd_sketch.exchange.few_bits import RoundedSum, sum_in_few_bits
from hvd_sketch.exchange.matrices import Matrix, as_matrices
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.hashing import Purpose, ceil_div, random_words
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.low_rank import full_precision, load_linear_algebra, orthonormalize_, product_
from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.staging import to_device
from hvd_sketch.warm_up import warm_up

EXPONENT = 0x7F800000  # the bits of a float32's exponent: with all others 0 it is a power of two
HEADROOM = 8  # for what rounding adds to sums, and products of factors of norm 1 to their largest entry
logger = logging.getLogger(__name__)


class LowRankAllreduce(ResidualExchange):
    """Low-rank gradient exchange with error feedback: PowerSGD, with few-bit factors.

    For every tensor's residual v, seen as a matrix M, and the right factor Q of the step before. A vector is a matrix
    of one row: its P is 1, and its Q all of it::

        P <- sum over ranks of M Q        in few bits
        P <- orthonormal columns of P
        Q <- sum over ranks of M^T P      in few bits; this rank's addend, as it arrived, is S
        update <- P Q^T / ranks,  v <- v - P S^T

    Nothing is lost: over the ranks, what is taken from v adds up to ``ranks * update``, up to float32's rounding. All
    ranks get the same bits; where they compute on GPUs, these must be of one model.

    Memory: v and the update, 8 bytes per coordinate.

    Communication: the constructor and :meth:`step` are collective, all ranks in the same order.

    Args: see :class:`~hvd_sketch.exchange.base.Exchange`. ``shapes`` says which matrices there are; without it, the
    vector is one.

    Raises:
        ValueError: on every rank: they were set up differently; ``dim`` below 1, or not that of ``shapes``; a ratio
            that is too high for factors of rank 1.

    Source: Vogels et al., PowerSGD, NeurIPS 2019, algorithms 1 and 2.
    """

    def __init__(
        self,
        config: LowRankConfig,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        shapes = options.get("shapes", [(dim,)])
        if dim < 1 or sum(map(prod, shapes)) != dim:
            raise ValueError(f"dim must be at least 1 and what the shapes hold, {sum(map(prod, shapes))}, got {dim}")
        self._matrices = as_matrices(shapes, config)
        if self._device.type == "cpu":  # no rank compiles inside the first step
            warm_up(logger.warning if transport.rank == 0 else None)
        else:
            load_linear_algebra(self._device)
        self._kernels = load_backend(None, self._device)
        # What a rank gives at most to a sum: then no sum and no product of summed factors overflows.
        self._most = LARGEST_SUM / (HEADROOM * transport.size * max(matrix.rank for matrix in self._matrices))
        ends, largest = self._limits.ends.tolist(), self._limits.largest.tolist()
        runs = zip([0, *ends[:-1]], ends, largest, strict=True)
        # Means are far below what float32 and bfloat16 hold: of others, where they begin and end, and their limit.
        self._limited = [run for run in runs if run[2] < LARGEST_SUM / transport.size / 2]
        factored = {n: matrix for n, matrix in enumerate(self._matrices) if not matrix.is_whole}
        self._right = torch.empty(
            sum(each.rank * each.cols for each in factored.values()), dtype=torch.float32, device=self._device
        )
        # Q of every matrix by its number: parts of that memory.
        self._rights = dict(zip(factored, _by_matrix(self._right, list(factored.values())), strict=True))
        self._memory = np.empty(0, dtype=np.float32)
        for number, right in self._rights.items():
            for column in range(len(right)):
                right[column] = self._draw(number, column, 0)

    def agree(self) -> SparseUpdate:
        """The mean over ranks of what the factors hold, float32 [dim], finite; ``indices`` are None."""
        with full_precision(self._device):
            return self._agree()

    def _agree(self) -> SparseUpdate:
        numbers = [n for n, matrix in enumerate(self._matrices) if not self._is_unused(matrix)]
        # Vectors behind all factors: the values of a chunk of codes have one scale, and theirs are of another size.
        numbers.sort(key=lambda number: self._matrices[number].is_whole)
        used = [self._matrices[number] for number in numbers]
        lefts = self._agree_on_lefts(numbers)
        summed = self._agree_on_rights(used, lefts)
        mean = summed.total / self._comm.size
        update = self._take_off(used, lefts, _by_matrix(summed.sent, used), _by_matrix(mean, used))
        self._limit_(update)
        floats = 2 * sum(m.rank * (m.cols + (0 if m.is_whole else m.rows)) for m in used)  # there and back
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, ceil_div(floats * self.config.value_bits, 32))
        rights = zip(numbers, _by_matrix(mean, used), strict=True)
        self._keep_rights({number: right for number, right in rights if number in self._rights})
        self.count_step()
        return SparseUpdate(None, update)

    def _agree_on_lefts(self, numbers: Sequence[int]) -> list[Tensor]:
        """Orthonormal columns of the sum over ranks of ``M Q``: float32 [rank, rows] each, equal on all ranks."""
        factored = [number for number in numbers if number in self._rights]
        matrices = [self._matrices[number] for number in factored]
        own = torch.empty(
            sum(matrix.rank * matrix.rows for matrix in matrices), dtype=torch.float32, device=self._device
        )

        def multiply() -> None:
            for number, matrix, out in zip(factored, matrices, _by_matrix(own, matrices, of_rows=True), strict=True):
                matrix.times_right_(out, self._feedback.v, self._rights[number])

        total = self._sum(own, multiply, ("left", "left sums")).total if factored else own
        lefts = _by_matrix(total, matrices, of_rows=True)
        orthonormalize_(lefts)
        one = torch.ones(1, 1, dtype=torch.float32, device=self._device)
        by_number = dict(zip(factored, lefts, strict=True))
        return [by_number.get(number, one) for number in numbers]

    def _agree_on_rights(self, matrices: Sequence[Matrix], lefts: Sequence[Tensor]) -> RoundedSum:
        """The sum over ranks of ``M^T P``, all matrices' one after the other."""
        own = torch.empty(
            sum(matrix.rank * matrix.cols for matrix in matrices), dtype=torch.float32, device=self._device
        )

        def multiply() -> None:
            for matrix, left, out in zip(matrices, lefts, _by_matrix(own, matrices), strict=True):
                matrix.times_left_(out, self._feedback.v, left)

        summed = self._sum(own, multiply, ("right", "right sums"), self._beside())
        self._sum_beside(summed.beside)
        return summed

    def _sum(
        self, own: Tensor, multiply: Callable[[], None], phases: tuple[str, str], beside: Tensor | None = None
    ) -> RoundedSum:
        """The sum over ranks of ``own``, factors that ``multiply`` makes from v.

        Where v is not finite it is reset. Products that are too large or overflow are limited: what of v is not sent
        for that reason stays there.
        """
        multiply()
        if not largest_of(own) <= self._most:  # also where one is NaN
            self._count_reset(self._feedback.reset_nonfinite_())
            multiply()
            torch.nan_to_num_(own, 0.0, self._most, -self._most).clamp_(-self._most, self._most)
        return sum_in_few_bits(self._comm, self._kernels, own, self.config.value_bits, phases, beside)

    def _take_off(
        self, matrices: Sequence[Matrix], lefts: Sequence[Tensor], sent: Sequence[Tensor], mean: Sequence[Tensor]
    ) -> Tensor:
        """Take from v what this rank sent; returns the update, float32 [dim]. Unused coordinates stay and get zeros."""
        v, update = self._feedback.v, self._empty_update()
        spans = [_overlap(matrix, unused) for matrix in matrices for unused in self._unused]
        kept = [(span, v[span].clone()) for span in spans if span.start < span.stop]
        for matrix, left, own, right in zip(matrices, lefts, sent, mean, strict=True):
            matrix.subtract_product_(v, left, own)
            product_(update[matrix.start : matrix.stop], left, right)
        for span, values in kept:
            v[span] = values
        for start, stop in self._unused:
            update[start:stop] = 0
        return update

    def _empty_update(self) -> Tensor:
        """Memory for an update, float32 [dim]: that of the one before, where nobody holds a tensor on it any more.

        On a CPU the first write to fresh memory took between 0.4 and 50 ms for 5 million coordinates, the product 2 ms.
        """
        if self._device.type != "cpu":
            return torch.empty(self.dim, dtype=torch.float32, device=self._device)
        if len(self._memory) < self.dim or sys.getrefcount(self._memory) > 2:  # ours and the call's
            self._memory = aligned_zeros(self.dim)
        return torch.from_numpy(self._memory)

    def _limit_(self, update: Tensor) -> None:
        """Limit the update to what the parameters' dtypes hold. Rank 0's v gets back what exceeds."""
        for start, stop, largest in self._limited:
            values = update[start:stop]
            if largest_of(values) > largest:
                limited = values.clamp(-largest, largest)
                if self._comm.rank == 0:
                    self._feedback.v[start:stop].add_(values - limited, alpha=self._comm.size)
                values.copy_(limited)

    def _is_unused(self, matrix: Matrix) -> bool:
        return any(start <= matrix.start and matrix.stop <= stop for start, stop in self._unused)

    def _keep_rights(self, rights: Mapping[int, Tensor]) -> None:
        """Begin the next step with the right factors of some matrices, float32 [rank, cols] each, equal on all ranks.

        Each column is divided by a power of two, so that M Q is about as large as M. A column of zeros is drawn.
        """
        columns, powers = [], []
        for number, right in rights.items():
            largest = right.abs().amax(1, keepdim=True)
            powers.append((largest.view(torch.int32) & EXPONENT).view(torch.float32))
            torch.div(right, powers[-1], out=self._rights[number])
            columns += [(number, column) for column in range(len(right))]
        are_zero = torch.cat(powers).flatten().eq(0).tolist() if powers else []
        for number, column in compress(columns, are_zero):
            self._rights[number][column] = self._draw(number, column, self._step + 1)

    def _draw(self, number: int, column: int, step: int) -> Tensor:
        """A column of the right factor for a step: float32 [cols], uniform in [-1, 1), equal on all ranks."""
        words = random_words(self.config.seed, step, Purpose.LOW_RANK, number << 32 | column)
        raw = np.asarray(words.random_raw(self._matrices[number].cols))
        values = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
        return to_device(torch.from_numpy(values), self._device)

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """See :meth:`Exchange.state_dict`: step number, v, and the right factors, which are equal on all ranks."""
        layout = [(matrix.rows, matrix.cols, matrix.rank) for matrix in self._matrices]
        return {**super().state_dict(consolidated), "right": self._right.clone(), "matrices": layout}

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """See :meth:`Exchange.read_state`. Also refuses a state of other matrices or ranks of theirs."""
        layout = [(matrix.rows, matrix.cols, matrix.rank) for matrix in self._matrices]
        saved = self._saved(state)
        theirs = [tuple(sides) for sides in saved.entry("matrices", list)]
        if theirs != layout:
            raise ValueError(
                f"the saved state is of other matrices: (rows, columns, rank) {_tell(theirs)} there, {_tell(layout)} "
                "here: load it with the shapes and the ratio or rank that it was saved with"
            )
        right = saved.tensor("right", self._right)
        take_over_others = super().read_state(state)

        def take_over() -> None:
            take_over_others()
            self._right.copy_(right)

        return take_over

    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        super()._take_over(root, consolidated, at_same_step, predictions)
        self._transport.broadcast_(self._right, root)


def _by_matrix(factors: Tensor, matrices: Sequence[Matrix], of_rows: bool = False) -> list[Tensor]:
    """The factors of matrices that are one vector: float32 [rank, cols] each, or [rank, rows]. No copies."""
    lengths = [matrix.rank * (matrix.rows if of_rows else matrix.cols) for matrix in matrices]
    parts = factors.split(lengths)
    return [part.view(matrix.rank, -1) for part, matrix in zip(parts, matrices, strict=True)]


def _overlap(matrix: Matrix, unused: tuple[int, int]) -> slice:
    return slice(max(matrix.start, unused[0]), min(matrix.stop, unused[1]))


def _tell(layout: Sequence[tuple[int, ...]]) -> str:
    return f"{len(layout)} of them, {', '.join(map(str, layout[:5]))}" if layout else "none"
