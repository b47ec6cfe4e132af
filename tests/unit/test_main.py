"""``python -m hvd_sketch``."""

from __future__ import annotations

import gzip
import json
import random
import re
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


def test_without_compiled_kernels_a_warm_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    done = subprocess.run([sys.executable, "-m", "hvd_sketch", "warm-up"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "NUMBA_DISABLE_JIT" in done.stderr and "Traceback" not in done.stderr, done.stderr


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("time.json", b'[{"ts": "5", "pid": 1}]'),
        ("pid.json", b'[{"ts": 5, "pid": [1]}]'),
        ("base.json", b'{"traceEvents": [{"ts": 1, "pid": 1}], "baseTimeNanoseconds": null}'),
        ("name.json", b'[{"name": "process_name", "args": ["name"], "pid": 1}]'),
        ("deep.json", b"[" * 100_000),
        ("short.json.gz", gzip.compress(b"[" + b'{"ts": 1},' * 500)[:40]),
        ("other.json.gz", b"[]"),
        ("damaged.json.gz", gzip.compress(random.Random(0).randbytes(1000))[:300] + b"\xff" * 50),
    ],
)
def test_what_is_no_trace_is_refused_with_its_name(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    status, text = run("merge-traces", str(tmp_path / name), "--output", str(tmp_path / "merged.json"))
    assert status == 2 and f"{name}isnotrace" in re.sub(r"[│\s]+", "", text), text


def test_arrows_and_processes_of_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Viewers read an id that is a text as hexadecimal, and drop what they cannot read."""
    paths = [tmp_path / folder / "torch.json" for folder in ("r0", "r1")]
    for path in paths:
        path.parent.mkdir()
        named = {"name": "process_name", "ph": "M", "pid": 7, "args": {"name": "python"}}
        arrow = [{"name": "ac2g", "ph": phase, "id": number, "ts": 1} for number in (2, "2a") for phase in "sf"]
        path.write_text(json.dumps([named, *arrow]))
    merged = tmp_path / "merged.json"
    assert run("merge-traces", *map(str, paths), "--output", str(merged))[0] == 0
    events = json.loads(merged.read_text())["traceEvents"]
    ids = [event["id"] for event in events if "id" in event]
    assert all(type(number) is int for number in ids) and ids[::2] == ids[1::2] and len(set(ids)) == 4
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [f"python ({path})" for path in paths]


TWO_EVENTS = '[\n{"name":"a","ts":1,"args":{"n":{"m":1}}},\n{"name":"b","ts":2,"args":{"n":{"m":1}}}'


def test_a_trace_may_be_cut_short_anywhere(tmp_path: Path) -> None:
    trace, merged = tmp_path / "trace.json", tmp_path / "merged.json"
    for end in range(TWO_EVENTS.index(",\n"), len(TWO_EVENTS) + 1):
        trace.write_text(TWO_EVENTS[:end])
        assert run("merge-traces", str(trace), "--output", str(merged))[0] == 0
        names = [event["name"] for event in json.loads(merged.read_text())["traceEvents"]]
        assert names == (["a", "b"] if end == len(TWO_EVENTS) else ["a"])


def test_a_trace_that_is_damaged_in_its_middle_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(TWO_EVENTS.replace("b", '"') + 10_000 * ',\n{"name":"c","ts":3}')
    assert run("merge-traces", str(trace), "--output", str(tmp_path / "merged.json"))[0] == 2


@pytest.mark.parametrize("command", ["report", "merge-traces"])
def test_a_page_or_trace_in_a_pipe_has_nothing_behind_it(command: str, tmp_path: Path) -> None:
    if command == "report":
        pytest.importorskip("plotly")
    log = tmp_path / "run.jsonl"
    write_long_run(log, 10, 1)
    (tmp_path / "trace.json").write_text("[]")
    read = {"report": log, "merge-traces": tmp_path / "trace.json"}[command]
    line = [sys.executable, "-m", "hvd_sketch", command, str(read), "--output", "/dev/stdout"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("</html>" if command == "report" else "}")
    assert "/dev/stdout: " in done.stderr and "0.00 B" not in done.stderr


def test_a_trace_is_not_written_over(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("[]")
    status, text = run("merge-traces", str(trace), "--output", str(trace))
    assert status == 2 and "would replace it" in re.sub(r"[│\s]+", " ", text) and trace.read_text() == "[]"
