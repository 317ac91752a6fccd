from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cuts import budget
from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.stitch import Stitcher, axis_weights

WINDOW = Window((16, 16, 16), (3, 3, 3))


@given(st.integers(1, 90), st.sampled_from(["crop", "hann", "gaussian"]))
def test_weights_sum_to_one_over_every_voxel(length: Any, stitch: Any) -> None:
    weights = axis_weights(length, WINDOW, 0, stitch)
    total = np.zeros(length)
    for k, row in enumerate(weights):
        start = WINDOW.span(0, k)[0]
        for i, weight in enumerate(row):
            if 0 <= start + i < length:
                total[start + i] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-12)
    assert (weights >= 0).all()


def test_hann_is_the_bell_without_its_zero_ends() -> None:
    row = axis_weights(10, WINDOW, 0, "hann")[0]
    np.testing.assert_allclose(row[3:13], 1.0)  # a single window has all the weight inside
    three = axis_weights(30, WINDOW, 0, "hann")
    bell = np.sin(np.pi * np.arange(1, 17) / 17) ** 2
    np.testing.assert_allclose(three[1][10:16] / three[2][0:6], bell[10:16] / bell[0:6])


def _run(shape: Any, stitch: Any, memory: Any, chunk: int, left_out: Any = (), seed: int = 0) -> Any:
    """Stitch random windows (the same for the same lattice index) by every task of a plan."""
    plan = plan_blocks(shape, WINDOW, stitch=stitch, memory=memory, chunk=chunk)
    result = np.full(shape, np.nan, dtype=np.float32)
    scored = np.zeros(shape, dtype=bool)
    for task in plan.tasks:
        stitcher = Stitcher(plan, task)
        layers = list(range(*task.write_spans[0], plan.chunk[0]))
        for row in range(*task.window_spans[0]):
            for y in range(*task.window_spans[1]):
                for x in range(*task.window_spans[2]):
                    index = (row, y, x)
                    if index in left_out:
                        stitcher.skip(index)
                    else:
                        key = [seed, *index]
                        stitcher.add(
                            index, np.random.default_rng(key).normal(size=WINDOW.shape).astype(np.float32)
                        )
            while layers and min(layers[0] + plan.chunk[0], shape[0]) <= stitcher.complete(row):
                start = layers.pop(0)
                z = (start, min(start + plan.chunk[0], shape[0]))
                (_, (y0, y1), (x0, x1)), known = task.write_spans, task.known_spans
                planes = stitcher.planes(z, row)
                part = planes[:, y0 - known[1][0] : y1 - known[1][0], x0 - known[2][0] : x1 - known[2][0]]
                result[z[0] : z[1], y0:y1, x0:x1] = part
                scored[z[0] : z[1], y0:y1, x0:x1] = stitcher.scored((z, (y0, y1), (x0, x1)))
                stitcher.release(z[1])
    return plan, result, scored


def _dense(shape: Any, stitch: Any, left_out: Any = (), seed: int = 0) -> Any:
    """The definition, voxel by voxel, in float64: the weighted mean of the windows that were scored."""
    weights = [axis_weights(n, WINDOW, axis, stitch) for axis, n in enumerate(shape)]
    total, weight = np.zeros(shape), np.zeros(shape)
    for index in np.ndindex(*WINDOW.lattice(shape)):
        if index in left_out:
            continue
        scores = np.random.default_rng([seed, *index]).normal(size=WINDOW.shape).astype(np.float32)
        product = np.einsum("i,j,k->ijk", *(weights[axis][k] for axis, k in enumerate(index)))
        place, part = [], []
        for axis, k in enumerate(index):
            start, stop = WINDOW.span(axis, k)
            place.append(slice(max(0, start), min(stop, shape[axis])))
            part.append(slice(max(0, start) - start, min(stop, shape[axis]) - start))
        total[tuple(place)] += (product * scores)[tuple(part)]
        weight[tuple(place)] += product[tuple(part)]
    return np.divide(total, weight, out=np.zeros(shape), where=weight > 0), weight > 0


LEFT_OUT = {(0, 0, 0), (1, 1, 1), (1, 1, 2), (2, 0, 1), (2, 0, 0), (2, 1, 0), (2, 1, 1)}


@pytest.mark.parametrize("stitch", ["crop", "hann", "gaussian"])
@pytest.mark.parametrize("left_out", [(), LEFT_OUT])
def test_streamed_stitching_is_the_weighted_mean_of_the_definition(stitch: Any, left_out: Any) -> None:
    shape = (37, 30, 41)
    expected, seen = _dense(shape, stitch, left_out)
    _, result, scored = _run(shape, stitch, None, 10, left_out)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    np.testing.assert_array_equal(scored, seen)
    assert (result[~seen] == 0).all()


@pytest.mark.parametrize("stitch", ["crop", "hann", "gaussian"])
@pytest.mark.parametrize("left_out", [(), LEFT_OUT])
def test_stitching_does_not_depend_on_the_grouping(stitch: Any, left_out: Any) -> None:
    shape = (37, 30, 41)
    whole = _run(shape, stitch, None, 10, left_out)
    parts = _run(shape, stitch, budget(shape, WINDOW, 0.0, stitch=stitch, chunk=10), 10, left_out)
    other = _run(shape, stitch, None, 7, left_out)
    assert len(parts[0].tasks) > len(whole[0].tasks)
    assert whole[1].tobytes() == parts[1].tobytes() == other[1].tobytes()
    np.testing.assert_array_equal(whole[2], parts[2])


def test_moving_up_copies_no_plane_twice() -> None:
    plan = plan_blocks((400, 150, 150), Window((16, 16, 16), (3, 3, 3)), stitch="hann", memory=10**12)
    stitcher = Stitcher(plan, plan.tasks[0])
    held = stitcher._planes
    held[:] = np.arange(len(held), dtype=np.float32)[:, None, None]
    tracemalloc.start()
    try:
        stitcher.release(5)
        stitcher.release(90)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < held[:8].nbytes
    assert held[:, 3, 7].tolist() == [*range(90, len(held)), *[0] * 90]
