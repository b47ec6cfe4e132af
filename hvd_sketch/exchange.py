"""One step of Sketched-SGD as a parameter server without a server, and its dense peer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.agreement import FiniteGuard, all_finite, require_equal
from hvd_sketch.candidates import CandidateSource, SketchCandidates
from hvd_sketch.coding import decode_choices, encode_choice
from hvd_sketch.config import SketchConfig
from hvd_sketch.feedback import Feedback
from hvd_sketch.hashing import HASH_VERSION
from hvd_sketch.kernels import load_backend
from hvd_sketch.selection import HISTOGRAM_BYTES, VectorPart, select_largest
from hvd_sketch.transport.base import Transport, mean_over_ranks
from hvd_sketch.transport.local import local_transports
from hvd_sketch.volume import RING_PASSES, CommLedger, MeteredTransport

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


class SketchedAllreduce:
    """Sketched gradient exchange with error feedback (paper, Alg. 3; Alg. 2 with ``selection="heavymix"``,
    momentum 0 and gradients multiplied by the learning rate beforehand).

    Communication: the constructor and :meth:`step` are collective, all ranks in the same order. The constructor
    compares config, dim, parameters, world size and hash version over the ranks.

    Args:
        config: equal on all ranks.
        dim: length of the gradient.
        transport: this rank's end of the network.
        device: where gradients, u, v and the table lie.
        parameters: ``(name, shape, dtype)`` of what the gradient is made of, only compared.
        dense_bytes: size of the gradient in its own dtypes, for the ratio; default ``4 * dim``.
        ledger: to share one with another exchange; default a new one.

    Raises:
        ValueError: on every rank: they were set up differently; ``k > dim``; ``cols`` below the number of ranks.
    """

    def __init__(
        self,
        config: SketchConfig,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        *,
        parameters: Parameters = (),
        dense_bytes: int | None = None,
        ledger: CommLedger | None = None,
    ) -> None:
        _require_equal_setup(transport, config, dim, parameters)
        if config.k > dim:
            raise ValueError(f"k must be at most dim, got k={config.k} for dim={dim}: lower k, or exchange dense")
        if config.selection == "topk" and config.oversample * config.k > dim and transport.rank == 0:
            warnings.warn(
                f"oversample * k = {config.oversample * config.k} exceeds dim {dim}: every coordinate is a "
                "candidate in every step, and the sketch is sent for nothing",
                stacklevel=2,
            )
        self.config = config
        self.dim = dim
        self.ledger = ledger if ledger is not None else CommLedger()
        self._step = 0
        self._guard = FiniteGuard()
        self._device = torch.device(device)
        self._dense_bytes = dense_bytes if dense_bytes is not None else 4 * dim
        self._transport = transport
        self._comm = MeteredTransport(transport, self.ledger, config.deterministic)
        self._feedback = Feedback(dim, config.momentum, device)
        self._kernels = load_backend(None, self._device)
        self._candidates: CandidateSource = SketchCandidates(config, dim, self._comm, device)

    @property
    def residual(self) -> Tensor:
        """v, float32 [dim]: what this rank produced and has not sent yet. The tensor itself, not a copy."""
        return self._feedback.v

    @property
    def velocity(self) -> Tensor:
        """u, float32 [dim]: this rank's momentum."""
        return self._feedback.u

    def step(self, gradient: Tensor | Sequence[Tensor], finite: bool = True) -> SparseUpdate:
        """Exchange one gradient: :meth:`begin_step`, then :meth:`exchange`.

        Args:
            gradient: float32 [dim], this rank's, or consecutive parts of it; not modified. Sums are made from the last
                part to the first, the order in which backward passes finish them.
            finite: False if this rank found anything else not finite that belongs to the step.

        Returns:
            The k coordinates with the largest exact sums among the candidates, fewer where fewer are not zero.
        """
        parts = [gradient] if isinstance(gradient, Tensor) else gradient
        return self.exchange(parts) if self.begin_step(parts, finite) else _nothing(self._device)

    def begin_step(self, parts: Sequence[Tensor], finite: bool = True) -> bool:
        """Agree whether every rank's gradient is finite; False: all skip, u and v are as before.

        Communication: collective.
        """
        check_gradient(parts, self.dim)
        self.ledger.begin_step()
        self._step += 1
        passes = self._guard.passes(self._comm, self._step - 1, finite and all_finite(parts))
        if not passes:
            self.forget_ahead()
        return passes

    def exchange(self, parts: Sequence[Tensor], fits: Callable[[Tensor, Tensor], bool] | None = None) -> SparseUpdate:
        """The rest of a step that has begun, with the same gradient.

        Args:
            parts: as for :meth:`step`.
            fits: whether indices and values can be put to use, the same answer on every rank; if not, all skip, and u
                and v keep what they accumulated.

        Communication: collective.
        """
        # u <- m u + g, v <- v + u, and the top-Pk of the summed sketches of v
        gradient = _from_the_last([part.detach().contiguous() for part in parts])
        candidates = self._candidates.find(self._feedback, gradient, self._step - 1)
        own_sums = self._sum_exactly(candidates)  # second round: exact values
        positions, sums = self._keep_largest(own_sums, candidates.numel())
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, self.config.paper_floats(self.dim))
        update = SparseUpdate(candidates[positions], sums / self._comm.size)
        if not all_finite([sums]) or (fits is not None and not fits(update.indices, update.values)):
            self._guard.count_skip("the exact sums overflowed; u and v keep what they accumulated")
            return _nothing(self._device)
        self._feedback.clear_(update.indices)  # zero u and v where they were sent
        return update

    def sketch_ahead(self, part: Tensor, start: int) -> None:
        """Add coordinates ``start …`` of the coming step's gradient to its table now, from the last part to the first.

        u and v are not changed. :meth:`exchange` must then get the same parts. Communication: none.
        """
        self._candidates.sketch_ahead(self._feedback, part, start, self._step)

    def forget_ahead(self) -> None:
        """Undo every :meth:`sketch_ahead` since the last step. Communication: none."""
        self._candidates.forget_ahead()

    def _sum_exactly(self, candidates: Tensor) -> Tensor:
        """Sums of v over ranks at this rank's part of the candidates: float32 [ceil(n / size)], zeros at the end."""
        size = self._comm.size
        part = -(-candidates.numel() // size)
        own = torch.zeros(size * part, dtype=torch.float32, device=self._device)
        own[: candidates.numel()] = self._feedback.v[candidates]
        with self._comm.phase("exact"):
            return self._comm.reduce_scatter(own.view(size, part))

    def _keep_largest(self, own_sums: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
        """Positions among the candidates, ascending, and sums of the k largest, equal on all ranks.

        Sums that are zero are not kept. Either every sum travels and all ranks pick for themselves, or owners
        pick together and send one bit per candidate and the k sums: whichever is fewer bytes.
        """
        k = self.config.k
        if 4 * candidates <= candidates / 8 + 4 * k + RING_PASSES["allreduce"] * HISTOGRAM_BYTES:
            with self._comm.phase("values"):
                sums = self._comm.allgather(own_sums)
            positions = select_largest(VectorPart(self._kernels, sums), k, local_transports(1)[0]).positions
            return positions, sums[positions]
        with self._comm.phase("choose"):
            own_positions = select_largest(VectorPart(self._kernels, own_sums), k, self._comm).positions
        with self._comm.phase("values"):
            gathered = self._comm.allgather(encode_choice(own_positions, own_sums))
        return decode_choices(gathered, self._comm.size, own_sums.numel())

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite."""
        return self._guard.skipped_steps

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """What is needed to go on: step number, u and v.

        Args:
            consolidated: False: this rank's own, to be loaded by the same rank of a job of the same size; going
                on from it is bitwise. True: the mean of u and v over ranks, equal everywhere, to be loaded by
                every rank of a job of any size; the averaged update that is still to come stays the same.

        Communication: none, or collective with ``consolidated`` (not counted in the ledger).
        """
        saved = self._feedback.state_dict()
        if consolidated:
            saved = {name: mean_over_ranks(self._transport, kept) for name, kept in saved.items()}
        rank = None if consolidated else self._comm.rank
        about = {"dim": self.dim, "rank": rank, "size": self._comm.size, "step": self._step}
        return {**about, "skipped_steps": self.skipped_steps, "config": asdict(self.config), **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; every rank must load the same kind. Communication: none.

        Raises:
            ValueError: it is of another dim, or it is one rank's own and this is another rank or world size.
        """
        check_state(state, self.dim, self._comm)
        self.forget_ahead()
        self._feedback.load_state_dict(state)
        self._step = state["step"]
        self._guard.skipped_steps = state["skipped_steps"]


class DenseAllreduce:
    """The mean of the whole gradient by reduce_scatter and allgather: what a sketch competes with.

    The interface is that of :class:`SketchedAllreduce`; every coordinate is sent in every step. Unlike an MPI
    allreduce it gives equal bits on all ranks. With a config that has momentum, ``u <- m * u + mean``.

    Communication, arguments, errors: as for SketchedAllreduce; ``config`` may be None (momentum 0).
    """

    def __init__(
        self,
        config: SketchConfig | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        *,
        parameters: Parameters = (),
        dense_bytes: int | None = None,
        ledger: CommLedger | None = None,
    ) -> None:
        _require_equal_setup(transport, config, dim, parameters)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}: there is nothing to exchange")
        self.config = config
        self.dim = dim
        self.ledger = ledger if ledger is not None else CommLedger()
        self._step = 0
        self._guard = FiniteGuard()
        self._device = torch.device(device)
        self._dense_bytes = dense_bytes if dense_bytes is not None else 4 * dim
        self._comm = MeteredTransport(transport, self.ledger, config is not None and config.deterministic)
        self._momentum = config.momentum if config is not None else 0.0
        self._u = torch.zeros(dim if self._momentum else 0, dtype=torch.float32, device=device)

    @property
    def residual(self) -> Tensor:
        """Zeros: nothing stays behind."""
        return torch.zeros(self.dim, dtype=torch.float32, device=self._device)

    @property
    def velocity(self) -> Tensor:
        """u, float32 [dim], equal on all ranks."""
        return self._u if self._momentum else self.residual

    @property
    def skipped_steps(self) -> int:
        return self._guard.skipped_steps

    def step(self, gradient: Tensor, finite: bool = True) -> SparseUpdate:
        """Exchange one gradient; see :meth:`SketchedAllreduce.step`. ``indices`` are all of ``0 … dim - 1``."""
        mean = self.mean(gradient) if self.begin_step(gradient, finite) else None
        if mean is None:
            return _nothing(self._device)
        return SparseUpdate(torch.arange(self.dim, device=self._device), mean)

    def begin_step(self, gradient: Tensor, finite: bool = True) -> bool:
        """Agree whether every rank's gradient is finite; False: skip. Communication: collective."""
        check_gradient([gradient], self.dim)
        self.ledger.begin_step()
        self._step += 1
        return self._guard.passes(self._comm, self._step - 1, finite and all_finite([gradient]))

    def mean(self, gradient: Tensor, fits: Callable[[Tensor], bool] | None = None) -> Tensor | None:
        """The mean over ranks with momentum, float32 [dim], in a step that has begun.

        None where it is not finite, or not what ``fits`` says can be put to use: all skip, u is as before.

        Communication: collective.
        """
        with self._comm.phase("dense"):
            mean = mean_over_ranks(self._comm, gradient.detach().contiguous())
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.dim)
        if self._momentum:
            mean += self._u * self._momentum
        if not all_finite([mean]) or (fits is not None and not fits(mean)):
            self._guard.count_skip("the dense sums overflowed; u and v are as before")
            return None
        if self._momentum:
            self._u.copy_(mean)
        return mean

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """As :meth:`SketchedAllreduce.state_dict`; u is equal on all ranks, so both kinds load at any world size."""
        about = {"dim": self.dim, "rank": None, "size": self._comm.size, "step": self._step}
        return {**about, "skipped_steps": self.skipped_steps, "u": self._u.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self.dim, self._comm)
        saved = state["u"]
        if self._momentum:  # starts at zero where it was saved without
            self._u.copy_(saved) if saved.numel() else self._u.zero_()
        self._step = state["step"]
        self._guard.skipped_steps = state["skipped_steps"]


def check_gradient(parts: Sequence[Tensor], dim: int) -> None:
    """Refuse anything but float32 vectors of ``dim`` elements in all."""
    if any(part.dtype != torch.float32 or part.ndim != 1 for part in parts) or sum(map(len, parts)) != dim:
        arrived = ", ".join(f"{part.dtype} of {tuple(part.shape)}" for part in parts[:5])
        raise ValueError(f"the gradient must be float32 of shape ({dim},), or such parts in order, got {arrived}")


def _from_the_last(parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    starts = accumulate((part.numel() for part in parts), initial=0)
    return list(zip(starts, parts, strict=False))[::-1]


def check_state(state: Mapping[str, Any], dim: int, comm: Transport) -> None:
    """Refuse a state of another dim, or one rank's own on another rank or at another world size."""
    if state["dim"] != dim:
        raise ValueError(f"the saved state is of dim {state['dim']}, this exchange of dim {dim}")
    if state["rank"] is not None and (state["rank"], state["size"]) != (comm.rank, comm.size):
        raise ValueError(
            f"the saved state is of rank {state['rank']} of {state['size']}, this is rank {comm.rank} of "
            f"{comm.size}: load each rank's own, or save with state_dict(consolidated=True) to change the world size"
        )


def _nothing(device: torch.device) -> SparseUpdate:
    indices = torch.empty(0, dtype=torch.int64, device=device)
    return SparseUpdate(indices, torch.empty(0, dtype=torch.float32, device=device), skipped=True)


def _require_equal_setup(transport: Transport, config: SketchConfig | None, dim: int, parameters: Parameters) -> None:
    fields: dict[str, object] = {"hash version": HASH_VERSION, "world size": transport.size, "dim": dim}
    settings = asdict(config) if config is not None else {"cols": "none: dense"}
    fields |= {f"config.{name}": value for name, value in settings.items()}
    fields |= {f"parameter {i}": " ".join(map(str, parameter)) for i, parameter in enumerate(parameters)}
    require_equal(transport, fields)
