"""What all experiments share: the loop with its progress bar, JSONL log, checkpoints and results file."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks.machine import describe_machine
from hvd_sketch import CommLedger
from hvd_sketch.files import append_lines, replaced
from hvd_sketch.transport import Transport

Labels = Mapping[str, str | int | float]
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


@dataclass(frozen=True)
class Traffic:
    """Mean wire bytes that one rank sends per step, and how much less that is than a dense ring allreduce."""

    wire_bytes_per_step: float | None  # None for a method that exists in a simulation only
    compression_ratio: float | None  # every byte counted; None likewise
    paper_compression_ratio: float  # ``2 d / (|S| + Pk + k)``; indices and histograms are not counted

    @staticmethod
    def of(ledger: CommLedger, exchanges: int = 1) -> Traffic:
        """Of all steps that ``exchanges`` have recorded together."""
        totals = ledger.totals()
        per_step = totals.wire_bytes / max(totals.steps / exchanges, 1)
        return Traffic(per_step, ledger.compression_ratio(), ledger.paper_compression_ratio())


class Training(Protocol):
    """One training under way. What several ranks do together they do in the same order."""

    def step(self) -> float:
        """One step; the loss of this process' batches before it. Communication: collective."""

    def measure(self) -> dict[str, float]:
        """Losses and errors by name. Communication: none; rank 0 alone is asked."""

    def traffic(self) -> Traffic:
        """Of the steps so far. Communication: none."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's own; going on from it gives equal bits. Communication: none."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that all ranks heed after the same step."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)  # the second ends the process at once

    def agreed(self, transport: Transport) -> bool:
        """Whether any rank was asked. Communication: one tiny allreduce."""
        return bool(transport.allreduce_(torch.tensor([int(self._asked)])))


class Session:
    """All runs of one call of an experiment: finished ones are in the results file, one may be in a checkpoint.

    Args:
        arguments: those of every experiment.
        settings: what figures depend on beside the labels of a run; must be the same when resuming.
        transport: rank 0 writes the results and the log, every rank its own checkpoint.

    Raises:
        ValueError: resuming under other settings, or where nothing was begun.
    """

    def __init__(
        self, arguments: argparse.Namespace, experiment: str, settings: Mapping[str, Any], transport: Transport
    ) -> None:
        self._path, self._every, self._transport = arguments.json, arguments.checkpoint_every, transport
        self._stop = StopRequest()
        self._log = self._path.with_suffix(".log.jsonl")
        self._checkpoint = checkpoint_path(self._path, transport.rank)
        device = getattr(arguments, "device", torch.device("cpu"))
        about = {**describe_machine(device), "cores": os.cpu_count(), "command": _command()}
        self._results: dict[str, Any] = {"experiment": experiment, "settings": dict(settings), **about, "runs": []}
        if arguments.resume:
            self._take_up()
        else:
            self._checkpoint.unlink(missing_ok=True)
            if transport.rank == 0:
                self._log.unlink(missing_ok=True)
        transport.barrier()  # nobody writes before all have read
        self._write()  # the settings, for a resumption

    def _take_up(self) -> None:
        """Keep the runs that were finished before the interruption."""
        if not self._path.exists():
            raise ValueError(f"--resume: there is no {self._path} to go on from")
        saved = json.loads(self._path.read_text())
        for what in ("experiment", "settings"):
            if saved.get(what) != self._results[what]:
                raise ValueError(
                    f"--resume: {self._path} has the {what} {saved.get(what)}, this call {self._results[what]}: "
                    f"repeat the arguments, or name another --json"
                )
        self._results["runs"] = saved["runs"]

    def run(
        self, labels: Labels, make: Callable[[], Training], steps: int, record_at: Collection[int]
    ) -> dict[str, Any]:
        """Train unless the results have it already; measure after every step of ``record_at``, counted from 1.

        Communication: collective. Ends the process with status 130 after Ctrl-C, with a checkpoint.

        Returns:
            What the results have of it. Measurements are rank 0's alone, of this call or one that it resumes.
        """
        labels = {**labels, "steps": steps}
        if before := self.find(labels):
            return before
        training, done, seconds, curve = make(), 0, 0.0, list[dict[str, float]]()
        if saved := self._load_checkpoint(labels):
            training.load_state_dict(saved["training"])
            done, seconds, curve = saved["done"], saved.get("seconds", 0.0), saved["curve"]
        started, rank = time.perf_counter() - seconds, self._transport.rank
        shown = {"desc": " ".join(map(str, labels.values())), "unit": "step", "disable": rank != 0}
        with tqdm(total=steps, initial=done, mininterval=0.5, **shown) as bar:
            while done < steps:
                loss = training.step()
                done += 1
                bar.update()
                per_step = training.traffic().wire_bytes_per_step
                sent_bytes = None if per_step is None else done * per_step
                megabytes = "–" if sent_bytes is None else f"{sent_bytes / 1e6:.1f}"
                bar.set_postfix(loss=f"{loss:.4f}", MB=megabytes, refresh=False)
                if done in record_at and rank == 0:
                    curve.append({"step": done, **training.measure()})
                    self._write_log({**labels, "batch_loss": loss, "wire_bytes": sent_bytes, **curve[-1]})
                seconds = time.perf_counter() - started
                self._save_if_due({**self._about(labels), "done": done, "seconds": seconds, "curve": curve}, training)
        final = curve[-1] if curve else {}  # rank 0 has it
        figures = {"commit": self._results.get("commit"), "seconds": seconds, "final": final, "curve": curve}
        run = self.add(labels, **asdict(training.traffic()), **figures)
        self._checkpoint.unlink(missing_ok=True)
        return run

    def _about(self, labels: Labels) -> dict[str, Any]:
        """What a checkpoint must say to be of this run."""
        return {"labels": dict(labels), "ranks": self._transport.size}

    def _load_checkpoint(self, labels: Labels) -> dict[str, Any] | None:
        """This rank's, if all have one of the same step of this run: a job that was killed may leave others.

        Communication: collective.
        """
        saved = torch.load(self._checkpoint, map_location="cpu") if self._checkpoint.exists() else {}
        is_of_this_run = self._about(labels).items() <= saved.items()
        done = torch.tensor([saved["done"] if is_of_this_run else 0])
        is_everywhere = bool((self._transport.allgather(done) == done).all())
        return saved if is_of_this_run and is_everywhere else None

    def find(self, labels: Labels) -> dict[str, Any] | None:
        """The finished run with these labels."""
        return next((run for run in self._results["runs"] if labels.items() <= run.items()), None)

    def add(self, labels: Labels, **figures: Any) -> dict[str, Any]:
        """Keep a finished run, and return it; the file is whole at any time."""
        run = {**labels, **figures}
        self._results["runs"].append(run)
        self._write()
        return run

    def _write(self) -> None:
        if self._transport.rank == 0:
            with replaced(self._path) as draft:
                draft.write_text(_one_run_per_line(self._results))

    def _save_if_due(self, state: dict[str, Any], training: Training) -> None:
        stopping = self._stop.agreed(self._transport)
        if stopping or state["done"] % self._every == 0:
            whole = {**state, "training": training.state_dict()}
            with replaced(self._checkpoint) as draft:
                torch.save(whole, draft)
                # Nobody gives up its last one before all have this one: mpirun kills ranks a second after Ctrl-C.
                self._transport.barrier()
        if stopping:
            self._write_log({**state["labels"], "step": state["done"], "event": "interrupted"})
            sys.exit(INTERRUPTED)

    def _write_log(self, line: Mapping[str, Any]) -> None:
        if self._transport.rank == 0:
            append_lines(self._log, [json.dumps(line)])


def _one_run_per_line(results: Mapping[str, Any]) -> str:
    """JSON that diffs well."""
    head = json.dumps({**results, "runs": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n  " + ",\n  ".join(map(json.dumps, results["runs"])) + "\n ]\n}\n"


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python -m", spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]])


def logarithmic(steps: int, per_decade: int = 10) -> set[int]:
    """Step numbers evenly spaced on a logarithmic axis, from 1 to ``steps``, both included."""
    wanted = (round(10 ** (i / per_decade)) for i in range(20 * per_decade))
    return {step for step in wanted if step <= steps} | {steps}


def checkpoint_path(results: Path, rank: int) -> Path:
    """Of a rank, beside the results."""
    return results.with_suffix(f".checkpoint{rank}")
