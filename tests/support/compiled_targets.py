"""What test_compiled.py runs on every rank: compiled models and compiled optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch import DDPState, DistributedOptimizer, ddp_hook
from hvd_sketch.config import Compression
from hvd_sketch.transport import Transport
from tests.support.layers import COMPRESSIONS, build, loss_of
from tests.support.toy import flat


def trained(
    transport: Transport,
    compression: Compression | None,
    compiled: Callable[[Any], Any],
    in_ddp: bool = False,
) -> Tensor:
    """Parameters after a few steps; ``compiled`` is done to the model and to the step."""
    model: nn.Module = build()
    model = DistributedDataParallel(model) if in_ddp else model
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), compression, transport, check_every=1)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(DDPState(model, optimizer), ddp_hook)
    forward, step = compiled(model), compiled(optimizer.step)
    for number in range(4):
        optimizer.zero_grad()
        loss_of(forward, transport.rank, number).backward()
        step()
    return flat(model)


def compiles(transport: Transport, names: list[str], in_ddp: bool = False) -> dict[str, Any]:
    """Parameters of compiled and of plain trainings, by compression; and which calls broke graphs."""
    results: dict[str, Any] = {}
    for name in names:
        compression = COMPRESSIONS[name]
        torch._dynamo.reset()
        counters.clear()
        ours = trained(transport, compression, lambda call: torch.compile(call, backend="aot_eager"), in_ddp)
        results[name] = {
            "compiled": ours,
            "plain": trained(transport, compression, lambda call: call, in_ddp),
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": [reason for reason in counters["graph_break"] if "torch.compiler.disable" in reason],
        }
    return results
