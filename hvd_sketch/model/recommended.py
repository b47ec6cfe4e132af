"""Which compression to begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor
from typing import Any, Literal

from torch import Tensor

from hvd_sketch.checks import check_choice, check_integer, check_positive
from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.matrices import factor_bytes, within_bytes
from hvd_sketch.ledger import RING_PASSES
from hvd_sketch.model.parameters import FLAT_FACTOR, NamedParameter, is_dense
from hvd_sketch.shards import local
from hvd_sketch.wire_bytes import DENSE_BYTES, agreement_bytes, step_bytes

DENSE_BELOW = 512  # elements, for single coordinates: a last matrix of 960 takes 7,680 bytes dense
RESIDUAL_DECAY = 0.95  # before a sign step


def recommended(
    parameters: Iterable[Tensor | NamedParameter],
    ratio: float,
    ranks: int,
    optimizer: Literal["sgd", "adam", "adamw", "lagadamw", "muon", "signsgd"] = "sgd",
) -> Compression:
    """The compression that trained best at equal bytes on models like this one.

    Low rank with 4-bit factors, for SGD with Nesterov momentum, Adam, AdamW and Muon. Where the ratio leaves a matrix
    no rank of 1: for SGD nominated coordinates with 4-bit values, if the whole model then sends fewer bytes than at
    ranks of 1; otherwise an error. For a :class:`~hvd_sketch.optim.LagAdamW`, which goes with ``optimizer.ahead()``,
    nominated coordinates. For a :class:`~hvd_sketch.optim.SignSGD` random coordinates of a residual that forgets.
    Beside coordinates tensors of fewer than 512 elements, and of fewer than 32,768 with one dimension, go dense; low
    rank compresses all.

    Closest to a dense AdamW come nominated coordinates, LagAdamW and ``ahead()`` together, ``"lagadamw"``.

    Learning rates, in times of the best dense one (of Adam for SignSGD), in the tables of
    benchmarks/results/accuracy_per_byte and benchmarks/results/language_model:

    ===========================================  ==========
    low rank into SGD with Nesterov momentum     0.5 to 2
    nominated into SGD with Nesterov momentum    0.7 to 2
    low rank into Adam, AdamW                    1 to 2
    low rank into Muon                           1
    nominated into LagAdamW, ``ahead()``         1 to 2
    random into SignSGD                          2 to 4
    ===========================================  ==========

    Evidence (per cent, three seeds), for low rank, nominated, random and dense: at a ratio of 150 MNIST 96.6, 96.1,
    96.2, 96.8; CIFAR-10 in 1,500 steps 67.7, 66.1, 66.4, 68.3; with 16 ranks in 300 steps 51.1, 48.5, 49.5, 53.1,
    with 64 48.4, 41.7, 47.3, 53.5; at 1,000, 2 million parameters, 57.5, 57.3, 51.9, 61.1. Random coordinates win
    one of thirteen tables: CIFAR-10 with two or three classes a rank, 300 steps at 150, 45.4, 45.3, 47.9, 48.5.
    With low rank these are ratios of the whole models. Beside coordinates small tensors went dense: the whole
    models sent 116, 118, 117 and 807 times fewer bytes.

    With Adam at a ratio of 60 (beside coordinates 36 of the whole model), losses of a character transformer of 240 k
    after 300 and 1,500 steps: low rank 2.39 and 1.78, dense 2.27 and 1.73. Nominated coordinates into LagAdamW with
    ``ahead()`` reach 2.33 and 1.74, random ones into SignSGD 2.28 and 1.77. Low rank into Muon, with AdamW for what is
    no matrix inside a block, reaches 1.71 after 1,500 steps, dense Muon 1.66. On bytes of WikiText-2's validation part,
    in 300 steps with a cosine and weight decay: dense 2.21, low rank 2.29 (2.26 at 37), random into SignSGD 2.19; on
    another text after that dense 2.15, low rank 2.19 (2.17 at 37), random into SignSGD 2.14. Three seeds each.

    Args:
        parameters: ``model.parameters()`` or ``model.named_parameters()``.
        ratio: bytes of a dense ring allreduce of the tensors that are compressed, in their own dtypes, over those to be
            sent for them; every byte counts, also of the agreement before a step. With low rank it is the whole
            model's. Beside coordinates small tensors go dense, and the whole model's ratio is lower: of N elements, n
            of them compressed, ``N / (n / ratio + N - n)``. It is what ``ledger.compression_ratio()`` says.
        ranks: how many there will be.
        optimizer: the one that is wrapped; ``"muon"`` is ``torch.optim.Muon``, ``"lagadamw"`` and ``"signsgd"`` are
            those of :mod:`hvd_sketch.optim`.

    Raises:
        ValueError: nothing can be compressed; the ratio is too high, with the highest one possible; an optimizer of
            another name.

    Communication: none.
    """
    check_choice("optimizer", optimizer, ("sgd", "adam", "adamw", "lagadamw", "muon", "signsgd"))
    check_positive("ratio", ratio)
    check_integer("ranks", ranks, 1)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in parameters]
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not tensors:
        raise ValueError(
            "no tensor requires a gradient: there is nothing to compress, exchange dense (compression=None)"
        )
    if optimizer == "lagadamw":
        return _coordinates(ratio, tensors, ranks, "nominate")
    if optimizer == "signsgd":
        return _coordinates(ratio, tensors, ranks, "random", residual_decay=RESIDUAL_DECAY)
    if _holds_nothing(tensors):
        return LowRankConfig(rank=1)
    shapes = [tuple(local(tensor).shape) for tensor in tensors]
    agreement, bits = agreement_bytes(ranks, len(tensors)), LowRankConfig.value_bits
    dense = _dense_bytes(tensors)
    low_rank = within_bytes(shapes, dense / ratio - agreement, ranks, bits)
    if low_rank is not None:
        return low_rank
    least = factor_bytes(shapes, LowRankConfig(rank=1), ranks) + agreement
    highest = floor(1000 * dense / least) / 1000
    coordinates, beyond = _beyond_rank_1(ratio, tensors, ranks)
    if optimizer == "sgd" and coordinates is not None and beyond >= highest:
        return coordinates
    if highest <= 1:
        raise ValueError(
            f"low rank would send more of these {len(tensors)} small tensors than they have: there is nothing to "
            "compress, exchange dense (compression=None)"
        )
    raise ValueError(
        f"a ratio of {ratio:g} leaves no rank of 1 to every matrix: lower it, the highest ratio possible is {highest}"
        f"{_tell_of_coordinates(optimizer, beyond, highest)}"
    )


def _tell_of_coordinates(optimizer: str, ratio: float, highest: float) -> str:
    """What they are in place of low rank: ``ratio`` of the whole model, 0 for none, where that reaches ``highest``."""
    if not ratio:
        return ""
    if ratio < highest:
        return (
            f". With single coordinates small tensors go dense: the whole model would send only {ratio:.3g} times less"
        )
    return (
        f". Or wrap SignSGD (optimizer='signsgd') or LagAdamW (optimizer='lagadamw'): {optimizer!r} trains worse with "
        "single coordinates"
    )


def _beyond_rank_1(ratio: float, tensors: Sequence[Tensor], ranks: int) -> tuple[SketchConfig | None, float]:
    """Nominated coordinates at a ratio, and what it is of the whole model then; None where they reach less."""
    try:
        coordinates = _coordinates(ratio, tensors, ranks, "nominate")
    except ValueError:
        return None, 0.0
    large = _large(tensors)
    dense, dim = _dense_bytes(tensors), sum(local(tensor).numel() for tensor in large)
    return coordinates, dense / (step_bytes(coordinates, dim, ranks) + dense - _dense_bytes(large))


def _coordinates(
    ratio: float, tensors: Sequence[Tensor], ranks: int, candidates: str, residual_decay: float = 1.0
) -> SketchConfig:
    options: Any = {"candidates": candidates, "residual_decay": residual_decay, "dense_below": DENSE_BELOW}
    if _holds_nothing(tensors):
        return SketchConfig(k=1, **options)
    large = _large(tensors)
    if not large:
        raise ValueError(
            f"none of {len(tensors)} tensors that require a gradient has {DENSE_BELOW} elements, or "
            f"{DENSE_BELOW * FLAT_FACTOR} and one dimension: there is nothing to compress, exchange dense "
            "(compression=None)"
        )
    dim = sum(local(tensor).numel() for tensor in large)
    in_float32 = ratio * DENSE_BYTES * dim / max(_dense_bytes(large), 1)
    try:
        return SketchConfig.for_wire_ratio(in_float32, dim, ranks, **options)
    except ValueError:
        raise ValueError(
            f"a ratio of {ratio:g} leaves too few bytes to update one of {dim} coordinates: lower the ratio, or "
            "exchange dense (compression=None)"
        ) from None


def _large(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not is_dense(tensor, DENSE_BELOW)]


def _holds_nothing(tensors: Sequence[Tensor]) -> bool:
    """Whether this rank holds no element, as of a small model that FSDP2 has sharded: then it sends nothing."""
    return not any(local(tensor).numel() for tensor in tensors)


def _dense_bytes(tensors: Sequence[Tensor]) -> int:
    """Of a ring allreduce of tensors in their own dtypes."""
    return RING_PASSES["allreduce"] * sum(local(tensor).nbytes for tensor in tensors)
