"""Percentiles: equal to numpy's, whatever the blocks; mirrored when the voxels are negated."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tomocpt_stream.errors import SourceError
from tomocpt_stream.percentiles import (
    Selection,
    count_lower,
    count_upper,
    exact_percentiles,
    pack,
    unpack,
)

Floats = npt.NDArray[np.float32]

finite = st.floats(-(2.0**100), 2.0**100, width=32)
few_values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.0000001192092896, 3.0, 1e-42, -1e-42])
voxels = hnp.arrays(np.float32, st.integers(1, 300), elements=st.one_of(finite, few_values))


@settings(deadline=None, max_examples=200)
@given(values=voxels)
def test_percentiles_are_those_of_numpy(values: Floats) -> None:
    p5, p50, p95 = exact_percentiles(lambda: [values])
    wanted = np.percentile(values.astype(np.float64), [5, 50, 95])
    np.testing.assert_allclose([p5, p50, p95], wanted, rtol=1e-12, atol=1e-6 * (wanted[2] - wanted[0]))
    assert all(type(value) is float for value in (p5, p50, p95))


@settings(deadline=None, max_examples=100)
@given(values=voxels, seed=st.integers(0, 99), parts=st.integers(1, 6))
def test_blocks_and_their_order_do_not_matter(values: Floats, seed: int, parts: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(values)
    blocks = [np.zeros(0, np.float32), *(block[::-1] for block in np.array_split(shuffled, parts))]
    assert exact_percentiles(lambda: iter(blocks)) == exact_percentiles(lambda: [values])


@settings(deadline=None, max_examples=100)
@given(values=voxels, seed=st.integers(0, 99), parts=st.integers(1, 6))
def test_counts_of_parts_add_up_wherever_they_were_counted(values: Floats, seed: int, parts: int) -> None:
    shuffled = np.array_split(np.random.default_rng(seed).permutation(values), parts)
    upper = sum(unpack(pack(count_upper([part])))[0] for part in shuffled)
    selection = Selection(np.asarray(upper))
    lower = sum(unpack(pack(count_lower([part], selection.bins))) for part in shuffled)
    found = selection.values(np.asarray(lower))
    assert found == exact_percentiles(lambda: [values])
    assert selection.total == len(values)
    for percent, value in zip((0, 100), exact_percentiles(lambda: [values], (0, 100)), strict=True):
        ends = Selection(count_upper([values]), (percent,))  # of these percentiles each is a voxel's value
        share = ends.share(value, count_lower([values], ends.bins))
        assert share == np.count_nonzero(values == np.float32(value)) / len(values)


def test_packed_counts_are_small_and_whole() -> None:
    values = np.random.default_rng(0).normal(0.0, 30.0, 1 << 22).astype(np.float32)
    upper = count_upper([values])
    lower = count_lower([values], Selection(upper).bins)
    assert len(pack(upper)) < 10_000
    assert len(pack(lower)) < 50_000
    for counts in (upper, lower, upper * 1_000_000_000, np.zeros(65536, np.int64)):
        np.testing.assert_array_equal(unpack(pack(counts)), np.atleast_2d(counts))


@settings(deadline=None, max_examples=100)
@given(values=voxels)
def test_negated_voxels_have_the_mirrored_percentiles(values: Floats) -> None:
    p5, p50, p95 = exact_percentiles(lambda: [values])
    assert exact_percentiles(lambda: [-values]) == (-p95, -p50, -p5)


def test_any_whole_percentage_may_be_asked_for() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 1234).astype(np.float32)
    wanted = np.percentile(values.astype(np.float64), range(101))
    np.testing.assert_allclose(exact_percentiles(lambda: [values], range(101)), wanted, atol=1e-12)


def test_a_zero_is_a_plus_zero() -> None:
    found = exact_percentiles(lambda: [np.array([-0.0, 0.0, -0.0], np.float32)])
    assert [np.signbit(value) for value in found] == [False, False, False]


def test_memory_does_not_grow_with_the_block() -> None:
    values = np.random.default_rng(0).normal(0.0, 1.0, 1 << 22).astype(np.float32)
    tracemalloc.start()
    found = exact_percentiles(lambda: [values, values])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20
    wanted = np.percentile(np.concatenate([values, values]).astype(np.float64), [5, 50, 95])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_not_finite_is_an_error(broken: float) -> None:
    values = np.array([1.0, broken, 2.0], np.float32)
    with pytest.raises(SourceError, match="1 of 3 voxels are NaN or infinite"):
        exact_percentiles(lambda: [values])


def test_no_voxel_at_all_is_an_error() -> None:
    with pytest.raises(SourceError, match="no voxel"):
        exact_percentiles(lambda: [np.zeros(0, np.float32)])
