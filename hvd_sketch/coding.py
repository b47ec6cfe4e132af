"""Ascending positions as bytes: gaps in a Rice code, about 0.8 bytes each at a mean gap of 25, 1.2 at 250.

A gap ``g`` is the number of positions left out before one. Its low ``b`` bits are stored at fixed width, its
high part ``g >> b`` in unary (so many 0 bits, then a 1), in a stream of its own. ``b`` is chosen for the fewest
bits. Rice (1979) codes are within 0.05 bits of the entropy of geometric gaps, which hashed shards give; a
byte-aligned LEB128 needs 1.0 and 1.6 bytes.

Layout: int64 count, int64 b, int64 bits of the unary stream, low bits, unary stream; each padded to bytes,
little-endian. A stream says where it ends, so several can follow one another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

HEADER_BYTES = 24
Bytes = npt.NDArray[np.uint8]


def encode_positions(positions: Tensor) -> Tensor:
    """Encode ascending, distinct, non-negative int64 positions [n] as uint8, on the CPU."""
    ascending = positions.cpu().numpy()
    gaps = np.diff(ascending, prepend=-1) - 1
    low_bits = _best_low_bits(gaps)
    unary_bits = len(gaps) + int((gaps >> low_bits).sum())
    header = np.array([len(gaps), low_bits, unary_bits], dtype=np.int64).view(np.uint8)
    # Eight spare bytes: the low bits are written as whole 64-bit words.
    low = np.zeros(_padded_bytes(len(gaps) * low_bits) + 8, dtype=np.uint8)
    unary = np.zeros(_padded_bytes(unary_bits), dtype=np.uint8)
    _encode(gaps, low_bits, low, unary)
    return torch.from_numpy(np.concatenate([header, low[:-8], unary]))


def decode_positions(encoded: Tensor) -> list[Tensor]:
    """The positions of every stream in a concatenation of streams: a list of int64 [n], on the CPU."""
    data = encoded.cpu().numpy()
    decoded = []
    start = 0
    while start < len(data):
        count, low_bits, unary_bits = data[start : start + HEADER_BYTES].copy().view(np.int64).tolist()
        low_start = start + HEADER_BYTES
        unary_start = low_start + _padded_bytes(count * low_bits)
        start = unary_start + _padded_bytes(unary_bits)
        positions = np.empty(count, dtype=np.int64)
        _decode(data[low_start:unary_start], data[unary_start:start], low_bits, positions)
        decoded.append(torch.from_numpy(positions))
    return decoded


def encode_choice(positions: Tensor, values: Tensor) -> Tensor:
    """Which of ``values`` (float32 [n]) are chosen, one bit each, then the chosen values: uint8, on the CPU."""
    chosen = np.zeros(values.numel(), dtype=bool)
    chosen[positions.cpu().numpy()] = True
    kept = values.cpu().numpy()[chosen]
    return torch.from_numpy(np.concatenate([np.packbits(chosen, bitorder="little"), kept.view(np.uint8)]))


def decode_choices(encoded: Tensor, parts: int, part_length: int) -> tuple[Tensor, Tensor]:
    """Positions in the whole, int64 ascending, and float32 values of ``parts`` choices that follow one another."""
    data = encoded.cpu().numpy()
    bitmap_bytes = _padded_bytes(part_length)
    positions, values = [], []
    start = 0
    for part in range(parts):
        bitmap = data[start : start + bitmap_bytes]
        chosen = np.flatnonzero(np.unpackbits(bitmap, count=part_length, bitorder="little"))
        stop = start + bitmap_bytes + 4 * len(chosen)
        positions.append(chosen + part * part_length)
        values.append(data[start + bitmap_bytes : stop].copy().view(np.float32))
        start = stop
    return torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(values))


def _padded_bytes(bits: int) -> int:
    return (bits + 7) // 8


def _best_low_bits(gaps: npt.NDArray[np.int64]) -> int:
    if len(gaps) == 0:
        return 0
    guess = int(gaps.mean()).bit_length()  # the optimum is this or one or two less
    return min(range(max(0, guess - 2), guess + 1), key=lambda b: len(gaps) * b + int((gaps >> b).sum()))


@njit(cache=True, nogil=True)
def _encode(gaps: npt.NDArray[np.int64], low_bits: int, low: Bytes, unary: Bytes) -> None:
    mask = (np.int64(1) << low_bits) - 1
    unary_position = 0
    for i in range(len(gaps)):
        unary_position += gaps[i] >> low_bits
        unary[unary_position >> 3] |= np.uint8(1 << (unary_position & 7))
        unary_position += 1
        bit = i * low_bits
        rest = np.uint64(gaps[i] & mask) << np.uint64(bit & 7)
        byte = bit >> 3
        while rest:
            low[byte] |= np.uint8(rest & np.uint64(255))
            rest >>= np.uint64(8)
            byte += 1


@njit(cache=True, nogil=True)
def _decode(low: Bytes, unary: Bytes, low_bits: int, positions: npt.NDArray[np.int64]) -> None:
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    unary_position = 0
    position = np.int64(-1)
    for i in range(len(positions)):
        high = np.int64(0)
        while not (unary[unary_position >> 3] >> (unary_position & 7)) & 1:
            unary_position += 1
            high += 1
        unary_position += 1
        bit = i * low_bits
        word = np.uint64(0)
        last = (bit + low_bits + 7) >> 3
        for byte in range(bit >> 3, last):
            word |= np.uint64(low[byte]) << np.uint64(8 * (byte - (bit >> 3)))
        gap = (high << low_bits) | np.int64((word >> np.uint64(bit & 7)) & mask)
        position += gap + 1
        positions[i] = position
