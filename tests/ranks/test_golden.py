"""Updates, residuals and bytes over torch are those of threads, to the bit, with a skipped step among them."""

from __future__ import annotations

import pytest

from tests.support.golden import SETTINGS
from tests.support.harness import launch
from tests.support.worlds import register

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore:all ranks skip this step")]

TARGET = "tests.support.golden:digests"
JOBS = {ranks: register("torch", ranks, TARGET) for ranks in (1, 2, 3, 4)}


@pytest.mark.parametrize("ranks", JOBS)
def test_processes_make_the_bits_of_threads(ranks: int) -> None:
    results = JOBS[ranks].results()
    assert results == launch("local", ranks, TARGET)
    for setting in range(len(SETTINGS)):
        assert len({result[setting][0] for result in results}) == 1, "updates are equal on all ranks"
