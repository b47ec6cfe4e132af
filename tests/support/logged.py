"""Training that writes logs, run by tests of logs as threads and as processes."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hvd_sketch import DistributedOptimizer, LocalSteps
from hvd_sketch.logs.run_log import RunLog
from hvd_sketch.logs.step_observer import Step
from hvd_sketch.transport import Transport, local_transports
from hvd_sketch.transport.base import gather_texts
from tests.support.toy import Toy, little

STEPS, SLOW_RANK, SLOW_S = 12, 1, 0.05
SKIPPED = 4  # the step in which rank 0 has NaN
EVERY, ROUNDS = 4, 4  # of LocalSteps


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wrapped(transport: Transport | str, **places: Any) -> tuple[Toy, DistributedOptimizer]:
    model = Toy()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, DistributedOptimizer(inner, model.named_parameters(), little(), transport, **places)


def local_steps(transport: Transport, **places: Any) -> tuple[Toy, LocalSteps]:
    model = Toy()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, LocalSteps(inner, model.named_parameters(), little(), transport, every=EVERY, **places)


def train(transport: Transport, folder: str = "") -> dict[str, Any]:
    """Steps of which one rank is slow in all and one is skipped; with what only this rank knows of them."""
    folder = gather_texts(transport, folder or tempfile.mkdtemp(prefix="logged-") if transport.rank == 0 else "")[0]
    places = {"log": f"{folder}/run.jsonl", "trace": f"{folder}/trace.json", "tensorboard": f"{folder}/scalars"}
    model, optimizer = wrapped(transport, **places)
    sent = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        if step == SKIPPED and transport.rank == 0:
            assert model.bias.grad is not None
            model.bias.grad[0] = float("nan")
        time.sleep(SLOW_S * (transport.rank == SLOW_RANK))
        optimizer.log_values(loss=torch.tensor(2.0 * transport.rank + step), lr=0.5)
        optimizer.log_values(loss=2.0 * transport.rank + step + 2)
        optimizer.step()
        sent.append(optimizer.ledger.totals().wire_bytes)
    optimizer.log_values(accuracy=0.25)
    assert optimizer.exchange is not None
    norm = float(optimizer.exchange.residual.norm())
    del optimizer  # what waits is written
    transport.barrier()
    return {"folder": folder, "sent": sent, "norm": norm}


def train_local_steps(transport: Transport, folder: str) -> dict[str, Any]:
    """Rounds of which the second is thrown away and the last is half as long; what was sent up to each exchange."""
    model, optimizer = local_steps(transport, log=f"{folder}/run.jsonl", trace=f"{folder}/trace.json")
    sent = []
    for step in range(EVERY * ROUNDS - EVERY // 2):
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        if step == EVERY and transport.rank == 0:
            assert model.bias.grad is not None
            model.bias.grad[0] = float("nan")
        time.sleep(SLOW_S * (transport.rank == SLOW_RANK))
        optimizer.log_values(loss=step)
        optimizer.step()
        if step % EVERY == EVERY - 1:
            sent.append(optimizer.ledger.totals().wire_bytes)
    optimizer.sync()
    optimizer.close_logs()
    return {"sent": [*sent, optimizer.ledger.totals().wire_bytes]}


def write_long_run(path: Path, steps: int, ranks: int) -> None:
    """Logs as a run of many steps leaves them: a rank that is slow, a peak, skipped steps."""
    noise = torch.rand(steps, ranks, generator=torch.Generator().manual_seed(3)).tolist()
    for rank in range(ranks):
        log = RunLog(path, rank, {"size": ranks, "rank": rank, "compression": {"class": "SketchConfig", "k": 1000}})
        end_s = 0.0
        for number in range(steps):
            step_s = 0.02 + 0.002 * noise[number][rank] + (2.0 if number == steps // 3 else 0.0)
            end_s += step_s
            waiting_s = 0.004 * (rank != SLOW_RANK)
            phases = ("agree", "sketch", "select", "indices", "values", "back")
            log.write(
                [
                    Step(
                        number=number,
                        end_s=end_s,
                        step_s=step_s,
                        exchange_s=0.012,
                        collective_s={phase: 0.001 + waiting_s * (phase == "agree") for phase in phases},
                        sent_bytes={phase: 1000 * at for at, phase in enumerate(phases)},
                        sent_so_far=15_000 * (number + 1),
                        dense_bytes=6_000_000,
                        ratio=400.0,
                        is_skipped=number % 997 == 996,
                        values={"loss": 10 / (1 + 0.01 * number) + noise[number][rank]}
                        | ({"accuracy": 1 - 1 / (1 + number / 100)} if number % 100 == 0 else {}),
                        residual_norm=1.0 + noise[number][0] if number % 10 == 0 else None,
                        captured=0.3 if number % 10 == 0 else None,
                    )
                ]
            )
        log.close({})


def train_for_ever(path: str) -> None:
    """One rank, until it is killed."""
    model, optimizer = wrapped(local_transports(1)[0], log=path)
    for step in range(10**9):
        optimizer.zero_grad()
        model.backward(0, step)
        optimizer.log_values(loss=1.0)
        optimizer.step()
        print(step, flush=True)


if __name__ == "__main__":
    train_for_ever(sys.argv[1])
