"""One model's gradients through the sketched and the dense exchange, in one fixed order on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from hvd_sketch.agreement import finite_flag
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce
from hvd_sketch.packing import FlatParameters, NamedParameter, is_dense
from hvd_sketch.transport.base import Transport
from hvd_sketch.volume import CommLedger


class GradientExchange:
    """The sketched and the dense exchange of one model's gradients, in one fixed order on all ranks.

    Attributes:
        sketched: None where nothing is sketched.
        dense: None where nothing goes dense; with sketched tensors beside, it averages in the same step.
        ledger: of both.

    Communication: the constructor, :meth:`average` and ``state_dict(consolidated=True)`` are collective.
    """

    def __init__(self, named: Sequence[NamedParameter], config: SketchConfig | None, transport: Transport) -> None:
        # Without a config everything goes dense.
        sketched = [(name, p) for name, p in named if config and not is_dense(p, config.dense_below)]
        dense = [(name, p) for name, p in named if not config or is_dense(p, config.dense_below)]
        self.ledger = CommLedger()
        self.sketched: SketchedAllreduce | None = None
        self.dense: DenseAllreduce | None = None
        self._weight_decay = config.weight_decay if config is not None else 0.0
        self._ahead: Ahead | None = None
        ways = (("sketched", sketched), ("dense", dense))
        self._layout = [[way, name, list(p.shape)] for way, pairs in ways for name, p in pairs]
        # Both compare all parameters: then the first already finds a rank that would not build the second.
        described = [(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in named]
        common: dict[str, Any] = {"parameters": described, "ledger": self.ledger}
        if sketched and config is not None:
            flat = self._flat = FlatParameters([p for _, p in sketched], apart=True)
            self.sketched = SketchedAllreduce(
                config, flat.dim, transport, flat.device, dense_bytes=flat.dense_bytes, **common
            )
            if config.sketch_in_backward:
                self._ahead = Ahead(flat, self.sketched, self._weight_decay)
        if dense:
            flat = self._dense_flat = FlatParameters([p for _, p in dense])
            self.dense = DenseAllreduce(
                config, flat.dim, transport, flat.device, dense_bytes=flat.dense_bytes, **common
            )

    @property
    def skipped_steps(self) -> int:
        """How many calls of :meth:`average` all ranks skipped."""
        return sum(part.skipped_steps for part in (self.sketched, self.dense) if part is not None)

    def gradient_is_ready(self, parameter: Tensor) -> None:
        """To be told when the last backward pass of a step has reached a parameter. Communication: none."""
        if self._ahead is not None:
            self._ahead.add(parameter)

    def gradients_are_void(self) -> None:
        """To be told when the gradients made so far will not be averaged. Communication: none."""
        if self._ahead is not None:
            self._ahead.settle(usable=False)

    def average(self, inverse_scale: Tensor | None = None, finite: bool = True) -> bool:
        """Average all gradients over the ranks into ``p.grad``; False if all ranks skip instead.

        Args:
            inverse_scale: see :meth:`FlatParameters.pack_part`; may differ between ranks.
            finite: this rank's verdict on anything else; False on one rank makes all skip.
        """
        if self.sketched is None:
            return self._average_dense(inverse_scale, finite)
        if self._ahead is not None:
            self._ahead.settle(usable=inverse_scale is None)
        gradient = self._flat.pack(self._weight_decay, inverse_scale)
        beside = self._dense_flat.pack(self._weight_decay, inverse_scale) if self.dense is not None else []
        if not self.sketched.begin_step(gradient, finite_flag(beside) & finite):
            return False
        mean = None
        if self.dense is not None:
            # First, so that nothing sketched counts as sent when these sums overflow.
            mean = self.dense.mean(beside[0], self._dense_flat.fits_dense)
            if mean is None:
                return False
        update = self.sketched.exchange(gradient, self._flat.fits_sparse)
        if update.skipped:
            return False
        self._flat.unpack_sparse(update.indices, update.values)
        if mean is not None:
            self._dense_flat.unpack_dense(mean)
        return True

    def _average_dense(self, inverse_scale: Tensor | None, finite: bool) -> bool:
        assert self.dense is not None
        gradient = self._dense_flat.pack(self._weight_decay, inverse_scale)
        if not self.dense.begin_step(gradient, finite):
            return False
        mean = self.dense.mean(gradient[0], self._dense_flat.fits_dense)
        if mean is not None:
            self._dense_flat.unpack_dense(mean)
        return mean is not None

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """The states of both exchanges and the layout they belong to."""
        states = {"sketched": self.sketched, "dense": self.dense}
        saved = {way: part.state_dict(consolidated) if part else None for way, part in states.items()}
        return {"layout": self._layout, **saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises ValueError where it was saved for other tensors."""
        if state["layout"] != self._layout:
            pairs = enumerate(zip_longest(state["layout"], self._layout))
            at, (theirs, ours) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint was saved for other tensors: tensor {at} is {theirs} there and {ours} here. "
                f"Build the optimizer with the same names, order and dense_below, or delete the checkpoint's "
                f"'hvd_sketch' entry to go on without residuals"
            )
        for way, part in (("sketched", self.sketched), ("dense", self.dense)):
            if part is not None:
                part.load_state_dict(state[way])

    def __repr__(self) -> str:
        parts = (("sketched", self.sketched), ("dense", self.dense))
        return ", ".join(f"{part.dim} coordinates {way}" for way, part in parts if part is not None)


class Ahead:
    """Sketches a part of the gradient as soon as its parameters are ready, from the last part to the first.

    That is the order in which :meth:`SketchedAllreduce.exchange` would do it, so the sums have the same bits. A part
    waits for those behind it. No u or v is written: the ranks have not agreed yet that the step is finite.
    """

    def __init__(self, flat: FlatParameters, sketched: SketchedAllreduce, weight_decay: float) -> None:
        self._flat, self._sketched, self._weight_decay = flat, sketched, weight_decay
        self._part_of = {parameter: i for i, places in enumerate(flat.parts) for parameter, _, _ in places}
        self._begin()

    def _begin(self) -> None:
        self._waiting = [len(places) for places in self._flat.parts]  # parameters that are not ready
        self._next = len(self._waiting) - 1
        self._sketched_from: list[tuple[Tensor, Tensor, int]] = []  # parameter, its gradient, the gradient's version

    def add(self, parameter: Tensor) -> None:
        """A parameter is ready."""
        if parameter not in self._part_of:
            return
        self._waiting[self._part_of[parameter]] -= 1
        while self._next >= 0 and self._waiting[self._next] == 0:
            places = self._flat.parts[self._next]
            self._sketched.sketch_ahead(self._flat.pack_part(self._next, self._weight_decay), places[0][1])
            self._sketched_from += [(p, p.grad, p.grad._version) for p, _, _ in places if p.grad is not None]
            self._next -= 1

    def settle(self, usable: bool) -> None:
        """Before the exchange: forget what was sketched if it is not ``usable``, or gradients were changed since."""
        unchanged = all(p.grad is grad and grad._version == version for p, grad, version in self._sketched_from)
        if not (usable and unchanged):
            self._sketched.forget_ahead()
        self._begin()
