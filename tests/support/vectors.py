"""What the kernel tests draw: hashes, vectors full of special values, windows of histograms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.hashing import BlockHash

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0000001, -2.0, 1e-45, -1e-38, 3e38, np.inf, -np.inf, np.nan, -np.nan]


@st.composite
def hashes(draw: st.DrawFn, most: int = 10_000, most_cols: int = 5_000) -> BlockHash:
    dim = draw(st.one_of(st.integers(1, 300), st.integers(1, most)))
    rows = draw(st.integers(1, 9))
    shards = draw(st.integers(1, 7))
    cols = draw(st.one_of(st.integers(shards, 40), st.integers(shards, most_cols)))
    seed, step = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 3))
    return BlockHash(dim, rows, cols, shards, seed, step)


@st.composite
def ranges(draw: st.DrawFn, dim: int) -> tuple[int, int]:
    start, stop = sorted((draw(st.integers(0, dim)), draw(st.integers(0, dim))))
    return start, stop


def random_values(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_integers(size: int, seed: int = 0) -> Tensor:
    return torch.randint(-50, 51, (size,), generator=torch.Generator().manual_seed(seed)).float()


def sketched(kernels: Any, hash: BlockHash, values: Tensor, start: int = 0) -> Tensor:
    table = torch.zeros(hash.table_shape)
    kernels.accumulate_(hash, table, values, start)
    return table


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def magnitude(value: float) -> int:
    return int(np.float32(value).view(np.uint32)) & 0x7FFFFFFF


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """Lengths around multiples of 64; few different values, so that many tie, or many."""
    size = draw(st.one_of(st.integers(0, 20), st.integers(60, 70), st.integers(100, 700)))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    values = random.standard_normal(size).astype(np.float32)
    special = random.random(size) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    values[special] = random.choice(np.array(SPECIAL, dtype=np.float32), int(special.sum()))
    return torch.from_numpy(values)


def windows(value: float) -> list[tuple[int, int, int]]:
    """Where a histogram may start, how wide its bins are and how many: all there is, or around a value."""
    start = magnitude(value)
    return [(0, 20, 2048), (0, 27, 16), (start, 13, 1024), (start, 0, 16), (max(start - (40 << 17), 0), 17, 64)]
