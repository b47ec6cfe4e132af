"""What each step takes: bytes and time of its parts, the residual, the user's own numbers."""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.ledger import CommLedger
from hvd_sketch.observer import Kind, Observer

NORM_EVERY = 50  # steps: two norms of a million coordinates that are not in the cache take 0.5 ms
FLUSH_S = 1.0
MOST_SPANS = 1000  # more are of steps that do not end: of a rank that has run out of data
logger = logging.getLogger(__name__)

# Names of their own: to look one up in an Enum takes 0.15 us, a fifth of a span.
_EXCHANGE, _PHASE, _COLLECTIVE = Kind.EXCHANGE, Kind.PHASE, Kind.COLLECTIVE
Span = tuple[Kind, str, float, float]  # time that was spent: start and end, by time.perf_counter; no class, for speed
_Sums = dict[str, tuple[float | Tensor, int]]  # and counts, of numbers by name


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one rank.

    Attributes:
        number: from 0.
        end_s: when its exchange ended, by ``time.perf_counter``.
        step_s: since the exchange before ended; the first step begins with its exchange. What is not ``exchange_s`` is
            the forward and backward pass, data, and the wrapped optimizer's step of before.
        exchange_s: from this rank's gradient to the average.
        collective_s: of that, in collectives, by phase: the network, and waiting for other ranks.
        sent_bytes: to the network, by phase; what a rank sends on average where collectives are rings. It receives as
            many.
        sent_so_far: bytes, over all phases and steps, also those before a checkpoint.
        dense_bytes: sent in the same way by a dense exchange in its place.
        ratio: of the dense exchange's bytes to ours, over all steps so far.
        is_skipped: all ranks skipped it.
        values: what the user logged, by name.
        residual_norm: of what this rank has produced and not sent; None: not measured in this step.
        captured: the share of the residual's energy (sum of squares) that was sent, of this rank's; None: not measured.
        spans: the parts of its exchange, in the order of their ends.
    """

    number: int
    end_s: float
    step_s: float
    exchange_s: float
    collective_s: Mapping[str, float]
    sent_bytes: Mapping[str, int]
    sent_so_far: int
    dense_bytes: int
    ratio: float
    is_skipped: bool
    values: Mapping[str, float]
    residual_norm: float | None = None
    captured: float | None = None
    spans: Sequence[Span] = ()


class Output(ABC):
    """Where steps are written to. Nothing here may stop the training."""

    @abstractmethod
    def write(self, steps: Sequence[Step]) -> None:
        """Some steps have ended, one after the other."""

    def interrupt(self, step_s: float, dense_bytes: int) -> None:
        """Local steps after the last step have no exchange, and none follows: their time, and bytes as of a step."""
        return  # few outputs tell of them

    @abstractmethod
    def close(self, last: Mapping[str, float]) -> None:
        """No more steps come; ``last`` was logged after the last one."""


class _Ended(NamedTuple):
    """What is known of a step at its end; counters are sums over all steps so far."""

    number: int
    end_s: float
    spans: list[Span]
    sent_bytes: dict[str, int]
    dense_ring_bytes: int
    ratio: float
    is_averaged: bool
    values: _Sums
    norms: Sequence[Tensor]  # of the residual, before and after; or none


class StepObserver(Observer):
    """Measures every step of one rank, and about once a second hands those that have ended to some outputs.

    Not every step by itself: between two steps all caches are overwritten, and so the same code took 130 us a step in
    place of 20.

    Args:
        ledger: of the exchange.
        exchange: the one that compresses; None: all goes dense.
        outputs: in order.
    """

    def __init__(self, ledger: CommLedger, exchange: ResidualExchange | None, outputs: Sequence[Output]) -> None:
        self._ledger, self._exchange = ledger, exchange
        self._outputs = outputs
        self._process = os.getpid()
        self._is_failing = False
        self._spans: list[Span] = []
        self._values: _Sums = {}
        self._norms: list[Tensor] = []
        self._seen = 0
        self._has_begun = self._is_profiled = False
        self._local_s = 0.0  # when a local step was last made
        self._before = self._now(-1, True)  # the last step that was handed over
        self._ended: list[_Ended] = []

    def span(self, kind: Kind, name: str) -> AbstractContextManager[Any]:
        if kind is _EXCHANGE:  # asked once a step: each time would take a third of a span's time
            self._is_profiled = torch.autograd._profiler_enabled()
            self._begin()
        return _Timed(self._spans, kind, name, super().span(kind, name) if self._is_profiled else None)

    def begin_step(self) -> None:
        self._begin()
        self._local_s = time.perf_counter()

    def _begin(self) -> None:
        if not self._has_begun:
            self._before = self._now(-1, True)  # what came before is set-up
            self._has_begun = True

    def start_over(self) -> None:
        self.flush()
        self._has_begun = False

    def accumulated(self) -> None:
        if len(self._spans) > MOST_SPANS:
            self._spans.clear()
        if self._exchange is not None and self._seen % NORM_EVERY == 0:
            self._norms = [torch.linalg.vector_norm(self._exchange.residual)]

    def log_values(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            total, count = self._values.get(name, (0.0, 0))
            if isinstance(value, Tensor) and not value.is_cpu:
                # Numbers on a device are fetched later: to wait for the device would cost more than all the rest.
                device = total.device if isinstance(total, Tensor) else value.device
                value = value.detach().to(device, torch.float32, copy=True).sum()
            else:
                value = float(value.item() if isinstance(value, Tensor) else value)
            self._values[name] = total + value, count + 1

    def end_step(self, step: int, is_averaged: bool) -> None:
        if self._norms and self._exchange is not None:
            self._norms.append(torch.linalg.vector_norm(self._exchange.residual))
        ended = self._now(step, is_averaged)
        self._ended.append(ended)
        self._spans, self._values, self._norms = [], {}, []
        self._seen += 1
        if ended.end_s - self._before.end_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hand all steps to the outputs that have ended since the last time."""
        if self._ended:
            counted = [self._before, *self._ended]
            self._before, self._ended = counted[-1], []
            with self._never_in_the_way():
                steps = [self._step(before, ended) for before, ended in pairwise(counted)]
                for output in self._outputs:
                    output.write(steps)

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # forked: the files are the other process's
        self.flush()
        given, self._values = self._values, {}
        with self._never_in_the_way():
            last = _means(given)
            self._interrupt()
            for output in self._outputs:
                output.close(last)

    def _interrupt(self) -> None:
        """Hand over local steps of which no exchange has come, once."""
        before = self._before
        if self._has_begun and self._local_s > before.end_s:
            self._before = self._now(before.number, True)
            dense_bytes = self._dense_bytes_between(before, self._before)
            for output in self._outputs:
                output.interrupt(self._local_s - before.end_s, dense_bytes)

    @contextmanager
    def _never_in_the_way(self) -> Iterator[None]:
        """An error inside is told once, and the training goes on."""
        try:
            yield
        except Exception as error:  # whatever it is: a log is worth no training
            if not self._is_failing:
                logger.exception("steps are missing in the logs (%s: %s)", type(error).__name__, error)
            self._is_failing = True

    def _now(self, step: int, is_averaged: bool) -> _Ended:
        ledger = self._ledger
        counted = ledger.wire_bytes_by_phase(), ledger.dense_ring_bytes, ledger.compression_ratio()
        return _Ended(step, time.perf_counter(), self._spans, *counted, is_averaged, self._values, self._norms)

    def _dense_bytes_between(self, before: _Ended, ended: _Ended) -> int:
        return round((ended.dense_ring_bytes - before.dense_ring_bytes) * self._ledger.ring_share)

    def _step(self, before: _Ended, ended: _Ended) -> Step:
        norm, captured = _measured(ended.norms)
        exchange_s, collective_s = _spent(ended.spans)
        return Step(
            number=ended.number,
            end_s=ended.end_s,
            step_s=ended.end_s - before.end_s,
            exchange_s=exchange_s,
            collective_s=collective_s,
            sent_bytes={phase: sent - before.sent_bytes.get(phase, 0) for phase, sent in ended.sent_bytes.items()},
            sent_so_far=sum(ended.sent_bytes.values()),
            dense_bytes=self._dense_bytes_between(before, ended),
            ratio=ended.ratio,
            is_skipped=not ended.is_averaged,
            values=_means(ended.values),
            residual_norm=norm,
            captured=captured,
            spans=ended.spans,
        )


class _Timed:
    """A block whose time is measured. A generator in its place takes twice as long."""

    __slots__ = ("_inner", "_kind", "_name", "_spans", "_start_s")

    def __init__(self, spans: list[Span], kind: Kind, name: str, inner: AbstractContextManager[Any] | None) -> None:
        self._spans, self._kind, self._name, self._inner = spans, kind, name, inner

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()
        self._start_s = time.perf_counter()

    def __exit__(self, *failure: Any) -> None:
        self._spans.append((self._kind, self._name, self._start_s, time.perf_counter()))
        if self._inner is not None:
            self._inner.__exit__(*failure)


def _spent(spans: Sequence[Span]) -> tuple[float, dict[str, float]]:
    """Seconds in the exchange, and of them in collectives, by phase. Collectives end before their phase does."""
    by_phase: dict[str, float] = {}
    exchange_s = inside = 0.0
    for kind, name, start_s, end_s in spans:
        if kind is _COLLECTIVE:
            inside += end_s - start_s
        elif kind is _PHASE:
            by_phase[name] = by_phase.get(name, 0.0) + inside
            inside = 0.0
        elif kind is _EXCHANGE:
            exchange_s += end_s - start_s
    return exchange_s, by_phase


def _measured(norms: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Norm of the residual, and the share of its energy that was sent."""
    if len(norms) < 2:
        return None, None
    before, after = torch.stack(list(norms)).tolist()
    return after, 1 - (after / before) ** 2 if before else None


def _means(sums: _Sums) -> dict[str, float]:
    """Of several numbers of one name their mean."""
    return {name: float(total) / count for name, (total, count) in sums.items()}
