"""Run a module on a pretended CUDA device: ``python -m tests.support.pretend_cuda_run LIBRARY MODULE ARGUMENT...``."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.support.pretend_cuda import load

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    load(Path(sys.argv[1]))
    from tests.support.pretend_cuda.install import install  # imports torch

    install()
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
