"""The dense allreduce of the library underneath, in full and in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.methods.base import WholeGradient


class LibraryAllreduce(WholeGradient):
    """The allreduce of MPI, Gloo or Horovod itself, in place."""

    def _mean_(self, gradient: Tensor) -> Tensor:
        return self._comm.allreduce_(gradient).div_(self._comm.size)


class HalfPrecision(WholeGradient):
    """Horovod's ``Compression.fp16``: summed in half precision. MPI knows no such numbers."""

    wire_dtype = torch.float16

    def _mean_(self, gradient: Tensor) -> Tensor:
        return gradient.copy_(self._comm.allreduce_(gradient.to(self.wire_dtype))).div_(self._comm.size)


class BrainFloat(HalfPrecision):
    """The same in bfloat16, whose range is that of float32."""

    wire_dtype = torch.bfloat16
