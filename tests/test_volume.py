"""Volumes: the working grid on disk, whatever the cut and however often the work was killed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

from tests.races import Interrupted, race
from tomocpt_stream import threads, tiles
from tomocpt_stream.circumstances import circumstances
from tomocpt_stream.errors import CheckpointError, DuplicateError, PlanError, SourceError
from tomocpt_stream.frame import Frame, working_grid
from tomocpt_stream.resample import resample_box, resample_mask
from tomocpt_stream.tiles import whole
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import Volume, ingest, ome_metadata, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tomocpt_stream.frame import Box, Rule, Shape

Floats = npt.NDArray[np.float32]


def noise(shape: Shape, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(5.0, 20.0, shape).astype(np.float32)


def tomogram(voxels: npt.NDArray[Any], **kwargs: Any) -> Tomogram:
    return open_tomogram(voxels, voxel_size=10.0, **kwargs)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, but for when and by whom a receipt was put."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, data in files.items():
        if name.startswith("receipts/") and name.endswith(".json"):
            facts = {key: fact for key, fact in json.loads(data).items() if key not in circumstances()}
            files[name] = json.dumps(facts).encode()
    return files


def voxels_of(volume: Volume, box: Any = slice(None)) -> Floats:
    return np.asarray(volume.array[box], dtype=np.float32)


class Killed(BaseException):
    """What a test raises in the middle of the work."""


class Trap:
    """Counts calls and raises at one of them; stands in for a progress bar or, with `read`, a reader."""

    def __init__(self, at: int, read: Callable[[Box], Floats] | None = None) -> None:
        self._calls, self._at, self._read = 0, at, read

    def _count(self) -> None:
        self._calls += 1
        if self._calls == self._at:
            raise Killed

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._count()

    def read(self, box: Box) -> Floats:
        self._count()
        assert self._read is not None
        return self._read(box)


@pytest.mark.parametrize("ratio", [1.0, 0.8, 1.45, 2.0])
@pytest.mark.parametrize("rule", ["bspline", "tomocpt"])
def test_a_volume_is_the_tomogram_on_the_working_grid(tmp_path: Path, ratio: float, rule: Rule) -> None:
    source = noise((40, 130, 90))
    volume = ingest(tomogram(source, name="TS_1"), tmp_path / "v", voxel_size=10.0 * ratio, rule=rule)
    grid = working_grid((40, 130, 90), 10.0, 10.0 * ratio, rule)
    wanted = resample_box(lambda box: source[box], grid, source.shape, whole(grid.shape), rule)
    assert volume.array.dtype == np.float32
    assert voxels_of(volume).tobytes() == wanted.tobytes()
    assert (volume.shape, volume.voxel_size, volume.grid) == (grid.shape, grid.voxel_size, grid)
    assert (volume.name, volume.source_shape, volume.source_voxel_size) == ("TS_1", (40, 130, 90), 10.0)
    assert (volume.fill, volume.fill_values, volume.remarks) == (None, (), ())
    measured = source if rule == "tomocpt" else wanted
    p5, p50, p95 = np.percentile(measured.astype(np.float64), [5, 50, 95])
    np.testing.assert_allclose(volume.percentiles, [p5, p50, p95], atol=1e-6 * (p95 - p5), rtol=0)


@settings(deadline=None, max_examples=12)
@given(
    shape=st.tuples(st.integers(3, 90), st.integers(20, 140), st.integers(20, 140)),
    ratio=st.sampled_from([1.0, 0.9, 1.3, 2.5]),
    budget=st.integers(1 << 12, 1 << 23),
    seed=st.integers(0, 99),
    filled=st.booleans(),
)
def test_tiles_and_interruptions_change_no_byte(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, ratio: float, budget: int, seed: int, filled: bool
) -> None:
    source = noise(shape, seed)
    if filled:
        source[:, : shape[1] // 3] = 0.0
    folder = tmp_path_factory.mktemp("volumes")
    wanted = ingest(tomogram(source), folder / "once", voxel_size=10.0 * ratio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_BYTES", budget)
        for at in (2, 4, 7):
            try:
                ingest(tomogram(source), folder / "cut", voxel_size=10.0 * ratio, progress=Trap(at))
            except Killed:
                with pytest.raises(CheckpointError, match="not finished"):
                    open_volume(folder / "cut")
        found = ingest(tomogram(source), folder / "cut", voxel_size=10.0 * ratio)
    assert tree(folder / "cut") == tree(folder / "once")
    assert found.percentiles == wanted.percentiles


def test_a_run_goes_on_with_the_chunks_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noise((70, 140, 130))
    once = ingest(tomogram(source), tmp_path / "once", voxel_size=10.0)
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 64**3)
    reader = tomogram(source)
    monkeypatch.setattr(reader, "read", Trap(13, reader.read).read)
    with pytest.raises(Killed):
        ingest(reader, tmp_path / "cut", voxel_size=10.0)
    done = len(list((tmp_path / "cut" / "receipts" / "volume").iterdir()))
    assert 0 < done < 18
    # What has a receipt is not written again.
    chunks = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "0" / "c").rglob("*") if path.is_file()
    }
    reports: list[tuple[str, int, int]] = []
    ingest(
        tomogram(source), tmp_path / "cut", voxel_size=10.0, progress=lambda *report: reports.append(report)
    )
    assert sum(path.stat().st_mtime_ns == then for path, then in chunks.items()) >= done
    assert tree(tmp_path / "cut") == tree(tmp_path / "once")
    first = next(report for report in reports if report[0] == "ingest")
    assert 0 < first[1] < first[2] == once.array.size
    assert ("ingest", once.array.size, once.array.size) in reports
    assert reports[-1] == ("statistics", 2 * once.array.size, 2 * once.array.size)


KILLED = """
import os, signal, sys
import numpy as np
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import ingest

calls = 0

def progress(stage, done, total):
    global calls
    calls += 1
    if stage == sys.argv[2] and calls > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

source = np.random.default_rng(0).normal(5.0, 20.0, (70, 140, 130)).astype(np.float32)
source[:, :20] = 0.0
ingest(open_tomogram(source, voxel_size=10.0), sys.argv[1], voxel_size=12.0, progress=progress)
"""


@pytest.mark.parametrize(("stage", "calls"), [("fill", 0), ("ingest", 6), ("statistics", 0)])
def test_a_killed_process_is_gone_on_with(tmp_path: Path, stage: str, calls: int) -> None:
    source = noise((70, 140, 130))
    source[:, :20] = 0.0
    ingest(tomogram(source), tmp_path / "once", voxel_size=12.0)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cut"), stage, str(calls)], check=False, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    litter = tmp_path / "cut" / "0" / "c" / "0.deadbeef.partial"
    litter.parent.mkdir(parents=True, exist_ok=True)
    litter.write_bytes(b"half a chunk")
    another_writer = litter.with_name("0.feed.partial")
    another_writer.write_bytes(b"half a chunk")
    for path, age in ((litter, 90), (another_writer, 30)):
        os.utime(path, (time.time() - age,) * 2)
    ends_meanwhile = litter.with_name("0.cafe.partial")
    ends_meanwhile.symlink_to("nowhere")  # listed, and not there when it is looked at
    ingest(tomogram(source), tmp_path / "cut", voxel_size=12.0)
    ends_meanwhile.unlink()
    another_writer.unlink()
    assert tree(tmp_path / "cut") == tree(tmp_path / "once")


def test_a_finished_store_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = noise((20, 30, 40))
    first = ingest(tomogram(source), tmp_path / "v", voxel_size=12.0)
    reader = tomogram(source)
    monkeypatch.setattr(reader, "read", lambda box: pytest.fail(f"{box} is read"))
    again = ingest(reader, tmp_path / "v", voxel_size=12.0)
    assert again.percentiles == first.percentiles
    assert again.fingerprint == first.fingerprint
    assert open_volume(tmp_path / "v").frame == tomogram(source).frame


def test_a_finished_store_answers_by_the_name_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("A", "B"):
        source = open_tomogram(noise((20, 30, 40)), voxel_size=10.0, name=name)
        assert ingest(source, tmp_path / "v", voxel_size=12.0).name == name


def test_a_store_made_with_other_parameters_is_refused(tmp_path: Path) -> None:
    source = noise((20, 30, 40))
    ingest(tomogram(source), tmp_path / "v", voxel_size=12.0)
    before = tree(tmp_path / "v")
    with pytest.raises(CheckpointError, match=r"voxel_size = 12\.0 \(now 13\.0\)"):
        ingest(tomogram(source), tmp_path / "v", voxel_size=13.0)
    with pytest.raises(CheckpointError, match=r"rule = 'bspline' \(now 'tomocpt'\)"):
        ingest(tomogram(source), tmp_path / "v", voxel_size=12.0, rule="tomocpt")
    with pytest.raises(CheckpointError, match=r"tomogram\.shape"):
        ingest(tomogram(source[:19]), tmp_path / "v", voxel_size=12.0)
    with pytest.raises(CheckpointError, match=r"tomogram\.sha256"):
        ingest(tomogram(source + 1), tmp_path / "v", voxel_size=12.0)
    assert tree(tmp_path / "v") == before
    assert ingest(tomogram(source), tmp_path / "v", voxel_size=12).voxel_size == 12.0


def test_foreign_data_is_neither_opened_nor_overwritten(tmp_path: Path) -> None:
    source = tomogram(noise((20, 30, 40)))
    zarr.create_group(tmp_path / "v3", zarr_format=3, attributes={"tomocpt_stream": {"kind": "heatmap"}})
    zarr.create_group(tmp_path / "v2", zarr_format=2)
    zarr.create_array(tmp_path / "array", shape=(4,), dtype="f4")
    for name in ("v3", "v2", "array"):
        before = tree(tmp_path / name)
        with pytest.raises(CheckpointError, match="not a volume"):
            open_volume(tmp_path / name)
        with pytest.raises(CheckpointError, match="not a volume"):
            ingest(source, tmp_path / name, voxel_size=10.0)
        assert tree(tmp_path / name) == before
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_volume(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointError, match="holds no volume"):
        open_volume(MemoryStore())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_voxels_that_are_not_finite_are_counted(tmp_path: Path, broken: float, ratio: float) -> None:
    source = noise((70, 80, 90))
    source[40, 50, 60] = source[40, 51, 2] = source[69, 79, 89] = broken
    with pytest.raises(SourceError, match=r"3 of 504000 voxels .* z, y, x = 40, 50, 60"):
        ingest(tomogram(source), tmp_path / "v", voxel_size=10.0 * ratio)
    with pytest.raises(CheckpointError, match="not finished"):
        open_volume(tmp_path / "v")


def test_voxels_that_trilinear_sampling_skips_are_counted_too(tmp_path: Path) -> None:
    source = noise((40, 40, 40))
    source[2, 2, 2] = np.nan
    with pytest.raises(SourceError, match="1 of 64000 voxels"):
        ingest(tomogram(source), tmp_path / "v", voxel_size=40.0, rule="tomocpt")


@pytest.mark.parametrize("rule", ["bspline", "tomocpt"])
def test_a_constant_volume_is_an_error(tmp_path: Path, rule: Rule) -> None:
    with pytest.raises(SourceError, match=r"every voxel is fill|100\.0% of the voxels have the value 3"):
        ingest(tomogram(np.full((20, 30, 40), 3.0)), tmp_path / "v", voxel_size=12.0, rule=rule)


@pytest.mark.parametrize("rule", ["bspline", "tomocpt"])
def test_equal_percentiles_say_the_share_of_their_value(tmp_path: Path, rule: Rule) -> None:
    source = noise((60, 60, 60))
    source[1:-1, 1:-1, 1:-1] = 5.0  # inside, so that it is not fill, with as many lower as higher ones around
    with pytest.raises(SourceError, match=r"90\.3% of the voxels have the value 5, so that p5 = p95"):
        ingest(tomogram(source), tmp_path / "v", voxel_size=10.0, rule=rule)


def test_fill_is_left_out_of_the_percentiles(tmp_path: Path) -> None:
    source = noise((30, 140, 150))
    corners = np.zeros(source.shape, bool)
    corners[:, :50, :60] = True
    source[corners] = 0.0
    for ratio in (1.0, 1.3, 2.0):
        volume = ingest(tomogram(source), tmp_path / str(ratio), voxel_size=10.0 * ratio)
        assert volume.fill is not None
        marked = np.asarray(volume.fill[:])
        grid = volume.grid
        wanted = resample_mask(lambda box: corners[box], grid, source.shape, whole(grid.shape))
        np.testing.assert_array_equal(marked, wanted)
        assert volume.fill.chunks == volume.array.chunks
        kept = voxels_of(volume)[~marked].astype(np.float64)
        p5, p50, p95 = np.percentile(kept, [5, 50, 95])
        np.testing.assert_allclose(volume.percentiles, [p5, p50, p95], atol=1e-6 * (p95 - p5), rtol=0)
        assert volume.fill_values == (0.0,)
        assert "14.3% of the voxels, in regions at the faces, are exactly 0" in volume.remarks[0]
        assert np.all(voxels_of(volume)[marked] == 0.0)


@pytest.mark.parametrize("radius", [69.5, 70.0, 64.3, 75.0])
def test_percentiles_are_those_of_the_voxels_inside_a_circular_mask(tmp_path: Path, radius: float) -> None:
    source = noise((30, 140, 140))
    y, x = np.indices(source.shape[1:]) - 69.5
    outside = np.broadcast_to(y**2 + x**2 > radius**2, source.shape)
    source[outside] = 0.0
    volume = ingest(tomogram(source), tmp_path / "v", voxel_size=10.0)
    p5, p50, p95 = np.percentile(source[~outside].astype(np.float64), [5, 50, 95])
    np.testing.assert_allclose(volume.percentiles, [p5, p50, p95], atol=1e-6 * (p95 - p5), rtol=0)
    assert volume.fill is not None
    np.testing.assert_array_equal(volume.fill[:], outside)


def test_the_tomocpt_rule_knows_no_fill(tmp_path: Path) -> None:
    source = noise((30, 40, 50))
    source[:, :20] = 0.0
    volume = ingest(tomogram(source), tmp_path / "v", voxel_size=15.0, rule="tomocpt")
    assert volume.fill is None
    p5, p50, p95 = np.percentile(source.astype(np.float64), [5, 50, 95])
    np.testing.assert_allclose(volume.percentiles, [p5, p50, p95], atol=1e-6 * (p95 - p5), rtol=0)


def test_a_negated_tomogram_is_the_negated_volume(tmp_path: Path) -> None:
    source = noise((30, 70, 80))
    source[:, :20] = 0.0
    dark = ingest(tomogram(source), tmp_path / "dark", voxel_size=13.0)
    bright = ingest(tomogram(-source), tmp_path / "bright", voxel_size=13.0)
    np.testing.assert_array_equal(voxels_of(bright), -voxels_of(dark))
    p5, p50, p95 = dark.percentiles
    assert bright.percentiles == (-p95, -p50, -p5)
    assert dark.fill is not None
    assert bright.fill is not None
    np.testing.assert_array_equal(bright.fill[:], dark.fill[:])


def test_the_store_is_an_ome_zarr_group(tmp_path: Path) -> None:
    ingest(tomogram(noise((20, 30, 40)), name="TS_7"), tmp_path / "v", voxel_size=12.5)
    attributes = json.loads((tmp_path / "v" / "zarr.json").read_text())["attributes"]
    ome = attributes["ome"]
    assert ome["version"] == "0.5"
    (image,) = ome["multiscales"]
    assert image["name"] == "TS_7"
    assert image["axes"] == [{"name": a, "type": "space", "unit": "angstrom"} for a in "zyx"]
    (level,) = image["datasets"]
    assert level["path"] == "0"
    assert level["coordinateTransformations"] == [
        {"type": "scale", "scale": [12.5] * 3},
        {"type": "translation", "translation": [1.25] * 3},
    ]
    again = open_tomogram(tmp_path / "v")
    assert (again.shape, again.voxel_size) == ((16, 24, 32), 12.5)
    ours = attributes["tomocpt_stream"]
    assert ours["frame"]["shape"] == [20, 30, 40]
    assert ours["config"]["tomogram"]["shape"] == [20, 30, 40]


def _frame(shape: tuple[int, int, int]) -> Frame:
    return Frame(shape, 10.0, shape, 10.0)


def test_a_coarser_level_lies_where_its_blocks_have_their_middle() -> None:
    frame = Frame((10, 10, 10), 20.0, (20, 20, 20), 10.0, level_scale=(2.0,) * 3, level_shift=(0.5,) * 3)
    grid = working_grid(frame.shape, 20.0, 30.0)
    (image,) = ome_metadata("t", grid, frame)["multiscales"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    for working in ([0, 0, 0], [3, 2, 5]):
        level_0 = frame.to_file(grid.to_source([working]))[0]
        place = np.array(working) * scale["scale"] + translation["translation"]
        np.testing.assert_allclose(place, level_0 * 10.0)


def test_metadata_places_the_working_voxels_by_their_own_spacing() -> None:
    grid = working_grid((20, 31, 40), 10.0, 14.7, "tomocpt")
    (image,) = ome_metadata("t", grid, _frame((20, 31, 40)))["multiscales"]
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    index = np.array([[3.0, 5.0, 7.0]])
    placed = index * scale["scale"] + translation["translation"]
    np.testing.assert_allclose(placed, grid.to_source(index) * 10.0, rtol=1e-12)


def test_a_volume_travels_by_its_address(tmp_path: Path) -> None:
    volume = ingest(tomogram(noise((70, 30, 40))), tmp_path / "v", voxel_size=10.0)
    parcel = pickle.dumps(volume)
    assert len(parcel) < 1000
    again = pickle.loads(parcel)
    np.testing.assert_array_equal(again.array[:], volume.array[:])
    lazy = volume.to_dask()
    assert lazy.chunks == ((64, 6), (30,), (40,))
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), volume.array[:])


def test_any_zarr_store_will_do() -> None:
    source = noise((30, 40, 50))
    store = MemoryStore()
    volume = ingest(tomogram(source), store, voxel_size=10.0)
    assert voxels_of(volume).tobytes() == source.tobytes()
    assert open_volume(store).store is store


def test_a_lost_chunk_is_never_zeros(tmp_path: Path) -> None:
    source = noise((70, 80, 90))
    ingest(tomogram(source), tmp_path / "v", voxel_size=10.0)
    (tmp_path / "v" / "0" / "c" / "1" / "0" / "1").unlink()
    volume = open_volume(tmp_path / "v")
    with pytest.raises(CheckpointError, match=r"/v has lost its object 0/c/1/0/1; .* delete this store"):
        voxels_of(volume)
    assert voxels_of(volume, (slice(0, 64), slice(0, 80), slice(0, 90))).tobytes() == source[:64].tobytes()
    with pytest.raises(Killed):
        ingest(tomogram(source), tmp_path / "w", voxel_size=10.0, progress=Trap(9))
    lost = next(path for path in sorted((tmp_path / "w" / "0" / "c").rglob("*")) if path.is_file())
    key = ".".join(lost.relative_to(tmp_path / "w" / "0" / "c").parts)
    assert (tmp_path / "w" / "receipts" / "volume" / f"{key}.json").is_file()
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"has lost its object 0/c/{key.replace('.', '/')};"):
        ingest(tomogram(source), tmp_path / "w", voxel_size=10.0)


class Meanwhile:
    """Does something as the voxels of a certain tile are read; has the `read` and `progress` for it."""

    def __init__(self, reader: Tomogram, tile: int, action: Callable[[], object]) -> None:
        self.tiles: list[Box] = []
        self.reports: list[tuple[str, int, int]] = []
        self._read, self._when, self._action = reader.read, tile, action

    def progress(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))

    def read(self, box: Box) -> Floats:
        if self.reports[-1][0] == "ingest":
            self.tiles.append(box)
            if len(self.tiles) == self._when:
                self._action()
        return self._read(box)


@pytest.mark.parametrize("field", ["sha256", "fill_sha256"])
def test_a_chunk_that_comes_out_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    source = noise((70, 80, 90))
    source[:, :20] = 0.0
    once = ingest(tomogram(source), tmp_path / "once", voxel_size=10.0)
    receipt = json.loads((tmp_path / "once" / "receipts" / "volume" / "1.1.1.json").read_text())
    assert set(receipt) == {"sha256", "fill_sha256", *circumstances()}
    assert receipt["sha256"] == hashlib.sha256(voxels_of(once)[64:, 64:, 64:].tobytes()).hexdigest()

    def another_writer() -> None:
        place = tmp_path / "v" / "receipts" / "volume" / "1.1.1.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({**receipt, "worker": "host:7", field: "of other voxels"}))

    reader = tomogram(source)
    meanwhile = Meanwhile(reader, 1, another_writer)
    monkeypatch.setattr(reader, "read", meanwhile.read)
    with pytest.raises(DuplicateError, match=r"chunk 1\.1\.1 of tomogram .* of host:7 on"):
        ingest(reader, tmp_path / "v", voxel_size=10.0, progress=meanwhile.progress)


def test_what_another_run_stores_meanwhile_is_not_stored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noise((140, 80, 90))
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 64 * 80 * 90)  # a tile is one layer of chunks, of three
    monkeypatch.setattr(threads, "THREADS", 1)
    reader, store = tomogram(source), tmp_path / "v"
    meanwhile = Meanwhile(reader, 2, lambda: ingest(tomogram(source), store, voxel_size=10.0))
    monkeypatch.setattr(reader, "read", meanwhile.read)
    volume = ingest(reader, store, voxel_size=10.0, progress=meanwhile.progress)
    assert voxels_of(volume).tobytes() == source.tobytes()
    assert [box[0].start for box in meanwhile.tiles] == [0, 64]  # the third was there when its turn came
    done = [done for stage, done, _ in meanwhile.reports if stage == "ingest"]
    assert done == sorted(done)
    assert done[-1] == source.size


def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tomogram(noise((20, 30, 40)))
    for size in (0.0, -3.0, float("nan")):
        with pytest.raises(PlanError, match="working voxel size"):
            ingest(source, tmp_path / "v", voxel_size=size)
    with pytest.raises(PlanError, match="rule 'cubic'"):
        ingest(source, tmp_path / "v", voxel_size=10.0, rule="cubic")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="which only this process can use"):
        ingest(source, MemoryStore(), voxel_size=10.0, client=object())
    assert not (tmp_path / "v").exists()


def test_the_source_is_read_little_and_in_small_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noise((130, 130, 200))
    budget = 4 << 20
    monkeypatch.setattr(tiles, "TILE_BYTES", budget)
    for ratio, most in ((1.0, 1.0), (2.0, 1.6)):
        reader = tomogram(source)
        boxes: list[Box] = []
        read = reader.read

        def counted(box: Box, read: Any = read, boxes: list[Box] = boxes) -> Floats:
            boxes.append(box)
            return np.asarray(read(box))

        monkeypatch.setattr(reader, "read", counted)
        ingest(reader, tmp_path / str(ratio), voxel_size=10.0 * ratio)
        sizes = [tiles.voxels_of(box) for box in boxes]
        faces = 2 * (130 * 130 + 2 * 130 * 200)
        assert sum(sizes) <= most * source.size + faces + 1000
        assert 4 * max(sizes) <= budget


def test_a_tomogram_file_becomes_a_volume(shared_data: Path, tmp_path: Path) -> None:
    source = open_tomogram(shared_data / "real" / "tardis" / "rec3D.rec", voxel_size=15.7)
    volume = ingest(source, tmp_path / "v", voxel_size=25.0)
    p5, p50, p95 = np.percentile(voxels_of(volume).astype(np.float64), [5, 50, 95])
    if volume.fill is None:
        np.testing.assert_allclose(volume.percentiles, [p5, p50, p95], atol=1e-6 * (p95 - p5), rtol=0)
    assert volume.frame == source.frame


INTERRUPTIONS = [
    ("get", "zarr.json"),
    ("put", "zarr.json"),
    ("get", "0/zarr.json"),
    ("set", "0/zarr.json"),
    ("get", "fill/zarr.json"),
    ("put", "receipts/volume/0.0.0.json"),
    ("set", "0/c/0/0/0"),
]


@pytest.mark.parametrize(("method", "key"), INTERRUPTIONS)
def test_another_run_in_between_changes_nothing(tmp_path: Path, method: str, key: str) -> None:
    source = noise((70, 80, 90))
    source[:, :20] = 0.0
    ingest(tomogram(source), tmp_path / "once", voxel_size=12.0)
    other = LocalStore(tmp_path / "both")
    store = Interrupted(other, method, key, lambda: ingest(tomogram(source), other, voxel_size=12.0))
    volume = ingest(tomogram(source), store, voxel_size=12.0)
    assert store.happened
    assert volume.percentiles == open_volume(tmp_path / "once").percentiles
    assert tree(tmp_path / "both") == tree(tmp_path / "once")


@pytest.mark.parametrize(("method", "key"), INTERRUPTIONS[:2])
def test_one_of_two_claims_with_other_parameters_is_refused(tmp_path: Path, method: str, key: str) -> None:
    source = noise((20, 30, 40))
    other = LocalStore(tmp_path / "v")
    store = Interrupted(other, method, key, lambda: ingest(tomogram(source), other, voxel_size=13.0))
    with pytest.raises(CheckpointError, match=r"voxel_size = 13\.0 \(now 12\.0\)"):
        ingest(tomogram(source), store, voxel_size=12.0)
    assert open_volume(other).voxel_size == 13.0


AT_ONCE = """
import numpy as np
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import ingest

source = np.random.default_rng(0).normal(5.0, 20.0, (70, 80, 90)).astype(np.float32)
source[:, :20] = 0.0
for number in range(5):
    meet(number)
    volume = ingest(open_tomogram(source, voxel_size=10.0), f"{sys.argv[4]}{number}", voxel_size=12.0)
print(json.dumps(volume.percentiles))
"""


def test_two_processes_ingest_into_one_store_at_once(tmp_path: Path) -> None:
    source = noise((70, 80, 90))
    source[:, :20] = 0.0
    once = ingest(tomogram(source), tmp_path / "once", voxel_size=12.0)
    assert race(AT_ONCE, tmp_path / "gate", str(tmp_path / "v")) == [list(once.percentiles)] * 2
    for number in range(5):
        assert tree(tmp_path / f"v{number}") == tree(tmp_path / "once")


@pytest.mark.parametrize(
    ("machine", "off", "fails"), [("other", 1e-7, False), ("other", 1e-2, True), ("", 1e-7, True)]
)
def test_chunks_of_unlike_machines_may_differ_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, off: float, fails: bool
) -> None:
    source = noise((70, 80, 90))
    once = ingest(tomogram(source), tmp_path / "once", voxel_size=10.0)
    theirs = voxels_of(once)[64:, 64:, 64:] * np.float32(1 + off)
    receipt = json.loads((tmp_path / "once" / "receipts" / "volume" / "1.1.1.json").read_text())
    receipt |= {"sha256": hashlib.sha256(theirs.tobytes()).hexdigest(), "worker": "host:7"}
    receipt |= {"machine": machine} if machine else {}

    def another_writer() -> None:
        (tmp_path / "v" / "receipts" / "volume").mkdir(parents=True)
        zarr.open_array(tmp_path / "v", path="0", mode="r+")[64:, 64:, 64:] = theirs
        (tmp_path / "v" / "receipts" / "volume" / "1.1.1.json").write_text(json.dumps(receipt))

    reader = tomogram(source)
    meanwhile = Meanwhile(reader, 1, another_writer)
    monkeypatch.setattr(reader, "read", meanwhile.read)
    with pytest.raises(DuplicateError) if fails else nullcontext():
        made = ingest(reader, tmp_path / "v", voxel_size=10.0, progress=meanwhile.progress)
        assert voxels_of(made)[64:, 64:, 64:].tobytes() == theirs.tobytes()  # the first stays
