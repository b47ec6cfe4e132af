"""What is checked before any time is printed, and the hash on its own."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from numba import njit
from torch import Tensor

from benchmarks.kernels.torch_style import TorchStyle
from hvd_sketch import SketchedAllreduce
from hvd_sketch.exchange.threshold import ShardEstimates, find_threshold
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels import cpu, load_backend, reference
from hvd_sketch.kernels.threads import run_on_threads
from hvd_sketch.model.drift import checksums
from hvd_sketch.transport import local_transports

SMALL_DIMS = (1, 777, 100_003)


def recover(kernels: ModuleType, hash: BlockHash, table: Tensor, count: int) -> Tensor:
    """Coordinates of the ``count`` largest estimates and some more, as a step takes them: int64, ascending.

    Without a prediction of the threshold.
    """
    estimates = ShardEstimates(kernels, hash, table, 0, 2 * count)
    return estimates.above(find_threshold(estimates, count, local_transports(1)[0]))[0]


def wrong_results(hash: BlockHash, torch_style: TorchStyle | None, count: int, device: torch.device) -> list[str]:
    """What the kernels get wrong: against the reference on small sizes, against the torch style on this one."""
    wrong = [message for dim in SMALL_DIMS for message in _against_reference(hash, dim, device)]
    return wrong + (_against_torch(hash, torch_style, count, device) if torch_style is not None else [])


def _against_reference(like: BlockHash, dim: int, device: torch.device) -> list[str]:
    """Whole numbers: every order of addition gives one sum."""
    kernels = load_backend(None, device)
    hash = BlockHash(dim, like.rows, max(dim // 5, 1), 1, seed=1)
    random = torch.Generator().manual_seed(0)
    u, v, gradient = (torch.randint(-8, 9, (dim,), generator=random).float() for _ in range(3))
    ours = [tensor.to(device, copy=True) for tensor in (torch.zeros(hash.table_shape), u, v)]
    theirs = [torch.zeros(hash.table_shape), u, v]
    kernels.feedback_accumulate_(hash, *ours, gradient.to(device), 0.5, 0)
    reference.feedback_accumulate_(hash, *theirs, gradient, 0.5, 0)
    wrong = []
    if not all(torch.equal(mine.cpu(), right) for mine, right in zip(ours, theirs, strict=True)):
        wrong.append(f"table, u or v at dim {dim}: differ from the reference")
    estimates = kernels.estimate(hash, ours[0], 0, dim).cpu()
    if not torch.equal(estimates, reference.estimate(hash, theirs[0], 0, dim)):
        wrong.append(f"estimates at dim {dim}: differ from the reference")
    count, own = -(-dim // 10), [table[:, 0].contiguous() for table in (ours[0], theirs[0])]
    if not torch.equal(recover(kernels, hash, own[0], count).cpu().long(), recover(reference, hash, own[1], count)):
        wrong.append(f"recovery at dim {dim}: differs from the reference's")
    return wrong


def _against_torch(hash: BlockHash, torch_style: TorchStyle, count: int, device: torch.device) -> list[str]:
    kernels = load_backend(None, device)
    values = torch.randint(-8, 9, (hash.dim,), device=device).float()
    table = torch.zeros(hash.table_shape, device=device)
    kernels.accumulate_(hash, table, values, 0)
    wrong = []
    if not torch.equal(table.reshape(hash.rows, -1), torch_style.sketch(values).float()):
        wrong.append("table: differs from the torch style's")
    estimates = kernels.estimate(hash, table, 0, hash.dim)
    if not torch.equal(estimates, _middle(torch_style.votes(table.reshape(hash.rows, -1)))):
        wrong.append("estimate: differs from the torch style's")
    chosen = recover(kernels, hash, table[:, 0].contiguous(), count).long()
    largest_left = estimates.abs().index_fill(0, chosen, 0).max()
    expected = min(count, int(estimates.count_nonzero()))
    is_largest = chosen.numel() >= expected and bool((estimates[chosen].abs() > largest_left).all())
    if not is_largest or bool((chosen.diff() <= 0).any()):
        wrong.append(f"recovery: {chosen.numel()} of {expected}, or not the largest, or not ascending")
    return wrong


def wrong_step(
    hash: BlockHash,
    torch_style: TorchStyle,
    exchange: SketchedAllreduce,
    gradient: Tensor,
    momentum: float,
    candidates: int,
) -> list[str]:
    """One whole step from nothing against the torch style's: the same choice, but for estimates that rounding swaps."""
    kernels, table = load_backend(None, gradient.device), torch.zeros(hash.table_shape, device=gradient.device)
    kernels.accumulate_(hash, table, gradient, 0)
    candidates = recover(kernels, hash, table[:, 0].contiguous(), candidates).numel()  # a step takes some more
    u, v = torch.zeros_like(gradient), torch.zeros_like(gradient)
    theirs = torch_style.step(u, v, gradient, momentum, candidates, exchange.config.k)
    ours = exchange.step(gradient).indices
    shared = int(torch.isin(ours, theirs).sum())
    if ours.numel() != theirs.numel() or shared < 0.999 * theirs.numel():
        return [f"step: chose {ours.numel()} coordinates, {shared} of them the torch style's {theirs.numel()}"]
    return []


def _middle(votes: Tensor) -> Tensor:
    """Median over rows, the mean of the middle two for an even number."""
    ordered = votes.sort(dim=0).values
    return (ordered[(len(votes) - 1) // 2] + ordered[len(votes) // 2]) * 0.5


def hash_only(hash: BlockHash) -> int:
    """Evaluate what a sketch needs of the hash and nothing else, on torch's number of threads; returns a checksum."""
    sums = np.zeros(torch.get_num_threads(), dtype=np.int64)
    run_on_threads(len(sums), _hash_only, sums, cpu._hash_numbers(hash), hash.blocks)
    return int(sums.sum())


@njit(nogil=True)
def _hash_only(sums: np.ndarray, hash: loops.HashNumbers, blocks: int, thread: int, threads: int) -> None:
    signs, offsets, _, block, cols, _ = hash
    words = np.empty(loops.WORDS, dtype=np.uint32)
    columns = np.empty(loops.GROUP, dtype=np.int64)
    numbers = np.empty(loops.GROUP, dtype=np.int64)
    for first in range(thread * blocks // threads, (thread + 1) * blocks // threads, loops.GROUP):
        for i in range(loops.GROUP):
            numbers[i] = first + i
        for row in range(signs.shape[0]):
            loops._fill_columns(columns, 0, offsets[row], numbers, cols)
            for i in range(loops.GROUP):
                loops._fill_words(words, 0, signs[row], numbers[i], block)
                sums[thread] += words[i % loops.WORDS] + columns[i]


def wrong_checksum(values: Tensor) -> list[str]:
    """Whether a checksum of parameters misses a change, or sees one where there is none."""
    before = checksums([values])
    changed = values.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.zeros_like(changed[-1]))
    if torch.equal(checksums([values.clone()]), before) and not torch.equal(checksums([changed]), before):
        return []
    return ["the checksum does not tell the last coordinate's last bit"]
