"""Ranks with different numbers of batches: one without data takes part until all have run out of theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hvd_sketch.model.forwarding import ExchangingOptimizer


class _Blocks(threading.local):
    """The blocks that a thread is in, each with its optimizers, the outermost first."""

    def __init__(self) -> None:
        self.optimizers: list[Sequence[ExchangingOptimizer]] = []


_blocks = _Blocks()


@contextmanager
def join(*optimizers: ExchangingOptimizer) -> Iterator[None]:
    """Ranks with different numbers of batches, where a loop steps several optimizers::

        with hvd_sketch.join(muon, adamw):
            for batch in loader:
                ...
                muon.step()
                adamw.step()

    As ``optimizer.join()`` of each, see :meth:`hvd_sketch.DistributedOptimizer.join`. Blocks inside one another cannot
    do that: the rank that leaves would step one optimizer until all have left, while others step both.

    Args:
        *optimizers: ``DistributedOptimizer`` or :class:`LocalSteps` of equal ``every``, in the order in which the loop
            steps them.

    Raises:
        TypeError: one of them is neither.
        ValueError: none is given, one twice, ``every`` differs, or DDP's hook exchanges.
        RuntimeError: at the end, on this rank: the optimizer of a block around this one was stepped inside, or the loop
            has stepped those that are given not once each, in this order.

    Communication: collective at the end, all ranks. An exception inside leaves the other ranks to their launcher.
    """
    _check(optimizers)
    around = [optimizer for block in _blocks.optimizers for optimizer in block]
    before = [optimizer.exchanges for optimizer in around]
    own_before = [optimizer.exchanges for optimizer in optimizers]
    _blocks.optimizers.append(optimizers)
    try:
        yield
    finally:
        _blocks.optimizers.pop()
    if [optimizer.exchanges for optimizer in around] != before:
        rank, size = optimizers[0].place
        raise RuntimeError(
            f"rank {rank} of {size}: an optimizer was stepped inside the join() of another one, and with blocks inside "
            "one another ranks that leave early do not step both: put the loop into 'with hvd_sketch.join(a, b):'"
        )
    made = [optimizer.exchanges - first for optimizer, first in zip(optimizers, own_before, strict=True)]
    if any(made):
        _check_order(optimizers, made)
    _finish(optimizers)


def _check(optimizers: Sequence[object]) -> None:
    for optimizer in optimizers:
        if not isinstance(optimizer, ExchangingOptimizer):
            raise TypeError(
                f"join() takes DistributedOptimizer and LocalSteps, got {type(optimizer).__name__}: an optimizer that "
                "exchanges nothing needs no join()"
            )
        if optimizer.exchanges_in_backward:
            raise ValueError(
                "join() cannot take part in what DistributedDataParallel sends beside its hook: use the model's own, "
                "'with model.join():', in which a rank without data sends what is left in its residual"
            )
    paces = sorted({optimizer.every for optimizer in optimizers if isinstance(optimizer, ExchangingOptimizer)})
    if len(set(map(id, optimizers))) < max(len(optimizers), 1) or len(paces) > 1:
        raise ValueError(
            f"join() takes one or more different optimizers that exchange equally often, got {len(optimizers)} of "
            f"every={paces}: join those of a pace"
        )


def _check_order(optimizers: Sequence[ExchangingOptimizer], made: Sequence[int]) -> None:
    """What comes in another order than on ranks that step without data would be summed with what is not its own."""
    stepped = sorted(range(len(optimizers)), key=lambda number: optimizers[number].last_exchange)
    if stepped == sorted(stepped) and len(set(made)) == 1:
        return
    rank, size = optimizers[0].place
    told = ", ".join(f"optimizer {number + 1} ({made[number]} exchanges)" for number in stepped)
    raise RuntimeError(
        f"rank {rank} of {size}: join() takes optimizers in the order in which the loop steps them, once each, but the "
        f"loop has stepped {told}: name them in that order, and step each once for every batch"
    )


def _finish(optimizers: Sequence[ExchangingOptimizer]) -> None:
    """Take part without data until no rank has any; then all have what those have that left last."""
    for optimizer in optimizers:
        optimizer.end_round()
    running = list(optimizers)
    while running:
        running = [optimizer for optimizer in running if not optimizer.step_without_data()]
    for optimizer in optimizers:
        optimizer.catch_up()
