from __future__ import annotations

import math
import pickle
import tracemalloc
from dataclasses import replace
from itertools import islice, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.cuts import budget, plans
from tomocpt_stream.blocks import (
    CACHED_WEIGHTS,
    DEFAULT_BUFFERS,
    NEIGHBOURHOOD,
    BlockPlan,
    Task,
    Window,
    held_planes,
    parse_memory,
    plan_blocks,
    spans_of,
)
from tomocpt_stream.errors import PlanError
from tomocpt_stream.lattice import axis_task
from tomocpt_stream.schedule import AS_GOOD, end

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
WINDOWS = st.sampled_from(
    [Window(), Window((32, 32, 32), (4, 4, 4)), Window((16, 24, 32), (2, 4, 8)), Window((9, 8, 7), (1, 0, 3))]
)
STITCHES = st.sampled_from(["crop", "hann", "gaussian"])


CUTS = ("whole", "columns", "layers", "bricks", "chunks", "planned")


def _plan(shape: Any, window: Any, stitch: Any, chunk: int, share: float, workers: int) -> BlockPlan:
    memory = budget(shape, window, share, stitch=stitch, chunk=chunk)
    plan = plan_blocks(shape, window, stitch=stitch, memory=memory, chunk=chunk, workers=workers)
    assert plan.projected_bytes <= memory
    assert workers > 1 or plan.group[0] == -(-shape[0] // chunk)
    return plan


@settings(deadline=None, max_examples=100)
@given(
    shape=SHAPES,
    window=WINDOWS,
    stitch=STITCHES,
    chunk=st.integers(5, 60),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    workers=st.integers(1, 40),
    cut=st.sampled_from(CUTS),
)
def test_write_boxes_partition_the_map_in_whole_chunks(
    shape: Any, window: Any, stitch: Any, chunk: Any, share: Any, workers: Any, cut: Any
) -> None:
    plan = _plan(shape, window, stitch, chunk, share, workers)
    plan = {"planned": plan, **plans(shape, window, stitch=stitch, chunk=chunk)}[cut]
    assume(len(plan.tasks) < 3000)
    written = np.zeros(shape, dtype=np.uint8)
    windows = 0
    corners = [tuple(start for start, _ in task.write_spans) for task in plan.tasks]
    assert corners == sorted(corners)
    for index, task in enumerate(plan.tasks):
        assert task.index == index
        written[task.write] += 1
        for spans, length in zip(task.write_spans, shape, strict=True):
            assert spans[0] % chunk == 0
            assert spans[1] % chunk == 0 or spans[1] == length
        boxes = [box for _, box in plan.chunks_of(task.write_spans)]
        assert sum(math.prod(s.stop - s.start for s in box) for box in boxes) == written[task.write].size
        assert len(task.windows) == task.window_count
        windows += task.window_count
    assert (written == 1).all()
    keys = [key for task in plan.tasks for key, _ in plan.chunks_of(task.write_spans)]
    assert len(keys) == len(set(keys))
    assert plan.windows == windows


def _axes_of(plan: BlockPlan, task: Task) -> Any:
    spans = (task.write_spans, task.window_spans, task.known_spans, task.read_spans)
    return zip(*spans, strict=True)


@settings(deadline=None, max_examples=100)
@given(
    SHAPES, WINDOWS, STITCHES, st.integers(5, 60), st.integers(1, 40), st.sampled_from(CUTS), st.integers(0)
)
def test_a_task_is_what_follows_from_its_write_box(
    shape: Any, window: Any, stitch: Any, chunk: Any, workers: Any, cut: Any, pick: int
) -> None:
    plan = _plan(shape, window, stitch, chunk, 0.3, workers)
    plan = {"planned": plan, **plans(shape, window, stitch=stitch, chunk=chunk)}[cut]
    task = plan.tasks[pick % len(plan.tasks)]
    for axis, spans in enumerate(_axes_of(plan, task)):
        assert spans == axis_task(shape[axis], spans[0], window, axis, stitch)
    (start, stop), *section = task.write_spans
    layers = [(z, min(z + chunk, stop)) for z in range(start, stop, chunk)]
    some = (layers[pick % len(layers)][0], layers[-1][1])
    left = plan.task_over(task, some)
    assert left.index == task.index
    assert left.write_spans == (some, *section)
    for axis, spans in enumerate(_axes_of(plan, left)):
        assert spans == axis_task(shape[axis], spans[0], window, axis, stitch)
    assert plan.task_over(task, (start, stop)) == task


def _counted(plan: BlockPlan) -> int:
    """The rows and the scores of the tasks at their largest."""
    depth, seen, staged, known = plan.window.shape[0], 0, 0, 0
    for task in plan.tasks:
        _, y, x = (
            (last - first - 1) * stride + size
            for (first, last), stride, size in zip(
                task.window_spans, plan.window.stride, plan.window.shape, strict=True
            )
        )
        seen = max(seen, depth * y * x)
        z, y, x = (stop - start for start, stop in task.read_spans)
        staged = max(staged, min(z, depth) * y * x)
        _, y, x = (stop - start for start, stop in task.known_spans)
        known = max(known, y * x)
    layer = min(plan.shape[0], plan.chunk[0] + 2 * NEIGHBOURHOOD)
    return 6 * seen + 6 * staged + (4 * held_planes(plan) + 5 * layer) * known


@settings(deadline=None, max_examples=60)
@given(SHAPES, WINDOWS, STITCHES, st.integers(5, 60), st.integers(1, 40))
def test_the_projection_counts_the_largest_of_the_tasks(
    shape: Any, window: Any, stitch: Any, chunk: Any, workers: Any
) -> None:
    plan = _plan(shape, window, stitch, chunk, 0.3, workers)
    column = _plan(shape, window, stitch, chunk, 0.0, 1)
    assume(len(plan.tasks) + len(column.tasks) < 3000)
    rest = plan.projected_bytes - _counted(plan)
    assert rest == column.projected_bytes - _counted(column)
    assert rest > 4 * window.voxels * (4 * plan.batch_size + CACHED_WEIGHTS)


# --- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stitch", ["crop", "hann"])
@pytest.mark.parametrize("shape", [(300, 960, 928), (1024, 2048, 2048), (96, 256, 256), (1000, 90, 90)])
def test_more_workers_never_finish_later(shape: Any, stitch: Any) -> None:
    ends = []
    for workers in (1, 2, 3, 4, 8, 16, 64):
        plan = plan_blocks(shape, Window(), stitch=stitch, memory="2 GB", workers=workers)
        assert plan.projected_bytes <= 2e9
        ends.append(end((task.window_count for task in plan.tasks), workers))
    assert all(later <= AS_GOOD * earlier for earlier, later in pairwise(ends))
    assert ends[-1] < ends[0] / 2


def test_crop_shares_the_windows_out_evenly() -> None:
    for workers in (2, 4, 8, 16):
        plan = plan_blocks((512, 1024, 1024), Window(), memory="4 GB", workers=workers)
        assert plan.windows == math.prod(Window().lattice(plan.shape))
        last = end((task.window_count for task in plan.tasks), workers)
        assert plan.windows / (workers * last) > 0.94


def test_one_worker_takes_whole_columns_and_the_fewest_windows() -> None:
    options: Any = {"shape": (700, 500, 600), "window": Window(), "stitch": "hann", "memory": "300 MB"}
    alone = plan_blocks(**options)
    assert alone == plan_blocks(**options, workers=1)
    assert alone.group[0] == 8
    rest = alone.projected_bytes - _counted(alone)
    others = [replace(alone, group=(8, y, x)) for y, x in product(range(1, 7), range(1, 8))]
    cheap = [other for other in others if _counted(other) + rest <= 3e8]
    assert 1 < len(cheap) < len(others)
    least = min(other.windows for other in cheap)
    fewest = min(len(other.tasks) for other in cheap if other.windows == least)
    assert (alone.windows, len(alone.tasks)) == (least, fewest)


def test_several_workers_cut_along_z_too() -> None:
    tower = plan_blocks((2000, 90, 90), Window(), stitch="hann", workers=4)
    assert tower.group == (6, 1, 1)  # 21 layers of chunks: 6, 6, 6 and 3
    assert [task.write_spans[0] for task in tower.tasks] == [
        (0, 576),
        (576, 1152),
        (1152, 1728),
        (1728, 2000),
    ]
    flat = plan_blocks((90, 2000, 90), Window(), stitch="hann", workers=4)
    assert flat.windows == tower.windows


@pytest.mark.parametrize("stitch", ["crop", "hann"])
def test_a_small_volume_stays_one_task(stitch: Any) -> None:
    # One chunk, or a second chunk whose windows the first needs too.
    for shape in ((90, 90, 90), (64, 96, 100), (96, 96, 120)):
        plan = plan_blocks(shape, Window(), stitch="hann", workers=8)
        assert len(plan.tasks) == 1
    assert len(plan_blocks((90, 90, 300), Window(), stitch="hann", workers=8).tasks) > 1


# In the second volume no part of a column reads the whole depth, so that it needs less than the column.
@pytest.mark.parametrize(("shape", "chunk"), [((300, 300, 300), None), ((75, 33, 99), 6)])
def test_a_budget_below_a_column_is_refused_for_any_number_of_workers(shape: Any, chunk: Any) -> None:
    tight = budget(shape, Window(), 0.0, chunk=chunk)
    for workers in (1, 2, 100):
        plan = plan_blocks(shape, Window(), memory=tight, chunk=chunk, workers=workers)
        assert plan.projected_bytes <= tight
        assert workers > 1 or plan.group[0] == -(-shape[0] // plan.chunk[0])
        with pytest.raises(PlanError, match="one column of chunks"):
            plan_blocks(shape, Window(), memory=tight - 1, chunk=chunk, workers=workers)


def test_workers_beyond_the_chunks_change_nothing() -> None:
    few, more, most = (plan_blocks((300, 300, 300), Window(), workers=n) for n in (64, 65, 10**15))
    assert few == more == most


def test_without_a_budget_a_column_is_always_taken() -> None:
    big = {"stitch": "hann", "batch_size": 400}  # more than the default buffers
    alone = plan_blocks((300, 300, 300), Window(), **big)  # type: ignore[arg-type]
    many = plan_blocks((300, 300, 300), Window(), **big, workers=64)  # type: ignore[arg-type]
    assert alone.group == (4, 1, 1)
    assert many.group[1:] == (1, 1)
    assert many.projected_bytes == alone.projected_bytes > DEFAULT_BUFFERS


# --- the plan and its tasks -----------------------------------------------------------------------


def test_tasks_are_a_lazy_sequence() -> None:
    plan = replace(plan_blocks((300, 300, 300), Window(), stitch="hann"), group=(2, 1, 3))
    tasks = plan.tasks
    every = list(tasks)
    assert len(tasks) == len(every) == 2 * 4 * 2
    assert [tasks[k] for k in range(-len(every), 0)] == every
    for part in (slice(1, 3), slice(None, None, -2), slice(-2, None), slice(5, 2)):
        assert list(tasks[part]) == every[part]
    assert [task.index for task in tasks[2:][1::3][:2]] == [3, 6]
    assert list(reversed(tasks)) == every[::-1]
    assert every[1] in tasks
    assert tasks == plan.tasks
    assert tasks != tasks[1:]
    for index in (len(every), -len(every) - 1):
        with pytest.raises(IndexError):
            tasks[index]
    with pytest.raises(TypeError):
        tasks[0] = every[1]  # type: ignore[index]


def test_a_plan_is_small_whatever_was_asked_of_it() -> None:
    plan = plan_blocks((2048, 4096, 4096), Window(), stitch="hann", memory="2 GB", chunk=32, workers=10_000)
    assert len(plan.tasks) > 8_000
    fresh = pickle.dumps(plan)
    _ = plan.tasks[-1], plan.windows, plan.passes_per_voxel, str(plan)
    assert pickle.dumps(plan) == fresh
    assert len(fresh) < 500
    assert pickle.loads(fresh) == plan
    task = plan.tasks[123]
    assert len(pickle.dumps(task)) < 300
    assert pickle.loads(pickle.dumps(task)) == task


ROOMS = ("blocks", "lattice", "schedule")


def test_tasks_without_number_take_no_memory() -> None:
    plan = replace(plan_blocks((2048, 4096, 4096), Window(), chunk=70), group=(1, 1, 1))
    assert len(plan.tasks) == 30 * 59 * 59 > 100_000
    ours = [
        tracemalloc.Filter(inclusive=True, filename_pattern=f"*/tomocpt_stream/{name}.py") for name in ROOMS
    ]

    def held() -> int:
        """What these modules hold; other threads of the process, such as a cluster's, allocate too."""
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)

    tracemalloc.start()
    try:
        windows = sum(task.window_count for task in islice(plan.tasks, 10_000))
        early = held()
        windows += sum(task.window_count for task in plan.tasks[10_000:])
        late = held()
    finally:
        tracemalloc.stop()
    assert windows == plan.windows
    assert late < early + 5_000
    assert late < 200_000


def test_a_plan_says_what_it_costs() -> None:
    plan = plan_blocks((512, 1024, 1024), Window(), stitch="hann", memory="4 GB")
    assert str(plan) == "1 task, 5,324 windows of 64 x 64 x 64, 2.60 passes per voxel, at most 2.32 GB"
    assert str(replace(plan, group=(3, 6, 6))).startswith("8 tasks, ")


def test_default_chunk_follows_from_the_window_alone() -> None:
    small = plan_blocks((96, 256, 256), Window(), stitch="hann", memory="200 MB")
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
        ({"workers": 0}, "0 workers"),
        ({"workers": 2.5}, "2.5 workers"),
        ({"workers": "4"}, "'4' workers"),
        ({"workers": None}, "None workers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: Any) -> None:
    shape = arguments.pop("shape", (50, 50, 50))
    with pytest.raises(PlanError, match=message):
        plan_blocks(shape, Window(), **arguments)


def test_a_task_is_small_and_its_boxes_are_slices() -> None:
    plan: BlockPlan = plan_blocks((512, 1024, 1024), Window(), stitch="hann", memory="200 MB")
    task = plan.tasks[3]
    assert spans_of(task.write) == task.write_spans
    assert task.read[1].start <= task.known[1].start <= task.write[1].start
    assert DEFAULT_BUFFERS < 1e9
