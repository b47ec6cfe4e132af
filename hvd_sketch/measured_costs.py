"""What the cost model takes from measurements: local work of a core or a GPU, and what transports cost.

On the CPU of one core (Zen 3, 2.6 GHz), on the GPU of an H100 (benchmarks/results/gpu/h100); carriers between 2, 4 and
8 hosts (benchmarks/results/bandwidth.json). ``hvd-sketch plan --calibrate`` and ``--measure`` take their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Local work of a step.

    Attributes:
        nanoseconds: of a coordinate.
        fixed_s: of a step, however few they are: what a GPU's host needs to start its kernels.
    """

    nanoseconds: float
    fixed_s: float = 0.0

    def seconds(self, dim: int) -> float:
        """Of a step of ``dim`` coordinates."""
        return self.fixed_s + 1e-9 * self.nanoseconds * dim


Works = Mapping[str, Work]  # by method
CPU: Works = {
    "dense": Work(0.4),
    "bf16": Work(1.2),
    "topk": Work(7.0),
    "powersgd": Work(4.5),
    "nominate": Work(2.3),
    "lowrank": Work(5.7),
    "random": Work(2.7),
    "sketch": Work(3.0),
    "heavymix": Work(3.8),
    "paper": Work(2.5),
}
# Whole steps of 1, 25, 100 and 1,000 million coordinates, within 20 %; a dense sum from the time of a copy, half as
# much again, and two casts as much as a copy each. Other methods have not been timed on a GPU.
H100: Works = {
    "dense": Work(0.004, 0.04e-3),
    "bf16": Work(0.008, 0.1e-3),
    "nominate": Work(0.046, 2.6e-3),
    "paper": Work(0.146, 5.5e-3),
}
WORKS = {"cpu": CPU, "cuda": H100}  # by device


@dataclass(frozen=True)
class Carrier:
    """What a transport costs where the network costs nothing.

    Attributes:
        message_s: what one message, sent and received, keeps a core busy, beside its bytes.
        bytes_per_s: what it moves.
        collective_s: of any collective, beside its messages: until Horovod's thread looks for work.
        wake_s: what a collective takes longer after local work: a thread that makes it must be woken.
        has_tree: whether an allreduce of the library takes ``2 log2(ranks)`` rounds, as that of MPI, and not the
            ``2 (ranks - 1)`` of a ring, as that of Gloo.
        can_split: whether many of its ranks form a grid.
    """

    message_s: float
    bytes_per_s: float
    collective_s: float = 0.0
    wake_s: float = 0.0
    has_tree: bool = False
    can_split: bool = True


# Between 2 hosts with a core each a small collective took 0.07 ms over MPI, 0.36 over torch, 0.41 over Horovod and 1.08
# as Horovod's own over MPI; between 4 on the same cores 0.36, 1.37, 2.15 and 1.45; between 8 over MPI 1.56, which is 28
# times as many messages for a core as between 2.
CARRIERS = {
    "mpi": Carrier(60e-6, 1.8e9, has_tree=True),
    "torch": Carrier(0.3e-3, 1.5e9, wake_s=1.2e-3),
    "horovod": Carrier(0.35e-3, 1.3e9, wake_s=1.2e-3),  # torch's, over Gloo
    # MPI, beside Horovod's thread: between 2 and 4 hosts 1.8 and 1.5 ms, where MPI alone took 0.19 and 0.64 (two to
    # three times as long as above) and moved twice as much (benchmarks/results/transports.json).
    "horovod-mpi": Carrier(60e-6, 1.0e9, collective_s=0.6e-3, has_tree=True),
    "horovod-own": Carrier(60e-6, 1.9e9, collective_s=1.0e-3, has_tree=True, can_split=False),
}
