"""One model with two optimizers, each wrapped: Muon for matrices, AdamW for all else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvd_sketch import DistributedOptimizer, LowRankConfig, recommended
from hvd_sketch.transport import LocalTransport, run_local

RANKS, STEPS, LIMIT_S = 3, 6, 60


def model_of_seed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64), nn.Linear(64, 50))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_side_by_side() -> None:
    models = [model_of_seed() for _ in range(RANKS)]
    texts = [torch.randint(50, (64,), generator=torch.Generator().manual_seed(rank)) for rank in range(RANKS)]

    def main(transport: LocalTransport) -> tuple[list[float], float, list[torch.Tensor]]:
        model = models[transport.rank]
        named = dict(model.named_parameters())
        hidden = {name: named.pop(name) for name in ("1.weight", "2.weight")}
        compression = recommended(hidden.values(), 20, RANKS, "muon")
        muon = torch.optim.Muon(hidden.values(), lr=0.02, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(named.values(), lr=0.02)
        optimizers = [
            DistributedOptimizer(muon, hidden.items(), compression=compression, transport=transport),
            DistributedOptimizer(adam, named.items(), compression=LowRankConfig(ratio=20), transport=transport),
        ]
        losses = []
        for _ in range(STEPS):
            model.zero_grad()
            text = texts[transport.rank]
            loss = nn.functional.cross_entropy(model(text), (text * 7 + 3) % 50)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(loss.detach()))
        return losses, optimizers[0].ledger.compression_ratio(), [p.detach() for p in model.parameters()]

    results = run_local(RANKS, main, LIMIT_S)
    for losses, ratio, parameters in results:
        assert losses[-1] < losses[0] - 0.3 and ratio == pytest.approx(20, rel=0.1)
        assert all(map(torch.equal, parameters, results[0][2]))
