"""The codes of :mod:`hvd_sketch.coding` for positions in host memory: made and read by Numba, a word at a time.

A million positions take 2 ms to encode and 2 to decode; bit by bit it was 14 and 13.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from hvd_sketch.coding import COUNT_SHIFT, MOST_LOW_BITS, TRIED_LOW_BITS, Words
from hvd_sketch.hashing import BlockHash, ceil_div
from hvd_sketch.kernels._cpu_loops import count_ones, lowest_bit
from hvd_sketch.kernels.cpu import merge_owned, threads_for
from hvd_sketch.kernels.threads import run_on_threads

SAMPLED_RUN = 64  # gaps in a row that are sampled to choose b
ALL_SAMPLED = 4096  # of fewer positions all gaps are sampled
SPARSE = 192  # times as many positions as codes hold: a sort takes less time than a bit for each
Bytes = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


def encode_positions(positions: Tensor, span: int) -> Tensor:
    """The code of ascending, distinct positions below ``span``, int64 or int32 [n]: uint8, on the CPU."""
    ascending = positions.numpy()
    low_bits = _fewest_bits(ascending)
    unary_start = 1 + ceil_div(len(ascending) * low_bits, 64)
    most_unary_bits = len(ascending) + (int(ascending[-1]) >> low_bits if len(ascending) else 0)
    words = np.zeros(unary_start + ceil_div(most_unary_bits, 64), dtype=np.uint64)
    words[0] = len(ascending) << COUNT_SHIFT | low_bits
    unary_words = _encode(ascending, low_bits, words[1:unary_start], words[unary_start:])
    return torch.from_numpy(words[: unary_start + unary_words].view(np.uint8))


def decode_owned(
    hash: BlockHash, encoded: Tensor, device: torch.device, known: tuple[int, Tensor, Tensor] | None = None
) -> Tensor:
    """The coordinates of all owners' positions: int64, ascending, on ``device``.

    Args:
        hash: maps the positions in each owner's order to coordinates.
        encoded: uint8, on the CPU: the code of every owner, in rank order.
        device: of the result.
        known: saves time: an owner, the code of its positions, and the positions.
    """
    words = encoded.numpy().view(np.uint64)
    owned: list[Tensor] = []
    start = 0
    while start < len(words):
        if known and len(owned) == known[0]:
            start += known[1].numel() // words.itemsize
            owned.append(known[2].to(torch.int64))
            continue
        positions, start = _decode_stream(words, start)
        owned.append(positions)
    return merge_owned(hash, owned).to(device)


def decode_union(encoded: Tensor, span: int, device: torch.device) -> Tensor:
    """The positions that are in any of several codes, one after the other: int64, ascending, on ``device``.

    Through a bit for each position below ``span``: a million of 25 million take a tenth of the time of a sort. Few of
    very many are sorted.
    """
    words = encoded.numpy().view(np.uint64)
    streams = _streams(words)
    ends = streams[:, 1].cumsum()
    # Memory of torch's: for large arrays NumPy asks the system for huge pages, which then takes 3 ms to make them.
    positions = torch.empty(int(ends[-1]), dtype=torch.int64, device="cpu")
    threads = threads_for(len(positions))
    run_on_threads(min(threads, len(streams)), _decode_streams, positions.numpy(), ends, words, streams)
    if len(streams) == 1:
        return positions.to(device)
    if len(positions) * SPARSE < span:
        ordered = np.sort(positions.numpy(), kind="stable")  # which merges what is in order already
        is_new = np.ones(len(ordered), dtype=np.bool_)
        is_new[1:] = ordered[1:] != ordered[:-1]
        return torch.from_numpy(ordered[is_new]).to(device)
    bitmap = torch.empty(ceil_div(span, 64), dtype=torch.int64, device="cpu").numpy().view(np.uint64)
    found = np.zeros(threads + 1, dtype=np.int64)
    run_on_threads(threads, _unite, bitmap, found[1:], positions.numpy(), ends)
    starts = found.cumsum()
    union = torch.empty(int(starts[-1]), dtype=torch.int64, device="cpu")
    run_on_threads(threads, _find_bits_of_threads, union.numpy(), starts, bitmap)
    return union.to(device)


def _streams(words: Words) -> IntArray:
    """Of each code in ``words`` the word where it begins, its count and its low bits: int64 [codes, 3]."""
    streams = []
    start = 0
    while start < len(words):
        count, low_bits = divmod(int(words[start]), 1 << COUNT_SHIFT)
        streams.append((start, count, low_bits))
        unary_start = start + 1 + ceil_div(count * low_bits, 64)
        start = unary_start + words_of_ones(words[unary_start:], count)
    return np.array(streams, dtype=np.int64)


def _decode_stream(words: Words, start: int) -> tuple[Tensor, int]:
    """The positions of the code that begins at word ``start``, int64 [n], and the word where it ends."""
    count, low_bits = divmod(int(words[start]), 1 << COUNT_SHIFT)
    unary_start = start + 1 + ceil_div(count * low_bits, 64)
    positions = np.empty(count, dtype=np.int64)
    unary_words = _decode(words[start + 1 : unary_start], words[unary_start:], low_bits, positions)
    return torch.from_numpy(positions), unary_start + unary_words


def encode_choice(positions: Tensor, values: Tensor) -> Tensor:
    """A bit for each of ``values`` (float32 [n]), set at ``positions`` (int64); then the values there: uint8."""
    chosen = values.index_select(0, positions)
    bitmap_bytes = ceil_div(values.numel(), 8)
    out = np.zeros(bitmap_bytes + chosen.nbytes, dtype=np.uint8)
    _set_bits(positions.numpy(), out[:bitmap_bytes])
    out[bitmap_bytes:].view(np.float32)[:] = chosen.numpy()
    return torch.from_numpy(out)


def decode_choices(encoded: Tensor, ranks: int, share_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes of :func:`encode_choice` of all ranks, in rank order, each of a share of one vector.

    Returns:
        Positions in the vector, int64, ascending, on ``device``, and the values there, float32, on the CPU.
    """
    data = encoded.numpy()
    bitmap_bytes = ceil_div(share_length, 8)
    total = (len(data) - ranks * bitmap_bytes) // 4
    positions, values = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.float32)
    start = at = 0
    for rank in range(ranks):
        words_end = start + bitmap_bytes // 8 * 8
        words, rest = data[start:words_end].view(np.uint64), data[words_end : start + bitmap_bytes]
        end = _find_bits(words, rank * share_length, positions, at)
        end = _find_bits(rest, rank * share_length + 64 * len(words), positions, end)
        start += bitmap_bytes + 4 * (end - at)
        values[at:end] = data[start - 4 * (end - at) : start].view(np.float32)
        at = end
    return torch.from_numpy(positions).to(device), torch.from_numpy(values)


def _fewest_bits(ascending: IntArray) -> int:
    """The number of low bits that makes the code shortest, or nearly: of many gaps one in eight is sampled."""
    if len(ascending) == 0:
        return 0
    mean_gap = (int(ascending[-1]) + 1) // len(ascending) - 1
    least = min(max(0, mean_gap.bit_length() + 1 - TRIED_LOW_BITS), MOST_LOW_BITS + 1 - TRIED_LOW_BITS)
    stride = SAMPLED_RUN if len(ascending) < ALL_SAMPLED else 8 * SAMPLED_RUN
    return least + int(np.argmin(_sampled_bits(ascending, least, stride)))


@njit(cache=True, nogil=True)
def _sampled_bits(ascending: IntArray, least: int, stride: int) -> IntArray:
    """Bits of the sampled gaps for each b from ``least`` on, less the bits that every b needs."""
    bits = np.zeros(TRIED_LOW_BITS, dtype=np.int64)
    for first in range(0, len(ascending) - 1, stride):
        run = ascending[first : first + SAMPLED_RUN + 1]
        for i in range(TRIED_LOW_BITS):  # one pass for each b, so that LLVM uses vectors
            total = np.int64((len(run) - 1) * i)
            for at in range(1, len(run)):
                total += (np.int64(run[at]) - np.int64(run[at - 1]) - 1) >> (least + i)
            bits[i] += total
    return bits


@njit(cache=True, nogil=True)
def _encode(ascending: IntArray, low_bits: int, low: Words, unary: Words) -> int:
    """Write both streams; returns how many words of ``unary`` were written."""
    width = np.uint64(low_bits)
    mask = (np.uint64(1) << width) - np.uint64(1)
    previous = np.int64(-1)
    bit = np.int64(0)  # of the unary stream
    ones, ones_at = np.uint64(0), np.int64(0)  # in registers: in memory each bit would wait for the previous one
    word, filled, at = np.uint64(0), np.uint64(0), 0  # of the low bits
    for position in ascending:
        gap = np.int64(position) - previous - 1
        previous = np.int64(position)
        bit += gap >> low_bits
        if bit >> 6 != ones_at:
            unary[ones_at] = ones
            ones, ones_at = np.uint64(0), bit >> 6
        ones |= np.uint64(1) << np.uint64(bit & 63)
        bit += 1
        value = np.uint64(gap) & mask
        word |= value << filled
        filled += width
        if filled >= np.uint64(64):
            low[at] = word
            at += 1
            filled -= np.uint64(64)
            word = value >> (width - filled)
    if filled > np.uint64(0):
        low[at] = word
    if len(ascending) == 0:
        return 0
    unary[ones_at] = ones
    return int(ones_at) + 1


@njit(cache=True, nogil=True)
def _decode(low: Words, unary: Words, low_bits: int, positions: IntArray) -> int:
    """Fill ``positions``; returns how many words of ``unary`` were read."""
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    position = np.int64(-1)
    at, ones = 0, np.uint64(0)  # the next unary word, and the bits left of the previous one
    high_start = np.int64(0)  # where the unary code of the next gap begins
    for i in range(len(positions)):
        while ones == 0:
            ones = unary[at]
            at += 1
        end = (at - 1) * 64 + lowest_bit(ones)
        ones &= ones - np.uint64(1)
        high = end - high_start
        high_start = end + 1
        bit = i * low_bits
        value = np.uint64(0)
        if low_bits:
            shift = np.uint64(bit & 63)
            value = low[bit >> 6] >> shift
            if (bit & 63) + low_bits > 64:
                value |= low[(bit >> 6) + 1] << (np.uint64(64) - shift)
        position += ((high << low_bits) | np.int64(value & mask)) + 1
        positions[i] = position
    return at


@njit(cache=True, nogil=True)
def words_of_ones(words: Words, count: int) -> int:
    """How many of the first words hold ``count`` set bits."""
    at = 0
    while count > 0:
        count -= count_ones(words[at])
        at += 1
    return at


@njit(cache=True, nogil=True)
def _decode_streams(
    positions: IntArray, ends: IntArray, words: Words, streams: IntArray, thread: int, threads: int
) -> None:
    """The positions of code i up to ``ends[i]``; each thread decodes some of the codes."""
    for number in range(thread, len(streams), threads):
        start, count, low_bits = streams[number]
        unary_start = start + 1 + (count * low_bits + 63) // 64
        own = positions[ends[number] - count : ends[number]]
        _decode(words[start + 1 : unary_start], words[unary_start:], low_bits, own)


@njit(cache=True, nogil=True)
def _unite(bitmap: Words, found: IntArray, positions: IntArray, ends: IntArray, thread: int, threads: int) -> None:
    """Set the bits of all codes' positions, in a piece of the bitmap, and count those that are set there."""
    low, high = thread * len(bitmap) // threads, (thread + 1) * len(bitmap) // threads
    bitmap[low:high] = np.uint64(0)
    for code in range(len(ends)):
        own = positions[ends[code - 1] if code else 0 : ends[code]]
        for i in range(np.searchsorted(own, 64 * low), np.searchsorted(own, 64 * high)):
            position = np.uint64(own[i])
            bitmap[position >> np.uint64(6)] |= np.uint64(1) << (position & np.uint64(63))
    count = 0
    for word in bitmap[low:high]:
        count += count_ones(word)
    found[thread] = count


@njit(cache=True, nogil=True)
def _find_bits_of_threads(union: IntArray, starts: IntArray, bitmap: Words, thread: int, threads: int) -> None:
    """The numbers of the set bits; each thread writes from its element of ``starts`` on.

    Four of each word are written, whether the word has more or fewer: the end of a loop over the bits would be
    mispredicted (1.9 instead of 1.0 ms of 600,000 bits in 25 million). Where that could reach the next thread's, the
    loop is used.
    """
    low, high = thread * len(bitmap) // threads, (thread + 1) * len(bitmap) // threads
    at, end = starts[thread], starts[thread + 1]
    for number in range(low, high):
        bits = bitmap[number]
        count = count_ones(bits)
        if count > 4 or at + 4 > end:
            at = _find_bits(bitmap[number : number + 1], 64 * number, union, at)
            continue
        for i in range(4):
            union[at + i] = 64 * number + lowest_bit(bits)
            bits &= bits - np.uint64(1)
        at += count


@njit(cache=True, nogil=True)
def _set_bits(positions: IntArray, bitmap: Bytes) -> None:
    for position in positions:
        bitmap[position >> 3] |= np.uint8(1 << (position & 7))


@njit(cache=True, nogil=True)
def _find_bits(bitmap: Bytes | Words, first: int, positions: IntArray, at: int) -> int:
    """Write ``first`` plus the number of each set bit to ``positions[at:]``; returns where they end."""
    width = 8 * bitmap.itemsize
    for number in range(len(bitmap)):
        bits = np.uint64(bitmap[number])
        while bits:
            positions[at] = first + width * number + lowest_bit(bits)
            at += 1
            bits &= bits - np.uint64(1)
    return at
