"""A job of two ranks that a third one joins and leaves again, by a kill; run by test_elastic.py under horovodrun.

Arguments: the file that says which hosts there are; "shared", if commits share the residuals; "rounds", if every third
step exchanges.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from hvd_sketch import SketchConfig
from hvd_sketch.elastic import SketchState
from hvd_sketch.transport.attendance import StoreAttendance
from tests.support.harness import wait_until

FIRST_HOST, SECOND_HOST = "localhost:2", "127.0.0.1:1"


class Watched(SketchState):
    """Compares what a rank has after a reset with what it had."""

    before: tuple[torch.Tensor, int] | None = None  # residual, and the number of ranks
    mean: torch.Tensor | None = None  # of all residuals, if they were shared

    def commit(self) -> None:
        if self._shares_residuals:
            self.mean = hvd.allreduce(self.optimizer.exchange.residual)
        super().commit()

    def restore(self) -> None:
        super().restore()
        kept = self._kept["hvd_sketch"]["sketched"]
        self.before = kept["v"].clone(), kept["size"]

    def sync(self) -> None:
        if self.before is None and self.optimizer is None and self._kept is not None:
            self.before = self._kept["hvd_sketch"]["sketched"]["v"].clone(), self._ranks
        super().sync()
        residual = self.optimizer.exchange.residual
        assert self.optimizer.exchange.config.k == 20, "of the first ranks"
        if self.mean is not None and hvd.size() == 2:
            torch.testing.assert_close(residual, self.mean)
            print(f"rank {hvd.rank()} goes on with all residuals' mean of norm {residual.norm():.4g}", flush=True)
        elif self.before is None:
            assert not bool(residual.any()), "a new rank begins with zeros"
        else:
            was, ranks = self.before
            torch.testing.assert_close(residual, was * hvd.size() / ranks)
            print(f"rank {hvd.rank()} of {hvd.size()} kept its residual, times {hvd.size() / ranks:.4f}", flush=True)
        self.before = self.mean = None
        assert_equal_everywhere(self)


def assert_equal_everywhere(state: Any) -> None:
    """Parameters, momenta, learning rate and number of the step."""
    agreed = getattr(state.optimizer, "outer", state.optimizer)  # a wrapped optimizer's state is each rank's own
    buffers = [each["momentum_buffer"] for each in agreed.state.values() if "momentum_buffer" in each]
    numbers = torch.tensor([state.optimizer.param_groups[0]["lr"], float(state.optimizer.exchange.step_number)])
    own = torch.cat([each.detach().flatten() for each in (*state.model.parameters(), *buffers, numbers)])
    every = hvd.allgather(own.unsqueeze(0))
    assert bool((every == every[0]).all())


def sets_of_ranks() -> int:
    """Of how many sets of ranks, of now and before, this process keeps what they tell each other."""
    gc.collect()
    return sum(isinstance(each, StoreAttendance) for each in gc.get_objects())


def main(hosts: Path, how: str = "") -> None:
    hvd.init()
    torch.manual_seed(os.getpid())
    model = torch.nn.Linear(40, 30)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, nesterov=True)
    k = 18 + hvd.size()  # another one on the rank that joins, as of recommended(..., ranks=hvd.size())
    config = SketchConfig(k=k, candidates="nominate", dense_below=8)
    options = {"shares_residuals": how == "shared", "every": 3 if how == "rounds" else None}
    state = Watched(model, inner, compression=config, **options, batch=0, seen=[])

    @hvd.elastic.run
    def train(state: Any) -> None:
        state.seen = [*state.seen, hvd.size()]
        begun = state.batch
        while state.batch < begun + 6 or state.seen != [2, 3, 2]:
            state.optimizer.zero_grad()
            model(torch.ones(4, 40) * (1 + hvd.rank())).square().mean().backward()
            if state.batch > begun + 3 and os.environ["HOROVOD_HOSTNAME"] == SECOND_HOST.split(":")[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            state.optimizer.step()
            state.batch += 1
            inner.param_groups[0]["lr"] *= 0.99
            if state.batch == 4 and hvd.rank() == 0:
                hosts.write_text(f"{FIRST_HOST}\n{SECOND_HOST}\n")
            time.sleep(0.1)
            if state.batch % 2 == 0:
                state.commit()
                kept = state.optimizer.exchange.residual.norm()
                if os.environ["HOROVOD_HOSTNAME"] == SECOND_HOST.split(":")[0]:
                    print(f"the lost rank kept a residual of norm {kept:.3g}", flush=True)
        assert_equal_everywhere(state)

    train(state)
    wait_until(lambda: sets_of_ranks() == 1)  # a thread that looks at waits may still know of one that has ended
    print(f"rank {hvd.rank()} ends after {state.seen}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
