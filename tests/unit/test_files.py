"""Files are replaced whole or not at all: full disks, errors and kills leave the old one."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hvd_sketch import CommLedger
from hvd_sketch.files import append_lines, replaced, save_whole
from tests.support.harness import child_environment, wait_until
from tests.support.saving import full_disk


def write_ledger(path: Path) -> None:
    ledger = CommLedger()
    for _ in range(200):
        ledger.begin_step()
        ledger.record("sketch", "allreduce", torch.float32, 100, size=2)
    ledger.write_jsonl(path)


def write_text(path: Path) -> None:
    with replaced(path) as draft:
        draft.write_text("new" * 10_000)


WRITERS: list[Callable[[Path], None]] = [
    write_ledger,
    write_text,
    lambda path: save_whole({"v": torch.zeros(10_000)}, path),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk(10_000), pytest.raises(OSError, match="file was not written, and is as it was before"):
        write(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"], "the draft is removed"
    write(path)
    assert path.read_bytes()[:3] != b"old"


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyError), replaced(path) as draft:
        assert draft.suffix == ".json", "plots take their format from it"
        draft.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/file was not written.*name another place"):
        write_text(tmp_path / "nowhere" / "file")


def test_links_permissions_and_devices_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link)
    assert link.is_symlink() and target.read_text().startswith("new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    write_text(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    reading, writing = os.pipe()
    write_text(Path(f"/dev/fd/{writing}"))
    assert os.read(reading, 3) == b"new"
    os.close(reading), os.close(writing)


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from hvd_sketch.files import append_lines, replaced
path, log = Path(sys.argv[1]), Path(sys.argv[2])
for number in range(10**9):
    with replaced(path) as draft:
        draft.write_text(f"{number} " * 100_000)
    append_lines(log, [f"{number} " * 1000])
"""


def test_a_kill_leaves_a_whole_file_and_all_lines_but_the_last(tmp_path: Path) -> None:
    path, log = tmp_path / "file", tmp_path / "log"
    for delay_s in (0.003, 0.017):
        log.unlink(missing_ok=True)
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path), str(log)]
        with subprocess.Popen(command, env=child_environment()) as process:
            wait_until(lambda: log.exists() and log.stat().st_size > 0)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(delay_s)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        numbers = path.read_text().split()
        assert len(numbers) == 100_000 and len(set(numbers)) == 1
        lines = log.read_text().splitlines()
        assert all(line == f"{number} " * 1000 for number, line in enumerate(lines[:-1]))


def test_a_line_that_was_cut_short_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append_lines(log, ["first"])
    with log.open("a") as file:
        file.write("cut")
    append_lines(log, ["second", "third"])
    assert log.read_text().splitlines() == ["first", "cut", "second", "third"]
