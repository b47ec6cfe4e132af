"""broadcast_parameters and broadcast_optimizer_state: equal starting points, and errors on every rank."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_sketch.model.broadcast
from hvd_sketch.config import SketchConfig
from hvd_sketch.model.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, run_local

LIMIT_S = 60
RANKS = [1, 2, 3, 4]
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def filled(rank: int) -> OrderedDict[str, Tensor]:
    """Tensors of every dtype, odd sizes so that wider ones begin anywhere, and of several strides."""
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for i, dtype in enumerate(DTYPES):
        values = torch.arange(35).add(1 + 7 * rank + i) % 5
        tensors[f"{dtype}"] = values.to(dtype).view(5, 7)
        tensors[f"{dtype} 0-dim"] = values[0].to(dtype).clone()
    tensors["empty"] = torch.zeros(0, 3)
    tensors["transposed"] = torch.arange(12.0).add(rank).view(3, 4).t()
    tensors["channels last"] = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors["strided"] = torch.arange(20.0).add(rank)[::3]
    tensors["expanded"] = torch.arange(4).add(rank).expand(3, 2, -1)
    tensors["one element"] = torch.tensor(float(rank)).expand(3)
    tensors["expanded at the end"] = torch.arange(4).add(rank).view(2, 2, 1).expand(2, 2, 3)
    tensors["conjugate"] = torch.view_as_complex(torch.arange(8.0).add(rank).view(4, 2)).conj()
    tensors["negative"] = tensors["conjugate"].imag
    tensors["parameter"] = nn.Parameter(torch.full((2, 2), float(rank)))
    return tensors


@pytest.mark.parametrize("bucket_bytes", [1, 100, 2**26])
@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_get_the_roots_tensors_in_place(
    ranks: int, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hvd_sketch.model.broadcast, "BUCKET_BYTES", bucket_bytes)
    root = ranks - 1
    roots_values: dict[str, Tensor] = {}

    def rank_main(transport: LocalTransport) -> dict[str, Tensor]:
        tensors = filled(transport.rank)
        addresses = {name: (t.data_ptr(), t.stride()) for name, t in tensors.items()}
        if transport.rank == root:
            roots_values.update({name: t.detach().clone() for name, t in tensors.items()})
        broadcast_parameters(tensors, root, transport)
        assert addresses == {name: (t.data_ptr(), t.stride()) for name, t in tensors.items()}
        return tensors

    for tensors in run_local(ranks, rank_main, LIMIT_S):
        for name, tensor in tensors.items():
            assert torch.equal(tensor, roots_values[name]), name
            assert tensor.dtype == roots_values[name].dtype


def test_pairs_as_from_named_parameters_and_elements_between_strides_stay() -> None:
    def rank_main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model, line = nn.Linear(3, 2), torch.full((6,), float(transport.rank))
        nn.init.constant_(model.weight, float(transport.rank))
        nn.init.constant_(model.bias, float(transport.rank))
        broadcast_parameters([*model.named_parameters(), ("line", line[::2])], 0, transport)
        assert model.weight.requires_grad and model.weight.grad_fn is None
        return torch.cat([p.detach().flatten() for p in model.parameters()]), line

    for rank, (values, line) in enumerate(run_local(2, rank_main, LIMIT_S)):
        assert not values.any()
        assert line.tolist() == [0.0, rank] * 3


def test_small_tensors_travel_together() -> None:
    class Counting(LocalTransport):
        broadcasts = 0

        def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
            self.broadcasts += 1
            return super().broadcast_(tensor, root)

    def rank_main(transport: LocalTransport) -> int:
        counting = Counting(transport._room, transport.rank)
        broadcast_parameters(filled(transport.rank), 0, counting)
        return counting.broadcasts

    assert run_local(2, rank_main, LIMIT_S) == [1, 1]


@pytest.mark.parametrize(
    ("params", "root", "told"),
    [
        (lambda rank: {"w": torch.zeros(2 + rank % 2)}, 0, "(3,) torch.float32"),
        (lambda rank: {"w": torch.zeros(2, dtype=[torch.half, torch.bfloat16][rank % 2])}, 0, "torch.bfloat16"),
        (lambda rank: {"v" if rank == 1 else "w": torch.zeros(2)}, 0, "v (2,)"),
        (lambda rank: dict.fromkeys(["a", "b"][: 1 + rank % 2], torch.zeros(2)), 0, "tensor 1"),
        (lambda rank: {"w": torch.zeros(2) if rank == 1 else 3}, 0, "w int"),
        (lambda rank: {"w": 3}, 0, "w int: leave it out"),
        (lambda rank: {"w": torch.eye(2).to_sparse()}, 0, "torch.sparse_coo: leave it out"),
        (lambda rank: [torch.zeros(2)], 0, "(name, tensor) pairs, got Tensor"),
        (lambda rank: {"w": torch.zeros(2)}, 3, "root_rank must be in 0 … 2, the ranks there are, got 3"),
        (lambda rank: {"w": torch.zeros(2)}, -1, "got -1"),
    ],
)
def test_every_rank_raises_the_same(params: Callable[[int], Any], root: int, told: str) -> None:
    def rank_main(transport: LocalTransport) -> str:
        with pytest.raises(ValueError) as caught:
            broadcast_parameters(params(transport.rank), root, transport)
        return str(caught.value)

    assert all(told in message for message in run_local(3, rank_main, LIMIT_S))


def test_ranks_with_different_roots_all_raise() -> None:
    def rank_main(transport: LocalTransport) -> str:
        with pytest.raises(ValueError) as caught:
            broadcast_parameters({"w": torch.zeros(2)}, transport.rank, transport)
        return str(caught.value)

    assert all("root_rank: 0 on rank 0; 1 on rank 1" in message for message in run_local(2, rank_main, LIMIT_S))


# --- optimizer state


def stepped(make: Callable[..., torch.optim.Optimizer], steps: int, lr: float) -> torch.optim.Optimizer:
    """An optimizer that has made ``steps`` steps."""
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    optimizer = make(parameters, lr=lr)
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        optimizer.step()
    return optimizer


def assert_equal_states(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_states(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal_states(a, b)
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
        lambda p, lr: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 2 * lr}], lr=lr),
        lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    ],
)
def test_all_ranks_get_the_roots_optimizer_state(make: Callable[..., torch.optim.Optimizer], ranks: int) -> None:
    """Also where a rank has made more steps than the root, or none."""

    def rank_main(transport: LocalTransport) -> dict[str, Any]:
        optimizer = stepped(make, steps=[2, 0, 3, 1][transport.rank], lr=0.1 * (transport.rank + 1))
        broadcast_optimizer_state(optimizer, 0, transport)
        return optimizer.state_dict()

    expected = stepped(make, steps=2, lr=0.1).state_dict()
    for state in run_local(ranks, rank_main, LIMIT_S):
        assert_equal_states(state, expected)


def test_residuals_of_a_distributed_optimizer_stay_with_their_rank() -> None:
    def rank_main(transport: LocalTransport) -> tuple[dict[str, Any], Tensor]:
        parameter = nn.Parameter(torch.zeros(8, 4))
        inner = torch.optim.Adam([parameter])
        sketch = SketchConfig.paper(cols=20, k=4, momentum=0.0, dense_below=8)
        optimizer = DistributedOptimizer(inner, None, sketch, transport)
        inner.param_groups[0]["lr"] = 0.1 * (transport.rank + 1)
        parameter.grad = torch.full((8, 4), 1.0 + transport.rank)
        optimizer.step()
        before = optimizer.exchange.residual.clone()
        broadcast_optimizer_state(optimizer, 1, transport)
        assert torch.equal(optimizer.exchange.residual, before)
        return inner.state_dict(), before

    (state, residual), (roots_state, roots_residual) = run_local(2, rank_main, LIMIT_S)
    assert_equal_states(state, roots_state)
    assert state["param_groups"][0]["lr"] == 0.2
    assert not torch.equal(residual, roots_residual)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda rank, p: (torch.optim.SGD if rank == 1 else torch.optim.Adam)(p), "optimizer: Adam on ranks 0, 2; SGD"),
        (lambda rank, p: torch.optim.SGD(p[: 1 + rank % 2]), "parameters of group 0"),
        (lambda rank, p: torch.optim.SGD([{"params": q} for q in p[: 1 + rank % 2]]), "groups: 1 on ranks 0, 2; 2"),
    ],
)
def test_ranks_with_different_optimizers_all_raise(make: Callable[..., torch.optim.Optimizer], told: str) -> None:
    def rank_main(transport: LocalTransport) -> str:
        parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
        with pytest.raises(ValueError) as caught:
            broadcast_optimizer_state(make(transport.rank, parameters), 0, transport)
        return str(caught.value)

    assert all(told in message for message in run_local(3, rank_main, LIMIT_S))


@pytest.mark.parametrize("what", ["loaded", "saved"])
def test_state_that_cannot_be_carried_safely_is_refused_on_every_rank(what: str) -> None:
    def rank_main(transport: LocalTransport) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))])
        optimizer.param_groups[0]["helper"] = Unsafe() if what == "loaded" else lambda: None
        with pytest.raises(ValueError, match=r"weights_only=True.*keep to tensors"):
            broadcast_optimizer_state(optimizer, 0, transport)

    run_local(2, rank_main, timeout_s=20)


class Unsafe:
    """Something only an unrestricted unpickler would build."""


def test_a_state_of_another_dtype_than_its_parameter_is_equal_on_all_ranks() -> None:
    """Loading casts it to the parameter's, on the root as elsewhere."""

    def main(transport: LocalTransport) -> list[Tensor]:
        parameter = nn.Parameter(torch.full((3,), 1.0 + transport.rank, dtype=torch.bfloat16))
        optimizer = torch.optim.NAdam([parameter], lr=0.1)
        for _ in range(5):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        broadcast_parameters([("parameter", parameter)], 0, transport)
        broadcast_optimizer_state(optimizer, 0, transport)
        return [parameter.detach(), *(torch.as_tensor(value) for value in optimizer.state[parameter].values())]

    first, *others = run_local(3, main, LIMIT_S)
    for other in others:
        assert all(map(torch.equal, first, other))
        assert [tensor.dtype for tensor in first] == [tensor.dtype for tensor in other]
