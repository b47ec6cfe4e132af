"""What an optimizer writes about its exchanges, and what a user adds to it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from hvd_sketch.logs.step_observer import Output, StepObserver
from hvd_sketch.model.forwarding import ExchangingOptimizer
from hvd_sketch.observer import check_loggable


class LoggedOptimizer(ExchangingOptimizer):
    """With a log of its exchanges, where its constructor was given a place for one."""

    def _write_to(self, outputs: Sequence[Output]) -> None:
        """Tell some outputs of every exchange from now on; nothing is measured where there are none."""
        if outputs:
            self.ledger.observer = StepObserver(self.ledger, self.exchange, outputs)
            weakref.finalize(self, self.ledger.observer.close)  # at the latest when the program ends; not if it forks

    def log_values(self, **values: Any) -> None:
        """Add numbers, such as ``loss=loss``, to the next exchange in what this optimizer writes about its exchanges.

        Call it before ``step()``. Several numbers of one name become their mean. Without ``log``, ``trace`` or
        ``tensorboard`` it only checks them.

        Args:
            **values: numbers, or tensors of one element, of this rank. Those on a device are read up to a second later,
                in a ``step()``.

        Raises:
            TypeError: a value is none of these. A DTensor is only a part of its number.

        Communication: none.
        """
        for name, value in values.items():
            check_loggable(name, value, self._transport.rank)
        self.ledger.observer.log_values(values)

    def close_logs(self) -> None:
        """Write what ``log``, ``trace`` and ``tensorboard`` have not got yet, and close them.

        The end of the program does it, too, or of the optimizer. Call it before another optimizer of this program goes
        on with the same files. A step after it opens the files again; TensorBoard's get no more.

        Communication: none.
        """
        self.ledger.observer.close()
