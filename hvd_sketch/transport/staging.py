"""Host memory for device tensors, where a transport reaches nothing else. Its copies have not run on a GPU yet.

CUDA copies go through pinned memory. Torch keeps pinned blocks when they are freed and hands them out again, not
before the copies that use them have ended: from the second step on nothing is pinned anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, complete on return. Waits for the current stream of the tensor's device, once."""
    return empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory from or to which ``device`` copies at full speed."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, in the order of its current stream, which is not waited for; itself where it lies there."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = empty_on_host(tensor.shape, tensor.dtype, device).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def one_behind(device: torch.device, launched: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors on ``device``, each as soon as the work on the next has been launched, too.

    Whoever takes one is in a stream of its own, in which there is nothing to wait for but that tensor: while it is
    copied to the host and sent, the device computes the next. What is started there is finished by the current stream,
    which waits for it at the end. On the CPU each comes at once: its work is done.
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


@cache  # memory is kept for the stream it was taken in
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside(stream: torch.cuda.Stream, tensor: Tensor, ready: torch.cuda.Event) -> Iterator[Tensor]:
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield tensor
