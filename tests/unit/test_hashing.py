"""The hash specification: golden values, independence, and that shards deal out every coordinate once."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_sketch.hashing import (
    HASH_VERSION,
    MAX_DIM,
    PRIME,
    BlockHash,
    Purpose,
    draw_coefficients,
    evaluate_cubic,
)

SETTINGS = [
    (1, 1, 1, 1),
    (5, 2, 7, 3),
    (785, 7, 40, 4),
    (10_007, 3, 1_001, 7),
    (100_000, 5, 9_999, 2),
    (3, 2, 8, 4),
]


def make(dim, rows, cols, shards, seed=0, step=0):
    return BlockHash(dim, rows, cols, shards, seed, step)


def test_golden_values() -> None:
    """Frozen: these change only with HASH_VERSION, and never with NumPy's."""
    assert HASH_VERSION == 1
    h = make(1_000_000, 3, 50_000, 4, seed=42, step=7)
    index = np.array([0, 1, 15, 16, 255, 256, 12_345, 999_999])
    block = index // h.block
    assert h.block == 256
    assert h.sign_coefficients.tolist() == GOLDEN["sign_coefficients"]
    assert h.offset_coefficients[2].tolist() == GOLDEN["offset_coefficients_of_row_2"]
    assert h.shard_coefficients.tolist() == GOLDEN["shard_coefficients"]
    assert [h.signs(row, index).astype(int).tolist() for row in range(3)] == GOLDEN["signs"]
    assert [h.offsets(row, block).tolist() for row in range(3)] == GOLDEN["offsets"]
    assert h.shard_of(block).tolist() == GOLDEN["shards"]
    assert draw_coefficients(-1, 2**40, Purpose.HEAVYMIX).tolist() == GOLDEN["of_negative_seed"]


def test_cubic_is_exact() -> None:
    coefficients = np.array([PRIME - 1] * 4, dtype=np.uint64)
    for x in (0, 1, 2, PRIME - 1, 123_456_789):
        expected = sum((PRIME - 1) * pow(x, degree, PRIME) for degree in range(4)) % PRIME
        assert int(evaluate_cubic(coefficients, np.array([x]))[0]) == expected


@pytest.mark.parametrize(("dim", "rows", "cols", "shards"), SETTINGS)
def test_shards_own_every_coordinate_once(dim, rows, cols, shards) -> None:
    h = make(dim, rows, cols, shards, seed=3)
    owned = [h.owned_to_global(s, np.arange(h.owned_size(s))) for s in range(shards)]
    assert sorted(np.concatenate(owned).tolist()) == list(range(dim))
    for shard, coordinates in enumerate(owned):
        assert (np.diff(coordinates) > 0).all(), "an owner's own order is ascending"
        assert (h.shard_of(coordinates // h.block) == shard).all()


@pytest.mark.parametrize(("dim", "rows", "cols", "shards"), SETTINGS)
def test_cells_are_in_the_table_and_a_block_never_meets_itself(dim, rows, cols, shards) -> None:
    h = make(dim, rows, cols, shards)
    index = np.arange(dim)
    for row in range(rows):
        shard, column = h.cells(row, index)
        assert shard.min() >= 0 and shard.max() < shards
        assert column.min() >= 0 and column.max() < cols // shards
        in_block = index // h.block * (cols // shards) + column
        assert len(np.unique(in_block)) == dim
    sizes = [h.owned_size(s) for s in range(shards)]
    assert sum(sizes) == dim and max(sizes) - min(sizes) <= 2 * h.block


def test_steps_seeds_and_rows_hash_differently() -> None:
    index = np.arange(4096)
    variants = [make(4096, 2, 512, 1, seed, step) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    signs = [h.signs(row, index) for h in variants for row in (0, 1)]
    for i, first in enumerate(signs):
        for second in signs[:i]:
            assert abs(float(np.mean(first * second))) < 0.1  # 6 standard errors


def test_more_rows_keep_the_first_ones() -> None:
    index = np.arange(100)
    few, many = make(1000, 2, 64, 1), make(1000, 5, 64, 1)
    assert (few.signs(1, index) == many.signs(1, index)).all()


def test_sign_products_of_structured_quadruples_average_to_zero() -> None:
    """4-wise independence, where a linear or tabulated hash over bits fails: (i, i+1, i+16, i+17)."""
    starts = np.array([0, 14, 100, 4_000, 70_000, 999_000])
    seeds = 4_000
    total = np.zeros((3, len(starts)))
    for seed in range(seeds):
        h = make(1_000_000, 3, 30_000, 1, seed)
        for row in range(3):
            total[row] += np.prod([h.signs(row, starts + shift) for shift in (0, 1, 16, 17)], axis=0)
    means = total / seeds
    assert np.abs(means).max() < 4.5 / np.sqrt(seeds), means  # 18 means, 4.5 standard errors


def test_offsets_are_uniform() -> None:
    counts = np.zeros(50)
    for step in range(200):
        h = make(16_000, 1, 50, 1, step=step)
        counts += np.bincount(h.offsets(0, np.arange(h.blocks)), minlength=50)
    expected = counts.sum() / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 49 + 5 * np.sqrt(2 * 49)


def test_block_size_follows_the_rule() -> None:
    assert make(25_000_000, 1, 500_000, 4).block == 256
    assert make(785, 1, 40, 1).block == 8  # 40 columns
    assert make(785, 1, 40, 4).block == 2  # 10 columns each
    assert make(785, 1, 4000, 1).block == 32  # 785 // 16 = 49
    assert make(15, 1, 400, 1).block == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 1), "dim must be between 1"),
        ((MAX_DIM + 1, 1, 1000, 1), "dim must be between 1"),
        ((10, 0, 1, 1), "rows must be at least 1"),
        ((10, 1, 3, 4), "cols must be at least 1 for each of the 4 shards"),
        ((10, 1, 1, 0), "shards must be at least 1"),
        ((2**34, 1, 1, 1), "give the sketch more columns"),
    ],
)
def test_impossible_hashes_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(*arguments)


GOLDEN = {
    "sign_coefficients": [
        [1394619001, 1900268237, 1189134584, 2046492686],
        [1285074649, 1023134266, 1501370157, 129498380],
        [874317380, 958325748, 380657528, 1439554682],
    ],
    "offset_coefficients_of_row_2": [1513790222, 1745944815, 1206746439, 171038527],
    "shard_coefficients": [185055210, 857088942, 1344026346, 1384706190],
    "signs": [[-1, 1, 1, -1, 1, 1, -1, -1], [-1, 1, -1, -1, -1, -1, 1, -1], [1, 1, 1, -1, -1, 1, 1, 1]],
    "offsets": [
        [12363, 12363, 12363, 12363, 12363, 7050, 11233, 8894],
        [911, 911, 911, 911, 911, 2526, 6763, 8106],
        [8811, 8811, 8811, 8811, 8811, 1993, 8012, 6672],
    ],
    "shards": [0, 0, 0, 0, 0, 1, 0, 1],
    "of_negative_seed": [1527698493, 1715365405, 1719446151, 1712421326],
}
