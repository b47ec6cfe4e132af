"""Numba's error messages without an escape code at the end of the user's program."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def keep_exit_silent() -> None:
    """Numba's coloured messages no longer make colorama write ``ESC[0m`` to a terminal's stdout as the process ends.

    Numba builds such messages, seen by nobody, while it compiles or loads a kernel, and calls ``colorama.init`` for
    each. The first call registers ``colorama.reset_all`` to run at exit. Under mpirun the ranks' stdout is a terminal,
    so every rank wrote it. Each message ends with its own reset: nothing is lost. A ``colorama.init`` of the user's
    own works as before. Communication: none.
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
