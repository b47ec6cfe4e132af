"""Whether backward passes have reached parameters since the last step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class BackwardWatch:
    """Notices backward passes that accumulate into one of several parameters.

    Args:
        parameters: that are watched.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.has_seen = False
        watch = weakref.ref(self)  # hooks must not keep an optimizer alive

        def see(_: Tensor) -> None:
            alive = watch()
            if alive is not None:
                alive.has_seen = True

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(see)
