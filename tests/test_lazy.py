"""Heat maps and stored arrays as dask arrays: the same bytes, read and scored when they are asked for."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import cloudpickle
import dask.base
import dask.local
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from tests.mrc_writer import write_mrc
from tests.scorers import SMALL, Identity, PlaceDependent
from tomocpt_stream import lazy, scan
from tomocpt_stream.blocks import plan_blocks
from tomocpt_stream.errors import BrokenSourceError, PlanError, SourceError
from tomocpt_stream.heatmap import Heatmap, PickOptions, open_heatmap, predict
from tomocpt_stream.lazy import heatmap_lazy
from tomocpt_stream.pipeline import pick, plan_pick
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import Volume, ingest, open_volume
from tomocpt_stream.windows import Rows

if TYPE_CHECKING:
    import numpy.typing as npt
    from distributed import Client

    from tests.scorers import Batch

    Floats = npt.NDArray[np.float32]

# Chunks of 100 voxels: two along z and x. The particle is 60 Å, 6 voxels of 10 Å, as the pickers want it.
SHAPE = (104, 20, 112)
CHUNKS = ((100, 4), (20,), (100, 12))
OPTIONS = PickOptions(60.0, batch_size=3, contrast="dark")
CROP = PickOptions(60.0, batch_size=3, stitch="crop", contrast="dark")
NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def in_memory(array: Floats = NOISE, voxel_size: float = 10.0) -> Tomogram:
    return open_tomogram(array, voxel_size=voxel_size, name="TS_01")


def in_a_file(folder: Path) -> Tomogram:
    return open_tomogram(write_mrc(folder / "TS_01.mrc", NOISE), voxel_size=10.0)


def stored(folder: Path, tomogram: Tomogram, options: PickOptions, **settings: Any) -> Floats:
    """The map that `pick` stores."""
    pick(tomogram, PlaceDependent(), options, keep_heatmap=folder / "map.zarr", **settings)
    found: Floats = open_heatmap(folder / "map.zarr").array[:]  # type: ignore[assignment]
    return found


def on_threads(*arrays: Any) -> list[Floats]:
    return compute(*arrays, scheduler="threads", num_workers=4)


def compute(*arrays: Any, **how: Any) -> list[Floats]:
    return list(dask.base.compute(*arrays, **how))


@pytest.mark.parametrize(
    ("options", "voxel_size"),
    [
        (OPTIONS, 10.0),
        (PickOptions(60.0, stitch="crop", batch_size=4, contrast="bright"), 8.0),
        (PickOptions(60.0, stitch="gaussian", batch_size=2, tta=True, contrast="dark"), 10.0),
    ],
    ids=["hann", "crop bright resampled", "gaussian tta"],
)
def test_a_lazy_map_is_the_stored_one(tmp_path: Path, options: PickOptions, voxel_size: float) -> None:
    tomogram = in_memory(voxel_size=voxel_size)
    whole = stored(tmp_path, tomogram, options)
    scores = heatmap_lazy(tomogram, PlaceDependent(), options)
    assert scores.shape == whole.shape
    assert scores.chunks == open_heatmap(tmp_path / "map.zarr").to_dask().chunks
    assert voxel_size != 10.0 or scores.chunks == CHUNKS
    assert scores.dtype == np.float32
    (found,) = on_threads(scores)
    assert found.tobytes() == whole.tobytes()
    assert np.unique(found).size > 10_000


def test_a_lazy_map_follows_the_rule_of_the_picker(tmp_path: Path) -> None:
    tomogram, picker, other = in_memory(voxel_size=8.0), PlaceDependent(), PlaceDependent()
    picker.rule = "tomocpt"  # type: ignore[attr-defined]
    pick(tomogram, picker, OPTIONS, keep_heatmap=tmp_path / "map.zarr")
    found, bspline = on_threads(*(heatmap_lazy(tomogram, each, OPTIONS) for each in (picker, other)))
    whole: Floats = open_heatmap(tmp_path / "map.zarr").array[:]  # type: ignore[assignment]
    assert found.tobytes() == whole.tobytes()
    assert found.tobytes() != bspline.tobytes()


def test_fill_and_what_a_mask_leaves_out_are_zero(tmp_path: Path) -> None:
    array = NOISE.copy()
    array[:, :, :36] = -4.0
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[20:] = 1
    whole = stored(tmp_path, in_memory(array), OPTIONS, mask=mask)
    (found,) = on_threads(heatmap_lazy(in_memory(array), PlaceDependent(), OPTIONS, mask=mask))
    assert found.tobytes() == whole.tobytes()
    assert not found[:, :, :20].any()
    assert not found[:7].any()
    assert found[30:, :, 50:].all()


def test_the_call_reads_the_header_alone(tmp_path: Path) -> None:
    tomogram, picker = in_a_file(tmp_path), PlaceDependent()
    with patch.object(Tomogram, "read", side_effect=AssertionError("a voxel was read")):
        heatmap_lazy(tomogram, picker, OPTIONS, scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    assert picker.batches == 0


def test_only_the_chunks_that_a_slice_touches_are_scored(tmp_path: Path) -> None:
    picker = PlaceDependent()
    plan = replace(plan_pick(in_memory(), picker, OPTIONS)[1], group=(1, 1, 1))
    assert [len(axis) for axis in plan.tasks.axes] == [2, 1, 2]
    batches = [math.ceil(task.window_count / OPTIONS.batch_size) for task in plan.tasks]
    scores = heatmap_lazy(in_memory(), picker, OPTIONS, scratch=tmp_path)
    whole = stored(tmp_path, in_memory(), OPTIONS)
    for box, chunks in (
        ((slice(40, 60), slice(0, 9), slice(0, 96)), [0]),
        ((slice(102, 104), slice(3, 5), slice(101, 103)), [3]),
        ((slice(60, 101), slice(7, 8), slice(100, 112)), [1, 3]),
    ):
        picker.batches = 0
        (found,) = on_threads(scores[box])
        np.testing.assert_array_equal(found, whole[box])
        assert picker.batches == sum(batches[chunk] for chunk in chunks)


def test_a_scratch_is_shared_with_pick(tmp_path: Path) -> None:
    with patch.object(Tomogram, "read", autospec=True, side_effect=Tomogram.read) as reads:
        first = on_threads(heatmap_lazy(in_memory(), PlaceDependent(), CROP, scratch=tmp_path))
        assert reads.call_count > 0
        reads.reset_mock()
        second = on_threads(heatmap_lazy(in_memory(), PlaceDependent(), CROP, scratch=tmp_path))
        pick(in_memory(), PlaceDependent(), CROP, scratch=tmp_path)
        assert reads.call_count == 0
    assert first[0].tobytes() == second[0].tobytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_without_scratch_the_folder_goes_with_the_process(tmp_path: Path) -> None:
    code = """
        import os, pathlib
        from tests.test_lazy import CROP, PlaceDependent, heatmap_lazy, in_memory
        scores = heatmap_lazy(in_memory(), PlaceDependent(), CROP)
        scores[:9].compute(scheduler="threads")
        (folder,) = pathlib.Path(os.environ["TMPDIR"]).iterdir()
        assert list(folder.glob("*/volume.zarr/zarr.json"))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_fork_of_the_process_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    lazy._remove(tmp_path / "folder", os.getpid() + 1)
    assert (tmp_path / "folder").is_dir()
    lazy._remove(tmp_path / "folder", os.getpid())
    assert not (tmp_path / "folder").exists()


class Heavy(PlaceDependent):
    """A picker of a megabyte."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = np.random.default_rng(0).bytes(1_000_000)


def test_a_graph_of_many_chunks_is_a_few_kilobytes(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path), shape=(1000, 4000, 4000), chunks=(64, 64, 64), dtype="int8")
    scores = heatmap_lazy(open_tomogram(tmp_path, voxel_size=10.0), Heavy(), OPTIONS)
    assert scores.npartitions == 10 * 40 * 40
    assert len(cloudpickle.dumps(scores.dask)) < 1_000_000 + 8_000


LOADED: list[str] = []


def _load(name: str) -> Addressed:
    LOADED.append(name)
    return Addressed(name)


class Addressed(PlaceDependent):
    """A picker that is pickled by its name; `LOADED` says how often that was loaded in this process."""

    def __init__(self, name: str, window: Any = SMALL) -> None:
        super().__init__(window)
        self.fingerprint = name

    def __reduce__(self) -> tuple[object, ...]:
        return (_load, (self.fingerprint,))


def test_a_graph_that_travels_stays_sealed_and_loads_its_picker_once(tmp_path: Path) -> None:
    whole = stored(tmp_path, in_memory(), CROP)
    array = heatmap_lazy(in_memory(), Addressed("travels"), CROP)
    other = heatmap_lazy(in_memory(), Addressed("travels"), OPTIONS)
    with patch.object(Tomogram, "__setstate__", create=True, side_effect=AssertionError("unpickled")):
        passed_on = pickle.loads(cloudpickle.dumps(array))
        twice = pickle.loads(cloudpickle.dumps([passed_on, other]))
    assert not LOADED
    found = on_threads(*twice)
    assert found[0].tobytes() == whole.tobytes()
    assert LOADED == ["travels"]


class Guarded(PlaceDependent):
    """A picker that notices when two threads call it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Lock()

    def score(self, batch: Batch) -> Batch:
        assert self.busy.acquire(blocking=False), "two threads at once"
        time.sleep(0.0005)
        try:
            return super().score(batch)
        finally:
            self.busy.release()


@pytest.mark.parametrize("name", ["guarded", None])
def test_one_thread_at_a_time_calls_a_picker_of_several_maps(name: str | None) -> None:
    picker = Guarded()
    picker.fingerprint = name  # type: ignore[assignment]
    maps = [heatmap_lazy(in_memory(), picker, replace(CROP, contrast=c)) for c in ("dark", "bright")]
    dark, bright = on_threads(*maps)
    assert dark.shape == bright.shape == SHAPE
    assert picker.batches == 2 * sum(
        math.ceil(task.window_count / 3)
        for task in replace(plan_pick(in_memory(), picker, CROP)[1], group=(1, 1, 1)).tasks
    )


def test_one_chunk_is_scored_while_one_other_reads_ahead() -> None:
    alive: list[Rows] = []
    most = 0
    two = threading.Event()

    class Counted(Rows):
        def __enter__(self) -> Counted:
            nonlocal most
            alive.append(self)
            most = max(most, len(alive))
            if len(alive) == 2:
                two.set()
            super().__enter__()
            return self

        def __exit__(self, *why: object) -> None:
            alive.remove(self)
            super().__exit__(*why)

    class Waiting(PlaceDependent):
        def score(self, batch: Batch) -> Batch:
            two.wait(20)  # the first chunk is not done before a second one reads
            return super().score(batch)

    array = np.random.default_rng(0).normal(size=(10, 20, 320)).astype(np.float32)  # one row of windows
    with patch.object(scan, "Rows", Counted):
        on_threads(heatmap_lazy(in_memory(array), Waiting(), OPTIONS))
    assert two.is_set()
    assert most == 2


def test_equal_maps_share_a_name_and_others_do_not(tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        asked = {"tomogram": in_memory(), "picker": PlaceDependent(), "options": OPTIONS, "scratch": tmp_path}
        return str(heatmap_lazy(**{**asked, **changes}).name)

    shifted = PlaceDependent()
    shifted.fingerprint = "shifted"
    mask = np.ones(SHAPE, dtype=np.uint8)
    names = [
        name(),
        name(scratch=None),
        name(tomogram=in_memory(NOISE * 2)),
        name(picker=shifted),
        name(mask=mask),
        name(mask=1 - mask),
        name(options=replace(OPTIONS, contrast="bright")),
        name(options=replace(OPTIONS, stitch="crop")),
        name(options=replace(OPTIONS, tta=True)),
        name(options=replace(OPTIONS, batch_size=4)),
        name(options=PickOptions(50.0, batch_size=3, contrast="dark")),
    ]
    assert len(set(names)) == len(names)
    # neither a threshold nor how picks are spaced changes a score
    assert name(options=replace(OPTIONS, threshold=0.9, min_distance=7.0, margin=90.0)) == names[0]
    nameless = PlaceDependent()
    nameless.fingerprint = None  # type: ignore[assignment]
    assert name(picker=nameless) != name(picker=nameless)


def test_a_folder_that_is_not_seen_is_named(tmp_path: Path) -> None:
    with patch.object(lazy, "_own_folder", return_value=tmp_path / "elsewhere"):
        scores = heatmap_lazy(in_memory(), PlaceDependent(), CROP)
    with pytest.raises(PlanError, match=r"does not see the folder .*/elsewhere; .* pass scratch"):
        on_threads(scores)
    assert not (tmp_path / "elsewhere").exists()
    scores = heatmap_lazy(in_memory(), PlaceDependent(), CROP, scratch=tmp_path / "scratch")
    (key,) = (key for key in dict(scores.dask) if isinstance(key, str))
    ingested = dask.local.get_sync(dict(scores.dask), key)
    block = ingested.chunk((1, 0, 1))
    assert (block.shape, block.base) == ((4, 20, 12), None)  # a view would hold the scores around it
    shutil.rmtree(tmp_path / "scratch")
    with pytest.raises(PlanError, match=r"does not see the folder .*/scratch/TS_01-.*; .* pass scratch"):
        pickle.loads(pickle.dumps(ingested)).chunk((0, 0, 0))


def test_scores_and_voxels_that_are_no_numbers_are_named() -> None:
    class Broken(PlaceDependent):
        def score(self, batch: Batch) -> Batch:
            return super().score(batch) * np.float32("nan")

    with pytest.raises(
        SourceError, match=r"scores of TS_01 in the chunk .*slice\(100, 112.* not all numbers"
    ):
        on_threads(heatmap_lazy(in_memory(), Broken(), CROP)[:3, :3, 100:])
    array = NOISE.copy()
    array[3, 4, 5] = np.inf
    with pytest.raises(SourceError, match=r"the first at z, y, x = 3, 4, 5"):
        on_threads(heatmap_lazy(in_memory(array), PlaceDependent(), CROP)[:3])


class OnDisk(PlaceDependent):
    """A picker that writes down which process loads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.fingerprint = f"on disk {path}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with Path(self.path).open("a") as log:
            log.write(f"{os.getpid()}\n")


def test_a_cluster_computes_the_same_and_loads_a_picker_once_a_worker(
    tmp_path: Path, workers: Client
) -> None:
    tomogram, log = in_a_file(tmp_path), tmp_path / "loaded"
    whole = stored(tmp_path, tomogram, OPTIONS)
    log.touch()
    scores = heatmap_lazy(tomogram, OnDisk(str(log)), OPTIONS)
    assert not log.read_text()
    part = scores[40:60, :, 90:].compute()  # the client is the default one
    assert part.tobytes() == whole[40:60, :, 90:].tobytes()
    again = workers.compute(heatmap_lazy(tomogram, OnDisk(str(log)), OPTIONS, scratch=tmp_path / "scratch"))
    assert again.result().tobytes() == whole.tobytes()
    loaded = log.read_text().split()
    assert 1 <= len(loaded) == len(set(loaded)) <= 2
    assert str(os.getpid()) not in loaded


def test_a_tomogram_and_a_picker_in_memory_travel(tmp_path: Path, workers: Client) -> None:
    class Local(PlaceDependent):  # no worker can import it
        pass

    picker = Local()
    picker.fingerprint = None  # type: ignore[assignment]
    mask = np.ones(SHAPE, dtype=bool)
    mask[:30] = False
    whole = stored(tmp_path, in_memory(), CROP, mask=mask)
    scores = heatmap_lazy(in_memory(), picker, CROP, mask=mask)
    assert workers.compute(scores).result().tobytes() == whole.tobytes()
    assert picker.batches == 0


def volume_and_map(folder: str | Path) -> tuple[Volume, Heatmap]:
    volume = ingest(in_memory(), Path(folder) / "volume.zarr", voxel_size=10.0)
    plan = plan_blocks(volume.shape, SMALL, stitch="crop", batch_size=3)
    return volume, predict(volume, Identity(), plan, store=Path(folder) / "map.zarr", options=CROP)


def test_stored_arrays_are_read_by_threads_processes_and_clusters(
    tmp_path: Path, workers: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers have another working directory
    volume, heatmap = volume_and_map(".")
    sources = [open_tomogram("volume.zarr/0", voxel_size=10.0), in_a_file(tmp_path)]
    with patch.object(LocalStore, "get", side_effect=AssertionError("an object was read")):
        arrays = [volume.to_dask(), heatmap.to_dask(), *(source.to_dask() for source in sources)]
    assert arrays[0].chunks == arrays[2].chunks == ((64, 40), (20,), (64, 48))
    assert arrays[1].chunks == CHUNKS
    assert arrays[3].chunksize == sources[1].chunks
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    whole = heatmap_lazy(sources[1], PlaceDependent(), CROP, scratch="scratch")
    assert whole.name == heatmap_lazy(sources[1], PlaceDependent(), CROP, scratch=tmp_path / "scratch").name
    part = whole[101:, :, 101:]
    scores = np.asarray(heatmap.array[:])
    for found in (
        on_threads(*arrays, part),
        compute(*arrays, part, scheduler="processes", num_workers=1),
        workers.gather(workers.compute([*arrays, part])),
    ):
        assert [one.tobytes() for one in found[:4]] == [
            each.tobytes() for each in (NOISE, scores, NOISE, NOISE)
        ]
        np.testing.assert_array_equal(found[4], on_threads(part)[0])


def test_equal_stored_arrays_share_a_name(tmp_path: Path) -> None:
    volume, heatmap = volume_and_map(tmp_path)
    assert open_volume(tmp_path / "volume.zarr").to_dask().name == volume.to_dask().name
    assert ingest(in_memory(), MemoryStore(), voxel_size=10.0).to_dask().name == volume.to_dask().name
    assert ingest(in_memory(), MemoryStore(), voxel_size=20.0).to_dask().name != volume.to_dask().name
    name = heatmap.to_dask().name
    assert open_heatmap(tmp_path / "map.zarr").to_dask().name == name
    # The same configuration elsewhere may have been scored by another device.
    shutil.copytree(tmp_path / "map.zarr", tmp_path / "copy.zarr")
    assert open_heatmap(tmp_path / "copy.zarr").to_dask().name != name
    shutil.rmtree(tmp_path / "map.zarr")
    plan = plan_blocks(volume.shape, SMALL, stitch="crop", batch_size=3)
    other = predict(volume, PlaceDependent(), plan, store=tmp_path / "map.zarr", options=CROP)
    assert other.to_dask().name != name


def test_a_source_that_is_not_where_the_array_travelled_to_is_no_fill(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path / "t.zarr"), shape=(9, 9, 9), chunks=(3, 9, 9), dtype="float32")
    lacking = open_tomogram(tmp_path / "t.zarr", voxel_size=10.0, missing="fill").to_dask()
    assert not on_threads(lacking)[0].any()
    shutil.rmtree(tmp_path / "t.zarr")
    with pytest.raises(BrokenSourceError, match=r"finds no array at .*/t\.zarr"):
        on_threads(pickle.loads(pickle.dumps(lacking)))
