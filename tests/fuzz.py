"""Random configurations and gradients on 1 to 7 ranks: ``python -m tests.fuzz --cases 10000``.

Of every case: no rank fails, all ranks get the same bits, nothing is lost (sent + kept = produced), also where a state
is saved and loaded in between, and what is not finite changes nothing. Half of the cases of 4 and 6 ranks have a grid.
A case follows from its number alone: ``--first N --cases 1`` runs it again.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hvd_sketch import (
    DenseAllreduce,
    DistributedOptimizer,
    LocalSteps,
    LowRankAllreduce,
    LowRankConfig,
    SketchConfig,
    SketchedAllreduce,
    rank_grid,
)
from hvd_sketch.config import SOURCES, Compression
from hvd_sketch.exchange.base import Exchange, SparseUpdate
from hvd_sketch.model import levels
from hvd_sketch.transport import LocalTransport, run_local
from hvd_sketch.transport.grid import in_grid

MOST_RANKS, MOST_DIM, MOST_STEPS, LIMIT_S = 7, 3000, 5, 60
KINDS = ("sketched", "low rank", "dense", "optimizer", "two levels", "local steps")
OF_MODELS = KINDS[3:]
INNER = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
_here = threading.local()  # the host of a rank
GRADIENTS = ("normal", "heavy tail", "zero", "one", "whole", "equal", "opposite", "tiny", "huge", "largest", "bad")


@dataclass(frozen=True)
class Case:
    """What one case does.

    Attributes:
        kind: of KINDS; those OF_MODELS are of a whole model.
        compression: of the exchange; None: dense, without momentum.
        shapes: of the tensors.
        gradients: of every step, by name.
        resumes_at: the step before which a new exchange takes over the state of the old one.
        inner: the wrapped optimizer, of INNER.
        joins: whether ranks have different numbers of batches.
    """

    seed: int
    ranks: int
    kind: str
    compression: Compression | None
    shapes: tuple[tuple[int, ...], ...]
    gradients: tuple[str, ...]
    resumes_at: int
    dtype: torch.dtype
    inner: str
    joins: bool

    @property
    def dim(self) -> int:
        return sum(map(prod, self.shapes))

    @classmethod
    def of(cls, seed: int) -> Case:
        """The case of a number."""
        draw = random.Random(seed)
        kind = draw.choice((*["sketched"] * 3, *KINDS[1:]))
        shapes = tuple(_shape(draw) for _ in range(draw.randint(1, 4)))
        dim = sum(map(prod, shapes))
        compression: Compression | None = None
        if kind == "low rank" or (kind in OF_MODELS and draw.random() < 0.3):
            compression = LowRankConfig(rank=draw.randint(1, 5), value_bits=_bits(draw), **_shared(draw))
        elif kind == "sketched" or (kind in OF_MODELS and draw.random() < 0.8):
            compression = _sketch(draw, dim)
        gradients = tuple(draw.choice(GRADIENTS) for _ in range(draw.randint(1, MOST_STEPS)))
        dtype = draw.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
        resumes_at = draw.randint(0, MOST_STEPS)
        ranks, inner, joins = draw.randint(1, MOST_RANKS), draw.choice(list(INNER)), draw.random() < 0.3
        has_momentum = kind in OF_MODELS and (inner == "Adam" or kind == "local steps")  # of its own
        if has_momentum and isinstance(compression, SketchConfig):
            compression = replace(compression, momentum=0.0)
        return cls(seed, ranks, kind, compression, shapes, gradients, resumes_at, dtype, inner, joins)

    def run(self) -> str:
        """What came of it: "passed", or "refused" by every rank with the same words.

        Raises AssertionError where something is wrong, and what a rank fails with.
        """
        main = self._train if self.kind in OF_MODELS else self._exchange
        grid_ranks = 4 if self.seed % 4 < 2 else rank_grid.GRID_RANKS
        with (
            patch.object(levels, "host_name", lambda: f"host {_here.host}"),  # all ranks are threads of one host
            patch.object(rank_grid, "GRID_RANKS", grid_ranks),
        ):
            heard = run_local(self.ranks, lambda transport: _refusal_or(main, transport), LIMIT_S)
        refusals = {told for told, _ in heard}
        assert len(refusals) == 1, f"some ranks refuse: {refusals}"
        if refusals != {""}:
            return "refused"
        results = [result for _, result in heard]
        for rank, result in enumerate(results):
            assert len(result) == len(results[0]) and all(map(_same_bits, result, results[0])), f"rank {rank} differs"
        return "passed"

    def _exchange(self, transport: LocalTransport) -> list[Tensor]:
        """The updates of an exchange, which are checked against what is left on the ranks."""
        exchange = self._build(transport)
        updates: list[Tensor] = []
        for step, name in enumerate(self.gradients):
            if step == self.resumes_at:
                saved, exchange = exchange.state_dict(), self._build(transport)
                exchange.load_state_dict(saved)
            gradient = gradient_of(name, self.dim, transport.rank, self.seed + step)
            before = exchange.residual.double(), exchange.velocity.double()
            resets = exchange.reset_coordinates
            update = exchange.step(gradient)
            self._check(update)
            if name == "bad":
                assert update.skipped, "a bad gradient was not skipped"
                after = exchange.residual.double(), exchange.velocity.double()
                assert all(map(torch.equal, before, after)), "a skipped step has changed u or v"
                continue
            assert not update.skipped, "a good gradient was skipped"
            has_reset = transport.allgather(torch.tensor([exchange.reset_coordinates - resets])).any()
            if not has_reset and self.compression is not None:
                self._check_nothing_is_lost(transport, before, gradient, update, exchange.residual)
            updates += [update.values] if update.indices is None else [update.indices, update.values]
        return updates

    def _build(self, transport: LocalTransport) -> Exchange:
        over = in_grid(transport)
        if isinstance(self.compression, SketchConfig):
            return SketchedAllreduce(self.compression, self.dim, over)
        if isinstance(self.compression, LowRankConfig):
            return LowRankAllreduce(self.compression, self.dim, over, shapes=self.shapes)
        return DenseAllreduce(None, self.dim, over)

    def _check(self, update: SparseUpdate) -> None:
        assert bool(torch.isfinite(update.values).all()), "an update is not finite"
        if update.indices is None:
            assert update.values.shape == (self.dim,)
            return
        assert update.indices.shape == update.values.shape
        assert bool((update.indices.diff() > 0).all()), "indices do not ascend"
        assert not update.indices.numel() or (update.indices[0] >= 0 and update.indices[-1] < self.dim)

    def _check_nothing_is_lost(
        self, t: LocalTransport, before: tuple[Tensor, Tensor], gradient: Tensor, update: SparseUpdate, left: Tensor
    ) -> None:
        """Over the ranks: what was in v and came to it is what was sent and is left, up to float32's rounding."""
        v, u = before
        config = self.compression
        assert config is not None
        terms = torch.stack([v, config.momentum * u, gradient.double()])
        decay = getattr(config, "residual_decay", 1.0)
        every = t.allgather(torch.stack([terms.sum(0), terms.abs().sum(0), left.double()]).unsqueeze(0))
        produced, size, kept = every.sum(0)
        sent = torch.zeros(self.dim, dtype=torch.float64)
        sent[update.indices if update.indices is not None else slice(None)] = update.values.double() * t.size
        # Codes and factors stand for a little of the largest value beside, and so does what they leave.
        beside = 1e-6 * size.max() if config.value_bits < 32 or self.kind == "low rank" else 0.0
        allowed = 1e-5 * size + beside + 1e-29 * t.size
        # A residual that has overflowed is found, counted and reset when it is looked at.
        overflowed = ~torch.isfinite(kept) & (size > torch.finfo(torch.float32).max)
        missing = ((decay * (produced - sent) - kept).abs() - allowed).masked_fill(overflowed, 0.0)
        worst = int(missing.argmax())
        assert missing[worst] <= 0, (
            f"coordinate {worst}: {produced[worst]:g} was produced, {sent[worst]:g} sent, {kept[worst]:g} is kept"
        )

    def _train(self, transport: LocalTransport) -> list[Tensor]:
        """The parameters of a model after some steps. Every rank leaves out some gradients."""
        draw = random.Random(f"{self.seed} {transport.rank}")
        model = nn.ParameterList([torch.zeros(shape, dtype=self.dtype) for shape in self.shapes])
        optimizer = self._wrap(transport, model)
        own_steps = draw.randint(0, len(self.gradients)) if self.joins else len(self.gradients)
        with optimizer.join() if self.joins else nullcontext():
            for step, name in enumerate(self.gradients[:own_steps]):
                optimizer.zero_grad()
                flat = gradient_of(name, self.dim, transport.rank, self.seed + step)
                parts = flat.split([parameter.numel() for parameter in model])
                for parameter, part in zip(model, parts, strict=True):
                    if draw.random() < 0.8:
                        parameter.grad = part.view_as(parameter).to(self.dtype)
                optimizer.step()
                if step == self.resumes_at and not self.joins:
                    is_consolidated = self.seed % 2 == 0 and self.kind != "local steps"  # of whole rounds only
                    optimizer.load_state_dict(optimizer.state_dict(consolidated=is_consolidated))
        if isinstance(optimizer, LocalSteps):
            optimizer.sync()
        return [parameter.detach().clone() for parameter in model]

    def _wrap(self, transport: LocalTransport, model: nn.Module) -> DistributedOptimizer | LocalSteps:
        inner = INNER[self.inner](model.parameters(), lr=2.0**-7)
        if self.kind == "local steps":
            return LocalSteps(inner, None, self.compression, transport, every=1 + self.seed % 3)
        _here.host = random.Random(f"host {self.seed} {transport.rank}").randrange(3)
        number = 2 if self.kind == "two levels" else 1
        return DistributedOptimizer(inner, None, self.compression, transport, levels=number)


def gradient_of(name: str, dim: int, rank: int, seed: int) -> Tensor:
    """A gradient of one kind, float32 [dim]."""
    own, common = (torch.Generator().manual_seed(1000 * seed + number) for number in (rank, 999))
    normal = torch.randn(dim, generator=own)
    if name == "heavy tail":
        return normal.pow(3) / normal.roll(1).abs().clamp(min=1e-3)
    if name == "zero":
        return torch.zeros(dim)
    if name == "one":
        return torch.zeros(dim).index_fill_(0, torch.tensor([(seed + rank) % dim]), 1.0)
    if name == "whole":
        return normal.mul(2).round()
    if name == "equal":
        return torch.randn(dim, generator=common)
    if name == "opposite":
        return torch.randn(dim, generator=common) * (-1) ** rank
    if name == "bad":
        value = (float("nan"), float("inf"), -float("inf"))[seed % 3]
        return normal.index_fill_(0, torch.tensor([seed % dim]), value) if rank == 0 else normal
    return normal * {"normal": 1.0, "tiny": 1e-38, "huge": 1e30, "largest": 5e37}[name]


def _refusal_or(main: Any, transport: LocalTransport) -> tuple[str, list[Tensor]]:
    """The words of a ValueError and nothing, or no words and the result."""
    try:
        return "", main(transport)
    except ValueError as error:
        told = re.sub(r"^rank \d of \d could not be set up: ", "", str(error))
        return told.replace(f"rank {transport.rank}", "rank …"), []


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return not left.numel() or torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (left, right)))


def _shape(draw: random.Random) -> tuple[int, ...]:
    dim = int(MOST_DIM ** draw.random())
    if draw.random() < 0.4:
        return (dim,)
    rows = draw.randint(1, dim)
    return (rows, max(dim // rows, 1)) if draw.random() < 0.8 else (rows, max(dim // rows, 1), 1)


def _bits(draw: random.Random) -> int:
    return draw.choice((4, 8, 16, 32))


def _shared(draw: random.Random) -> dict[str, Any]:
    return {
        "seed": draw.randint(0, 99),
        "deterministic": draw.random() < 0.3,
        "dense_below": draw.choice((0, 0, 50, 1024)),
        "weight_decay": draw.choice((0.0, 0.0, 0.1)),
    }


def _sketch(draw: random.Random, dim: int) -> SketchConfig:
    value_bits = _bits(draw)
    return SketchConfig(
        k=draw.randint(1, max(1, int(dim ** draw.random()))),
        cols=int((2 * dim) ** draw.random()),
        rows=draw.randint(1, 7),
        oversample=draw.randint(1, 8) if value_bits == 32 else 1,
        momentum=draw.choice((0.0, 0.5, 0.9)),
        residual_decay=draw.choice((1.0, 1.0, 0.95)),
        candidates=draw.choice(list(SOURCES)),
        value_bits=value_bits,
        table_bits=_bits(draw),
        **_shared(draw),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (default: 0)")
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="no new case after so many")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    outcomes: Counter[str] = Counter()
    start_s = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.cases):
        if time.monotonic() - start_s > arguments.seconds:
            break
        case = Case.of(seed)
        try:
            outcomes[case.run()] += 1
        except Exception as error:
            outcomes["failed"] += 1
            print(f"{case}\n  {type(error).__name__}: {error}\n  again: python -m tests.fuzz --first {seed} --cases 1")
    done = sum(outcomes.values())
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"cases {arguments.first} to {arguments.first + done - 1}: {told}, in {time.monotonic() - start_s:.0f} s")
    sys.exit(outcomes["failed"] > 0)


if __name__ == "__main__":
    main()
