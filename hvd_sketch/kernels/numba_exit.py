"""Numba without an escape code at the end of the user's program."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def keep_exit_silent() -> None:
    """Keep colorama from writing ``ESC[0m`` to a terminal's stdout as the process ends. Communication: none.

    Numba builds coloured messages, which nobody sees, while it compiles or loads a kernel, and calls ``colorama.init``
    for each. The first call registers ``colorama.reset_all`` to run at exit. Under mpirun the ranks' stdout is a
    terminal, so every rank wrote the code. Each message ends with its own reset. The user's calls of ``colorama.init``
    work as before.
    """
    try:
        initialise: Any = import_module("colorama.initialise")
        errors: Any = import_module("numba.core.errors")
        init = errors.init
    except (ImportError, AttributeError):  # no colorama, or a Numba that does not call it
        return
    if getattr(init, "__module__", None) == __name__:
        return

    def init_without_exit() -> None:
        registered = initialise.atexit_done
        initialise.atexit_done = True
        try:
            init()
        finally:
            initialise.atexit_done = registered

    errors.init = init_without_exit
