"""What low-rank factors are made of: the ranks of matrices, an orthonormal basis, products in a fixed order."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_sketch import recommended
from hvd_sketch.config import LowRankConfig
from hvd_sketch.exchange.matrices import (
    Matrix,
    as_matrices,
    factor_bytes,
    least_bytes,
    ranks_for_ratio,
    sides_of,
    within_bytes,
)
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.low_rank import _orthonormalize_by_torch_, _product_by_torch_, orthonormalize_, product_
from hvd_sketch.wire_bytes import coded_bytes

SHAPES = [(512, 4608), (10, 512), (64, 3, 7, 7), (1000, 2048), (5000,)]


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((30, 40), (30, 40)),
        ((16, 3, 3, 3), (16, 27)),
        ((2003,), (1, 2003)),
        ((1, 2003), (1, 2003)),
        ((2003, 1), (1, 2003)),
        ((65_535,), (1, 65_535)),
        ((65_537,), (256, 257)),
        ((2,), (1, 2)),
        ((1,), (1, 1)),
        ((), (1, 1)),
        ((0, 5), (0, 0)),
        ((5, 0), (0, 0)),
        ((0,), (0, 0)),
    ],
)
def test_sides(shape: tuple[int, ...], sides: tuple[int, int]) -> None:
    assert sides_of(shape) == sides


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("ratio", [1.5, 10, 50, 200])
def test_ranks_use_up_the_bytes_and_no_more(ratio: float, bits: int) -> None:
    budget = 8 * sum(np.prod(shape) for shape in SHAPES) / ratio
    if budget < least_bytes(SHAPES, bits):
        with pytest.raises(ValueError, match="the highest ratio possible is"):
            ranks_for_ratio(SHAPES, ratio, bits)
        return
    ranks = ranks_for_ratio(SHAPES, ratio, bits)
    spent = sum(rank * least_bytes([shape], bits) for rank, shape in zip(ranks, SHAPES, strict=True))
    growing = [shape for rank, shape in zip(ranks, SHAPES, strict=True) if rank < min(sides_of(shape))]
    assert spent <= budget and all(1 <= rank <= min(sides_of(s)) for rank, s in zip(ranks, SHAPES, strict=True))
    assert all(spent + least_bytes([shape], bits) > budget for shape in growing)


def test_ranks_grow_in_turn_and_those_with_most_entries_per_byte_first() -> None:
    shapes = [(40, 40), (100, 100)]  # rank 1 takes 2 * 2 * 22 and 2 * 2 * 54 bytes
    assert [coded_bytes(side, 4) for side in (40, 100)] == [22, 54]
    given = [ranks_for_ratio(shapes, 8 * 11_600 / budget, 4) for budget in (304.1, 519, 520.1, 608.1, 824.1)]
    assert given == [[1, 1], [3, 1], [1, 2], [2, 2], [2, 3]]
    assert ranks_for_ratio(shapes, 0.1, 4) == [40, 100]


def test_the_highest_ratio_is_told_and_possible() -> None:
    highest = 8 * 1600 / least_bytes([(40, 40)], 4)
    assert ranks_for_ratio([(40, 40)], highest, 4) == [1]
    assert ranks_for_ratio([(40, 40)], 145.454, 4) == [1]
    with pytest.raises(ValueError, match=r"factors of rank 1 take 88: the highest ratio possible is 145\.454 with"):
        ranks_for_ratio([(40, 40)], highest * 1.01, 4)


def test_tensors_without_elements_are_no_matrices() -> None:
    config = LowRankConfig(rank=50)
    assert as_matrices([(4, 5), (0, 3), (7,)], config) == [Matrix(0, 20, 4, 5, 4), Matrix(20, 27, 1, 7, 1)]
    assert as_matrices([(0,)], LowRankConfig(ratio=2.0)) == []
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0, 64), (64, 64), (0,))]
    config = recommended(parameters, 20, 2)
    assert config == recommended(parameters[1:], 20, 2) and isinstance(config, LowRankConfig)


@pytest.mark.parametrize("shape", [(12, 7), (50,), (65_537,), (1,)])
def test_products_of_a_matrix_whose_last_row_is_short(shape: tuple[int, ...]) -> None:
    (matrix,) = as_matrices([shape], LowRankConfig(rank=2))
    entries = int(np.prod(shape))
    vector = torch.randn(entries + 3)
    dense = torch.zeros(matrix.rows * matrix.cols)
    dense[:entries] = vector[:entries]
    dense = dense.view(matrix.rows, matrix.cols)
    left, right = torch.randn(matrix.rank, matrix.rows), torch.randn(matrix.rank, matrix.cols)
    lefts, rights = torch.empty_like(left), torch.empty_like(right)
    matrix.times_right_(lefts, vector, right)
    matrix.times_left_(rights, vector, left)
    assert torch.allclose(lefts, right @ dense.T, atol=1e-4) and torch.allclose(rights, left @ dense, atol=1e-4)
    expected = (dense - left.T @ right).view(-1)[:entries]
    rest = vector[entries:].clone()
    matrix.subtract_product_(vector, left, right)
    assert torch.allclose(vector[:entries], expected, atol=1e-4) and torch.equal(vector[entries:], rest)


def plain_dot(left: np.ndarray, right: np.ndarray) -> float:
    lanes, whole = [0.0] * 8, len(left) // 8 * 8
    for i in range(whole):
        lanes[i % 8] += left[i] * right[i]
    total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    for i in range(whole, len(left)):
        total += left[i] * right[i]
    return total


def plain_basis(factor: Tensor) -> Tensor:
    """The same operations in NumPy, whose sums have no other order."""
    columns = factor.double().numpy()
    for j, column in enumerate(columns):
        before = np.sqrt(plain_dot(column, column))
        for _ in range(2):
            for i in range(j):
                column += -plain_dot(columns[i], column) * columns[i]
        rest = np.sqrt(plain_dot(column, column))
        columns[j] = column / rest if rest > 2.0**-20 * before else 0
    return torch.from_numpy(columns.astype(np.float32))


@pytest.mark.parametrize(("rank", "length"), [(1, 1), (1, 7), (3, 8), (4, 1001), (5, 5), (20, 33)])
def test_a_basis_is_orthonormal_and_has_the_bits_of_plain_operations(rank: int, length: int) -> None:
    factor = (
        torch.randn(rank, length, generator=torch.Generator().manual_seed(rank)) * 10.0 ** torch.arange(rank)[:, None]
    )
    expected, by_torch = plain_basis(factor), factor.clone()
    spans, basis = factor.clone(), factor
    _orthonormalize_by_torch_([by_torch])
    orthonormalize_([basis])
    assert torch.equal(basis, expected)
    assert torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-6)
    assert torch.allclose(spans, spans @ basis.T @ basis, atol=0, rtol=1e-3)
    assert torch.allclose(basis, by_torch, atol=1e-6)


@pytest.mark.parametrize("make", [orthonormalize_, _orthonormalize_by_torch_])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_columns_that_depend_on_others_become_zeros(make: object, size: float) -> None:
    column = torch.randn(50).clamp(-1, 1)
    factor = torch.stack([torch.zeros(50), column, torch.ones(50), column, -column, torch.zeros(50)]) * size
    assert callable(make)
    others = [
        torch.ones(1, 50),
        torch.eye(6, 50),
    ]  # of which one has the shape, and all are orthonormal but for a length
    make([others[0], factor, others[1]])
    assert torch.allclose(others[0], torch.full((1, 50), 50**-0.5))
    assert torch.allclose(others[1], torch.eye(6, 50))
    lengths = factor.norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([0.0, 1, 1, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rank", "rows", "cols", "short"),
    [(1, 1, 1, 0), (3, 5, 7, 4), (4, 30, 1500, 0), (9, 4, 2049, 1100), (25, 20, 300, 7), (500, 13, 70, 69)],
)
def test_a_product_has_the_bits_of_plain_operations(rank: int, rows: int, cols: int, short: int, threads: int) -> None:
    left, right = torch.randn(rank, rows), torch.randn(rank, cols)
    expected = torch.zeros(rows, cols).numpy()
    for of_left, of_right in zip(left.numpy(), right.numpy(), strict=True):
        expected += of_left[:, None] * of_right
    entries = rows * cols - short
    out = torch.full((entries,), float("nan"))
    with mock.patch.object(cpu, "threads_for", lambda size: threads):
        assert product_(out, left, right) is out
    assert torch.equal(out, torch.from_numpy(expected).view(-1)[:entries])
    by_torch = _product_by_torch_(torch.empty(entries), left, right)
    assert torch.allclose(out, by_torch, atol=1e-4)


@pytest.mark.parametrize(("ranks", "most_bytes"), [(4, 300_000), (64, 300_000), (64, 1_070_000), (64, 2_000_000)])
def test_a_budget_is_used_whether_messages_travel_twice_or_not(ranks: int, most_bytes: int) -> None:
    """In a grid small ones do and large ones do not, so that fewer bytes of factors may send more."""
    shapes = [(1000, 1000)] * 20
    config = within_bytes(shapes, most_bytes, ranks, 4)
    assert config is not None and 0.97 * most_bytes < factor_bytes(shapes, config, ranks) <= most_bytes
    assert within_bytes(shapes, 1000, ranks, 4) is None
