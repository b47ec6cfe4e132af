"""An optimizer around another one: to all that expect a torch optimizer it looks like the inner one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.model.levels import TwoLevels
from hvd_sketch.model.mesh import ShardRanks
from hvd_sketch.model.parameters import NamedParameter
from hvd_sketch.transport import Transport

REWRAP = (
    "give the inner optimizer all its parameters first, with requires_grad set, and wrap it then; to change "
    "them later, wrap it again"
)


def _of_inner(name: str) -> Any:
    # Looked up each time: load_state_dict gives the inner optimizer new objects.
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


class ForwardingOptimizer(torch.optim.Optimizer):
    """Has the inner optimizer's own ``param_groups``, ``state``, ``defaults``, hooks and methods.

    Attributes:
        inner: the wrapped optimizer.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Not super().__init__: it would make param_groups, state and hooks of our own.
        self.inner = inner

    param_groups = _of_inner("param_groups")
    state = _of_inner("state")
    defaults = _of_inner("defaults")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.inner, name)
        is_method = getattr(found, "__self__", None) is self.inner and not hasattr(torch.optim.Optimizer, name)
        return self._watched(name, found) if is_method else found

    @abstractmethod
    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the inner optimizer as it is to be called from outside."""

    def step(self, closure: Any = None) -> Any:
        """Let the inner optimizer make its state, from gradients that ``hvd.broadcast_optimizer_state`` set to zero.

        That function calls the base class's ``step`` on ranks without a state. Parameters stay as they are, also where
        weight decay would change them. Communication: none.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        if isinstance(self.inner, torch.optim.SparseAdam):  # Horovod looks for its class, and ours is another
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.to_sparse()
        self.inner.step()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} holds its rank's network and cannot be copied or pickled: save "
            "state_dict() and load it into a new one"
        )


class ExchangingOptimizer(ForwardingOptimizer):
    """With what its exchange has to tell, and without parameters that would come later. Communication: none.

    Attributes:
        every: how many steps come to an exchange.
    """

    every = 1

    _transport: Transport
    _gradients: GradientExchange | TwoLevels
    _named: Sequence[NamedParameter]
    _parameters: Sequence[Tensor]

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: residuals and buffers are laid out at construction."""
        raise RuntimeError(f"parameters cannot be added to a {type(self).__name__}: {REWRAP}")

    @cached_property
    def _known(self) -> set[int]:
        return set(map(id, self._parameters))

    def _unregistered(self) -> RuntimeError | None:
        """What is wrong where parameters came later."""
        names = [
            f"parameter.{i}.{j}"
            for i, group in enumerate(self.param_groups)
            for j, parameter in enumerate(group["params"])
            if parameter.requires_grad and id(parameter) not in self._known
        ]
        if not names:
            return None
        return RuntimeError(
            f"{', '.join(names[:5])} came to the optimizer, or began to require a gradient, after "
            f"wrapping, and would drift apart between ranks: {REWRAP}"
        )

    @property
    def exchange(self) -> ResidualExchange | None:
        """The exchange that compresses, with ``residual`` and ``velocity``; None where all goes dense."""
        return self._gradients.compressed

    @property
    def ledger(self) -> CommLedger:
        """Every byte that steps handed to the network, compressed and dense."""
        return self._gradients.ledger

    @property
    def skipped_steps(self) -> int:
        """How many exchanges all ranks skipped because something was not finite."""
        return self._gradients.skipped_steps

    @property
    def reset_coordinates(self) -> int:
        """How many coordinates of this rank's momentum and residuals were not finite and were set to zero."""
        return self._gradients.reset_coordinates

    @property
    def transport(self) -> Transport:
        """This rank's end of the network that is exchanged over."""
        return self._transport

    @property
    def shard_ranks(self) -> ShardRanks:
        """The ranks that hold the other shards of the parameters."""
        return self._gradients.shard_ranks

    @property
    def keepers(self) -> list[int]:
        """The ranks that keep residuals: with two levels the first of every host, otherwise all."""
        return self._gradients.keepers

    @property
    def place(self) -> tuple[int, int]:
        """Rank and size of its transport."""
        return self._transport.rank, self._transport.size

    @property
    def exchanges(self) -> int:
        """How many it has begun."""
        return self._gradients.step_number

    @contextmanager
    def _told_by_scaler(self) -> Iterator[tuple[Any, Any]]:
        """What a GradScaler has set for a step: its scale, and whether it found gradients that are not finite.

        It takes them back only from a step that returns: what a step that fails would leave, the next would take, too.
        """
        # From our own attributes only: a fused inner optimizer may have such attributes for itself.
        try:
            yield self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        except BaseException:
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    @property
    def last_exchange(self) -> int:
        """When it began its last one, counted over those of all optimizers of this process; 0: none yet."""
        return self._gradients.last_begun

    @property
    def exchanges_in_backward(self) -> bool:
        """Whether DDP's hook exchanges, at the end of backward passes."""
        return False

    def end_round(self) -> None:
        """What :func:`hvd_sketch.join` calls first: exchange what has not been yet.

        Communication: collective, all ranks.
        """

    def step_without_data(self) -> bool:
        """What :func:`hvd_sketch.join` calls until it returns True, where no rank has data any more.

        Communication: collective, all ranks.
        """
        return self._gradients.step_without_data()

    def check_take_over(self, root_rank: int) -> None:
        """Raise ValueError where this rank cannot take over the root's state now. Communication: none."""
        self._gradients.check_root(root_rank)

    def catch_up(self) -> None:
        """What :func:`hvd_sketch.join` calls at last: ranks that left early get what those have that left last.

        Communication: collective, all ranks.
        """
        left_last = self._gradients.had_data()
        if len(left_last) < self._transport.size:
            broadcast_parameters(self._named, left_last[0], self._transport)
            broadcast_optimizer_state(self._agreed, left_last[0], self._transport)
        self.zero_grad()

    @property
    def _agreed(self) -> torch.optim.Optimizer:
        """The optimizer whose state is equal on all ranks."""
        return self.inner
