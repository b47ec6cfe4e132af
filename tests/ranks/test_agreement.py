"""The first collective of a step: what ranks tell each other, and what they make of it, equal on all."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce
from hvd_sketch.exchange.agreement import DIGEST_BITS, STEP_BITS, Agreed, Report, StepAgreement
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.stall import StallWatch

LIMIT_S = 60
CONFIG = SketchConfig.paper(cols=30, k=5, momentum=0.0)


def agree(ranks: int, report: Callable[[int], Report], step: int = 7, parameters: int = 0) -> list[Agreed]:
    """What every rank hears when rank r tells ``report(r)``."""

    def main(transport: LocalTransport) -> Agreed:
        comm = MeteredTransport(transport, CommLedger())
        return StepAgreement(ranks, parameters).agree(comm, step, report(transport.rank))

    return run_local(ranks, main, LIMIT_S)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("parameters", [1, 20, 21, 62, 63, 500])
def test_any_rank_with_a_gradient_makes_a_parameter_used(ranks: int, parameters: int) -> None:
    generator = torch.Generator().manual_seed(parameters)
    every = (torch.rand(ranks, parameters, generator=generator) < 0.4).tolist()
    expected = tuple(any(column) for column in zip(*every, strict=True))
    heard = agree(ranks, lambda rank: Report(used=every[rank]), parameters=parameters)
    assert [agreed.used for agreed in heard] == [expected] * ranks
    all_used = agree(ranks, lambda rank: Report(used=[True] * parameters), parameters=parameters)
    assert all(all(agreed.used) for agreed in all_used), "counters overflow into their neighbours"


def test_every_word_survives_at_its_largest() -> None:
    report = Report(finite=True, digest=(1 << DIGEST_BITS) - 1)
    for agreed in agree(3, lambda rank: report, step=(1 << STEP_BITS) - 1):
        assert agreed.goes_on and not agreed.drifted and agreed.active == (0, 1, 2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_step_of_another_exchange_is_refused_everywhere(ranks: int) -> None:
    """Of one that rank 1 takes for it: both have as many parameters and are at the same step."""

    def main(transport: LocalTransport) -> str:
        comm = MeteredTransport(transport, CommLedger())
        with pytest.raises(RuntimeError, match="the ranks step different optimizers") as raised:
            StepAgreement(ranks, 3, serial=5 + (transport.rank == 1)).agree(comm, 7, Report(used=[True] * 3))
        return str(raised.value)

    told = run_local(ranks, main, LIMIT_S)
    assert set(told) == {told[0]} and f"number {[5, 6, 5][:ranks]}" in told[0]


def test_digests_are_compared_where_all_ranks_made_one() -> None:
    def told(report: Callable[[int], Report]) -> tuple[bool, bool, bool]:
        (each,) = {(a.compared, a.drifted, a.settings_differ) for a in agree(3, report)}
        return each

    assert told(lambda rank: Report(digest=5 + (rank == 1), of_parameters=True)) == (True, True, False)
    assert told(lambda rank: Report(digest=5, of_parameters=True)) == (True, False, False)
    assert told(lambda rank: Report(digest=5 + (rank == 1))) == (False, False, True)
    assert told(lambda rank: Report(digest=5)) == (False, False, False)
    assert told(lambda rank: Report(digest=5 + rank, of_parameters=rank == 1)) == (False, False, False)
    assert told(lambda rank: Report(digest=0 if rank == 1 else 5 + rank)) == (False, False, False)
    of_some = [Report(), *(Report(digest=digest, of_parameters=True) for digest in (5, 6))]
    assert told(lambda rank: of_some[rank]) == (False, False, False)


def test_who_is_done_is_no_longer_active_and_when_all_are_nobody_steps() -> None:
    assert [a.active for a in agree(3, lambda rank: Report(done=rank != 1))] == [(1,)] * 3
    heard = agree(3, lambda rank: Report(done=True))
    assert [(a.active, a.goes_on) for a in heard] == [((), False)] * 3


def test_what_one_rank_refuses_all_refuse_and_it_says_its_own() -> None:
    def main(transport: LocalTransport) -> str:
        comm = MeteredTransport(transport, CommLedger())
        refusal = ValueError("my gradient is gone") if transport.rank == 2 else None
        with pytest.raises((ValueError, RuntimeError)) as raised:
            StepAgreement(3).agree(comm, 0, Report(refusal=refusal))
        return f"{raised.type.__name__}: {raised.value}"

    heard = run_local(3, main, LIMIT_S)
    assert heard[2] == "ValueError: my gradient is gone"
    assert heard[0] == heard[1] and heard[0].startswith("RuntimeError: rank 2 of 3 cannot take this step")
    assert "my gradient is gone" in heard[0]


def test_a_wrong_gradient_on_one_rank_stops_all() -> None:
    def main(transport: LocalTransport) -> None:
        exchange = SketchedAllreduce(CONFIG, 100, transport)
        gradient = torch.ones(100 if transport.rank else 99)
        with pytest.raises(RuntimeError if transport.rank else ValueError, match=r"shape \(100,\).*got .* of \(99,\)"):
            exchange.step(gradient)

    run_local(3, main, LIMIT_S)


def test_an_exchange_of_named_parameters_is_stepped_without_a_model() -> None:
    named = [(f"layer {i}", (10,), "float32") for i in range(10)]
    exchange = SketchedAllreduce(CONFIG, 100, local_transports(1)[0], parameters=named)
    assert exchange.step(torch.ones(100)).indices.numel() == 5


def test_a_rank_that_left_by_horovods_join_is_named() -> None:
    """It adds zeros to every sum."""

    class Left(LocalTransport):
        def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
            return super().allreduce_(tensor.zero_() if self.rank == 1 else tensor)

    def main(transport: LocalTransport) -> None:
        comm = MeteredTransport(Left(transport._room, transport.rank), CommLedger())
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 left this step by hvd\.join\(\).*optimizer\.join\(\)"):
            StepAgreement(2).agree(comm, 0, Report())

    run_local(2, main, LIMIT_S)


@pytest.mark.filterwarnings("ignore:all ranks skip this step")
@pytest.mark.parametrize("limit", [0, 1, 25])
def test_too_many_skips_in_a_row_raise_on_every_rank(limit: int) -> None:
    def main(transport: LocalTransport) -> list[str]:
        exchange = SketchedAllreduce(CONFIG, 100, transport, max_skips=limit)
        bad, good = torch.full((100,), float("nan")), torch.ones(100)
        raised = []
        for step in range(80):
            is_bad = transport.rank == 1 and step != limit  # one good step in between begins a new series
            try:
                exchange.step(bad if is_bad else good)
            except RuntimeError as error:
                raised.append(f"{step}: {error}")
                break
        return raised

    results = run_local(2, main, LIMIT_S)
    assert results[0] == results[1]
    if limit == 0:
        assert results[0] == []
    else:
        (told,) = results[0]
        assert told.startswith(f"{2 * limit + 1}: all ranks skipped {limit + 1} steps in a row, the last because")
        assert "rank 1 has NaN or Inf" in told and f"max_skips={limit}" in told


@pytest.mark.filterwarnings("ignore:all ranks skip this step")
@pytest.mark.parametrize("order", ["step", "synchronize"])
def test_a_gradient_scalers_search_is_no_such_series(order: str) -> None:
    """From 2^60 to where nothing overflows float16 takes 40 and more skips."""
    from tests.support.toy import Toy, wrap

    def main(transport: LocalTransport) -> int:
        model = Toy()
        optimizer = wrap(transport, model, None, max_skips=3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        for _ in range(70):
            optimizer.zero_grad()
            scaler.scale((model.weight.half() * 0.01).sum()).backward()
            if order == "synchronize":
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
        return optimizer.skipped_steps

    assert set(run_local(2, main, LIMIT_S)) <= set(range(30, 60))


def test_warns_where_the_step_was_called(recwarn: pytest.WarningsRecorder) -> None:
    exchange = DenseAllreduce(None, 3, local_transports(1)[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exchange.step(torch.full((3,), float("inf")))
    assert len(caught) == 1 and "rank 0 has NaN or Inf" in str(caught[0].message)


def test_who_waits_long_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch(stall_s=0.2)
    with watch.over(0, 2, 3, "agree"):
        time.sleep(0.7)
    with watch.over(1, 2, 3, "sketch"):
        pass
    time.sleep(0.3)
    (told,) = caplog.messages
    assert "rank 0 of 2 has waited for 0 s" in told and "in step 3, phase 'agree'" in told
    assert "optimizer.join()" in told and caplog.records[0].levelno == logging.WARNING


def test_a_rank_that_comes_late_is_waited_for_with_a_word(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = StallWatch(stall_s=0.2)
    monkeypatch.setattr("hvd_sketch.transport.metered.process_watch", lambda: watch)

    def main(transport: LocalTransport) -> Any:
        exchange = DenseAllreduce(None, 3, transport)
        if transport.rank == 1:
            time.sleep(0.8)
        return exchange.step(torch.ones(3))

    run_local(2, main, LIMIT_S)
    assert [record.args[0] for record in caplog.records] == ["rank 0 of 2"]  # type: ignore[index]
