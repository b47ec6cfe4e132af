"""The CPU kernels in C (c_kernels.c), compiled where there is a compiler: a yardstick for those in Numba."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash

SOURCE = Path(__file__).with_name("c_kernels.c")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
MAX_ROWS = 64
ROWS_OF_ESTIMATES = (1, 3, 5)


@cache
def load_library() -> ctypes.CDLL | None:
    """c_kernels.c, compiled for this processor; None where there is no ``cc`` (or CC) with OpenMP."""
    with tempfile.TemporaryDirectory() as folder:  # once loaded the library needs no file
        target = Path(folder) / "c_kernels.so"
        try:
            subprocess.run(
                [os.environ.get("CC", "cc"), *OPTIONS, "-o", target, SOURCE], capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(target))


class _Hash(ctypes.Structure):
    """``hash_t`` of c_kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("signs", "offsets")),
        *((name, ctypes.c_int64) for name in ("dim", "rows", "cols", "block")),
    )


class CPeer:
    """Sketch and estimates in C, of one shard, on as many threads as torch has.

    Raises:
        ValueError: ``hash`` has several shards or more than MAX_ROWS rows.
    """

    def __init__(self, library: ctypes.CDLL, hash: BlockHash) -> None:
        if hash.shards != 1 or hash.rows > MAX_ROWS:
            raise ValueError(f"expected one shard and at most {MAX_ROWS} rows, got {hash.shards} and {hash.rows}")
        self._library = library
        self._hash = hash  # whose coefficients C reads
        self._threads = torch.get_num_threads()
        self._scratch = torch.zeros((self._threads - 1, *hash.table_shape))
        coefficients = hash.sign_coefficients.ctypes.data, hash.offset_coefficients.ctypes.data
        self._numbers = ctypes.byref(_Hash(*coefficients, hash.dim, hash.rows, hash.cols, hash.block))

    def accumulate_(self, table: Tensor, values: Tensor) -> None:
        """``table += sketch(values)``."""
        self._sketch_(table, None, values, None, 0.0)

    def feedback_accumulate_(self, table: Tensor, u: Tensor, v: Tensor, gradient: Tensor, momentum: float) -> None:
        """``u <- m * u + g``, ``v <- v + u``, ``table += sketch(v)``."""
        self._sketch_(table, u, v, gradient, momentum)

    def _sketch_(self, table: Tensor, u: Tensor | None, v: Tensor, gradient: Tensor | None, momentum: float) -> None:
        tensors = (_pointer(tensor) for tensor in (table, self._scratch, u, v, gradient))
        self._library.sketch(self._numbers, *tensors, ctypes.c_float(momentum), self._threads)

    def estimate(self, table: Tensor) -> Tensor:
        """Estimates of all coordinates: float32 [dim].

        Raises:
            ValueError: the number of rows is not one of ROWS_OF_ESTIMATES.
        """
        if self._hash.rows not in ROWS_OF_ESTIMATES:
            raise ValueError(f"expected a number of rows of {ROWS_OF_ESTIMATES}, got {self._hash.rows}")
        out = torch.from_numpy(np.empty(self._hash.dim, dtype=np.float32))  # as ours: in huge pages
        self._library.estimate(self._numbers, _pointer(out), _pointer(table), self._threads)
        return out


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
