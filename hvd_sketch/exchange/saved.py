"""A saved state, looked at before anything of it is taken over: what does not fit is refused with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvd_sketch.exchange.agreement import all_finite

WITHOUT_RESIDUALS = (
    "to go on with residuals of zero, give load_checkpoint residuals=False, or delete a state_dict's 'hvd_sketch' entry"
)
GO_ON = f"The checkpoint is damaged, or of another configuration: load another one; {WITHOUT_RESIDUALS}"


class SavedState:
    """What ``state_dict()`` returned, as it comes back from a file. No method communicates.

    Args:
        state: of one exchange, or of all of a model.
        rank: this one, for messages.
        name: tells the name of a coordinate.

    Raises:
        ValueError: an entry is missing or not what it must be, in every method; ``state`` is no mapping.
    """

    def __init__(self, state: object, rank: int, name: Callable[[int], str] = "element {}".format) -> None:
        self._rank, self._name = rank, name
        if not isinstance(state, Mapping):
            raise ValueError(f"rank {rank}: a saved state must be a dict, got {type(state).__name__}. {GO_ON}")
        self._state: Mapping[str, Any] = state

    def refuse(self, entry: str, expected: str, arrived: object) -> NoReturn:
        raise ValueError(f"rank {self._rank}: {entry!r} of the saved state must be {expected}, got {arrived}. {GO_ON}")

    def has(self, name: str) -> bool:
        """Whether there is such an entry."""
        return name in self._state

    def entry(self, name: str, kind: type | tuple[type, ...] = object) -> Any:
        """An entry of some type."""
        if not self.has(name):
            self.refuse(name, "there", f"the entries {', '.join(map(repr, self._state)) or 'none'}")
        value = self._state[name]
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            self.refuse(name, f"of type {' or '.join(each.__name__ for each in kinds)}", f"{value!r:.100}")
        return value

    def count(self, name: str) -> int:
        """An integer of at least 0."""
        value = self.entry(name)
        if type(value) is not int or value < 0:
            self.refuse(name, "an integer of at least 0", f"{value!r:.100}")
        return value

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A finite tensor of the shape and dtype of ``like``; on its own device."""
        value = self.entry(name)
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            self.refuse(name, f"{_describe(like)}", _describe(value))
        if not all_finite([value]):
            places = (~torch.isfinite(value)).nonzero()[:, 0]
            first = self._name(int(places[0]))
            self.refuse(name, "finite", f"NaN or Inf at {places.numel()} of {value.numel()} places, first at {first}")
        return value

    def pairs(self, name: str, number: int) -> list[tuple[int, int]]:
        """So many pairs of integers."""
        value = self.entry(name, (list, tuple))
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in value]
        if len(pairs) != number or not all([type(edge) for edge in pair] == [int, int] for pair in pairs):
            self.refuse(name, f"{number} pairs of integers", f"{value!r:.100}")
        return [(first, last) for first, last in pairs]


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.100}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
