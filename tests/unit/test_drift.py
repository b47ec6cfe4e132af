"""Checksums of parameters: equal bits give equal sums, any other bits others."""

from __future__ import annotations

import pytest
import torch

from hvd_sketch.exchange.agreement import DIGEST_BITS
from hvd_sketch.model.drift import checksums, digest_of_checksums

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [0, 1, 2, 3, 255, 511, 512, 513, 5000]


def values(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_any_changed_element_changes_the_checksum(dtype: torch.dtype, size: int) -> None:
    tensor = values(size, dtype)
    before = checksums([tensor])
    assert torch.equal(checksums([tensor.clone()]), before)
    for place in {0, size // 2, size - 1} if size else ():
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place].float(), torch.tensor(9.0)).to(dtype) * (1 + 2**-6)
        assert not torch.equal(checksums([changed]), before)


def test_opposite_changes_at_two_places_do_not_cancel() -> None:
    tensor = values(5000, torch.float32)
    before = checksums([tensor])
    bits = tensor.view(torch.int32)
    for first, second in ((0, 1), (0, 2), (17, 4000), (511, 512)):
        bits[first] += 1
        bits[second] -= 1
        assert not torch.equal(checksums([tensor]), before)
        bits[first] -= 1
        bits[second] += 1
    assert torch.equal(checksums([tensor.flip(0).flip(0)]), before)
    assert not torch.equal(checksums([tensor.flip(0)]), before)


def test_any_memory_layout() -> None:
    base = values(5000, torch.float32)
    shifted = torch.cat([torch.zeros(1), base])[1:]  # begins at 4 bytes beyond a multiple of 8
    image = values(7 * 5 * 3 * 3, torch.float32).view(7, 5, 3, 3)
    last = image.to(memory_format=torch.channels_last)
    assert torch.equal(checksums([base, image]), checksums([shifted, last]))


def test_digests_differ_with_every_checksum_and_fit() -> None:
    sums = checksums([values(size, torch.float32) for size in (10, 20, 30)])
    digests = {digest_of_checksums(sums)}
    for number in range(3):
        changed = sums.clone()
        changed[number] += 1
        digests.add(digest_of_checksums(changed))
    digests |= {digest_of_checksums(sums.flip(0)), digest_of_checksums(torch.zeros(3, dtype=torch.int64))}
    assert len(digests) == 6 and all(0 < d < 1 << DIGEST_BITS for d in digests)


@pytest.mark.parametrize("width", [1, 64, 256, 512, 514, 768, 1024, 4096])
def test_rows_that_changed_places_are_seen(width: int) -> None:
    table = values(300 * width, torch.float32).view(300, width)
    assert not torch.equal(checksums([table]), checksums([table[torch.randperm(300)]]))
    assert not torch.equal(checksums([table]), checksums([table.roll(1, 0)]))
