"""Class and hyper-parameters of an optimizer, compared over the ranks: unequal ones let parameters drift apart."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping

import torch
from torch import Tensor

from hvd_sketch.exchange.agreement import Report
from hvd_sketch.exchange.setup import require_equal, tell_differences
from hvd_sketch.transport import Transport

ROLE = "wrapped optimizer"
NUMBERS = (int, float)
SCHEDULED = ("lr", "momentum", "betas", "weight_decay")


def require_equal_optimizers(comm: Transport, optimizer: torch.optim.Optimizer, role: str = ROLE) -> None:
    """Compare the class of an optimizer, and all hyper-parameters of its groups (``lr``, ``betas``, …), over all ranks.

    Where any rank's optimizer has a state already, as from a checkpoint, the class alone is compared: the others may
    get state and hyper-parameters by :func:`hvd_sketch.broadcast_optimizer_state`.

    Args:
        comm: all ranks.
        optimizer: of this rank.
        role: what it is called in the error.

    Communication: collective, all ranks, also when they then raise.

    Raises:
        ValueError: on every rank, naming what differs, the ranks and their values.
    """
    has_state = comm.allgather(torch.tensor([bool(optimizer.state)], dtype=torch.uint8, device="cpu"))
    fields: dict[str, object] = {role: type(optimizer).__name__}
    if not bool(has_state.any()):
        for number, group in enumerate(optimizer.param_groups):
            fields |= {f"{name} of group {number} of the {role}": value for name, value in _settings(group).items()}
    require_equal(comm, fields)


def compared_numbers(report: Report) -> bytes:
    """What schedulers change, learning rates, momentum, betas and weight decays, and whether the last step was made.

    As float64. Numbers that are kept on a device are left out: to read them waits for it. Of one group 2 microseconds,
    of 100 groups 100. Communication: none.
    """
    numbers = array("d", [report.was_unused])
    for group in report.groups:
        for value in map(group.get, SCHEDULED):
            for each in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(each, NUMBERS):
                    numbers.append(each)
                elif isinstance(each, Tensor) and each.device.type == "cpu" and each.numel() == 1:
                    numbers.append(each.item())
    return numbers.tobytes()


def _settings_in_words(report: Report) -> dict[str, str]:
    """The same by name; of numbers on a device, too."""
    return {"a step with what the last exchange averaged": "not made" if report.was_unused else "made"} | {
        f"{name} of group {number}": told
        for number, group in enumerate(report.groups)
        for name, told in _settings(group).items()
        if name in SCHEDULED
    }


def error_of_settings(comm: Transport, report: Report) -> RuntimeError:
    """What all ranks raise where :func:`compared_numbers` differ, before any steps with its own.

    Communication: collective, all ranks.
    """
    told = tell_differences(comm, json.dumps(_settings_in_words(report)))
    return RuntimeError(
        "the optimizers' settings, or their steps, differ between the ranks (seen from rank "
        f"{comm.rank} of {comm.size}):{told or ' they are kept on different devices'}\nThe parameters would drift "
        "apart. Step optimizers and schedulers equally often on every rank, also where a GradScaler has skipped a step "
        "or a rank has caught an error, and give those that follow a metric, as ReduceLROnPlateau, its mean over the "
        "ranks. check_every=0 turns this check off."
    )


def _settings(group: Mapping[str, object]) -> dict[str, str]:
    """What a group says beside its parameters."""
    return {name: _told(value) for name, value in group.items() if name not in ("params", "param_names")}


def _told(value: object) -> str:
    """A value in words that are equal on every rank where the value is: tensors by their numbers, objects by class."""
    if isinstance(value, Tensor):
        return str(value.tolist())
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_told, value))})"
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return str(value)
    return type(value).__name__
