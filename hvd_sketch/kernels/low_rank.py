"""What all ranks must compute alike from the summed factors of a matrix: an orthonormal basis, and a product.

On CPUs every bit is equal whatever the CPU. On GPUs torch computes both: all ranks' GPUs must then be of one model.

A factor of rank r is float32 [r, length], contiguous: its columns one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.kernels import _cpu_low_rank as loops
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.threads import run_on_threads

# Of a column's length that is left beside the columns before it: with less, products of float64 lose too many digits.
SAFE_REST = 2.0**-18
_lock = threading.Lock()
_inside = 0  # threads inside of full_precision
_precision = ExitStack()  # gives back what torch was told before the first came in


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, torch's products of float32 matrices are float32's, whatever it was told.

    TF32 or bfloat16 (``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``, ``torch.autocast``)
    would round what is subtracted from a residual, and a part of it would be lost. Communication: none.
    """
    global _inside
    with _lock:
        if not _inside:
            _precision.enter_context(_highest_precision())
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _precision.close()


@contextmanager
def _highest_precision() -> Iterator[None]:
    backends: list[Any] = [getattr(each, "matmul", None) for each in (torch.backends.cuda, torch.backends.mkldnn)]
    each_told = [(each, each.fp32_precision) for each in backends if hasattr(each, "fp32_precision")]  # since torch 2.9
    all_told: str | None = None
    try:
        all_told = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # backends were told one by one: torch then refuses to be asked about all
        for each, _ in each_told:
            each.fp32_precision = "ieee"
    try:
        yield
    finally:
        if all_told is not None:
            torch.set_float32_matmul_precision(all_told)
        for each, told in each_told:
            each.fp32_precision = "none"  # that of all, which may be what was told
            if each.fp32_precision != told:
                each.fp32_precision = told


def orthonormalize_(factors: Sequence[Tensor]) -> None:
    """Make the columns of each factor orthonormal, in place and in order. Communication: none.

    A zero column, and one that depends on those before it, becomes zeros. All must be finite, and on one device.
    """
    if factors and factors[0].device.type != "cpu":
        _orthonormalize_by_torch_(factors)
        return
    for factor in factors:
        loops.orthonormalize(factor.numpy())


def _orthonormalize_by_torch_(factors: Sequence[Tensor]) -> None:
    """By the Cholesky factor of the columns' products, twice, for all factors of one rank together: few launches.

    Where that factor does not exist, or a column nearly depends on others, column by column. One wait for the device.
    """
    by_rank: dict[int, dict[torch.Size, list[Tensor]]] = {}
    for factor in factors:
        by_rank.setdefault(len(factor), {}).setdefault(factor.shape, []).append(factor)
    if not by_rank:
        return
    bases: list[Tensor] = []
    are_good: list[Tensor] = []
    for by_shape in by_rank.values():
        of_shapes, is_good = _cholesky_bases([torch.stack(alike).double() for alike in by_shape.values()])
        bases += chain.from_iterable(of_shapes)
        are_good.append(is_good)
    in_order = chain.from_iterable(alike for by_shape in by_rank.values() for alike in by_shape.values())
    for factor, basis, is_usable in zip(in_order, bases, torch.cat(are_good).tolist(), strict=True):
        if is_usable:
            factor.copy_(basis)
        else:
            _orthonormalize_columns_(factor)


@cache
def load_linear_algebra(device: torch.device) -> None:
    """Torch loads its linear algebra for a GPU at the first use, which must not be by several threads at once."""
    with _lock:
        torch.linalg.cholesky_ex(torch.ones(1, 1, dtype=torch.float64, device=device))


def _cholesky_bases(columns: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Of float64 [n, rank, length], of any n and length; and whether each of all is to be used: bool [sum of n]."""
    products = torch.cat([each @ each.mT for each in columns])
    lower, info = torch.linalg.cholesky_ex(products)
    rests, norms = lower.diagonal(dim1=1, dim2=2), products.diagonal(dim1=1, dim2=2).sqrt()
    is_good = (info == 0) & (rests > SAFE_REST * norms).all(dim=1)
    nearly = _without(lower, columns)
    lower, _ = torch.linalg.cholesky_ex(torch.cat([each @ each.mT for each in nearly]))
    return _without(lower, nearly), is_good & torch.isfinite(lower).all(dim=2).all(dim=1)


def _without(lower: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """Columns times the inverses of their Cholesky factors, float64 [sum of n, rank, rank]."""
    one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    inverses = torch.linalg.solve_triangular(lower, one, upper=False).split([len(each) for each in columns])
    return [inverse @ each for inverse, each in zip(inverses, columns, strict=True)]


def _orthonormalize_columns_(factor: Tensor) -> None:
    columns = factor.double()
    for number, column in enumerate(columns):
        before = column.norm()
        for _ in range(2):
            column -= columns[:number].T @ (columns[:number] @ column)
        rest = column.norm()
        is_new = rest > loops.LEAST_REST * before
        column.copy_(torch.where(is_new, column / torch.where(is_new, rest, 1.0), 0.0))
    factor.copy_(columns)


def product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``out <- left^T right``; returns ``out``. Communication: none.

    Args:
        out: float32 [entries]: rows of ``cols`` entries, the last of which may be shorter.
        left: float32 [r, rows].
        right: float32 [r, cols].
    """
    if out.device.type == "cpu":
        run_on_threads(cpu.threads_for(out.numel()), loops.product, out.numpy(), left.numpy(), right.numpy())
        return out
    return _product_by_torch_(out, left, right)


def _product_by_torch_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    cols = right.shape[1]
    whole = out.numel() // cols
    torch.mm(left[:, :whole].t(), right, out=out[: whole * cols].view(whole, cols))
    if whole < left.shape[1]:
        out[whole * cols :] = left[:, whole] @ right[:, : out.numel() - whole * cols]
    return out


def warm_up() -> None:
    """Compile both for CPUs where Numba's cache does not hold them, so that no step does. Communication: none."""
    loops.orthonormalize(np.ones((1, 1), dtype=np.float32))
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    product_(torch.empty(1, dtype=torch.float32, device="cpu"), one, one)
