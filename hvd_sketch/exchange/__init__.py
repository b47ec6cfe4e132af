"""One step of the algorithm between ranks, sketched or dense."""

from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.sketched import DenseAllreduce, SketchedAllreduce

__all__ = ["DenseAllreduce", "SketchedAllreduce", "SparseUpdate"]
