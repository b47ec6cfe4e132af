"""How the models of the translation experiment are trained at each scale, and through which exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.paper.translation_models import Shape, Translator
from hvd_sketch import SketchConfig, sketched_dim

LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Method:
    """An exchange and the paper's compression ratio that it is set up for."""

    exchange: str  # of :data:`benchmarks.paper.model_exchange.METHODS`
    ratio: float = 20  # of what is sketched; true top-k takes its k from it, and without compression it means nothing

    @property
    def real(self) -> bool:
        """Whether it can run on real ranks too."""
        return self.exchange != "true_topk"


METHODS = {
    "uncompressed": Method("dense"),
    "true-topk": Method("true_topk"),
    "sketched-20x": Method("sketched"),
    "sketched-40x": Method("sketched", ratio=40),
}


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    shape: Shape
    pieces: int  # size of the vocabulary
    tokens: int  # of one batch, see :meth:`benchmarks.paper.parallel_text.TokenPairs.cut`
    accumulate: int  # batches per worker and step
    steps: int
    warmup: int  # steps over which the learning rate rises
    factor: float  # of the learning rate, see :meth:`rate`
    momentum: float = 0.9  # inside the exchange
    sketch: Mapping[str, Any] = field(default_factory=dict)  # overrides of ``SketchConfig.for_compression``

    def rate(self, step: int) -> float:
        """The learning rate of steps 1, 2, … (Vaswani et al. 2017, 5.3, times ``factor``)."""
        return self.factor * self.shape.width**-0.5 * min(step**-0.5, step * self.warmup**-1.5)

    def config(self, method: Method, model: Translator, seed: int) -> SketchConfig:
        """Biases and layer norms go dense."""
        settings: dict[str, Any] = {"momentum": self.momentum, "seed": seed, "deterministic": True, **self.sketch}
        return SketchConfig.for_compression(method.ratio, sketched_dim(model.parameters()), **settings)


FULL = Recipe(
    Shape(width=512, layers=6, inner=2048, heads=8, shared=False),
    pieces=30_000, tokens=1024, accumulate=4, steps=60_000, warmup=16_000, factor=1000, sketch={"k": 100_000},
)  # fmt: skip
SMALL = Recipe(
    Shape(width=64, layers=2, inner=128, heads=4),
    pieces=2000, tokens=128, accumulate=1, steps=3000, warmup=400, factor=320, momentum=0.0,
    sketch={"oversample": 2},
)  # fmt: skip
RECIPES = {
    "full": {"transformer": FULL, "lstm": replace(FULL, factor=8000)},
    "small": {
        "transformer": SMALL,
        "lstm": replace(SMALL, shape=Shape(width=96, layers=2), factor=500),
    },
}
