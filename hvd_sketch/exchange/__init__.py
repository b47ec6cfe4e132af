"""One step of the algorithm between ranks: sketched, dense, and what both share."""

from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.dense import DenseAllreduce
from hvd_sketch.exchange.sketched import SketchedAllreduce

__all__ = ["DenseAllreduce", "SketchedAllreduce", "SparseUpdate"]
