"""``python -m hvd_sketch``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import hvd_sketch
from hvd_sketch.__main__ import app
from tests.support.logged import write_long_run


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "hvd_sketch", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"hvd_sketch {hvd_sketch.__version__}\n"), done.stderr


def run(*arguments: str) -> tuple[int, str]:
    """The exit status, and what was printed."""
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_help_names_the_commands() -> None:
    status, text = run("--help")
    assert status == 0 and "warm-up" in text and "plan" in text


@pytest.mark.parametrize("arguments", [[], ["cool-down"], ["--speed"], ["warm-up", "now"]])
def test_bad_use_exits_with_2(arguments: list[str]) -> None:
    status, text = run(*arguments)
    assert status == 2 and "Usage: " in text


def test_the_installed_command_is_the_same() -> None:
    command = [Path(sys.executable).with_name("hvd-sketch"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"hvd_sketch {hvd_sketch.__version__}\n"), done.stderr


def test_warm_up_compiles_the_kernels_and_says_what(monkeypatch) -> None:
    def compiling(tell: Callable[[str], None] | None) -> int:
        if tell is not None:
            tell("compiling sketch_row")
        return 3

    kernels = SimpleNamespace(warm_up=compiling, cache_folder=lambda: Path("kept"))
    monkeypatch.setitem(sys.modules, "hvd_sketch.warm_up", kernels)
    assert run("warm-up") == (0, "compiling sketch_row\n")
    status, text = run("warm-up", "--json")
    assert status == 0 and {"compiled": 3, "folder": "kept"}.items() <= json.loads(text).items()


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{log}", "--output", "{folder}/missing/page.html"],
        ["merge-traces", "{trace}", "--output", "{folder}/missing/merged.json"],
        ["doctor", "--no-self-test", "--bundle", "{folder}/missing/bundle.txt"],
    ],
)
def test_a_file_that_cannot_be_written_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    if arguments[0] == "report":
        pytest.importorskip("plotly")
    log, trace = tmp_path / "run.jsonl", tmp_path / "trace.json"
    write_long_run(log, 10, 1)
    trace.write_text(json.dumps({"traceEvents": [{"ph": "X", "name": "step", "ts": 0, "dur": 1, "pid": 0, "tid": 0}]}))
    status, text = run(*(each.format(log=log, trace=trace, folder=tmp_path) for each in arguments))
    assert status == 2 and "No such file or directory" in text.replace("\n", " ")
