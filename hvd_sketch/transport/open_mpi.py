"""The place of PyPI's Open MPI, which was built for another place and looks for its files there."""

from __future__ import annotations

import os
import sys


def locate_open_mpi() -> None:
    """Set ``OPAL_PREFIX`` in ``os.environ`` if this Python environment holds PyPI's Open MPI; call before loading MPI.

    Without the variable ``MPI_Init`` ends a process that was not started by mpirun. An existing value stays.
    Communication: none.
    """
    if os.path.exists(os.path.join(sys.prefix, "lib", "libopen-rte.so.40")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
