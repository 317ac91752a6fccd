"""The resampler: blocks equal the whole, ramps stay ramps, noise stays even."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from tomocpt_stream.frame import RULES, Grid, Rule, working_grid
from tomocpt_stream.resample import axis_taps, resample_box, resample_bytes, resample_mask, source_box

if TYPE_CHECKING:
    from tomocpt_stream.frame import Box, Shape

VOXEL_SIZE = 10.0
ratios = st.one_of(st.floats(0.3, 4.0), st.sampled_from([0.5, 0.95, 1.0, 1.1, 1.45, 2.0, 3.0]))


def whole(shape: Shape) -> Box:
    return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])


def resample(source: npt.NDArray[np.float32], grid: Grid, rule: Rule = "bspline") -> npt.NDArray[np.float32]:
    shape = (source.shape[0], source.shape[1], source.shape[2])
    return resample_box(lambda box: source[box], grid, shape, whole(grid.shape), rule)


def dense(scale: float, length: int, working: int) -> npt.NDArray[np.float64]:
    """The kernel of the design as a matrix, from scipy's B-spline."""
    centre = (np.arange(working) + 0.5) * scale - 0.5
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    weight = np.nan_to_num(spline((np.arange(length) - centre[:, None]) / max(1.0, scale)))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Grid, Box, Rule]:
    """A source, a working grid and a box of it."""
    shape = draw(st.tuples(*[st.integers(1, 24)] * 3))
    rule = draw(st.sampled_from(RULES))
    grid = working_grid(shape, VOXEL_SIZE, VOXEL_SIZE * draw(ratios), rule)
    starts = [draw(st.integers(0, n - 1)) for n in grid.shape]
    z, y, x = (
        slice(start, draw(st.integers(start + 1, n))) for start, n in zip(starts, grid.shape, strict=True)
    )
    source = np.random.default_rng(draw(st.integers(0, 99))).normal(3.0, 10.0, shape).astype(np.float32)
    return source, grid, (z, y, x), rule


@settings(deadline=None, max_examples=200)
@given(cases())
def test_a_block_is_bitwise_the_same_voxels_of_the_whole(case: tuple[Any, Grid, Box, Rule]) -> None:
    source, grid, box, rule = case
    asked: list[Box] = []

    def read(wanted: Box) -> npt.NDArray[np.float32]:
        asked.append(wanted)
        return np.ascontiguousarray(source[wanted])

    block = resample_box(read, grid, source.shape, box, rule)
    assert asked == [source_box(grid, source.shape, box, rule)]
    assert block.dtype == np.float32
    assert block.tobytes() == resample(source, grid, rule)[box].tobytes()


@settings(deadline=None, max_examples=50)
@given(cases())
def test_negated_voxels_give_negated_voxels(case: tuple[Any, Grid, Box, Rule]) -> None:
    source, grid, _, rule = case
    np.testing.assert_array_equal(resample(-source, grid, rule), -resample(source, grid, rule))


@settings(deadline=None, max_examples=50)
@given(cases())
def test_a_constant_stays_constant(case: tuple[Any, Grid, Box, Rule]) -> None:
    source, grid, _, rule = case
    source[:] = -7.25
    np.testing.assert_allclose(resample(source, grid, rule), -7.25, rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_a_mask_keeps_what_is_made_of_masked_voxels_alone(case: tuple[Any, Grid, Box, Rule]) -> None:
    source, grid, box, rule = case
    mask = source > -5.0
    block = resample_mask(lambda wanted: mask[wanted], grid, source.shape, box, rule)
    # What every tap of non-zero weight is made of, the long way round: no voxel outside contributes.
    outside = (~mask).astype(np.float64)
    for axis in range(3):
        if not grid.is_identity:
            taps = axis_taps(grid.scale[axis], source.shape[axis], slice(0, grid.shape[axis]), rule)
            touched = np.zeros((grid.shape[axis], source.shape[axis]))
            for tap in range(taps.index.shape[1]):
                np.add.at(touched, (np.arange(len(touched)), taps.index[:, tap]), taps.weight[:, tap] > 0)
            outside = np.moveaxis(np.tensordot(touched, outside, (1, axis)), 0, axis)
    np.testing.assert_array_equal(block, (outside == 0)[box])


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(*[st.integers(1, 20)] * 3), ratio=ratios, seed=st.integers(0, 99))
def test_voxels_are_those_of_the_dense_b_spline(shape: Shape, ratio: float, seed: int) -> None:
    grid = working_grid(shape, VOXEL_SIZE, VOXEL_SIZE * ratio)
    source = np.random.default_rng(seed).normal(0.0, 1.0, shape).astype(np.float32)
    if grid.is_identity:
        assert resample(source, grid).tobytes() == source.tobytes()
        return
    z, y, x = (dense(grid.scale[a], shape[a], grid.shape[a]) for a in range(3))
    wanted = np.einsum("ai,bj,ck,ijk->abc", z, y, x, source.astype(np.float64), optimize=True)
    np.testing.assert_allclose(resample(source, grid), wanted, atol=2e-6)


def test_the_identity_gives_the_voxels_as_they_are() -> None:
    source = np.array([[[0.0, -0.0, 1.5]]], np.float32)
    assert resample(source, working_grid((1, 1, 3), 7.3, 7.3)).tobytes() == source.tobytes()


def test_the_tomocpt_rule_is_torch_interpolation() -> None:
    from torch import from_numpy
    from torch.nn.functional import interpolate

    for shape, ratio in [((20, 31, 17), 1.37), ((9, 12, 40), 0.61), ((5, 8, 13), 3.9)]:
        grid = working_grid(shape, VOXEL_SIZE, VOXEL_SIZE * ratio, "tomocpt")
        source = np.random.default_rng(1).normal(0.0, 1.0, shape).astype(np.float32)
        peer = interpolate(
            from_numpy(source)[None, None], size=grid.shape, mode="trilinear", align_corners=False
        )
        np.testing.assert_allclose(resample(source, grid, "tomocpt"), peer[0, 0].numpy(), atol=3e-5)


@settings(deadline=None, max_examples=60)
@given(ratio=st.floats(0.4, 4.0), axis=st.integers(0, 2))
def test_a_ramp_stays_a_ramp(ratio: float, axis: int) -> None:
    shape = [3, 3, 3]
    shape[axis] = 50
    source_shape = (shape[0], shape[1], shape[2])
    ramp = np.arange(50, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    grid = working_grid(source_shape, VOXEL_SIZE, VOXEL_SIZE * ratio)
    working = np.moveaxis(resample(np.ascontiguousarray(np.broadcast_to(ramp, source_shape)), grid), axis, 0)
    points = np.zeros((grid.shape[axis], 3))
    points[:, axis] = np.arange(grid.shape[axis])
    at = grid.to_source(points)[:, axis]
    off = np.abs(working - at[:, None, None]).max(axis=(1, 2))
    scale = max(1.0, ratio)
    inside = (at >= 2 * scale) & (at <= 49 - 2 * scale)
    assert inside.any()
    assert off[inside].max() <= 0.15
    # At the faces the kernel is one-sided and draws inwards, as the module's docstring says; a last
    # working voxel that hangs over the far face can show no more than what is there.
    off = np.abs(working - at.clip(0, 49)[:, None, None]).max(axis=(1, 2))
    assert off.max() <= 0.4 * scale
    assert off[at < 25].max() <= 0.21 * scale


@pytest.mark.parametrize("ratio", [0.95, 1.1, 1.45])
def test_noise_keeps_its_local_deviation(ratio: float) -> None:
    source = np.random.default_rng(7).normal(0.0, 1.0, (96, 96, 96)).astype(np.float32)
    working = resample(source, working_grid((96, 96, 96), VOXEL_SIZE, VOXEL_SIZE * ratio))[4:-4, 4:-4, 4:-4]
    deviation = float(working.std())
    for axis in range(3):
        planes = np.moveaxis(working, axis, 0).reshape(working.shape[axis], -1).std(axis=1)
        assert np.abs(planes / deviation - 1).max() < 0.15
    edge = 12
    count = working.shape[0] // edge
    blocks = working[: count * edge, : count * edge, : count * edge].reshape((count, edge) * 3)
    local = blocks.std(axis=(1, 3, 5))
    assert np.abs(local / deviation - 1).max() < 0.15


def test_a_linear_kernel_would_fail_the_noise_test() -> None:
    source = np.random.default_rng(7).normal(0.0, 1.0, (96, 96, 96)).astype(np.float32)
    grid = working_grid((96, 96, 96), VOXEL_SIZE, VOXEL_SIZE * 1.1, "tomocpt")
    working = resample(source, grid, "tomocpt")[4:-4, 4:-4, 4:-4]
    planes = working.reshape(len(working), -1).std(axis=1)
    assert np.abs(planes / working.std() - 1).max() > 0.15


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.45, 3.0])
def test_memory_is_what_resample_bytes_says(ratio: float) -> None:
    shape = (60, 70, 80)
    grid = working_grid(shape, VOXEL_SIZE, VOXEL_SIZE * ratio)
    box = (slice(2, 18), slice(0, 20), slice(1, 22))
    resample_box(lambda wanted: np.ones([s.stop - s.start for s in wanted], np.float32), grid, shape, box)
    tracemalloc.start()
    resample_box(lambda wanted: np.ones([s.stop - s.start for s in wanted], np.float32), grid, shape, box)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    projected = resample_bytes(grid, shape, box)
    assert 0.7 * projected < peak <= projected + 20_000
