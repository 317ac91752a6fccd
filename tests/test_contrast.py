"""How protein looks: which windows are asked, what is counted, what is kept, and that it is `pick`'s own."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from zarr.storage import LocalStore

from tests.blobs import BlobPicker, NamedBlobPicker, blobs
from tests.scorers import SMALL, Batch
from tomocpt_stream import contrast
from tomocpt_stream.blocks import BlockPlan, Window, plan_blocks
from tomocpt_stream.contrast import (
    ROUNDS,
    WINDOWS,
    Finding,
    Sampled,
    find_contrast,
    is_negated,
    own_contrast,
    sample,
    weigh,
    windows_sampled,
)
from tomocpt_stream.errors import CheckpointError, SourceError
from tomocpt_stream.heatmap import PickOptions, open_heatmap, predict
from tomocpt_stream.lazy import heatmap_lazy
from tomocpt_stream.peaks import CANDIDATE
from tomocpt_stream.pipeline import pick, plan_pick, rule_of, scratch_folder
from tomocpt_stream.scan import Turns
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import Volume, ingest, open_volume
from tomocpt_stream.windows import normalise

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from distributed import Client

# 2 x 2 x 4 windows of stride 12. The particle is 80 Å, 8 voxels of 10 Å, as the picker wants it.
SHAPE = (24, 24, 48)
CENTRES = np.array([[6.0, 6.3, 7.0], [17.6, 7.0, 18.2], [7.0, 18.4, 30.5], [17.0, 17.0, 41.0]])
AUTO = PickOptions(diameter=80, batch_size=2, contrast="auto")
PICKER = NamedBlobPicker()


def tomogram(look: str = "dark", **settings: Any) -> Tomogram:
    voxels = blobs(SHAPE, CENTRES, **settings)
    return open_tomogram(voxels if look == "dark" else -voxels, voxel_size=10.0, name="TS_01")


def volume_of(source: Tomogram, folder: Path) -> Volume:
    return ingest(source, folder / "volume.zarr", voxel_size=10.0)


def plan_of(picker: Any = PICKER, shape: tuple[int, int, int] = SHAPE, **options: Any) -> BlockPlan:
    return plan_blocks(shape, picker.window, **{"stitch": "hann", "batch_size": 2, **options})


def candidates(*rows: tuple[float, float, float, float]) -> npt.NDArray[np.void]:
    table = np.zeros(len(rows), dtype=CANDIDATE)
    for number, row in enumerate(rows):
        for name, value in zip(("z", "y", "x", "score"), row, strict=True):
            table[number][name] = value
    return table


@dataclass
class Counted(NamedBlobPicker):
    """It counts the windows that it is asked for."""

    windows: int = 0

    def score(self, batch: Batch) -> Batch:
        self.windows += len(batch)
        return super().score(batch)


@pytest.mark.parametrize("look", ["dark", "bright"])
@pytest.mark.parametrize("own", ["dark", "bright"])
def test_the_sign_with_more_to_pick_is_found(look: str, own: str, tmp_path: Path) -> None:
    class Trained(BlobPicker):
        metadata = {"contrast": own}  # noqa: RUF012

        def score(self, batch: Batch) -> Batch:
            return super().score(batch if own == "dark" else -batch)

    found = find_contrast(volume_of(tomogram(look), tmp_path), Trained(), plan_of())
    assert found.contrast == look
    assert (found.picks[look], found.windows) == (len(CENTRES), WINDOWS)
    assert not found.is_doubtful


def test_gold_does_not_decide(tmp_path: Path) -> None:
    """A few voxels of enormous contrast skew the grey values, and are nothing that is picked."""
    voxels = -blobs(SHAPE, CENTRES)
    voxels[17:20, 17:20, 5:8] = -60.0
    assert ((voxels - voxels.mean()) ** 3).mean() < 0  # the dark tail is the longer one
    source = open_tomogram(voxels, voxel_size=10.0, name="TS_01")
    assert find_contrast(volume_of(source, tmp_path), PICKER, plan_of()).contrast == "bright"


@pytest.mark.parametrize("look", ["dark", "bright"])
def test_auto_is_the_contrast_said_bit_for_bit(look: Any, tmp_path: Path) -> None:
    source = tomogram(look)
    said = pick(source, PICKER, replace(AUTO, contrast=look), keep_heatmap=tmp_path / "said.zarr")
    found = pick(source, PICKER, AUTO, keep_heatmap=tmp_path / "found.zarr")
    assert np.array_equal(found.zyx, said.zyx)
    assert len(found) == len(CENTRES)
    one, other = (open_heatmap(tmp_path / f"{name}.zarr") for name in ("said", "found"))
    assert np.asarray(one.array[:]).tobytes() == np.asarray(other.array[:]).tobytes()
    assert one.config == other.config
    kept = json.loads((tmp_path / "found.zarr" / "zarr.json").read_text())["attributes"]["tomocpt_stream"]
    assert kept["contrast"]["contrast"] == look
    assert kept["contrast"]["picks"][look] == len(CENTRES)


def test_auto_and_what_was_said_share_a_map(tmp_path: Path) -> None:
    """A run without the contrast goes on where one with it stopped, and the other way round."""
    picker, source = Counted(), tomogram("bright")
    pick(source, picker, replace(AUTO, contrast="bright"), scratch=tmp_path)
    whole = picker.windows
    pick(source, picker, AUTO, scratch=tmp_path)
    assert picker.windows - whole == 2 * WINDOWS  # the windows that tell, and none of the map
    pick(source, picker, replace(AUTO, threshold=0.5), scratch=tmp_path)
    assert picker.windows - whole == 2 * WINDOWS  # what was found is kept
    folder = tmp_path / scratch_folder(source, plan_pick(source, picker, AUTO)[0], rule_of(picker))
    assert len(list(folder.glob("heatmap-*.zarr"))) == 1


def test_what_is_said_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("heatmap", "pipeline", "lazy"):
        monkeypatch.setattr(f"tomocpt_stream.{module}.find_contrast", lambda *_, **__: pytest.fail("asked"))
    said = replace(AUTO, contrast="dark")
    assert len(pick(tomogram(), PICKER, said, scratch=tmp_path)) == len(CENTRES)
    assert heatmap_lazy(tomogram(), PICKER, said).max().compute() > 0.5


def test_predict_finds_it_too(tmp_path: Path) -> None:
    volume, picker = volume_of(tomogram("bright"), tmp_path), BlobPicker()  # nothing of it is kept
    heatmap = predict(volume, picker, plan_of(picker), store=tmp_path / "map.zarr", options=AUTO)
    assert heatmap.config["negate"]
    assert heatmap.candidate_table()["score"].max() > 0.5


def test_the_answer_does_not_depend_on_options_or_plan(tmp_path: Path) -> None:
    volume, picker = volume_of(tomogram(seed=3), tmp_path), BlobPicker()
    plans = [
        plan_of(picker),
        plan_of(picker, stitch="crop", tta=True, batch_size=5, workers=4),
        plan_of(picker, chunk=24, memory="3 GB"),
    ]
    one, *others = (find_contrast(volume, picker, plan) for plan in plans)
    assert all(other == one for other in others)


def test_the_workers_find_the_same(tmp_path: Path, workers: Client) -> None:
    """The windows are scored by the workers, whose picker it is; this process scores none."""
    volume = volume_of(tomogram("bright"), tmp_path)
    here = find_contrast(volume, BlobPicker(), plan_of())
    picker = BlobPicker()
    assert find_contrast(volume, picker, plan_of(), client=workers) == here
    assert picker.batches == 0
    found = pick(open_tomogram(np.asarray(volume.array[:]), voxel_size=10.0), PICKER, AUTO, client=workers)
    assert len(found) == len(CENTRES)


@pytest.mark.parametrize("scratch", [True, False])
def test_a_lazy_map_is_that_of_pick(tmp_path: Path, scratch: bool) -> None:
    source = tomogram("bright")
    pick(source, BlobPicker(), AUTO, keep_heatmap=tmp_path / "map.zarr")
    lazy = heatmap_lazy(source, BlobPicker(), AUTO, scratch=tmp_path / "lazy" if scratch else None)
    assert (
        lazy.compute(scheduler="synchronous").tobytes()
        == np.asarray(open_heatmap(tmp_path / "map.zarr").array[:]).tobytes()
    )


def test_windows_of_constant_fill_are_not_asked(tmp_path: Path) -> None:
    """Two thirds of the volume are masked; all windows that are asked see the rest."""
    voxels = blobs((36, 36, 144), CENTRES)
    voxels[:, :, 48:] = 0.0
    volume = volume_of(open_tomogram(voxels, voxel_size=10.0, name="TS_01"), tmp_path)
    assert volume.fill is not None
    seen: list[bool] = []

    class Watching(BlobPicker):
        def score(self, batch: Batch) -> Batch:
            seen.append(bool(np.ptp(batch)))
            return super().score(batch)

    found = find_contrast(volume, Watching(), plan_of(shape=volume.shape))
    assert found.contrast == "dark"
    assert seen
    assert all(seen)


def test_nothing_at_either_sign_is_the_pickers_own_with_a_warning(tmp_path: Path) -> None:
    class Blind(BlobPicker):
        contrast = "bright"

        def score(self, batch: Batch) -> Batch:
            return np.zeros_like(batch)

    volume = volume_of(tomogram(), tmp_path)
    with pytest.warns(UserWarning, match="nothing was found; give the contrast"):
        found = find_contrast(volume, Blind(), plan_of())
    assert (found.contrast, found.is_empty) == ("bright", True)


def test_doubt_takes_more_windows_and_is_said(tmp_path: Path) -> None:
    class Undecided(Counted):
        def score(self, batch: Batch) -> Batch:
            return super().score(-abs(batch))

    picker = Undecided(fingerprint="undecided")
    voxels = np.random.default_rng(0).normal(size=(72, 72, 72)).astype(np.float32)
    volume = volume_of(open_tomogram(voxels, voxel_size=10.0, name="TS_01"), tmp_path)
    with pytest.warns(UserWarning, match="nearly as much at the other sign"):
        found = find_contrast(volume, picker, plan_of(shape=volume.shape))
    assert found.windows == ROUNDS * WINDOWS
    assert picker.windows == 2 * found.windows


@pytest.mark.parametrize(
    ("dark", "bright", "doubtful"),
    [(0.9, 0.0, True), (1.1, 0.0, False), (9.0, 6.1, True), (9.0, 5.9, False), (0.0, 0.0, True)],
)
def test_little_and_nearly_as_much_are_doubtful(dark: float, bright: float, doubtful: bool) -> None:
    found = Finding("dark", 16, {"dark": 9, "bright": 9}, {"dark": dark, "bright": bright})
    assert found.is_doubtful == doubtful


@pytest.mark.parametrize("own", ["dark", "bright"])
@pytest.mark.parametrize(
    ("score", "skewness", "look"),
    [(0.9, 0.5, "bright"), (0.9, -0.5, "dark"), (1.0, 0.5, "dark"), (1.0, -0.5, "dark")],
)
def test_grey_values_decide_where_little_is_found_alone(
    own: Any, score: float, skewness: float, look: str
) -> None:
    tables = [candidates((5, 5, 5, score)), candidates((5, 5, 5, 0.2))]
    if own == "bright":
        tables.reverse()
    found = weigh(tables, SHAPE, own=own, radius=4.0, windows=16, skewness=skewness)
    assert (found.contrast, found.skewness) == (look, skewness)
    assert found.is_doubtful == (score < 1)


@pytest.mark.parametrize("look", ["dark", "bright"])
def test_what_is_hardly_seen_is_told_by_its_grey_values(look: str, tmp_path: Path) -> None:
    """The picker sees protein at the wrong sign, and that barely."""

    class Mistaken(BlobPicker):
        def score(self, batch: Batch) -> Batch:
            return 0.4 * super().score(-batch if look == "bright" else batch)

        metadata = {"contrast": "bright"}  # noqa: RUF012

    volume = volume_of(tomogram(look), tmp_path)
    with pytest.warns(UserWarning, match=f"{look} protein is taken, by the grey values alone: little"):
        found = find_contrast(volume, Mistaken(), plan_of())
    seen = normalise(np.asarray(volume.array[:], dtype=np.float32), volume.percentiles)
    assert found.skewness == pytest.approx(stats.skew(seen, axis=None), rel=1e-4)
    assert found.contrast == look


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Broken(BlobPicker):
        def score(self, batch: Batch) -> Batch:
            return np.full_like(batch, np.nan)

    with pytest.raises(SourceError, match="not all numbers"):
        find_contrast(volume_of(tomogram(), tmp_path), Broken(), plan_of())


def test_many_doubtful_candidates_do_not_outweigh_a_few_good_ones() -> None:
    good = candidates(*((0, 0, 40 * k, 0.8) for k in range(3)))
    doubtful = candidates(*((0, 40, 40 * k, 0.31) for k in range(6)))
    found = weigh((good, doubtful), (50, 50, 400), own="dark", radius=4.0, windows=16)
    assert (found.contrast, found.picks) == ("dark", {"dark": 3, "bright": 6})
    assert found.scores["dark"] == pytest.approx(3 * 0.8**2, rel=1e-6)


def test_a_particle_that_two_windows_see_counts_once() -> None:
    """Across the side of a window: the better of two candidates nearer than 0.75 diameter."""
    table = candidates((5, 5, 11, 0.6), (5, 5, 13, 0.9), (5, 5, 19, 0.5))
    found = weigh((table, candidates()), SHAPE, own="bright", radius=4.0, windows=16)
    assert found.picks == {"bright": 2, "dark": 0}
    assert found.scores["bright"] == pytest.approx(0.9**2 + 0.5**2, rel=1e-6)


def test_the_order_of_the_candidates_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    table = np.zeros(60, dtype=CANDIDATE)
    for axis, length in zip("zyx", SHAPE, strict=True):
        table[axis] = rng.integers(0, length, 60)
    table["score"] = rng.choice([0.2, 0.4, 0.6], 60)  # ties
    table = np.unique(table)
    turned = rng.permutation(table)
    one, other = (
        weigh((some, some[:3]), SHAPE, own="dark", radius=4.0, windows=1) for some in (table, turned)
    )
    assert one.scores["dark"] == other.scores["dark"]


def test_equal_sums_are_the_pickers_own() -> None:
    table = candidates((5, 5, 5, 0.6))
    for own in ("dark", "bright"):
        assert weigh((table, table), SHAPE, own=own, radius=4.0, windows=1).contrast == own


@given(shape=st.tuples(*[st.integers(1, 400)] * 3))
def test_windows_are_of_the_lattice_each_once(shape: tuple[int, int, int]) -> None:
    window = Window((24, 24, 24), (6, 6, 6))
    found, lattice = list(sample(shape, window)), window.lattice(shape)
    assert len(set(found)) == len(found)
    assert all(0 <= k < n for index in found for k, n in zip(index, lattice, strict=True))
    assert len(found) >= min(WINDOWS, math.prod(lattice)) or lattice[0] > 3


def test_windows_are_spread_over_a_volume() -> None:
    """The first round sees all of it along y and x; of a thick volume the middle half is taken."""
    found = np.array(list(sample((640, 1024, 1024), Window()))[:WINDOWS])
    lattice = np.array(Window().lattice((640, 1024, 1024)))
    assert len({tuple(index) for index in (found[:, 1:] * 3 // lattice[1:]).tolist()}) == 9
    assert lattice[0] // 4 <= found[:, 0].min()
    assert found[:, 0].max() < lattice[0] * 0.75
    assert len(np.unique(found[:, 1])) > 10


def test_a_saturated_map_does_not_flood_the_scheduler(tmp_path: Path) -> None:
    """Patches of one score, every voxel of them a candidate: one a spacing is left of them."""

    class Saturated(BlobPicker):
        def score(self, batch: Batch) -> Batch:
            return np.where(batch > 2.9, 0.0, 1.0).astype(np.float32)

    volume = volume_of(tomogram(), tmp_path)
    scored = Sampled(volume, Saturated(), plan_of(), Turns())
    table = scored.candidates((0, 0, 0), negate=True)
    scored.turns.close()
    assert 1 < len(table) < 30


def test_few_windows_are_all_taken() -> None:
    assert sorted(sample((24, 24, 40), PICKER.window)) == sorted(np.ndindex(2, 2, 4))
    assert windows_sampled(plan_of(shape=(10, 10, 20))) == 2
    assert windows_sampled(plan_of(shape=(100, 100, 100))) == WINDOWS


@pytest.mark.parametrize("shape", [(10, 10, 10), (60, 90, 90), (200, 400, 400)])
def test_one_window_needs_less_memory_than_the_plan_has(shape: tuple[int, int, int]) -> None:
    plan = plan_blocks(shape, SMALL, stitch="hann", batch_size=1, bytes_per_window=10**8)
    single = plan_blocks(
        shape, SMALL, batch_size=1, bytes_per_window=10**8, chunk=SMALL.stride[0], memory="9 GB"
    )
    tightest = plan_blocks(
        shape, SMALL, batch_size=1, bytes_per_window=10**8, chunk=SMALL.stride[0], memory=plan.projected_bytes
    )
    assert single.window == tightest.window
    assert tightest.projected_bytes <= plan.projected_bytes


@pytest.mark.parametrize(
    ("metadata", "attribute", "own"),
    [
        ({"contrast": "bright"}, "dark", "bright"),
        ({"contrast": "dark"}, "bright", "dark"),
        ({}, "bright", "bright"),
        (None, None, "dark"),
        ("of a paper", "bright", "bright"),
    ],
)
def test_a_picker_says_what_it_was_trained_on(metadata: Any, attribute: Any, own: str) -> None:
    class Trained:
        pass

    picker: Any = Trained()
    if metadata is not None:
        picker.metadata = metadata
    if attribute is not None:
        picker.contrast = attribute
    assert own_contrast(picker) == own
    assert is_negated(picker, "bright") == (own == "dark")


def test_what_was_found_is_kept_for_the_picker_that_found_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume, picker = volume_of(tomogram("bright"), tmp_path), Counted()
    caplog.set_level(logging.INFO, logger="tomocpt_stream")
    first = find_contrast(volume, picker, plan_of())
    again = find_contrast(open_volume(volume.store), picker, plan_of())
    assert again == first
    assert picker.windows == 2 * WINDOWS
    find_contrast(volume, Counted(fingerprint="another"), plan_of())
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("TS_01: protein looks bright: 4 picks, total score")
    assert [text.endswith("(found before)") for text in said] == [False, True, False]


def test_a_volume_that_may_not_be_written_is_asked_again(tmp_path: Path) -> None:
    volume, picker = volume_of(tomogram(), tmp_path), Counted()
    read_only = replace(volume, store=LocalStore(tmp_path / "volume.zarr", read_only=True))
    for asked in (1, 2):
        assert find_contrast(read_only, picker, plan_of()).contrast == "dark"
        assert picker.windows == 2 * WINDOWS * asked


def test_doubt_is_said_again_by_a_later_run(tmp_path: Path) -> None:
    class Blind(NamedBlobPicker):
        def score(self, batch: Batch) -> Batch:
            return np.zeros_like(batch)

    volume = volume_of(tomogram(), tmp_path)
    for _ in range(2):  # the second time it was found before
        with pytest.warns(UserWarning, match="nothing was found; give the contrast"):
            find_contrast(volume, Blind(), plan_of())


def test_what_was_found_in_another_volume_does_not_count(tmp_path: Path) -> None:
    volume = volume_of(tomogram(), tmp_path)
    assert find_contrast(volume, PICKER, plan_of()).contrast == "dark"
    other = replace(volume_of(tomogram("bright"), tmp_path / "other"), store=volume.store)
    assert find_contrast(other, PICKER, plan_of()).contrast == "bright"


def test_a_store_that_fails_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, picker, failures = volume_of(tomogram(), tmp_path), Counted(), []
    for name in ("get", "set_if_not_exists"):
        asked = getattr(LocalStore, name)

        async def fail(store: LocalStore, key: str, *more: Any, name: str = name, asked: Any = asked) -> Any:
            if "receipts/contrast/" in key and name not in failures:
                failures.append(name)
                raise ConnectionResetError("reset by peer")
            return await asked(store, key, *more)

        monkeypatch.setattr(LocalStore, name, fail)
    for _ in range(2):
        assert find_contrast(volume, picker, plan_of()).contrast == "dark"
    assert (sorted(failures), picker.windows) == (["get", "set_if_not_exists"], 2 * WINDOWS)


@pytest.mark.parametrize("damage", ['{"contrast": "grey"}', "{", "[]"])
def test_a_damaged_finding_is_named(tmp_path: Path, damage: str) -> None:
    volume = volume_of(tomogram(), tmp_path)
    find_contrast(volume, PICKER, plan_of())
    (kept,) = (tmp_path / "volume.zarr" / "receipts" / "contrast").glob("*.json")
    kept.write_text(damage)
    with pytest.raises(CheckpointError, match=kept.stem):
        find_contrast(volume, PICKER, plan_of())


def test_progress_counts_windows(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    find_contrast(
        volume_of(tomogram(), tmp_path),
        BlobPicker(),
        plan_of(),
        progress=lambda *report: heard.append(report),
    )
    assert heard == [("contrast", done, WINDOWS) for done in range(WINDOWS + 1)]
    assert contrast.WINDOWS == 16


def test_where_no_window_is_left_no_other_round_begins(tmp_path: Path) -> None:
    class Blind(BlobPicker):
        def score(self, batch: Batch) -> Batch:
            return np.zeros_like(batch)

    heard: list[tuple[str, int, int]] = []
    with pytest.warns(UserWarning, match="nothing was found"):
        find_contrast(
            volume_of(tomogram(), tmp_path), Blind(), plan_of(), progress=lambda *report: heard.append(report)
        )
    assert heard[-1] == ("contrast", WINDOWS, WINDOWS)
