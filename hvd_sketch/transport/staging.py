"""Copies of device tensors in host memory, for transports that reach nothing else.

CUDA copies go through pinned memory. Torch reuses freed pinned blocks once the copies that use them have ended: from
the second step on no more memory is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, complete on return. Waits once for the current stream of the tensor's device."""
    return empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def to_host_together(*tensors: Tensor) -> list[Tensor]:
    """As :func:`to_host` of each, with one wait for all; they are on one device."""
    hosted = [
        empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor, non_blocking=True) for tensor in tensors
    ]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return hosted


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that ``device`` copies from and to at full speed."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda", device="cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in its current stream without waiting; a tensor on the device itself."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = empty_on_host(tensor.shape, tensor.dtype, device).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def one_behind(device: torch.device, launched: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors on ``device``, each once the work on the next one has been launched; on the CPU each at once.

    The caller receives a tensor in a second stream, in which only that tensor is waited for. So it is copied to the
    host and sent while the device computes the next tensor. At the end the current stream waits for the second one.
    """
    if device.type != "cuda":
        yield from launched
        return
    beside = _stream_beside(device)
    waiting: list[tuple[Tensor, torch.cuda.Event]] = []
    for tensor in launched:
        waiting.append((tensor, torch.cuda.current_stream(device).record_event()))
        if len(waiting) > 1:
            yield from _beside(beside, *waiting.pop(0))
    for tensor, ready in waiting:
        yield from _beside(beside, tensor, ready)
    torch.cuda.current_stream(device).wait_stream(beside)


@cache  # torch keeps memory for the stream that took it
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside(stream: torch.cuda.Stream, tensor: Tensor, ready: torch.cuda.Event) -> Iterator[Tensor]:
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield tensor
