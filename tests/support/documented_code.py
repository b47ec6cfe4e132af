"""Runs the blocks of Python in the README and in docs/ on the ranks of a launcher, named in the first argument.

Every block runs by itself, among names that a training script has: ``model``, ``optimizer``, ``loader`` and so on. A
block after ``<!-- not run: why -->`` is only compiled, and what it takes from the package must be there. A whole script
is left to the test, which starts it by itself.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch.transport import Transport, resolve_transport

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+? -->\s*)?```python\n(.*?)```", re.DOTALL)
RANKS = 2


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        name: page and line.
        launcher: what runs it: "torch", "horovod" (over MPI), "script" (it is a whole one), "" (nothing).
    """

    name: str
    code: str
    launcher: str

    def compiled(self) -> Any:
        return compile("\n" * int(self.name.split(":")[1]) + self.code, self.name, "exec")


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            line, code = text[: found.start(2)].count("\n"), found[2]
            launcher = "horovod" if "hvd." in code or "MPITransport()" in code else "torch"
            launcher = "script" if "destroy_process_group()" in code else launcher
            yield Block(f"{page.relative_to(ROOT)}:{line}", code, "" if found[1] else launcher)


class Blocks(nn.Module):
    """150 k parameters, named as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 256)
        self.blocks = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        self.head = nn.Linear(256, 10)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(batch)))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def names(block: Block, launcher: str) -> dict[str, Any]:
    """What a script around the block has. Communication: collective, unless the block itself begins to communicate."""
    model = Blocks()
    dim = hvd_sketch.sketched_dim(model.parameters())
    compression = hvd_sketch.SketchConfig.for_wire_ratio(20, dim, RANKS)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    transport = None
    if "init_process_group" not in block.code:
        transport = begun(launcher)
        hvd_sketch.broadcast_parameters(model.state_dict(), 0, transport)
    if not re.search(r"DistributedOptimizer\(|LocalSteps\(|imulation", block.code):  # none of these wraps it
        optimizer = hvd_sketch.DistributedOptimizer(optimizer, model.named_parameters(), compression, transport)
        loss_of(model, torch.ones(2, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    loader = [torch.randn(4, 64) for _ in range(32)]
    return {
        "hvd": sys.modules.get("horovod.torch"),
        "__name__": block.name,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "DistributedOptimizer": hvd_sketch.DistributedOptimizer,
        "batch_of": lambda rank: loader[rank],
        "compression": compression,
        "config": compression,
        "dim": dim,
        "epochs": 1,
        "functools": functools,
        "gradient": torch.randn(dim),
        "hvd_sketch": hvd_sketch,
        "loader": loader,
        "loss": loss_of(model, loader[0]),
        "loss_of": loss_of,
        "model": model,
        "optimizer": optimizer,
        "rank": transport and transport.rank,
        "ranks": RANKS,
        "saved": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "scaler": torch.amp.GradScaler("cpu"),
        "simulation": hvd_sketch.Simulation(Blocks().named_parameters(), compression, ranks=RANKS),
        "sketch": compression,
        "torch": torch,
        "transport": transport,
    }


def begun(launcher: str) -> Transport:
    """The transport of a script that has begun to communicate before the block."""
    if launcher == "torch" and not dist.is_initialized():
        dist.init_process_group("gloo")
    if launcher == "horovod":
        import horovod.torch as hvd

        hvd.init()
    return resolve_transport(launcher)


def main(launcher: str) -> None:
    os.chdir(tempfile.gettempdir())
    mine = [block for block in blocks() if block.launcher == launcher]
    for block in sorted(mine, key=lambda block: "init_process_group" not in block.code):  # one that begins is the first
        exec(block.compiled(), names(block, launcher))
        if begun(launcher).rank == 0:
            print(f"ran {block.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
