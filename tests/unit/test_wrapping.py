"""Arguments of DistributedOptimizer: Horovod's own are followed, or refused with the reason, on every rank."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, SparseAdam

from hvd_sketch import DistributedOptimizer, SketchConfig, sketched_dim
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from tests.support.toy import Toy, alone, everything, integers, little, mean_of, wrap

LIMIT_S = 60


class FP16Compressor:
    """Named as Horovod's."""


class NoneCompressor:
    """Named as Horovod's."""


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("config", [everything(60), None])
@pytest.mark.parametrize("op", [None, 0, "average", 1, "sum"])
def test_sums_and_means(op: Any, config: SketchConfig | None, ranks: int) -> None:
    def main(transport: LocalTransport) -> list[torch.Tensor]:
        model = Toy()
        optimizer = wrap(transport, model, config, op=op)
        model.backward(transport.rank, 0)
        optimizer.step()
        return model.gradients()

    factor = ranks if op in (1, "sum") else 1
    for gradients in run_local(ranks, main, LIMIT_S):
        torch.testing.assert_close(gradients, [mean * factor for mean in mean_of(ranks, 0)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("compression", [FP16Compressor, "fp16", "bf16", NoneCompressor, "none", None])
def test_the_dense_part_travels_in_16_bits(compression: Any, ranks: int) -> None:
    def main(transport: LocalTransport) -> tuple[list[torch.Tensor], set[str]]:
        model = Toy()
        optimizer = wrap(transport, model, None, compression=compression)
        model.backward(transport.rank, 0, factor=1 / 3)
        model.bias.grad[0] = 1e6  # beyond float16
        optimizer.step()
        return model.gradients(), {r.dtype for r in optimizer.ledger.records if r.phase == "dense"}

    wire = {FP16Compressor: torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}.get(
        compression, torch.float32
    )
    expected = [mean / 3 for mean in mean_of(ranks, 0)]
    expected[1][0] = min(torch.finfo(wire).max, 1e6)
    results = run_local(ranks, main, LIMIT_S)
    for gradients, dtypes in results:
        assert dtypes == {str(wire).removeprefix("torch.")}
        torch.testing.assert_close(gradients, expected, rtol=2 * torch.finfo(wire).eps + 1e-6, atol=0.0)
        assert all(map(torch.equal, gradients, results[0][0]))


@pytest.mark.parametrize("options", [{"num_groups": 2}, {"groups": 3}, {"gradient_predivide_factor": 4.0}])
def test_what_changes_no_result_is_taken(options: dict[str, Any]) -> None:
    model = Toy()
    optimizer = wrap(alone(), model, None, **options)
    model.backward(0, 0)
    optimizer.step()
    assert all(map(torch.equal, model.gradients(), integers(0, 0)))
    wrap(alone(), model, None, groups=[[model.weight], [model.bias, model.other]])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"op": 2}, "adasum: sketches can only be added"),
        ({"op": "max"}, "got max"),
        ({"op": 17}, "got 17"),
        ({"compression": dict}, "compression must be .* got dict"),
        ({"compression": "fp8"}, "got fp8"),
        ({"gradient_predivide_factor": 0.0}, "must be positive"),
        ({"gradient_predivide_factor": 2.0, "op": "sum"}, "means nothing for a sum"),
        ({"num_groups": -1}, "num_groups must be an integer of at least 0"),
        ({"groups": [[1, 2]]}, "lists of parameters"),
        ({"check_every": -1}, "check_every must be an integer of at least 0"),
        ({"max_skips": 1.5}, "max_skips must be an integer"),
        ({"process_set": object()}, "process_set is Horovod's .* MPITransport"),
        ({"sketch": FP16Compressor}, "got FP16Compressor: Horovod's other arguments are taken by name"),
    ],
)
def test_what_cannot_be_followed_is_refused(options: dict[str, Any], told: str) -> None:
    settings = {"sketch": None, **options}
    with pytest.raises(ValueError, match=told):
        wrap(alone(), Toy(), **settings)


def test_a_parameter_in_two_groups_is_refused() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="holds a parameter twice"):
        wrap(alone(), model, None, groups=[[model.weight], [model.weight]])


@pytest.mark.parametrize(
    "differ", [{"check_every": 7}, {"max_skips": 3}, {"op": "sum"}, {"compression": "fp16"}, {"sparse_as_dense": True}]
)
def test_ranks_with_different_arguments_all_raise(differ: dict[str, Any]) -> None:
    def main(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match=f"set up differently.*\n  {next(iter(differ))}: .* on rank"):
            wrap(transport, Toy(), None, **(differ if transport.rank == 1 else {}))

    run_local(2, main, LIMIT_S)


def test_optimizers_that_evaluate_their_closure_are_refused_or_told_apart() -> None:
    class NeedsClosure(SGD):
        def step(self, closure: Any = None) -> Any:
            assert closure is not None, "a closure, please"
            return super().step(closure)

    class Takes(SGD):
        def step(self, closure: Any) -> Any:
            return super().step(closure)

    model = Toy()
    for kind in (LBFGS, Takes):
        with pytest.raises(ValueError, match=f"{kind.__name__} evaluates its closure itself"):
            DistributedOptimizer(kind(model.parameters()), None, None, alone())
    optimizer = DistributedOptimizer(NeedsClosure(model.parameters()), None, None, alone())
    with pytest.raises(AssertionError, match="a closure, please") as raised:
        optimizer.step(lambda: model.backward(0, 0))
    assert "evaluates the closure itself, once" in raised.value.__notes__[0]


@pytest.mark.parametrize("config", [everything(40, dense_below=0), None])
def test_sparse_as_dense_hands_sparse_gradients_on(config: SketchConfig | None) -> None:
    def main(transport: LocalTransport) -> tuple[torch.Tensor, torch.Tensor]:
        table = nn.Embedding.from_pretrained(torch.zeros(10, 4), freeze=False, sparse=True)
        inner = SparseAdam(list(table.parameters()), lr=0.1)
        optimizer = DistributedOptimizer(inner, None, config, transport, sparse_as_dense=True)
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([transport.rank, 5])).sum().backward()
            optimizer.step()
        return table.weight.grad, table.weight.detach()

    for gradient, weight in run_local(2, main, LIMIT_S):
        assert gradient.is_sparse and gradient.coalesce().indices().tolist() == [[0, 1, 5]]
        assert weight[:, 0].nonzero().flatten().tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="sparse_as_dense=True"):
        DistributedOptimizer(SparseAdam([nn.Parameter(torch.zeros(3, 2))]), None, None, alone())


def test_a_flat_vector_of_weights_is_sketched_and_wide_biases_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert sketched_dim([torch.nn.Parameter(torch.zeros(1_000_000))]) == 1_000_000
    assert sketched_dim([torch.nn.Parameter(torch.zeros(64 * 1024 - 1))]) == 0
    assert sketched_dim([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(()))], dense_below=0) == 4
    model = Toy()
    optimizer = wrap(alone(), model, SketchConfig.paper(cols=60, k=5, momentum=0.0, dense_below=0))
    assert optimizer.exchange is not None and optimizer.exchange.dim == 63
    assert not caplog.messages


def test_a_sketch_of_float64_says_once_that_it_works_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    def main(transport: LocalTransport) -> None:
        wrap(transport, Toy(torch.float64), little())

    run_local(2, main, LIMIT_S)
    assert len(caplog.messages) == 1 and "2 float64 parameters (weight, …) are sketched in float32" in caplog.text


def test_synchronize_tells_whether_the_average_is_there() -> None:
    model = Toy()
    optimizer = wrap(local_transports(1)[0], model, little())
    model.backward(0, 0)
    assert optimizer.synchronize() is True
    optimizer.zero_grad()
    model.backward(0, 0, factor=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert optimizer.synchronize() is False


@pytest.mark.parametrize("config", [everything(40, dense_below=0), None])
def test_sparse_as_dense_leaves_dense_gradients_dense(config: SketchConfig | None) -> None:
    """As scripts pass it with any optimizer; rank 0 does not use the embedding in the first step."""

    def main(transport: LocalTransport) -> tuple[list[bool], torch.Tensor]:
        table = nn.Embedding.from_pretrained(torch.ones(10, 4), freeze=False, sparse=True)
        layer = nn.Linear(4, 1)
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        model = nn.ModuleList([table, layer])
        inner = SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), config, transport, sparse_as_dense=True)
        for step in range(2):
            optimizer.zero_grad()
            inputs = table(torch.tensor([1, 5])) if transport.rank or step else torch.ones(2, 4)
            layer(inputs).sum().backward()
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        return [p.grad.is_sparse for p in model.parameters()], torch.cat(
            [p.detach().flatten() for p in layer.parameters()]
        )

    results = run_local(2, main, LIMIT_S)
    for kinds, parameters in results:
        assert kinds == [True, False, False]
        assert torch.equal(parameters, results[0][1])
