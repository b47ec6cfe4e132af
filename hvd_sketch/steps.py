"""What the sketched and the dense exchange share: an equal set-up, agreement before each step, what they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.agreement import FiniteGuard, finite_flag, require_equal
from hvd_sketch.config import SketchConfig
from hvd_sketch.hashing import HASH_VERSION
from hvd_sketch.transport.base import Transport
from hvd_sketch.volume import CommLedger, MeteredTransport

Parameters = Sequence[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class SparseUpdate:
    """What a step agreed on, the same bits on every rank.

    Attributes:
        indices: int64 [n], ascending.
        values: float32 [n], the mean over ranks at ``indices``.
        skipped: a rank's gradient was not finite, or the sums overflowed: both tensors are empty.
    """

    indices: Tensor
    values: Tensor
    skipped: bool = False


class Exchange:
    """The base of :class:`~hvd_sketch.exchange.SketchedAllreduce` and :class:`~hvd_sketch.exchange.DenseAllreduce`.

    Communication: the constructor is collective; it compares config, dim, parameters, world size and hash version
    over the ranks.

    Args:
        config: equal on all ranks.
        dim: length of the gradient.
        transport: this rank's end of the network.
        device: where gradients and all that is kept lie.
        parameters: ``(name, shape, dtype)`` of what the gradient is made of, only compared.
        dense_bytes: size of the gradient in its own dtypes, for the ratio; default ``4 * dim``.
        ledger: to share one with another exchange; default a new one.

    Raises:
        ValueError: on every rank: they were set up differently.
    """

    def __init__(
        self,
        config: SketchConfig | None,
        dim: int,
        transport: Transport,
        device: torch.device | str,
        parameters: Parameters,
        dense_bytes: int | None,
        ledger: CommLedger | None,
    ) -> None:
        _require_equal_setup(transport, config, dim, parameters)
        self.dim = dim
        self.ledger = ledger if ledger is not None else CommLedger()
        self._step = 0
        self._guard = FiniteGuard()
        self._device = torch.device(device)
        self._dense_bytes = dense_bytes if dense_bytes is not None else 4 * dim
        self._transport = transport
        self._comm = MeteredTransport(transport, self.ledger, config is not None and config.deterministic)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite."""
        return self._guard.skipped_steps

    def begin_step(self, parts: Sequence[Tensor], finite: bool | Tensor = True) -> bool:
        """Agree whether every rank's gradient is finite; False: all skip, u and v are as before.

        Args:
            parts: consecutive parts of this rank's gradient, float32, ``dim`` elements in all.
            finite: False, or bool [], if this rank found anything else not finite that belongs to the step.

        Communication: collective.
        """
        self._check_gradient(parts)
        self.ledger.begin_step()
        self._step += 1
        return self._guard.passes(self._comm, self._step - 1, bool(finite_flag(parts) & finite))

    def _check_gradient(self, parts: Sequence[Tensor]) -> None:
        is_vector = all(part.dtype == torch.float32 and part.ndim == 1 for part in parts)
        if not is_vector or sum(map(len, parts)) != self.dim:
            arrived = ", ".join(f"{part.dtype} of {tuple(part.shape)}" for part in parts[:5])
            raise ValueError(
                f"the gradient must be float32 of shape ({self.dim},), or such parts in order, got {arrived}"
            )

    def _nothing(self) -> SparseUpdate:
        indices = torch.empty(0, dtype=torch.int64, device=self._device)
        return SparseUpdate(indices, torch.empty(0, dtype=torch.float32, device=self._device), skipped=True)

    def _counters(self, rank: int | None) -> dict[str, Any]:
        """What every state holds; ``rank`` is None where any rank may load it."""
        of = {"dim": self.dim, "rank": rank, "size": self._comm.size}
        return {**of, "step": self._step, "skipped_steps": self.skipped_steps}

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another dim, or one rank's own on another rank or at another world size."""
        if state["dim"] != self.dim:
            raise ValueError(f"the saved state is of dim {state['dim']}, this exchange of dim {self.dim}")
        rank, size = self._comm.rank, self._comm.size
        if state["rank"] is not None and (state["rank"], state["size"]) != (rank, size):
            raise ValueError(
                f"the saved state is of rank {state['rank']} of {state['size']}, this is rank {rank} of {size}: load "
                "each rank's own, or save with state_dict(consolidated=True) to change the world size"
            )
        self._step = state["step"]
        self._guard.skipped_steps = state["skipped_steps"]


def _require_equal_setup(transport: Transport, config: SketchConfig | None, dim: int, parameters: Parameters) -> None:
    fields: dict[str, object] = {"hash version": HASH_VERSION, "world size": transport.size, "dim": dim}
    settings = asdict(config) if config is not None else {"cols": "none: dense"}
    fields |= {f"config.{name}": value for name, value in settings.items()}
    fields |= {f"parameter {i}": " ".join(map(str, parameter)) for i, parameter in enumerate(parameters)}
    require_equal(transport, fields)
