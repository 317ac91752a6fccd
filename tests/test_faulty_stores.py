"""Stores that answer slowly, with 503, late or cut short: the same bytes, or an error that names the object.

The stores of source, volume and map; what fails now and then is asked for again, what fails for good
is never read as zeros, and costs no more than itself when it is mended.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, ObjectStore

from tests.flaky_server import flaky_server
from tests.stores import Fault, Faulty, Kind, Method
from tests.watched import OPTIONS, Undisturbed, Watched, contents, done, run
from tomocpt_stream import patience
from tomocpt_stream.errors import ActionableError, CheckpointError, JobError, SourceError
from tomocpt_stream.heatmap import open_heatmap
from tomocpt_stream.pipeline import pick
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest, open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from distributed import Client


def failing_stores(
    case: Undisturbed, folder: Path, faults: dict[str, list[Fault]]
) -> tuple[Volume, Faulty, LocalStore]:
    """The volume and a store for the map, each with its faults, and the latter's without."""
    store = LocalStore(folder / "map.zarr")
    volume = open_volume(Faulty(LocalStore(case.folder), *faults.get("volume", [])))
    return volume, Faulty(store, *faults.get("map", [])), store


METHODS: tuple[Method, ...] = ("get", "set", "put", "exists", "list")


@pytest.mark.parametrize("kind", ["503", "slow"])
def test_stores_that_fail_now_and_then(
    undisturbed: Undisturbed, workers: Client, tmp_path: Path, kind: Kind
) -> None:
    on_map = [Fault(tmp_path / method, method, "", kind, times=1) for method in METHODS]
    on_map += [Fault(tmp_path / key, "set", key, kind, times=1) for key in ("^0/c/1/1/1", "seams", "^zarr")]
    on_volume = [Fault(tmp_path / "volume", "get", "^0/c/", kind, times=2)]
    volume, failing, _ = failing_stores(undisturbed, tmp_path, {"map": on_map, "volume": on_volume})
    picker = Watched(tmp_path)
    heatmap = run(undisturbed, picker, failing, workers, volume=volume)
    assert contents(heatmap) == undisturbed.contents
    assert undisturbed.rescored(picker) == 0
    assert all(fault.count() == fault.times for fault in on_map + on_volume)


def test_objects_that_arrive_cut_short(undisturbed: Undisturbed, workers: Client, tmp_path: Path) -> None:
    faults = {
        "volume": [Fault(tmp_path / "volume", "get", "^0/c/0/1/1", "cut short", times=2)],
        "map": [
            Fault(tmp_path / "seam", "get", "^0/c/0/0/0", "cut short", times=2),
            Fault(tmp_path / "receipt", "get", "^receipts/heatmap/0.1.1", "cut short", times=2),
        ],
    }
    volume, failing, _ = failing_stores(undisturbed, tmp_path, faults)
    heatmap = run(undisturbed, Watched(tmp_path), failing, workers, volume=volume)
    assert contents(heatmap) == undisturbed.contents
    assert [fault.count() for of in faults.values() for fault in of] == [2, 2, 2]


@pytest.mark.parametrize(
    ("what", "method", "keys", "kind", "named"),
    [
        ("volume", "get", "^0/c/0/1/1", "timeout", "task 9 of 9 .* to get 0/c/0/1/1 .TimeoutError"),
        (
            "volume",
            "get",
            "^0/c/0/1/1",
            "cut short",
            "task 9 of 9 .* has an object 0/c/0/1/1 that is cut short",
        ),
        ("map", "put", "heatmap/1.1.1", "503", "task 5 of 9 .* to store receipts/heatmap/1.1.1.json .*503"),
        ("map", "get", "^0/c/1/2/0", "cut short", "seam .* has an object 0/c/1/2/0 that is cut short"),
    ],
)
def test_a_store_that_fails_for_good(
    undisturbed: Undisturbed,
    workers: Client,
    tmp_path: Path,
    what: str,
    method: Method,
    keys: str,
    kind: Kind,
    named: str,
) -> None:
    fault = Fault(tmp_path / "faults", method, keys, kind)
    volume, failing, store = failing_stores(undisturbed, tmp_path, {what: [fault]})
    picker = Watched(tmp_path)
    with pytest.raises(ActionableError, match=f"of tomogram: {named}"):
        run(undisturbed, picker, failing, workers, volume=volume)
    assert len(undisturbed.chunks - done(store)) <= 2
    with pytest.raises(CheckpointError, match="not finished"):
        open_heatmap(store)
    before = picker.scored()
    # The same workers, and a store by the same name that does not fail.
    volume, mended, _ = failing_stores(undisturbed, tmp_path, {})
    single = replace(undisturbed.plan, group=(1, 1, 1))  # as under another budget
    heatmap = run(undisturbed, picker, mended, workers, volume=volume, plan=single)
    assert contents(heatmap) == undisturbed.contents
    assert (picker.scored() - before).total() <= undisturbed.windows(1)


@pytest.mark.parametrize(
    ("method", "keys", "named"),
    [
        ("get", "^zarr.json", "get zarr.json"),
        ("set", "^0/zarr.json", "store 0/zarr.json"),
        ("list", "^receipts", "list receipts/heatmap/"),
        ("set", "^candidates/seams", "store candidates/seams"),
        ("set", "^zarr.json", "store zarr.json"),
    ],
)
def test_requests_of_the_client_that_fail_for_good(
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    keys: str,
    named: str,
) -> None:
    monkeypatch.setattr(patience, "_pause", lambda _: 0.0)
    fault = Fault(tmp_path / "faults", method, keys, "timeout")
    volume, failing, _ = failing_stores(undisturbed, tmp_path, {"map": [fault]})
    with pytest.raises(ActionableError, match=f"map.zarr failed 3 times to {named} .TimeoutError"):
        run(undisturbed, Watched(tmp_path), failing, None, volume=volume)
    fault.mend()
    heatmap = run(undisturbed, Watched(tmp_path), failing, None, volume=volume)
    assert contents(heatmap) == undisturbed.contents


def test_what_killed_writers_left_is_deleted(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store, picker = LocalStore(tmp_path / "map.zarr"), Watched(tmp_path, "fail")
    with pytest.raises(JobError, match="stumbled"):
        run(undisturbed, picker, store, None)
    litter = [store.root / "0" / "c" / f"{age}.partial" for age in (90, 30)]
    for path, age in zip(litter, (90, 30), strict=True):
        path.write_bytes(b"half a chunk")
        os.utime(path, (time.time() - age,) * 2)
    picker.mend()
    assert contents(run(undisturbed, picker, store, None)) == undisturbed.contents
    assert [path.exists() for path in litter] == [False, True]  # the second may have a writer yet


SOURCE = (70, 100, 90)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tomogram of a voxel size of its own, in the corner of which nothing was reconstructed."""
    path = tmp_path_factory.mktemp("source") / "tomogram.zarr"
    voxels = np.random.default_rng(1).normal(size=SOURCE).astype(np.float32)
    voxels[:20, :40, :40] = 0.0
    voxels[50, 50, 50] = 1e6
    array = zarr.create_array(path, shape=SOURCE, chunks=(32, 32, 32), dtype="f4")
    array[:] = voxels
    return path


@pytest.fixture(scope="module")
def ingested(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("ingested") / "volume.zarr"
    return voxels_of(ingest(open_tomogram(zarr.open_array(source), voxel_size=8.0), store, voxel_size=10.0))


def voxels_of(volume: Volume) -> dict[str, bytes]:
    """Everything that a volume says, as bytes."""
    assert volume.fill is not None
    return {
        "voxels": np.asarray(volume.array[:]).tobytes(),
        "fill": np.asarray(volume.fill[:]).tobytes(),
        "percentiles": np.array(volume.percentiles).tobytes(),
    }


def ingest_with(
    faults: dict[str, list[Fault]], source: Path, store: Path, client: Client | None = None
) -> dict[str, bytes]:
    """What a volume says that was ingested from a source and into a store with these faults."""
    array = zarr.open_array(Faulty(LocalStore(source), *faults.get("source", [])))
    failing = Faulty(LocalStore(store), *faults.get("volume", []))
    return voxels_of(ingest(open_tomogram(array, voxel_size=8.0), failing, voxel_size=10.0, client=client))


@pytest.mark.parametrize(
    ("what", "method", "keys", "kind", "times"),
    [
        ("source", "get", "^c/2/0/0", "cut short", 2),
        ("source", "get", "^c/2/0/0", "killed", 1),
        ("volume", "set", "^0/c/0/1/1", "killed after", 1),
        ("volume", "put", "^receipts/volume/0.1.1", "killed after", 1),
    ],
)
def test_a_fault_while_ingesting(
    workers: Client,
    tmp_path: Path,
    source: Path,
    ingested: dict[str, bytes],
    what: str,
    method: Method,
    keys: str,
    kind: Kind,
    times: int,
) -> None:
    fault = Fault(tmp_path / "faults", method, keys, kind, times=times)
    assert ingest_with({what: [fault]}, source, tmp_path / "volume.zarr", workers) == ingested
    assert fault.count() == times


@pytest.mark.parametrize("kind", ["timeout", "slow"])
def test_a_source_that_fails_now_and_then(
    workers: Client, tmp_path: Path, source: Path, ingested: dict[str, bytes], kind: Kind
) -> None:
    faults = {
        "source": [Fault(tmp_path / "source", "get", "^c/", kind, times=2)],
        "volume": [Fault(tmp_path / method, method, "", kind, times=1) for method in METHODS],
    }
    assert ingest_with(faults, source, tmp_path / "volume.zarr", workers) == ingested
    assert all(fault.count() == fault.times for of in faults.values() for fault in of)


@pytest.mark.parametrize(
    ("kind", "named"), [("503", "failed 3 times to get c/2/0/0 .*503"), ("cut short", "object c/2/0/0 that")]
)
def test_a_source_that_fails_for_good(
    workers: Client, tmp_path: Path, source: Path, ingested: dict[str, bytes], kind: Kind, named: str
) -> None:
    fault = Fault(tmp_path / "faults", "get", "^c/2/0/0", kind)
    store = tmp_path / "volume.zarr"
    with pytest.raises(SourceError, match=named):
        ingest_with({"source": [fault]}, source, store, workers)
    with pytest.raises(CheckpointError, match="not finished"):
        open_volume(store)
    assert ingest_with({}, source, store, workers) == ingested


def test_a_server_that_fails_now_and_then(
    workers: Client, tmp_path: Path, source: Path, ingested: dict[str, bytes]
) -> None:
    stores = pytest.importorskip("obstore.store")
    failures = {
        "/c/0/": ["503", "503"],
        "/c/1/0": ["cut short", "503"],
        "/c/1/": ["reset", "cut short"],
        "/c/2/": ["slow", "reset"],
    }
    with flaky_server(source, failures) as address:
        served = stores.HTTPStore.from_url(
            address,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
        )
        array = zarr.open_array(ObjectStore(served, read_only=True), mode="r")
        tomogram = open_tomogram(array, voxel_size=8.0)
        volume = ingest(tomogram, tmp_path / "volume.zarr", voxel_size=10.0, client=workers)
    assert voxels_of(volume) == ingested
    assert not any(failures.values())


def test_a_worker_killed_in_every_stage(workers: Client, tmp_path: Path, source: Path) -> None:
    killed = Fault(tmp_path / "faults", "get", "^c/2/0/0", "killed", times=1)
    tomogram, failing = (
        open_tomogram(zarr.open_array(store), voxel_size=8.0)
        for store in (LocalStore(source), Faulty(LocalStore(source), killed))
    )
    (tmp_path / "undisturbed").mkdir()
    expected = pick(tomogram, Watched(tmp_path / "undisturbed"), OPTIONS)
    picker = Watched(tmp_path, "die once")
    picks = pick(failing, picker, OPTIONS, scratch=tmp_path, client=workers, verify=True)
    assert killed.count() == len(picker.seen.read_text().split()) == 1
    assert len(picks) > 100
    assert picks.zyx.tobytes() == expected.zyx.tobytes()
    assert picks.score.tobytes() == expected.score.tobytes()
