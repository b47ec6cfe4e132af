"""Kernel backends: modules of the functions that :mod:`hvd_sketch.kernels.reference` defines."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

try:
    import_module("hvd_sketch.kernels._cpu_few_bits")  # Numba looks for a folder when it meets the first kernel
except RuntimeError as error:
    error.add_note("compiled kernels find no folder to be kept in: set NUMBA_CACHE_DIR to one that all ranks can write")
    raise

BACKENDS = {
    "reference": "hvd_sketch.kernels.reference",
    "numba": "hvd_sketch.kernels.cpu",
    "triton": "hvd_sketch.kernels.gpu",
}
DEFAULT_BACKENDS = {"cpu": "numba", "cuda": "triton"}


def load_backend(name: str | None, device: torch.device) -> ModuleType:
    """The backend called ``name``, or the one for the device's type when ``name`` is None.

    Raises:
        ValueError: no backend of that name, or none for the device.
    """
    chosen = name if name is not None else DEFAULT_BACKENDS.get(device.type)
    if chosen is None:
        raise ValueError(f"there are no kernels for device {device}: sketch on the CPU (device='cpu')")
    if chosen not in BACKENDS:
        raise ValueError(f"backend must be None or one of {sorted(BACKENDS)}, got {name!r}")
    return import_module(BACKENDS[chosen])
