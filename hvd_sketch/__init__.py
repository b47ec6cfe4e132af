"""Sketched gradient exchange for data-parallel PyTorch over torch.distributed, Horovod and MPI."""

from hvd_sketch.config import LowRankConfig, SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce, SparseUpdate
from hvd_sketch.exchange.low_rank import LowRankAllreduce
from hvd_sketch.hashing import HASH_VERSION
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvd_sketch.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hvd_sketch.model.ddp import DDPState, ddp_hook
from hvd_sketch.model.joining import join
from hvd_sketch.model.local_steps import LocalSteps
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.model.parameters import sketched_dim
from hvd_sketch.model.recommended import recommended
from hvd_sketch.model.saved_gradient import save_gradient
from hvd_sketch.simulate import Simulation
from hvd_sketch.sketch import CountSketch
from hvd_sketch.transport import HorovodTransport, MPITransport, TorchTransport, Transport, local_transports
from hvd_sketch.version import __version__

__all__ = [
    "HASH_VERSION",
    "Checkpoint",
    "CommLedger",
    "CountSketch",
    "DDPState",
    "DenseAllreduce",
    "DistributedOptimizer",
    "HorovodTransport",
    "LocalSteps",
    "LowRankAllreduce",
    "LowRankConfig",
    "MPITransport",
    "Simulation",
    "SketchConfig",
    "SketchedAllreduce",
    "SparseUpdate",
    "TorchTransport",
    "Transport",
    "__version__",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ddp_hook",
    "join",
    "load_checkpoint",
    "local_transports",
    "recommended",
    "save_checkpoint",
    "save_gradient",
    "sketched_dim",
]
