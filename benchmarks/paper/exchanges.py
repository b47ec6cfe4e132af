"""Real exchanges of many small problems, with the interface of the simulated ones in simulation.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.experiment import Traffic
from hvd_sketch import CommLedger, DenseAllreduce, SketchedAllreduce


class RealExchanges:
    """One exchange per problem over this rank's transport, one after the other. Communication: collective.

    Args:
        make: an exchange that writes into the ledger given.
        problems: how many.
    """

    def __init__(self, make: Callable[[CommLedger], SketchedAllreduce | DenseAllreduce], problems: int) -> None:
        self._ledger = CommLedger(max_records=0)
        self._exchanges = [make(self._ledger) for _ in range(problems)]

    def step(self, gradients: Tensor) -> Tensor:
        """See :meth:`benchmarks.paper.simulation.SimulatedAllreduce.step`; this process has one worker."""
        (own,) = gradients
        updates = torch.zeros_like(own)
        for exchange, gradient, update in zip(self._exchanges, own, updates, strict=True):
            sent = exchange.step(gradient)
            update[sent.indices] = sent.values
        return updates

    def traffic(self) -> Traffic:
        """Of all steps, all problems together."""
        return Traffic.of(self._ledger, len(self._exchanges))

    def state_dict(self) -> dict[str, Any]:
        return {
            "problems": [exchange.state_dict() for exchange in self._exchanges],
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for exchange, saved in zip(self._exchanges, state["problems"], strict=True):
            exchange.load_state_dict(saved)
        self._ledger.load_state_dict(state["ledger"])
