"""The sketch kernels for CUDA GPUs, in Triton: functions of :mod:`hvd_sketch.kernels.reference`, and a few more.

Results equal the reference's to the bit, with two exceptions. Atomic sums are added in any order, which changes their
rounding, and they flush subnormal numbers to zero. The payload of a NaN may differ.

A function that selects waits for the device if it is called without ``size``. No other function waits.

Limits, in bytes per coordinate for r rows. M is the copy bandwidth of device memory, bytes read and written together.
L is the bandwidth at which the level-2 cache is read, A that at which it adds. A table of rows * cols * 4 bytes stays
in that cache if it is well below the cache's size (50 MB on an H100 or H200). A larger table is read and written in
memory: its bytes then count in the first column, not in the second.

=======================  ============================================  ===========  =======================
function                 device memory                                 L2           time at least
=======================  ============================================  ===========  =======================
accumulate_atomic_       4: v                                          4 r, added   max(4 / M, 4 r / A)
  with feedback          20: u, v, g read, u, v written (m = 0: 12)    4 r, added   max(20 / M, 4 r / A)
accumulate_gather_       4 r: v for each row; 0.8 r: sorting           8 per cell   4.8 r / M
estimate                 4: written                                    4 r, read    max(4 / M, 4 r / L)
owned_histogram          0                                             4 r, read    4 r / L
owned_above, .._kept     24 per coordinate returned                    8 r, read    8 r / L (counts, then writes)
magnitude_histogram      4                                             -            4 / M
select_above, first_..   8; 24 per coordinate returned                 -            8 / M
quantize                 4 read, bits / 8 + 2 / chunk written          -            (4 + bits / 8) / M
dequantize_sum           4 written, bits / 8 + 2 / chunk a term read   -            (4 + terms * bits / 8) / M
subtract_at_             76 per coordinate given: 12, and its sectors  -            76 / M
=======================  ============================================  ===========  =======================

Sorting: each block of 256 has two landings per row, each with a 4-byte key and an 8-byte position. Four radix passes
of 8 bits read and write them: 2 * 4 * 24 / 256 bytes. So at 3 rows the atomic form moves 4 bytes through memory and the
gathering form 14: the atomic form is the default.

An H100 copies at 2.8 TB/s, reads L2 at about 4.8 and adds there at about 2.7. At 100 M coordinates and 3 rows
accumulating takes 0.63 ms (70 % of the limit), with feedback 1.1 (65 %), estimates 0.54 (46 %), gathering 1.6. Where
the table is larger than L2, gathering is faster: 10.8 against 13.4 ms at 1,000 M. (``benchmarks/results/gpu``.)

Instructions of a thread per coordinate and row (sm_90 code by Triton 3.7, 3 rows): accumulate and estimate take 37, of
which 10 or 11 are the hash. The gathering form takes about as many for each of the two tiles that a block meets, 29 %
of them the hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from hvd_sketch.hashing import LANES_PER_WORD, MAX_BLOCK, BlockHash, ceil_div
from hvd_sketch.kernels import _gpu_few_bits as few_bits
from hvd_sketch.kernels import _gpu_selection as selection
from hvd_sketch.kernels import _gpu_sums as sums
from hvd_sketch.kernels.reference import CHUNKS, LARGEST_CODES, LARGEST_SCALES, chunks_of, packed_bytes
from hvd_sketch.kernels.reference import clear_ as clear_  # torch's, on any device
from hvd_sketch.kernels.reference import gather as gather

Feedback = tuple[Tensor | None, Tensor | None, float]  # u, gradient, momentum
NO_FEEDBACK: Feedback = None, None, 0.0
ON_HOST = False
TILE = 1024  # coordinates of a program: at least the largest block
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
COPIES = 256  # histograms side by side: most estimates are in about ten bins, where additions wait for each other


def feedback_(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_`; equal to the bit."""
    size = v.numel()
    _launch(sums.feedback, ceil_div(size, TILE), v, u, gradient, momentum, size, TILE=TILE, enable_fp_fusion=False)


def feedback_accumulate_(
    hash: BlockHash, table: Tensor, u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float, start: int
) -> None:
    """See :func:`hvd_sketch.kernels.reference.feedback_accumulate_`; u and v are equal to the bit."""
    if torch.are_deterministic_algorithms_enabled():
        feedback_(u, v, gradient, momentum)
        accumulate_gather_(hash, table, v, start)
    else:
        accumulate_atomic_(hash, table, v, start, fed=(u, gradient, momentum))


def accumulate_(hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None) -> None:
    """:func:`accumulate_gather_` under ``torch.use_deterministic_algorithms``, otherwise :func:`accumulate_atomic_`."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    (accumulate_gather_ if deterministic else accumulate_atomic_)(hash, table, values, start, rows)


def accumulate_atomic_(
    hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None, fed: Feedback = NO_FEEDBACK
) -> None:
    """:func:`accumulate_` by atomic additions: the order of a cell's additions, and so its rounding, varies.

    With a gradient in ``fed``, :func:`feedback_` of u and ``values`` comes first.
    """
    assert table.is_contiguous() and values.is_contiguous()
    rows = range(hash.rows) if rows is None else rows
    size = values.numel()
    u, gradient, momentum = fed
    numbers = momentum, start, size, hash.shard_cols, table[0].numel(), rows.start, rows.stop
    _launch(
        sums.accumulate, _tiles(start, size),
        table[rows.start :], values, u, gradient, device_coefficients(hash, table.device), *numbers,
        enable_fp_fusion=False, **_constants(hash),
    )  # fmt: skip


def accumulate_gather_(hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None) -> None:
    """:func:`accumulate_` without atomics, each cell by one program: equal to the reference to the bit."""
    assert table.is_contiguous() and values.is_contiguous()
    if values.numel() == 0:
        return
    coefficients = device_coefficients(hash, table.device)
    cols, block = hash.shard_cols, hash.block
    first_block = start // block
    blocks = (start + values.numel() - 1) // block + 1 - first_block
    lists = cols // block
    landings = torch.empty(2 * blocks, dtype=torch.int32, device=table.device)
    every_list = torch.arange(hash.shards * lists + 1, dtype=torch.int32, device=table.device)
    for row in range(hash.rows) if rows is None else rows:
        arguments = landings, coefficients, row, first_block, blocks, cols, lists
        _launch(sums.list_landings, ceil_div(blocks, TILE), *arguments, BLOCK=block, SHARDS=hash.shards, TILE=TILE)
        ordered, entries = landings.sort(stable=True)  # stable: a list's blocks ascend
        bounds = torch.searchsorted(ordered, every_list)
        where = coefficients, row, first_block, start, values.numel(), cols, lists
        tiles = hash.shards * ceil_div(cols, block)
        constants = {"BLOCK": block, "LANES": _lanes(hash), "num_warps": 1}
        _launch(sums.gather, tiles, table[row], values, entries, bounds, *where, **constants)


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.estimate`."""
    assert table.is_contiguous()
    out = torch.empty(stop - start, dtype=torch.float32, device=table.device)
    numbers = device_coefficients(hash, table.device), start, stop, hash.dim, hash.shard_cols, table[0].numel()
    _launch(selection.estimate, _tiles(start, stop - start), out, table, *numbers, ROWS=hash.rows, **_constants(hash))
    return out


def owned_histogram(hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.owned_histogram`."""
    return _histogram(_owned_estimates(hash, shard_table, shard), start, shift, bins)


def owned_histogram_kept(
    hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int, limit: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See :func:`hvd_sketch.kernels.reference.owned_histogram_kept`; what is kept is ``limit`` long."""
    source = _owned_estimates(hash, shard_table, shard)
    counts = _empty_histograms(source, bins)
    kept = _above(source, start - 1, limit, counts, SHIFT=shift, BINS=bins, COPIES=COPIES)
    return counts.sum(dim=0), kept


def owned_above(
    hash: BlockHash, shard_table: Tensor, shard: int, threshold: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.kernels.reference.owned_above`."""
    return _above(_owned_estimates(hash, shard_table, shard), threshold, size)


def magnitude_histogram(values: Tensor, start: int, shift: int, bins: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.magnitude_histogram`."""
    return _histogram(_elements(values), start, shift, bins)


def select_above(values: Tensor, threshold: int, size: int | None = None) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.select_above`."""
    return _above(_elements(values), threshold, size)[0]


def first_above(values: Tensor, threshold: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions and values of the first ``size`` above the threshold, with zeros behind them; without it, of all.

    They are those of :func:`hvd_sketch.kernels.reference.select_above`.
    """
    return _above(_elements(values), threshold, size)


def keep_above(positions: Tensor, values: Tensor, threshold: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.kernels.reference.keep_above`."""
    chosen, kept = _above(_elements(values), threshold, size)
    return positions[chosen], kept


def scatter_(targets: Sequence[Tensor | None], starts: Tensor, indices: Tensor, values: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.scatter_`; one launch for any number of targets."""
    dtype = next((target.dtype for target in targets if target is not None), torch.float32)
    pointers = [0 if target is None else target.data_ptr() for target in targets]
    # From memory that is not pinned a copy waits for the device.
    addresses = torch.tensor(pointers, pin_memory=values.is_cuda, device="cpu")
    arguments = addresses.to(values.device, non_blocking=True), starts, len(targets), indices, values, values.numel()
    constants = {"DTYPE": DTYPES[dtype], "STEPS": len(targets).bit_length(), "TILE": TILE}
    _launch(sums.scatter, ceil_div(values.numel(), TILE), *arguments, **constants)


def subtract_at_(vector: Tensor, indices: Tensor, values: Tensor) -> None:
    """See :func:`hvd_sketch.kernels.reference.subtract_at_`; equal to the bit."""
    size = indices.numel()
    _launch(few_bits.subtract_at, ceil_div(size, TILE), vector, indices, values, size, TILE=TILE)


def quantize(values: Tensor, bits: int, dither: int | None = None) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.quantize`; equal to the bit."""
    assert values.is_contiguous()
    segments, length = values.shape
    segment_bytes = packed_bytes(length, bits)
    packed = torch.empty((segments, segment_bytes), dtype=torch.uint8, device=values.device)
    if dither is not None:  # as int32: one type for all
        dither -= dither >> 31 << 32
    constants = {"MOST": LARGEST_CODES[bits], "LARGEST_SCALE": LARGEST_SCALES[bits], **_chunks(bits)}
    programs = segments * _programs(length, bits)
    _launch(few_bits.quantize, programs, packed, values, dither, length, segment_bytes, **constants)
    return packed


def dequantize_sum(packed: Tensor, length: int, bits: int) -> Tensor:
    """See :func:`hvd_sketch.kernels.reference.dequantize_sum`; equal to the bit."""
    terms, segments, _ = packed.shape
    packed = packed.contiguous()
    total = torch.empty((segments, length), dtype=torch.float32, device=packed.device)
    numbers = terms, length, packed.stride(0), packed.stride(1)
    _launch(few_bits.dequantize_sum, segments * _programs(length, bits), total, packed, *numbers, **_chunks(bits))
    return total


def _chunks(bits: int) -> dict[str, Any]:
    """What the kernels of few-bit codes are compiled with."""
    return {"BITS": bits, "CHUNK": CHUNKS[bits], "CHUNKS": TILE // CHUNKS[bits], "enable_fp_fusion": False}


def _programs(length: int, bits: int) -> int:
    """How many programs a segment of few-bit codes takes."""
    return ceil_div(chunks_of(length, bits), TILE // CHUNKS[bits])


class _Source(NamedTuple):
    """A vector's elements, or a table's estimates, as arguments of the selection kernels."""

    tensor: Tensor
    tiles: int
    numbers: tuple[Any, ...]
    constants: dict[str, int]

    def launch(self, kernel: Any, *arguments: Any, **constants: int) -> None:
        _launch(kernel, self.tiles, self.tensor, *self.numbers, *arguments, **self.constants, **constants)


def _elements(values: Tensor) -> _Source:
    constants = {"ROWS": 0, "BLOCK": 1, "SHARDS": 1, "LANES": 1, "TILE": TILE}
    return _Source(values, ceil_div(values.numel(), TILE), (None, 0, values.numel(), 0), constants)


def _owned_estimates(hash: BlockHash, shard_table: Tensor, shard: int) -> _Source:
    assert shard_table.is_contiguous()
    longest = ceil_div(hash.blocks, hash.shards) * hash.block
    constants = {"ROWS": hash.rows, **_constants(hash)}
    numbers = device_coefficients(hash, shard_table.device), shard, hash.dim, hash.shard_cols
    return _Source(shard_table, ceil_div(longest, TILE), numbers, constants)


def _histogram(source: _Source, start: int, shift: int, bins: int) -> Tensor:
    counts = _empty_histograms(source, bins)
    source.launch(selection.histogram, counts, start, SHIFT=shift, BINS=bins, COPIES=COPIES)
    return counts.sum(dim=0)


def _empty_histograms(source: _Source, bins: int) -> Tensor:
    return torch.zeros((COPIES, bins + 1), dtype=torch.int32, device=source.tensor.device)


def _above(
    source: _Source, threshold: int, size: int | None, counts: Tensor | None = None, **window: int
) -> tuple[Tensor, Tensor]:
    """Positions and values above the threshold: the first ``size`` of them, filled up with zeros.

    With ``counts``, a histogram of all of them is added there. Every tile counts its values above the threshold; the
    sum up to a tile is where the tile writes. Without a size the host waits for the last sum.
    """
    device = source.tensor.device
    found = torch.empty(source.tiles, dtype=torch.int64, device=device)
    source.launch(selection.count, found, threshold)
    found = found.cumsum(dim=0)
    if size is None:
        size = int(found[-1]) if source.tiles else 0
    positions = torch.zeros(size, dtype=torch.int64, device=device)
    values = torch.zeros(size, dtype=torch.float32, device=device)
    source.launch(selection.write_chosen, positions, values, size, found, threshold, counts, **window)
    return positions, values


def _tiles(start: int, size: int) -> int:
    """How many tiles the coordinates ``start … start + size`` meet."""
    return ceil_div(start + size, TILE) - start // TILE if size else 0


def _constants(hash: BlockHash) -> dict[str, int]:
    return {"BLOCK": hash.block, "SHARDS": hash.shards, "LANES": _lanes(hash), "TILE": TILE}


def _lanes(hash: BlockHash) -> int:
    return min(hash.block, LANES_PER_WORD)


@lru_cache(maxsize=16)  # a step calls several functions with one hash
def device_coefficients(hash: BlockHash, device: torch.device) -> Tensor:
    """The hash's coefficients on the device: int32 [4 + 8 * rows].

    First the 4 of the shard rotation, then for each row the 4 of its signs and the 4 of its offsets.

    Raises:
        ValueError: a shard has 2^31 columns or more.
    """
    if hash.shard_cols > 2**31 - MAX_BLOCK:
        raise ValueError(f"GPU kernels count columns in 32 bits, got {hash.shard_cols} per shard: use fewer cols")
    rows = np.stack([hash.sign_coefficients, hash.offset_coefficients], axis=1)
    numbers = np.concatenate([hash.shard_coefficients, rows.reshape(-1)]).astype(np.int32)
    # The copy to a GPU is in the current stream; the source, pageable memory, has been read on return.
    return torch.from_numpy(numbers).to(device, non_blocking=True)


_launching = Lock()


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """By one thread at a time: Triton hands out a kernel while another thread is still loading it."""
    if programs:
        with _launching, torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)
