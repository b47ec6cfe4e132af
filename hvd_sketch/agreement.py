"""What all ranks must agree on before they exchange anything, and before each step."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.transport.base import Transport
from hvd_sketch.volume import MeteredTransport


def require_equal(comm: Transport, fields: Mapping[str, object]) -> None:
    """Compare named values over all ranks; only a digest travels while they are equal.

    Communication: collective, all ranks, also when they then raise.

    Raises:
        ValueError: on every rank, naming the fields that differ, the ranks and their values.
    """
    text = json.dumps({name: str(value) for name, value in fields.items()})
    digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = comm.allgather(digest).view(comm.size, -1)
    if bool((digests == digests[0]).all()):
        return
    every_rank = [json.loads(text) for text in _gather_texts(comm, text)]
    differences = []
    for name in dict.fromkeys(name for fields in every_rank for name in fields):
        values = [fields.get(name, "missing") for fields in every_rank]
        if len(set(values)) > 1:
            ranks_by_value = {value: [r for r, v in enumerate(values) if v == value] for value in values}
            told = "; ".join(f"{value} on {_name_ranks(ranks)}" for value, ranks in ranks_by_value.items())
            differences.append(f"{name}: {told}")
    shown = differences[:5] + [f"and {len(differences) - 5} more"] * (len(differences) > 5)
    raise ValueError(
        f"the ranks were set up differently (seen from rank {comm.rank} of {comm.size}): "
        + "\n  ".join(["", *shown])
        + "\nBuild the exchange from the same configuration, model and software on every rank."
    )


@contextmanager
def refused_together(comm: Transport) -> Iterator[None]:
    """What one rank refuses inside, by a ValueError or TypeError, all ranks refuse: nobody is left waiting for it.

    Communication: collective at the end, all ranks: one tiny allgather. Nothing inside may be collective.

    Raises:
        ValueError: on ranks that had nothing to refuse, naming those that did; they raise their own error.
    """
    refusal: Exception | None = None
    try:
        yield
    except (TypeError, ValueError) as error:
        refusal = error
    refusing = comm.allgather(torch.tensor([refusal is not None], dtype=torch.uint8)).nonzero().flatten().tolist()
    if not refusing:
        return
    reasons = _gather_texts(comm, str(refusal))
    if refusal is not None:
        raise refusal
    raise ValueError(f"{_name_ranks(refusing)} of {comm.size} could not be set up: {reasons[refusing[0]]}")


class FiniteGuard:
    """Lets a step pass only if every rank's input is finite; counts the steps that do not, and warns once."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._warned = False

    def passes(self, comm: MeteredTransport, step: int, finite: bool) -> bool:
        """Whether all ranks may go on, the same answer on every rank.

        Communication: one tiny allreduce, of 8 bytes for each rank.

        Raises:
            RuntimeError: on every rank, when the ranks are at different steps, whose hashes do not fit together.
        """
        verdicts = torch.zeros(comm.size, dtype=torch.int64)
        verdicts[comm.rank] = 2 * step + int(not finite)
        with comm.phase("finite"):
            every = comm.allreduce_(verdicts).tolist()
        steps = [verdict // 2 for verdict in every]
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the ranks are at different steps, in rank order {steps}: load checkpoints of the same step on "
                "every rank, and call step() equally often"
            )
        bad_ranks = [rank for rank, verdict in enumerate(every) if verdict % 2]
        if bad_ranks:
            self.count_skip(f"the gradient of {_name_ranks(bad_ranks)} has NaN or Inf; u and v are as before")
        return not bad_ranks

    def count_skip(self, reason: str) -> None:
        self.skipped_steps += 1
        if not self._warned:
            warnings.warn(
                f"all ranks skip this step: {reason}. Further skips are only counted (skipped_steps).",
                RuntimeWarning,
                stacklevel=4,
            )
        self._warned = True


def all_finite(parts: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite; waits for the device of the parts."""
    return bool(finite_flag(parts))


def finite_flag(parts: Sequence[Tensor]) -> Tensor:
    """Whether no element is NaN or infinite: bool [], on the device of the parts, which is not waited for.

    One pass, half the time of a copy; isfinite().all() takes four copies.
    """
    extremes = [torch.stack(torch.aminmax(part)) for part in parts if part.numel()]
    return torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)


def _gather_texts(comm: Transport, text: str) -> list[str]:
    data = np.frombuffer(text.encode(), dtype=np.uint8).copy()
    sizes = comm.allgather(torch.tensor([len(data)])).tolist()
    gathered = comm.allgather(torch.from_numpy(data)).numpy().tobytes()
    ends = np.cumsum(sizes).tolist()
    return [gathered[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]


def _name_ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
