"""The codes of :mod:`hvd_sketch.coding` for positions on any device, in torch operations there.

Only codes are copied to the host, a byte or two for each position. Encoding waits once for the device, for the code.
Decoding does not wait: the codes, which came over the network to the host, hold the number of positions. A step takes
about a hundred operations for any number of ranks. On an H100 that is about 1 ms to encode and 1.2 to decode, however
few there are: few positions are copied to the host instead and coded there, 100,000 in 0.4 ms
(``python -m benchmarks.gpu.coding``).
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from hvd_sketch.coding import COUNT_SHIFT, MOST_LOW_BITS, TRIED_LOW_BITS, Words, host
from hvd_sketch.coding.host import words_of_ones
from hvd_sketch.hashing import PRIME, BlockHash, ceil_div
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels._cpu_loops import count_ones
from hvd_sketch.transport.staging import empty_on_host, to_device, to_host, to_host_together

FEW = 1 << 19  # positions, or bytes of code, that are coded on the host
MOST_UNARY_BITS = 7  # mean per position: at the least b tried, the high part of the mean gap is below 6


HOST = torch.device("cpu")


class Stream(NamedTuple):
    """The code of some positions, in host memory."""

    length: int
    low_bits: int
    low: Words
    unary: Words


def encode_positions(positions: Tensor, span: int) -> Tensor:
    """See :func:`hvd_sketch.coding.host.encode_positions`; few may be on the host already."""
    if positions.numel() <= FEW:
        return host.encode_positions(to_host(positions), span)
    hosted = to_host(_encode(positions, span))
    return hosted[: _used_words(hosted.numpy())].view(torch.uint8)


def decode_owned(hash: BlockHash, encoded: Tensor, device: torch.device, known: object = None) -> Tensor:
    """See :func:`hvd_sketch.coding.host.decode_owned`; ``known`` is not used, for all are decoded together."""
    if encoded.numel() <= FEW:
        return to_device(host.decode_owned(hash, encoded, HOST), device)
    return _coordinates(hash, *_decode(_streams(encoded), device)).sort().values


def decode_union(encoded: Tensor, span: int, device: torch.device) -> Tensor:
    """See :func:`hvd_sketch.coding.host.decode_union`; many wait for the device, for their number."""
    if encoded.numel() <= FEW:
        return to_device(host.decode_union(encoded, span, HOST), device)
    return _decode(_streams(encoded), device)[1].unique()


def encode_choice(positions: Tensor, values: Tensor) -> Tensor:
    """See :func:`hvd_sketch.coding.host.encode_choice`."""
    if values.numel() <= FEW:
        return host.encode_choice(*to_host_together(positions, values))
    chosen = torch.zeros((ceil_div(len(values), 8), 8), dtype=torch.uint8, device=values.device)
    chosen.view(-1).index_fill_(0, positions, 1)
    bitmap = (chosen << _numbers(8, chosen)).sum(dim=1, dtype=torch.uint8)
    return to_host(torch.cat([bitmap, values.index_select(0, positions).view(torch.uint8)]))


def decode_choices(encoded: Tensor, ranks: int, share_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """See :func:`hvd_sketch.coding.host.decode_choices`."""
    if encoded.numel() <= FEW:
        positions, values = host.decode_choices(encoded, ranks, share_length, HOST)
        return to_device(positions, device), values
    bitmap_bytes = ceil_div(share_length, 8)
    total = (len(encoded) - ranks * bitmap_bytes) // 4
    bitmaps = empty_on_host((ranks, bitmap_bytes), torch.uint8, device)
    values = empty_on_host((total,), torch.float32, device)
    start = at = 0
    whole_words = bitmap_bytes // 8 * 8
    for bitmap in bitmaps:
        bitmap.copy_(encoded[start : start + bitmap_bytes])
        start += bitmap_bytes
        count = int(_ones_in(bitmap.numpy()[:whole_words].view(np.uint64)) + _ones_in(bitmap.numpy()[whole_words:]))
        values[at : at + count].view(torch.uint8).copy_(encoded[start : start + 4 * count])
        start += 4 * count
        at += count
    bits = _unpack(to_device(bitmaps, device)).view(ranks, -1)[:, :share_length]
    return _places_of_ones(bits, total), values


def _streams(encoded: Tensor) -> list[Stream]:
    """The codes that follow one another in uint8 [n], on the CPU."""
    words = encoded.numpy().view(np.uint64)
    streams: list[Stream] = []
    start = 0
    while start < len(words):
        count, low_bits = divmod(int(words[start]), 1 << COUNT_SHIFT)
        unary_start = start + 1 + ceil_div(count * low_bits, 64)
        unary_end = unary_start + words_of_ones(words[unary_start:], count)
        streams.append(Stream(count, low_bits, words[start + 1 : unary_start], words[unary_start:unary_end]))
        start = unary_end
    return streams


def _encode(positions: Tensor, span: int) -> Tensor:
    """A code, and zeros after it: int64 words."""
    count, device = len(positions), positions.device
    mean_gap_bits = (span // count).bit_length() if count else 0
    most_bits = count * (min(mean_gap_bits, MOST_LOW_BITS) + MOST_UNARY_BITS) + (span >> MOST_LOW_BITS)
    words = torch.zeros(4 + ceil_div(most_bits, 64), dtype=torch.int64, device=device)
    if count == 0:
        return words
    gaps = positions.to(torch.int64).diff(prepend=torch.full((1,), -1, device=device)) - 1
    low_bits = _fewest_bits(gaps, positions[-1])
    numbers = _numbers(count, positions)
    low, at = gaps & ((1 << low_bits) - 1), 64 + numbers * low_bits
    words.index_add_(0, at >> 6, low << (at & 63))
    words.index_add_(
        0, (at >> 6) + 1, low >> (63 - (at & 63)) >> 1
    )  # the bits that did not fit; a shift by 64 does nothing
    at = 64 * (1 + ((count * low_bits + 63) >> 6)) + (gaps >> low_bits).cumsum(0) + numbers
    words.index_add_(0, at >> 6, 1 << (at & 63))
    words[0] = (count << COUNT_SHIFT) + low_bits
    return words


def _fewest_bits(gaps: Tensor, last: Tensor) -> Tensor:
    """The number of low bits that makes the code shortest: int64 []."""
    mean_gap = (last + 1) // len(gaps) - 1
    mean_gap_bits = (mean_gap >= 1 << _numbers(MOST_LOW_BITS + 1, gaps)).sum()
    least = (mean_gap_bits + 1 - TRIED_LOW_BITS).clamp(0, MOST_LOW_BITS + 1 - TRIED_LOW_BITS)
    bits = [(gaps >> (least + i)).sum() + i * len(gaps) for i in range(TRIED_LOW_BITS)]
    return least + torch.stack(bits).argmin()


def _decode(streams: list[Stream], device: torch.device) -> tuple[Tensor, Tensor]:
    """The sender of each position, and the positions, in the order of the streams: int64 [n] each."""
    firsts = list(accumulate((stream.length for stream in streams), initial=0))
    total = firsts[-1]
    low_starts = list(accumulate((64 * len(stream.low) for stream in streams), initial=0))
    unary_starts = list(accumulate((64 * len(stream.unary) for stream in streams), initial=0))
    lengths, low_bits = ([stream[i] for stream in streams] for i in (0, 1))
    tables = np.array([lengths, firsts[:-1], low_bits, low_starts[:-1], unary_starts[:-1]], dtype=np.int64)
    # An empty word at the end, because two are read for each position.
    pieces = [tables.reshape(-1), *(stream.unary for stream in streams), *(stream.low for stream in streams)]
    words = _on_device([*pieces, np.zeros(1, dtype=np.int64)], device)
    length, *per_stream = words[: tables.size].view(5, -1)
    unary, low = words[tables.size :].split([unary_starts[-1] // 64, low_starts[-1] // 64 + 1])

    owner = torch.repeat_interleave(_numbers(len(streams), words), length, output_size=total)
    first, width, low_start, unary_start = (values[owner] for values in per_stream)
    ones = _places_of_ones(_unpack(unary.view(torch.uint8)), total)
    number = _numbers(total, words)
    before = torch.where(number == first, unary_start - 1, ones.roll(1))
    at = low_start + (number - first) * width
    halves = low.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    window = halves[at >> 5] | halves[(at >> 5) + 1] << 32
    gap = (ones - before - 1) << width | (window >> (at & 31)) & ((1 << width) - 1)
    ends = torch.nn.functional.pad((gap + 1).cumsum(0), (1, 0))
    return owner, ends[1:] - 1 - ends[first]


def _coordinates(hash: BlockHash, owner: Tensor, position: Tensor) -> Tensor:
    """``hash.owned_to_global`` for positions of several owners: int64 [n]."""
    group, lane = position // hash.block, position % hash.block
    word = torch.zeros_like(group)
    for coefficient in reversed(hash.shard_coefficients.tolist()):
        word = (word * group + coefficient) % PRIME
    rotation = (word * hash.shards) >> 31
    return (group * hash.shards + (owner - rotation) % hash.shards) * hash.block + lane


def _unpack(data: Tensor) -> Tensor:
    """The bits of uint8 [...], each byte's lowest first: float32 [..., 8]."""
    return ((data.unsqueeze(-1) >> _numbers(8, data)) & 1).to(torch.float32)


def _places_of_ones(bits: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` elements of ``bits``, flattened, that are not zero: int64, ascending."""
    return load_backend(None, bits.device).select_above(bits.reshape(-1), 0, count)


def _numbers(count: int, like: Tensor) -> Tensor:
    """0, 1, 2, … on the device of ``like``: uint8 if ``like`` is uint8, else int64."""
    return torch.arange(count, dtype=torch.uint8 if like.dtype == torch.uint8 else torch.int64, device=like.device)


def _on_device(pieces: list[npt.NDArray[np.generic]], device: torch.device) -> Tensor:
    """The concatenated pieces as int64; copied without waiting for the device."""
    words = empty_on_host((sum(map(len, pieces)),), torch.int64, device)
    np.concatenate([piece.view(np.int64) for piece in pieces], out=words.numpy())
    return to_device(words, device)


@njit(cache=True, nogil=True)
def _ones_in(data: npt.NDArray[np.unsignedinteger]) -> int:
    total = 0
    for number in data:
        total += count_ones(np.uint64(number))
    return total


@njit(cache=True, nogil=True)
def _used_words(words: npt.NDArray[np.int64]) -> int:
    """How many there are up to the last that is not zero, at least one."""
    used = len(words)
    while used > 1 and words[used - 1] == 0:
        used -= 1
    return used
