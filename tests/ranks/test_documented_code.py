"""Code in the README and in docs/ runs, under the launcher that it is written for."""

from __future__ import annotations

import ast
import re
import sys

import pytest

import hvd_sketch
from tests.support.documented_code import RANKS, Block, blocks
from tests.support.harness import LAUNCHERS, run_command

ALL = list(blocks())
LAUNCHED = {"torch": "torch", "horovod": "horovod-mpi"}  # of which mpirun is a part
SCRIPTS = [block for block in ALL if block.launcher == "script"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", LAUNCHED)
def test_blocks_run(launcher: str, tmp_path) -> None:
    rank = [sys.executable, "-m", "tests.support.documented_code", launcher]
    command = [*LAUNCHERS[LAUNCHED[launcher]], "-n", str(RANKS), "--", *rank]
    status, output = run_command(command, timeout_s=200, TMPDIR=str(tmp_path))
    assert status == 0, output
    expected = [block.name for block in ALL if block.launcher == launcher]
    assert expected and [name for name in expected if f"ran {name}" not in output] == [], output


@pytest.mark.multiprocess
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda block: block.name)
def test_whole_scripts_run(script: Block, tmp_path) -> None:
    path = tmp_path / "train.py"
    path.write_text(f"import os\n\nos.chdir({str(tmp_path)!r})\n{script.code}")
    command = [*LAUNCHERS["torch"], "-n", str(RANKS), "--", sys.executable, str(path)]
    status, output = run_command(command, timeout_s=120)
    assert status == 0, output
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", output)]
    assert losses[-1] < losses[0] / 2 and "102 times fewer bytes" in output, output


@pytest.mark.parametrize("block", [block for block in ALL if not block.launcher], ids=lambda block: block.name)
def test_what_is_not_run_compiles_and_names_what_there_is(block: Block) -> None:
    block.compiled()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hvd_sketch":
            assert hasattr(hvd_sketch, node.attr), f"{block.name}: hvd_sketch.{node.attr}"


def test_most_blocks_run() -> None:
    run = sum(bool(block.launcher) for block in ALL)
    assert run > 20 and SCRIPTS and len(ALL) - run < run / 2
