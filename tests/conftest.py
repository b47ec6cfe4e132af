"""Markers of whole folders; and where there is no GPU, Triton's kernels run under its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, which may be by any test.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        if folder == "gpu":
            item.add_marker("gpu")
        if folder == "netlab":
            item.add_marker("root")
            item.add_marker("multiprocess")
        if folder == "paper" and item.get_closest_marker("multiprocess"):  # a whole experiment, more than once
            item.add_marker("slow")
