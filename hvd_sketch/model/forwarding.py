"""An optimizer around another one: to all that expect a torch optimizer it looks like the inner one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch


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
            "a DistributedOptimizer holds its rank's network and cannot be copied or pickled: save "
            "state_dict() and load it into a new one"
        )
