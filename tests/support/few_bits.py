"""What the tests of few-bit codes draw."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = [0, 1, 2, 63, 64, 65, 127, 255, 256, 257, 700]
# From all subnormal to the largest float32.
SIZES = [1e-44, 1e-39, 1e-37, 1.0, 1e30, 3.4028234e38]


@st.composite
def segments(draw: st.DrawFn) -> Tensor:
    """Finite float32 [segments, length]: each of one size, or of many; some are zero."""
    shape = draw(st.integers(1, 3)), draw(st.sampled_from(LENGTHS))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = np.array(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
    values = random.choice(sizes, shape) * random.uniform(-1, 1, shape)
    values[random.random(shape) < draw(st.sampled_from([0, 0.1, 0.9]))] = 0
    if draw(st.booleans()):
        values = np.round(values * 2 / sizes[0]) * sizes[0] / 2  # halves: many quotients are ties
    largest = float(np.finfo(np.float32).max)
    return torch.from_numpy(values.clip(-largest, largest).astype(np.float32))


def dithers() -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
