"""Checkpoints of a whole job: written by all ranks together, complete or not there, checked when they are loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_sketch.checks import check_integer
from hvd_sketch.exchange.setup import refused_together, require_equal, tell_values
from hvd_sketch.model.checkpoint_files import (
    Folder,
    digests_of,
    folders,
    own_file,
    prune,
    read_manifest,
    read_state,
    shared_file,
    write_manifest,
    write_state,
)
from hvd_sketch.model.local_steps import LocalSteps
from hvd_sketch.model.optimizer import ROUND_KEY, STATE_KEY, DistributedOptimizer
from hvd_sketch.shards import globalized, local, localized
from hvd_sketch.transport import Transport
from hvd_sketch.transport.base import gather_texts
from hvd_sketch.transport.stall import watched

SAME_CALL = "Give it the same arguments, and use the same software, on every rank."


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` has loaded.

    Attributes:
        path: its folder.
        step: how many steps the optimizer had made.
        ranks: how many had saved it. Where the job has as many, every rank has its own residual again, and otherwise
            the mean of all; that also where with two levels other ranks are the first of their hosts.
        extra: what rank 0 gave to :func:`save_checkpoint`.
        own: what this rank gave; None where another number of ranks had saved.
    """

    path: Path
    step: int
    ranks: int
    extra: Any
    own: Any


def save_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: DistributedOptimizer | LocalSteps,
    *,
    extra: Any = None,
    own: Any = None,
    keep: int = 3,
) -> Path:
    """Save what a job needs to go on: to the bit with as many ranks, or with any other number of ranks.

    A folder ``<number>-step-<step>`` gets one file of what is equal on all ranks (the model, the wrapped optimizer, the
    mean of the residuals), one file of each rank's own residual and momentum, and at last the manifest, with a checksum
    of every tensor. Without its manifest a checkpoint is not complete, and no job loads it. Of :class:`LocalSteps` the
    wrapped optimizer's state is each rank's own. Of sharded parameters each shard has a file of what is equal on all
    replicas: the number of replicas may change, that of shards may not.

    Args:
        directory: on a file system that all ranks share; one for each group of ranks (process set). Made if missing.
        model: rank 0's is saved, and of each other rank the buffers that differ, as batch norm's statistics.
        optimizer: every rank's own.
        extra: rank 0's, for all ranks: ``{"epoch": 3, "scheduler": scheduler.state_dict()}``. Dense tensors, numbers,
            strings, lists and dicts.
        own: this rank's, as random-number states: ``{"torch": torch.get_rng_state()}``.
        keep: complete checkpoints that stay, this one included; older ones are removed once this one is complete.

    Returns:
        The folder.

    Raises:
        OSError: on every rank: one could not write, as on a full disk. The checkpoints before stay as they are.
        ValueError: on every rank: something cannot be saved, arguments differ between ranks, or a file is not seen by
            rank 0.
        RuntimeError: on every rank: ``LocalSteps`` is within a round; ``sync()`` ends it.

    Communication: collective, all ranks.
    """
    comm, root = _job_of(optimizer), Path(directory)
    buffers: dict[str, Any] = {}
    with refused_together(comm, "save a checkpoint"):
        check_integer("keep", keep, 1)
        buffers = _buffers_of(model)
        digests = {name: digests_of(localized({name: value})) for name, value in buffers.items()}
    everyone = optimizer.state_dict(consolidated=True)
    shared = None
    if optimizer.transport.rank == 0:
        kind = type(optimizer.inner).__name__
        shared = {"model": model.state_dict(), "optimizer": everyone, "class of optimizer": kind, "extra": extra}
    step = step_of(everyone)
    require_equal(comm, {"keep": keep, "step": step}, "save a checkpoint", SAME_CALL)
    with watched(optimizer.transport, "save a checkpoint"):  # whose rank 0 saves the model of these shards
        of_model = gather_texts(optimizer.transport, json.dumps(digests) if shared is not None else "")[0]
    common = json.loads(of_model)
    folder = _make_folder(root, step, comm)
    try:
        with refused_together(comm, "save a checkpoint"):
            files = {}
            if shared is not None:
                name = shared_file(optimizer.shard_ranks.number)
                files[name] = write_state(folder.path / name, localized(shared))
            own_buffers = {name: value for name, value in buffers.items() if digests[name] != common.get(name)}
            state = {"exchange": optimizer.state_dict()[STATE_KEY], "own": own, "buffers": own_buffers}
            if isinstance(optimizer, LocalSteps):
                state["inner"] = optimizer.inner.state_dict()
            files[own_file(comm.rank)] = write_state(folder.path / own_file(comm.rank), localized(state))
        with watched(comm, "save a checkpoint"):
            everyones_files = [json.loads(text) for text in gather_texts(comm, json.dumps(files))]
        with refused_together(comm, "save a checkpoint"):
            if comm.rank == 0:
                all_files = {name: about for each in everyones_files for name, about in each.items()}
                write_manifest(folder, comm.size, optimizer.keepers, all_files)
    except (OSError, TypeError, ValueError):
        if comm.rank == 0:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    if comm.rank == 0:
        prune(root, keep)
    return folder.path


def load_checkpoint(
    directory: str | Path,
    model: nn.Module,
    optimizer: DistributedOptimizer | LocalSteps,
    *,
    step: int | None = None,
    residuals: bool = True,
) -> Checkpoint | None:
    """Go on from the newest complete checkpoint of :func:`save_checkpoint`; afterwards no broadcast is needed.

    Every file is read with ``weights_only=True`` and compared with its checksums before anything is loaded.

    Args:
        directory: as for :func:`save_checkpoint`.
        model: of the same names, shapes and dtypes as the one that was saved. Modified. Another number of ranks gets
            rank 0's buffers.
        optimizer: around the same parameters, with the same compression. Modified.
        step: of the checkpoint to load; None: the newest.
        residuals: False: load the model and the wrapped optimizer alone, to go on with another compression, or with
            ``LocalSteps`` after a ``DistributedOptimizer`` and the other way round. The residuals, the momentum of the
            exchange and the ledger that were saved are left out.

    Returns:
        What was loaded; None, with nothing modified, where the directory has no complete checkpoint yet.

    Raises:
        ValueError: on every rank: a file is damaged or missing on one (named, with the entry and what to do), is of
            another model or compression, there is none of ``step``, or the ranks do not see the same directory.

    Communication: collective, all ranks.
    """
    comm = _job_of(optimizer)
    require_equal(comm, {"residuals": residuals, "step": step}, "load a checkpoint", SAME_CALL)
    folder = _find(Path(directory), step, comm)
    if folder is None:
        return None
    with refused_together(comm, "load a checkpoint"):
        manifest = read_manifest(folder)
        path = folder.path / shared_file(optimizer.shard_ranks.number)
        shared = _read(folder, path.name, manifest, model)
        as_many = manifest["ranks"] == comm.size
        own = _read(folder, own_file(comm.rank), manifest, model) if as_many else None
        # Of two levels other ranks keep residuals where the hosts have others; older manifests do not say.
        has_own = as_many and manifest.get("keepers", optimizer.keepers) == optimizer.keepers
        _check_model(path, model, shared["model"])
        _check_optimizer(path, optimizer, shared["class of optimizer"])
        is_of_other_kind = _is_of_other_kind(path, optimizer, shared["optimizer"], residuals)
    with refused_together(comm, "load a checkpoint"):
        exchange = own["exchange"] if own is not None and has_own else shared["optimizer"][STATE_KEY]
        if not residuals:
            exchange = at_step(optimizer.state_dict()[STATE_KEY], step_of(shared["optimizer"]))
        try:
            inner = own.get("inner", {}) if own is not None and not is_of_other_kind else {}
            state = {**shared["optimizer"], **inner, STATE_KEY: exchange}
            if isinstance(optimizer, DistributedOptimizer):
                state.pop(ROUND_KEY, None)
            elif is_of_other_kind:
                state[ROUND_KEY] = {**optimizer.state_dict()[ROUND_KEY], "done": 0, "start": []}
            optimizer.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{folder.path} does not fit this optimizer: {error}") from error
        shared["model"].update(own.get("buffers", {}) if own is not None else {})
        model.load_state_dict(shared["model"])
    own_extra = own["own"] if own is not None else None
    return Checkpoint(folder.path, folder.step, manifest["ranks"], shared["extra"], own_extra)


def _job_of(optimizer: DistributedOptimizer | LocalSteps) -> Transport:
    """All ranks that save together. Communication: the first call is collective."""
    return optimizer.shard_ranks.with_replicas(optimizer.transport)


def _read(folder: Folder, name: str, manifest: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A file of a checkpoint, with DTensors on the meshes of the model. Raises ValueError where it does not fit."""
    if name not in manifest["files"]:
        raise ValueError(f"{folder.path} has no {name}: its model had fewer shards. Shard the model as it was")
    return globalized(read_state(folder, name, manifest), like=model.parameters())


def _buffers_of(model: nn.Module) -> dict[str, Any]:
    """What a model's state holds beside its parameters: ranks may have their own."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def step_of(state: dict[str, Any]) -> int:
    """How many steps an optimizer had made when it gave its state."""
    return next(state[STATE_KEY][kind]["step"] for kind in ("sketched", "dense") if state[STATE_KEY][kind] is not None)


def at_step(state: dict[str, Any], step: int) -> dict[str, Any]:
    """The state of an optimizer's exchanges as if they had made so many steps."""
    kinds = [kind for kind in ("sketched", "dense") if state[kind] is not None]
    stepped: dict[str, Any] = {kind: {**state[kind], "step": step} for kind in kinds}
    if "inside" in state:  # of two levels
        stepped["inside"] = at_step(state["inside"], step)
    return {**state, **stepped}


def _make_folder(root: Path, step: int, comm: Transport) -> Folder:
    """A folder for the next checkpoint. Communication: collective."""
    number = 0
    with refused_together(comm, "make a folder for a checkpoint"):
        if comm.rank == 0:
            folder = Folder.after(root, step)
            folder.path.mkdir(parents=True)
            number = folder.number
    with watched(comm, "make a folder for a checkpoint"):
        number = int(comm.broadcast_(torch.tensor([number], device="cpu")))
    return Folder.of(root, number, step)


def _find(root: Path, step: int | None, comm: Transport) -> Folder | None:
    """The newest complete checkpoint, or the newest of a step. Communication: collective."""
    found: Folder | None = None
    with refused_together(comm, "look for a checkpoint"):
        complete = [folder for folder in folders(root) if folder.is_complete]
        fitting = [folder for folder in complete if step in (None, folder.step)]
        if step is not None and not fitting:
            steps = ", ".join(str(folder.step) for folder in complete) or "none"
            raise ValueError(f"{root} has no complete checkpoint of step {step!r}; those it has are of steps {steps}")
        found = fitting[-1] if fitting else None
    with watched(comm, "look for a checkpoint"):
        numbers = comm.allgather(torch.tensor([found.number if found else 0], device="cpu")).tolist()
    if len(set(numbers)) > 1:
        told = tell_values([f"number {number}" if number else "none" for number in numbers])
        raise ValueError(
            f"the ranks do not see the same checkpoints in {root}, the newest is {told}: give a directory on a file "
            "system that all ranks share"
        )
    return found


def _check_model(path: Path, model: nn.Module, saved: dict[str, Any]) -> None:
    """Refuse a model of other names, shapes, dtypes or shards."""
    ours, theirs = ({name: _describe(value) for name, value in state.items()} for state in (model.state_dict(), saved))
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differing:
        told = [
            f"{name!r} is {theirs.get(name, 'missing')} there, {ours.get(name, 'missing')} here" for name in differing
        ]
        more = f" and {len(told) - 5} more" * (len(told) > 5)
        raise ValueError(f"{path} is of another model: {'; '.join(told[:5])}{more}. Build the same model")


def _check_optimizer(path: Path, optimizer: DistributedOptimizer | LocalSteps, saved: str) -> None:
    """Refuse a wrapped optimizer of another class: torch would take its state over."""
    ours = type(optimizer.inner).__name__
    if ours != saved:
        raise ValueError(f"{path} is of another optimizer: {saved} there, {ours} here. Wrap a {saved}")


def _is_of_other_kind(
    path: Path, optimizer: DistributedOptimizer | LocalSteps, saved: dict[str, Any], residuals: bool
) -> bool:
    """Whether one of both is a ``LocalSteps``, which has no gradients in its residuals."""
    kinds = "DistributedOptimizer", "LocalSteps"
    ours, theirs = isinstance(optimizer, LocalSteps), ROUND_KEY in saved
    if residuals and ours != theirs:
        raise ValueError(
            f"{path} is of a {kinds[theirs]}, and this is a {kinds[ours]}: residuals of the one are gradients, of the "
            "other differences of parameters. Load with residuals=False"
        )
    return ours != theirs


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    told = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    placements = getattr(value, "placements", None)  # of a DTensor
    return told if placements is None else f"{told} sharded as {placements}, {tuple(local(value).shape)} of it"
