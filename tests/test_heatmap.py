from __future__ import annotations

import json
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from skimage.feature import peak_local_max as _untyped_peaks
from zarr.storage import LocalStore, MemoryStore

from tests.cuts import budget
from tests.scorers import SMALL, Identity, MatchedFilter, PlaceDependent
from tomocpt_stream import heatmap as heatmap_module
from tomocpt_stream.blocks import Window, plan_blocks, reflect
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import CheckpointError, PlanError, SourceError
from tomocpt_stream.heatmap import Heatmap, PickOptions, open_heatmap, predict
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tomocpt_stream.stages import Job, Stage

peak_local_max: Any = _untyped_peaks

OPTIONS = PickOptions(diameter=60.0, stitch="crop", batch_size=3, contrast="dark")


def _volume(
    shape: Any, *, seed: int = 0, voxel_size: float = 10.0, array: Any = None, **kwargs: Any
) -> Volume:
    if array is None:
        array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    tomogram = open_tomogram(array, voxel_size=10.0, **kwargs)
    return ingest(tomogram, MemoryStore(), voxel_size=voxel_size)


def _predict(volume: Volume, picker: Any, options: PickOptions = OPTIONS, **kwargs: Any) -> Heatmap:
    memory, chunk = kwargs.pop("memory", None), kwargs.pop("chunk", 24)
    plan = plan_blocks(
        volume.shape,
        picker.window,
        stitch=options.stitch,
        batch_size=options.batch_size,
        tta=options.tta,
        memory=memory,
        chunk=chunk,
    )
    store = kwargs.pop("store", None)
    return predict(
        volume, picker, plan, store=MemoryStore() if store is None else store, options=options, **kwargs
    )


def _scores(heatmap: Heatmap) -> Any:
    return np.asarray(heatmap.array[:])


def _marks(heatmap: Heatmap) -> Any:
    assert heatmap.marks is not None
    return np.asarray(heatmap.marks[:])


def _normalised(volume: Volume) -> Any:
    p5, p50, p95 = volume.percentiles
    return np.clip((np.asarray(volume.array[:]) - p50) / (p95 - p5), -3, 3)


def _dense(volume: Volume, picker: Any, options: PickOptions) -> Any:
    """Return the map by its definition: all windows of the lattice over the whole volume at once."""
    from tomocpt_stream.stitch import axis_weights

    voxels, window = _normalised(volume), picker.window
    total = np.zeros(volume.shape)
    weights = [axis_weights(n, window, axis, options.stitch) for axis, n in enumerate(volume.shape)]
    for index in np.ndindex(*window.lattice(volume.shape)):
        spans = [window.span(axis, k) for axis, k in enumerate(index)]
        seen = voxels[np.ix_(*(reflect(a, b, n) for (a, b), n in zip(spans, volume.shape, strict=True)))]
        batch = np.zeros((options.batch_size, *window.shape), dtype=np.float32)
        batch[0] = seen
        product = np.einsum("i,j,k->ijk", *(weights[axis][k] for axis, k in enumerate(index)))
        scores = picker.score(batch)[0] * product
        place = tuple(slice(max(0, a), min(b, n)) for (a, b), n in zip(spans, volume.shape, strict=True))
        part = tuple(slice(p.start - a, p.stop - a) for p, (a, _) in zip(place, spans, strict=True))
        total[place] += scores[part]
    return total


@pytest.mark.parametrize("shape", [(40, 50, 60), (16, 16, 16), (5, 40, 3), (1, 30, 20), (10, 10, 10)])
@pytest.mark.parametrize("voxel_size", [10.0, 13.0])
def test_identity_returns_the_normalised_volume(shape: Any, voxel_size: float) -> None:
    volume = _volume(shape, voxel_size=voxel_size)
    cropped = _predict(volume, Identity())
    assert cropped.array.shape == volume.shape
    assert _scores(cropped).tobytes() == _normalised(volume).tobytes()
    for stitch in ("hann", "gaussian"):
        blended = _predict(
            volume, Identity(), PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark")
        )
        np.testing.assert_allclose(_scores(blended), _normalised(volume), atol=2e-6)


def test_identity_of_the_default_window() -> None:
    volume = _volume((70, 90, 100))
    heatmap = _predict(
        volume, Identity(Window()), PickOptions(60.0, stitch="hann", contrast="dark"), chunk=None
    )
    np.testing.assert_allclose(_scores(heatmap), _normalised(volume), atol=2e-6)
    assert heatmap.array.chunks == (96, 96, 96)


@pytest.mark.parametrize("stitch", ["crop", "hann", "gaussian"])
def test_the_map_is_the_one_of_the_whole_volume(stitch: Any) -> None:
    volume = _volume((37, 45, 52))
    options = PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark")
    heatmap = _predict(volume, PlaceDependent(), options)
    np.testing.assert_allclose(_scores(heatmap), _dense(volume, PlaceDependent(), options), atol=1e-5)


@contextmanager
def shuffled_jobs(seed: int) -> Iterator[None]:
    """Within this context the jobs of a stage run in another order."""

    def shuffled(stage: Stage[Any], jobs: Iterable[Job], **options: Any) -> Iterator[tuple[Job, Any]]:
        mixed = list(jobs)
        random.Random(seed).shuffle(mixed)
        return run_jobs(stage, mixed, **options)

    with patch("tomocpt_stream.heatmap.run_jobs", shuffled):
        yield


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 48), st.integers(1, 48)),
    stitch=st.sampled_from(["crop", "hann", "gaussian"]),
    chunk=st.integers(3, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
    order_seed=st.integers(0, 100),
    tta=st.booleans(),
)
def test_the_answer_does_not_depend_on_the_cut(
    shape: Any, stitch: Any, chunk: int, share: float, seed: int, order_seed: int, tta: bool
) -> None:
    assume(np.prod(shape) > 200)  # a few voxels are constant or nearly so: an error of their own
    assume(np.prod(shape) < 200 * chunk**3)  # not hundreds of chunks
    volume = _volume(shape, seed=seed)
    options = PickOptions(60.0, stitch=stitch, batch_size=3, threshold=0.5, tta=tta, contrast="dark")
    picker = PlaceDependent()
    whole = _predict(volume, picker, options, memory=10**12, chunk=24)
    memory = budget(shape, SMALL, share, stitch=stitch, chunk=chunk, batch_size=3, tta=tta)
    plan = plan_blocks(shape, SMALL, stitch=stitch, batch_size=3, tta=tta, memory=memory, chunk=chunk)
    with shuffled_jobs(order_seed):
        parts = predict(volume, picker, plan, store=MemoryStore(), options=options)
    assert _scores(whole).tobytes() == _scores(parts).tobytes()
    for found in (whole.candidate_table(), parts.candidate_table()):
        assert found.tobytes() == whole.scan(whole.candidate_floor).tobytes()
    for threshold, distance, norm in ((0.5, 4.0, 2.0), (0.01, 2.5, np.inf)):
        picks = [
            find_peaks(m, threshold=threshold, min_distance=distance, p_norm=norm) for m in (whole, parts)
        ]
        assert picks[0].zyx.tobytes() == picks[1].zyx.tobytes()
        assert picks[0].score.tobytes() == picks[1].score.tobytes()


@pytest.mark.parametrize("chunk", [3, 4])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_chunks_thinner_than_a_peaks_neighbourhood_lose_no_candidate(chunk: int, share: float) -> None:
    shape, window = (8, 20, 20), Window((8, 8, 8), (2, 2, 2))
    volume, picker = _volume(shape), Identity(window)
    memory = budget(shape, window, share, stitch="crop", chunk=chunk, batch_size=3)
    heatmap = _predict(volume, picker, memory=memory, chunk=chunk)
    assert heatmap.candidate_table().tobytes() == heatmap.scan(heatmap.candidate_floor).tobytes()


def test_a_short_batch_is_padded_with_zeros() -> None:
    class Recorder(Identity):
        def score(self, batch: Any) -> Any:
            self.last = batch.copy()
            return super().score(batch)

    picker = Recorder()
    _predict(_volume((20, 20, 20)), picker)  # 2 x 2 x 2 windows in batches of 3
    assert picker.last[:2].any(axis=(1, 2, 3)).all()
    assert not picker.last[2].any()


def test_budgets_really_cut_differently() -> None:
    shape = (45, 60, 60)
    tasks = {
        share: len(
            plan_blocks(
                shape,
                SMALL,
                stitch="hann",
                chunk=10,
                memory=budget(shape, SMALL, share, stitch="hann", chunk=10),
            ).tasks
        )
        for share in (0.0, 0.2, 1.0)
    }
    assert tasks[0.0] > tasks[0.2] > tasks[1.0] == 1


@pytest.mark.parametrize("levels", [3, 8, 256])
@pytest.mark.parametrize("stitch", ["crop", "hann"])
def test_peaks_of_a_map_are_skimages(levels: int, stitch: Any) -> None:
    shape = (14, 26, 26)
    array = np.random.default_rng(1).integers(0, levels, size=shape).astype(np.float32)
    volume = _volume(None, array=array)
    tight = budget(shape, SMALL, 0.0, stitch=stitch, chunk=12, batch_size=3)
    heatmap = _predict(
        volume,
        Identity(),
        PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark"),
        memory=tight,
        chunk=12,
    )
    whole = _scores(heatmap)
    for norm in (1.0, 2.0, np.inf):
        for threshold in (0.0, 0.3, -2.0):
            picks = find_peaks(heatmap, threshold=threshold, min_distance=3, p_norm=norm, refine=False)
            expected = peak_local_max(
                whole,
                footprint=np.ones((3, 3, 3)),
                min_distance=3,
                p_norm=norm,
                threshold_abs=threshold,
                exclude_border=False,
            )
            np.testing.assert_array_equal(picks.zyx, expected)


def test_a_constant_map_has_no_peaks_whatever_its_size() -> None:
    class Flat(Identity):
        def score(self, batch: Any) -> Any:
            return np.full_like(batch, 0.7)

    heatmap = _predict(_volume((40, 40, 40)), Flat())
    assert heatmap.is_constant
    assert len(find_peaks(heatmap, threshold=0.3, min_distance=3)) == 0
    assert len(heatmap.candidates()) == 0


def test_plateaus_over_whole_chunks_are_found() -> None:
    class Half(Identity):
        def score(self, batch: Any) -> Any:
            return np.where(batch > 1.5, np.float32(1), np.float32(0.6))

    array = np.random.default_rng(0).normal(scale=0.1, size=(30, 30, 70)).astype(np.float32)
    array[20, 20, 60] = 50
    heatmap = _predict(_volume(None, array=array), Half(), chunk=12)
    picks = find_peaks(heatmap, threshold=0.5, min_distance=4, refine=False)
    expected = peak_local_max(
        _scores(heatmap),
        footprint=np.ones((3, 3, 3)),
        min_distance=4,
        p_norm=2,
        threshold_abs=0.5,
        exclude_border=False,
    )
    np.testing.assert_array_equal(picks.zyx, expected)
    assert len(picks) > 100


def test_flood_is_an_error_with_map_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tomocpt_stream.heatmap.MAX_CANDIDATES", 50)
    with pytest.raises(SourceError, match=r"crowd.*candidate"):
        _predict(_volume((40, 40, 40), name="crowd"), Identity())


def test_scores_that_are_no_numbers_are_an_error() -> None:
    class Broken(Identity):
        def score(self, batch: Any) -> Any:
            return np.where(batch > 0.8, np.nan, batch)

    class Short(Identity):
        def score(self, batch: Any) -> Any:
            return batch[:1]

    with pytest.raises(SourceError, match="not all numbers"):
        _predict(_volume((40, 40, 40)), Broken())
    with pytest.raises(SourceError, match="scores of shape"):
        _predict(_volume((40, 40, 40)), Short())


def test_the_contrast_is_found_where_nobody_says_it() -> None:
    assert PickOptions(60.0).contrast == "auto"


def test_negated_tomogram_with_the_other_contrast_gives_the_same_picks() -> None:
    array = np.random.default_rng(3).normal(size=(40, 50, 60)).astype(np.float32)
    for voxel_size in (10.0, 14.5):
        dark = _predict(_volume(None, array=array, voxel_size=voxel_size), MatchedFilter())
        bright = _predict(
            _volume(None, array=-array, voxel_size=voxel_size),
            MatchedFilter(),
            PickOptions(60.0, stitch="crop", batch_size=3, contrast="bright"),
        )
        assert _scores(dark).tobytes() == _scores(bright).tobytes()
        picks = [find_peaks(heatmap, threshold=0.1, min_distance=4) for heatmap in (dark, bright)]
        assert len(picks[0]) > 10
        assert picks[0].zyx.tobytes() == picks[1].zyx.tobytes()


def test_a_pickers_own_contrast_decides_the_sign() -> None:
    class Bright(Identity):
        metadata = {"contrast": "bright"}  # noqa: RUF012

    volume = _volume((20, 20, 20))
    np.testing.assert_array_equal(_scores(_predict(volume, Bright())), -_normalised(volume))
    bright = PickOptions(60.0, stitch="crop", batch_size=3, contrast="bright")
    np.testing.assert_array_equal(_scores(_predict(volume, Bright(), bright)), _normalised(volume))


def test_tta_is_the_mean_over_three_flips() -> None:
    volume = _volume((30, 33, 36))
    options = PickOptions(60.0, stitch="crop", batch_size=3, tta=True, contrast="dark")
    views = []
    for axis in (None, 0, 1, 2):

        class View(PlaceDependent):
            axis: Any = None

            def score(self, batch: Any) -> Any:
                if self.axis is None:
                    return super().score(batch)
                flipped = np.ascontiguousarray(np.flip(batch, self.axis + 1))
                return np.flip(super().score(flipped), self.axis + 1)

        view = View()
        view.axis = axis
        views.append(_scores(_predict(volume, view)))
    np.testing.assert_allclose(
        _scores(_predict(volume, PlaceDependent(), options)), np.mean(views, axis=0), atol=1e-5
    )


def test_a_picker_may_write_to_its_batch() -> None:
    class Careless(PlaceDependent):
        def score(self, batch: Any) -> Any:
            scores = super().score(batch)
            batch[:] = 7
            return scores

    volume = _volume((20, 33, 36))
    for tta in (False, True):
        options = PickOptions(60.0, stitch="crop", batch_size=3, tta=tta, contrast="dark")
        maps = [_scores(_predict(volume, picker, options)) for picker in (PlaceDependent(), Careless())]
        np.testing.assert_array_equal(*maps)


# --- masks and fill -------------------------------------------------------------------------------


def test_windows_without_mask_are_not_scored_and_candidates_outside_are_dropped() -> None:
    shape = (40, 50, 60)
    volume = _volume(shape)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[10:25, 5:20, 30:45] = 1
    free, masked = Identity(), Identity()
    whole = _predict(volume, free, PickOptions(60.0, stitch="hann", batch_size=1, contrast="dark"))
    heatmap = _predict(
        volume, masked, PickOptions(60.0, stitch="hann", batch_size=1, contrast="dark"), mask=mask
    )
    lattice = [
        index
        for index in np.ndindex(*SMALL.lattice(shape))
        if mask[
            tuple(slice(max(0, SMALL.span(a, k)[0]), SMALL.span(a, k)[1]) for a, k in enumerate(index))
        ].any()
    ]
    assert 0 < len(lattice) < free.batches
    assert masked.batches == len(lattice)
    inside = mask.astype(bool)
    np.testing.assert_allclose(_scores(heatmap)[inside], _scores(whole)[inside], atol=2e-6)
    found = heatmap.candidates()
    expected = whole.candidates()
    expected = expected[inside[expected.z, expected.y, expected.x]]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True), atol=1e-5)
    assert (_scores(heatmap)[~(_marks(heatmap) & 1).astype(bool)] == 0).all()
    assert heatmap.scored_voxels == int((_marks(heatmap) & 1).sum())
    low = find_peaks(heatmap, threshold=-1.0, min_distance=2.0, refine=False)  # re-reads the map
    assert inside[tuple(low.zyx.astype(int).T)].all()


def test_dropping_comes_before_spacing() -> None:
    array = np.zeros((20, 20, 20), dtype=np.float32) + np.random.default_rng(0).normal(
        scale=1e-3, size=(20, 20, 20)
    )
    array[10, 10, 8], array[10, 10, 11] = 100, 50
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[:, :, 10:] = True
    heatmap = _predict(_volume(None, array=array.astype(np.float32)), Identity(), mask=mask)
    picks = find_peaks(heatmap, threshold=2.0, min_distance=6, refine=False)
    np.testing.assert_array_equal(picks.zyx, [[10, 10, 11]])


def test_the_masked_map_does_not_depend_on_the_cut() -> None:
    shape = (40, 50, 60)
    volume = _volume(shape)
    mask = np.random.default_rng(0).random((20, 25, 30)) > 0.9995
    mask[3, 4, 5] = True
    for stitch in ("crop", "hann"):
        options = PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark")
        whole = _predict(volume, PlaceDependent(), options, mask=mask, memory=10**12)
        tight = budget(shape, SMALL, 0.0, stitch=stitch, chunk=10, batch_size=3)
        parts = _predict(volume, PlaceDependent(), options, mask=mask, memory=tight, chunk=10)
        assert _scores(whole).tobytes() == _scores(parts).tobytes()
        assert whole.candidate_table().tobytes() == parts.candidate_table().tobytes()
        assert 0 < whole.scored_voxels == parts.scored_voxels < np.prod(shape)


def test_masks_of_other_voxel_sizes_and_files(tmp_path: Path) -> None:
    import mrcfile

    shape = (40, 50, 60)
    volume = _volume(shape)
    coarse = np.zeros((20, 25, 30), dtype=np.int8)
    coarse[5:12, 3:10, 15:22] = 1
    with mrcfile.new(tmp_path / "mask.mrc") as file:
        file.set_data(coarse)
        file.voxel_size = 20.0
    zarr.save_array(tmp_path / "mask.zarr", coarse)  # type: ignore[arg-type]
    maps = [
        _predict(volume, Identity(), mask=mask)
        for mask in (
            coarse,
            tmp_path / "mask.mrc",
            str(tmp_path / "mask.mrc"),
            zarr.open_array(tmp_path / "mask.zarr"),
        )
    ]
    points = maps[0].candidates()
    assert len(points) > 3
    z, y, x = (
        np.minimum(np.floor(points[a] / 2 + 0.5).astype(int), n - 1)
        for a, n in zip("zyx", coarse.shape, strict=True)
    )
    assert (coarse[z, y, x] == 1).all()
    for other in maps[1:]:
        assert _scores(other).tobytes() == _scores(maps[0]).tobytes()
        assert other.candidate_table().tobytes() == maps[0].candidate_table().tobytes()
    with pytest.raises(SourceError, match=r"mask.*spans.*Å"):
        _predict(volume, Identity(), mask=np.ones((20, 25, 40)))
    with pytest.raises(SourceError, match="three axes"):
        _predict(volume, Identity(), mask=np.ones((20, 25)))
    with pytest.raises(SourceError, match="type list"):
        _predict(volume, Identity(), mask=[1, 2])


def test_an_empty_mask_says_so_and_a_flood_is_not_seen_outside_it() -> None:
    volume = _volume((40, 40, 40))
    with pytest.warns(UserWarning, match="no voxel inside"):
        empty = _predict(volume, Identity(), mask=np.zeros((40, 40, 40)))
    assert empty.scored_voxels == 0
    assert len(find_peaks(empty, threshold=-1.0, min_distance=2)) == 0
    corner = np.zeros((40, 40, 40))
    corner[:3, :3, :3] = 1
    below = PickOptions(60.0, stitch="crop", batch_size=3, threshold=-0.5, contrast="dark")
    heatmap = _predict(volume, Identity(), below, mask=corner, chunk=6)
    assert heatmap.finished["candidates"] <= 27
    picks = find_peaks(heatmap, threshold=-0.5, min_distance=1, refine=False)
    assert (picks.zyx < 3).all()


def test_memory_of_a_fine_mask_is_in_the_projection() -> None:
    shape = (48, 300, 300)
    volume = _volume(shape, voxel_size=25.0)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[:, 50:250, 50:250] = 1
    options = PickOptions(500.0, stitch="hann", batch_size=1, contrast="dark")
    plan = plan_blocks(volume.shape, SMALL, stitch="hann", batch_size=1, chunk=20)
    tracemalloc.start()
    predict(volume, Identity(), plan, store=MemoryStore(), options=options, mask=mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < plan.projected_bytes


def test_windows_of_constant_fill_are_not_scored() -> None:
    array = np.random.default_rng(0).normal(size=(40, 60, 60)).astype(np.float32)
    array[:, :, 30:] = 7.0
    volume = _volume(None, array=array)
    assert volume.fill is not None
    picker = Identity()
    heatmap = _predict(volume, picker, PickOptions(60.0, stitch="hann", batch_size=1, contrast="dark"))
    columns = [k for k in range(SMALL.lattice((40, 60, 60))[2]) if SMALL.span(2, k)[0] < 30]
    assert picker.batches == len(columns) * 4 * 6
    assert (_scores(heatmap)[:, :, SMALL.span(2, columns[-1])[1] :] == 0).all()
    np.testing.assert_allclose(_scores(heatmap)[:, :, :30], _normalised(volume)[:, :, :30], atol=2e-6)


# --- the store ------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def _stop_after(share: float) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "predict" and done >= share * total:
            raise _Stop

    return progress


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("stitch", ["crop", "hann"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_stopped_prediction_goes_on_under_another_budget(tmp_path: Path, stitch: Any, share: float) -> None:
    shape = (44, 36, 48)
    volume = _volume(shape)
    options = PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark")
    reference, full = PlaceDependent(), PlaceDependent()
    whole = _predict(volume, reference, options, chunk=12, memory=10**12)
    tight = budget(shape, SMALL, 0.0, stitch=stitch, chunk=12, batch_size=3)
    _predict(volume, full, options, chunk=12, memory=tight)
    with pytest.raises(_Stop):
        _predict(
            volume,
            PlaceDependent(),
            options,
            chunk=12,
            memory=tight,
            store=tmp_path / "m",
            progress=_stop_after(share),
        )
    with pytest.raises(CheckpointError, match="not finished"):
        open_heatmap(tmp_path / "m")
    before = {k: v for k, v in _files(tmp_path).items() if "/c/" in k or "receipts" in k}
    assert before
    picker = PlaceDependent()
    middle = budget(shape, SMALL, 0.1, stitch=stitch, chunk=12, batch_size=3)
    resumed = _predict(volume, picker, options, chunk=12, memory=middle, store=tmp_path / "m")
    assert picker.batches < full.batches
    assert _scores(resumed).tobytes() == _scores(whole).tobytes()
    assert resumed.candidate_table().tobytes() == whole.candidate_table().tobytes()
    after = _files(tmp_path)
    assert all(after[key] == data for key, data in before.items() if "receipts" in key)


def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        from tests.scorers import PlaceDependent
        from tests.test_heatmap import OPTIONS, _predict, _volume
        kill = len(sys.argv) > 2
        def progress(stage, done, total):
            if kill and stage == "predict" and done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        _predict(_volume((44, 36, 48)), PlaceDependent(), chunk=12, store=sys.argv[1], progress=progress)
        """
    )
    root = Path(__file__).resolve().parents[1]

    def run(*args: str) -> int:
        return subprocess.run([sys.executable, "-c", code, *args], cwd=root, check=False).returncode

    assert run(str(tmp_path / "killed"), "kill") == -signal.SIGKILL
    assert run(str(tmp_path / "killed")) == 0
    assert run(str(tmp_path / "whole")) == 0
    killed, whole = (_files(tmp_path / name) for name in ("killed", "whole"))
    voxels = {key for key in whole if key.startswith("0/")}
    assert voxels == {key for key in killed if key.startswith("0/") and ".partial" not in key}
    assert all(killed[key] == whole[key] for key in voxels)
    # Which peaks a table holds depends on where the run was cut; tables that no receipt names are gone.
    tables = {receipt["table"] for _, receipt in Receipts(LocalStore(tmp_path / "killed"), "heatmap").each()}
    assert {key for key in killed if key.startswith("candidates/")} == {*tables, "candidates/seams"}
    maps = [open_heatmap(tmp_path / name) for name in ("killed", "whole")]
    assert maps[0].candidate_table().tobytes() == maps[1].candidate_table().tobytes()


def test_a_finished_map_is_returned_at_once_and_other_options_are_refused(tmp_path: Path) -> None:
    volume = _volume((30, 30, 30))
    first = _predict(volume, Identity(), store=tmp_path / "m")
    again = Identity()
    second = _predict(volume, again, store=tmp_path / "m", memory=10**12)
    assert again.batches == 0
    assert _scores(second).tobytes() == _scores(first).tobytes()
    hann = PickOptions(60.0, stitch="hann", batch_size=3, contrast="dark")
    with pytest.raises(CheckpointError, match="another stitch"):
        _predict(volume, Identity(), hann, store=tmp_path / "m")
    with pytest.raises(CheckpointError, match="another picker"):
        _predict(volume, PlaceDependent(Window((16, 16, 16), (2, 2, 2))), store=tmp_path / "m")
    with pytest.raises(CheckpointError, match="another volume"):
        _predict(_volume((30, 30, 30), seed=9), Identity(), store=tmp_path / "m")
    with pytest.raises(CheckpointError, match="mask"):
        _predict(volume, Identity(), store=tmp_path / "m", mask=np.ones((30, 30, 30)))


def test_nothing_of_a_picker_without_a_fingerprint_is_resumed(tmp_path: Path) -> None:
    class Unnamed(Identity):
        fingerprint = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.window, self.particle_radius, self.batches = SMALL, 3.0, 0

    volume = _volume((30, 30, 30))
    _predict(volume, Unnamed(), store=tmp_path / "m")
    with pytest.raises(CheckpointError, match="another picker"):
        _predict(volume, Unnamed(), store=tmp_path / "m")


def test_a_foreign_store_is_not_touched(tmp_path: Path) -> None:
    zarr.save_array(tmp_path / "a.zarr", np.arange(8))  # type: ignore[arg-type]
    before = _files(tmp_path)
    with pytest.raises(CheckpointError, match="not a heat map"):
        _predict(_volume((30, 30, 30)), Identity(), store=tmp_path / "a.zarr")
    assert _files(tmp_path) == before
    with pytest.raises(CheckpointError, match="not a heat map"):
        open_heatmap(tmp_path / "a.zarr")
    with pytest.raises(CheckpointError, match="holds no heat map"):
        open_heatmap(tmp_path / "nothing")
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=2)
    group.create_array("0", shape=(8,), dtype="f4")[:] = 1
    before = _files(tmp_path)
    with pytest.raises(CheckpointError, match="not a heat map"):
        _predict(_volume((30, 30, 30)), Identity(), store=tmp_path / "g.zarr")
    assert _files(tmp_path) == before
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        _predict(_volume((30, 30, 30)), Identity(), store=tmp_path / "file")


def test_a_run_killed_while_it_lays_out_its_store_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, store = _volume((30, 30, 30)), MemoryStore()
    create = zarr.Group.create_array

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise _Stop

    monkeypatch.setattr(zarr.Group, "create_array", killed)
    with pytest.raises(_Stop):
        _predict(volume, Identity(), store=store)
    monkeypatch.setattr(zarr.Group, "create_array", create)
    assert _scores(_predict(volume, Identity(), store=store)).tobytes() == _normalised(volume).tobytes()


def test_a_lower_threshold_reads_the_map_again_and_scores_nothing(tmp_path: Path) -> None:
    class Lowered(Identity):
        def score(self, batch: Any) -> Any:
            return super().score(batch) - np.float32(1)

    volume = _volume((30, 30, 30))
    _predict(volume, Lowered(), store=tmp_path / "m")
    again = Lowered()
    low = PickOptions(60.0, stitch="crop", batch_size=3, threshold=-0.5, contrast="dark")
    heatmap = _predict(volume, again, low, store=tmp_path / "m")
    assert again.batches == 0
    picks = find_peaks(heatmap, threshold=-0.5, min_distance=2, refine=False)
    expected = find_peaks(_scores(heatmap), threshold=-0.5, min_distance=2, refine=False)
    np.testing.assert_array_equal(picks.zyx, expected.zyx)
    assert (picks.score < heatmap.candidate_floor).any()


def test_a_lost_receipt_is_noticed(tmp_path: Path) -> None:
    heatmap = _predict(_volume((30, 30, 60)), Identity(), store=tmp_path / "m")
    next((tmp_path / "m" / "receipts" / "heatmap").glob("*.json")).unlink()
    with pytest.raises(CheckpointError, match=r"holds \d+ of its \d+ candidates"):
        heatmap.candidates()


def test_the_store_is_ome_zarr_on_the_working_grid(tmp_path: Path) -> None:
    volume = _volume((30, 40, 50), voxel_size=15.0)
    heatmap = _predict(volume, Identity(), store=tmp_path / "m.zarr")
    ome = json.loads((tmp_path / "m.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert ome["version"] == "0.5"
    assert transforms == [
        {"type": "scale", "scale": [15.0] * 3},
        {"type": "translation", "translation": [2.5] * 3},
    ]
    opened = pickle.loads(pickle.dumps(open_heatmap(tmp_path / "m.zarr")))
    assert (opened.name, opened.shape, opened.voxel_size) == ("tomogram", volume.shape, 15.0)
    assert (opened.source_shape, opened.source_voxel_size) == ((30, 40, 50), 10.0)
    assert opened.to_dask().chunks == heatmap.to_dask().chunks
    np.testing.assert_array_equal(opened.to_dask().compute(), _scores(heatmap))
    assert list(opened.candidates().columns) == ["z", "y", "x", "score", "dz", "dy", "dx"]


def test_a_lost_chunk_is_never_read_as_zeros(tmp_path: Path) -> None:
    mask = np.zeros((30, 30, 60), dtype=bool)
    mask[:, :, :20] = True
    heatmap = _predict(_volume((30, 30, 60)), Identity(), store=tmp_path / "m.zarr", mask=mask)
    chunks = sorted(p for p in (tmp_path / "m.zarr" / "0" / "c").rglob("*") if p.is_file())
    assert len(chunks) == 2 * 2 * 3  # those that are all zero are stored too
    whole = chunks[-1].read_bytes()
    chunks[-1].unlink()
    with pytest.raises(CheckpointError, match=r"m\.zarr has lost its object 0/c/1/1/2; .* delete this store"):
        find_peaks(heatmap, threshold=0.0, min_distance=3)
    chunks[-1].write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="0/c/1/1/2 that is cut short"):
        _scores(heatmap)
    chunks[-1].write_bytes(whole)
    assert np.isfinite(_scores(heatmap)).all()
    (tmp_path / "m.zarr" / "marks" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(CheckpointError, match="lost its object marks/c/0/0/0"):  # not: no pick may lie there
        find_peaks(heatmap, threshold=0.0, min_distance=3)


def test_plan_and_options_must_agree() -> None:
    volume = _volume((30, 30, 30))
    plan = plan_blocks((30, 30, 30), SMALL, stitch="crop", batch_size=4)
    with pytest.raises(PlanError, match="stitch crop against hann"):
        predict(
            volume,
            Identity(),
            plan,
            store=MemoryStore(),
            options=PickOptions(60.0, stitch="hann", contrast="dark"),
        )
    with pytest.raises(PlanError, match="batch_size 4 against 3"):
        predict(volume, Identity(), plan, store=MemoryStore(), options=OPTIONS)
    with pytest.raises(PlanError, match="shape"):
        predict(_volume((31, 30, 30)), Identity(), plan, store=MemoryStore(), options=OPTIONS)
    with pytest.raises(PlanError, match="window"):
        predict(volume, Identity(Window((20, 20, 20), (2, 2, 2))), plan, store=MemoryStore(), options=OPTIONS)
    with pytest.raises(PlanError, match="client"):
        predict(
            volume,
            Identity(),
            plan,
            store=MemoryStore(),
            options=PickOptions(60.0, stitch="crop", contrast="dark"),
            client=object(),
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"diameter": 0},
        {"diameter": float("nan")},
        {"margin": -1},
        {"min_distance": -1},
        {"contrast": "grey"},
        {"stitch": "mean"},
        {"batch_size": 0},
        {"threshold": float("inf")},
        {"diameter": "290"},
        {"batch_size": 2.5},
    ],
)
def test_wrong_options_are_refused(wrong: Any) -> None:
    with pytest.raises(PlanError):
        PickOptions(**{"diameter": 60.0, **wrong})


def test_a_map_of_before_tables_had_a_name_goes_on(tmp_path: Path) -> None:
    volume = _volume((60, 50, 60))
    whole = _predict(volume, PlaceDependent(), chunk=12)
    with pytest.raises(_Stop):
        _predict(volume, PlaceDependent(), chunk=12, store=tmp_path / "m", progress=_stop_after(0.5))
    for path in (tmp_path / "m" / "receipts" / "heatmap").glob("*.json"):
        receipt = json.loads(path.read_text())
        table = tmp_path / "m" / receipt.pop("table")
        table.rename(table.with_name(path.stem))
        path.write_text(json.dumps(receipt))
    resumed = _predict(volume, PlaceDependent(), chunk=12, store=tmp_path / "m")
    assert resumed.candidate_table().tobytes() == whole.candidate_table().tobytes()


def test_seams_without_a_score_above_the_floor_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 40, 96)
    voxels = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    voxels[:, :, 40:] = np.random.default_rng(4).normal(-50, 0.1, (60, 40, 56))  # scores far below the floor
    volume = ingest(open_tomogram(voxels, voxel_size=10.0), MemoryStore(), voxel_size=10.0)
    searched: list[Any] = []

    def settle(box: Any, *rest: Any) -> Any:
        searched.append(box)
        return settled(box, *rest)

    settled = heatmap_module._settle_seam
    monkeypatch.setattr(heatmap_module, "_settle_seam", settle)
    least = budget(shape, SMALL, 0.0, stitch="crop", batch_size=3, chunk=24)
    options = PickOptions(60.0, stitch="crop", batch_size=3, contrast="dark")
    heatmap = _predict(volume, Identity(), options, memory=least)
    assert max(start for _, _, (start, _) in searched) < 72  # nothing of the last chunks along x
    assert min(stop for _, _, (_, stop) in searched) <= 24
    found = find_peaks(heatmap, threshold=0.3, min_distance=2.0, refine=False)
    expected = find_peaks(_scores(heatmap), threshold=0.3, min_distance=2.0, refine=False)
    np.testing.assert_array_equal(found.zyx, expected.zyx)
