"""SketchConfig: all choices of the exchange in one frozen, validated value."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass
from typing import Any

ALL_DENSE = 1 << 62  # as dense_below: no tensor is larger
# Where the candidates come from, by the names that ``selection`` takes.
SOURCES = {
    "topk": "hvd_sketch.exchange.candidates.sketch.SketchCandidates",
    "heavymix": "hvd_sketch.exchange.candidates.heavymix.HeavymixCandidates",
}


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How gradients are compressed; must be equal on all ranks (compared at start-up).

    Attributes:
        cols: columns of the sketch table. More => better estimates, more bytes.
        k: coordinates updated per step. More => closer to dense, more bytes.
        rows: rows of the table; the estimate is their median. At equal bytes three do as well as five or
            seven and cost less.
        oversample: ``P`` of the paper: ``P * k`` candidates get an exact value before the k largest are kept.
            More => better choice, more bytes. Clamped so that ``P * k <= dim``. HEAVYMIX ignores it.
        momentum: ``m`` in ``u <- m * u + g``, applied before the sketch on every rank. 0 keeps no ``u``.
        weight_decay: L2 coefficient, ``g <- g + weight_decay * p`` before ``u`` (by the optimizer).
        seed: of the hashes; every step has its own hash, from ``(seed, step)``.
        selection: ``"topk"`` is Alg. 3 of the paper, ``"heavymix"`` with momentum 0 its Alg. 2.
        dense_below: tensors with fewer elements are exchanged dense. The limit is 64 times as high for tensors with
            ``ndim <= 1``: biases and norms. 0: all are sketched.
        deterministic: sum in rank order on every transport, so that all give equal bits. On a GPU also call
            ``torch.use_deterministic_algorithms(True)``; otherwise atomic additions in any order make the table.
        sketch_in_backward: deprecated, without effect.

    Raises:
        ValueError: a value out of range; the message says which and what is allowed.
    """

    cols: int
    k: int
    rows: int = 3
    oversample: int = 4
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    selection: str = "topk"
    dense_below: int = 1024
    deterministic: bool = False
    sketch_in_backward: InitVar[bool | None] = None

    def __post_init__(self, sketch_in_backward: bool | None) -> None:
        if sketch_in_backward is not None:
            warnings.warn(
                "sketch_in_backward is deprecated and without effect: no benchmark showed that it pays. Leave it out",
                DeprecationWarning,
                stacklevel=3,
            )
        for name, least in {"rows": 1, "cols": 1, "k": 1, "oversample": 1, "dense_below": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.selection not in SOURCES:
            raise ValueError(f"selection must be one of {', '.join(map(repr, SOURCES))}, got {self.selection!r}")

    @classmethod
    def for_compression(cls, ratio: float, dim: int, **overrides: Any) -> SketchConfig:
        """The configuration that meets the paper's ``2 * dim / (rows * cols + oversample * k + k)``.

        Half the floats go to the table, half to the candidates and the update.

        Args:
            ratio: the paper's compression ratio, above 0; indices are not counted in it. HEAVYMIX counts with
                ``oversample`` 1.
            dim: how many coordinates are sketched (see :func:`hvd_sketch.sketched_dim`).
            **overrides: any other field. With ``cols``, k gets the rest of the floats; with ``k``, cols does.

        Raises:
            ValueError: ``ratio`` not positive, ``dim`` below 1, another field out of range, or a ratio that leaves no
                column or no k.
        """
        if not 0 < ratio < float("inf"):
            raise ValueError(f"ratio must be positive and finite, got {ratio!r}")
        if dim < 1:
            raise ValueError(
                f"dim must be at least 1, got {dim}: where no tensor is large enough to be sketched, lower "
                "dense_below, or exchange dense (sketch=None)"
            )
        given = cls(**{"cols": 1, "k": 1, **overrides})  # refuses what is out of range
        rows = given.rows
        per_choice = (1 if given.selection == "heavymix" else given.oversample) + 1
        floats = 2 * dim / ratio
        if "cols" in overrides and "k" in overrides:
            raise ValueError("give at most one of cols and k to for_compression: both fix the ratio already")
        if "cols" in overrides:
            cols = overrides["cols"]
            k = int((floats - rows * cols) / per_choice)
        elif "k" in overrides:
            k = overrides["k"]
            cols = int((floats - per_choice * k) / rows)
        else:
            cols, k = int(floats / 2 / rows), int(floats / 2 / per_choice)
        k = min(k, dim)
        if cols < 1 or k < 1:
            raise ValueError(
                f"a ratio of {ratio:g} at dim {dim} leaves {floats:.0f} floats per step, not enough for {rows} "
                f"rows of at least one column and {per_choice} floats per updated coordinate: lower the ratio, "
                f"rows or oversample"
            )
        return cls(**{**overrides, "cols": cols, "k": k})

    def candidates(self, dim: int) -> int:
        """How many coordinates get an exact value each step: ``min(oversample * k, dim)``, or k for HEAVYMIX."""
        return self.k if self.selection == "heavymix" else min(self.oversample * self.k, dim)

    def paper_floats(self, dim: int) -> int:
        """``|S| + Pk + k``: floats per rank and step as the paper counts them, indices left out."""
        return self.rows * self.cols + self.candidates(dim) + self.k

    def paper_compression_ratio(self, dim: int) -> float:
        """``2 * dim / (|S| + Pk + k)`` (paper, section 5), for ``dim`` sketched coordinates."""
        return 2 * dim / self.paper_floats(dim)
