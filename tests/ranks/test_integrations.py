"""Accelerate, Hugging Face's Trainer and Lightning: each drives a sketched optimizer, saves and resumes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.support.harness import launch
from tests.support.integrations import STEPS
from tests.support.worlds import Job, register

pytestmark = pytest.mark.multiprocess


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} is not installed: pip install hvd_sketch[integrations]"
    )


def job(name: str, steps: int, *modules: str) -> Any:
    """A job whose ranks are alone to the framework, and how many steps its optimizer counts."""
    marks, job = needs(*modules, "horovod"), None
    if not marks.args[0]:
        job = register("horovod-gloo", 2, "tests.support.integrations:in_own_folder", is_last=True, job=name)
    return pytest.param(job, steps, marks=marks, id=name)


def ddp_job(name: str, steps: int, *modules: str) -> Any:
    """The same where the framework wraps the model in DDP."""
    marks, job = needs(*modules), None
    if not marks.args[0]:
        job = register("torch", 2, f"tests.support.integrations_ddp:{name}", is_last=True)
    return pytest.param(job, steps, marks=marks, id=f"{name} in DDP")


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        # A checkpoint holds the count of steps; Lightning trains another epoch after it.
        job("accelerate_job", STEPS, "accelerate"),
        job("trainer_job", STEPS, "transformers", "accelerate"),
        job("lightning_job", 2 * STEPS, "lightning"),
        ddp_job("accelerate_job", STEPS, "accelerate"),
        ddp_job("trainer_job", STEPS, "transformers", "accelerate"),
        ddp_job("lightning_job", 2 * STEPS, "lightning"),
    ],
)
def test_trains_saves_and_resumes(job: Job, steps: int) -> None:
    first, second = job.results()
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
