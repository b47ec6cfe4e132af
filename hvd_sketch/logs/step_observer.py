"""What each step takes: bytes and time of its parts, the residual, the user's own numbers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.ledger import CommLedger
from hvd_sketch.observer import Kind, Observer

NORM_EVERY = 50  # steps: two norms of a million coordinates that are not in the cache take 0.5 ms


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one rank.

    Attributes:
        number: from 0.
        end_s: when its exchange ended, in seconds since the optimizer was made.
        step_s: since the exchange before ended. What is not ``exchange_s`` is the forward and backward pass, data, and
            the wrapped optimizer's step of before.
        exchange_s: from this rank's gradient to the average.
        collective_s: of that, in collectives, by phase: the network, and waiting for other ranks.
        sent_bytes: to the network, by phase; what a rank sends on average where collectives are rings. It receives as
            many.
        dense_bytes: sent in the same way by a dense exchange in its place.
        ratio: of the dense exchange's bytes to ours, over all steps so far.
        is_skipped: all ranks skipped it.
        values: what the user logged, by name.
        residual_norm: of what this rank has produced and not sent; None: not measured in this step.
        captured: the share of the residual's energy (sum of squares) that was sent, of this rank's; None: not measured.
    """

    number: int
    end_s: float
    step_s: float
    exchange_s: float
    collective_s: Mapping[str, float]
    sent_bytes: Mapping[str, int]
    dense_bytes: int
    ratio: float
    is_skipped: bool
    values: Mapping[str, float]
    residual_norm: float | None = None
    captured: float | None = None


class Output(ABC):
    """Where steps are written to. Nothing here may stop the training.

    Attributes:
        wants_spans: whether :meth:`span` is called, about 20 times a step.
    """

    wants_spans: ClassVar[bool] = False

    def span(self, kind: Kind, name: str, start_s: float, end_s: float) -> None:  # noqa: B027
        """Time was spent, by ``time.perf_counter``."""

    @abstractmethod
    def step(self, step: Step) -> None:
        """A step has ended."""

    @abstractmethod
    def close(self, last: Mapping[str, float]) -> None:
        """No more steps come; ``last`` was logged after the last one."""


class StepObserver(Observer):
    """Measures every step of one rank and hands it to some outputs.

    Args:
        ledger: of the exchange.
        exchange: the one that compresses; None: all goes dense.
        size: how many ranks there are.
        outputs: in order.
    """

    def __init__(
        self, ledger: CommLedger, exchange: ResidualExchange | None, size: int, outputs: Sequence[Output]
    ) -> None:
        self._ledger, self._exchange, self._share = ledger, exchange, (size - 1) / size
        self._outputs = outputs
        self._watching = [output for output in outputs if output.wants_spans]
        self._start_s = self._end_s = time.perf_counter()
        self._phase = ""
        self._exchange_s = 0.0
        self._collective_s: dict[str, float] = {}
        self._sent_bytes = ledger.wire_bytes_by_phase()
        self._dense_bytes = ledger.dense_ring_bytes
        self._energy: Tensor | None = None  # of the residual, before anything of it was sent
        self._values: dict[str, list[float | Tensor]] = {}
        self._seen = 0

    def span(self, kind: Kind, name: str) -> AbstractContextManager[Any]:
        return _Span(self, kind, name, super().span(kind, name))

    def begin(self, kind: Kind, name: str) -> None:
        """A span begins."""
        if kind is Kind.PHASE:
            self._phase = name

    def end(self, kind: Kind, name: str, start_s: float, end_s: float) -> None:
        """A span has ended."""
        if kind is Kind.COLLECTIVE:
            self._collective_s[self._phase] = self._collective_s.get(self._phase, 0.0) + end_s - start_s
        elif kind is Kind.EXCHANGE:
            self._exchange_s += end_s - start_s
        for output in self._watching:
            output.span(kind, name, start_s, end_s)

    def accumulated(self) -> None:
        if self._exchange is not None and self._seen % NORM_EVERY == 0:
            self._energy = _energy(self._exchange.residual)

    def log_values(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                # Numbers on a device are fetched when the exchange has waited for the device anyway.
                value = value.item() if value.device.type == "cpu" else value.detach().clone()
            self._values.setdefault(name, []).append(value if isinstance(value, Tensor) else float(value))

    def end_step(self, step: int, is_averaged: bool) -> None:
        now_s = time.perf_counter()
        sent, dense = self._ledger.wire_bytes_by_phase(), self._ledger.dense_ring_bytes
        before = self._sent_bytes
        norm, captured = self._measure()
        ended = Step(
            number=step,
            end_s=now_s - self._start_s,
            step_s=now_s - self._end_s,
            exchange_s=self._exchange_s,
            collective_s=self._collective_s,
            sent_bytes={phase: count - before.get(phase, 0) for phase, count in sent.items()},
            dense_bytes=round((dense - self._dense_bytes) * self._share),
            ratio=self._ledger.compression_ratio(),
            is_skipped=not is_averaged,
            values=self._take_values(),
            residual_norm=norm,
            captured=captured,
        )
        self._end_s, self._sent_bytes, self._dense_bytes = now_s, sent, dense
        self._exchange_s, self._collective_s = 0.0, {}
        self._seen += 1
        for output in self._outputs:
            output.step(ended)

    def close(self) -> None:
        last = self._take_values()
        for output in self._outputs:
            output.close(last)

    def _measure(self) -> tuple[float | None, float | None]:
        """Norm of the residual, and the share of its energy that was sent."""
        before, self._energy = self._energy, None
        if before is None or self._exchange is None:
            return None, None
        energies = torch.stack([before, _energy(self._exchange.residual)]).tolist()
        return energies[1] ** 0.5, 1 - energies[1] / energies[0] if energies[0] else None

    def _take_values(self) -> dict[str, float]:
        """What was logged since the step before; of several numbers of one name their mean."""
        values = {name: sum(map(float, given)) / len(given) for name, given in self._values.items()}
        self._values = {}
        return values


class _Span:
    """A block whose time is measured. A generator in its place takes twice as long."""

    __slots__ = ("_inner", "_kind", "_name", "_observer", "_start_s")

    def __init__(self, observer: StepObserver, kind: Kind, name: str, inner: AbstractContextManager[Any]) -> None:
        self._observer, self._kind, self._name, self._inner = observer, kind, name, inner

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._observer.begin(self._kind, self._name)
        self._start_s = time.perf_counter()

    def __exit__(self, *failure: Any) -> None:
        self._observer.end(self._kind, self._name, self._start_s, time.perf_counter())
        self._inner.__exit__(*failure)


def _energy(values: Tensor) -> Tensor:
    return torch.dot(values, values)
