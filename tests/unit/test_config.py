"""SketchConfig: what is out of range is refused at once, what is old is still taken."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from hvd_sketch import SketchConfig


def test_sketch_in_backward_is_taken_with_a_warning_and_changes_nothing() -> None:
    with pytest.warns(DeprecationWarning, match="sketch_in_backward"):
        old = SketchConfig(cols=30, k=5, sketch_in_backward=True)
    assert old == SketchConfig(cols=30, k=5)
    assert "sketch_in_backward" not in asdict(replace(old, k=6))
