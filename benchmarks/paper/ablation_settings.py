"""What the ablations compare: groups of settings that each vary one thing about :meth:`Budget.base`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import lcm
from typing import Any

from benchmarks.paper.variants import PAPER, Variant
from hvd_sketch import SketchConfig
from hvd_sketch.kernels.selection import histogram_bins
from hvd_sketch.ledger import RING_PASSES
from hvd_sketch.wire_bytes import all_sums_travel

RATIO = 40  # what the base aims at, in the paper's count
OVERSAMPLE = 4
MOMENTUM = 0.9
ROWS = range(1, 8)
OVERSAMPLES = (1, 2, 4, 6, 8)
AT_EQUAL_BYTES = (1, 2, 4, 5, 6)  # a larger P would leave no table
K_FACTORS = (0.25, 1, 4, 16, 64)  # of the base's k
BYTES_PER_CHOICE = 1 + 4 + 4  # of HEAVYMIX: an index, its exact sum to the owner, and from there to all
NO_MOMENTUM = Variant(momentum="none")


@dataclass(frozen=True)
class Setting:
    """One way to exchange gradients."""

    config: SketchConfig  # ``momentum`` is the factor, wherever the variant applies it; the seed is that of the run
    # departures from the paper's algorithm; their default in the ablations is no momentum
    variant: Variant = NO_MOMENTUM
    method: str = "sketched"  # one of :data:`benchmarks.paper.model_exchange.METHODS`

    def with_config(self, **fields: Any) -> Setting:
        return replace(self, config=replace(self.config, **fields))

    def with_variant(self, **fields: Any) -> Setting:
        return replace(self, variant=replace(self.variant, **fields))

    @property
    def name(self) -> str:
        """Equal for equal settings of one model: what runs are known by."""
        c, v = self.config, self.variant
        choice = f"P {c.oversample}" if c.candidates == "sketch" else c.candidates
        size = {"dense": [], "true_topk": [f"k {c.k}"]}.get(self.method, [f"{c.rows} x {c.cols}", f"k {c.k}", choice])
        departures = {
            f"momentum {v.momentum}": v.momentum != "none",
            "unmasked": not v.masking,
            "fixed hashes": not v.fresh_hashes,
            v.table_dtype: v.table_dtype != "float32",
        }
        return ", ".join([self.method, *size, *(name for name, departs in departures.items() if departs)])

    @property
    def is_real(self) -> bool:
        """Whether the library can do it: not all variants exist outside the simulation."""
        return self.method in ("dense", "sketched") and self.variant in (PAPER, NO_MOMENTUM)

    def library_config(self, seed: int) -> SketchConfig:
        """For the exchanges: momentum 0 where there is none, sums in rank order."""
        momentum = 0.0 if self.variant.momentum == "none" else self.config.momentum
        return replace(self.config, momentum=momentum, seed=seed, deterministic=True)

    def described(self) -> dict[str, Any]:
        """All fields, for JSON."""
        config = {name: getattr(self.config, name) for name in ("rows", "cols", "k", "oversample", "candidates")}
        return {"method": self.method, **config, "momentum_factor": self.config.momentum, **asdict(self.variant)}


Group = dict[str, Setting]  # by the label that a figure shows


@dataclass(frozen=True)
class Budget:
    """The floats that one step may send, and how all groups spend them."""

    dim: int  # how many coordinates are sketched
    workers: int  # among whom: the columns are a multiple of their number

    @property
    def _unit(self) -> int:
        """Tables are multiples of it, so that 1 to 7 rows and every share of P divide them without a rest."""
        return lcm(*ROWS) * self.workers

    @property
    def table(self) -> int:
        """|S| of the base, in floats: half of the budget."""
        return max(1, round(self.dim / RATIO / self._unit)) * self._unit

    @property
    def k(self) -> int:
        """Of the base: Pk + k are the other half."""
        return self.table // (OVERSAMPLE + 1)

    def base(self) -> Setting:
        return Setting(
            SketchConfig.paper(rows=3, cols=self.table // 3, k=self.k, oversample=OVERSAMPLE, momentum=MOMENTUM)
        )

    def baselines(self) -> Group:
        """What the others are read against."""
        base, dense = self.base(), replace(self.base(), method="dense")
        momentum, true_topk = dense.with_variant(momentum="before"), replace(base, method="true_topk")
        return {"dense": dense, "dense, momentum": momentum, "true top-k": true_topk, "sketched": base}

    def hashes(self) -> Group:
        """Fresh in every step, or those of the first step for ever."""
        base = self.base()
        momenta = {"no momentum": base, "momentum": base.with_variant(momentum="before")}
        ways = {"fresh": True, "fixed": False}
        return {f"{w}, {m}": s.with_variant(fresh_hashes=ways[w]) for w in ways for m, s in momenta.items()}

    def rows(self) -> Group:
        """Equal bytes: rows times columns is constant."""
        return {str(rows): self.base().with_config(rows=rows, cols=self.table // rows) for rows in ROWS}

    def momentum(self) -> Group:
        """Where momentum is applied, and whether u is zeroed where v was sent (which exists before the sketch only)."""
        before = self.base().with_variant(momentum="before")
        return {
            "none": self.base(),
            "before, masked": before,
            "before, not masked": before.with_variant(masking=False),
            "after": self.base().with_variant(momentum="after"),
        }

    def share(self) -> Group:
        """Equal floats by the paper's count: |S| + Pk is constant, and so is k."""
        spent = self.table + OVERSAMPLE * self.k
        return self._shares({oversample: spent - oversample * self.k for oversample in OVERSAMPLES})

    def share_of_bytes(self) -> Group:
        """The same at equal bytes: while candidates are few, all their sums go back to all ranks."""
        spent = choice_bytes(self.base().config, self.dim)
        others = {
            p: spent - choice_bytes(self.base().with_config(oversample=p).config, self.dim) for p in AT_EQUAL_BYTES
        }
        return self._shares({oversample: self.table + spare // 4 for oversample, spare in others.items()})

    def _shares(self, tables: dict[int, int]) -> Group:
        """From P and the floats of the table; P that leave no table are left out."""
        cols = {oversample: table // (3 * self.workers) * self.workers for oversample, table in tables.items()}
        return {f"P {p}": self.base().with_config(oversample=p, cols=c) for p, c in cols.items() if c > 0}

    def heavymix(self) -> Group:
        """Equal bytes: what top-Pk spends on candidates goes into k, or into the table."""
        base = self.base()
        heavymix = base.with_config(candidates="heavymix")
        spent = choice_bytes(base.config, self.dim)
        spare = spent - choice_bytes(heavymix.config, self.dim)
        columns = spare // (4 * 3 * self.workers) * self.workers
        return {
            "top-Pk": base,
            "HEAVYMIX, larger k": heavymix.with_config(k=spent // BYTES_PER_CHOICE),
            "HEAVYMIX, larger table": heavymix.with_config(cols=base.config.cols + columns),
        }

    def wire(self) -> Group:
        """Tables in 16 bits: of as many cells, which saves bytes, and of twice as many, at equal bytes."""
        base = self.base()
        group = {"float32": base}
        for name in ("float16", "bfloat16"):
            rounded = base.with_variant(table_dtype=name)
            group[f"{name}, same size"] = rounded
            group[f"{name}, same bytes"] = rounded.with_config(cols=2 * base.config.cols)
        return group

    def k_to_d(self) -> Group:
        """Momentum before the sketch. At k = d masking leaves plain SGD, and no masking leaves momentum SGD."""
        ks = [*(int(factor * self.k) for factor in K_FACTORS if factor * self.k < self.dim), self.dim]
        before = self.base().with_variant(momentum="before")
        ways = {"masked": before, "not masked": before.with_variant(masking=False)}
        return {f"{k}, {way}": setting.with_config(k=k) for way, setting in ways.items() for k in ks}


GROUPS: dict[str, Callable[[Budget], Group]] = {
    "baselines": Budget.baselines,
    "hashes": Budget.hashes,
    "rows": Budget.rows,
    "momentum": Budget.momentum,
    "share": Budget.share,
    "share_of_bytes": Budget.share_of_bytes,
    "heavymix": Budget.heavymix,
    "wire": Budget.wire,
    "k": Budget.k_to_d,
}


def choice_bytes(config: SketchConfig, dim: int) -> int:
    """Payload of a step beside its table: candidates, their exact sums, and what is kept, its threshold looked for.

    An index is coded in about one byte. HEAVYMIX keeps all its candidates; it codes the heavy ones only.
    """
    candidates = config.candidate_count(dim)
    by_choice = candidates // 8 + 4 * config.k + RING_PASSES["allreduce"] * 4 * histogram_bins(config.k)
    returned = 4 * candidates if all_sums_travel(candidates, config.k) else by_choice
    return candidates + 4 * candidates + returned
