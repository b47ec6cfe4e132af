"""SketchConfig and LowRankConfig: all choices of an exchange in one frozen, validated value."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass, replace
from math import ceil
from typing import Any, ClassVar

from hvd_sketch.checks import check_choice, check_flag, check_integer, check_number, check_positive
from hvd_sketch.wire_bytes import DENSE_BYTES, coded_bytes, step_bytes

ALL_DENSE = 1 << 62  # as dense_below: no tensor is larger
# Where the candidates come from, by the names that ``candidates`` takes.
SOURCES = {
    "sketch": "hvd_sketch.exchange.candidates.sketch.SketchCandidates",
    "heavymix": "hvd_sketch.exchange.candidates.heavymix.HeavymixCandidates",
    "nominate": "hvd_sketch.exchange.candidates.nominate.NominatedCandidates",
    "random": "hvd_sketch.exchange.candidates.random.RandomCandidates",
}
WITH_TABLE = ("sketch", "heavymix")
BITS = (4, 8, 16, 32)  # of a value on the wire
MAX_ROWS = 64  # seven estimate as well as any more at equal bytes; the time of a median grows with their square


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How gradients are compressed; must be equal on all ranks (compared at start-up).

    The defaults are what trained best at equal bytes; :meth:`paper` has the paper's.

    Attributes:
        k: coordinates updated per step. More => closer to dense, more bytes.
        cols: columns of the sketch table. More => better estimates, more bytes. Of no use without a table.
        rows: rows of the table; the estimate is their median. At equal bytes three do as well as five or
            seven and cost less.
        oversample: ``P`` of the paper: ``P * k`` candidates get an exact value before the k largest are kept.
            More => better choice, more bytes. Clamped so that ``P * k <= dim``. HEAVYMIX ignores it. At 1 nothing is
            chosen among the candidates: all are updated. Of a sketch every owner then names its own share of them.
        momentum: ``m`` in ``u <- m * u + g``, applied before the sketch on every rank. 0 keeps no ``u``.
        weight_decay: L2 coefficient, ``g <- g + weight_decay * p`` before ``u`` (by the optimizer).
        residual_decay: ``v <- residual_decay * v`` after every step. Below 1, what waits long is forgotten instead of
            sent. ``hvd_sketch.optim.SignSGD`` needs 0.95 or so, everything else 1.
        seed: of the hashes; every step has its own hash, from ``(seed, step)``.
        candidates: where the coordinates come from. ``"sketch"``: the largest estimates of the summed sketches (paper,
            Alg. 3). ``"heavymix"``: of them the heavy ones, and others at random (with momentum 0 the paper's Alg. 2).
            ``"nominate"``: every rank names its own ``k / ranks`` largest, and all of them are updated. ``"random"``:
            drawn at random, the same on every rank, for nothing: the control.
        value_bits: of a coordinate's value on the wire, 32, 16, 8 or 4. Fewer => more coordinates at equal bytes, each
            less exact. What rounding leaves out stays in the residual. Below 32, ``oversample`` must be 1.
        table_bits: of a table's cell on the wire, 32, 16, 8 or 4; rounded stochastically.
        dense_below: tensors with fewer elements are exchanged dense. The limit is 64 times as high for tensors with
            ``ndim <= 1``: biases and norms. 0: all are sketched.
        deterministic: sum in rank order on every transport, so that all give equal bits. On a GPU also call
            ``torch.use_deterministic_algorithms(True)``; otherwise atomic additions in any order make the table.
        selection: deprecated: ``candidates``, in which ``"topk"`` is ``"sketch"``.
        sketch_in_backward: deprecated, without effect.

    Raises:
        ValueError: a value out of range; the message says which and what is allowed.
    """

    k: int
    cols: int = 0
    rows: int = 3
    oversample: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    residual_decay: float = 1.0
    seed: int = 0
    candidates: str = "sketch"
    value_bits: int = 4
    table_bits: int = 4
    dense_below: int = 1024
    deterministic: bool = False
    selection: InitVar[str | None] = None
    sketch_in_backward: InitVar[bool | None] = None

    def __post_init__(self, selection: str | None, sketch_in_backward: bool | None) -> None:
        if selection is not None:
            candidates = "sketch" if selection == "topk" else selection
            warnings.warn(f"selection is deprecated: give candidates={candidates!r}", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "candidates", candidates)
        if sketch_in_backward is not None:
            warnings.warn(
                "sketch_in_backward is deprecated and without effect: no benchmark showed that it pays. Leave it out",
                DeprecationWarning,
                stacklevel=3,
            )
        check_choice("candidates", self.candidates, SOURCES)
        check_integer("rows", self.rows, 1, MAX_ROWS)
        check_integer("cols", self.cols, 1 if self.has_table else 0)
        check_integer("k", self.k, 1)
        check_integer("oversample", self.oversample, 1)
        check_number("momentum", self.momentum, below=1)
        check_number("residual_decay", self.residual_decay, most=1)
        check_choice("table_bits", self.table_bits, BITS)
        _check_shared(self)
        if self.value_bits < 32 and self.chooses:
            raise ValueError(
                f"oversample={self.oversample} chooses by exact values, which value_bits={self.value_bits} does not "
                "send: set oversample=1, or value_bits=32 (SketchConfig.paper has the paper's settings)"
            )

    @classmethod
    def for_compression(cls, ratio: float, dim: int, **overrides: Any) -> SketchConfig:
        """The paper's settings at the paper's ratio, ``2 * dim / (rows * cols + oversample * k + k)``.

        Half the floats go to the table, where there is one, the others to the candidates and the update.

        Args:
            ratio: the paper's compression ratio, above 0; indices are not counted in it, and of values in fewer bits
                the floats that have as many. HEAVYMIX counts with ``oversample`` 1.
            dim: how many coordinates are sketched (see :func:`hvd_sketch.sketched_dim`).
            **overrides: any other field. With ``cols``, k gets the rest of the floats; with ``k``, cols does,
                and without a table k is refused.

        Raises:
            ValueError: ``ratio`` not positive, ``dim`` below 1, another field out of range, or a ratio that leaves no
                column or no k.
        """
        _check_ratio(ratio, dim)
        given = cls.paper(**{"cols": 1, "k": 1, **overrides})  # refuses what is out of range
        rows = given.rows
        per_column = rows * given.table_bits / 32 if given.has_table else 0
        per_choice = ((given.oversample if given.chooses else 1) + 1) * given.value_bits / 32
        floats = 2 * dim / ratio
        if "k" in overrides and not per_column:
            raise ValueError(f"without a table k alone fixes the ratio: leave k={given.k} out of for_compression")
        if "cols" in overrides and "k" in overrides:
            raise ValueError("give at most one of cols and k to for_compression: both fix the ratio already")
        if "cols" in overrides or not per_column:
            cols = given.cols
            k = int((floats - per_column * cols) / per_choice)
        elif "k" in overrides:
            k = given.k
            cols = int((floats - per_choice * k) / per_column)
        else:
            cols, k = int(floats / 2 / per_column), int(floats / 2 / per_choice)
        k = min(k, dim)
        if cols < 1 or k < 1:
            raise ValueError(
                f"a ratio of {ratio:g} at dim {dim} leaves {floats:.0f} floats per step, not enough for {rows} "
                f"rows of at least one column and {per_choice:g} floats per updated coordinate: lower the ratio, "
                f"rows or oversample"
            )
        return cls.paper(**{**overrides, "cols": cols, "k": k})

    @classmethod
    def for_wire_ratio(
        cls, ratio: float, dim: int, ranks: int, can_split: bool = True, **overrides: Any
    ) -> SketchConfig:
        """The configuration whose steps send a ``ratio``-th of a dense ring allreduce, every byte counted.

        With a table, half of the bytes go to it. Nominations are taken to be distinct: where ranks name the same
        coordinates, fewer bytes are sent. With ``oversample`` above 1 the largest of several candidates are looked for
        by histograms, of which one is counted: the first steps take more, and with a k below some hundred most steps.
        Of HEAVYMIX all that may be needed are counted; steps with few heavy coordinates send less.

        Args:
            ratio: bytes of the dense ring over ours, above 0: what ``CommLedger.compression_ratio`` then says of these
                coordinates. Tensors that go dense are beside it: see :func:`hvd_sketch.recommended`.
            dim: how many coordinates are sketched (see :func:`hvd_sketch.sketched_dim`).
            ranks: how many there will be.
            can_split: False where the transport cannot be split (Horovod's own collectives), so that 32 ranks and more
                form no grid, in which some bytes go twice.
            **overrides: any other field, but ``k``. With ``cols``, k gets the rest of the bytes.

        Raises:
            ValueError: ``ratio`` not positive, ``dim`` or ``ranks`` below 1, another field out of range, or a ratio
                that leaves no k.
        """
        _check_ratio(ratio, dim)
        check_integer("ranks", ranks, 1)
        if "k" in overrides:
            raise ValueError("for_wire_ratio finds k: give cols, or set both in SketchConfig(cols=…, k=…)")
        budget = DENSE_BYTES * dim / ratio
        config = cls(**{"cols": ranks, **overrides, "k": 1})
        if config.has_table and "cols" not in overrides:
            cell_bytes = coded_bytes(1 << 12, config.table_bits) / (1 << 12)
            config = replace(config, cols=max(int(budget / 2 / config.rows / cell_bytes), ranks))
        least, most = 0, dim + 1  # a k that fits, and one that does not
        while most - least > 1:
            middle = (least + most) // 2
            fits = step_bytes(replace(config, k=middle), dim, ranks, can_split) <= budget
            least, most = (middle, most) if fits else (least, middle)
        if least == 0:
            needed = step_bytes(replace(config, k=1), dim, ranks, can_split)
            raise ValueError(
                f"a ratio of {ratio:g} at dim {dim} leaves {budget:.0f} bytes per step, but to update one coordinate "
                f"takes {needed:.0f}: lower the ratio, or exchange dense"
            )
        return replace(config, k=least)

    @classmethod
    def paper(cls, **settings: Any) -> SketchConfig:
        """The paper's settings: float32 values and tables, ``P = 4``, momentum 0.9 before the sketch.

        Args:
            **settings: ``cols``, ``k``, and any other field.
        """
        return cls(**{"oversample": 4, "momentum": 0.9, "value_bits": 32, "table_bits": 32, **settings})

    @property
    def has_table(self) -> bool:
        """Whether a Count Sketch travels."""
        return self.candidates in WITH_TABLE

    @property
    def chooses(self) -> bool:
        """Whether not all candidates are updated."""
        return self.oversample > 1 and self.candidates != "heavymix"

    def candidate_count(self, dim: int) -> int:
        """How many coordinates get an exact value each step: ``min(oversample * k, dim)``, or k for HEAVYMIX."""
        return min(self.oversample * self.k, dim) if self.chooses else self.k

    def paper_floats(self, dim: int) -> int:
        """``|S| + Pk + k``: floats per rank and step as the paper counts them, indices left out.

        Of a table and of values with fewer bits, the floats that have as many bits, rounded up.
        """
        table = self.rows * self.cols if self.has_table else 0
        return ceil((table * self.table_bits + (self.candidate_count(dim) + self.k) * self.value_bits) / 32)

    def paper_compression_ratio(self, dim: int) -> float:
        """``2 * dim / (|S| + Pk + k)`` (paper, section 5), for ``dim`` sketched coordinates."""
        return 2 * dim / self.paper_floats(dim)


def _check_ratio(ratio: float, dim: int) -> None:
    check_positive("ratio", ratio)
    check_integer("dim", dim)
    if dim < 1:
        raise ValueError(
            f"dim must be at least 1, got {dim}: where no tensor is large enough to be sketched, lower "
            "dense_below, or exchange dense (sketch=None)"
        )


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """PowerSGD with factors of few bits; must be equal on all ranks (compared at start-up).

    Attributes:
        ratio: bytes of a dense ring allreduce over those of the factors, from which each matrix gets its rank: at least
            1, then in turn, those with most entries per byte first. None: ``rank`` says it.
        rank: of all matrices, at most their smaller side. More => closer to dense, more bytes. None: ``ratio`` says it.
        value_bits: of a factor's entry on the wire, 32, 16, 8 or 4; also of an element of a vector, which goes whole.
        weight_decay: as in :class:`SketchConfig`.
        seed: of the first right factors.
        dense_below: as in :class:`SketchConfig`; but by default no tensor goes dense.
        deterministic: as in :class:`SketchConfig`.

    Raises:
        ValueError: a value out of range, or not exactly one of ``ratio`` and ``rank``.

    Source: Vogels et al., PowerSGD, NeurIPS 2019.
    """

    momentum: ClassVar[float] = 0.0  # the wrapped optimizer's own is the one to use

    ratio: float | None = None
    rank: int | None = None
    value_bits: int = 4
    weight_decay: float = 0.0
    seed: int = 0
    dense_below: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.rank is None):
            raise ValueError(f"give either ratio or rank, got ratio={self.ratio!r} and rank={self.rank!r}")
        if self.ratio is not None:
            check_positive("ratio", self.ratio)
        if self.rank is not None:
            check_integer("rank", self.rank, 1)
        _check_shared(self)


Compression = SketchConfig | LowRankConfig  # how an exchange compresses


def _check_shared(config: Compression) -> None:
    """The fields that all configurations have."""
    check_number("weight_decay", config.weight_decay)
    check_integer("seed", config.seed)
    check_choice("value_bits", config.value_bits, BITS)
    check_integer("dense_below", config.dense_below, 0)
    check_flag("deterministic", config.deterministic)
