"""Ascending positions as bytes: gaps in a Rice code, about 0.8 bytes each at a mean gap of 25, 1.2 at 250.

A gap ``g`` is the number of positions left out before one. Its low ``b`` bits are stored at fixed width, its
high part ``g >> b`` in unary (that number of 0 bits, then a 1), in a second stream. ``b`` is chosen for the fewest
bits. Rice (1979) codes are within 0.05 bits of the entropy of geometric gaps, which hashed shards give; a
byte-aligned LEB128 needs 1.0 and 1.6 bytes.

Layout of a code: one word of ``count << 8 | b``, the low bits, the unary stream. Each is padded to whole 64-bit words,
little-endian. A code says where it ends, so several can follow one another.

Two modules make and read the same codes. The codes are always in host memory, for the network:

- :mod:`hvd_sketch.coding.host`: positions and values are in host memory, too.
- :mod:`hvd_sketch.coding.device`: positions and values stay on a device.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt

COUNT_SHIFT = 8  # a code's first word has b in its lower bits and the count above
TRIED_LOW_BITS = 3  # values of b, from the bits of the mean gap less two upwards, that include the optimum
MOST_LOW_BITS = 32  # the largest b
Words = npt.NDArray[np.uint64]


def load_coding(kernels: ModuleType) -> ModuleType:
    """The module of this package for the memory that a backend works in."""
    return import_module("hvd_sketch.coding.host" if kernels.ON_HOST else "hvd_sketch.coding.device")
