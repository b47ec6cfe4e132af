"""A machine on which a launch script runs with nothing but what is given to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.harness import run_command

VENV = str(Path(sys.prefix).resolve())


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path):
    """Runs a script with nothing in its environment but what is given, on a machine that seems to have 8 cores."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "nproc", "#!/bin/sh\necho 8\n")
    script(tools / "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')

    def run(*command: str, **variables: str) -> tuple[int, str]:
        variables = {"PATH": f"{tools}:/usr/bin:/bin", "HVD_SKETCH_VENV": VENV, "OPAL_PREFIX": VENV} | variables
        return run_command(["env", "-i", *(f"{n}={v}" for n, v in variables.items()), *command], timeout_s=60)

    return run
