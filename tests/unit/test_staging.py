"""The order in which rows are launched, and copied beside. On a GPU it has not run yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import Tensor

from hvd_sketch.transport import staging
from hvd_sketch.transport.staging import one_behind

ROWS = [torch.full((2,), float(row)) for row in range(3)]


class Cuda:
    """What ``one_behind`` asks of ``torch.cuda``, noting what is done, and in which stream."""

    Event = int

    def __init__(self) -> None:
        self.done: list[str] = []
        self.current = "main"
        self._marks = count()

    def Stream(self, device: torch.device) -> Cuda:
        return self

    def current_stream(self, device: torch.device) -> Cuda:
        return self

    def record_event(self) -> int:
        return next(self._marks)

    def wait_event(self, mark: int) -> None:
        self.done.append(f"wait for mark {mark}")

    def wait_stream(self, stream: Cuda) -> None:
        self.done.append("main waits for beside")

    @contextmanager
    def stream(self, stream: Cuda) -> Iterator[None]:
        self.current = "beside"
        yield
        self.current = "main"

    def launch(self) -> Iterator[Tensor]:
        for number, row in enumerate(ROWS):
            self.done.append(f"launch {number} in {self.current}")
            yield row


def test_on_the_host_each_row_comes_when_it_is_done() -> None:
    done: list[str] = []

    def launch() -> Iterator[Tensor]:
        for number, row in enumerate(ROWS):
            done.append(f"launch {number}")
            yield row

    for row in one_behind(torch.device("cpu"), launch()):
        done.append(f"send {int(row[0])}")
    assert done == ["launch 0", "send 0", "launch 1", "send 1", "launch 2", "send 2"]


def test_on_a_device_the_next_row_is_launched_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(staging, "_stream_beside", cuda.Stream)
    for row in one_behind(torch.device("cuda", 0), cuda.launch()):
        cuda.done.append(f"send {int(row[0])} in {cuda.current}")
    assert cuda.current == "main"
    assert cuda.done == [
        "launch 0 in main",
        "launch 1 in main",
        *("wait for mark 0", "send 0 in beside"),
        "launch 2 in main",
        *("wait for mark 1", "send 1 in beside"),
        *("wait for mark 2", "send 2 in beside"),
        "main waits for beside",
    ]
