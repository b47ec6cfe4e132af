"""A few cases of tests/fuzz.py, and what it says when one fails."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

from hvd_sketch.exchange.feedback import Feedback
from tests.fuzz import GRADIENTS, INNER, KINDS, OF_MODELS, Case


def test_random_configurations_and_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = Counter(Case.of(seed).run() for seed in range(60))
    assert outcomes["passed"] > 50


def test_cases_follow_from_their_number_and_cover_everything() -> None:
    cases = [Case.of(seed) for seed in range(300)]
    assert cases == [Case.of(seed) for seed in range(300)]
    assert {case.ranks for case in cases} == set(range(1, 8))
    assert {case.kind for case in cases} == set(KINDS)
    of_models = [case for case in cases if case.kind in OF_MODELS]
    drawn = {(case.kind, case.inner, case.joins) for case in of_models}
    assert len(drawn) == len(OF_MODELS) * len(INNER) * 2
    assert {name for case in cases for name in case.gradients} == set(GRADIENTS)


def test_a_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Feedback.clear_

    def lose(self: Feedback, indices: torch.Tensor) -> None:
        clear(self, indices)
        self.v[:1] = 0

    case = next(
        case
        for case in map(Case.of, range(10_000))
        if case.kind == "sketched" and case.compression.value_bits == 32 and case.gradients == ("normal",)
    )
    assert case.run() == "passed"
    monkeypatch.setattr(Feedback, "clear_", lose)
    with pytest.raises(AssertionError, match=r"coordinate 0: .* was produced, 0 sent, 0 is kept"):
        case.run()
