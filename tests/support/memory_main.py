"""Prints, as JSON, the memory of a training by random coordinates into SignSGD, in bytes per parameter."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import peak_memory_of
from hvd_sketch import DistributedOptimizer, SketchConfig, recommended
from hvd_sketch.optim import SignSGD
from hvd_sketch.transport import local_transports

RATIO, COLS, TENSORS = 60, 1000, 10


def parameters(rows: int) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(rows, COLS)) for _ in range(TENSORS)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def trained(own: list[nn.Parameter]) -> tuple[DistributedOptimizer, int]:
    """With its first steps made; and how many coordinates a step updates."""
    config = recommended(own, RATIO, 4, "signsgd")
    assert isinstance(config, SketchConfig)
    optimizer = DistributedOptimizer(SignSGD(own, 1e-3), None, config, local_transports(1)[0])
    for _ in range(3):
        optimizer.step()
    return optimizer, config.k


def resident_bytes() -> int:
    """Without what was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    trained(parameters(100))  # what is loaded and compiled once
    own = parameters(800)
    total = sum(map(Tensor.numel, own))
    before = resident_bytes()
    optimizer, k = trained(own)
    kept = resident_bytes() - before
    peak = peak_memory_of(optimizer.step, torch.device("cpu")) or 0
    print(json.dumps({"held": kept / total, "in_a_step": peak / total, "updated": k / total}))


if __name__ == "__main__":
    main()
