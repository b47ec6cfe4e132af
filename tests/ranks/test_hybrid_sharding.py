"""FSDP2 along one dimension of a mesh, our exchange of local shards along the other: 2 by 2 ranks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.support.worlds import register

pytestmark = pytest.mark.multiprocess

TARGETS = "tests.support.shard_targets"
FOLDER = TemporaryDirectory()  # of the checkpoints; until the tests end
TRAINS = register("torch", 4, f"{TARGETS}:trains")
SKIPS = register("torch", 4, f"{TARGETS}:skips_together")
ONE_REFUSES = register("torch", 4, f"{TARGETS}:one_refuses")
SCHEDULES = register("torch", 4, f"{TARGETS}:schedules_drift")
DRIFTS = register("torch", 4, f"{TARGETS}:drifts")
TAKES_OVER = register("torch", 4, f"{TARGETS}:takes_over")
GOES_ON = register("torch", 4, f"{TARGETS}:goes_on", folder=FOLDER.name)
FEWER = register("torch", 4, f"{TARGETS}:goes_on_with_fewer_replicas", folder=FOLDER.name)
OPTIMIZERS = register("torch", 4, f"{TARGETS}:other_optimizers")
CLIPS = register("torch", 4, f"{TARGETS}:clips")
JOINS = register("torch", 4, f"{TARGETS}:joins")
TENSOR_PARALLEL = register("torch", 4, f"{TARGETS}:goes_on_with_tensor_parallelism", folder=FOLDER.name)
HOLDS_NOTHING = register("torch", 4, f"{TARGETS}:holds_nothing", folder=FOLDER.name)
REFUSED_BY_ONE = register("torch", 4, f"{TARGETS}:refused_by_one_shard")
REFUSED = register("torch", 4, f"{TARGETS}:refused")


def assert_replicas_equal(held: list[torch.Tensor]) -> None:
    """Of what ranks 0 to 3 hold, in replicas of two shards."""
    assert torch.equal(held[0], held[2]) and torch.equal(held[1], held[3])
    assert not torch.equal(held[0], held[1][: len(held[0])])


@pytest.mark.parametrize("compression", ["dense", "sketched", "nominated", "low rank"])
def test_replicas_stay_equal_to_the_bit(compression: str) -> None:
    results = TRAINS.results()
    assert_replicas_equal([result[compression]["shards"] for result in results])
    sent = [result[compression]["ledger"].wire_bytes for result in results]
    dense = [result["dense"]["ledger"].wire_bytes for result in results]
    assert compression == "dense" or all(ours < all_of_it / 5 for ours, all_of_it in zip(sent, dense, strict=True))


def test_a_dense_exchange_trains_as_an_unsharded_model() -> None:
    for result in TRAINS.results():
        torch.testing.assert_close(result["dense"]["whole"], result["unsharded"], rtol=1e-5, atol=1e-6)


def test_all_shards_skip_a_step_together() -> None:
    assert SKIPS.results() == [{"moved": False, "skipped": 1, "nan": True}] * 4


def test_what_one_shard_refuses_all_ranks_refuse() -> None:
    for said in ONE_REFUSES.results():
        assert "parameter '0.weight' is placed" in said and "p.grad.redistribute(placements=p.placements)" in said


def test_a_schedule_of_one_shard_stops_all_ranks() -> None:
    for rank, said in enumerate(SCHEDULES.results()):
        assert "the optimizers' settings, or their steps, differ between the ranks" in said, rank
        assert "lr of group 0: 0.3 on rank 0; 0.15 on rank 1" in said


def test_a_shard_that_has_drifted_is_named() -> None:
    said = DRIFTS.results()
    for rank in (1, 3):
        assert "the parameters differ between the ranks" in said[rank] and "'2.weight': checksum" in said[rank]
    assert said[0] == said[2] == "", "their own shards are equal"


def test_a_replica_takes_over_parameters_and_states() -> None:
    for went_on, took_over in TAKES_OVER.results():
        assert torch.equal(went_on, took_over)


@pytest.mark.parametrize("kind", ["plain", "save_checkpoint", "torch.distributed.checkpoint"])
def test_goes_on_from_a_checkpoint_to_the_bit(kind: str) -> None:
    for result in GOES_ON.results():
        assert torch.equal(*result[kind])
    files = {path.name for path in Path(FOLDER.name, "save_checkpoint", "000001-step-3").iterdir()}
    assert files == {"manifest.json", "shared.pt", "shared-1.pt", *(f"rank-{rank}.pt" for rank in range(4))}


def test_a_checkpoint_goes_to_another_number_of_replicas() -> None:
    for result in FEWER.results():
        assert (result["step"], result["own"], result["is trained on"]) == (3, None, True)
        assert (
            "the state holds a shard of a mesh of shard: 2, and the model's parameters are on none"
            in (result["to an unsharded model"])
        )


@pytest.mark.parametrize("optimizer", ["LagAdamW", "SignSGD", "AdamW", "LocalSteps", "ahead"])
def test_other_optimizers_keep_replicas_equal(optimizer: str) -> None:
    results = OPTIMIZERS.results()
    assert_replicas_equal([result[optimizer] for result in results])
    assert not torch.equal(results[0]["ahead"], results[0]["LagAdamW"])


def test_averaged_gradients_are_clipped_by_the_norm_of_all_shards() -> None:
    for ours, unsharded in CLIPS.results():
        torch.testing.assert_close(ours, unsharded, rtol=1e-5, atol=1e-6)


def test_a_replica_that_runs_out_of_data_is_waited_for() -> None:
    assert_replicas_equal(JOINS.results())


@pytest.mark.parametrize("kind", ["broadcast", "checkpoint"])
def test_states_of_tensor_parallel_layers_go_on_to_the_bit(kind: str) -> None:
    for result in TENSOR_PARALLEL.results():
        assert torch.equal(*result[kind])


def test_a_rank_that_holds_no_element_takes_part() -> None:
    results = HOLDS_NOTHING.results()
    assert [result["plain"].numel() for result in results] == [64, 64, 0, 0]
    for result in results:
        assert torch.equal(result["dense"], result["plain"]), "of one replica the mean is its own gradient"
        assert result["loaded"] == 4
    assert not torch.equal(results[0]["low rank"], results[0]["plain"]), "the others go dense: they are small"


def test_what_the_ranks_of_one_shard_refuse_at_set_up_all_refuse() -> None:
    for said in REFUSED_BY_ONE.results():
        assert "k must be" in said and said.startswith("ValueError")


@pytest.mark.parametrize("keeps_parameters", [False, True])
def test_fsdp1_is_refused(keeps_parameters: bool) -> None:
    for result in REFUSED.results():
        said = result[f"FSDP1, {keeps_parameters}"]
        assert "belongs to FullyShardedDataParallel (FSDP1)" in said and "fully_shard (FSDP2)" in said


@pytest.mark.parametrize("case", ["everywhere", "by FSDP", "along the shards", "by default", "broadcast"])
def test_shards_over_the_ranks_that_exchange_are_refused(case: str) -> None:
    for said in (result[case] for result in REFUSED.results()):
        assert said.startswith("ValueError: the mesh of '") and "extends over the ranks that exchange" in said
        assert said.endswith("exchange along the other, transport=TorchTransport(mesh['replicate'])")


def test_parameters_that_nobody_averages_are_refused() -> None:
    for result in REFUSED.results():
        assert result["in part"].startswith("ValueError: parameters '2.weight', '2.bias' are not sharded, and others")
        assert result["partial"].startswith("ValueError: parameter 'weight' is a DTensor with a partial placement")
