"""A file of lines that never stops the program that writes it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

MOST_BYTES = 256 << 20
KEPT = ".old"  # added to the name of the file of a run before
logger = logging.getLogger(__name__)


def path_of_rank(path: str | PathLike[str], rank: int) -> Path:
    """``path`` itself for rank 0, and ``run.rank3.jsonl`` beside ``run.jsonl`` for rank 3."""
    path = Path(path)
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def path_of_shard(path: str | PathLike[str], shard: int) -> Path:
    """``path`` itself for shard 0, and ``run.shard2.jsonl`` beside ``run.jsonl`` for shard 2: of its rank 0."""
    path = Path(path)
    return path if shard == 0 else path.with_name(f"{path.stem}.shard{shard}{path.suffix}")


def make_folder_of(path: str | PathLike[str]) -> None:
    """Make the folder that a file shall be in. Raises OSError where nothing can be written there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written: expected the name of a file in a folder that this user may write to")


class LineFile:
    """Lines in a file, only whole ones, whatever happens while they are written.

    Where the disk is full, or the file cannot be written for another reason, an error is logged once, lines are lost
    until it can be written again, and the program goes on. A file that is removed while it is open is not made again:
    it would lack its first lines.

    Args:
        path: the file to be; its folder exists. One that is there already is kept as ``<path>.old``.
        goes_on: add to what is there instead.
        most_bytes: after which no more is written.
    """

    def __init__(self, path: str | PathLike[str], goes_on: bool = False, most_bytes: int = MOST_BYTES) -> None:
        self.path = Path(path)
        self._goes_on, self._most_bytes = goes_on, most_bytes
        self._file: int | None = None
        self._size = 0  # bytes of whole lines
        self._is_failing = self._is_over = False

    def write(self, lines: Iterable[str]) -> bool:
        """Hand lines, without their ends, to the operating system; they survive the process.

        Returns:
            Whether the file has them; False: they are lost.
        """
        data = "".join(line + "\n" for line in lines).encode()
        if not data or self._is_over:
            return not data
        if self._size + len(data) > self._most_bytes:
            self._is_over = True
            logger.warning("%s has %d bytes: no more is written to it", self.path, self._size)
            return False
        try:
            if self._is_removed():
                self._is_over = True
                logger.error("%s was removed: no more is written to it. The training goes on.", self.path)
                return False
            self._append(data)
        except OSError as error:
            self._tell(error)
            return False
        self._is_failing = False
        return True

    def close(self) -> None:
        """Close the file; it is opened again should more come."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._goes_on = True

    def _is_removed(self) -> bool:
        try:
            return self._file is not None and os.fstat(self._file).st_nlink == 0
        except OSError as error:
            if error.errno == errno.ESTALE:  # on a file system of another host
                return True
            raise

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._open()
        written = 0
        while written < len(data):
            try:
                written += os.write(self._file, data[written:])
            except OSError:
                os.ftruncate(self._file, self._size)  # no half of a line stays
                raise
        self._size += len(data)

    def _open(self) -> int:
        if not self._goes_on and self.path.is_file():
            self.path.replace(self.path.with_name(self.path.name + KEPT))
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._size = os.fstat(file).st_size
            if self._size and os.pread(file, 1, self._size - 1) != b"\n":
                self._size += os.write(file, b"\n")  # a process was ended while it wrote
        except OSError:
            os.close(file)
            raise
        return file

    def _tell(self, error: OSError) -> None:
        if not self._is_failing:
            logger.error(
                "%s was not written (%s): lines are missing there until it can be written again. Make room, or name "
                "another place. The training goes on.",
                *(self.path, error.strerror or error),
            )
        self._is_failing = True
