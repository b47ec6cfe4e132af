"""The sketch kernels for CPUs, compiled by Numba: the functions of :mod:`hvd_sketch.kernels.reference`.

Threads share out table cells or coordinates, never a sum: every cell adds its coordinates in ascending order.
So results do not depend on the number of threads, and tables equal the reference's to the bit.
"""

from __future__ import annotations

import mmap
import os
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels.numba_exit import keep_exit_silent
from hvd_sketch.kernels.reference import scatter_ as scatter_  # of this backend, too
from hvd_sketch.kernels.threads import run_parts

ON_HOST = True
MIN_PART = 1 << 17  # coordinates below which a part does not pay for waking its thread (20 us; an estimate takes 40)
THREAD_SETTINGS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
# How many ranks the launchers say there are on this node: Open MPI, MPICH and Intel MPI, horovodrun.
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "HOROVOD_LOCAL_SIZE")
keep_exit_silent()


def feedback_(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_`; equal to the bit."""
    arrays = _velocity(u), v.numpy(), gradient.numpy()
    run_parts(_parts(v.numel()), loops.feedback, *arrays, np.float32(momentum))


def feedback_accumulate_(
    hash: BlockHash, table: Tensor, u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float, start: int
) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_accumulate_`; equal to the bit."""
    arrays = _flat(table), _velocity(u), v.numpy(), gradient.numpy()
    pieces = np.zeros((2, -(-v.numel() // loops.CHUNK)), dtype=np.int64)  # taken and done, of each chunk
    numbers = np.float32(momentum), start, _hash_numbers(hash)
    run_parts(_parts(v.numel()), loops.feedback_accumulate, *arrays, *numbers, *pieces)


def accumulate_(hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None) -> None:
    """See :func:`hvd_sketch.kernels.reference.accumulate_`; equal to the bit."""
    if values.numel() == 0:
        return
    row_cells = hash.shards * hash.shard_cols
    first, count = (rows.start, len(rows)) if rows is not None else (0, hash.rows)
    cells = _flat(table), first * row_cells, count * row_cells
    run_parts(_parts(values.numel()), loops.accumulate, *cells, values.numpy(), start, _hash_numbers(hash))


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.estimate`."""
    # NumPy asks for huge pages, torch does not: first writing 100 MB takes 10 instead of 37 ms.
    out = np.empty(stop - start, dtype=np.float32)
    if out.size:
        run_parts(_parts(out.size), loops.estimate, out, _flat(table), start, _hash_numbers(hash))
    return torch.from_numpy(out)


def owned_histogram(hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.owned_histogram`."""
    size = hash.owned_size(shard)
    parts = _parts(size)
    counts = _no_counts(parts, bins)
    where = _flat(shard_table), shard, size, hash.dim, _hash_numbers(hash)
    run_parts(parts, loops.owned_histogram, counts, *where, start, shift)
    return torch.from_numpy(counts.sum(axis=0))


def owned_histogram_kept(
    hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int, limit: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """See :func:`hvd_sketch.kernels.reference.owned_histogram_kept`."""
    kept = _owned_upto(limit, hash, shard_table, shard, start - 1)
    if kept is None:
        return owned_histogram(hash, shard_table, shard, start, shift, bins), None
    return magnitude_histogram(kept[1], start, shift, bins), kept


def owned_above(
    hash: BlockHash, shard_table: Tensor, shard: int, threshold: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.kernels.reference.owned_above`."""
    found = _owned_upto(hash.owned_size(shard), hash, shard_table, shard, threshold)
    assert found is not None
    return found


def _owned_upto(
    limit: int, hash: BlockHash, shard_table: Tensor, shard: int, threshold: int
) -> tuple[Tensor, Tensor] | None:
    """Estimates of magnitude bits above ``threshold`` and where they are; None if there are more than ``limit``."""
    size = hash.owned_size(shard)
    parts = _parts(size)
    room = min(-(-size // (hash.block * parts)) * hash.block, limit + loops.STRETCH * hash.block)
    positions = _mapped(parts * room, np.int32 if size < 2**31 else np.int64)
    values = _mapped(parts * room, np.float32)
    spans = np.empty((2, parts), dtype=np.int64)
    where = _flat(shard_table), shard, size, hash.dim, _hash_numbers(hash)
    run_parts(parts, loops.owned_above, spans, positions, values, room, *where, max(threshold, 0), limit)
    if int((spans[1] - spans[0]).sum()) > limit:
        return None
    first = at = int(spans[0, 0])
    for begin, end in spans.T.tolist():
        if begin > at:  # otherwise it lies where it belongs
            for found in (positions, values):
                found[at : at + end - begin] = found[begin:end]
        at += end - begin
    return torch.from_numpy(positions[first:at]), torch.from_numpy(values[first:at])


def _mapped(count: int, dtype: type) -> np.ndarray:
    """Memory of which only what is written to is taken, and which goes back once it is released.

    Of the heap 17 MB would stay taken, and what a step needs afterwards would come on top. NumPy's own large arrays
    ask for huge pages: where the system must first make them, a call took 20 instead of 10 ms.
    """
    memory = mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype)


def magnitude_histogram(values: Tensor, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.magnitude_histogram`; equal to the bit."""
    parts = _parts(values.numel())
    counts = _no_counts(parts, bins)
    run_parts(parts, loops.histogram, counts, _bits(values), start, shift)
    return torch.from_numpy(counts.sum(axis=0))


def select_above(values: Tensor, threshold: int, size: int | None = None) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.select_above`."""
    bits, threshold = _bits(values), max(threshold, 0)
    starts = _starts(bits, threshold)
    chosen = np.empty(starts[-1], dtype=np.int64)
    run_parts(len(starts) - 1, loops.select_above, chosen, starts, bits, threshold)
    return torch.from_numpy(chosen)


def keep_above(positions: Tensor, values: Tensor, threshold: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.kernels.reference.keep_above`; the positions returned are int64."""
    bits, threshold = _bits(values), max(threshold, 0)
    starts = _starts(bits, threshold)
    kept, kept_values = np.empty(starts[-1], dtype=np.int64), np.empty(starts[-1], dtype=np.float32)
    outputs = kept, kept_values.view(np.uint32)
    run_parts(len(starts) - 1, loops.keep_above, *outputs, starts, positions.numpy(), bits, threshold)
    return torch.from_numpy(kept), torch.from_numpy(kept_values)


def _starts(bits: np.ndarray, threshold: int) -> np.ndarray:
    """How many are above the threshold before each part, where that part writes, and in all: int64 [parts + 1]."""
    parts = _parts(bits.size)
    counts = np.zeros(parts + 1, dtype=np.int64)
    run_parts(parts, loops.count_above, counts[1:], bits, threshold)
    return counts.cumsum()


def gather(values: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.gather`."""
    run_parts(_parts(indices.numel()), loops.gather, out.numpy(), values.numpy(), indices.numpy())
    return out


def clear_(vector: Tensor, indices: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.clear_`."""
    run_parts(_parts(indices.numel()), loops.clear, vector.numpy(), indices.numpy())


def merge_owned(hash: BlockHash, positions: list[Tensor]) -> Tensor:
    """Coordinates from positions in every owner's own order, ascending each: int64 [sum], ascending, on the CPU.

    One pass over the blocks, which visit their owners in turn, instead of a sort.
    """
    if hash.shards == 1:  # the owner's order is the vector's
        return positions[0]
    ends = np.cumsum([part.numel() for part in positions])
    out = np.empty(ends[-1], dtype=np.int64)
    loops.merge_owned(out, torch.cat(positions).numpy(), ends, hash.blocks, hash.shard_coefficients, hash.block)
    return torch.from_numpy(out)


def _flat(table: Tensor) -> np.ndarray:
    assert table.is_contiguous()
    return table.numpy().reshape(-1)


def _bits(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.uint32)


def _no_counts(parts: int, bins: int) -> np.ndarray:
    return np.zeros((parts * loops.SUBCOUNTS, bins + 1), dtype=np.int64)


def _velocity(u: Tensor | None) -> np.ndarray:
    return u.numpy() if u is not None else np.empty(0, dtype=np.float32)


def _hash_numbers(hash: BlockHash) -> loops.HashNumbers:
    coefficients = hash.sign_coefficients, hash.offset_coefficients, hash.shard_coefficients
    return *coefficients, hash.block, hash.shard_cols, hash.shards


@cache
def _share_of_cores() -> int:
    """This rank's share of the node's cores, or as many as OMP_NUM_THREADS or NUMBA_NUM_THREADS asks for."""
    if any(os.environ.get(name) for name in THREAD_SETTINGS):
        return numba.config.NUMBA_NUM_THREADS
    ranks = next((int(os.environ[name]) for name in LOCAL_SIZES if name in os.environ), 1)
    return max(1, (os.cpu_count() or 1) // ranks)


def _parts(size: int) -> int:
    """How many threads ``size`` values are worth."""
    limit = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, _share_of_cores())
    return max(1, min(limit, size // MIN_PART))
