"""What can be wrapped and how: the arguments of DistributedOptimizer, Horovod's own among them."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hvd_sketch.checks import check_flag, check_integer, check_positive
from hvd_sketch.config import ALL_DENSE, Compression, SketchConfig
from hvd_sketch.model.forwarding import ForwardingOptimizer
from hvd_sketch.model.parameters import NamedParameter, is_dense, sketched_dim
from hvd_sketch.model.shown import ratio_of, warn_unless_shown
from hvd_sketch.shards import local
from hvd_sketch.transport import HorovodTransport, Transport, local_transports, resolve_transport

WIRE_DTYPES = {
    **{"NoneCompressor": None, "none": None},
    **{"FP16Compressor": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16},
}
OPERATIONS = {"average": False, "sum": True}  # whether gradients are summed
HOROVOD_OPERATIONS = ("average", "sum", "adasum", "min", "max", "product")  # by the numbers of hvd.Average …
SHOWN = (bool, int, float, str, tuple)  # of an optimizer's settings
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HorovodArguments:
    """The arguments of ``hvd.DistributedOptimizer`` that ours takes over, as given; see there for what each does."""

    compression: Any = None
    op: Any = None
    gradient_predivide_factor: float = 1.0
    num_groups: int = 0
    groups: Any = None
    sparse_as_dense: bool = False

    def check(self) -> None:
        """Refuse what cannot be done. Raises ValueError or TypeError with the reason."""
        self.wire_dtype()
        is_sum = self.is_sum()
        check_flag("sparse_as_dense", self.sparse_as_dense)
        check_positive("gradient_predivide_factor", self.gradient_predivide_factor)
        if self.gradient_predivide_factor != 1.0 and is_sum:
            raise ValueError(
                "gradient_predivide_factor divides a mean and means nothing for a sum: leave it out, or op"
            )
        check_integer("num_groups", self.num_groups, 0)
        if self.groups is None or isinstance(self.groups, int):
            check_integer("groups", self.groups or 0, 0)
            return
        is_lists = isinstance(self.groups, Sequence) and all(isinstance(group, Sequence) for group in self.groups)
        tensors = [tensor for group in self.groups for tensor in group] if is_lists else [None]
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise ValueError(f"groups must be a number or lists of parameters, got {self.groups!r}")
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("groups holds a parameter twice: put each into one group")

    def wire_dtype(self) -> torch.dtype | None:
        """What the dense exchange sends; None: the gradients' own dtype."""
        if self.compression is None:
            return None
        name = self.compression if isinstance(self.compression, str) else _class_name(self.compression)
        if name not in WIRE_DTYPES:
            raise ValueError(
                "compression must be hvd.Compression.none or fp16, or 'none', 'fp16' or 'bf16', for the part that goes "
                f"dense, got {name}: other compressors change what a sum of them means; compress with sketch= instead"
            )
        return WIRE_DTYPES[name]

    def compared(self) -> dict[str, object]:
        """What must be equal on all ranks, by name."""
        return {"compression": self.wire_dtype(), "op": self.is_sum(), "sparse_as_dense": self.sparse_as_dense}

    def is_sum(self) -> bool:
        """Whether gradients are summed over the ranks, not averaged."""
        name = self.op if self.op is not None else "average"
        if type(name) is int and 0 <= name < len(HOROVOD_OPERATIONS):
            name = HOROVOD_OPERATIONS[name]
        if not isinstance(name, str) or name not in OPERATIONS:
            raise ValueError(
                f"op must be hvd.Average or hvd.Sum ('average', 'sum'), got {name}: sketches can only be added, and "
                "Adasum, Min, Max and Product are no additions"
            )
        return OPERATIONS[name]


def compression_of(sketch: Any, compression: Any) -> tuple[Any, Any]:
    """How to compress, from either argument, and what Horovod's own ``compression`` is then.

    Raises:
        ValueError: both say how to compress.
    """
    if not isinstance(compression, Compression):
        return sketch, compression
    if sketch is not None:
        raise ValueError("sketch and compression both say how to compress: give one of them")
    return compression, None


def transport_of(
    transport: str | Transport, process_set: Any, sketch: Compression | None
) -> tuple[Transport, Compression | None]:
    """The transport to exchange over, and how to compress.

    A rank outside of its process set steps alone, as in Horovod: with one rank, and nothing sketched.

    Communication: see :func:`~hvd_sketch.transport.resolve_transport`.
    """
    if process_set is None:
        return resolve_to_wrap(transport), sketch
    if transport not in ("auto", "horovod"):
        raise ValueError(
            f"process_set is Horovod's and needs transport='horovod', got {transport!r}: give MPITransport(comm) of a "
            "communicator, or TorchTransport(group) of a process group, that holds the ranks"
        )
    if not is_outside(process_set):
        return HorovodTransport(process_set), sketch
    alone = replace(sketch, dense_below=ALL_DENSE) if isinstance(sketch, Compression) else sketch
    return local_transports(1)[0], alone


def resolve_to_wrap(transport: str | Transport) -> Transport:
    """The transport of an optimizer; rank 0 warns of one that would not go along when ranks come and go.

    Communication: see :func:`~hvd_sketch.transport.resolve_transport`.
    """
    resolved = resolve_transport(transport)
    is_of_now = isinstance(transport, str) and isinstance(resolved, HorovodTransport)
    if is_of_now and resolved.rank == 0 and os.environ.get("HOROVOD_ELASTIC") == "1":
        logger.warning(
            "this job of horovodrun is elastic, but nobody wraps this optimizer again when ranks come and go: those "
            "that come would wait for ever. Give the plain optimizer to hvd_sketch.elastic.SketchState, in place of "
            "Horovod's TorchState"
        )
    return resolved


def is_outside(process_set: Any) -> bool:
    """Whether this rank is in no set that averages: it steps alone, and writes no log. Communication: none."""
    return hasattr(process_set, "included") and not process_set.included()


def check_arguments(
    optimizer: object, sketch: object, horovod: HorovodArguments, counts: Mapping[str, tuple[object, int]]
) -> None:
    """Refuse arguments that cannot work. Raises ValueError or TypeError.

    Args:
        optimizer, sketch: as given to DistributedOptimizer.
        horovod: what else was given.
        counts: by name, integers and the least that each may be.
    """
    _check_wrappable(optimizer, horovod.sparse_as_dense)
    for name, (value, least) in counts.items():
        check_integer(name, value, least)
    if sketch is not None and not isinstance(sketch, Compression):
        raise ValueError(
            f"sketch must be a SketchConfig, a LowRankConfig, or None for dense, got {_class_name(sketch)}: Horovod's "
            "other arguments are taken by name (compression=…)"
        )
    horovod.check()
    if isinstance(optimizer, torch.optim.Optimizer) and sketch is not None:
        _refuse_momentum_twice(optimizer, sketch)


def describe(
    optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter], sketch: Compression | None
) -> dict[str, Any]:
    """What a log says of the run, for JSON: class and settings of the optimizer and of the compression, sizes."""
    least = sketch.dense_below if sketch is not None else ALL_DENSE
    return {
        "optimizer": describe_optimizer(optimizer),
        "compression": {"class": type(sketch).__name__, **asdict(sketch)} if sketch is not None else None,
        "tensors": len(named),
        "elements": sum(local(p).numel() for _, p in named),
        "elements_compressed": sum(local(p).numel() for _, p in named if not is_dense(p, least)),
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and settings, for JSON."""
    settings = {name: value for name, value in optimizer.defaults.items() if isinstance(value, SHOWN)}
    return {"class": type(optimizer).__name__, **settings}


def _check_wrappable(optimizer: object, sparse_as_dense: bool) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, ForwardingOptimizer) or hasattr(optimizer, "skip_synchronize"):
        raise ValueError("the optimizer exchanges gradients already: wrap the plain torch optimizer, once")
    if _needs_closure(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} evaluates its closure itself, perhaps several times per step, each with "
            "gradients of its own to exchange, which one exchange cannot give: use a first-order optimizer such as SGD "
            "or AdamW"
        )
    if isinstance(optimizer, torch.optim.SparseAdam) and not sparse_as_dense:
        raise ValueError(
            "SparseAdam takes sparse p.grad only, averaged gradients are dense: pass sparse_as_dense=True, which "
            "exchanges them dense and makes them sparse again, or use Adam"
        )


def _refuse_momentum_twice(optimizer: torch.optim.Optimizer, sketch: Compression) -> None:
    momentum = max(map(_momentum_of, optimizer.param_groups))
    if momentum > 0 and sketch.momentum > 0:
        raise ValueError(
            f"momentum is applied twice: {type(optimizer).__name__} has {momentum:g} and the sketch "
            f"{sketch.momentum:g}. Set one of them to 0: the sketch's (momentum=0), but for the paper's own settings"
        )


def _momentum_of(group: Mapping[str, Any]) -> float:
    """SGD's, or Adam's beta1, the first of its betas."""
    betas = group.get("betas")
    return float(group.get("momentum") or (betas[0] if isinstance(betas, Sequence) and betas else 0))


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` cannot be called without a closure, as that of LBFGS."""
    parameters = inspect.signature(type(optimizer).step).parameters
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty


def warn_about_settings(
    optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter], sketch: Compression, every: int = 1
) -> None:
    """Tell of settings that work, but hardly as they are meant; arguments as for :func:`warn_unless_shown`."""
    sketched = [(name, p) for name, p in named if not is_dense(p, sketch.dense_below)]
    if not sketched and any(local(p).numel() for _, p in named):  # otherwise it is a rank with empty shards
        logger.warning(
            "all tensors have fewer than dense_below=%d elements, or 64 times as many and one dimension: nothing is "
            "sketched, gradients are exchanged dense. Lower dense_below to sketch them.",
            sketch.dense_below,
        )
    doubles = [name for name, p in sketched if p.dtype == torch.float64]
    if doubles:
        logger.warning(
            "%d float64 parameters (%s, …) are sketched in float32: their gradients are rounded, and those below 1e-45 "
            "are lost. sketch=None exchanges them in float64.",
            *(len(doubles), doubles[0]),
        )
    if sketched:
        warn_unless_shown(optimizer, named, sketch, every)
        _warn_of_small_tensors(named, sketch)
    groups = optimizer.param_groups
    if any(float(g.get("momentum") or 0) > 0 for g in groups) and _fights_momentum(sketch):
        logger.warning(
            "%s has momentum, with which candidates=%r train worse than without: set momentum=0 and raise the learning "
            "rate, or take candidates='nominate', or hvd_sketch.recommended(...).",
            *(type(optimizer).__name__, getattr(sketch, "candidates", None)),
        )
    decay = max(float(g.get("weight_decay") or 0) for g in groups)
    if decay > 0 and sketch.weight_decay > 0:
        logger.warning(
            "weight decay is applied twice: %s has %g and the sketch %g. Set one of them to 0.",
            *(type(optimizer).__name__, decay, sketch.weight_decay),
        )


def _warn_of_small_tensors(named: Sequence[NamedParameter], sketch: Compression) -> None:
    """Tell where the tensors that go dense take most of the bytes."""
    compressed, ratio = sketched_dim(named, sketch.dense_below), ratio_of(sketch, named)
    elements = sum(local(parameter).numel() for _, parameter in named)
    dense = elements - compressed
    if ratio and dense * ratio > compressed:
        logger.warning(
            "%d of %d elements are in small tensors, which go dense: the others are sent in %.3g times fewer bytes, "
            "the whole model in %.3g. Lower dense_below=%d, or take a LowRankConfig, which compresses all.",
            *(dense, elements, ratio, elements / (compressed / ratio + dense), sketch.dense_below),
        )


def _fights_momentum(sketch: Compression) -> bool:
    """Whether coordinates come at random, or by noisy estimates: momentum then repeats updates that are out of date."""
    return isinstance(sketch, SketchConfig) and sketch.candidates != "nominate"


def _class_name(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__
