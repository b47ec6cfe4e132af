"""Checkpoints on a disk: a folder each, whose manifest is written last and has a checksum of every entry."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.files import flush_folder, replaced, save_whole

MANIFEST = "manifest.json"
FORMAT = 1
FOLDER = re.compile(r"(\d{6,})-step-(\d+)")
LEAVES = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
Digests = dict[str, str]  # by entry, as "optimizer/state/0/exp_avg"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """One checkpoint.

    Attributes:
        path: ``<directory>/<number>-step-<step>``.
        number: counts the checkpoints of a directory, from 1: the newest has the highest.
        step: how many steps had been made.
    """

    path: Path
    number: int
    step: int

    @property
    def is_complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    @staticmethod
    def after(directory: Path, step: int) -> Folder:
        """The next one of a directory; not made yet."""
        number = 1 + max((folder.number for folder in folders(directory)), default=0)
        return Folder.of(directory, number, step)

    @staticmethod
    def of(directory: Path, number: int, step: int) -> Folder:
        return Folder(directory / f"{number:06d}-step-{step}", number, step)


def folders(directory: Path) -> list[Folder]:
    """All checkpoints of a directory, complete or not, the oldest first; none where there is no directory.

    Raises:
        NotADirectoryError: there is something else.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} is a file: expected a directory of checkpoints, or the name of a new one"
        )
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    matches = [match for match in map(FOLDER.fullmatch, names) if match]
    found = [Folder(directory / match[0], int(match[1]), int(match[2])) for match in matches]
    return sorted(found, key=lambda folder: folder.number)


def shared_file(shard: int) -> str:
    """The name of the file of what is equal on all replicas of a shard, or goes to any number of them."""
    return f"shared-{shard}.pt" if shard else "shared.pt"


def own_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank}.pt"


def prune(directory: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest ``keep``, and incomplete ones before the newest."""
    found = folders(directory)
    complete = [folder for folder in found if folder.is_complete]
    for folder in found:
        if folder in complete[-keep:] or folder.number > complete[-1].number:
            continue
        try:
            (folder.path / MANIFEST).unlink(missing_ok=True)  # first, so that it is never taken for complete
            shutil.rmtree(folder.path)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s. Remove it by hand.", folder.path, error)


def write_state(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write one file; returns what the manifest says of it."""
    digests = digests_of(state)
    save_whole(state, path)
    return {"bytes": path.stat().st_size, "entries": digests}


def write_manifest(folder: Folder, ranks: int, keepers: Sequence[int], files: Mapping[str, Any]) -> None:
    """Make a checkpoint complete, once all files are there. Raises ValueError where this process does not see one.

    Args:
        folder: of the checkpoint.
        ranks: that have saved it.
        keepers: those of them that keep residuals.
        files: what is to be known of each, by name.
    """
    for name, about in files.items():
        path = folder.path / name
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            raise ValueError(
                f"{path} was written by another rank, but is not seen by rank 0: give a directory on a file system "
                "that all ranks share"
            )
    flush_folder(folder.path)
    who = {"ranks": ranks, "keepers": list(keepers)}
    content = {"format": FORMAT, "number": folder.number, "step": folder.step, **who, "files": files}
    with replaced(folder.path / MANIFEST) as draft:
        draft.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    flush_folder(folder.path.parent)


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises ValueError where it is damaged."""
    path = folder.path / MANIFEST
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {what_to_do(folder)}") from error
    if checksum != _checksum(content) or content["number"] != folder.number or content["step"] != folder.step:
        raise ValueError(f"{path} does not have the checksum, the number or the step that it had. {what_to_do(folder)}")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has the format {content['format']}, expected {FORMAT}: load it with its own version")
    return content


def read_state(folder: Folder, name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A file of a checkpoint, on the CPU, every entry as it was saved. Raises ValueError where it is damaged."""
    path, about = folder.path / name, manifest["files"][name]
    try:
        size_bytes = path.stat().st_size
        if size_bytes != about["bytes"]:
            raise ValueError(f"it has {size_bytes} bytes, and {about['bytes']} were written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        digests = digests_of(state)
    except Exception as error:  # unpicklers raise whatever they like
        raise ValueError(f"{path} cannot be read: {str(error)[:300]}. {what_to_do(folder)}") from error
    saved: Digests = about["entries"]
    damaged = [entry for entry in {**saved, **digests} if saved.get(entry) != digests.get(entry)]
    if damaged:
        more = f" and {len(damaged) - 5} more" * (len(damaged) > 5)
        raise ValueError(
            f"{path} is damaged: {', '.join(map(repr, damaged[:5]))}{more} of {len(saved)} entries "
            f"{'is' if len(damaged) == 1 else 'are'} not what was saved. {what_to_do(folder)}"
        )
    return state


def what_to_do(folder: Folder) -> str:
    """How to go on without a damaged checkpoint."""
    before = [other for other in folders(folder.path.parent) if other.is_complete and other.number < folder.number]
    then = f"go on from step {before[-1].step}, {before[-1].path.name}" if before else "begin again: none is older"
    return f"Put a copy of the checkpoint in its place, or remove {folder.path} to {then}"


def digests_of(state: object) -> Digests:
    """A checksum of every entry, by its path. Two states with equal digests are equal.

    Raises:
        ValueError: an entry is of a type that ``torch.load(weights_only=True)`` does not load.
    """
    return {path: _digest(path, value) for path, value in _entries("", state)}


def _entries(path: str, value: object) -> Iterator[tuple[str, object]]:
    inside: list[tuple[object, object]]
    if type(value) in (dict, OrderedDict, Counter):
        assert isinstance(value, dict)
        inside = list(value.items())
        for key, _ in inside:
            if type(key) not in LEAVES:
                raise ValueError(f"{path or 'the state'} has a key of type {_name(key)}: take a string or a number")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        inside = list(enumerate(value))
    else:
        yield path, value
        return
    if not inside:
        yield path, value
    for key, each in inside:
        yield from _entries(f"{path}/{key}" if path else str(key), each)


def _digest(path: str, value: object) -> str:
    hashed = blake2b(digest_size=16)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif type(value) in (*LEAVES, dict, OrderedDict, Counter, list, tuple):
        hashed.update(f"{_name(value)} {value!r}".encode())
    else:
        raise ValueError(
            f"{path!r} is of type {_name(value)}, which torch.load(weights_only=True) does not load: save dense "
            "tensors, numbers, strings, lists and dicts"
        )
    return hashed.hexdigest()


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _checksum(content: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
