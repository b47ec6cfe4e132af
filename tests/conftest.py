"""Markers of whole folders; which cells of the table of faults run; and where there is no GPU, Triton's kernels run
under its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, which may be by any test.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def cells_of_today(config: pytest.Config) -> tuple[list[str], bool]:
    """The names of the faults that run, and whether these are all: a day's sample, where nobody asks for them."""
    from tests.faults.table import CELLS, sample  # not above: it imports the package, perhaps Triton

    asked = [config.option.markexpr, *config.invocation_params.args]
    if any("faults" in str(word) and "not faults" not in str(word) for word in asked):
        return [cell.name for cell in CELLS], True
    return [cell.name for cell in sample(time.gmtime().tm_yday)], False


def pytest_report_header(config: pytest.Config) -> str:
    names, are_all = cells_of_today(config)
    return f"faults: all {len(names)}" if are_all else f"faults of today: {', '.join(names)}; all of them: -m faults"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names, _ = cells_of_today(config)
    left_out = [item for item in items if item.get_closest_marker("faults") and item.callspec.id not in names]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        folder = item.path.parent.name
        if folder == "gpu":
            item.add_marker("gpu")
        if folder == "netlab":
            item.add_marker("root")
            item.add_marker("multiprocess")
        if folder == "paper" and item.get_closest_marker("multiprocess"):  # a whole experiment, more than once
            item.add_marker("slow")
