"""Files that are replaced whole or not at all, and logs that lose at most their last line."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Write a file beside ``path`` that takes its place when the block ends::

        with replaced("results.json") as draft:
            draft.write_text(text)

    The draft has reached the disk before it is renamed. Whoever reads ``path`` sees the old file or the new one. Where
    the block raises, the old file stays and the draft is removed; a process that is killed may leave the draft, of the
    name ``.<name>.<process>.<thread>.draft<suffix>``. What is no regular file (a pipe, ``/dev/stdout``) is written
    directly. A symbolic link stays, and its target is replaced.

    Args:
        path: the file to be; its folder must exist. Its permissions are kept.

    Yields:
        The path to write to, with the suffix of ``path``.

    Raises:
        OSError: the file could not be written; says so, and that the old one is as it was.

    Communication: none.
    """
    if Path(path).exists() and not Path(path).is_file():  # asked of the path as given: a pipe's real path is no file's
        yield Path(path)
        return
    target = Path(os.path.realpath(path))
    unique = f"{os.getpid()}.{threading.get_native_id()}"
    draft = target.with_name(f".{target.name}.{unique}.draft{target.suffix}")
    try:
        yield draft
        _flush(draft)
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}: {target} was not written, and is as it was before. Make room for it, or name "
            "another place",
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    flush_folder(target.parent)


def save_whole(state: Any, path: str | Path) -> None:
    """``torch.save`` to a file that is :func:`replaced`. Raises OSError as there. Communication: none."""
    with replaced(path) as draft, draft.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch tells of its own file format, not of the disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a log, and let them reach the disk. Whatever happens, what was there before stays.

    Where a process was ended while it wrote, the last line may be cut short: the new ones begin on a line of their own.
    Communication: none.
    """
    with open(path, "ab+") as file:
        is_cut_short = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_cut_short = file.read(1) != b"\n"
        file.write(("\n" * is_cut_short + "".join(line + "\n" for line in lines)).encode())
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Let the names of a folder's files reach the disk, where its file system can do so."""
    with suppress(OSError):
        _flush(folder)


def require_other(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write over a file that is read. Raises ValueError."""
    same = [path for path in inputs if output.exists() and path.exists() and output.samefile(path)]
    if same:
        raise ValueError(f"--output {output} is one of the files that are read, and would replace it: name another one")


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
