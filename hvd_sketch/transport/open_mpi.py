"""Where the Open MPI of PyPI lies: it was built for another place, and looks for its files there."""

from __future__ import annotations

import os
import sys


def locate_open_mpi() -> None:
    """Set ``OPAL_PREFIX`` where this Python environment holds the Open MPI of PyPI; call before MPI is loaded.

    Without the variable that Open MPI ends a process that was not started by mpirun, in ``MPI_Init``. A value that is
    set already stays. Modifies ``os.environ``. Communication: none.
    """
    if os.path.exists(os.path.join(sys.prefix, "lib", "libopen-rte.so.40")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
