"""Volumes made by the workers of a cluster: the same bytes as one process leaves, whatever happens."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.storage import LocalStore

from tests.clusters import cluster, process_ids, wait_for_workers
from tests.mrc_writer import write_mrc
from tests.stores import Fault, Faulty
from tests.test_omezarr import scale, write_image
from tests.test_volume import Killed, tree
from tomocpt_stream import tiles
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import BrokenSourceError, PlanError, SourceError
from tomocpt_stream.frame import working_grid
from tomocpt_stream.ingestion import Ingestion, IngestionAddress
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.stages import residents
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import Volume, ingest, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distributed import Client

    from tomocpt_stream.frame import Rule
    from tomocpt_stream.progress import Tally
    from tomocpt_stream.stages import Stage

SHAPE = (70, 140, 100)
HERE = f"{socket.gethostname()}:{os.getpid()}"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile for every two chunks or so, and a job for every block: many jobs of a small volume."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 2 << 20)
    monkeypatch.setattr("tomocpt_stream.statistics.TOGETHER", 1)


def voxels(kind: str = "f4", *, filled: bool = True) -> npt.NDArray[Any]:
    """Noise, of which a third of the planes y is fill."""
    found = np.random.default_rng(0).normal(5.0, 20.0, SHAPE).astype(kind)
    if filled:
        found[:, : SHAPE[1] // 3] = 0
    return found


def mrc(folder: Path, kind: str = "f4", **kwargs: Any) -> Path:
    return write_mrc(folder / "TS_1.mrc", voxels(kind, **kwargs))


def ome_zarr(folder: Path) -> Path:
    write_image(str(folder / "TS_1.zarr"), {"0": voxels("i2")}, transforms={"0": [scale(10, 10, 10)]})
    return folder / "TS_1.zarr"


def chunked(folder: Path) -> zarr.Array[Any]:
    array = zarr.create_array(LocalStore(folder / "TS_1.zarr"), shape=SHAPE, dtype="f4", chunks=(40, 50, 60))
    array[:] = voxels(filled=False)
    return array


SOURCES: dict[str, Callable[[Path], Any]] = {
    "mode 0": partial(mrc, kind="i1"),
    "mode 1": partial(mrc, kind="i2"),
    "mode 2": mrc,
    "no fill": partial(mrc, filled=False),
    "OME-Zarr": ome_zarr,
    "zarr array": chunked,
}


def opened(source: Any, **kwargs: Any) -> Tomogram:
    return open_tomogram(source, voxel_size=10.0, **kwargs)


def workers_of(folder: Path, kind: str = "volume") -> set[str]:
    """Who put the receipts of a store."""
    return {receipt["worker"] for receipt in Receipts(LocalStore(folder), kind).all().values()}


def same(found: Volume, wanted: Volume, folder: Path, reference: Path) -> None:
    """Assert that two volumes are the same, bit for bit; a killed writer may have left half a chunk."""
    assert found.percentiles == wanted.percentiles
    whole = {name: data for name, data in tree(folder).items() if not name.endswith(".partial")}
    assert whole == tree(reference)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(("rule", "ratio"), [("bspline", 1.0), ("bspline", 1.3), ("tomocpt", 1.3)])
def test_workers_leave_what_one_process_leaves(
    workers: Client, tmp_path: Path, kind: str, rule: Rule, ratio: float
) -> None:
    source = SOURCES[kind](tmp_path)
    request: dict[str, Any] = {"voxel_size": 10.0 * ratio, "rule": rule}
    beam_axis: Any = "y" if kind in ("mode 1", "OME-Zarr") else "z"
    wanted = ingest(opened(source, beam_axis=beam_axis), tmp_path / "here", **request)
    found = ingest(opened(source, beam_axis=beam_axis), tmp_path / "there", client=workers, **request)
    same(found, wanted, tmp_path / "there", tmp_path / "here")
    assert (found.fill is None) == (rule == "tomocpt" or kind in ("no fill", "zarr array"))
    assert workers_of(tmp_path / "here") == {HERE}
    assert HERE not in workers_of(tmp_path / "there") | workers_of(tmp_path / "there", "fill")


def test_one_worker_is_as_good_as_two(tmp_path: Path) -> None:
    source = mrc(tmp_path)
    wanted = ingest(opened(source), tmp_path / "here", voxel_size=12.0)
    with cluster(1) as client:
        found = ingest(opened(source), tmp_path / "there", voxel_size=12.0, client=client)
    same(found, wanted, tmp_path / "there", tmp_path / "here")


KILLS = [("set", "^0/c/0/1"), ("put", "volume/0.1.0"), ("set", "^source_fill/c"), ("get", "^0/c/0/1")]


@pytest.mark.parametrize(("method", "keys"), KILLS)
def test_a_worker_that_is_killed_is_made_up_for(
    workers: Client, tmp_path: Path, method: Any, keys: str
) -> None:
    source = mrc(tmp_path)
    wanted = ingest(opened(source), tmp_path / "here", voxel_size=12.0)
    wait_for_workers(workers, 2)
    before = process_ids(workers)
    fault = Fault(tmp_path / "faults", method, keys, "killed", times=1)
    store = Faulty(LocalStore(tmp_path / "there"), fault)
    found = ingest(opened(source), store, voxel_size=12.0, client=workers)
    assert fault.count() == 1
    wait_for_workers(workers, 2)
    assert set(before.values()) != set(process_ids(workers).values())
    same(found, wanted, tmp_path / "there", tmp_path / "here")


@pytest.mark.parametrize("kind", ["503", "timeout", "cut short"])
def test_a_source_that_stumbles_is_read_again(workers: Client, tmp_path: Path, kind: Any) -> None:
    array = chunked(tmp_path)
    wanted = ingest(opened(array), tmp_path / "here", voxel_size=12.0)
    fault = Fault(tmp_path / "faults", "get", "^c/0/0/", kind, times=2)
    faulty = zarr.open_array(Faulty(LocalStore(tmp_path / "TS_1.zarr"), fault), mode="r")
    tomogram = opened(faulty)
    found = ingest(tomogram, tmp_path / "there", voxel_size=12.0, client=workers)
    assert fault.count() == 2
    assert found.percentiles == wanted.percentiles
    np.testing.assert_array_equal(found.array[:], wanted.array[:])


@pytest.mark.parametrize("here", [True, False])
def test_a_chunk_that_cannot_be_read_is_named_when_the_rest_is_done(
    workers: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr("tomocpt_stream.stages.HOPELESS", 1000)
    chunked(tmp_path)
    victim = tmp_path / "TS_1.zarr" / "c" / "1" / "2" / "1"
    victim.write_bytes(victim.read_bytes()[:-50])
    request: Any = {"rule": "tomocpt", "client": None if here else workers}
    with pytest.raises(SourceError, match=r"tile z 0:70 y .* failed 3 times.* c/1/2/1 .*copy that object"):
        ingest(opened(tmp_path / "TS_1.zarr"), tmp_path / "v", voxel_size=10.0, **request)
    assert Receipts(LocalStore(tmp_path / "v"), "volume").names() == {"0.0.0", "0.0.1", "1.0.0", "1.0.1"}


@pytest.mark.parametrize("here", [True, False])
def test_a_chunk_that_is_gone_ends_the_run_at_once(workers: Client, tmp_path: Path, here: bool) -> None:
    chunked(tmp_path)
    (tmp_path / "TS_1.zarr" / "c" / "1" / "2" / "1").unlink()
    with pytest.raises(BrokenSourceError, match=r"has no object c/1/2/1"):
        ingest(
            opened(tmp_path / "TS_1.zarr"), tmp_path / "v", voxel_size=10.0, client=None if here else workers
        )


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("rule", ["bspline", "tomocpt"])
def test_broken_voxels_are_counted_once_by_all(
    workers: Client, tmp_path: Path, here: bool, rule: Rule
) -> None:
    source = voxels(filled=False)
    source[40, 50, 60] = source[69, 139, 99] = np.nan
    source[40, 51, 2] = np.inf
    path = write_mrc(tmp_path / "a.mrc", source)
    reports: list[tuple[str, int, int]] = []
    with pytest.raises(BrokenSourceError, match=r"a.mrc: 3 of 980000 voxels are NaN .* z, y, x = 40, 50, 60"):
        ingest(
            opened(path),
            tmp_path / "v",
            voxel_size=12.0,
            rule=rule,
            client=None if here else workers,
            progress=lambda *report: reports.append(report),
        )
    counted = [done for stage, done, _ in reports if stage == "check"]
    assert counted == sorted(set(counted))
    assert (counted[0], counted[-1]) == (0, 980000)


def test_voxels_that_are_broken_only_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomogram = opened(voxels(filled=False))
    read, reads = tomogram.read, 0

    def flicker(box: Any) -> Any:
        nonlocal reads
        reads += 1
        found = read(box)
        found[0, 0, 0] = np.nan if reads == 8 else found[0, 0, 0]
        return found

    monkeypatch.setattr(tomogram, "read", flicker)
    with pytest.raises(SourceError, match="were not when they were read again"):
        ingest(tomogram, tmp_path / "v", voxel_size=10.0)


def test_a_tomogram_in_memory_stays_in_this_process(workers: Client, tmp_path: Path) -> None:
    wanted = ingest(opened(voxels()), tmp_path / "here", voxel_size=12.0)
    found = ingest(opened(voxels()), tmp_path / "there", voxel_size=12.0, client=workers)
    same(found, wanted, tmp_path / "there", tmp_path / "here")
    assert workers_of(tmp_path / "there") == {HERE}


def opened_on_worker() -> list[str]:
    return [token for token in residents._opened if token.startswith("volume ")]


def test_a_worker_opens_source_and_store_once(workers: Client, tmp_path: Path) -> None:
    wait_for_workers(workers, 2)
    before = {token for tokens in workers.run(opened_on_worker).values() for token in tokens}
    ingest(opened(mrc(tmp_path)), tmp_path / "v", voxel_size=12.0, rule="tomocpt", client=workers)
    after = {token for tokens in workers.run(opened_on_worker).values() for token in tokens}
    assert len(after - before) == 1


def test_relative_paths_lead_workers_to_the_same_place(
    workers: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mrc(tmp_path)
    monkeypatch.chdir(tmp_path)
    volume = ingest(opened("TS_1.mrc"), LocalStore("v"), voxel_size=10.0, client=workers)
    assert volume.percentiles == open_volume(tmp_path / "v").percentiles
    assert HERE not in workers_of(tmp_path / "v")


class Listener:
    """A progress bar that also hears of the workers; it may end the run in a stage, `ends`."""

    def __init__(self, ends: str = "") -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.tallies: dict[str, list[Tally]] = {}
        self._ends = ends

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))
        if stage == self._ends:
            raise Killed

    def workers(self, stage: str, tallies: Sequence[Tally]) -> None:
        self.tallies[stage] = list(tallies)


@pytest.mark.parametrize("here", [True, False])
def test_only_what_is_missing_is_done_again(
    workers: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * SHAPE[0] * 64 * SHAPE[2])  # four chunks a tile
    tomogram, client = opened(mrc(tmp_path, filled=False)), None if here else workers
    wanted = ingest(tomogram, tmp_path / "whole", voxel_size=10.0)
    interrupted = Listener(ends="statistics")
    with pytest.raises(Killed):
        ingest(tomogram, tmp_path / "v", voxel_size=10.0, progress=interrupted)
    assert [report for report in interrupted.reports if report[0] == "fill"][-1][1] == wanted.array.size
    receipts = tmp_path / "v" / "receipts"
    for name in ("1.1.0", "1.1.1"):
        (receipts / "volume" / f"{name}.json").unlink()
    fill = (receipts / "fill" / "source.json").read_bytes()
    listener = Listener()
    found = ingest(tomogram, tmp_path / "v", voxel_size=10.0, client=client, progress=listener)
    same(found, wanted, tmp_path / "v", tmp_path / "whole")
    assert (receipts / "fill" / "source.json").read_bytes() == fill
    assert sum(tally.number("bytes_read") for tally in listener.tallies["fill"]) == 0
    stored, missing = listener.tallies["ingest"], 6 * 64 * SHAPE[2]
    assert sum(tally.jobs for tally in stored) == 1
    assert sum(tally.number("voxels") for tally in stored) == missing
    assert sum(tally.number("bytes_read") for tally in stored) == 4 * missing  # and no more of the tile
    done = [done for stage, done, _ in listener.reports if stage == "ingest"]
    assert done[0] == wanted.array.size - missing
    assert done[-1] == wanted.array.size


@pytest.mark.parametrize("here", [True, False])
def test_progress_is_told_in_voxels_and_by_worker(workers: Client, tmp_path: Path, here: bool) -> None:
    listener = Listener()
    tomogram = opened(mrc(tmp_path, "i2"))
    volume = ingest(
        tomogram, tmp_path / "v", voxel_size=10.0, client=None if here else workers, progress=listener
    )
    size = volume.array.size
    for stage, whole in (("fill", size), ("ingest", size), ("statistics", 2 * size)):
        done = [done for name, done, total in listener.reports if name == stage and total == whole]
        assert (done[0], done[-1]) == (0, whole)
        assert done == sorted(done)
        tallies = listener.tallies[stage]
        assert {tally.worker for tally in tallies} <= ({"this process"} if here else {"0", "1"})
        assert sum(tally.number("seconds") for tally in tallies) > 0
    assert sum(tally.number("bytes_read") for tally in listener.tallies["statistics"]) == 4 * size
    stored = listener.tallies["ingest"]
    assert sum(tally.number("voxels") for tally in stored) == size
    assert sum(tally.number("bytes_read") for tally in stored) == 2 * size
    assert sum(tally.jobs for tally in stored) == len(
        tiles.plan_tiles(volume.grid, tomogram.shape, tomogram.chunks, "bspline")
    )


def test_a_run_that_was_ended_is_gone_on_with(workers: Client, tmp_path: Path) -> None:
    tomogram = opened(mrc(tmp_path))
    wanted = ingest(tomogram, tmp_path / "here", voxel_size=12.0)
    reports: list[tuple[str, int, int]] = []
    ends = ["fill", "ingest", "statistics"]

    def progress(stage: str, done: int, total: int) -> None:
        if ends and stage == ends[0] and done:
            ends.pop(0)
            raise Killed
        reports.append((stage, done, total))

    for _ in range(3):
        reports.clear()
        with pytest.raises(Killed):
            ingest(tomogram, tmp_path / "there", voxel_size=12.0, client=workers, progress=progress)
    begun = next(done for stage, done, _ in reports if stage == "ingest")
    assert begun > 0  # what was stored before it was ended is not stored again
    found = ingest(tomogram, tmp_path / "there", voxel_size=12.0, client=workers)
    same(found, wanted, tmp_path / "there", tmp_path / "here")


def test_two_clients_make_one_volume(workers: Client, tmp_path: Path) -> None:
    source = mrc(tmp_path)
    wanted = ingest(opened(source), tmp_path / "here", voxel_size=12.0)

    def make(client: Client | None) -> Volume:
        return ingest(opened(source), tmp_path / "there", voxel_size=12.0, client=client)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(make, [workers, workers, None]):
            assert found.percentiles == wanted.percentiles
    same(found, wanted, tmp_path / "there", tmp_path / "here")


def test_a_job_is_a_few_kilobytes(workers: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}

    def measured(stage: Stage[Any], jobs: Any, **options: Any) -> Any:
        for job in jobs:
            parcel = pickle.dumps((stage.function, stage.address, job.payload))
            sizes[stage.name] = max(len(parcel), sizes.get(stage.name, 0))
        return run_jobs(stage, jobs, **options)

    monkeypatch.setattr("tomocpt_stream.intake.run_jobs", measured)
    ingest(opened(ome_zarr(tmp_path)), tmp_path / "v", voxel_size=10.0, client=workers)
    assert set(sizes) == {"fill", "ingest", "statistics"}
    assert max(sizes.values()) < 6000


def test_the_stages_of_one_run_share_what_was_fetched(tmp_path: Path) -> None:
    sent = pickle.dumps(opened(mrc(tmp_path)))
    volume = ingest(pickle.loads(sent), tmp_path / "v", voxel_size=12.0)
    grid = working_grid(SHAPE, 10.0, 12.0)

    def opened_by(run: str, token: str) -> Ingestion:
        store, source = LocalStore(tmp_path / "v"), pickle.loads(sent)  # as each job brings its own
        return IngestionAddress(
            store, source, grid, "bspline", ((), ()), volume.fingerprint, run, token
        ).open()

    before, after, another = opened_by("a", "no fill"), opened_by("a", "fill"), opened_by("b", "fill")
    assert after.tomogram is before.tomogram
    assert another.tomogram is not before.tomogram
    gone = weakref.ref(before.tomogram)
    del before, after
    gc.collect()
    assert gone() is None


def test_a_process_that_does_not_see_store_or_source_says_so(tmp_path: Path) -> None:
    path = mrc(tmp_path)
    tomogram = opened(path)
    volume = ingest(tomogram, tmp_path / "v", voxel_size=12.0)
    grid = working_grid(SHAPE, 10.0, 12.0)

    def address(store: Path, fingerprint: str = volume.fingerprint) -> IngestionAddress:
        return IngestionAddress(
            LocalStore(store), tomogram, grid, "bspline", ((), ()), fingerprint, "run", "token"
        )

    assert address(tmp_path / "v").open().array.shape == volume.shape
    for wrong in (address(tmp_path / "nowhere"), address(tmp_path / "v", "of another volume")):
        with pytest.raises(PlanError, match=f"{socket.gethostname()} does not find the volume"):
            wrong.open()
    assert not (tmp_path / "nowhere").exists()
    path.unlink()
    with pytest.raises(BrokenSourceError, match="finds no file"):
        address(tmp_path / "v").open()
