"""`pick`: the calls in order, the folders they leave, what they refuse."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.blobs import BlobPicker, NamedBlobPicker, blobs, nearest
from tests.cuts import budget
from tests.scorers import Identity
from tomocpt_stream import pipeline
from tomocpt_stream.errors import PlanError
from tomocpt_stream.heatmap import PickOptions, open_heatmap
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import min_distance, pick, plan_pick, rule_of, safe_name, scratch_folder
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import open_volume

SHAPE = (30, 50, 44)
CENTRES = np.array([[8.0, 10.3, 9.0], [20.6, 12.0, 33.2], [15.0, 36.4, 20.5], [22.0, 40.0, 38.0]])
# 8 voxels of 10 Å: the picker's own scale, so that the source grid is the working grid
OPTIONS = PickOptions(diameter=80, batch_size=2, contrast="dark")


def tomogram(array: npt.NDArray[np.float32] | None = None, **settings: Any) -> Tomogram:
    voxels = blobs(SHAPE, CENTRES) if array is None else array
    return open_tomogram(voxels, **{"voxel_size": 10.0, "name": "TS_01", **settings})


def same(one: Picks, other: Picks) -> bool:
    return np.array_equal(one.zyx, other.zyx) and np.array_equal(one.score, other.score)


def test_blobs_are_found_where_they_are() -> None:
    picks = pick(tomogram(), BlobPicker(), OPTIONS)
    assert len(picks) == len(CENTRES)
    assert nearest(picks.zyx, CENTRES).max() < 0.3
    assert (picks.tomogram, picks.voxel_size, picks.shape) == ("TS_01", 10.0, SHAPE)
    assert (np.diff(picks.score) <= 0).all()
    assert picks.score.min() > OPTIONS.threshold


@pytest.mark.parametrize("scale", [0.6, 1.7])
def test_picks_of_another_working_voxel_size_are_in_source_voxels(scale: float) -> None:
    # blobs as wide as the filter expects once the particle has been brought to its scale
    wide = blobs((36, 60, 64), CENTRES * 1.2, width=2.0 * scale)
    picks = pick(
        tomogram(wide), BlobPicker(), PickOptions(diameter=80 * scale, threshold=0.4, contrast="dark")
    )
    assert len(picks) == len(CENTRES)
    assert nearest(picks.zyx, CENTRES * 1.2).max() < 0.4


@pytest.mark.parametrize("beam_axis", ["z", "y"])
def test_picks_of_an_unturned_volume_are_in_the_axes_of_the_file(beam_axis: str) -> None:
    picks = pick(tomogram(beam_axis=beam_axis), BlobPicker(), OPTIONS)
    assert nearest(picks.zyx, CENTRES).max() < 0.3
    assert picks.shape == SHAPE


def test_contrast_turned_over_gives_the_same_picks() -> None:
    dark = pick(tomogram(), BlobPicker(), OPTIONS)
    bright = pick(
        tomogram(-blobs(SHAPE, CENTRES)),
        BlobPicker(),
        PickOptions(diameter=80, batch_size=2, contrast="bright"),
    )
    assert len(dark)
    assert same(dark, bright)


def test_a_mask_confines_the_picks() -> None:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:, :25] = 1
    picks = pick(tomogram(), BlobPicker(), OPTIONS, mask=mask)
    assert len(picks) == 2
    assert nearest(picks.zyx, CENTRES[:2]).max() < 0.3


def test_no_pick_within_the_margin_of_a_face() -> None:
    source = tomogram()
    picks = pick(source, BlobPicker(), OPTIONS)
    margins = (0.0, 60.0, 84.0, 86.0, 130.0)
    counts = []
    for margin in margins:
        kept = pick(
            source, BlobPicker(), PickOptions(diameter=80, batch_size=2, margin=margin, contrast="dark")
        )
        away = np.minimum(picks.zyx + 0.5, np.array(SHAPE) - 0.5 - picks.zyx).min(axis=1) * 10
        assert same(kept, picks.take(away >= margin))
        counts.append(len(kept))
    assert 0 < counts[-1] < counts[0]


def test_a_pick_at_exactly_the_margin_is_kept() -> None:
    picks = Picks(np.array([[4.5, 20, 20], [4.4, 20, 20]]), np.ones(2, dtype=np.float32))
    assert len(pipeline.inside(picks, tomogram(), 50.0)) == 1


def test_the_source_grid_is_kept_within_five_percent() -> None:
    source, picker = tomogram(), BlobPicker()
    for diameter, voxel_size in ((76, 10.0), (80, 10.0), (84, 10.0), (75, 9.375), (85, 10.625), (160, 20.0)):
        grid, plan = plan_pick(source, picker, PickOptions(diameter=diameter, contrast="dark"))
        assert grid.voxel_size == voxel_size
        assert grid.is_identity == (voxel_size == 10.0)
        assert plan.shape == grid.shape


def test_the_plan_follows_options_and_picker() -> None:
    picker = BlobPicker()
    options = PickOptions(diameter=80, stitch="crop", tta=True, batch_size=3, contrast="dark")
    _, plan = plan_pick(tomogram(), picker, options)
    assert (plan.window, plan.stitch, plan.tta, plan.batch_size) == (picker.window, "crop", True, 3)
    heavy = BlobPicker()
    heavy.bytes_per_window = 1_000_000  # type: ignore[attr-defined]
    _, heavier = plan_pick(tomogram(), heavy, options)
    assert heavier.projected_bytes == plan.projected_bytes + 3_000_000


def test_too_small_a_budget_is_refused_before_a_voxel_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tomogram()
    monkeypatch.setattr(source, "read", lambda box: pytest.fail("a voxel was read"))
    with pytest.raises(PlanError, match="budget"):
        pick(source, BlobPicker(), OPTIONS, memory="1 MB", scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def wide_field() -> tuple[Tomogram, int]:
    """Return a tomogram of four chunks, and the least budget it can be picked in."""
    shape = (40, 120, 110)
    places = np.random.default_rng(3).uniform((5, 5, 5), (35, 115, 105), size=(30, 3))
    return tomogram(blobs(shape, places)), budget(shape, BlobPicker().window, 0, stitch="hann", batch_size=2)


def test_the_budget_does_not_change_the_picks() -> None:
    source, least = wide_field()
    tight, loose = (plan_pick(source, BlobPicker(), OPTIONS, memory=memory)[1] for memory in (least, None))
    assert len(tight.tasks) > len(loose.tasks)
    found = [pick(source, BlobPicker(), OPTIONS, memory=memory) for memory in (least, None)]
    assert len(found[0]) > 10
    assert same(*found)


def test_the_default_spacing_is_three_quarters_of_the_diameter() -> None:
    assert min_distance(PickOptions(diameter=80, contrast="dark")) == 60
    assert min_distance(PickOptions(diameter=80, min_distance=0, contrast="dark")) == 0
    pair = tomogram(blobs(SHAPE, [[15, 20, 20], [15, 20, 27]]))
    assert len(pick(pair, BlobPicker(), PickOptions(diameter=80, min_distance=60, contrast="dark"))) == 2
    assert len(pick(pair, BlobPicker(), PickOptions(diameter=80, min_distance=80, contrast="dark"))) == 1


@pytest.mark.parametrize("diameter", [82.0, 87.0, 164.0, 290.0])
def test_a_pick_at_exactly_the_spacing_is_kept(diameter: float) -> None:
    voxels = np.random.default_rng(0).normal(scale=0.01, size=(20, 30, 30)).astype(np.float32)
    voxels[10, 10, 5] = voxels[10, 10, 20] = 9.0  # 0.75 diameter = 15 voxels apart
    picker = Identity(radius=10.0)
    options = PickOptions(diameter, threshold=2.0, stitch="crop", contrast="dark")
    assert len(pick(tomogram(voxels, voxel_size=diameter / 20), picker, options)) == 2


def test_a_temporary_scratch_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pick(tomogram(), BlobPicker(), OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_kept_scratch_is_taken_up(tmp_path: Path) -> None:
    first, second = NamedBlobPicker(), NamedBlobPicker()
    picks = pick(tomogram(), first, OPTIONS, scratch=tmp_path)
    assert same(picks, pick(tomogram(), second, OPTIONS, scratch=tmp_path))
    assert (first.batches > 0, second.batches) == (True, 0)
    (folder,) = tmp_path.iterdir()
    assert folder == tmp_path / scratch_folder(tomogram(), plan_pick(tomogram(), first, OPTIONS)[0])


@dataclass
class TheirBlobPicker(NamedBlobPicker):
    rule: str = "tomocpt"


def test_a_picker_is_fed_by_the_rule_of_its_training(tmp_path: Path) -> None:
    folders = []
    # The grids of both rules are the same where nothing is resampled; the percentiles are not.
    for diameter in (96, 80):
        for picker in (NamedBlobPicker(), TheirBlobPicker()):
            options = PickOptions(diameter=diameter, batch_size=2, contrast="dark")
            grid, _ = plan_pick(tomogram(), picker, options)
            pick(tomogram(), picker, options, scratch=tmp_path)
            folders.append(tmp_path / scratch_folder(tomogram(), grid, rule_of(picker)))
            assert open_volume(folders[-1] / "volume.zarr").rule == rule_of(picker)
            assert open_volume(folders[-1] / "volume.zarr").grid == grid
    assert len(set(folders)) == 4


def test_one_scratch_serves_other_options_and_thresholds(tmp_path: Path) -> None:
    pick(tomogram(), NamedBlobPicker(), OPTIONS, scratch=tmp_path)
    other = NamedBlobPicker()
    strict = pick(
        tomogram(),
        other,
        PickOptions(diameter=80, batch_size=2, threshold=0.5, contrast="dark"),
        scratch=tmp_path,
    )
    assert other.batches == 0
    assert len(strict)
    crop = PickOptions(diameter=80, batch_size=2, stitch="crop", contrast="dark")
    assert len(pick(tomogram(), other, crop, scratch=tmp_path)) == len(CENTRES)
    assert other.batches > 0
    low = PickOptions(diameter=80, batch_size=2, threshold=0.01, contrast="dark")
    assert len(pick(tomogram(), other, low, scratch=tmp_path)) >= len(CENTRES)


def test_a_killed_pick_goes_on_and_ends_alike(tmp_path: Path) -> None:
    source, least = wide_field()
    whole = NamedBlobPicker()
    wanted = pick(source, whole, OPTIONS, memory=least)

    class Killed(BaseException):
        pass

    class Dying(NamedBlobPicker):
        def score(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            if self.batches > whole.batches * 3 // 4:
                raise Killed
            return super().score(batch)

    with pytest.raises(Killed):
        pick(source, Dying(), OPTIONS, scratch=tmp_path, memory=least)
    after = NamedBlobPicker()
    assert same(wanted, pick(source, after, OPTIONS, scratch=tmp_path, memory=least))
    assert 0 < after.batches < whole.batches


def test_a_picker_without_a_name_leaves_no_map_in_the_scratch(tmp_path: Path) -> None:
    for _ in range(2):
        picker = BlobPicker()
        assert len(pick(tomogram(), picker, OPTIONS, scratch=tmp_path)) == len(CENTRES)
        assert picker.batches > 0
    (folder,) = tmp_path.iterdir()
    assert [item.name for item in folder.iterdir()] == ["volume.zarr"]


def test_another_tomogram_of_the_same_name_has_its_own_folder(tmp_path: Path) -> None:
    first = pick(tomogram(), NamedBlobPicker(), OPTIONS, scratch=tmp_path)
    second = pick(tomogram(blobs(SHAPE, CENTRES[1:])), NamedBlobPicker(), OPTIONS, scratch=tmp_path)
    assert (len(first), len(second)) == (4, 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_map_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    picks = pick(tomogram(), BlobPicker(), OPTIONS, keep_heatmap=tmp_path / "maps" / "TS_01.zarr")
    heatmap = open_heatmap(tmp_path / "maps" / "TS_01.zarr")
    assert heatmap.shape == SHAPE
    tops = np.round(picks.zyx).astype(int)
    np.testing.assert_array_equal([heatmap.array[tuple(top)] for top in tops.tolist()], picks.score)


def test_progress_is_reported_by_stage() -> None:
    seen: dict[str, list[int]] = {}
    totals: dict[str, int] = {}

    def note(stage: str, done: int, total: int) -> None:
        seen.setdefault(stage, []).append(done)
        totals[stage] = total

    pick(tomogram(), BlobPicker(), OPTIONS, progress=note)
    assert list(seen)[-1] == "predict"
    assert "ingest" in seen
    for stage, done in seen.items():
        assert done == sorted(done)
        assert done[-1] == totals[stage]


@example("é" * 500)
@given(st.text())
def test_a_safe_name_is_one_plain_path_component(name: str) -> None:
    safe = safe_name(name)
    assert Path(safe).name == safe
    assert safe not in (".", "..", "")
    assert not safe.startswith((".", "-"))
    assert len(safe.encode()) <= 255 - len("-0123456789ab")
    assert safe == safe_name(safe)


def test_plain_names_stay_as_they_are() -> None:
    assert safe_name("TS_01_10.00Apx") == "TS_01_10.00Apx"
    assert safe_name("../../etc/passwd") == "_.._etc_passwd"


class Limited:
    """A client of a worker with a memory limit, as far as a plan asks."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def nthreads(self) -> dict[str, int]:
        return {"b": 2}

    def scheduler_info(self) -> dict[str, Any]:
        return {"workers": {"gone": {"memory_limit": 0}, "b": {"memory_limit": self.limit}}}


def test_a_plan_keeps_to_the_memory_limit_of_the_workers() -> None:
    source, _ = wide_field()
    free = plan_pick(source, BlobPicker(), OPTIONS)[1]
    for limit in (0, 10**10):
        assert pipeline._plan_for(Limited(limit), source, BlobPicker(), OPTIONS, None)[1] == free
    least = budget(free.shape, free.window, 0.0, stitch="hann", batch_size=OPTIONS.batch_size)
    tight = int((least + 500_000_000 + 1000) / 0.95)
    plan = pipeline._plan_for(Limited(tight), source, BlobPicker(), OPTIONS, None)[1]
    assert plan.projected_bytes <= 0.95 * tight - 500_000_000 < free.projected_bytes
    with pytest.raises(PlanError, match=r"have room for \d+ MB.*raise the workers' memory limit"):
        pipeline._plan_for(Limited(tight), source, BlobPicker(), OPTIONS, "4 GB")
    with pytest.raises(PlanError, match="memory budget"):
        pipeline._plan_for(Limited(600_000_000), source, BlobPicker(), OPTIONS, None)


def test_a_particle_smaller_than_a_voxel_is_refused() -> None:
    tomogram = open_tomogram(np.zeros((64, 64, 64), np.float32), voxel_size=10.0)
    with pytest.raises(PlanError, match=r"a particle of 1e-30 Å in voxels of 10 Å"):
        pick(tomogram, BlobPicker(), PickOptions(1e-30, contrast="dark"))
