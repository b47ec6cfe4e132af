"""What may look on while steps are taken: by default nothing does, and torch's profiler where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from hvd_sketch.shards import is_sharded

RANGE = "hvd_sketch {}".format  # what torch's profiler calls a span
NOTHING: AbstractContextManager[Any] = nullcontext()


class Kind(Enum):
    """What a span of time was spent on."""

    EXCHANGE = "exchange"  # from this rank's gradient to the average
    LOCAL = "local"  # inside of an exchange: this rank's own work
    PHASE = "phase"  # of the exchange: collectives, and the work between them
    COLLECTIVE = "collective"  # the network, and waiting for other ranks


def check_loggable(name: str, value: object, rank: int) -> None:
    """Raises TypeError unless ``value`` is one number: what float() takes, text apart, or a tensor of one element.

    A DTensor is refused: to read it might be a collective, or give this rank's part only.
    """
    if is_sharded(value):
        raise TypeError(f"rank {rank} cannot log {name!r}, a DTensor: log {name}.full_tensor(), on every rank")
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex() and not value.is_meta:
            return
        got = f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}: log its mean or norm"
    else:
        try:
            if not isinstance(value, str | bytes):
                float(value)  # type: ignore[arg-type]
                return
        except (TypeError, ValueError, OverflowError):
            pass
        got = f"{type(value).__name__}"
    raise TypeError(f"rank {rank} cannot log {name!r}: expected a number or a tensor of one element, got {got}")


class Observer:
    """Looks on while one rank takes its steps. This one does nothing: a span takes 0.5 us.

    Where torch's profiler runs, spans are ranges in its trace. Communication: none.
    """

    def span(self, kind: Kind, name: str) -> AbstractContextManager[Any]:
        """Spend the time of the block on something; spans are nested."""
        # Always asking for a range takes up to 10 us.
        return record_function(RANGE(name)) if torch.autograd._profiler_enabled() else NOTHING

    def begin_step(self) -> None:
        """A step has begun, or goes on. Without a call the first one begins with its exchange."""

    def start_over(self) -> None:
        """The ledger goes on from a saved state: what it counted since the last step is no part of the next one."""

    def accumulated(self) -> None:
        """The residual holds the gradient of a step, and nothing of it was sent."""

    def end_step(self, step: int, is_averaged: bool) -> None:
        """An exchange has ended, of the step of this number; all ranks averaged, or all skipped."""

    def log_values(self, values: Mapping[str, Any]) -> None:
        """Numbers that belong to the step that comes next; each is loggable, see :func:`check_loggable`."""

    def close(self) -> None:
        """Write what is to be written."""
