"""The record of one call of ``run_all.sh``: OUT/record.json, whole after each part, whoever ends the call.

``python -m benchmarks.gpu.record OUT`` begins it and says what is missing on this machine;
``python -m benchmarks.gpu.record OUT PART STATUS SECONDS`` says how a part ended.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hvd_sketch.files import replaced

NEEDED = ("torch", "numpy", "triton", "numba", "typer", "pytest", "hypothesis")
Record = dict[str, Any]


def read(folder: Path) -> Record:
    """Parts by name; nothing where there is no record."""
    path = folder / "record.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add(folder: Path, part: str, **figures: Any) -> None:
    """Put figures beside those that a part has."""
    record = read(folder)
    record[part] = {**record.get(part, {}), **figures}
    with replaced(folder / "record.json") as draft:
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def asked() -> tuple[Path, bool]:
    """A part's arguments: OUT, and whether it is a rehearsal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    return arguments.out, arguments.rehearse


def begin(folder: Path, is_rehearsal: bool) -> None:
    """Describe the machine.

    Raises:
        SystemExit: a package that is needed is not there, or no GPU outside of a rehearsal.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"missing on this machine: {', '.join(missing)} (python {platform.python_version()}): install them")
    import torch

    from benchmarks.machine import describe_machine

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not is_rehearsal:
        sys.exit(f"torch {torch.__version__} sees no GPU; --rehearse runs everything in small on a CPU")
    device = torch.device("cuda" if has_gpu else "cpu")
    add(folder, "machine", **describe_machine(device), rehearsal=is_rehearsal)


def main() -> None:
    folder, *of_part = sys.argv[1:]
    if len(of_part) == 3:
        add(Path(folder), of_part[0], status=int(of_part[1]), seconds=int(of_part[2]))
    else:
        begin(Path(folder), is_rehearsal=of_part == ["rehearse"])


if __name__ == "__main__":
    main()
