"""``hvd-sketch plan``: does compression pay on this network, for this model?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from hvd_sketch.checks import check_positive
from hvd_sketch.commands.calls import as_call
from hvd_sketch.config import SketchConfig
from hvd_sketch.cost import Method, Network, Workload, faster_below, methods
from hvd_sketch.model.recommended import RESIDUAL_DECAY
from hvd_sketch.units import told_bytes, told_rate, told_seconds
from hvd_sketch.wire_bytes import DENSE_BYTES

MUCH = 1.25  # times the other's time: less than that is within the error of the model
DENSE = ("dense", "bf16")
PEER = "powersgd"  # local top-k grows with the ranks, and trains worse
# What trains best at equal bytes, by the wrapped optimizer, and up to which ratio: see hvd_sketch.recommended.
ADVISED: Mapping[str, tuple[str, ...]] = {
    "sgd": ("lowrank", "nominate"),
    **dict.fromkeys(("adam", "adamw", "muon"), ("lowrank",)),
    "lagadamw": ("nominate",),
    "signsgd": ("random",),
}
RATIOS: Mapping[str, float] = {name: 150.0 if name == "sgd" else 60.0 for name in ADVISED}


def fastest(seconds: Mapping[str, float], names: tuple[str, ...]) -> str:
    """Of some methods, those that there are, the one that takes least."""
    return min((name for name in names if name in seconds), key=seconds.__getitem__)


def advised(seconds: Mapping[str, float], of_ours: tuple[str, ...] = ADVISED["sgd"]) -> str:
    """Which method to use: a dense exchange or PowerSGD only where it is faster, or ours not by much.

    Args:
        seconds: of an exchange or a step, by method; with a dense one and one of ours.
        of_ours: those of ours that suit the optimizer.
    """
    ours, dense = fastest(seconds, of_ours), fastest(seconds, DENSE)
    if MUCH * seconds.get(PEER, math.inf) < min(seconds[ours], seconds[dense]):
        return PEER
    return ours if seconds[dense] >= MUCH * seconds[ours] else dense


class Plan:
    """What every method is predicted to take, and what to do.

    Args:
        workload: what is exchanged.
        network: of the job.
        optimizer: the one that is wrapped, of :data:`ADVISED`. Between the rounds of ``LocalSteps`` it may be any.

    Raises:
        ValueError: the ratio is not positive, or leaves no coordinate; no method that suits the optimizer was timed.
    """

    def __init__(self, workload: Workload, network: Network, optimizer: str = "sgd") -> None:
        check_positive("--ratio", workload.ratio)
        self._workload, self._network = workload, network
        self.methods = methods(workload, network)
        of_ours = ADVISED[optimizer if workload.every == 1 else "sgd"]
        if not any(name in self.methods for name in of_ours):
            suited = f"{' or '.join(of_ours)}, which --optimizer {optimizer} needs"
            raise ValueError(
                f"--ratio {workload.ratio:g} leaves no coordinate to send, or no time is known of {suited}: lower the "
                "ratio, leave out --device cuda, or give another optimizer"
            )
        self._step_s = {name: method.step_s(network, workload.backward_s) for name, method in self.methods.items()}
        self._ours, self._dense = fastest(self._step_s, of_ours), fastest(self._step_s, DENSE)
        self.advised = advised(self._step_s, of_ours)

    @property
    def advice(self) -> str:
        """What to do, and why."""
        seconds, chosen = self._step_s, self.methods[self.advised]
        ours, dense = self.methods[self._ours], self.methods[self._dense]
        limit = self._network.carrier.bytes_per_s
        note = f" No more than {told_rate(limit)} were measured over this launcher: --measure yours."
        note = note if self._network.bytes_per_s > limit else ""
        if self.advised == PEER:
            faster = seconds[PEER] / seconds[self._ours]
            told = f"its step takes {faster:.0%} of the time of {ours.title}, the faster of ours"
            return f"Use {chosen.title}: {told}.{note}"
        gain = seconds[self._dense] / seconds[self._ours]
        rate = self._pays_below()
        where = f"below {told_rate(rate)}" if 0 < rate < math.inf else "at any bandwidth" if rate else "at no bandwidth"
        pays = f" It pays {where}.{note}"
        if chosen is dense:
            return f"Stay dense: with {ours.title} a step is {gain:.2f} times as fast.{pays}"
        return f"Compress: with {ours.title} a step is {gain:.1f} times as fast as with {dense.title}.{pays}"

    @property
    def call(self) -> str:
        """How to set up what is advised, as one writes it; empty where it is not of this package."""
        config, every = self.methods[self.advised].config, self._workload.every
        if config is None:
            return ""
        if isinstance(config, SketchConfig) and config.candidates == "random":  # for SignSGD
            config = replace(config, residual_decay=RESIDUAL_DECAY)
        if every > 1:
            return f"LocalSteps(optimizer, model.named_parameters(), {as_call(config)}, every={every})"
        levels = ", levels=2" if self._network.per_host > 1 else ""
        return f"DistributedOptimizer(optimizer, model.named_parameters(), compression={as_call(config)}{levels})"

    def _pays_below(self) -> float:
        dense = [self.methods[name] for name in DENSE if name in self.methods]
        return faster_below(self.methods[self._ours], self._network, dense, self._workload.backward_s, MUCH)

    def as_record(self) -> dict[str, Any]:
        """For programs: seconds and bytes of every method, the advice, the bandwidth in bits per second."""
        rate = 8 * self._pays_below()
        return {
            "coordinates": self._workload.dim,
            "dense_elements": self._workload.elements - self._workload.dim,
            "ranks": self._network.ranks * self._network.per_host,
            "hosts": self._network.ranks,
            "ratio": self._workload.ratio,
            "every": self._workload.every,
            "advised": self.advised,
            "advice": self.advice,
            "call": self.call or None,
            "pays_below_bits_per_s": rate if math.isfinite(rate) else None,
            "methods": {name: self._record_of(name, method) for name, method in self.methods.items()},
        }

    def _record_of(self, name: str, method: Method) -> dict[str, Any]:
        dense_bytes = DENSE_BYTES * self._workload.elements * self._network.share
        return {
            "exchange_s": method.seconds(self._network),
            "step_s": self._step_s[name],
            "local_s": method.local_s,
            "collectives": method.collectives,
            "messages": method.messages,
            "sent_bytes": method.sent_bytes,
            "received_bytes": method.received_bytes,
            "kept_bytes": method.kept_bytes,
            "ratio": dense_bytes / method.sent_bytes,
            "config": None if method.config is None else asdict(method.config),
        }

    def show(self, console: Console) -> None:
        """A table that fits 80 columns, the advice, and a line to copy."""
        network, every = self._network, self._workload.every
        ranks = f"{network.ranks} ranks" if network.per_host == 1 else f"{network.ranks} x {network.per_host} ranks"
        steps = f", every {every} steps" if every > 1 else ""
        beside = self._workload.elements - self._workload.dim
        small = f" and {beside:,} in small tensors" if beside else ""
        table = Table(
            title=f"{self._workload.dim:,} coordinates{small}, {ranks}, ours at {self._workload.ratio:g}x{steps}"
        )
        table.add_column("method")
        for heading in ("sent", "exchange", "step", "speed-up", "memory"):
            table.add_column(heading, justify="right")
        for name, seconds in sorted(self._step_s.items(), key=lambda item: item[1]):
            method = self.methods[name]
            table.add_row(
                method.title,
                told_bytes(method.sent_bytes),
                told_seconds(method.seconds(network)),
                told_seconds(seconds),
                f"{self._step_s[self._dense] / seconds:.2f}x",
                told_bytes(method.kept_bytes),
                style="bold" if name in (self._ours, self._dense) else None,
            )
        console.print(table)
        console.print(self.advice)
        if self.call:
            console.print(self.call, soft_wrap=True, markup=False)  # one line to copy
