"""Accelerate, Hugging Face's Trainer and Lightning: each drives a sketched optimizer, saves and resumes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.harness import launch
from tests.support.integrations import STEPS

pytestmark = pytest.mark.multiprocess
LIMIT_S = 240  # importing a framework on two ranks takes up to 20 s


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} is not installed: pip install hvd_sketch[integrations]"
    )


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        # Accelerate goes on with the same optimizer, which counts the steps of both halves.
        pytest.param("accelerate_job", STEPS + STEPS // 2, marks=needs("accelerate", "horovod")),
        pytest.param("trainer_job", STEPS, marks=needs("transformers", "accelerate", "horovod")),
        pytest.param("lightning_job", STEPS, marks=needs("lightning", "horovod")),
    ],
)
def test_trains_saves_and_resumes(job: str, steps: int, tmp_path: Path) -> None:
    first, second = launch(
        "horovod-gloo", 2, f"tests.support.integrations:{job}", timeout_s=LIMIT_S, folder=str(tmp_path)
    )
    for rank in (first, second):
        assert torch.equal(rank["parameters"], first["parameters"]), "ranks hold equal bits"
        assert torch.equal(rank["resumed"], first["parameters"]), "going on from a checkpoint is bitwise"
        start, end = rank["losses"][:3], rank["losses"][-3:]
        assert sum(end) < 0.9 * sum(start), rank["losses"]
        assert rank["steps"] == steps
        assert rank["ratio"] > 5
    assert first["losses"] != second["losses"], "every rank has its own share of the data"


@needs("lightning")
def test_lightnings_wrapper_exchanges_once() -> None:
    (only,) = launch("local", 1, "tests.support.integrations:lightning_manual_job", timeout_s=60)
    assert only["exchanges"] == STEPS
    assert only["norms"] == pytest.approx([0.1] * STEPS, rel=1e-3), "steps are as long as gradients were clipped to"
