"""Ascending positions as bytes: gaps in a Rice code, about 0.8 bytes each at a mean gap of 25, 1.2 at 250.

A gap ``g`` is the number of positions left out before one. Its low ``b`` bits are stored at fixed width, its
high part ``g >> b`` in unary (so many 0 bits, then a 1), in a stream of its own. ``b`` is chosen for the fewest
bits. Rice (1979) codes are within 0.05 bits of the entropy of geometric gaps, which hashed shards give; a
byte-aligned LEB128 needs 1.0 and 1.6 bytes.

Layout of a stream: one word of ``count << 8 | b``, low bits, unary stream; little-endian, each padded to whole 64-bit
words, in which both are read and written. A stream says where it ends, so several can follow one another.

Codes lie in host memory, from which they travel. What they say does so in :mod:`hvd_sketch.coding.host`; in
:mod:`hvd_sketch.coding.device` it lies on a device and stays there. Either reads what the other writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

COUNT_SHIFT = 8  # of a stream's first word: b lies below, the count above
TRIED_LOW_BITS = 3  # the optimum is among so many b from the bits of the mean gap, less two, upwards
MOST_LOW_BITS = 32  # of b
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Shortlist:
    """What one owner proposes.

    Attributes:
        positions: int64 or int32 [n], ascending; on a device, once they have travelled, a stream not decoded yet.
        doubtful: int64 [m], ascending: those elements of ``positions`` that may have to be dropped.
        values: float32 [m]: what decides.
        span: the positions are below it; None: not known.
    """

    positions: Any
    doubtful: Tensor
    values: Tensor
    span: int | None = None


def padded(bits: int, unit: int) -> int:
    """How many units of so many bits hold ``bits``."""
    return -(-bits // unit)


def load_coding(kernels: ModuleType) -> ModuleType:
    """The module of this package for the memory that a backend works in."""
    return import_module("hvd_sketch.coding.host" if kernels.ON_HOST else "hvd_sketch.coding.device")
