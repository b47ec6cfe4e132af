"""A gradient in a file, for ``hvd-sketch plan --gradient``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.files import replaced
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.shards import local


def save_gradient(parameters: Iterable[Tensor | NamedParameter], path: str | Path) -> None:
    """Save the gradient of the tensors that are compressed: ``hvd-sketch plan --gradient`` finds settings for it.

    Call it on one rank between ``backward()`` and ``step()``, some steps after the beginning::

        hvd_sketch.save_gradient(model.parameters(), "gradient.pt")

    The file holds one float32 vector [dim], ``dim`` as in :func:`hvd_sketch.sketched_dim`. A tensor without a gradient
    counts as zeros; of sharded parameters this rank's shards are saved.

    Args:
        parameters: ``model.parameters()`` or ``model.named_parameters()``.
        path: the file; it is replaced whole.

    Raises:
        ValueError: no tensor is large enough to be compressed, or none has a gradient.
        OSError: the file could not be written.

    Communication: none.
    """
    tensors = (entry[1] if isinstance(entry, tuple) else entry for entry in parameters)
    own = [p for p in tensors if p.requires_grad and not is_dense(p, SketchConfig.dense_below)]
    if all(p.grad is None for p in own):
        raise ValueError(
            f"{path}: expected a gradient in at least one of the {len(own)} tensors that are large enough to be "
            "compressed, got none: call save_gradient after backward() and before zero_grad()"
        )
    pieces = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in own]
    flat = torch.cat([piece.detach().to_dense().flatten().to("cpu", torch.float32) for piece in pieces])
    with replaced(path) as draft:
        torch.save(flat, draft)
