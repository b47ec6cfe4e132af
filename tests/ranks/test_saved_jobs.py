"""save_checkpoint and load_checkpoint: to the bit, whole or not at all, damage refused on every rank by name."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_sketch import DistributedOptimizer, load_checkpoint
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.harness import child_environment, wait_until
from tests.support.saving import COMPRESSIONS, Job, resume
from tests.support.toy import LIMIT_S, RANKS, little
from tests.support.worlds import register

WORLDS = [("mpi", 3), ("torch", 3), ("horovod-gloo", 2)]
JOBS = {world: register(*world, "tests.support.saving:run_all") for world in WORLDS}


def saved_job(directory: Path, ranks: int = 2, saves: int = 1, keep: int = 3) -> Path:
    """A job of some ranks that saves after every second step: the newest checkpoint."""

    def main(transport: LocalTransport) -> Path:
        job = Job(transport, little(momentum=0.5))
        for number in range(saves):
            job.train(range(2 * number, 2 * number + 2))
            path = job.save(directory, extra={"saves": number + 1}, own=transport.rank, keep=keep)
        return path

    return run_local(ranks, main, LIMIT_S)[0]


def refusals(directory: Path, ranks: int = 2) -> list[str]:
    """What every rank is told when it loads. The job stays as it was."""

    def main(transport: LocalTransport) -> str:
        job = Job(transport, little(momentum=0.5))
        job.train(range(1))
        before = job.tensors()
        with pytest.raises(ValueError) as caught:
            job.load(directory)
        assert all(map(torch.equal, before, job.tensors()))
        return str(caught.value)

    return run_local(ranks, main, LIMIT_S)


# --- going on


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_as_many_ranks_go_on_to_the_bit(compression: str, ranks: int, tmp_path: Path) -> None:
    assert all(map(all, run_local(ranks, lambda t: resume(t, str(tmp_path), compression), LIMIT_S)))


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "ranks"), JOBS)
def test_over_real_processes_and_a_full_disk_on_one(kind: str, ranks: int) -> None:
    for rank, result in enumerate(JOBS[kind, ranks].results()):
        assert all(map(all, result["equal"].values()))
        failed = result["failed"]
        assert f"rank-{ranks - 1}.pt was not written" in failed["told"]
        assert rank == ranks - 1 or f"rank {ranks - 1} of {ranks} could not save a checkpoint" in failed["told"]
        assert failed["left"] == [failed["first"]] and failed["step"] == 2


@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_ranks_goes_on_from_the_mean(after: int, tmp_path: Path) -> None:
    def save(transport: LocalTransport) -> Any:
        job = Job(transport, little(momentum=0.5))
        job.train(range(3))
        job.save(tmp_path, extra="for all", own="for one")
        return job.tensors()

    def load(transport: LocalTransport) -> Any:
        job = Job(transport, little(momentum=0.5))
        loaded = job.load(tmp_path)
        assert loaded is not None and (loaded.ranks, loaded.extra, loaded.own) == (4, "for all", None)
        tensors = job.tensors()
        job.train(range(3, 5))
        return tensors

    saved = run_local(4, save, LIMIT_S)
    expected = [sum(tensors) / 4 for tensors in zip(*saved, strict=True)]
    expected[3] = saved[0][3]  # of the buffers rank 0's
    for tensors in run_local(after, load, LIMIT_S):
        assert all(map(torch.equal, tensors, expected))


def test_another_compression_goes_on_without_residuals(tmp_path: Path) -> None:
    saved_job(tmp_path)

    def load(transport: LocalTransport) -> bool:
        job, as_saved = Job(transport, COMPRESSIONS["low rank"]), Job(transport, little(momentum=0.5))
        with pytest.raises(ValueError, match="residuals=False"):
            job.load(tmp_path)
        loaded = job.load(tmp_path, residuals=False)
        as_saved.load(tmp_path)
        assert loaded is not None and (loaded.extra, loaded.own) == ({"saves": 1}, transport.rank)
        *parameters, residual, velocity = job.tensors()
        assert all(map(torch.equal, parameters, as_saved.model.parameters()))
        moments = [
            optimizer.state[optimizer.inner.param_groups[0]["params"][0]]["exp_avg_sq"]
            for optimizer in (job.optimizer, as_saved.optimizer)
        ]
        assert torch.equal(*moments) and moments[0].any()
        job.train(range(2, 4))
        assert job.optimizer.exchanges == 4 and job.save(tmp_path).name == "000002-step-4"
        return not residual.any() and not velocity.any()

    assert all(run_local(2, load, LIMIT_S))


def test_ranks_agree_on_arguments(tmp_path: Path) -> None:
    saved_job(tmp_path)

    def load(transport: LocalTransport) -> None:
        for name, given in (("residuals", transport.rank == 0), ("step", 2 * transport.rank)):
            with pytest.raises(ValueError, match=rf"{name}: (.|\n)*Give it the same arguments"):
                Job(transport, little(momentum=0.5)).load(tmp_path, **{name: given})

    run_local(2, load, LIMIT_S)


def test_a_file_is_no_directory_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def main(transport: LocalTransport) -> None:
        job = Job(transport, little(momentum=0.5))
        for call in (job.load, job.save):
            with pytest.raises(OSError, match="file is a file: expected a directory of checkpoints"):
                call(tmp_path / "file")

    run_local(2, main, LIMIT_S)


# --- complete or not there


def test_the_newest_complete_one_is_found_and_old_ones_are_removed(tmp_path: Path) -> None:
    assert saved_job(tmp_path, saves=5, keep=2).name == "000005-step-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000004-step-8", "000005-step-10"]
    (tmp_path / "000005-step-10" / "manifest.json").unlink()  # as if the job had been killed before
    (tmp_path / "notes").mkdir()

    def main(transport: LocalTransport) -> tuple[int, Any]:
        job = Job(transport, little(momentum=0.5))
        loaded = job.load(tmp_path)
        assert loaded is not None
        job.train(range(8, 9))
        assert job.save(tmp_path).name == "000006-step-9", "an incomplete one keeps its number"
        return loaded.step, loaded.extra

    assert run_local(2, main, LIMIT_S) == [(8, {"saves": 4})] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000004-step-8", "000006-step-9", "notes"]


def test_an_older_step_is_loaded_and_then_is_the_newest(tmp_path: Path) -> None:
    saved_job(tmp_path, saves=3)

    def main(transport: LocalTransport) -> list[int]:
        job = Job(transport, little(momentum=0.5))
        with pytest.raises(ValueError, match=r"no complete checkpoint of step 5; those it has are of steps 2, 4, 6"):
            job.load(tmp_path, step=5)
        assert job.load(tmp_path, step=2) is not None
        job.train(range(2, 3))
        job.save(tmp_path, keep=2)
        loaded = job.load(tmp_path)
        return [loaded.step if loaded else -1]

    assert run_local(2, main, LIMIT_S) == [[3]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003-step-6", "000004-step-3"]


def test_ranks_that_see_different_directories_are_told(tmp_path: Path) -> None:
    saved_job(tmp_path / "0")

    def load(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match=r"number 1 on rank 0; none on rank 1: .* all ranks share"):
            Job(transport, little(momentum=0.5)).load(tmp_path / str(transport.rank))

    def save(transport: LocalTransport) -> None:
        if transport.rank == 1:
            (tmp_path / "1" / "000002-step-0").mkdir(parents=True)
        transport.barrier()
        with pytest.raises(ValueError, match=r"not seen by rank 0: .* all ranks share"):
            Job(transport, little(momentum=0.5)).save(tmp_path / str(transport.rank))

    run_local(2, load, LIMIT_S)
    run_local(2, save, LIMIT_S)
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["000001-step-2"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"own": {"file": Path()}}, "'own/file' is of type pathlib"),
        ({"own": [torch.nn.Linear(1, 1)]}, "'own/0' is of type torch.nn.modules.linear.Linear"),
        ({"own": {(1, 2): 3}}, "own has a key of type tuple"),
        ({"own": torch.eye(2).to_sparse()}, "'own' is of type torch.Tensor"),
        ({"keep": 0}, "keep must be an integer of at least 1"),
    ],
)
def test_what_one_rank_cannot_save_no_rank_saves(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    def main(transport: LocalTransport) -> str:
        with pytest.raises(ValueError) as caught:
            Job(transport, little()).save(tmp_path, **(wrong if transport.rank == 1 else {}))
        return str(caught.value)

    messages = run_local(3, main, LIMIT_S)
    assert all(told in message for message in messages) and "rank 1 of 3 could not save a checkpoint" in messages[2]
    assert list(tmp_path.iterdir()) == []


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from hvd_sketch.transport import run_local
from tests.support.saving import Job, little

def main(transport):
    job = Job(transport, little(momentum=0.5))
    loaded = job.load(Path(sys.argv[1]))
    for step in range(loaded.step if loaded else 0, 10**9):
        job.train(range(step, step + 1))
        job.save(Path(sys.argv[1]), own=step + 1, keep=1)

run_local(2, main)
"""


def test_a_job_that_is_killed_while_it_saves_goes_on(tmp_path: Path) -> None:
    newest = 0

    def has_gone_on() -> bool:
        return max(map(number_of, tmp_path.iterdir()), default=0) > newest + 3

    for delay_s in (0.004, 0.017):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, env=child_environment()) as process:
            wait_until(has_gone_on)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(delay_s)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        newest = max(map(number_of, tmp_path.iterdir()))

        def main(transport: LocalTransport) -> None:
            loaded = Job(transport, little(momentum=0.5)).load(tmp_path)
            assert loaded is not None and loaded.own == loaded.step

        run_local(2, main, LIMIT_S)


def number_of(folder: Path) -> int:
    return int(folder.name.split("-")[0])


# --- damage


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def place_of(path: Path, wanted: torch.Tensor) -> int:
    """Where a file holds a tensor."""
    return path.read_bytes().index(wanted.numpy().tobytes())


def flip_v(folder: Path) -> None:
    v = torch.load(folder / "rank-1.pt", weights_only=True)["exchange"]["sketched"]["v"]
    flip(folder / "rank-1.pt", place_of(folder / "rank-1.pt", v) + 42)


def flip_weight(folder: Path) -> None:
    weight = torch.load(folder / "shared.pt", weights_only=True)["model"]["weight"]
    flip(folder / "shared.pt", place_of(folder / "shared.pt", weight))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of v": (flip_v, "rank-1.pt is damaged: 'exchange/sketched/v' of "),
    "a byte of a weight": (flip_weight, "shared.pt is damaged: 'model/weight' of "),
    "truncated": (lambda f: cut(f / "rank-0.pt", 1000), "rank-0.pt cannot be read: it has 1000 bytes, and "),
    "empty": (lambda f: cut(f / "shared.pt", 0), "shared.pt cannot be read: it has 0 bytes"),
    "missing": (lambda f: (f / "rank-1.pt").unlink(), "No such file"),
    "another rank's": (lambda f: shutil.copy(f / "rank-0.pt", f / "rank-1.pt"), "rank-1.pt"),
    "manifest empty": (lambda f: cut(f / "manifest.json", 0), "manifest.json cannot be read"),
    "manifest cut": (lambda f: cut(f / "manifest.json", 500), "manifest.json cannot be read"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "other ranks": (lambda f: edit(f / "manifest.json", '"ranks": 2', '"ranks": 3'), "not have the checksum"),
    "renamed": (lambda f: f.rename(f.with_name("000002-step-5")), "the step that it had"),
}


def cut(path: Path, size_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:size_bytes])


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_refused_on_every_rank_with_what_to_do(what: str, tmp_path: Path) -> None:
    damage, told = DAMAGES[what]
    damage(saved_job(tmp_path, saves=2))
    for message in refusals(tmp_path):
        assert told in message and "go on from step 2, 000001-step-2" in message


@pytest.mark.parametrize("name", ["shared.pt", "rank-1.pt", "manifest.json"])
def test_no_flipped_byte_is_loaded(name: str, tmp_path: Path) -> None:
    """Wherever it is: an error on both ranks, or nothing that is loaded has changed."""
    file = saved_job(tmp_path) / name
    whole = file.read_bytes()

    def main(transport: LocalTransport) -> list[int]:
        job = Job(transport, little(momentum=0.5))
        expected = job.load(tmp_path)
        tensors, harmless = job.tensors(), []
        for place in range(11, len(whole), len(whole) // 60):
            if transport.rank == 0:
                file.write_bytes(whole)
                flip(file, place)
            transport.barrier()
            try:
                assert job.load(tmp_path) == expected
            except ValueError as error:
                assert name in str(error) and "Put a copy" in str(error)
            else:
                assert all(map(torch.equal, tensors, job.tensors()))
                harmless.append(place)
            transport.barrier()
        return harmless

    harmless = run_local(2, main, LIMIT_S)
    assert harmless[0] == harmless[1]
    assert len(harmless[0]) < 45 * (name != "manifest.json") + 1, harmless  # padding and headers of the zip


def test_nothing_is_executed_by_loading(tmp_path: Path) -> None:
    folder = saved_job(tmp_path, ranks=1)
    path, manifest = folder / "shared.pt", folder / "manifest.json"
    torch.save({"model": Path("/")}, path)
    edit(manifest, str(json.loads(manifest.read_text())["files"]["shared.pt"]["bytes"]), str(path.stat().st_size))
    content = json.loads(manifest.read_text())
    del content["checksum"]
    from hvd_sketch.model.checkpoint_files import _checksum

    manifest.write_text(json.dumps({**content, "checksum": _checksum(content)}))
    (message,) = refusals(tmp_path, ranks=1)
    assert "Weights only load failed" in message and "begin again: none is older" in message


def test_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    saved_job(tmp_path)

    def main(transport: LocalTransport) -> None:
        job = Job(transport, little(momentum=0.5))
        job.model.bias = torch.nn.Parameter(torch.zeros(4))
        with pytest.raises(
            ValueError, match=r"shared.pt is of another model: 'bias' is float32 \(3,\) there, .*\(4,\)"
        ):
            load_checkpoint(tmp_path, job.model, job.optimizer)
        other = Job(transport, little(momentum=0.5, dense_below=21))
        with pytest.raises(ValueError, match=r"does not fit this optimizer: .*saved for other tensors"):
            other.load(tmp_path)
        plain = DistributedOptimizer(torch.optim.SGD(other.model.parameters()), None, None, transport)
        with pytest.raises(ValueError, match=r"is of another optimizer: Adam there, SGD here"):
            load_checkpoint(tmp_path, other.model, plain)

    run_local(2, main, LIMIT_S)
