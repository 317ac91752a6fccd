from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from zarr.storage import MemoryStore

from tests.cuts import budget
from tests.scorers import SMALL
from tomocpt_stream.blocks import plan_blocks, reflect
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest
from tomocpt_stream.windows import Rows, normalise


def _volume(array: Any) -> Volume:
    return ingest(open_tomogram(array, voxel_size=10.0), MemoryStore(), voxel_size=10.0)


def _noise(shape: Any) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_normalisation_is_equation_5_clipped() -> None:
    voxels = np.array([-9.0, 1.0, 2.0, 2.5, 9.0], dtype=np.float32)
    expected = np.clip((voxels - 2.0) / (3.0 - 1.5), -3, 3)
    np.testing.assert_array_equal(normalise(voxels.copy(), (1.5, 2.0, 3.0)), expected)


@pytest.mark.parametrize("shape", [(50, 40, 45), (9, 70, 4), (1, 20, 20), (30, 131, 9)])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("negate", [False, True])
def test_a_window_sees_the_reflected_volume(shape: Any, share: float, negate: bool) -> None:
    volume = _volume(_noise(shape))
    voxels = normalise(_noise(shape), volume.percentiles) * (-1 if negate else 1)
    memory = budget(shape, SMALL, share, stitch="hann", chunk=10)
    plan = plan_blocks(shape, SMALL, stitch="hann", chunk=10, memory=memory)
    for task in plan.tasks:
        passed = []
        with Rows(volume, plan, task, negate=negate) as rows:
            for row in rows:
                passed.append(row)
                for z, y, x in (index for index in task.windows if index[0] == row):
                    spans = [SMALL.span(axis, k) for axis, k in enumerate((z, y, x))]
                    seen = voxels[np.ix_(*(reflect(*span, n) for span, n in zip(spans, shape, strict=True)))]
                    np.testing.assert_array_equal(rows.window(y, x), seen)
                    assert not rows.is_left_out(y, x)
        assert passed == list(range(*task.window_spans[0]))


def test_a_task_reads_each_voxel_about_once() -> None:
    shape = (100, 60, 60)
    volume = _volume(_noise(shape))
    plan = plan_blocks(shape, SMALL, stitch="hann", memory=10**12)
    (task,) = plan.tasks
    with Rows(volume, plan, task, negate=False) as rows:
        assert len(list(rows)) == plan.window.lattice(shape)[0]
    # Only the planes that a face reflects are read a second time.
    faces = 2 * SMALL.shape[0] * 60 * 60 * 4
    assert 100 * 60 * 60 * 4 <= rows.bytes_read <= 100 * 60 * 60 * 4 + faces


def test_a_window_is_left_out_where_all_its_voxels_are_fill() -> None:
    array = _noise((40, 50, 60))
    array[:, :, 31:] = 5.0
    volume = _volume(array)
    plan = plan_blocks(volume.shape, SMALL, stitch="crop", memory=10**12)
    with Rows(volume, plan, plan.tasks[0], negate=False) as rows:
        assert [next(iter(rows)), next(iter(rows))] == [0, 1]
        left_out = [rows.is_left_out(2, x) for x in range(SMALL.lattice(volume.shape)[2])]
    assert left_out == [SMALL.span(2, x)[0] >= 31 for x in range(len(left_out))]
    assert any(left_out)
    assert not all(left_out)


class _Gated:
    """Voxels that are given out only when the gate is open; it counts who asks."""

    def __init__(self, array: Any) -> None:
        self.array, self.asked, self.gate = array, threading.Semaphore(0), threading.Event()

    def __getitem__(self, box: Any) -> Any:
        self.asked.release()
        assert self.gate.wait(30)
        return self.array[box]


def _row_by_row(shape: Any) -> tuple[_Gated, Any, Any]:
    volume = _volume(_noise(shape))
    gated = _Gated(volume.array)
    plan = plan_blocks(shape, SMALL, memory=10**12)
    return gated, replace(volume, array=gated), plan  # type: ignore[arg-type]


def test_the_next_row_is_read_while_one_is_used() -> None:
    gated, volume, plan = _row_by_row((40, 20, 20))
    with Rows(volume, plan, plan.tasks[0], negate=False) as rows:
        assert gated.asked.acquire(timeout=30)  # the first row, before anybody asked for it
        gated.gate.set()
        assert next(iter(rows)) == 0
        gated.gate.clear()
        for row in (1, 2, 3):
            assert gated.asked.acquire(timeout=30)
            assert not rows.is_last
            gated.gate.set()
            assert next(iter(rows)) == row
            gated.gate.clear()
        assert rows.is_last
        assert not gated.asked.acquire(timeout=0.05)  # and nothing beyond the last one


class _Ajar(_Gated):
    """Voxels of the first rows along y only; whoever asks for others waits."""

    def __getitem__(self, box: Any) -> Any:
        self.asked.release()
        assert box[1].start == 0 or self.gate.wait(30)
        return self.array[box]


def test_the_first_windows_do_not_wait_for_the_last_strip() -> None:
    shape = (16, 150, 20)  # stored chunks have an edge of 64: three strips along y
    volume = _volume(_noise(shape))
    ajar = _Ajar(volume.array)
    plan = plan_blocks(shape, SMALL, memory=10**12)
    voxels = normalise(_noise(shape), volume.percentiles)
    with Rows(replace(volume, array=ajar), plan, plan.tasks[0], negate=False) as rows:  # type: ignore[arg-type]
        assert next(iter(rows)) == 0
        for y in range(16):
            if y == 6:  # window 5 sees lines 47 to 63, window 6 lines of the second strip
                assert not ajar.gate.is_set()
                ajar.gate.set()
            if y < SMALL.lattice(shape)[1]:
                spans = [SMALL.span(axis, k) for axis, k in enumerate((0, y, 0))]
                seen = voxels[np.ix_(*(reflect(*span, n) for span, n in zip(spans, shape, strict=True)))]
                np.testing.assert_array_equal(rows.window(y, 0), seen)


def test_an_error_while_reading_ahead_reaches_who_asks_for_the_row() -> None:
    gated, volume, plan = _row_by_row((40, 20, 20))
    gated.gate.set()
    with Rows(volume, plan, plan.tasks[0], negate=False) as rows:
        assert next(iter(rows)) == 0
        gated.array = None
        with pytest.raises(TypeError):
            list(rows)
