"""Host memory for device tensors, where a transport reaches nothing else. Its copies have not run on a GPU yet.

CUDA copies go through pinned memory. Torch keeps pinned blocks when they are freed and hands them out again, not
before the copies that use them have ended: from the second step on nothing is pinned anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, complete on return. Waits for the current stream of the tensor's device, once."""
    return empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory from or to which ``device`` copies at full speed."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
