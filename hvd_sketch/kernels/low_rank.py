"""What all ranks must compute alike from the summed factors of a matrix: an orthonormal basis, and a product.

On CPUs every bit is equal whatever the CPU. On GPUs torch computes both: all ranks' GPUs must then be of one model.

A factor of rank r is float32 [r, length], contiguous: its columns one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.kernels import _cpu_low_rank as loops
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.threads import run_on_threads

_lock = threading.Lock()
_inside = 0  # threads inside of full_precision
_users_precision = "highest"  # what torch was told before the first came in


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, torch's products of float32 matrices are float32's, whatever it was told.

    TF32 or bfloat16 (``torch.set_float32_matmul_precision``, ``torch.autocast``) would round what is subtracted from a
    residual, and a part of it would be lost. Communication: none.
    """
    global _inside, _users_precision
    with _lock:
        if not _inside:
            _users_precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_float32_matmul_precision(_users_precision)


def orthonormalize_(factor: Tensor) -> Tensor:
    """Make the columns orthonormal, in place and in order; returns ``factor``. Communication: none.

    A zero column, and one that depends on those before it, becomes zeros. All must be finite.
    """
    if factor.device.type == "cpu":
        loops.orthonormalize(factor.numpy())
        return factor
    return _orthonormalize_by_torch_(factor)


def _orthonormalize_by_torch_(factor: Tensor) -> Tensor:
    columns = factor.double()
    for number, column in enumerate(columns):
        before = column.norm()
        for _ in range(2):
            column -= columns[:number].T @ (columns[:number] @ column)
        rest = column.norm()
        is_new = rest > loops.LEAST_REST * before
        column.copy_(torch.where(is_new, column / torch.where(is_new, rest, 1.0), 0.0))
    return factor.copy_(columns)


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
    product_(torch.empty(1), torch.ones(1, 1), torch.ones(1, 1))
