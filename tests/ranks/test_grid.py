"""Many ranks in rows and columns: the same results as direct messages, and what they cost is counted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from hvd_sketch import LowRankConfig, SketchConfig, SketchedAllreduce, recommended
from hvd_sketch.config import Compression
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.rank_grid import GRID_RANKS, grid_of
from hvd_sketch.simulate import Simulation
from hvd_sketch.transport import Handle, Transport, local_transports, run_local
from hvd_sketch.transport.base import Splitting
from hvd_sketch.transport.forwarding import ForwardingTransport
from hvd_sketch.transport.grid import GridTransport, in_grid
from hvd_sketch.transport.metered import MeteredTransport
from tests.support.contract import check_all

CHECKS = 9  # in tests/support/contract.py
DIM = 40 * 50


@pytest.mark.parametrize("ranks", [4, 6, 9])
def test_contract_in_a_grid(ranks: int) -> None:
    assert run_local(ranks, lambda transport: check_all(transport, grid=True)) == [CHECKS] * ranks


@pytest.mark.parametrize(
    ("size", "grid"), [(1, (1, 1)), (4, (2, 2)), (48, (6, 8)), (62, (2, 31)), (61, (1, 61)), (1024, (32, 32))]
)
def test_the_grid_is_as_square_as_can_be(size: int, grid: tuple[int, int]) -> None:
    assert grid_of(size) == grid


def test_few_ranks_and_prime_numbers_of_ranks_stay_direct() -> None:
    for ranks, kind in ((GRID_RANKS - 1, False), (GRID_RANKS, True), (37, False)):
        assert run_local(ranks, lambda transport: isinstance(in_grid(transport), GridTransport)) == [kind] * ranks


def test_what_cannot_be_split_stays_direct() -> None:
    def main(transport: Transport) -> bool:
        unsplit = ForwardingTransport(transport)  # a transport of somebody else's
        return in_grid(unsplit) is unsplit

    assert all(run_local(GRID_RANKS, main))
    with pytest.raises(ValueError, match="that can be split, got ForwardingTransport"):
        GridTransport(ForwardingTransport(local_transports(4)[0]))


def test_a_rank_that_fails_releases_those_that_wait_in_a_row_or_column() -> None:
    def main(transport: Transport) -> None:
        grid = GridTransport(transport)
        if transport.rank == 3:
            raise RuntimeError("rank 3 failed")
        grid.allgather(torch.zeros(1))

    with pytest.raises(RuntimeError, match="rank 3 failed"):
        run_local(4, main, timeout_s=60)


class Broken(ForwardingTransport):
    """A transport whose parts fail from the ``number``-th one on."""

    def __init__(self, inner: Transport, number: int, fails: bool = False) -> None:
        super().__init__(inner)
        self._number, self._fails = number, fails

    def split(self, color: int) -> Broken:
        assert isinstance(self._inner, Splitting)
        self._number -= 1
        return Broken(self._inner.split(color), 0, self._number < 0)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("rank 1 of 3 waited in vain")

    def __getattribute__(self, name: str) -> Any:
        is_collective = name in ("allreduce_", "allgather", "alltoall", "start_reduce_scatter", "reduce_scatter")
        return self._fail if is_collective and self._fails else super().__getattribute__(name)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, "a row of the grid, whose ranks 0, 1, … are ranks 3, 4, 5"),
        (1, "a column of the grid, whose ranks 0, 1, … are ranks 1, 4"),
    ],
)
@pytest.mark.parametrize("collective", ["allreduce_", "allgather", "alltoall", "reduce_scatter"])
def test_errors_of_a_part_say_which_ranks_are_in_it(collective: str, number: int, told: str) -> None:
    def main(transport: Transport) -> list[str]:
        grid = GridTransport(Broken(transport, number))
        with pytest.raises(RuntimeError, match="rank 1 of 3 waited in vain") as error:
            getattr(grid, collective)(torch.zeros(6, 4))
        return error.value.__notes__

    assert told in run_local(6, main, timeout_s=60)[4][0]


class Counting(ForwardingTransport):
    """A transport that counts the bytes that this rank hands to others in direct messages."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.sent_bytes = 0
        self.parts: list[Counting] = []

    def split(self, color: int) -> Counting:
        assert isinstance(self._inner, Splitting)
        self.parts.append(Counting(self._inner.split(color)))
        return self.parts[-1]

    def _send(self, payload_bytes: float) -> None:
        self.sent_bytes += round(payload_bytes * (self._inner.size - 1) / self._inner.size)

    def alltoall(self, tensor: torch.Tensor) -> torch.Tensor:
        self._send(tensor.nbytes)
        return self._inner.alltoall(tensor)

    def start_reduce_scatter(self, tensor: torch.Tensor, ordered: bool = False) -> Handle:
        self._send(tensor.nbytes)
        return self._inner.start_reduce_scatter(tensor, ordered)

    def reduce_scatter(self, tensor: torch.Tensor, ordered: bool = False) -> torch.Tensor:
        self._send(tensor.nbytes)
        return self._inner.reduce_scatter(tensor, ordered)

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        self._send(2 * tensor.nbytes)
        return self._inner.allreduce_(tensor)

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._send(tensor.nbytes * self._inner.size)
        return self._inner.allgather(tensor)

    def total(self) -> int:
        return self.sent_bytes + sum(part.sent_bytes for part in self.parts)


class Whole(Counting):
    """One that says that it cannot be split, and whose allreduces have a tree."""

    can_split = False
    allreduces_by_tree = True


def test_what_says_that_it_cannot_be_split_stays_direct() -> None:
    def main(transport: Transport) -> bool:
        whole = Whole(transport)
        return in_grid(whole) is whole

    assert all(run_local(GRID_RANKS, main))


def test_an_allreduce_by_a_tree_stays_whole() -> None:
    def main(transport: Transport) -> tuple[bool, float]:
        whole = Whole(transport)
        grid = GridTransport(whole)
        grid.allreduce_(torch.zeros(4))
        return whole.sent_bytes == whole.total() > 0, grid.passes("allreduce", 16)

    assert run_local(4, main) == [(True, 1.0)] * 4


@pytest.mark.parametrize("large", [False, True])
def test_the_ledger_counts_what_goes_twice(large: bool) -> None:
    numbers = 30_000 if large else 1200

    def main(transport: Transport) -> list[tuple[int, int]]:
        counting = Counting(transport)
        comm = MeteredTransport(GridTransport(counting), CommLedger())
        counted, before = [], (counting.total(), 0)
        for collective in ("alltoall", "reduce_scatter", "allgather", "allreduce_"):
            shape = (12, numbers // 12) if collective in ("alltoall", "reduce_scatter") else (numbers,)
            getattr(comm, collective)(torch.zeros(shape))
            after = counting.total(), comm.ledger.totals().wire_bytes
            counted.append((after[0] - before[0], after[1] - before[1]))
            before = after
        return counted

    of_ranks = run_local(12, main)
    for counted in of_ranks:
        for sent, told in counted:
            assert sent > 0 and abs(sent - told) <= 2
    alltoall_bytes, sum_bytes = of_ranks[0][0][1], of_ranks[0][1][1]
    assert sum_bytes == round(4 * numbers * 11 / 12)
    assert alltoall_bytes == (sum_bytes if large else round(4 * numbers * (3 / 4 + 2 / 3)))


@pytest.mark.parametrize(
    "config",
    [
        SketchConfig(k=100, candidates="nominate"),
        SketchConfig(cols=128, k=50, table_bits=4),
        SketchConfig.paper(cols=128, k=50),
        LowRankConfig(ratio=10.0),
        None,
    ],
    ids=["nominate", "sketch", "paper", "lowrank", "dense"],
)
def test_many_ranks_train_as_with_direct_messages(config: Compression | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-bit sums are made in rank order either way; sums of float32 in another order, of small integers."""

    def main(transport: Transport) -> torch.Tensor:
        model = nn.Linear(50, 40, bias=False)
        exchange = GradientExchange(list(model.named_parameters()), config, transport)
        averaged = []
        for step in range(2):
            generator = torch.Generator().manual_seed(1000 * step + transport.rank)
            model.weight.grad = torch.randint(-8, 9, (40, 50), generator=generator).float()
            assert exchange.average()
            averaged.append(model.weight.grad.clone())
        return torch.stack(averaged)

    in_rows_and_columns = run_local(GRID_RANKS, main)
    monkeypatch.setattr("hvd_sketch.model.gradients.in_grid", lambda transport: transport)
    direct = run_local(GRID_RANKS, main)
    for found, expected in zip(in_rows_and_columns, direct, strict=True):
        assert found.abs().sum() > 0 and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(found, in_rows_and_columns[0]) for found in in_rows_and_columns)


@pytest.mark.parametrize("own", [{"candidates": "nominate"}, {"table_bits": 4}])
def test_a_ratio_for_many_ranks_counts_what_goes_twice(own: dict[str, Any]) -> None:
    ratio, dim = 100.0, 256 * 1024
    config = SketchConfig.for_wire_ratio(ratio, dim, GRID_RANKS, **own)

    def main(transport: Transport) -> float:
        exchange = SketchedAllreduce(config, dim, in_grid(transport))
        for step in range(3):
            generator = torch.Generator().manual_seed(1000 * step + transport.rank)
            exchange.step(torch.randn(dim, generator=generator) ** 3)
        return exchange.ledger.compression_ratio()

    assert run_local(GRID_RANKS, main) == [pytest.approx(ratio, rel=0.05)] * GRID_RANKS


@pytest.mark.parametrize("ratio", [20.0, 60.0])
def test_recommended_low_rank_for_many_ranks_counts_what_goes_twice(ratio: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(300, 400), (600, 200), (200,)]]
    config = recommended(parameters, ratio, GRID_RANKS)
    assert isinstance(config, LowRankConfig)
    with pytest.raises(ValueError, match="highest ratio possible is") as refusal:
        recommended(parameters, 1000.0, GRID_RANKS, "adam")
    highest = float(re.findall(r"possible is (\d+\.\d+)", str(refusal.value))[0])
    assert isinstance(recommended(parameters, highest, GRID_RANKS, "adam"), LowRankConfig)

    simulation = Simulation([(str(n), p) for n, p in enumerate(parameters)], config, GRID_RANKS)
    for _ in range(2):
        for rank in range(GRID_RANKS):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rank))
            simulation.accumulate(rank)
        simulation.agree()
    assert 0.98 * ratio < simulation.ledger.compression_ratio() < 1.1 * ratio
