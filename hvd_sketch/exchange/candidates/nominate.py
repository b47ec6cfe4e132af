"""Candidates that the ranks nominate: each the largest coordinates of its own v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.candidates.on_device import largest_above
from hvd_sketch.exchange.feedback import Parts
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import SORTED, Look, search, top_k
from hvd_sketch.transport.metered import MeteredTransport

# Of v above its bound a rank keeps so many, in units of what it names, and some in any case. The bound is further below
# the threshold than where a failure costs messages: what is kept costs little, a second look at v three passes over it.
KEPT_PER_CANDIDATE = 4
KEPT_ALWAYS = 1 << 16
FURTHER_MARGIN = 1 << 18


class NominatedCandidates:
    """The union of what the ranks name: each its own ``ceil(P * k / W)`` largest coordinates of v.

    A coordinate is found if it is large on any rank, not only if its sum is. Bytes do not grow with the number of
    ranks, because each names fewer.

    Args, communication: see :mod:`hvd_sketch.exchange.candidates`; one allgather, none after :meth:`take_codes`.
    """

    sketch = None

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device) -> None:
        self.predictor = ThresholdPredictor()  # of this rank's own threshold: it decides nothing that others see
        self._own_count = ceil_div(config.candidate_count(dim), comm.size)
        self._dim, self._comm, self._device = dim, comm, device
        self._kernels = load_backend(None, device)
        self._coding = load_coding(self._kernels)
        self._codes: Tensor | None = None

    def begin(self, step: int) -> None:
        """Nothing depends on the step."""

    def find(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        gathered, self._codes = self._codes, None
        if gathered is None:
            encoded = self.nominate(v, [(start, stop, None) for start, stop in ranges])
            with self._comm.phase("indices", self._device):
                gathered = self._comm.allgather(encoded)
        return self._coding.decode_union(gathered, self._dim, self._device)

    def nominate(self, v: Tensor, parts: Parts) -> Tensor:
        """The code of this rank's largest coordinates in some parts: uint8, on the CPU. Communication: none."""
        parts = _joined(parts)
        if self._kernels.ON_HOST:
            largest = self._own_largest(v, parts)
        elif parts:
            largest = self._largest_on_device(*self._in_one(v, parts))
        else:
            largest = torch.empty(0, dtype=torch.int64, device=self._device)
        return self._coding.encode_positions(largest, self._dim)

    def _in_one(self, v: Tensor, parts: Parts) -> tuple[int, Tensor]:
        """Where the parts begin, and v from there with the gradients taken in and zeros between the parts.

        On a device, where each part by itself would take a wait.
        """
        if len(parts) == 1:
            ((start, stop, gradient),) = parts
            return start, v[start:stop] if gradient is None else v[start:stop] + gradient
        sums = torch.zeros_like(v)
        targets = [sums[start:stop] for start, stop, _ in parts]
        torch._foreach_copy_(targets, [v[start:stop] for start, stop, _ in parts])
        fed = [
            (target, gradient) for target, (_, _, gradient) in zip(targets, parts, strict=True) if gradient is not None
        ]
        if fed:
            torch._foreach_add_(*map(list, zip(*fed, strict=True)))
        return 0, sums

    def take_codes(self, codes: Tensor | None) -> None:
        """All ranks' codes have arrived already, one after the other; None: they have not, or are not wanted."""
        self._codes = codes

    def _own_largest(self, v: Tensor, spans: Parts) -> Tensor:
        """The coordinates in some parts at which this rank's v, on the host, is largest: int64, ascending."""
        bound = self._bound()
        limit = KEPT_PER_CANDIDATE * self._own_count + KEPT_ALWAYS
        found = self._values_above(v, spans, bound - 1, limit) if bound else None
        if found is None or found[0].numel() < self._own_count:
            threshold = search(self._look_at(v, spans), self._own_count)
            found = self._values_above(v, spans, threshold.edge - 1, threshold.own)
            assert found is not None
        return self._largest_of(*found, bound)

    def _bound(self) -> int:
        """Magnitude bits that the least of the largest will hardly be below; 0: it may be anything."""
        return max(self.predictor.lower_bound() - FURTHER_MARGIN, 0)

    def _largest_on_device(self, start: int, values: Tensor) -> Tensor:
        """Coordinates from ``start`` on at which ``values``, of a device, are largest: int64, ascending."""
        count, bound = self._own_count, self._bound()
        room = min(KEPT_PER_CANDIDATE * count + KEPT_ALWAYS, values.numel())
        if bound and count <= room <= SORTED:
            positions, above = self._kernels.first_above(values, bound - 1, room)
            found = largest_above(positions, above, count)
            if found is not None:
                self.predictor.update(found[1])
                return found[0] + start
            bound = 0
        if bound:
            positions, above = self._kernels.first_above(values, bound - 1)
        if not bound or above.numel() < count:
            threshold = search(self._look_at(values, [(0, values.numel(), None)]), count)
            positions, above = self._kernels.first_above(values, threshold.edge - 1, threshold.own)
        return self._largest_of(positions, above, bound) + start

    def _largest_of(self, positions: Tensor, values: Tensor, bound: int) -> Tensor:
        """The positions of the largest values, as many as this rank names; ``bound`` is probably below them."""
        chosen = top_k(values, self._own_count, bound)
        if chosen.numel():
            self.predictor.update(int(values.index_select(0, chosen).abs().min().view(torch.int32)))
        return positions.index_select(0, chosen)

    def _values_above(self, v: Tensor, spans: Parts, threshold: int, limit: int) -> tuple[Tensor, Tensor] | None:
        """Coordinates in some parts where the magnitude bits of v are above the threshold, int64, and v there.

        None where a part has more than ``limit``.
        """
        pieces = []
        for start, stop, gradient in spans:
            if gradient is None:
                found = self._kernels.values_above(v[start:stop], threshold, limit)
            else:
                found = self._kernels.sums_above(v[start:stop], gradient, threshold, limit)
            if found is None:
                return None
            pieces.append((found[0] + start if start else found[0], found[1]))
        if len(pieces) == 1:
            return pieces[0]
        positions = torch.cat([torch.empty(0, dtype=torch.int64, device=self._device), *(p for p, _ in pieces)])
        return positions, torch.cat([v[:0], *(values for _, values in pieces)])

    def _look_at(self, v: Tensor, spans: Parts) -> Look:
        def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
            counts = torch.zeros(bins + 1, dtype=torch.int64, device="cpu")
            for first, last, gradient in spans:
                values = v[first:last] if gradient is None else v[first:last] + gradient
                counts += self._kernels.magnitude_histogram(values, start, shift, bins).cpu()
            return counts, counts

        return look


def _joined(parts: Parts) -> Parts:
    """The same parts in ascending order, those without a gradient joined where they touch each other."""
    joined: list[tuple[int, int, Tensor | None]] = []
    for start, stop, gradient in sorted(parts, key=lambda part: part[0]):
        if joined and joined[-1][1] == start and joined[-1][2] is None and gradient is None:
            joined[-1] = joined[-1][0], stop, None
        else:
            joined.append((start, stop, gradient))
    return joined
