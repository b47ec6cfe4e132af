"""The sketch kernels for CPUs, compiled by Numba: the functions of :mod:`hvd_sketch.kernels.reference`.

Threads share out table cells or coordinates, never a sum: every cell adds its coordinates in ascending order.
So results do not depend on the number of threads, and tables equal the reference's to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import _cpu_loops as loops

MIN_PART = 1 << 15  # with fewer coordinates a part does not pay for its thread (a call takes 20 us and more)
_lock = threading.Lock()  # Numba's workqueue threading layer ends a process that enters it from two threads


def accumulate_(hash: BlockHash, table: Tensor, values: Tensor, start: int) -> None:
    """See :func:`hvd_sketch.kernels.reference.accumulate_`; equal to the bit."""
    assert table.is_contiguous() and values.is_contiguous()
    if values.numel() == 0:
        return
    with _parallel(values.numel()) as parts:
        loops.accumulate(table.numpy().reshape(-1), values.numpy(), start, _hash_numbers(hash), parts)


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.estimate`."""
    return _estimates(hash, table, -1, start, stop, stop - start)


def estimate_owned(hash: BlockHash, shard_table: Tensor, shard: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.estimate_owned`."""
    return _estimates(hash, shard_table, shard, 0, hash.dim, hash.owned_size(shard))


def magnitude_histogram(values: Tensor, prefix: int, shift: int, bits: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.magnitude_histogram`; equal to the bit."""
    with _parallel(values.numel()) as parts:
        counts = loops.histogram(values.numpy().view(np.uint32), prefix, shift, bits, parts)
    return torch.from_numpy(counts.sum(axis=0))


def select_above(values: Tensor, threshold: int, ties: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.select_above`."""
    if threshold <= 0:
        threshold, ties = 0, 0  # a tie would be a zero
    with _parallel(values.numel()) as parts:
        chosen = loops.select(values.numpy().view(np.uint32), threshold, ties, parts)
    return torch.from_numpy(chosen)


def _estimates(hash: BlockHash, table: Tensor, shard: int, start: int, stop: int, size: int) -> Tensor:
    assert table.is_contiguous()
    # NumPy asks for huge pages, torch does not: first writing 100 MB takes 10 instead of 37 ms.
    out = np.empty(size, dtype=np.float32)
    if size:
        with _parallel(size) as parts:
            loops.estimate(out, table.numpy().reshape(-1), shard, start, stop, _hash_numbers(hash), parts)
    return torch.from_numpy(out)


def _hash_numbers(hash: BlockHash) -> loops.HashNumbers:
    coefficients = hash.sign_coefficients, hash.offset_coefficients, hash.shard_coefficients
    return *coefficients, hash.block, hash.shard_cols, hash.shards


@contextmanager
def _parallel(size: int) -> Iterator[int]:
    """Admit one caller at a time to Numba's threads; yields how many of them ``size`` values are worth."""
    limit = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    parts = max(1, min(limit, size // MIN_PART))
    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(parts)
        try:
            yield parts
        finally:
            numba.set_num_threads(before)
