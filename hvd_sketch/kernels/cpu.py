"""The sketch kernels for CPUs, compiled by Numba: the functions of :mod:`hvd_sketch.kernels.reference`.

Threads divide table cells or coordinates among them, never a sum: every cell adds its coordinates in ascending order.
So results do not depend on the number of threads, and tables equal the reference's to the bit.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash, ceil_div
from hvd_sketch.kernels import _cpu_few_bits as few_bits
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels import reference
from hvd_sketch.kernels.numba_exit import keep_exit_silent
from hvd_sketch.kernels.reference import CHUNKS, LARGEST_CODES, LARGEST_SCALES, packed_bytes
from hvd_sketch.kernels.threads import run_on_threads
from hvd_sketch.local_ranks import local_ranks

ON_HOST = True
MIN_PER_THREAD = 1 << 17  # fewer coordinates do not pay for waking a thread (20 us; their estimates take 40)
THREAD_SETTINGS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
keep_exit_silent()


def feedback_(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_`; equal to the bit."""
    run_on_threads(threads_for(v.numel()), loops.feedback, _feedback(u, v, gradient, momentum))


def feedback_accumulate_(
    hash: BlockHash, table: Tensor, u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float, start: int
) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_accumulate_`; equal to the bit."""
    pieces = np.zeros((2, ceil_div(v.numel(), loops.CHUNK)), dtype=np.int64)  # taken and done, of each chunk
    arguments = _flat(table), _feedback(u, v, gradient, momentum), start, _hash_numbers(hash), *pieces
    run_on_threads(threads_for(v.numel()), loops.feedback_accumulate, *arguments)


def accumulate_(hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None) -> None:
    """See :func:`hvd_sketch.kernels.reference.accumulate_`; equal to the bit."""
    if values.numel() == 0:
        return
    row_cells = hash.shards * hash.shard_cols
    first, count = (rows.start, len(rows)) if rows is not None else (0, hash.rows)
    cells = _flat(table), first * row_cells, count * row_cells
    run_on_threads(threads_for(values.numel()), loops.accumulate, *cells, values.numpy(), start, _hash_numbers(hash))


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.estimate`."""
    # NumPy asks for huge pages, torch does not: the first write to 100 MB takes 10 instead of 37 ms.
    out = np.empty(stop - start, dtype=np.float32)
    if out.size:
        run_on_threads(threads_for(out.size), loops.estimate, out, _flat(table), start, _hash_numbers(hash))
    return torch.from_numpy(out)


def owned_histogram(hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.owned_histogram`."""
    threads = threads_for(hash.owned_size(shard))
    counts = _no_counts(threads, bins)
    run_on_threads(threads, loops.owned_histogram, counts, _numbered(hash, shard_table, shard), start, shift)
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
    """Positions and values of estimates with magnitude bits above ``threshold``; None for more than ``limit``."""
    size = hash.owned_size(shard)
    threads = threads_for(size)
    room = min(ceil_div(size, hash.block * threads) * hash.block, limit + loops.STRETCH * hash.block)
    positions = _mapped(threads * room, np.int32 if size < 2**31 else np.int64)
    values = _mapped(threads * room, np.float32)
    spans = np.empty((2, threads), dtype=np.int64)
    arguments = spans, (positions, values), _numbered(hash, shard_table, shard), max(threshold, 0), limit
    run_on_threads(threads, loops.owned_above, *arguments)
    return _joined((positions, values), spans, limit)


def _joined(found: loops.Found, spans: np.ndarray, limit: int) -> tuple[Tensor, Tensor] | None:
    """What all threads found, moved together; ``spans`` [2, threads] is where. None for more than ``limit``."""
    if int((spans[1] - spans[0]).sum()) > limit:
        return None
    first = at = int(spans[0, 0])
    for begin, end in spans.T.tolist():
        if begin > at:  # otherwise it is where it belongs
            for array in found:
                array[at : at + end - begin] = array[begin:end]
        at += end - begin
    positions, values = found
    return torch.from_numpy(positions[first:at]), torch.from_numpy(values[first:at])


def _mapped(count: int, dtype: type) -> np.ndarray:
    """An array that takes memory only where it is written to, and gives it back to the system at its end.

    17 MB of the heap would stay taken, beside what a step needs afterwards. NumPy's own large arrays ask for huge
    pages: where the system must first make them, a call took 20 instead of 10 ms.
    """
    memory = mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype)


def magnitude_histogram(values: Tensor, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.magnitude_histogram`; equal to the bit."""
    threads = threads_for(values.numel())
    counts = _no_counts(threads, bins)
    run_on_threads(threads, loops.histogram, counts, _bits(values), start, shift)
    return torch.from_numpy(counts.sum(axis=0))


def select_above(values: Tensor, threshold: int, size: int | None = None) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.select_above`."""
    bits, threshold = _bits(values), max(threshold, 0)
    starts = _starts(bits, threshold)
    chosen = np.empty(starts[-1], dtype=np.int64)
    run_on_threads(len(starts) - 1, loops.select_above, chosen, starts, bits, threshold)
    return torch.from_numpy(chosen)


def values_above(values: Tensor, threshold: int, limit: int) -> tuple[Tensor, Tensor] | None:
    """See :func:`hvd_sketch.kernels.reference.values_above`."""
    return _found_above(limit, loops.values_above, values, threshold)


def sums_above(values: Tensor, addends: Tensor, threshold: int, limit: int) -> tuple[Tensor, Tensor] | None:
    """See :func:`hvd_sketch.kernels.reference.sums_above`; equal to the bit."""
    return _found_above(limit, loops.sums_above, values, threshold, addends.numpy())


def _found_above(
    limit: int, kernel: Callable[..., None], values: Tensor, threshold: int, *addends: np.ndarray
) -> tuple[Tensor, Tensor] | None:
    size = values.numel()
    threads = threads_for(size)
    room = min(limit, ceil_div(size, threads)) + 2
    # Memory of torch's, which is still there from the last step: NumPy's new huge pages took longer than the pass.
    positions = torch.empty(threads * room, dtype=torch.int64, device="cpu")
    kept = torch.empty(threads * room, dtype=torch.float32, device="cpu")
    spans = np.empty((2, threads), dtype=np.int64)
    found = positions.numpy(), _bits(kept)
    given = (values.numpy(), *addends) if addends else (_bits(values),)
    run_on_threads(threads, kernel, spans, found, *given, max(threshold, 0))
    return _joined((positions.numpy(), kept.numpy()), spans, limit)


def keep_above(positions: Tensor, values: Tensor, threshold: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.kernels.reference.keep_above`; the positions returned are int64."""
    bits, threshold = _bits(values), max(threshold, 0)
    starts = _starts(bits, threshold)
    kept, kept_values = np.empty(starts[-1], dtype=np.int64), np.empty(starts[-1], dtype=np.float32)
    outputs = kept, kept_values.view(np.uint32)
    run_on_threads(len(starts) - 1, loops.keep_above, outputs, starts, positions.numpy(), bits, threshold)
    return torch.from_numpy(kept), torch.from_numpy(kept_values)


def _starts(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Where each thread writes the values it finds above the threshold, and how many all find: int64 [threads + 1]."""
    threads = threads_for(bits.size)
    counts = np.zeros(threads + 1, dtype=np.int64)
    run_on_threads(threads, loops.count_above, counts[1:], bits, threshold)
    return counts.cumsum()


def gather(values: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.gather`."""
    run_on_threads(threads_for(indices.numel()), loops.gather, out.numpy(), values.numpy(), indices.numpy())
    return out


def clear_(vector: Tensor, indices: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.clear_`."""
    run_on_threads(threads_for(indices.numel()), loops.clear, vector.numpy(), indices.numpy())


def scatter_(targets: Sequence[Tensor | None], starts: Tensor, indices: Tensor, values: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.scatter_`."""
    if any(target is not None and target.dtype != torch.float32 for target in targets):
        reference.scatter_(targets, starts, indices, values)  # torch rounds to any dtype
        return
    at, given = indices.numpy(), values.numpy()
    cuts = np.searchsorted(at, starts.numpy()).tolist()
    parts = [
        (target.view(-1).numpy(), start, at[first:last], given[first:last])
        for target, start, first, last in zip(targets, starts.tolist(), cuts, cuts[1:], strict=False)
        if target is not None and first < last
    ]

    def put_share(thread: int, threads: int) -> None:
        for part in parts:
            loops.put(*part, thread, threads)

    # One call for all targets: most of them are not worth a thread on their own.
    run_on_threads(threads_for(len(at)), put_share)


def subtract_at_(vector: Tensor, indices: Tensor, values: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.subtract_at_`; equal to the bit."""
    arguments = vector.numpy(), indices.numpy(), values.numpy()
    run_on_threads(threads_for(indices.numel()), few_bits.subtract_at, *arguments)


def quantize(values: Tensor, bits: int, dither: int | None = None) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.quantize`; equal to the bit."""
    assert values.is_contiguous()
    segments, length = values.shape
    packed = np.empty((segments, packed_bytes(length, bits)), dtype=np.uint8)
    rounding = np.uint32(dither or 0), dither is not None
    run_on_threads(threads_for(values.numel()), few_bits.quantize, packed, values.numpy(), _code(bits), *rounding)
    return torch.from_numpy(packed)


def dequantize_sum(packed: Tensor, length: int, bits: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.dequantize_sum`; equal to the bit."""
    total = np.empty((packed.shape[1], length), dtype=np.float32)
    arguments = total, packed.contiguous().numpy(), _code(bits)
    run_on_threads(threads_for(total.size), few_bits.dequantize_sum, *arguments)
    return torch.from_numpy(total)


def _code(bits: int) -> few_bits.Code:
    return bits, CHUNKS[bits], LARGEST_CODES[bits], LARGEST_SCALES[bits]


def merge_owned(hash: BlockHash, positions: list[Tensor]) -> Tensor:
    """Coordinates, int64 [n], ascending, from each owner's ascending positions in its own order.

    Instead of a sort, one pass over the blocks, which visits their owners in turn.
    """
    if hash.shards == 1:  # the owner's order is the vector's
        return positions[0]
    ends = np.cumsum([len(owned) for owned in positions])
    out = np.empty(ends[-1], dtype=np.int64)
    loops.merge_owned(out, torch.cat(positions).numpy(), ends, hash.blocks, hash.shard_coefficients, hash.block)
    return torch.from_numpy(out)


def _flat(table: Tensor) -> np.ndarray:
    assert table.is_contiguous()
    return table.numpy().reshape(-1)


def _bits(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.uint32)


def _no_counts(threads: int, bins: int) -> np.ndarray:
    return np.zeros((threads * loops.SUBCOUNTS, bins + 1), dtype=np.int64)


def _feedback(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> loops.Feedback:
    velocity: np.ndarray = u.numpy() if u is not None else np.empty(0, dtype=np.float32)
    return velocity, v.numpy(), gradient.numpy(), np.float32(momentum)


def _numbered(hash: BlockHash, shard_table: Tensor, shard: int) -> loops.ShardTable:
    return _flat(shard_table), shard, hash.owned_size(shard), hash.dim, _hash_numbers(hash)


def _hash_numbers(hash: BlockHash) -> loops.HashNumbers:
    coefficients = hash.sign_coefficients, hash.offset_coefficients, hash.shard_coefficients
    return *coefficients, hash.block, hash.shard_cols, hash.shards


@cache
def _share_of_cores() -> int:
    """This rank's share of the node's cores, or as many as OMP_NUM_THREADS or NUMBA_NUM_THREADS asks for."""
    if any(os.environ.get(name) for name in THREAD_SETTINGS):
        return numba.config.NUMBA_NUM_THREADS
    return max(1, (os.cpu_count() or 1) // (local_ranks() or 1))


def threads_for(size: int) -> int:
    """How many threads ``size`` values are worth."""
    limit = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, _share_of_cores())
    return max(1, min(limit, size // MIN_PER_THREAD))
