"""Scalars for TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike

from hvd_sketch.logs.step_observer import Output, Step

EVERY = 10  # steps: a scalar takes up to 0.1 ms; what the user logs is written in every step
logger = logging.getLogger(__name__)


class Scalars(Output):
    """What the user logs, and bytes, ratio, residual, as an output of
    :class:`~hvd_sketch.logs.step_observer.StepObserver`. Bytes and ratio are of all steps, also before a checkpoint.

    Args:
        folder: of the run, as TensorBoard's ``SummaryWriter`` takes it.

    Raises:
        ValueError: TensorBoard is not installed; says how to get it.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # not before: few have it
        except ImportError as error:
            raise ValueError("tensorboard=… needs TensorBoard: pip install 'hvd_sketch[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder))
        self._last = 0
        self._is_failing = False

    def write(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._write(step)

    def _write(self, step: Step) -> None:
        self._last = step.number
        scalars = dict(step.values)
        if step.residual_norm is not None or step.number % EVERY == 0:
            scalars |= {"exchange/sent_bytes": step.sent_so_far, "exchange/ratio": step.ratio}
            scalars |= {"exchange/step_s": step.step_s, "exchange/skipped": float(step.is_skipped)}
        if step.residual_norm is not None:
            scalars["exchange/residual_norm"] = step.residual_norm
        if step.captured is not None:
            scalars["exchange/captured_energy"] = step.captured
        self._add(scalars, step.number)

    def close(self, last: Mapping[str, float]) -> None:
        self._add(last, self._last)
        if not self._is_failing:
            self._writer.close()

    def _add(self, scalars: Mapping[str, float], step: int) -> None:
        if self._is_failing:
            return
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        except Exception as error:  # of a thread of TensorBoard's, whatever it raised there
            self._is_failing = True
            logger.error("TensorBoard's scalars end at step %d (%s); training goes on", step, error)
