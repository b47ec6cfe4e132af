"""Which exchanges have been shown to train into which optimizers, at which ratio, and what is told of all others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from hvd_sketch.config import Compression, LowRankConfig
from hvd_sketch.model.parameters import NamedParameter, sketched_dim
from hvd_sketch.wire_bytes import DENSE_BYTES, step_bytes

LOW_RANK, FORGETS = "low rank", ", residual_decay < 1"
# By the name of an optimizer's class and by exchange: the highest ratio of the tables in benchmarks/results at which it
# trained. Sketched and random coordinates go with SGD without momentum.
SHOWN: Mapping[str, Mapping[str, float]] = {
    "SGD": {LOW_RANK: 1000, "nominate": 1000, "sketch": 150, "random": 150, "heavymix": 30},
    "Adam": {LOW_RANK: 60},
    "AdamW": {LOW_RANK: 60},
    "LagAdamW": {LOW_RANK: 60, "nominate": 60},  # low rank: it steps as AdamW
    "Muon": {LOW_RANK: 60},
    "SignSGD": {candidates + FORGETS: 60 for candidates in ("nominate", "sketch", "random")},
}
# Between the rounds of LocalSteps with an outer SGD: of the steps and the exchange together.
ROUNDS_SHOWN: Mapping[str, float] = {LOW_RANK: 320, "nominate": 320}
ROUNDS_WAY_OUT = "take candidates='nominate' (2.41 with an exchange at 20 every 16 steps, dense every 16 steps 2.45)"
# What did worse: losses of a character transformer after 300 steps at a ratio of 60, by the optimizer and the exchange.
LOSSES: Mapping[tuple[str, str], float] = {
    **{(name, "nominate"): 2.49 for name in ("Adam", "AdamW")},
    **{(name, "sketch"): 2.62 for name in ("Adam", "AdamW")},
    **{(name, "random"): 2.61 for name in ("Adam", "AdamW")},
    ("LagAdamW", "sketch"): 2.59,
    ("LagAdamW", "random"): 2.6,
    ("Muon", "nominate"): 2.19,
    ("Muon", "sketch"): 2.52,
    ("Muon", "random"): 2.51,
    ("Lion", LOW_RANK): 2.8,
    ("Lion", "nominate"): 3.02,
    ("Lion", "sketch"): 3.11,
    ("Lion", "random"): 3.08,
}
DENSE_LOSS = 2.27  # of Adam; of others:
DENSE_LOSSES: Mapping[str, float] = {"Muon": 2.0, "Lion": 2.42}
WAYS_OUT: Mapping[str, str] = {
    "SGD": "set residual_decay=1",
    "LagAdamW": "take candidates='nominate' (2.41, with ahead() 2.33), or SignSGD with residual_decay=0.95 (random: "
    "2.28)",
    "SignSGD": "take hvd_sketch.recommended(..., optimizer='signsgd'), which sets residual_decay=0.95 (2.28)",
}  # by the name of an optimizer; of all others:
WAY_OUT = (
    "take AdamW or Muon with hvd_sketch.recommended(..., optimizer='adamw') (2.39, 2.13), or "
    "hvd_sketch.optim.LagAdamW with candidates='nominate' and optimizer.ahead() (2.33)"
)
TOLERATED = 1.5  # times the ratio shown
logger = logging.getLogger(__name__)


def warn_unless_shown(
    optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter], compression: Compression, every: int = 1
) -> None:
    """Tell of an exchange that has not been shown to train into an optimizer, or not at such a ratio.

    A class derived from one that is known counts as that. Communication: none.

    Args:
        optimizer: gets what is exchanged.
        named, compression: what is exchanged, and how.
        every: steps to an exchange; more than 1 in ``LocalSteps``.
    """
    name, exchange = type(optimizer).__name__, exchange_of(compression)
    known = next((base.__name__ for base in type(optimizer).__mro__ if base.__name__ in SHOWN), name)
    shown, way_out = SHOWN.get(known, {}), WAYS_OUT.get(known, WAY_OUT)
    if every > 1:
        name = f"{name} of LocalSteps"
        shown, way_out = ROUNDS_SHOWN if known == "SGD" else {}, ROUNDS_WAY_OUT
    highest, ratio = shown.get(exchange), every * ratio_of(compression, named)
    if highest is None:
        loss, dense = LOSSES.get((known, exchange)), DENSE_LOSSES.get(known, DENSE_LOSS)
        is_measured = loss is not None and every == 1
        logger.warning(
            "%s has not been shown to train as well as dense after this exchange (%s; %s): %s%s. Numbers are losses "
            "of a character transformer. What goes with what: docs/choosing.md",
            *(name, exchange, f"a loss of {loss:g}, dense {dense:g}" if is_measured else "not measured"),
            *("" if is_measured else "compare with a dense training (compression=None), or ", way_out),
        )
    elif ratio > TOLERATED * highest:
        logger.warning(
            "%s has been shown to train after this exchange (%s) at ratios of up to %g, and this is %.0f: lower it, or "
            "compare with a dense training (compression=None).",
            *(name, exchange, highest, ratio),
        )


def exchange_of(compression: Compression) -> str:
    """As :data:`SHOWN` calls it."""
    if isinstance(compression, LowRankConfig):
        return LOW_RANK
    return compression.candidates + (FORGETS if compression.residual_decay < 1 else "")


def ratio_of(compression: Compression, named: Sequence[NamedParameter]) -> float:
    """Bytes of a dense ring allreduce over those sent, of what is compressed; 0 where a rank says the bytes."""
    if isinstance(compression, LowRankConfig):
        return compression.ratio or 0
    dim = sketched_dim(named, compression.dense_below)
    return DENSE_BYTES * dim / step_bytes(compression, dim, ranks=1) if dim else 0
