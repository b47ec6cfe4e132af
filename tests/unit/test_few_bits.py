"""Few-bit codes: the Numba kernels against the reference, and what rounding may and may not do."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.kernels import cpu, reference
from hvd_sketch.kernels.reference import CHUNKS, LARGEST_CODES, chunks_of, packed_bytes
from tests.support.few_bits import LENGTHS, dithers, segments
from tests.support.vectors import random_values, same_bits

Z = 4.0  # standard errors that a mean may be away from what it estimates
LARGEST = float(np.finfo(np.float32).max)
every_width = pytest.mark.parametrize("bits", CHUNKS)
some_examples = settings(max_examples=80, deadline=None)


def split_for(threads: int) -> mock._patch:
    return mock.patch.object(cpu, "threads_for", lambda size: threads)


def rounded(values: Tensor, bits: int, dither: int | None = None) -> Tensor:
    """What the codes of float32 [segments, length] stand for."""
    packed = reference.quantize(values, bits, dither)
    return reference.dequantize_sum(packed.unsqueeze(0), values.shape[1], bits)


def scales_of(packed: Tensor, length: int, bits: int) -> Tensor:
    """The scale of every value: float64 [segments, length]."""
    halves = packed.numpy()[:, : 2 * chunks_of(length, bits)].copy().view("<u2").astype(np.uint32)
    scales = (halves << 16).view(np.float32).astype(np.float64)
    return torch.from_numpy(np.repeat(scales, CHUNKS[bits], axis=1)[:, :length])


@every_width
@pytest.mark.parametrize("threads", [1, 3])
@some_examples
@given(segments(), dithers(), st.integers(1, 4))
def test_numba_has_the_reference_bits(threads: int, bits: int, values: Tensor, dither: int | None, terms: int) -> None:
    codes = [reference.quantize(values * (0.3 * i + 0.1), bits, dither) for i in range(terms)]
    with split_for(threads):
        assert torch.equal(cpu.quantize(values, bits, dither), reference.quantize(values, bits, dither))
        total = cpu.dequantize_sum(torch.stack(codes), values.shape[1], bits)
    assert same_bits(total, reference.dequantize_sum(torch.stack(codes), values.shape[1], bits))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 1, 500])
def test_subtraction_has_the_reference_bits(threads: int, size: int) -> None:
    ours, theirs, sent = random_values(1000), random_values(1000), random_values(size, 1)
    indices = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(1000)[:size]))
    with split_for(threads):
        cpu.subtract_at_(ours, indices, sent)
    reference.subtract_at_(theirs, indices, sent)
    assert same_bits(ours, theirs)


@every_width
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_bytes(bits: int, length: int) -> None:
    chunks = -(-length // CHUNKS[bits])
    assert packed_bytes(length, bits) == 2 * chunks + -(-length * bits // 8)
    assert reference.quantize(torch.ones(2, length), bits).shape == (2, packed_bytes(length, bits))


@every_width
@some_examples
@given(segments(), dithers())
def test_an_error_is_at_most_half_a_scale_or_a_scale(bits: int, values: Tensor, dither: int | None) -> None:
    """But for the rounding of the quotient, of float32; where the scale is limited, the largest values lose more."""
    packed = reference.quantize(values, bits, dither)
    scales = scales_of(packed, values.shape[1], bits)
    errors = (rounded(values, bits, dither).double() - values.double()).abs()
    # A scale is 0 where it would be subnormal: below are values of less than the smallest normal scale's largest code.
    most = torch.where(scales > 0, scales * (0.5 if dither is None else 1.0), 2.0**-126 * LARGEST_CODES[bits])
    # The largest scale is rounded down to a bfloat16.
    limited = (values.double().abs() - scales * LARGEST_CODES[bits]).clamp(min=0) * (scales > 0)
    assert bool((errors <= most * (1 + 2**-7) + limited).all())
    assert bool((limited <= values.double().abs() * 2**-7).all())


@every_width
@some_examples
@given(segments(), dithers())
def test_codes_stand_for_finite_values_and_zero_stays_zero(bits: int, values: Tensor, dither: int | None) -> None:
    assert bool(rounded(values, bits, dither).isfinite().all())
    assert bool((rounded(values, bits)[values == 0] == 0).all())


@every_width
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_stay_finite_and_near(bits: int, sign: int) -> None:
    values = torch.full((1, 300), sign * LARGEST)
    got = rounded(values, bits)
    assert bool(got.isfinite().all()) and bool(((got - values).abs() <= LARGEST * 2**-7).all())


@some_examples
@given(segments())
def test_what_codes_of_4_bits_stand_for_is_its_own_code(values: Tensor) -> None:
    """So an owner that rounds a sum of one addend rounds nothing off.

    Not with more bits: rounded up to a bfloat16, a scale may leave the largest codes unused, and another one follows.
    """
    once = rounded(values, 4)
    assert same_bits(rounded(once, 4), once)


@every_width
@some_examples
@given(st.data(), st.integers(0, 100))
def test_multiples_of_a_scale_are_exact_where_the_largest_code_is_used(bits: int, data: st.DataObject, at: int) -> None:
    most = LARGEST_CODES[bits]
    codes = np.array(data.draw(st.lists(st.integers(-most, most), min_size=1, max_size=CHUNKS[bits])), dtype=np.float32)
    codes[at % len(codes)] = most
    scale = np.float32(data.draw(st.integers(128, 255)) * 2.0 ** data.draw(st.integers(-133, 90)))
    values = torch.from_numpy(codes * scale).view(1, -1)
    assert torch.equal(rounded(values, bits), values)


@every_width
def test_zero_stays_zero_with_any_dither(bits: int) -> None:
    """What is added is at least -0.5, which is rounded to 0, the even one."""
    values = torch.zeros(1, 1000)
    values[0, ::2] = 1.0
    for dither in range(50):
        assert not rounded(values, bits, dither)[0, 1::2].any()


@every_width
@pytest.mark.parametrize("size", [1e-30, 1.0, LARGEST])
def test_stochastic_rounding_is_unbiased(bits: int, size: float) -> None:
    """For each of 100 values; and the variance over dithers is at most a quarter of the squared scale."""
    values = (torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (1, 100))) * size * 0.9).float()
    scales = scales_of(reference.quantize(values, bits), 100, bits)[0].numpy()
    dithers = np.random.default_rng(2).integers(0, 2**32, 4000)
    got = np.stack([rounded(values, bits, int(dither))[0].double().numpy() for dither in dithers])
    units = (got - values[0].double().numpy()) / scales
    spread = units.std(axis=0)
    # A value near a whole code is rarely rounded the other way: then the spread that is seen may be too small.
    share = np.abs(values[0].double().numpy() / scales % 1.0)
    true_spread = np.sqrt(share * (1 - share))
    assert (np.abs(units.mean(axis=0)) <= Z * true_spread / np.sqrt(len(dithers)) + 1e-3 * 2.0 ** (bits - 16)).all()
    assert (spread**2 <= 0.25 + 1e-9).all()
    assert np.allclose(spread, true_spread, atol=0.04)


def test_dithers_of_different_places_and_numbers_are_not_alike() -> None:
    """Values of a chunk, and the same values of two ranks, err independently: their errors do not add up."""
    place = np.arange(20_000, dtype=np.uint32)
    one, other = (reference.dither_at(place, dither).astype(np.float64) for dither in (12345, 12346))
    limit = Z / np.sqrt(len(place))
    assert abs(np.corrcoef(one, other)[0, 1]) < limit
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < limit
    assert abs(one.mean()) < limit * np.sqrt(1 / 12) and one.min() >= -0.5 and one.max() < 0.5
