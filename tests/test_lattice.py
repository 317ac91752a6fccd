from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomocpt_stream.errors import PlanError
from tomocpt_stream.lattice import NEIGHBOURHOOD, Window, axis_task, box_of, reflect, spans_of

WINDOWS = st.sampled_from(
    [Window(), Window((32, 32, 32), (4, 4, 4)), Window((16, 24, 32), (2, 4, 8)), Window((9, 8, 7), (1, 0, 3))]
)
STITCHES = st.sampled_from(["crop", "hann", "gaussian"])


@given(st.tuples(*[st.integers(1, 200)] * 3), WINDOWS)
def test_every_voxel_has_one_owner_and_is_seen(shape: Any, window: Any) -> None:
    for axis, length in enumerate(shape):
        stride, halo = window.stride[axis], window.halo[axis]
        count = window.lattice(shape)[axis]
        owners = np.zeros(length, dtype=int)
        for k in range(count):
            start, stop = window.span(axis, k)
            assert (start, stop - start) == (k * stride - halo, window.shape[axis])
            owners[k * stride : (k + 1) * stride] += 1
        assert (owners == 1).all()


@given(st.integers(1, 200), WINDOWS, STITCHES, st.integers(0, 2), st.data())
def test_a_task_scores_what_contributes_and_knows_what_only_it_scores(
    length: Any, window: Any, stitch: Any, axis: Any, data: Any
) -> None:
    start = data.draw(st.integers(0, length - 1))
    write = (start, data.draw(st.integers(start + 1, length)))
    task = axis_task(length, write, window, axis, stitch)
    first, last = task.windows
    count, stride = window.lattice((length,) * 3)[axis], window.stride[axis]
    assert task.write == write
    assert 0 <= first < last <= count
    alone = set(range(max(0, write[0] - NEIGHBOURHOOD), min(length, write[1] + NEIGHBOURHOOD)))
    for k in range(count):
        reach = (k * stride, (k + 1) * stride) if stitch == "crop" else window.span(axis, k)
        contributes = reach[0] < write[1] and reach[1] > write[0]
        assert contributes == (first <= k < last)
        if not contributes:
            alone -= set(range(*reach))
    assert set(range(*task.known)) == alone
    seen = reflect(window.span(axis, first)[0], window.span(axis, last - 1)[1], length)
    assert task.read == (seen.min(), seen.max() + 1)


@given(st.integers(-300, 300), st.integers(1, 200), st.integers(1, 90))
def test_reflection_is_numpys(start: Any, count: Any, length: Any) -> None:
    axis = np.arange(length)
    pad = 700
    mode: Any = "reflect" if length > 1 else "edge"
    expected = np.pad(axis, pad, mode=mode)[pad + start : pad + start + count]
    np.testing.assert_array_equal(reflect(start, start + count, length), expected)


def test_boxes_are_spans_as_slices() -> None:
    box = box_of(((1, 4), (0, 2), (5, 9)))
    assert box == (slice(1, 4), slice(0, 2), slice(5, 9))
    assert spans_of(box) == ((1, 4), (0, 2), (5, 9))


@pytest.mark.parametrize(
    ("shape", "halo"),
    [
        ((16, 16, 16), (8, 8, 8)),
        ((16, 16), (1, 1)),
        ((9, 9, 9), (-1, 0, 0)),
        ((9, 9, 9), 1),
        (("a", 9, 9), (1, 1, 1)),
    ],
)
def test_wrong_windows_are_refused(shape: Any, halo: Any) -> None:
    with pytest.raises(PlanError, match="halo"):
        Window(shape, halo)
