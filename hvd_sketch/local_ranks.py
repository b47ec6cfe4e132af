"""How many ranks a launcher has put on this host, as its variables say."""

from __future__ import annotations

import os
import re

# Of torchrun, Open MPI, horovodrun, MPICH and Intel MPI, srun ("4(x2)").
LOCAL_SIZES = (
    *("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    "SLURM_STEP_TASKS_PER_NODE",
)


def local_ranks() -> int | None:
    """How many ranks the launcher of this process has put on this host; None where no launcher says so."""
    numbers = (re.match(r"\d+", os.environ.get(name, "")) for name in LOCAL_SIZES)
    return next((int(number[0]) for number in numbers if number and int(number[0])), None)
