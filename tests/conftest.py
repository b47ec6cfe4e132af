"""Markers of whole folders; which cells of the table of faults and which daily tests run; and where there is no GPU,
Triton's kernels run under its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, which may be by any test.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator

import pytest
import torch

DAYS = 3  # in which every daily test has its turn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def nothing_slows_later_tests() -> Iterator[None]:
    is_asked_for = tracemalloc.is_tracing()  # by PYTHONTRACEMALLOC
    yield
    if tracemalloc.is_tracing() and not is_asked_for:
        tracemalloc.stop()
        pytest.fail("tracemalloc was left on: Python is up to twenty times as slow in all tests that follow")


def cells_of_today(config: pytest.Config) -> tuple[list[str], bool]:
    """The names of the faults that run, and whether these are all: a day's sample, where nobody asks for them."""
    from tests.faults.table import CELLS, sample  # not above: it imports the package, perhaps Triton

    asked = [config.option.markexpr, *config.invocation_params.args]
    if any("faults" in str(word) and "not faults" not in str(word) for word in asked):
        return [cell.name for cell in CELLS], True
    return [cell.name for cell in sample(time.gmtime().tm_yday)], False


def daily_group(item: pytest.Item) -> str | None:
    """What runs on the same day: the name that the marker gives, or the test itself; None: it runs every day."""
    marker = item.get_closest_marker("daily")
    return None if marker is None else marker.args[0] if marker.args else item.nodeid


def left_for_other_days(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """Two thirds of the daily tests, in a run of all tests; whoever asks for some gets all of those."""
    if config.option.markexpr or config.option.keyword or config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return []
    groups = {item: group for item in items if (group := daily_group(item))}
    of_today = set(sorted(set(groups.values()))[time.gmtime().tm_yday % DAYS :: DAYS])
    return [item for item, group in groups.items() if group not in of_today]


def pytest_report_header(config: pytest.Config) -> str:
    names, are_all = cells_of_today(config)
    faults = f"all {len(names)}" if are_all else f"those of today: {', '.join(names)}; all of them: -m faults"
    return f"faults: {faults}\ndaily tests: without paths, -m and -k a third of them; all of them: -m daily"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_folders(items)
    names, _ = cells_of_today(config)
    left_out = {item for item in items if item.get_closest_marker("faults") and item.callspec.id not in names}
    left_out.update(left_for_other_days(config, items))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def mark_folders(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        if folder == "gpu":
            item.add_marker("gpu")
        if folder == "netlab":
            item.add_marker("root")
            item.add_marker("multiprocess")
        if folder == "paper" and item.get_closest_marker("multiprocess"):  # a whole experiment, more than once
            item.add_marker("slow")
        if folder == "paper" and item.path.name != "test_told_accuracy.py":  # which holds pages against records
            item.add_marker("daily")
