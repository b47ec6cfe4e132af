"""``python -m hvd_sketch``."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import hvd_sketch
from hvd_sketch.__main__ import main


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "hvd_sketch", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"hvd_sketch {hvd_sketch.__version__}\n"), done.stderr


def test_help_names_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "warm-up" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["cool-down"], ["--speed"], ["warm-up", "now"]])
def test_bad_use_exits_with_2(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m hvd_sketch" in capsys.readouterr().err


def test_warm_up_compiles_the_kernels_and_says_what(capsys, monkeypatch) -> None:
    kernels = SimpleNamespace(warm_up=lambda tell: tell("compiling sketch_row"))
    monkeypatch.setitem(sys.modules, "hvd_sketch.warm_up", kernels)
    assert main(["warm-up"]) == 0
    assert capsys.readouterr().out == "compiling sketch_row\n"
