"""Communication volume: every collective is counted, from the sizes of its buffers."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_sketch.files import replaced
from hvd_sketch.observer import Observer

# How often a ring moves the payload past one rank: an allreduce is a reduce_scatter and an allgather. The transports
# really send these bytes (tests/netlab/test_wire.py), except in allreduces. By Open MPI small ones, of flags and
# histograms, double recursively and send log2(W) times the payload; large ones at 3 ranks send 1.125 times the ring.
# Over Gloo small ones, up to 16 KiB on all ranks together, send W - 1 times the payload.
RING_PASSES = {"reduce_scatter": 1, "alltoall": 1, "allgather": 1, "broadcast": 1, "allreduce": 2}
COUNTS = 4  # of a phase: collectives, payload, wire and staged bytes
RECENT = 1000  # records kept where no others are asked for: those of 100 to 300 steps, in a quarter of a megabyte


@dataclass(frozen=True, slots=True)
class Record:
    """One collective of one step.

    Attributes:
        step: number of the step, from 0; -1 before the first.
        phase: of the algorithm ("agree", "sketch", "select", "indices", …).
        collective: "allreduce", "reduce_scatter", "alltoall", "allgather" or "broadcast".
        dtype: of the elements, as NumPy names it.
        payload_bytes: the whole logical vector: a reduce_scatter's or alltoall's input, an allgather's output,
            an allreduce's or broadcast's buffer.
        wire_bytes: bytes that one rank sends on average in a ring, ``passes * (W - 1) / W * payload_bytes``. In a grid
            of many ranks small alltoalls and allreduces send nearly twice as much, and that is counted.
        staged_bytes: copied between a device and the host, both ways, codes as long as they travel; 0 where all is on
            the host, or the transport reads device memory itself.
    """

    step: int
    phase: str
    collective: str
    dtype: str
    payload_bytes: int
    wire_bytes: int
    staged_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all steps so far, per rank: collectives, payload bytes, modelled wire bytes, staged bytes."""

    steps: int
    collectives: int
    payload_bytes: int
    wire_bytes: int
    staged_bytes: int


class CommLedger:
    """The bytes of one rank's exchange, and of a dense exchange in its place.

    Totals, also those by phase, and ratios cover every step; ``records`` keeps the most recent ``max_records`` (None:
    all). The memory of a ledger does not grow with the steps, unless all records are kept.

    Attributes:
        records: the most recent ones.
        observer: looks on while the exchanges of this ledger take their steps.
        ring_share: (W - 1) / W of the W ranks of the last collective: what each of them sends of a payload in one pass
            of a ring; 0 before the first.
    """

    def __init__(self, max_records: int | None = RECENT) -> None:
        self.records: deque[Record] = deque(maxlen=max_records)
        self.observer = Observer()
        self.ring_share = 0.0
        self._by_phase: dict[str, list[int]] = {}  # COUNTS each
        self._step = -1
        self._collectives = 0
        self._payload_bytes = 0
        self._wire_bytes = 0
        self._staged_bytes = 0
        self._ring_bytes = 0  # passes * payload, without the factor (W - 1) / W: it cancels in ratios
        self._dense_ring_bytes = 0
        self._paper_floats = 0
        self._dense_floats = 0

    @property
    def step(self) -> int:
        """Number of the current step, from 0; -1 before the first."""
        return self._step

    def keep_records(self, max_records: int | None = None) -> None:
        """Keep the most recent ``max_records`` from now on; None: all, some 250 bytes each. Communication: none."""
        self.records = deque(self.records, maxlen=max_records)

    def begin_step(self) -> None:
        self._step += 1

    def add_local_step(self, elements: int, dense_bytes: int) -> None:
        """Add a training step that exchanges nothing, see :meth:`compare_with_dense`."""
        self.begin_step()
        self.compare_with_dense(elements, dense_bytes, 0)

    def reopen_local_step(self, elements: int, dense_bytes: int) -> None:
        """Take the last :meth:`add_local_step` back: an exchange follows it, and counts it again."""
        self._step -= 1
        self.compare_with_dense(-elements, -dense_bytes, 0)

    def record(
        self,
        phase: str,
        collective: str,
        dtype: torch.dtype,
        payload_bytes: int,
        size: int,
        staged_bytes: int = 0,
        passes: float = 1.0,
    ) -> None:
        """Add one collective over ``size`` ranks; see :class:`Record` for what counts as payload and as staged.

        Args:
            passes: how often the bytes of a ring move past a rank: more than once in a grid of many ranks.
        """
        ring_bytes = round(RING_PASSES[collective] * passes * payload_bytes)
        self.ring_share = (size - 1) / size
        wire_bytes = round(ring_bytes * self.ring_share)
        name = str(dtype).removeprefix("torch.")
        self.records.append(Record(self._step, phase, collective, name, payload_bytes, wire_bytes, staged_bytes))
        self._collectives += 1
        self._payload_bytes += payload_bytes
        self._wire_bytes += wire_bytes
        self._staged_bytes += staged_bytes
        self._ring_bytes += ring_bytes
        counts = self._by_phase.setdefault(phase, [0] * COUNTS)
        for number, count in enumerate((1, payload_bytes, wire_bytes, staged_bytes)):
            counts[number] += count

    def compare_with_dense(self, elements: int, dense_bytes: int, paper_floats: int) -> None:
        """Add the dense exchange that this step replaces: of ``elements``, ``dense_bytes`` in the gradient's dtype.

        ``paper_floats`` is the paper's count for this step, ``|S| + Pk + k``, or ``2 * elements`` for a dense one.
        """
        self._dense_floats += 2 * elements
        self._dense_ring_bytes += RING_PASSES["allreduce"] * dense_bytes
        self._paper_floats += paper_floats

    def totals(self) -> Totals:
        return Totals(self._step + 1, self._collectives, self._payload_bytes, self._wire_bytes, self._staged_bytes)

    def by_phase(self) -> dict[str, Totals]:
        """The totals of every phase, in the order of their first collectives; ``steps`` are those of all phases."""
        return {phase: Totals(self._step + 1, *counts) for phase, counts in self._by_phase.items()}

    def wire_bytes_by_phase(self) -> dict[str, int]:
        """Of every phase, over all steps so far."""
        return {phase: counts[2] for phase, counts in self._by_phase.items()}

    @property
    def dense_ring_bytes(self) -> int:
        """Of the dense exchanges in place of all steps so far, without the factor (W - 1) / W."""
        return self._dense_ring_bytes

    def compression_ratio(self) -> float:
        """Bytes of a ring allreduce of the dense gradient over the bytes we send, both modelled; NaN before any step.

        Everything counts: indices, histograms, flags. The factor (W - 1) / W cancels: one rank has a ratio, too.
        """
        return self._dense_ring_bytes / self._ring_bytes if self._ring_bytes else float("nan")

    def paper_compression_ratio(self) -> float:
        """``2 * d / (|S| + Pk + k)`` as the paper counts, indices left out; NaN before the first step."""
        return self._dense_floats / self._paper_floats if self._paper_floats else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """All counts, without the records: the totals of a resumed run then cover the whole run."""
        by_phase = {phase: list(counts) for phase, counts in self._by_phase.items()}
        return {name: count for name, count in vars(self).items() if isinstance(count, int)} | {"by_phase": by_phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`. Raises ValueError where its counts are no integers."""
        self.read_state(state)()

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state as :meth:`load_state_dict` does; the function returned takes it over, and cannot fail."""
        counts = {name: state[name] for name in self.state_dict() if name in state}
        by_phase = counts.pop("by_phase", {})
        fits = isinstance(by_phase, Mapping) and all(
            isinstance(of_phase, list) and len(of_phase) == COUNTS for of_phase in by_phase.values()
        )
        every = [*counts.values(), *(count for of_phase in by_phase.values() for count in of_phase)] if fits else [None]
        if not all(type(count) is int for count in every):
            raise ValueError(f"the counts of a saved ledger must be integers, got {dict(state)!r:.300}")

        def take_over() -> None:
            vars(self).update(counts)
            self._by_phase = {phase: list(of_phase) for phase, of_phase in by_phase.items()}
            self.observer.start_over()

        return take_over

    def write_jsonl(self, path: str | Path) -> None:
        """Write the records kept, one JSON object per line, to a file that is replaced whole or not at all.

        Raises:
            OSError: it could not be written, and is as it was.

        Communication: none.
        """
        with replaced(path) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in self.records)
