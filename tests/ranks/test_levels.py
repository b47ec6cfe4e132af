"""levels=2: a dense mean inside of every host, the compressed exchange between one rank of each."""

from __future__ import annotations

import re
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from hvd_sketch.model.levels import HAND_ON, TwoLevels
from hvd_sketch.transport import LocalTransport, metered, run_local, stall
from hvd_sketch.transport.stall import StallWatch
from tests.support.levels_targets import COMPRESSIONS, STEPS, hosts_alone
from tests.support.toy import Toy, mean_of
from tests.support.worlds import Job, register

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore:all ranks skip this step")]

TARGETS = "tests.support.levels_targets"
FOLDER = TemporaryDirectory()  # of the checkpoints; until the tests end
HOSTS = [0, 0, 1, 1]


def trains(kind: str, hosts: list[int]) -> Any:
    job = register(kind, len(hosts), f"{TARGETS}:trains", hosts=hosts)
    return pytest.param(job, hosts, id=f"{kind}-{''.join(map(str, hosts))}")


WORLDS = [
    trains("torch", HOSTS),
    trains("torch", [0, 1, 0, 1]),
    trains("horovod-gloo", [0, 0]),
    trains("horovod-mpi", [0, 1]),
]
UNEVEN = [trains("torch", [0, 1, 1, 1]), trains("mpi", [0, 0, 1])]
SKIPS = register("torch", 4, f"{TARGETS}:skips")
PARTS = register("torch", 4, f"{TARGETS}:parts_used")
REFUSES = register("torch", 4, f"{TARGETS}:refuses")
CLIPS = register("torch", 4, f"{TARGETS}:clips")
JOINS = register("torch", 4, f"{TARGETS}:joins")
DECAYS = [
    register("torch", 4, f"{TARGETS}:decays", batches=batches) for batches in ([6, 6, 6, 6], [1, 6, 6, 6], [1, 6, 1, 6])
]
GOES_ON = register("torch", 4, f"{TARGETS}:goes_on", folder=FOLDER.name)
REFUSED = register("torch", 4, f"{TARGETS}:refused")


def sum_of_means(ranks: int) -> torch.Tensor:
    """Parameters after dense steps with a rate of 1."""
    steps = [torch.cat([mean.flatten() for mean in mean_of(ranks, step)]) for step in range(STEPS)]
    return -torch.stack(steps).sum(0)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("job", "hosts"), WORLDS)
def test_hosts_exchange_their_means_as_ranks_would(job: Job, hosts: list[int], compression: str) -> None:
    ranks = [result[compression] for result in job.results()]
    if len(set(hosts)) > 1:
        alone = run_local(len(set(hosts)), partial(hosts_alone, name=compression, hosts=hosts), 60)
    else:
        alone = [{"parameters": sum_of_means(len(hosts)), "residual": None}]
    for rank, result in enumerate(ranks):
        expected = alone[hosts[rank]]
        is_leader = hosts.index(hosts[rank]) == rank
        if len(set(hosts)) > 1 or compression != "paper":  # which has momentum, also where all goes dense
            assert torch.equal(result["parameters"], expected["parameters"])
        assert torch.equal(result["parameters"], ranks[0]["parameters"])
        if is_leader and expected["residual"] is not None:
            assert torch.equal(result["residual"], expected["residual"])
            assert result["totals"] == expected["totals"], "bytes between hosts are those of one rank a host"
        if not is_leader:
            assert result["residual"] is None and result["totals"].wire_bytes == 0
            assert result["totals"].steps == STEPS


@pytest.mark.parametrize(("job", "hosts"), UNEVEN)
def test_hosts_count_by_their_ranks(job: Job, hosts: list[int]) -> None:
    results = job.results()
    for result in results:
        for compression in COMPRESSIONS:
            assert torch.equal(result[compression]["parameters"], results[0][compression]["parameters"])
        torch.testing.assert_close(result["dense"]["parameters"], sum_of_means(len(hosts)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["sums"], sum_of_means(len(hosts)) * len(hosts), rtol=1e-6, atol=1e-6)


def test_a_split_of_threads_has_the_ranks_of_one_colour() -> None:
    def rank_main(transport: LocalTransport) -> list[Any]:
        parts = transport.split(transport.rank % 2), transport.split(0)
        sums = [part.allreduce_(torch.tensor([10.0**transport.rank])).item() for part in parts]
        return [(part.rank, part.size) for part in parts] + sums

    assert run_local(4, rank_main, 60) == [
        [(0, 2), (0, 4), 101, 1111],
        [(0, 2), (1, 4), 1010, 1111],
        [(1, 2), (2, 4), 101, 1111],
        [(1, 2), (3, 4), 1010, 1111],
    ]


def test_a_rank_behind_a_leader_that_waits_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StallWatch(0.5)
    for module in (metered, stall):
        monkeypatch.setattr(module, "process_watch", lambda: watch)

    def rank_main(transport: LocalTransport) -> None:
        model, hosts = Toy(), ("first", "first", "second")
        settings = {"is_sum": False, "makes_sparse": False, "check_every": 0, "max_skips": 0}
        named = list(model.named_parameters())
        levels = TwoLevels(named, COMPRESSIONS["nominated"], transport, host=hosts[transport.rank], **settings)
        model.backward(transport.rank, 0)
        if transport.rank == 2:
            time.sleep(1.5)
        levels.average()

    run_local(3, rank_main, 60)
    told = sorted(re.findall("(rank . of 2) has waited .* (phase '.*?')", caplog.text))
    assert told == [("rank 0 of 2", "phase 'agree'"), ("rank 1 of 2", f"phase '{HAND_ON}'")]


def test_all_ranks_of_all_hosts_skip_together() -> None:
    results = SKIPS.results()
    for result in results:
        assert (result["moved"], result["nan"], result["skipped"]) == (False, True, 1)
        assert torch.equal(result["parameters"], results[0]["parameters"])


def test_what_any_rank_of_any_host_uses_is_updated_on_all() -> None:
    results = PARTS.results()
    for parameters, used in results:
        assert used == [True, True, False] and torch.equal(parameters, results[0][0])


def test_what_one_rank_refuses_all_hosts_refuse() -> None:
    for first, nothing, last in REFUSES.results():
        assert "cannot take this step, so no rank does: parameter 'weight'" in first or first.startswith("ValueError")
        assert nothing == "" and "all ranks skipped 2 steps in a row" in last
        assert "Here ranks are counted within one host: they are ranks 2, 3 of the job." in first
        assert "Here ranks are counted among the first ranks of the hosts: they are ranks 0, 2 of the job." in last


def test_averages_can_be_clipped_and_are_not_exchanged_twice() -> None:
    for two_levels, one in CLIPS.results():
        torch.testing.assert_close(two_levels, one, rtol=1e-6, atol=1e-6)


def test_ranks_run_out_of_data_one_by_one() -> None:
    for two_levels, one in JOINS.results():
        assert torch.equal(two_levels, one)


def test_weights_that_are_out_of_date_do_not_decay() -> None:
    """They would be taken off again and again: where both leaders had left, weights grew."""
    for whole, one_left, both_left in zip(*(job.results() for job in DECAYS), strict=True):
        assert bool((whole < one_left).all()) and bool((one_left <= both_left).all())
        assert float(both_left.min()) == float(both_left.max()) == 0.5  # of the one step that a leader has made


@pytest.mark.parametrize("way", ["checkpoint", "elsewhere", "own", "consolidated", "broadcast"])
def test_goes_on(way: str) -> None:
    results = GOES_ON.results()
    for result in results:
        assert torch.equal(result[way], results[0][way])
        assert torch.equal(result[way], result["whole"])  # whole numbers: the mean of residuals loses nothing
        assert result[f"steps, {way}"] == 5, "logs go on by it"
        assert "rank 1 keeps no state with levels=2, ranks [0, 2] do" in result["wrong root"]


def test_what_does_not_go_with_two_levels_is_refused_on_every_rank() -> None:
    for said in REFUSED.results():
        assert "levels=2 hands dense gradients on: leave out sparse_as_dense" in said["sparse"]
        assert "levels must be one of 1, 2, got 3" in said["levels"]
        assert "levels: 1 on ranks 0, 1, 3; 2 on rank 2" in said["of one rank"]
