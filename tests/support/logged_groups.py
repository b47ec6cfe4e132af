"""Training of several groups of ranks that writes logs into one folder, run by tests/ranks/test_run_log.py."""

from __future__ import annotations

from typing import Any

from torch import nn

from hvd_sketch.transport import TorchTransport
from tests.support import levels_targets
from tests.support.layers import COMPRESSIONS, loss_of
from tests.support.levels_targets import HOSTS
from tests.support.setup_targets import error_of
from tests.support.shard_targets import mesh_of, sharded
from tests.support.toy import Toy

STEPS = 3


def train_in_groups(transport: TorchTransport, folder: str) -> dict[str, Any]:
    """Two shards of two replicas, then two hosts of two ranks: what each rank sent, and what it was told."""
    places = {"log": f"{folder}/sharded.jsonl", "trace": f"{folder}/trace.json"}
    model, optimizer = sharded(mesh_of(), COMPRESSIONS["nominated"], **places)
    said = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, transport.rank, step).backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        said.append(error_of(lambda norm=norm: optimizer.log_values(norm=norm)))
        optimizer.log_values(norm=norm.full_tensor())
        optimizer.step()
    optimizer.close_logs()
    result = {"said": said, "shard": optimizer.shard_ranks.number, "sharded": optimizer.ledger.totals().wire_bytes}
    toy = Toy()
    optimizer = levels_targets.wrapped(toy, transport, HOSTS, "paper", log=f"{folder}/levels.jsonl")
    for step in range(STEPS):
        optimizer.zero_grad()
        toy.backward(transport.rank, step)
        optimizer.log_values(loss=float(transport.rank))
        optimizer.step()
    optimizer.close_logs()
    return {**result, "levels": optimizer.ledger.totals().wire_bytes}
