"""The set-up, with a stand-in for Python that only notes what it is asked for."""

from __future__ import annotations

import configparser
import re
import shutil
import time
from importlib import metadata
from pathlib import Path

import pytest

from tests.launch.conftest import script
from tests.support.harness import ROOT

STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    --version) echo Python 3.12.0 ;;
    "-m venv "*) for venv; do :; done; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"; touch "$venv/pyvenv.cfg" ;;
    "-m pip "*download*) echo no such archive; exit 1 ;;
    "- "*) echo key ;;
esac
"""


class SetUp:
    """A checkout in a temporary folder, and how often its set-up asked for what."""

    def __init__(self, folder: Path, bare):
        self.folder, self._bare = folder, bare
        self.checkout, self.calls_file = folder / "checkout", folder / "calls"
        self.python = script(folder / "python-stand-in", STAND_IN)
        self.wheel = folder / "cache/wheels/key/horovod-0.28.1-any.whl"
        self.wheel.parent.mkdir(parents=True)
        self.wheel.touch()
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        shutil.copy(ROOT / "setup.cfg", self.checkout)

    def run(self, **variables: str) -> tuple[int, str, str]:
        """Exit status, output, and the calls of the stand-in."""
        self.calls_file.write_text("")
        defaults = {
            "PYTHON": str(self.python),
            "CALLS": str(self.calls_file),
            "HVD_SKETCH_CACHE": str(self.folder / "cache"),
            "HVD_SKETCH_VENV": "",
        }
        status, output = self._bare(str(self.checkout / "launch/setup.sh"), **(defaults | variables))
        return status, output, self.calls_file.read_text()


@pytest.fixture
def set_up(tmp_path, bare):
    return SetUp(tmp_path, bare)


def test_set_up_installs_then_has_nothing_to_do(set_up):
    status, output, calls = set_up.run()
    assert status == 0, output
    installs = [line for line in calls.splitlines() if " install " in line]
    assert " torch " in installs[0]
    assert "-e .[mpi,gpu,report,tensorboard,examples,paper,integrations,docs,test,dev]" in installs[1]
    assert str(set_up.wheel) in installs[2]
    assert calls.splitlines()[-1] == "-m hvd_sketch warm-up"

    start_s = time.monotonic()
    status, output, calls = set_up.run()
    assert (status, calls) == (0, "")
    assert "nothing to do" in output
    assert time.monotonic() - start_s < 1


@pytest.mark.parametrize("changed", ["launch/setup.sh", "launch/constraints.txt", "setup.cfg"])
def test_set_up_runs_again_when_its_inputs_change(set_up, changed):
    set_up.run()
    with (set_up.checkout / changed).open("a") as file:
        file.write("\n# changed\n")
    status, _, calls = set_up.run()
    assert status == 0
    assert " install " in calls and " venv " not in calls


def test_set_up_makes_a_moved_environment_anew(set_up):
    set_up.run()
    set_up.checkout = set_up.checkout.rename(set_up.folder / "moved")
    status, _, calls = set_up.run()
    assert status == 0
    assert f"-m venv --clear {set_up.checkout}/.venv" in calls


def test_set_up_serves_another_checkout_in_the_same_environment(set_up):
    shared = str(set_up.folder / "shared")
    set_up.run(HVD_SKETCH_VENV=shared)
    set_up.checkout = Path(shutil.copytree(set_up.checkout, set_up.folder / "other"))
    _, _, calls = set_up.run(HVD_SKETCH_VENV=shared)
    assert "-e .[" in calls and " venv " not in calls


def test_set_up_shows_why_the_build_failed_and_is_not_done(set_up):
    set_up.wheel.unlink()
    for _ in range(2):
        status, output, _ = set_up.run(CXX="true")
        assert status == 1
        assert "no such archive" in output
        assert f"all of it in {set_up.folder}/cache/wheels/key.log" in output
        assert not list(set_up.folder.glob("cache/build.*"))


def test_set_up_without_compiler_says_so_before_it_downloads(set_up):
    tools = set_up.folder / "no-compiler"
    tools.mkdir()
    for name in ["bash", "env", "dirname", "basename", "sed", "mkdir", "sha256sum", "flock", "cat"]:
        (tools / name).symlink_to(shutil.which(name))
    set_up.wheel.unlink()
    status, output, calls = set_up.run(PATH=str(tools))
    assert (status, calls) == (1, "")
    assert "expected a C++ compiler" in output


def test_set_up_refuses_an_old_python(set_up):
    old = script(set_up.folder / "old", '#!/bin/sh\n[ "$*" = --version ] && echo Python 3.9.2\n')
    status, output, _ = set_up.run(PYTHON=str(old))
    assert status == 1
    assert "expected Python 3.11 or newer, found Python 3.9.2" in output


def test_set_up_leaves_other_files_alone(set_up):
    place = set_up.folder / "mine"
    place.mkdir()
    (place / "thesis.tex").touch()
    status, output, _ = set_up.run(HVD_SKETCH_VENV=str(place))
    assert status == 1
    assert "found other files" in output
    assert [file.name for file in place.iterdir()] == ["thesis.tex"]


def test_every_pinned_version_runs_on_the_least_python_that_is_promised() -> None:
    """Debian 12 has Python 3.11.2; a version of one of them asked for 3.11.5, and no environment could be made."""
    packaging = pytest.importorskip("packaging.specifiers")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    least = config["options"]["python_requires"].removeprefix(">=").strip() + ".0"
    looked_at = 0
    for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.+]+)", (ROOT / "launch" / "constraints.txt").read_text()):
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if found["Version"].partition("+")[0] == version.partition("+")[0]:
            looked_at += 1
            assert packaging.SpecifierSet(found["Requires-Python"] or "").contains(least), (name, version)
    assert looked_at > 20
