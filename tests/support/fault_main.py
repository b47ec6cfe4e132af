"""A job of several exchanges in which one rank fails; run by test_faults.py.

Arguments: transport; how it fails, "raise", "exit", "leave", "hang" or "kill"; file to note the time of the failure in.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.transport import resolve_transport
from tests.support.targets import float_gradient


def main(name: str, fault: str, note: str) -> None:
    transport = resolve_transport(name)
    exchange = SketchedAllreduce(SketchConfig.paper(cols=600, k=50), 5000, transport)
    for step in range(10_000):
        if step == 3 and transport.rank == 1:
            Path(note).write_text(str(time.time()))
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault in ("exit", "leave"):
                sys.exit(3 if fault == "exit" else 0)
            if fault == "hang":
                time.sleep(1000)
            raise RuntimeError("rank 1 fails on purpose")
        exchange.step(float_gradient(5000, transport.rank, step))


if __name__ == "__main__":
    main(*sys.argv[1:])
