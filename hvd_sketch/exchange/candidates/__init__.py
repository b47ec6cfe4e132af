"""Which coordinates are worth sending: one file for each source of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from hvd_sketch.config import SOURCES, SketchConfig
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.sketch import CountSketch
from hvd_sketch.transport.metered import MeteredTransport


class CandidateSource(Protocol):
    """Names the coordinates whose sums are exchanged.

    A source is built once for an exchange, on all ranks, from what :class:`SourceFactory` says. In every step the
    exchange calls::

        begin(step)            before v takes in the gradient
        find(v, ranges)        after it; collective

    A source never writes to v. To add one, write its file here and name it in ``hvd_sketch.config.SOURCES``.

    Attributes:
        sketch: a Count Sketch that error feedback fills with v in the same pass in which it makes v; None: the source
            needs none.
        predictor: of the source's threshold. It is kept in checkpoints; a source without a threshold leaves it alone.
    """

    @property
    def sketch(self) -> CountSketch | None: ...

    @property
    def predictor(self) -> ThresholdPredictor: ...

    def begin(self, step: int) -> None:
        """A step begins, with its number. Communication: none."""

    def find(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Candidates for the largest sums of v over the ranks: int64, ascending, equal on all ranks.

        Args:
            v: float32 [dim], this rank's.
            ranges: the coordinates that take part in this step, the last first; equal on all ranks.

        Communication: collective, all ranks in the same order.
        """


class SourceFactory(Protocol):
    """How a source is built. Communication: none."""

    def __call__(
        self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device
    ) -> CandidateSource: ...


def load_source(name: str) -> SourceFactory:
    """The source that ``SketchConfig.candidates`` names."""
    module, kind = SOURCES[name].rsplit(".", 1)
    return getattr(import_module(module), kind)
