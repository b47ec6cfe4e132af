"""The optimizers that step a language model after its exchange."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from hvd_sketch.optim import LagAdamW, SignSGD

Inner = Literal["adam", "lag", "sign", "sgd", "nesterov", "muon", "lion"]
Groups = list[dict[str, Any]]
MUON_MOMENTUM = 0.95


class Lion(torch.optim.Optimizer):
    """``w <- w - lr * (sign(0.9 m + 0.1 g) + weight_decay * w)``, ``m <- 0.99 m + 0.01 g``.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv:2302.06675.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                update = torch.lerp(momentum, parameter.grad, 0.1).sign_()
                momentum.lerp_(parameter.grad, 0.01)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


class MuonBesideAdam(torch.optim.Optimizer):
    """torch's Muon for the first group, matrices inside of blocks, and AdamW for all others, at one rate.

    Muon's updates are scaled so that they are as large as Adam's.
    """

    def __init__(self, groups: Groups, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._muon = torch.optim.Muon(groups[:1], lr, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
        self._adam = torch.optim.AdamW(groups[1:], lr)
        self.param_groups = self._muon.param_groups + self._adam.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self._muon.step()
        self._adam.step()


INNER: dict[Inner, Callable[[Groups], torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.AdamW, lr=0.0),
    "lag": partial(LagAdamW, lr=0.0),
    "sign": partial(SignSGD, lr=0.0),
    "sgd": partial(torch.optim.SGD, lr=0.0),
    "nesterov": partial(torch.optim.SGD, lr=0.0, momentum=0.9, nesterov=True),
    "muon": partial(MuonBesideAdam, lr=0.0),
    "lion": partial(Lion, lr=0.0),
}


def make_inner(inner: Inner, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Of all parameters of a model; its rate is set in every step. Vectors do not decay."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
    others = [p for name, p in named if p.ndim > 1 and not name.startswith("blocks.")]
    vectors = [p for _, p in named if p.ndim <= 1]
    decaying = [{"params": parameters, "weight_decay": weight_decay} for parameters in (hidden, others)]
    return INNER[inner]([*decaying, {"params": vectors, "weight_decay": 0.0}])
