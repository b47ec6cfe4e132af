"""Candidates that the ranks nominate: each the largest coordinates of its own v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import Threshold, top_k
from hvd_sketch.transport.metered import MeteredTransport

Ranges = Sequence[tuple[int, int]]


class NominatedCandidates:
    """The union of what the ranks name: each its own ``ceil(P * k / W)`` largest coordinates of v.

    A coordinate is found if it is large on any rank, not only if its sum is. Bytes do not grow with the number of
    ranks, because each names fewer.

    Args, communication: see :mod:`hvd_sketch.exchange.candidates`; one allgather.
    """

    sketch = None

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device) -> None:
        self.predictor = ThresholdPredictor()  # of this rank's own threshold: it decides nothing that others see
        self._own_count = ceil_div(config.candidate_count(dim), comm.size)
        self._dim, self._comm, self._device = dim, comm, device
        self._kernels = load_backend(None, device)
        self._coding = load_coding(self._kernels)

    def begin(self, step: int) -> None:
        """Nothing depends on the step."""

    def find(self, v: Tensor, ranges: Ranges) -> Tensor:
        encoded = self._coding.encode_positions(self._own_largest(v, ranges), self._dim)
        with self._comm.phase("indices", self._device):
            gathered = self._comm.allgather(encoded)
            return self._coding.decode_union(gathered, self._dim, self._device)

    def _own_largest(self, v: Tensor, ranges: Ranges) -> Tensor:
        """The coordinates in ``ranges`` at which this rank's v is largest: int64, ascending."""
        bound = self.predictor.lower_bound()
        spans = _joined(ranges)
        # One look at v where the bound holds; what is above it is little more than what is wanted.
        positions = self._above(v, spans, max(bound - 1, 0))
        if bound and positions.numel() < self._own_count:
            positions = self._above(v, spans, 0)
        values = self._kernels.gather(v, positions, out=torch.empty(len(positions), device=self._device))
        chosen = top_k(values, self._own_count)
        if chosen.numel():
            least = values.index_select(0, chosen).abs().min().view(torch.int32)
            edge = int(least)
            self.predictor.update(Threshold(edge, edge + 1, excess=0, own=chosen.numel()))
        return positions.index_select(0, chosen)

    def _above(self, v: Tensor, spans: Ranges, threshold: int) -> Tensor:
        """Coordinates in ascending ``spans`` whose magnitude bits are above the threshold: int64, ascending."""
        found = [self._kernels.select_above(v[start:stop], threshold) + start for start, stop in spans]
        return torch.cat(found) if len(found) != 1 else found[0]


def _joined(ranges: Ranges) -> Ranges:
    """The same coordinates in ascending ranges that do not touch each other."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
