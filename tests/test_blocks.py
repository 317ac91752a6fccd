from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuts import budget
from tomocpt_stream.blocks import (
    DEFAULT_BUFFERS,
    BlockPlan,
    Window,
    held_planes,
    parse_memory,
    plan_blocks,
    reflect,
    spans_of,
)
from tomocpt_stream.errors import PlanError

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
WINDOWS = st.sampled_from(
    [Window(), Window((32, 32, 32), (4, 4, 4)), Window((16, 24, 32), (2, 4, 8)), Window((9, 8, 7), (1, 0, 3))]
)
STITCHES = st.sampled_from(["crop", "hann", "gaussian"])


@given(SHAPES, WINDOWS)
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


@settings(deadline=None, max_examples=60)
@given(SHAPES, WINDOWS, STITCHES, st.integers(5, 60), st.sampled_from([0.0, 0.3, 1.0]))
def test_write_boxes_partition_the_map_in_whole_chunks(
    shape: Any, window: Any, stitch: Any, chunk: Any, share: Any
) -> None:
    memory = budget(shape, window, share, stitch=stitch, chunk=chunk)
    plan = plan_blocks(shape, window, stitch=stitch, memory=memory, chunk=chunk)
    written = np.zeros(shape, dtype=np.uint8)
    for task in plan.tasks:
        written[task.write] += 1
        for spans, length in zip(task.write_spans, shape, strict=True):
            assert spans[0] % chunk == 0
            assert spans[1] % chunk == 0 or spans[1] == length
        boxes = [box for _, box in plan.chunks_of(task.write_spans)]
        assert sum(math.prod(s.stop - s.start for s in box) for box in boxes) == written[task.write].size
    assert (written == 1).all()
    keys = [key for task in plan.tasks for key, _ in plan.chunks_of(task.write_spans)]
    assert len(keys) == len(set(keys))
    assert plan.windows == sum(len(task.windows) for task in plan.tasks)


@settings(deadline=None, max_examples=60)
@given(SHAPES, WINDOWS, STITCHES, st.integers(5, 60))
def test_tasks_score_all_that_contributes_and_read_all_it_sees(
    shape: Any, window: Any, stitch: Any, chunk: Any
) -> None:
    tight = budget(shape, window, 0.0, stitch=stitch, chunk=chunk)
    plan = plan_blocks(shape, window, stitch=stitch, memory=tight, chunk=chunk)
    for task in plan.tasks[:5]:
        for axis, length in enumerate(shape):
            first, last = task.window_spans[axis]
            write, known, read = (
                spans[axis] for spans in (task.write_spans, task.known_spans, task.read_spans)
            )
            for k in range(window.lattice(shape)[axis]):
                stride = window.stride[axis]
                reach = (k * stride, (k + 1) * stride) if stitch == "crop" else window.span(axis, k)
                if reach[0] < write[1] and reach[1] > write[0]:
                    assert first <= k < last
                elif not first <= k < last:  # a window that is not scored has no say in known voxels
                    assert reach[1] <= known[0] or reach[0] >= known[1]
            assert known[0] <= write[0] < write[1] <= known[1]
            seen = reflect(window.span(axis, first)[0], window.span(axis, last - 1)[1], length)
            assert (seen.min(), seen.max() + 1) == read


@given(st.integers(-300, 300), st.integers(1, 200), st.integers(1, 90))
def test_reflection_is_numpys(start: Any, count: Any, length: Any) -> None:
    axis = np.arange(length)
    pad = 700
    mode: Any = "reflect" if length > 1 else "edge"
    expected = np.pad(axis, pad, mode=mode)[pad + start : pad + start + count]
    np.testing.assert_array_equal(reflect(start, start + count, length), expected)


def test_default_chunk_follows_from_the_window_alone() -> None:
    small = plan_blocks((96, 256, 256), Window(), stitch="hann", memory="180 MB")
    large = plan_blocks((96, 256, 256), Window(), stitch="hann")
    assert small.chunk == large.chunk == (96, 96, 96)
    assert len(small.tasks) > len(large.tasks) == 1
    assert plan_blocks((50, 60, 70), Window((32, 32, 32), (4, 4, 4))).chunk == (96, 96, 96)
    assert plan_blocks((50, 60, 70), Window((40, 40, 40), (5, 5, 5))).chunk == (120, 120, 120)


def test_a_budget_is_kept_or_refused_with_its_numbers() -> None:
    for memory in ("220 MB", "300 MB", "0.5 GB", "2 GB"):
        plan = plan_blocks((512, 1024, 1024), Window(), stitch="hann", memory=memory)
        assert plan.projected_bytes <= parse_memory(memory)
    with pytest.raises(PlanError, match=r"\d+\.\d MB.*budget of 20\.0 MB") as caught:
        plan_blocks((96, 256, 256), Window(), memory="20 MB")
    assert "lower the batch size" in caught.value.remedy


def test_more_memory_never_scores_more_windows() -> None:
    budgets = ["220 MB", "300 MB", "500 MB", "2 GB", "20 GB"]
    windows = [plan_blocks((300, 700, 900), Window(), stitch="hann", memory=m).windows for m in budgets]
    assert windows == sorted(windows, reverse=True)
    assert windows[-1] == math.prod(Window().lattice((300, 700, 900)))


def test_the_networks_bytes_are_part_of_the_projection() -> None:
    bare = plan_blocks((96, 256, 256), Window())
    net = plan_blocks((96, 256, 256), Window(), bytes_per_window=300_000_000, batch_size=4)
    assert net.projected_bytes == bare.projected_bytes + 1_200_000_000
    assert net.group == bare.group  # the default budget is beside the network's own bytes
    with pytest.raises(PlanError, match="for 4 windows of the network"):
        plan_blocks((96, 256, 256), Window(), bytes_per_window=300_000_000, memory="1 GB")


def test_memory_of_a_task_does_not_grow_with_depth() -> None:
    shallow = plan_blocks((300, 800, 800), Window(), stitch="hann", memory="1 GB")
    deep = plan_blocks((3000, 800, 800), Window(), stitch="hann", memory="1 GB")
    assert deep.projected_bytes == shallow.projected_bytes
    assert deep.group[1:] == shallow.group[1:]
    assert held_planes(deep) == 96 + 16 + 64


def test_passes_per_voxel() -> None:
    plan = plan_blocks((96, 96, 96), Window(), stitch="crop")
    assert plan.windows == 8
    assert plan.passes_per_voxel == pytest.approx(8 * 64**3 / 96**3)
    assert plan_blocks((96, 96, 96), Window(), tta=True).passes_per_voxel == pytest.approx(
        4 * plan.passes_per_voxel
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5 GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("2 GiB", 2**31),
        ("12", 12),
        (7, 7),
        (" .5 kB", 500),
    ],
)
def test_memory_strings(text: Any, expected: Any) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "1.5 XB", "-3 GB", "0 MB", "1 GB 2", -1, 0])
def test_wrong_memory_is_refused(text: Any) -> None:
    with pytest.raises(PlanError, match="memory budget"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 5, 5)}, "shape"),
        ({"shape": (5, 5)}, "shape"),
        ({"stitch": "mean"}, "stitch 'mean'"),
        ({"batch_size": 0}, "batch of 0"),
        ({"chunk": -2}, "chunk of -2"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: Any) -> None:
    shape = arguments.pop("shape", (50, 50, 50))
    with pytest.raises(PlanError, match=message):
        plan_blocks(shape, Window(), **arguments)


@pytest.mark.parametrize(
    ("shape", "halo"), [((16, 16, 16), (8, 8, 8)), ((16, 16), (1, 1)), ((9, 9, 9), (-1, 0, 0))]
)
def test_wrong_windows_are_refused(shape: Any, halo: Any) -> None:
    with pytest.raises(PlanError, match="halo"):
        Window(shape, halo)


def test_a_task_is_small_and_its_boxes_are_slices() -> None:
    plan: BlockPlan = plan_blocks((512, 1024, 1024), Window(), stitch="hann", memory="200 MB")
    task = plan.tasks[3]
    assert spans_of(task.write) == task.write_spans
    assert task.read[1].start <= task.known[1].start <= task.write[1].start
    assert DEFAULT_BUFFERS < 1e9
