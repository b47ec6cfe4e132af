"""Ascending positions as bytes: gaps in a Rice code, about 0.8 bytes each at a mean gap of 25, 1.2 at 250.

A gap ``g`` is the number of positions left out before one. Its low ``b`` bits are stored at fixed width, its
high part ``g >> b`` in unary (so many 0 bits, then a 1), in a stream of its own. ``b`` is chosen for the fewest
bits. Rice (1979) codes are within 0.05 bits of the entropy of geometric gaps, which hashed shards give; a
byte-aligned LEB128 needs 1.0 and 1.6 bytes.

Layout of a stream: one word of ``count << 8 | b``, low bits, unary stream; little-endian, each padded to whole 64-bit
words, in which both are read and written. A stream says where it ends, so several can follow one another.

Two modules make and read the same codes, which are always in host memory, from where they travel:

- :mod:`hvd_sketch.coding.host`: positions and values are in host memory, too.
- :mod:`hvd_sketch.coding.device`: positions and values are on a device and stay there.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt

COUNT_SHIFT = 8  # of a stream's first word: b lies below, the count above
TRIED_LOW_BITS = 3  # the optimum is among so many b from the bits of the mean gap, less two, upwards
MOST_LOW_BITS = 32  # of b
Words = npt.NDArray[np.uint64]


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def load_coding(kernels: ModuleType) -> ModuleType:
    """The module of this package for the memory that a backend works in."""
    return import_module("hvd_sketch.coding.host" if kernels.ON_HOST else "hvd_sketch.coding.device")
