"""What the tests of the CPU kernels share: outputs full of NaN, and work divided among any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from hvd_sketch.kernels import cpu

few_examples = settings(max_examples=80, deadline=None)  # the first one compiles


class PoisonedNumpy:
    """NumPy whose ``empty`` holds NaN (or -1), so that an element nobody writes is noticed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -1, dtype=dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """The kernels allocate by :class:`PoisonedNumpy`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "np", PoisonedNumpy())
        yield


@contextmanager
def split_for(threads: int) -> Iterator[None]:
    """Split every kernel's work for a number of threads, whatever its size and the machine's threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "threads_for", lambda size: threads)
        yield
