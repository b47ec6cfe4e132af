"""What a user does wrong with an experiment ends it with one message that names the mend, before any training."""

from __future__ import annotations

import importlib
import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.paper.experiment import Session
from hvd_sketch.transport import Transport, run_local
from tests.support.paper import write_mnist

EXPERIMENTS = ("mnist", "cifar10", "translation", "ablations")
FILE_OF = {"mnist": "train-images-idx3-ubyte", "cifar10": "data_batch_1.bin", "translation": "train.en"}


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """A main sets torch's threads, filters of warnings and handlers of signals."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


Fails = Callable[[str, str], str]


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run an experiment's main on a line of arguments, where the folder is {here}: what it ended with."""

    def run(experiment: str, line: str) -> str:
        defaults = f"--data-dir {tmp_path} --json {tmp_path}/new.json "
        arguments = shlex.split(defaults + line.format(here=tmp_path))
        monkeypatch.setattr(sys, "argv", [experiment, *arguments])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"benchmarks.paper.{experiment}").main()
        assert ended.value.code not in (None, 0)
        return f"{ended.value.code} {capsys.readouterr().err}"

    return run


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_all_experiments_say(experiment: str, fails: Fails, tmp_path: Path) -> None:
    missing = FILE_OF.get(experiment, "train-images-idx3-ubyte")
    assert missing in fails(experiment, "") and missing in fails(experiment, "--data-dir {here}/nowhere")
    assert "there is no directory" in fails(experiment, "--json {here}/nowhere/x.json")
    assert "is a directory" in fails(experiment, "--json {here}")
    for name in ("seeds", "checkpoint-every", "workers"):
        assert f"--{name} must be at least" in fails(experiment, f"--{name} 0")
    if experiment != "mnist":
        assert "--device: nonsense cannot be used" in fails(experiment, "--device nonsense")
    assert not list(tmp_path.iterdir())


CIFAR10_MISTAKES = [
    ("--epochs 0", "--epochs must be at least 1"),
    ("--batch 0", "--batch must be at least 1"),
    ("--rate nan", "--rate must be at least 0"),
    ("--ratios 10 --k 5 --cols 5", "either --ratios or --k and --cols"),
    ("--k 5", "--k and --cols are given together"),
]


@pytest.mark.parametrize(("line", "expected"), CIFAR10_MISTAKES)
def test_what_cifar10_says(line: str, expected: str, fails: Fails) -> None:
    assert expected in fails("cifar10", line)


def test_what_translation_says(fails: Fails) -> None:
    assert "--cache-dir" in fails("translation", "--cache-dir {here}/nowhere")
    assert "--factor must be at least 0" in fails("translation", "--factor -1")


def test_what_resuming_says(fails: Fails, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert "there is no" in fails("mnist", "--resume")
    (tmp_path / "new.json").write_text(json.dumps({"experiment": "cifar10", "settings": {}, "runs": []}))
    assert "has the experiment cifar10, this call mnist" in fails("mnist", "--resume")
    (tmp_path / "new.json").write_text("{")
    assert "error" in fails("mnist", "--resume")


def test_results_are_not_replaced(fails: Fails, tmp_path: Path) -> None:
    for content in ('{"runs": [{"seed": 0}]}', "notes"):
        (tmp_path / "new.json").write_text(content)
        assert "has results: add --resume" in fails("mnist", "")
        assert (tmp_path / "new.json").read_text() == content
    (tmp_path / "new.json").unlink()
    (tmp_path / "new.checkpoint0").touch()
    assert "has results: add --resume" in fails("mnist", "")


def test_what_the_exchange_refuses_is_said_plainly(fails: Fails, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert "more columns or use fewer ranks" in fails("mnist", "--steps 10 --workers 41 --recipes svm-alg3")


@pytest.mark.parametrize("own_step", [1, 0])
def test_ranks_go_on_from_the_same_step_only(own_step: int, tmp_path: Path) -> None:
    """A job that was killed while it saved leaves checkpoints of different steps: then all begin anew."""

    def saved(labels: dict[str, int], done: int) -> dict[str, object]:
        return {"labels": labels, "ranks": 2, "done": done, "curve": [], "training": {"done": done}}

    def loaded(transport: Transport) -> object:
        session = object.__new__(Session)
        session._transport, session._checkpoint = transport, tmp_path / str(transport.rank)
        torch.save(saved({"seed": 0}, 7 + own_step * transport.rank), session._checkpoint)
        return session._load_checkpoint({"seed": 0}), session._load_checkpoint({"seed": 1})

    for same, other in run_local(2, loaded):
        assert other is None and same == (None if own_step else saved({"seed": 0}, 7))
