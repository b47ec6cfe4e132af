"""The bit-exact hash of the Count Sketch: block rotation with 4-wise independent signs.

Coordinate ``i = block * B + lane``. Row ``j`` places a whole block at one random offset,
``column = (offset_j(block) + lane) mod C`` with ``C = cols // shards``, so memory access is
contiguous. Two coordinates of different blocks of one shard collide with probability ``1/C``,
as under a fully random hash; two coordinates of one block never do (``B <= C``).

Signs and offsets are polynomials of degree 3 over GF(2^31 - 1), hence 4-wise independent
(Alon, Matias, Szegedy 1999, need that for the variance of the norm estimate). The sign of ``i`` in
row ``j`` is bit ``i & 15`` of the row's polynomial at ``i >> 4``; it does not depend on ``B``.

Block ``b`` belongs to shard ``(b mod W + rho(b div W)) mod W``: each group of ``W`` consecutive
blocks is a rotation of the ``W`` shards, hashed, because plain ``b mod W`` aligns with the strides
of weight matrices.

This module is plain NumPy and is the specification: every backend must reproduce it bit for bit.
A change of any value it returns is a new ``HASH_VERSION``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

import numpy as np
import numpy.typing as npt

HASH_VERSION = 1
PRIME = 2**31 - 1
MAX_BLOCK = 256
LANES_PER_WORD = 16
MAX_DIM = LANES_PER_WORD * PRIME  # word indices must stay below PRIME to be distinct in the field

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


class Purpose(IntEnum):
    """What random numbers are drawn for; each purpose has Philox counters of its own."""

    SIGN = 0
    OFFSET = 1
    SHARD = 2
    HEAVYMIX = 3
    RANDOM = 4
    DITHER = 5
    LOW_RANK = 6


def random_words(seed: int, step: int, purpose: Purpose, row: int = 0) -> np.random.Philox:
    """Philox keyed by ``(seed, step)``, at the start of a purpose's and row's own counter block.

    Use ``random_raw()`` only: NumPy keeps its stream fixed, while the streams of Generator methods may change.
    """
    mask = 2**64 - 1
    key = np.array([seed & mask, step & mask], dtype=np.uint64)
    counter = np.array([0, 0, row, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def draw_coefficients(seed: int, step: int, purpose: Purpose, row: int = 0) -> WordArray:
    """Four coefficients of a cubic, lowest degree first, uniform in ``[0, PRIME)``: uint64 [4]."""
    words = random_words(seed, step, purpose, row)
    coefficients: list[int] = []
    while len(coefficients) < 4:
        candidate = int(words.random_raw()) >> 33
        if candidate < PRIME:
            coefficients.append(candidate)
    return np.array(coefficients, dtype=np.uint64)


def evaluate_cubic(coefficients: WordArray, x: npt.NDArray[np.integer]) -> WordArray:
    """The cubic at ``x`` (non-negative, below PRIME) over GF(PRIME): uint64 in ``[0, PRIME)``."""
    prime = np.uint64(PRIME)
    points = x.astype(np.uint64)
    value = np.full(points.shape, coefficients[3], dtype=np.uint64)
    for degree in (2, 1, 0):
        value = (value * points + coefficients[degree]) % prime  # below 2^62 + 2^31: no overflow
    return value


def block_size(dim: int, cols: int, shards: int) -> int:
    """Largest power of two ``<= min(256, C / 4, dim / (16 * shards))`` with ``C = cols // shards``, at least 1.

    A block as long as the row meets almost every other block in exactly one lane: random hashes do not collide so.
    Recall at dim 785, 7 x 40, against an ideal hash: with blocks of 32, 0.012 lower for ten adjacent heavy coordinates
    and 0.014 higher for ten spread ones; with blocks of 8, within 0.005.
    """
    limit = max(1, min(MAX_BLOCK, cols // shards // 4, dim // (16 * shards)))
    return 1 << (limit.bit_length() - 1)


@dataclass(frozen=True, eq=False)
class BlockHash:
    """The cell of every coordinate of a ``dim``-long vector in a ``[rows, shards, cols // shards]`` table.

    Stores ``8 * rows + 4`` coefficients and nothing per coordinate.

    Raises:
        ValueError: ``dim`` outside ``[1, MAX_DIM]``; ``rows``, ``shards`` or ``cols // shards`` below 1.
    """

    dim: int
    rows: int
    cols: int
    shards: int = 1
    seed: int = 0
    step: int = 0
    block: int = field(init=False)
    sign_coefficients: WordArray = field(init=False, repr=False)
    offset_coefficients: WordArray = field(init=False, repr=False)
    shard_coefficients: WordArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MAX_DIM:
            raise ValueError(f"dim must be between 1 and {MAX_DIM}, got {self.dim}")
        for name in ("rows", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cols < self.shards:
            raise ValueError(
                f"cols must be at least 1 for each of the {self.shards} shards (one per rank), "
                f"got cols={self.cols}: give the sketch more columns or use fewer ranks"
            )
        derive = partial(object.__setattr__, self)  # the dataclass is frozen
        derive("block", block_size(self.dim, self.cols, self.shards))
        if self.blocks > PRIME:
            raise ValueError(
                f"dim {self.dim} in blocks of {self.block} exceeds the hash's {PRIME} blocks: "
                f"give the sketch more columns than {self.cols}"
            )
        draw = partial(draw_coefficients, self.seed, self.step)
        derive("sign_coefficients", np.stack([draw(Purpose.SIGN, j) for j in range(self.rows)]))
        derive("offset_coefficients", np.stack([draw(Purpose.OFFSET, j) for j in range(self.rows)]))
        derive("shard_coefficients", draw(Purpose.SHARD))

    @property
    def shard_cols(self) -> int:
        """Columns of one shard in a row, ``C``."""
        return self.cols // self.shards

    @property
    def table_shape(self) -> tuple[int, int, int]:
        return (self.rows, self.shards, self.shard_cols)

    @property
    def blocks(self) -> int:
        """How many blocks cover ``dim``; the last may be partial."""
        return ceil_div(self.dim, self.block)

    def signs(self, row: int, index: IntArray) -> npt.NDArray[np.float32]:
        """+1 or -1 for each coordinate: float32, the shape of ``index``."""
        words = evaluate_cubic(self.sign_coefficients[row], index >> 4)
        bits = (words >> (index & 15).astype(np.uint64)) & np.uint64(1)
        return np.where(bits == 1, np.float32(-1), np.float32(1))

    def offsets(self, row: int, block: IntArray) -> IntArray:
        """Column of lane 0 of each block, counted within its shard: int64 in ``[0, C)``."""
        words = evaluate_cubic(self.offset_coefficients[row], block)
        return ((words * np.uint64(self.shard_cols)) >> np.uint64(31)).astype(np.int64)

    def rotations(self, group: IntArray) -> IntArray:
        """``rho``: the rotation of the shards of each group of ``W`` blocks, in ``[0, W)``."""
        words = evaluate_cubic(self.shard_coefficients, group)
        return ((words * np.uint64(self.shards)) >> np.uint64(31)).astype(np.int64)

    def shard_of(self, block: IntArray) -> IntArray:
        """The shard (rank) each block belongs to: int64 in ``[0, shards)``."""
        return (block % self.shards + self.rotations(block // self.shards)) % self.shards

    def cells(self, row: int, index: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and column of each coordinate in one row of the table."""
        block, lane = index // self.block, index % self.block
        return self.shard_of(block), (self.offsets(row, block) + lane) % self.shard_cols

    def owned_blocks(self, shard: int) -> IntArray:
        """The blocks of one shard, ascending: int64. This order is the owner's own coordinate order."""
        groups = np.arange(ceil_div(self.blocks, self.shards), dtype=np.int64)
        owned = groups * self.shards + (shard - self.rotations(groups)) % self.shards
        return owned[owned < self.blocks]

    def owned_size(self, shard: int) -> int:
        """How many coordinates one shard owns; can be 0."""
        last = (self.blocks - 1) // self.shards  # all groups of blocks before this one are whole
        block = last * self.shards + (shard - int(self.rotations(np.array([last]))[0])) % self.shards
        return last * self.block + min(self.block, max(0, self.dim - block * self.block))

    def owned_to_global(self, shard: int, position: IntArray) -> IntArray:
        """Coordinates at positions in an owner's own order: int64, ascending where ``position`` is."""
        return self.owned_blocks(shard)[position // self.block] * self.block + position % self.block
