"""The codes of what was selected: host and device read each other's, and both say what was sent."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_sketch.coding import device, host
from hvd_sketch.hashing import MAX_DIM, BlockHash

CODINGS = [host, device]
CPU = torch.device("cpu")
both = pytest.mark.parametrize("coding", CODINGS, ids=["host", "device"])


@pytest.fixture(scope="module", autouse=True)
def few_are_coded_on_the_device_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "FEW", -1)
        yield


@st.composite
def owned_positions(draw: st.DrawFn) -> tuple[BlockHash, list[Tensor]]:
    """A hash, and some positions of every shard."""
    shards = draw(st.integers(1, 5))
    hash = BlockHash(
        draw(st.integers(1, 3000)), 3, draw(st.integers(shards, 800)), shards, seed=draw(st.integers(0, 9))
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = draw(st.lists(st.sampled_from([0, 0.01, 0.2, 1]), min_size=shards, max_size=shards))
    chosen = [random.random(hash.owned_size(shard)) < share for shard, share in enumerate(shares)]
    return hash, [torch.from_numpy(np.flatnonzero(is_chosen)) for is_chosen in chosen]


@both
@given(owned_positions(), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=150, deadline=None)
def test_positions_survive_the_code(
    coding: ModuleType, chosen: tuple[BlockHash, list[Tensor]], dtype: torch.dtype
) -> None:
    hash, owned = chosen
    expected = sorted(c for shard, own in enumerate(owned) for c in hash.owned_to_global(shard, own.numpy()).tolist())
    codes = [coding.encode_positions(own.to(dtype), hash.owned_size(shard)) for shard, own in enumerate(owned)]
    for reader in CODINGS:
        for known in (None, (0, codes[0], owned[0].to(dtype))):
            decoded = reader.decode_owned(hash, torch.cat(codes), CPU, known)
            assert decoded.dtype == torch.int64 and decoded.tolist() == expected


@both
@given(st.lists(st.integers(0, MAX_DIM - 1), unique=True, max_size=200))
@settings(max_examples=150, deadline=None)
def test_positions_far_apart_survive_the_code(coding: ModuleType, chosen: list[int]) -> None:
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    code = coding.encode_positions(positions, MAX_DIM)
    hash = BlockHash(MAX_DIM, 1, 5000, 1)  # whose owner's order is the vector's
    for reader in CODINGS:
        assert torch.equal(reader.decode_owned(hash, code, CPU), positions)


@st.composite
def several_codes(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    """A span, and the ascending positions below it of each of some senders; some have none, some have all."""
    span = draw(st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 1000, 4096, 5001])))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = draw(st.lists(st.sampled_from([0, 0.01, 0.3, 1]), min_size=1, max_size=6))
    return span, [np.flatnonzero(random.random(span) < share) for share in shares]


@both
@given(several_codes(), st.sampled_from([np.int32, np.int64]))
@settings(max_examples=150, deadline=None)
def test_the_union_of_codes_is_the_union_of_their_positions(
    coding: ModuleType, sent: tuple[int, list[np.ndarray]], dtype: type
) -> None:
    span, positions = sent
    codes = [coding.encode_positions(torch.from_numpy(own.astype(dtype)), span) for own in positions]
    expected = sorted(set().union(*(own.tolist() for own in positions)))
    for reader in CODINGS:
        decoded = reader.decode_union(torch.cat(codes), span, CPU)
        assert decoded.dtype == torch.int64 and decoded.tolist() == expected


@both
def test_the_union_keeps_the_first_and_the_last_position(coding: ModuleType) -> None:
    """Of a span that ends inside a word; and one code alone is its own union."""
    span = 3 * 64 + 1
    ends = [coding.encode_positions(torch.tensor([end]), span) for end in (span - 1, 0)]
    for reader in CODINGS:
        assert reader.decode_union(torch.cat(ends), span, CPU).tolist() == [0, span - 1]
        assert reader.decode_union(ends[0], span, CPU).tolist() == [span - 1]


@both
@pytest.mark.parametrize(("mean_gap", "most_bytes"), [(4, 0.45), (25, 0.85), (250, 1.25), (2500, 1.7), (10**6, 2.8)])
def test_the_code_is_within_a_tenth_of_a_bit_of_the_entropy(
    coding: ModuleType, mean_gap: float, most_bytes: float
) -> None:
    gaps = np.random.default_rng(0).geometric(1 / mean_gap, 20_000)
    positions = torch.from_numpy(np.cumsum(gaps) - 1)
    encoded = coding.encode_positions(positions, int(positions[-1]) + 1)
    p = 1 / mean_gap
    entropy_bits = (-p * np.log2(p) - (1 - p) * np.log2(1 - p)) / p
    assert 8 * encoded.numel() / len(gaps) < entropy_bits + 0.1
    assert encoded.numel() / len(gaps) < most_bytes


@both
@given(st.integers(1, 4), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_choices_survive_the_code(coding: ModuleType, parts: int, length: int, random) -> None:
    messages, positions, values = [], [], []
    for part in range(parts):
        own = torch.tensor([random.uniform(-1, 1) for _ in range(length)], dtype=torch.float32)
        chosen = torch.tensor(sorted(random.sample(range(length), random.randint(0, length))), dtype=torch.int64)
        messages.append(coding.encode_choice(chosen, own))
        positions.append(chosen + part * length)
        values.append(own[chosen])
    for reader in CODINGS:
        got_positions, got_values = reader.decode_choices(torch.cat(messages), parts, length, CPU)
        assert torch.equal(got_positions, torch.cat(positions)) and torch.equal(got_values, torch.cat(values))


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: operations whose result's size depends on data, and numbers."""

    WAIT = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation not in self.WAIT, f"{operation} waits"
        if operation is torch.ops.aten.index.Tensor:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "counts what is True"
        return operation(*args, **kwargs or {})


def test_a_device_is_not_waited_for() -> None:
    hash = BlockHash(3000, 3, 600, shards=3)
    positions = torch.arange(0, 900, 7)
    with NoWaiting():
        words = device._encode(positions, 1000)
    used = int(words.numpy().nonzero()[0][-1]) + 1
    low_bits = int(words[0]) % 256
    unary_start = 1 + -(-len(positions) * low_bits // 64)
    low, unary = words[1:unary_start].numpy(), words[unary_start:used].numpy()
    stream = device.Stream(len(positions), low_bits, low.view(np.uint64), unary.view(np.uint64))
    with NoWaiting():
        owners, decoded = device._decode([stream] * 3, CPU)
        device._coordinates(hash, owners, decoded.clone()).sort()
    assert decoded.tolist() == 3 * positions.tolist()
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        positions.max().item()
