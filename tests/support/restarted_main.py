"""A job that goes on from its newest checkpoint, whoever restarts it with how many ranks; run by test_elastic.py.

Arguments: a folder for checkpoints, and a file that rank 0 writes a line to for every step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from hvd_sketch import DistributedOptimizer, load_checkpoint, save_checkpoint
from hvd_sketch.transport import resolve_transport
from tests.support.toy import Toy, little

STEPS = 10_000
EVERY_S = 0.1  # slow enough for the test to follow


def main(folder: Path, told: Path) -> None:
    transport = resolve_transport("torch")
    model = Toy()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), little(), transport)
    loaded = load_checkpoint(folder, model=model, optimizer=optimizer)
    begins_at = loaded.step if loaded is not None else 0
    for step in range(begins_at, STEPS):
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        optimizer.step()
        save_checkpoint(folder, model=model, optimizer=optimizer)
        if transport.rank == 0:
            with told.open("a") as file:
                file.write(f"{transport.size} {begins_at} {step + 1}\n")
        if told.with_suffix(".end").exists():
            print(f"rank {transport.rank} of {transport.size} ends", flush=True)
            break
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
