"""What all ranks must have in common before the first step, and how they say what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from hvd_sketch.transport.attendance import Attendance
from hvd_sketch.transport.base import Transport, gather_texts, name_ranks
from hvd_sketch.transport.stall import process_watch
from hvd_sketch.version import __version__

SET_UP = "Build it from the same configuration, model, optimizer, learning rate and software on every rank."


def require_equal(
    comm: Transport, fields: Mapping[str, object], doing: str = "compare set-ups", mend: str = SET_UP
) -> None:
    """Compare named values and the version of this package over all ranks; while they are equal a digest travels.

    Args:
        comm: all ranks.
        fields: by name.
        doing: what the ranks are about to do together.
        mend: how to make the values equal, a sentence.

    Communication: collective, all ranks, also when they then raise.

    Raises:
        ValueError: on every rank, naming the fields that differ, the ranks and their values.
        RuntimeError: a rank has come here to do something else, waits in a step, or has ended.
    """
    text = json.dumps({"hvd_sketch": __version__} | {name: str(value) for name, value in fields.items()})
    digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device="cpu")
    with _met(comm, doing):
        digests = comm.allgather(digest).view(comm.size, -1)
    if bool((digests == digests[0]).all()):
        return
    raise ValueError(
        f"the ranks were set up differently (seen from rank {comm.rank} of {comm.size}): {tell_differences(comm, text)}"
        f"\n{mend}"
    )


def tell_differences(comm: Transport, fields: str) -> str:
    """Which fields differ, and what they are on which ranks: a line for each of the first five.

    Args:
        comm: all ranks.
        fields: this rank's by name, a dict in JSON.

    Communication: collective, all ranks.
    """
    every_rank = [json.loads(text) for text in gather_texts(comm, fields)]
    differences = []
    for name in dict.fromkeys(name for fields_of_rank in every_rank for name in fields_of_rank):
        values = [fields_of_rank.get(name, "missing") for fields_of_rank in every_rank]
        if len(set(values)) > 1:
            differences.append(f"{name}: {tell_values(values)}")
    shown = differences[:5] + [f"and {len(differences) - 5} more"] * (len(differences) > 5)
    return "\n  ".join(["", *shown])


@contextmanager
def refused_together(comm: Transport, doing: str = "be set up") -> Iterator[None]:
    """What one rank refuses inside, all ranks refuse, by an OSError, TypeError or ValueError: nobody waits for it.

    Args:
        comm: all ranks.
        doing: what a rank that refuses could not do, for messages.

    Communication: collective at the end, all ranks: one tiny allgather. Nothing inside may be collective over these
    ranks.

    Raises:
        ValueError: on ranks that had nothing to refuse, naming those that did; they raise their own error.
        OSError: in its place, where the first of those had one.
        RuntimeError: a rank has come here to do something else, waits in a step, or has ended.
    """
    refusal: Exception | None = None
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        refusal = error
    own = torch.tensor([(refusal is not None) + isinstance(refusal, OSError)], dtype=torch.uint8, device="cpu")
    with _met(comm, doing):
        every = comm.allgather(own)
    refusing = every.nonzero().flatten().tolist()
    if not refusing:
        return
    reasons = gather_texts(comm, str(refusal))
    if refusal is not None:
        raise refusal
    kind = OSError if every[refusing[0]] == 2 else ValueError
    raise kind(f"{name_ranks(refusing)} of {comm.size} could not {doing}: {reasons[refusing[0]]}")


@contextmanager
def _met(comm: Transport, doing: str) -> Iterator[None]:
    """What is inside begins when all ranks have come to do the same; who waits long says so."""
    attendance: Attendance | None = getattr(comm, "attendance", None)
    if comm.size == 1:
        yield
        return
    with process_watch().over(comm.rank, comm.size, None, doing, attendance):
        if attendance is not None:
            attendance.meet(doing)
        yield


def tell_values(values: Sequence[object]) -> str:
    """Which values there are and on which ranks, in words."""
    ranks_by_value = {value: [r for r, v in enumerate(values) if v == value] for value in values}
    return "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in ranks_by_value.items())
