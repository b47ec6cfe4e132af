"""What a rank names, against a plain sort, however the vector changes from step to step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.candidates import nominate
from hvd_sketch.exchange.candidates.nominate import NominatedCandidates
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import local_transports
from hvd_sketch.transport.metered import MeteredTransport

CPU = torch.device("cpu")


def candidates_of(dim: int, k: int) -> NominatedCandidates:
    comm = MeteredTransport(local_transports(1)[0], CommLedger(), False)
    return NominatedCandidates(SketchConfig(k=k, candidates="nominate"), dim, comm, CPU)


def largest(v: Tensor, ranges: list[tuple[int, int]], k: int) -> list[int]:
    """Of equal magnitudes the first; zeros never."""
    inside = sorted(i for start, stop in ranges for i in range(start, stop) if v[i] != 0)
    return sorted(sorted(inside, key=lambda i: -abs(float(v[i])))[:k])


@st.composite
def some_ranges(draw: st.DrawFn, dim: int) -> list[tuple[int, int]]:
    """The last first; some of them touch."""
    cuts = sorted(draw(st.lists(st.integers(0, dim), min_size=2, max_size=6, unique=True)))
    pairs = [pair for pair in pairwise(cuts) if draw(st.booleans())]
    return (pairs or [(0, dim)])[::-1]


@given(st.data(), st.integers(1, 400), st.integers(1, 60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_rank_names_its_largest(data: st.DataObject, dim: int, k: int, ties: bool) -> None:
    """With a prediction that is right, too high, too low, or fails because too many are kept."""
    candidates = candidates_of(dim, min(k, dim))
    random = np.random.default_rng(dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nominate, "KEPT_ALWAYS", 10)
        for size in data.draw(st.lists(st.sampled_from([1.0, 1.01, 1e-20, 1e20, 0.0]), min_size=1, max_size=5)):
            values = random.standard_normal(dim) * size
            v = torch.from_numpy((np.sign(values) * size if ties else values).astype(np.float32))
            ranges = data.draw(some_ranges(dim))
            assert candidates.find(v, ranges).tolist() == largest(v, ranges, min(k, dim))


def test_a_good_prediction_saves_further_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = candidates_of(5000, 50)
    v = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    expected = candidates.find(v, [(0, 5000)])
    searches = []
    search = nominate.search
    monkeypatch.setattr(nominate, "search", lambda *args, **named: searches.append(args) or search(*args, **named))
    assert torch.equal(candidates.find(v, [(0, 5000)]), expected)
    assert not searches, "v was looked at again, not only what was kept of it"
