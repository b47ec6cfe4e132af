"""One step of Sketched-SGD as a parameter server without a server, and its dense peer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.agreement import all_finite
from hvd_sketch.candidates import CandidateSource, SketchCandidates
from hvd_sketch.coding import host, load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.feedback import Feedback
from hvd_sketch.kernels import load_backend
from hvd_sketch.selection import Expectation, VectorPart, find_cut, histogram_bins, select_largest
from hvd_sketch.steps import Exchange, Parameters, SparseUpdate
from hvd_sketch.transport.base import Transport, mean_over_ranks
from hvd_sketch.transport.local import local_transports
from hvd_sketch.transport.staging import to_device
from hvd_sketch.volume import RING_PASSES, CommLedger

ROUND_BYTES = 8192  # what a round of a collective costs, told in bytes: 65 microseconds at 1 Gbit/s


def all_sums_travel(candidates: int, k: int) -> bool:
    """Whether sending every candidate's sum takes less time than to choose the k largest together first."""
    choosing_bytes = candidates / 8 + 4 * k + 4 * RING_PASSES["allreduce"] * histogram_bins(k)
    return 4 * candidates <= choosing_bytes + ROUND_BYTES


class SketchedAllreduce(Exchange):
    """Sketched gradient exchange with error feedback (paper, Alg. 3; Alg. 2 with ``selection="heavymix"``,
    momentum 0 and gradients multiplied by the learning rate beforehand).

    Communication: the constructor and :meth:`step` are collective, all ranks in the same order.

    Args: see :class:`~hvd_sketch.steps.Exchange`.

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
        super().__init__(config, dim, transport, device, parameters, dense_bytes, ledger)
        if config.k > dim:
            raise ValueError(f"k must be at most dim, got k={config.k} for dim={dim}: lower k, or exchange dense")
        if config.selection == "topk" and config.oversample * config.k > dim and transport.rank == 0:
            warnings.warn(
                f"oversample * k = {config.oversample * config.k} exceeds dim {dim}: every coordinate is a "
                "candidate in every step, and the sketch is sent for nothing",
                stacklevel=2,
            )
        self.config = config
        self._feedback = Feedback(dim, config.momentum, device)
        self._kernels = load_backend(None, self._device)
        self._coding = load_coding(self._kernels)
        self._expected = Expectation()  # of the exact sums kept
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
        return self.exchange(parts) if self.begin_step(parts, finite) else self._nothing()

    def begin_step(self, parts: Sequence[Tensor], finite: bool | Tensor = True) -> bool:
        """See :meth:`Exchange.begin_step`."""
        passes = super().begin_step(parts, finite)
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
        finite = all_finite([sums])
        indices = candidates.index_select(0, to_device(positions, self._device))
        update = SparseUpdate(indices, to_device(sums, self._device) / self._comm.size)
        if not finite or (fits is not None and not fits(update.indices, update.values)):
            self._guard.count_skip("the exact sums overflowed; u and v keep what they accumulated")
            return self._nothing()
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
        count = candidates.numel()
        part = -(-count // size)
        own = torch.empty(size * part, dtype=torch.float32, device=self._device)
        self._kernels.gather(self._feedback.v, candidates, out=own[:count])
        own[count:] = 0
        with self._comm.phase("exact"):
            return self._comm.start_reduce_scatter(own.view(size, part)).wait()  # which may use its memory

    def _keep_largest(self, own_sums: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
        """Positions among the candidates, ascending, and sums, on the CPU, of the k largest; equal on all ranks.

        Sums that are zero are not kept. Either every sum travels and all ranks pick for themselves, or owners
        pick together and send one bit per candidate and the k sums: whichever takes less time.
        """
        k = self.config.k
        if all_sums_travel(candidates, k):
            with self._comm.phase("values", self._device):
                sums = self._comm.allgather(own_sums.cpu())  # so few that the host picks
            positions = select_largest(VectorPart(load_backend(None, sums.device), sums), k, local_transports(1)[0])
            return positions, sums.index_select(0, positions)
        return self._choose_together(own_sums)

    def _choose_together(self, own_sums: Tensor) -> tuple[Tensor, Tensor]:
        part = VectorPart(self._kernels, own_sums)
        with self._comm.phase("choose", self._device):
            cut = find_cut(part, self.config.k, self._comm, self._expected.floor())
        self._expected.learn(cut)
        own_positions, _ = part.above(cut)
        with self._comm.phase("values", self._device):
            gathered = self._comm.allgather(self._coding.encode_choice(own_positions, own_sums))
        positions, sums = self._coding.decode_choices(gathered, self._comm.size, own_sums.numel(), self._device)
        unwanted = cut.unwanted(sums)
        return self._coding.without(positions, unwanted), host.without(sums, unwanted)

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """What is needed to go on: step number, u and v, and the last thresholds, which save messages.

        Args:
            consolidated: False: this rank's own, to be loaded by the same rank of a job of the same size; going
                on from it is bitwise. True: the mean of u and v over ranks, equal everywhere, to be loaded by
                every rank of a job of any size; the averaged update that is still to come stays the same.

        Communication: none, or collective with ``consolidated`` (not counted in the ledger).
        """
        saved: dict[str, Any] = self._feedback.state_dict()
        if consolidated:  # without the thresholds: sums over more ranks are larger
            saved = {name: mean_over_ranks(self._transport, kept) for name, kept in saved.items()}
        else:
            saved["thresholds"] = self._candidates.expected.thresholds, self._expected.thresholds
        counters = self._counters(None if consolidated else self._comm.rank)
        return {**counters, "config": asdict(self.config), **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; every rank must load the same kind. Communication: none.

        Raises:
            ValueError: it is of another dim, or it is one rank's own and this is another rank or world size.
        """
        self._load_counters(state)
        self.forget_ahead()
        self._feedback.load_state_dict(state)
        thresholds = state.get("thresholds", ((0, 0), (0, 0)))
        self._candidates.expected.thresholds, self._expected.thresholds = map(tuple, thresholds)


class DenseAllreduce(Exchange):
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
        super().__init__(config, dim, transport, device, parameters, dense_bytes, ledger)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}: there is nothing to exchange")
        self.config = config
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

    def step(self, gradient: Tensor, finite: bool = True) -> SparseUpdate:
        """Exchange one gradient; see :meth:`SketchedAllreduce.step`. ``indices`` are all of ``0 … dim - 1``."""
        mean = self.mean(gradient) if self.begin_step([gradient], finite) else None
        if mean is None:
            return self._nothing()
        return SparseUpdate(torch.arange(self.dim, device=self._device), mean)

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
        return {**self._counters(None), "u": self._u.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_counters(state)
        saved = state["u"]
        if self._momentum:  # starts at zero where it was saved without
            self._u.copy_(saved) if saved.numel() else self._u.zero_()


def _from_the_last(parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    starts = accumulate((part.numel() for part in parts), initial=0)
    return list(zip(starts, parts, strict=False))[::-1]
