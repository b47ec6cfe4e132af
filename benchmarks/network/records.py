"""A report that grows by one record for each finished setting, and is whole at any time."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import commit
from hvd_sketch.files import replaced

Record = dict[str, Any]


class Records:
    """A JSON file that holds a list of records. Whoever dies while it grows, what was there stays readable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        try:
            return json.loads(self.path.read_text()) if self.path.exists() else []
        except json.JSONDecodeError as error:
            sys.exit(f"{self.path} expected a list of records in JSON: {error}. Mend it, or name another --json")

    def append(self, record: Record) -> None:
        lines = ",\n".join(json.dumps(each) for each in [*self.read(), record])
        with replaced(self.path) as draft:
            draft.write_text(f"[\n{lines}\n]\n")

    def has(self, **setting: Any) -> bool:
        """Whether a record of this setting is there."""
        return any(setting.items() <= record.items() for record in self.read())


def environment() -> Record:
    """What a measurement depends on besides its setting."""
    return {"cores": os.cpu_count(), "commit": commit()}
