"""What tells of a training while it goes on: a log of its steps, a trace of their time, scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from hvd_sketch.logs.line_file import make_folder_of, path_of_shard
from hvd_sketch.logs.run_log import RunLog
from hvd_sketch.logs.scalars import Scalars
from hvd_sketch.logs.step_observer import Output
from hvd_sketch.logs.trace import TraceFile
from hvd_sketch.transport import Transport
from hvd_sketch.version import __version__

Place = str | PathLike[str] | None


def outputs_of(
    transport: Transport, shard: int, about: Mapping[str, Any], *, log: Place, trace: Place, tensorboard: Place
) -> list[Output]:
    """What this rank writes; none of it where all places are None.

    Args:
        transport: tells rank and size.
        shard: number of the shards that the ranks of ``transport`` hold; 0 where nothing is sharded. Files have it in
            their names: ranks of several transports write side by side.
        about: what describes the run, beside these and versions.
        log, trace: files of rank 0 of shard 0.
        tensorboard: a folder of rank 0 of shard 0, which alone writes there.

    Raises:
        OSError: nothing can be written in such a place.
        TypeError: a place is no path.
        ValueError: TensorBoard is not installed; two places are the same.

    Communication: none.
    """
    rank, size = transport.rank, transport.size
    outputs: list[Output] = []
    # A file is opened with its first lines, and by then the program may be in another folder.
    log, trace, tensorboard = (
        place if place is None else Path(place).absolute() for place in (log, trace, tensorboard)
    )
    places = [place for place in (log, trace, tensorboard) if place is not None]
    if len(set(places)) < len(places):
        raise ValueError(
            f"log, trace and tensorboard must be different places, got {log!s}, {trace!s}, {tensorboard!s}"
        )
    if log is not None:
        make_folder_of(log)
        of_rank = {"rank": rank, "size": size, "transport": type(transport).__name__}
        versions = {"hvd_sketch": __version__, "torch": torch.__version__}
        outputs.append(RunLog(path_of_shard(log, shard), rank, {**of_rank, **about, **versions}))
    if trace is not None:
        make_folder_of(trace)
        outputs.append(TraceFile(path_of_shard(trace, shard), rank, size))
    if tensorboard is not None and rank == shard == 0:
        outputs.append(Scalars(tensorboard))
    return outputs
