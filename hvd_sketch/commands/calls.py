"""A configuration as a user writes it."""

from __future__ import annotations

from dataclasses import fields

from hvd_sketch.config import Compression


def as_call(config: Compression) -> str:
    """The call that makes it, without what is the default."""
    own = ((field.name, getattr(config, field.name), field.default) for field in fields(config))
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value, usual in own if value != usual)})"
