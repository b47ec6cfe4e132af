"""Before the first message over torch.distributed: which ranks exchange, and a group of our own that holds them."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hvd_sketch.transport.attendance import Attendance, StoreAttendance
from hvd_sketch.transport.gloo_threads import patient_gloo
from hvd_sketch.transport.stall import connecting, process_watch
from hvd_sketch.transport.torch_messages import DeviceCollectives, DirectMessages

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOK_S = 0.5  # after which a rank that waits for others looks at what they do
State = tuple[str, list[int]]  # the name of the channel that a rank waits in, and the ranks it waits for
NOWHERE: State = ("", [])


@dataclass(frozen=True)
class Channel:
    """A group of our own: our messages cannot meet the user's.

    Attributes:
        connect_part: a channel between some of the ranks, from a name of theirs, the rank and the size there.
        parts: numbers them, alike on all ranks.
    """

    rank: int
    size: int
    host: DirectMessages
    cuda: DeviceCollectives | None
    attendance: Attendance
    connect_part: Callable[[str, int, int], Channel]
    parts: Iterator[int] = field(default_factory=count)


def users_group(group: Any, dim: str | int | None) -> Any:
    """The process group that a user means: this one, a dimension of a DeviceMesh, or all ranks.

    Communication: none, but ``init_process_group`` where nobody has called it.

    Raises: see :class:`hvd_sketch.transport.TorchTransport`.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():
        _initialise()
    if isinstance(group, DeviceMesh):
        group = _group_along(group, dim)
    elif dim is not None:
        raise ValueError(f"dim names a dimension of a DeviceMesh, got dim={dim!r} with {group!r}: leave it out")
    group = group if group is not None else dist.group.WORLD
    _check_group(group)
    return group


def _initialise() -> None:
    """Begin torch's world as torchrun, or whoever sets its variables, describes it."""
    import torch.distributed as dist

    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"transport 'torch' expected a process group or torchrun's variables {', '.join(LAUNCH_VARIABLES)}, but "
            f"{', '.join(missing)} is not set: start the ranks with torchrun, or call "
            "torch.distributed.init_process_group before"
        )
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    if not has_nccl:
        atexit.register(_end_world)


def _end_world() -> None:
    """Gloo's threads would outlive the program, and abort it: with torch 2.13 in one of twelve runs on busy cores."""
    import torch.distributed as dist

    if dist.is_initialized() and not hasattr(sys, "last_type"):  # after an error a thread may wait for a rank
        dist.destroy_process_group()


def _group_along(mesh: Any, dim: str | int | None) -> Any:
    """The ranks that differ from this one along a dimension of a mesh only."""
    names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
    about = f"a DeviceMesh of dimensions {', '.join(map(repr, names))}"
    if mesh.get_coordinate() is None:
        raise ValueError(f"{_here()} is not in {about} over ranks {mesh.mesh.flatten().tolist()}: build none there")
    if dim is None and mesh.ndim > 1:
        raise ValueError(f"TorchTransport expected one dimension of {about}: pass mesh[{names[0]!r}]")
    known = dim is None or dim in names or (isinstance(dim, int) and 0 <= dim < mesh.ndim)
    if not known:
        raise ValueError(f"TorchTransport got dim={dim!r}, but has {about}: name one of them")
    return mesh.get_group(dim)


def _check_group(group: Any) -> None:
    """Refuse what is no process group, and a group that this rank cannot use. Communication: none."""
    import torch.distributed as dist

    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"TorchTransport expected a process group with this rank in it, got one without {_here()}: build the "
            "transport only where `torch.distributed.get_rank(group) >= 0`"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"TorchTransport expected a torch.distributed.ProcessGroup or a DeviceMesh, got {group!r} "
            f"({type(group).__name__}) on {_here()}: pass what new_group returned, mesh['name'], or nothing for all"
        )
    try:
        config = dist.get_backend_config(group)
    except TypeError:
        config = ""
    if not config:
        raise ValueError(
            f"TorchTransport expected a group of the running world, got one on {_here()} that destroy_process_group "
            "has ended: make the group again, after init_process_group"
        )
    if "mpi" in config:
        raise ValueError(
            f"TorchTransport cannot make a group of its own beside {config!r} (on {_here()}): torch's MPI has no store "
            "to meet at; pass transport='mpi', or MPITransport(comm)"
        )


def _here() -> str:
    import torch.distributed as dist

    return f"rank {dist.get_rank()} of {dist.get_world_size()}"


def channel_on(group: Any) -> Channel:
    """The channel on a user's process group, made by the first call, and freed with the user's group.

    Communication: the first call on a group is collective, later ones send nothing.

    Raises:
        ValueError: on every rank of the group: its ranks wait in channels on different groups.
        TimeoutError: some of them do not come.
    """
    channels = _channels()
    if group not in channels:
        channels[group] = _new_channel(group)
    return channels[group]


@cache
def _channels() -> WeakKeyDictionary[Any, Channel]:
    """The channels of this process."""
    return WeakKeyDictionary()


@cache
def _channels_by_name() -> dict[str, int]:
    """How many channels this process has made on groups of a name: a world that begins again uses its names again."""
    return {}


def _new_channel(group: Any) -> Channel:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    ranks, rank, config = dist.get_process_group_ranks(group), dist.get_rank(group), dist.get_backend_config(group)
    counts = _channels_by_name()
    number = counts.get(group.group_name, 0)
    name = f"{group.group_name}/{number}"
    timeout = _timeout_of(group, config)
    store = dist.PrefixStore("hvd_sketch", c10d._get_default_store())
    with process_watch().over(rank, len(ranks), None, connecting("torch")):
        _meet(store, name, ranks, dist.get_rank(), timeout.total_seconds())
        counts[group.group_name] = number + 1
        where = dist.PrefixStore(name, store), rank, len(ranks), timeout
        return connect(*where, with_nccl="cuda:nccl" in config)


def connect(
    store: Any, rank: int, size: int, timeout: timedelta, *, with_nccl: bool, host: str | None = None
) -> Channel:
    """A channel between ranks that meet at a store of their own. Communication: collective.

    Args:
        store: nobody else's.
        rank, size: this rank, and how many there are.
        timeout: of a collective.
        with_nccl: whether CUDA tensors stay on the device; equal on all ranks.
        host: address of the interface that Gloo uses; default: what Gloo finds, or GLOO_SOCKET_IFNAME.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo
    of_gloo: Any = timeout
    attendance = StoreAttendance(dist.PrefixStore("attendance", store), rank, size)
    with patient_gloo():
        if host is not None:
            of_gloo = gloo._Options()
            of_gloo._timeout, of_gloo._devices = timeout, [gloo.create_device(hostname=host)]
        messages = DirectMessages(gloo(dist.PrefixStore("host", store), rank, size, of_gloo))

    def connect_part(name: str, rank: int, size: int) -> Channel:
        return connect(dist.PrefixStore(name, store), rank, size, timeout, with_nccl=with_nccl, host=host)

    if not with_nccl:
        return Channel(rank, size, messages, None, attendance, connect_part)
    of_nccl = c10d.ProcessGroupNCCL.Options()
    of_nccl._timeout = timeout
    cuda = c10d.ProcessGroupNCCL(dist.PrefixStore("cuda", store), rank, size, of_nccl)
    return Channel(rank, size, messages, DeviceCollectives(cuda), attendance, connect_part)


def _timeout_of(group: Any, config: str) -> timedelta:
    """How long a collective of the group may take."""
    from torch.distributed.distributed_c10d import default_pg_timeout

    device = torch.device(config.partition(":")[0])
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", default_pg_timeout)


def _meet(store: Any, name: str, ranks: list[int], rank: int, timeout_s: float) -> None:
    """Return once all ranks of a channel are here; ``rank`` and ``ranks`` are those of the world.

    After an error it may be called again, for this channel or another.
    """
    mine: State = (name, ranks)
    _tell(store, rank, mine)
    deadline_s = time.monotonic() + timeout_s
    if store.add(name, 1) == len(ranks):
        store.set(f"{name} is complete", "")
    while not _comes(store, f"{name} is complete"):
        try:
            _refuse_to_wait_in_vain(store, rank, mine, timeout_s, deadline_s)
        except (TimeoutError, ValueError):
            if _leaves(store, name, len(ranks)):
                _tell(store, rank, None)
                raise
    _tell(store, rank, NOWHERE)


def _refuse_to_wait_in_vain(store: Any, rank: int, mine: State, timeout_s: float, deadline_s: float) -> None:
    ranks = mine[1]
    about = f"rank {rank} has waited for ranks {ranks} to build a TorchTransport on their group"
    lost = _find_lost(store, rank, mine)
    if lost is not None:
        raise ValueError(
            f"{about}, but rank {lost} waits on another one, or has given up: give the same group on all of its ranks, "
            "and build transports in the same order everywhere"
        )
    if time.monotonic() > deadline_s:
        missing = [peer for peer in ranks if _state(store, peer) != mine]
        raise TimeoutError(f"{about} for {timeout_s:.0f} s, but ranks {missing} did not come")


def _leaves(store: Any, name: str, size: int) -> bool:
    """Count this rank out, so that who comes later does not rely on it; False: the last rank has just come."""
    if store.add(name, -1) < size - 1:
        return True
    store.add(name, 1)
    return False


def _comes(store: Any, key: str) -> bool:
    """Whether a key is set, now or within moments."""
    try:
        store.wait([key], timedelta(seconds=LOOK_S))
    except RuntimeError:
        return store.check([key])
    return True


def _tell(store: Any, rank: int, state: State | None) -> None:
    store.set(f"at {rank}", json.dumps(state))


def _state(store: Any, rank: int) -> State | None:
    """The channel that a rank of the world waits in, by name and ranks; None: it has given up."""
    if not store.check([f"at {rank}"]):
        return NOWHERE
    state = json.loads(store.get(f"at {rank}"))
    return None if state is None else (state[0], state[1])


def _find_lost(store: Any, rank: int, mine: State) -> int | None:
    """A rank that ``rank`` waits for, perhaps through others, and that will not come.

    It has given up, or waits in another channel for ``rank``.
    """
    known, todo = {rank}, [mine]
    while todo:
        awaited = todo.pop()
        for peer in set(awaited[1]) - known:
            known.add(peer)
            state = _state(store, peer)
            if state is None or (state != mine and rank in state[1]):
                return peer
            if state != awaited:
                todo.append(state)
    return None
