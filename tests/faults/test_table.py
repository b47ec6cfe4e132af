"""Every fault of the table, injected under its launchers: it ends as promised, within the seconds that are promised.

A run takes some of them, other ones every day; ``-m faults`` takes all.
"""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hvd_sketch.model.checkpoint_files import folders, read_manifest, read_state
from hvd_sketch.transport.stall import STALL_S as DEFAULT_STALL_S
from hvd_sketch.transport.stall import STALL_VARIABLE, process_watch
from tests.faults.job import NOTE
from tests.faults.table import CELLS, LAUNCHERS, Cell, markdown, sample
from tests.support.harness import ROOT, run_command, wait_until

NORMAL_END_S = 30  # from the last statement of a program


@pytest.mark.faults
@pytest.mark.multiprocess
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, tmp_path: Path) -> None:
    launcher, transport = LAUNCHERS[cell.launcher]
    program = [sys.executable, str(Path(__file__).parent / "without_us.py")]
    if cell.row.module == "job":
        program = [sys.executable, "-m", "tests.faults.job"]
    command = [*launcher, "-n", str(cell.row.ranks), *program, transport, cell.what, str(tmp_path)]
    limits = {variable: str(seconds) for variable, seconds in cell.row.limits_s.items()}
    status, output = run_command(command, timeout_s=170, **limits)
    elapsed_s = time.time() - noted(tmp_path)
    for told in cell.row.told:
        assert re.search(told, output), f"{told!r} was not said:\n{output}"
    if not cell.row.within_s:
        assert status == 0, output
        assert elapsed_s < NORMAL_END_S and not re.search("has waited for|is late|ends, in", output), output
        return
    assert (tmp_path / NOTE).exists(), f"no rank came to its failure:\n{output}"
    assert status != 0, output
    assert elapsed_s < cell.row.within_s, f"the job ended {elapsed_s:.1f} s after its fault:\n{output}"
    stall_s = cell.row.limits_s.get(STALL_VARIABLE, DEFAULT_STALL_S)
    assert all(int(waited) <= stall_s + 5 for waited in re.findall(r"has waited for (\d+) s for", output)), output
    wait_until(lambda: not processes_of(tmp_path))
    if cell.what == "kill@save":
        assert_goes_on(tmp_path / "checkpoints")


def noted(folder: Path) -> float:
    """When a rank failed or ended, in seconds; now, where none did."""
    return float((folder / NOTE).read_text()) if (folder / NOTE).exists() else time.time()


def processes_of(folder: Path) -> list[str]:
    """The command lines of processes that were started with a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [command] * (str(folder) in command)
    return found


def assert_goes_on(directory: Path) -> None:
    """The checkpoint before the failure is complete and whole, the one during it is not complete."""
    older, newer = folders(directory)
    assert older.is_complete and not newer.is_complete
    manifest = read_manifest(older)
    for name in manifest["files"]:
        read_state(older, name, manifest)


def test_every_cell_has_its_day() -> None:
    days = [sample(day) for day in range(len(CELLS))]
    assert {cell.name for day in days for cell in day} == {cell.name for cell in CELLS}
    assert all(0 < sum(cell.row.takes_s for cell in day) <= 30 for day in days)
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_the_documentation_has_this_table() -> None:
    assert markdown() in (ROOT / "docs" / "faults.md").read_text(), "docs/faults.md: python -m tests.faults.table"


def test_limits_that_are_no_seconds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STALL_VARIABLE, "soon")
    with pytest.raises(ValueError, match=f"{STALL_VARIABLE} must be a number of seconds, 0 for never, got 'soon'"):
        process_watch.__wrapped__()
