"""Which compression to begin with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from hvd_sketch.checks import check_choice, check_integer, check_positive
from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.matrices import least_bytes
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.shards import local
from hvd_sketch.wire_bytes import DENSE_BYTES, agreement_bytes

RESIDUAL_DECAY = 0.95  # before a sign step


def recommended(
    parameters: Iterable[Tensor | NamedParameter],
    ratio: float,
    ranks: int,
    optimizer: Literal["sgd", "adam", "adamw", "muon", "signsgd"] = "sgd",
) -> Compression:
    """The compression that trained best at equal bytes on models like this one.

    Low rank with 4-bit factors, where the ratio leaves every matrix at least rank 1; otherwise nominated coordinates
    with 4-bit values. Either goes with the momentum of the wrapped optimizer, ``SGD(momentum=0.9, nesterov=True)``, at
    half the dense learning rate to the whole of it. Low rank also goes with Adam and with Muon, at their dense rates or
    twice as high. For a :class:`~hvd_sketch.optim.SignSGD` random coordinates of a residual that forgets, at four times
    the rate of Adam.

    Evidence (benchmarks/results/accuracy_per_byte; per cent, three seeds), for low rank, nominated, random and dense:
    at 150 times fewer bytes MNIST 96.6, 96.1, 96.2, 96.8; CIFAR-10 in 1,500 steps 68.0, 66.1, 66.4, 68.3; with 16 ranks
    in 300 steps 51.3, 48.5, 49.5, 53.2; at 1,000 times, 2 million parameters, 58.2, 57.3, 51.9, 61.1.

    With Adam at 60 times fewer bytes, losses of a character transformer after 300 and 1,500 steps: low rank 2.37 and
    1.77, nominated 2.46 and 1.80, dense 2.27 and 1.73. Nominations therefore go with
    :class:`~hvd_sketch.optim.LagAdamW`: 2.41 and 1.78. Random coordinates into SignSGD reach 2.31 and 1.77. Low rank
    into Muon, with AdamW for what is no matrix inside a block, reaches 2.14 and 1.71, dense 1.99 after 300 steps (one
    seed). On another text, bytes of WikiText-2, in 300 steps with a cosine and weight decay (one seed): dense 2.21, low
    rank 2.24, random 2.19, nominated 2.31.

    Args:
        parameters: ``model.parameters()`` or ``model.named_parameters()``.
        ratio: bytes of a dense ring allreduce of the whole model over those to be sent; every byte counts, also of the
            tensors that go dense.
        ranks: how many there will be.
        optimizer: the one that is wrapped; ``"muon"`` is ``torch.optim.Muon``, ``"signsgd"`` is
            :class:`~hvd_sketch.optim.SignSGD`.

    Raises:
        ValueError: tensors that go dense take more than the ratio leaves; an optimizer of another name.

    Communication: none.
    """
    check_choice("optimizer", optimizer, ("sgd", "adam", "adamw", "muon", "signsgd"))
    check_positive("ratio", ratio)
    check_integer("ranks", ranks, 1)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in parameters]
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    total = sum(local(tensor).numel() for tensor in tensors)
    compressed = [tensor for tensor in tensors if not is_dense(tensor, LowRankConfig.dense_below)]
    dim = sum(local(tensor).numel() for tensor in compressed)
    budget = DENSE_BYTES * (total / ratio - (total - dim)) - agreement_bytes(ranks, len(tensors))
    if budget <= 0:
        raise ValueError(
            f"the {total - dim} elements of small tensors that go dense take more than a ratio of {ratio:g} leaves: at "
            f"most {total / max(total - dim, 1):.0f} is possible"
        )
    own_ratio = DENSE_BYTES * dim / budget
    if optimizer == "signsgd":
        return SketchConfig.for_wire_ratio(own_ratio, dim, ranks, candidates="random", residual_decay=RESIDUAL_DECAY)
    if least_bytes([tuple(local(tensor).shape) for tensor in compressed], bits=4) <= budget:
        return LowRankConfig(ratio=own_ratio)
    return SketchConfig.for_wire_ratio(own_ratio, dim, ranks, candidates="nominate")
