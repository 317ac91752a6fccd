"""Tomograms and working stores on object stores: the same answers as from a disk, or an error that helps."""

from __future__ import annotations

import gzip
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from tests.buckets import PORTAL_BUCKET, Bucket, portal_zarr
from tests.scorers import PlaceDependent
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.formats import write_picks
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import pick
from tomocpt_stream.remote import ForbiddenError, connect
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import ingest, open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from distributed import Client

    from tests.buckets import S3, Way

SHAPE, CHUNK = (40, 70, 75), 32
VOXELS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
OPTIONS = PickOptions(60.0, threshold=0.5, min_distance=40.0, stitch="hann", batch_size=3, contrast="dark")
CORNER = (slice(0, 32), slice(0, 32), slice(0, 32))
ALL = (slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tomogram as the portal stores it, on the disk."""
    return portal_zarr(tmp_path_factory.mktemp("portal") / "TS_1.zarr", VOXELS, 10.0, CHUNK)


@pytest.fixture(scope="module")
def stored(folder: Path, s3: S3) -> dict[str, int]:
    """The same in the bucket; the bytes of each level."""
    s3.bucket.put_folder(folder, "TS_1.zarr")
    write_mrc(folder.parent / "TS_1.mrc", VOXELS, 10.0)
    s3.bucket.put("TS_1.mrc", (folder.parent / "TS_1.mrc").read_bytes())
    s3.bucket.put("packed.mrc.gz", gzip.compress((folder.parent / "TS_1.mrc").read_bytes()))
    levels = {path.name: path for path in folder.iterdir() if path.is_dir()}
    return {
        name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name[:2] != ".z")
        for name, path in levels.items()
    }


def opened(s3: S3, key: str = "TS_1.zarr", **options: Any) -> Tomogram:
    more = {name: options.pop(name) for name in ("level", "missing", "voxel_size") if name in options}
    return open_tomogram(s3.address(key), storage_options=s3.options(**options), **more)


@pytest.mark.parametrize("key", ["TS_1.zarr", "TS_1.mrc", "packed.mrc.gz"])
def test_picks_from_a_bucket_are_those_from_a_disk(
    key: str, s3: S3, way: Way, stored: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    scorer = PlaceDependent()
    local = folder if key.endswith("zarr") else folder.parent / "TS_1.mrc"
    ours = pick(open_tomogram(local), scorer, OPTIONS, keep_heatmap=tmp_path / "ours")
    remote = opened(s3, key)
    theirs = pick(remote, scorer, OPTIONS, keep_heatmap=tmp_path / "theirs")
    assert len(ours) > 10
    assert (ours.zyx.tobytes(), ours.score.tobytes()) == (theirs.zyx.tobytes(), theirs.score.tobytes())
    assert remote.name == theirs.tomogram == key.partition(".")[0]
    assert remote.source == s3.address(key)
    size = s3.bucket.client.head_object(Bucket="tomograms", Key=key)["ContentLength"] if "mrc" in key else 0
    # Metadata, faces, fill, voxels and the sample of the fingerprint: each object came once.
    assert way.bytes == (size or stored["0"])


def test_each_chunk_comes_once_and_many_at_a_time(
    s3: S3, way: Way, stored: dict[str, int], tmp_path: Path
) -> None:
    way.latency = 0.05
    tomogram = opened(s3)
    ingest(tomogram, tmp_path / "volume", voxel_size=14.5)
    paths = [one.path for one in way.data()]
    assert len(paths) == len(set(paths)) == 2 * 3 * 3
    assert way.bytes == stored["0"]
    assert way.most_at_once >= 8
    assert tomogram.traffic is not None
    assert tomogram.traffic.bytes >= stored["0"]


def test_cubes_of_256_voxels_are_read_as_any_others(s3: S3, way: Way, tmp_path: Path) -> None:
    # As the portal has them, whatever the size of the tomogram.
    s3.bucket.put_folder(portal_zarr(tmp_path / "cubes.zarr", VOXELS, 10.0, chunk=256), "cubes.zarr")
    ours = ingest(opened(s3, "cubes.zarr"), tmp_path / "a", voxel_size=13.0)
    theirs = ingest(open_tomogram(tmp_path / "cubes.zarr"), tmp_path / "b", voxel_size=13.0)
    np.testing.assert_array_equal(ours.array[:], theirs.array[:])
    assert [one.path.rpartition("cubes.zarr")[2] for one in way.data()] == ["/0/0/0/0"]


def test_a_cache_of_no_room_fetches_again_and_changes_nothing(
    s3: S3, way: Way, stored: dict[str, int]
) -> None:
    tomogram = opened(s3, cache_bytes=0)
    for _ in range(2):
        np.testing.assert_array_equal(tomogram.read(ALL), VOXELS)
    assert way.bytes > 1.5 * stored["0"]


@pytest.mark.parametrize("key", ["TS_1.zarr", "TS_1.mrc"])
def test_a_remote_tomogram_travels_by_its_address(key: str, s3: S3, way: Way, stored: dict[str, int]) -> None:
    tomogram = opened(s3, key)
    tomogram.read(ALL)
    data = pickle.dumps(tomogram)
    assert len(data) < 10_000
    assert tomogram.travels
    there = pickle.loads(data)
    there.confirm()
    np.testing.assert_array_equal(there.read(ALL), VOXELS)
    assert there.fingerprint == tomogram.fingerprint


def test_its_fingerprint_takes_one_object(
    s3: S3, way: Way, stored: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    ours = opened(s3).fingerprint
    assert len(way.data()) == 1
    other = VOXELS.copy()
    other[tuple(n // 2 for n in SHAPE)] += 1
    s3.bucket.put_folder(portal_zarr(tmp_path / "other.zarr", other, 10.0, CHUNK), "other.zarr")
    assert opened(s3, "other.zarr").fingerprint["sample"] != ours["sample"]


def test_a_tomogram_is_one_however_its_address_is_written(s3: S3, way: Way, folder: Path) -> None:
    s3.bucket.put_folder(folder, "spaced/TS 1.zarr")
    write_mrc(folder.parent / "TS_1.mrc", VOXELS, 10.0)
    s3.bucket.put("spaced/TS 1.mrc", (folder.parent / "TS_1.mrc").read_bytes())
    for suffix in ("zarr", "mrc"):
        one, other = (opened(s3, f"spaced/TS{space}1.{suffix}") for space in (" ", "%20"))
        assert one.fingerprint == other.fingerprint
        assert one.source == other.source == s3.address(f"spaced/TS%201.{suffix}")
        assert one.name == other.name == "TS 1"
    with pytest.raises(SourceError, match="between two slashes"):
        opened(s3, "spaced/../TS_1.zarr")


def test_a_level_is_read_only_when_asked_for(s3: S3, way: Way, stored: dict[str, int]) -> None:
    tomogram = opened(s3, level=1)
    assert (tomogram.shape, tomogram.voxel_size) == ((20, 35, 38), 20.0)
    assert tomogram.frame.level_shift == (0.5, 0.5, 0.5)
    z, y, x = (slice(0, n) for n in tomogram.shape)
    tomogram.read((z, y, x))
    assert way.bytes == stored["1"]


def test_a_store_that_forbids_what_it_has_not_is_read_all_the_same(
    s3: S3, way: Way, stored: dict[str, int]
) -> None:
    # So a bucket answers that may not be listed.
    way.fault = lambda method, path, _: "403" if path.endswith(("zarr.json", ".zgroup")) else None
    np.testing.assert_array_equal(opened(s3).read(ALL), VOXELS)


@pytest.mark.parametrize("layout", ["chunks", "shards"])
def test_a_store_that_may_not_be_listed_may_lack_chunks_all_the_same(
    layout: str, s3: S3, way: Way, stored: dict[str, int], tmp_path: Path
) -> None:
    key, form, name = "TS_1.zarr", 2, "/0/1/1/1"
    if layout == "shards":
        key, form, name = "sharded.zarr", 3, "/c/1/1/1"
        array = zarr.create_array(tmp_path / key, shape=SHAPE, chunks=(16,) * 3, shards=(32,) * 3, dtype="f4")
        array[:] = VOXELS
        s3.bucket.put_folder(tmp_path / key, key)
    metadata = "zarr.json" if form == 3 else ".zarray"
    tomograms = {way_: opened(s3, key, voxel_size=10.0, missing=way_) for way_ in ("error", "fill")}
    way.reset()
    way.fault = lambda method, path, _: "403" if path.endswith(name) else None
    with pytest.raises(ForbiddenError, match=rf"{key} refuses its object '.*1/1/1'.*pass missing=\"fill\""):
        tomograms["error"].read(ALL)
    expected = VOXELS.copy()
    expected[32:, 32:64, 32:64] = 0
    with pytest.warns(UserWarning, match=rf"{key} refuses .*{name[1:]} among them"):
        found = tomograms["fill"].read(ALL)
    np.testing.assert_array_equal(found, expected)
    asked = sum(one.path.endswith(name) for one in way.asked)
    np.testing.assert_array_equal(tomograms["fill"].read(ALL), expected)  # and is not said again
    assert sum(one.path.endswith(name) for one in way.asked) == asked
    # Credentials that have lost their force make nothing absent.
    way.fault = lambda method, path, _: "403" if path.endswith((name, metadata)) else None
    again = pickle.loads(pickle.dumps(tomograms["fill"]))
    with pytest.raises(ForbiddenError, match=r"refuses its object"):
        again.read(ALL)


def test_an_archived_object_is_no_absent_one(s3: S3, way: Way, tmp_path: Path) -> None:
    # The store answers 403 here too, of an object that is there.
    array = zarr.create_array(tmp_path / "cold.zarr", shape=SHAPE, chunks=(32, 64, 64), dtype="f4")
    array[:] = VOXELS
    s3.bucket.put_folder(tmp_path / "cold.zarr", "cold.zarr")
    place = {"Bucket": s3.bucket.name, "Key": "cold.zarr/c/1/0/0"}
    s3.bucket.client.copy_object(**place, CopySource=place, StorageClass="GLACIER", ACL="public-read")
    with pytest.raises(SourceError, match=r"cold.zarr has archived its object 'c/1/0/0'.*restore it"):
        opened(s3, "cold.zarr", voxel_size=10.0, missing="fill").read(ALL)


def test_a_private_object_says_what_to_do(s3: S3, way: Way) -> None:
    s3.bucket.put("private.mrc", b"x" * 2000, private=True)
    with pytest.raises(
        ForbiddenError, match=r"s3://tomograms refuses its object 'private.mrc' .403.*AWS_ACCESS_KEY_ID"
    ):
        opened(s3, "private.mrc")
    way.fault = lambda method, path, _: "403"
    with pytest.raises(ForbiddenError, match=r"s3://tomograms/TS_1.zarr refuses"):
        opened(s3)


@pytest.mark.parametrize("key", ["nowhere.mrc", "nowhere.zarr", "nowhere"])
def test_an_address_of_nothing_is_named(key: str, s3: S3, way: Way) -> None:
    with pytest.raises(SourceError, match=rf"s3://tomograms/{key}.*check the"):
        opened(s3, key)


@pytest.mark.parametrize("fault", ["503", "truncate", "drop"])
@pytest.mark.parametrize("key", ["TS_1.zarr", "TS_1.mrc"])
def test_what_fails_now_and_then_is_asked_for_again(
    key: str, fault: str, s3: S3, way: Way, stored: dict[str, int]
) -> None:
    way.fault = lambda method, path, before: fault if before == 0 else None
    np.testing.assert_array_equal(opened(s3, key).read(ALL), VOXELS)


@pytest.mark.parametrize("fault", ["503", "truncate", "drop"])
def test_what_always_fails_is_named_within_the_time_for_it(
    fault: str, s3: S3, way: Way, stored: dict[str, int]
) -> None:
    tomogram = opened(s3, max_retries=1)
    way.fault = lambda method, path, _: fault if path.endswith("/0/1/1/1") else None
    with pytest.raises(SourceError, match=r"s3://tomograms/TS_1.zarr failed.* to get 0/1/1/1"):
        tomogram.read(ALL)
    np.testing.assert_array_equal(tomogram.read(CORNER), VOXELS[:32, :32, :32])


def test_damaged_objects_are_named(s3: S3, way: Way, folder: Path) -> None:
    s3.bucket.put_folder(folder, "damaged.zarr")
    s3.bucket.client.delete_object(Bucket="tomograms", Key="damaged.zarr/0/0/0/0")
    with pytest.raises(SourceError, match=r'damaged.zarr has no object 0/0/0/0.*missing="fill"'):
        opened(s3, "damaged.zarr").read(ALL)
    filled = opened(s3, "damaged.zarr", missing="fill")
    for _ in range(2):
        assert not filled.read(CORNER).any()
    assert sum(one.path.endswith("damaged.zarr/0/0/0/0") for one in way.asked) == 2  # each tomogram once
    whole = (folder / "0/1/1/1").read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:16] + bytes(len(whole) - 16)):
        s3.bucket.put("damaged.zarr/0/1/1/1", data)
        with pytest.raises(SourceError, match=r"damaged.zarr.* 0/1/1/1"):
            opened(s3, "damaged.zarr", missing="fill").read(ALL)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(
    s3: S3, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tomocpt_stream.files.PART", 1 << 16)
    rng = np.random.default_rng(1)
    data = [rng.integers(0, 100, 200_000, "u1").tobytes() for _ in range(2)]
    header = bytearray(1024)
    header[:16] = np.array([100, 100, 20, 0], "<i4").tobytes()
    header[208:214] = b"MAP DD"
    s3.bucket.put("changing.mrc", bytes(header) + data[0])
    tomogram = opened(s3, "changing.mrc", voxel_size=10.0)
    s3.bucket.put("changing.mrc", bytes(header) + data[1])
    with pytest.raises(SourceError, match=r"changing\.mrc"):
        tomogram.read((slice(0, 20), slice(0, 100), slice(0, 100)))


@pytest.mark.parametrize("layout", ["format 2", "format 3", "sharded", "0.5"])
def test_every_layout_of_zarr_is_read(layout: str, s3: S3, way: Way, tmp_path: Path) -> None:
    form: Any = 2 if layout == "format 2" else 3
    attributes = {}
    path = tmp_path / "a.zarr"
    if layout == "0.5":
        axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
        datasets = [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * 3}]}]
        attributes = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}}
        zarr.create_group(LocalStore(path), zarr_format=3, attributes=attributes)
    array = zarr.create_array(
        LocalStore(path / "s0" if layout == "0.5" else path),
        shape=SHAPE,
        chunks=(16,) * 3,
        shards=(32,) * 3 if layout == "sharded" else None,
        dtype="float32",
        zarr_format=form,
    )
    array[:] = VOXELS
    key = f"layouts/{layout.replace(' ', '-')}.zarr"
    s3.bucket.put_folder(path, key)
    given: dict[str, Any] = {} if layout == "0.5" else {"voxel_size": 10.0}
    tomogram = open_tomogram(s3.address(key), storage_options=s3.options(), **given)
    assert tomogram.voxel_size == 10.0
    for _ in range(2):
        np.testing.assert_array_equal(tomogram.read(ALL), VOXELS)
    ranges = [(one.path, one.range) for one in way.data() if one.method == "GET"]
    assert len(ranges) == len(set(ranges))


def test_the_portals_bucket_needs_nothing_but_its_address(
    s3: S3, way: Way, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(s3.bucket.client.meta.endpoint_url, PORTAL_BUCKET)
    bucket.put_folder(folder, "10446/TS_1.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    # Keys for something else must not be sent to it.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "else")
    tomogram = open_tomogram(f"s3://{PORTAL_BUCKET}/10446/TS_1.zarr")
    np.testing.assert_array_equal(tomogram.read(ALL), VOXELS)
    web = open_tomogram(f"{way.url}/{PORTAL_BUCKET}/10446/TS_1.zarr/")
    np.testing.assert_array_equal(web.read(ALL), VOXELS)
    assert web.voxel_size == 10.0


def test_working_stores_may_lie_in_a_bucket(
    s3: S3, way: Way, stored: dict[str, int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    scratch = s3.address("scratch")
    ours = pick(open_tomogram(folder), PlaceDependent(), OPTIONS)
    first = pick(open_tomogram(folder), PlaceDependent(), OPTIONS, scratch=scratch)
    assert (ours.zyx.tobytes(), ours.score.tobytes()) == (first.zyx.tobytes(), first.score.tobytes())
    keys = s3.bucket.keys("scratch/")
    receipts = [key for key in keys if "/receipts/" in key]
    assert receipts
    way.reset()
    again = pick(open_tomogram(folder), PlaceDependent(), OPTIONS, scratch=scratch)
    assert again.zyx.tobytes() == ours.zyx.tobytes()
    assert not [one for one in way.asked if one.method in ("PUT", "POST")]
    assert s3.bucket.keys("scratch/") == keys


def test_workers_read_and_write_buckets_for_themselves(
    s3: S3, way: Way, stored: dict[str, int], folder: Path, workers: Client, tmp_path: Path
) -> None:
    ours = pick(open_tomogram(folder), PlaceDependent(), OPTIONS)
    theirs = pick(opened(s3), PlaceDependent(), OPTIONS, client=workers, scratch=tmp_path)
    assert (ours.zyx.tobytes(), ours.score.tobytes()) == (theirs.zyx.tobytes(), theirs.score.tobytes())
    store = connect(s3.address("volumes/one"), s3.options(key="test", secret="test"), read_only=False)
    volume = ingest(opened(s3), store, voxel_size=14.5, client=workers)
    np.testing.assert_array_equal(
        volume.array[:], ingest(open_tomogram(folder), tmp_path / "v", voxel_size=14.5).array[:]
    )
    assert open_volume(store).percentiles == volume.percentiles


def test_crops_are_streamed_from_working_volumes_in_a_bucket(
    s3: S3, way: Way, stored: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    here = ingest(open_tomogram(folder), tmp_path / "volume", voxel_size=14.5)
    store = connect(s3.address("volumes/taught"), s3.options(key="test", secret="test"), read_only=False)
    ingest(open_tomogram(folder), store, voxel_size=14.5)
    sampling = Sampling(window=Window((32, 32, 32), (4, 4, 4)), radius=4.0)
    centre = np.array([[length / 2 for length in here.shape]])
    crops = []
    for volume in (here, open_volume(store)):
        way.reset()
        epochs = Epochs([Example(volume, centre)], sampling, seed=1)
        assert not [one for one in way.asked if "/0/c/" in one.path]  # which crops there are takes no voxel
        crops.append([epochs.batch(2, step) for step in range(epochs.steps(2))])
    assert [one for one in way.asked if "/0/c/" in one.path]
    assert len(crops[0]) > 1
    for ours, theirs in zip(*crops, strict=True):
        np.testing.assert_array_equal(ours.voxels, theirs.voxels)
        np.testing.assert_array_equal(ours.label, theirs.label)


@pytest.mark.parametrize("by", ["this process", "workers"])
@pytest.mark.parametrize("key", ["TS_1.zarr", "TS_1.mrc"])
def test_all_that_is_fetched_is_counted(
    by: str, key: str, s3: S3, way: Way, stored: dict[str, int], request: Any, tmp_path: Path
) -> None:
    client = request.getfixturevalue("workers") if by == "workers" else None
    tomogram = opened(s3, key)
    volume = ingest(tomogram, tmp_path / "volume", voxel_size=14.5, client=client)
    traffic = tomogram.traffic
    assert traffic is not None
    found = sorted((one for one in way.asked if one.status in (200, 206)), key=lambda one: one.sent)
    assert traffic.bytes == sum(one.sent for one in found)
    assert traffic.requests == len(way.asked)
    whole = {one.path: one.sent for one in found}
    assert traffic.stored == sum(whole.values())  # each of these objects is small enough for one request
    for path in {one.path for one in way.data()}:
        times = sum(one.path == path and one.sent == whole[path] for one in way.data())
        assert times <= (1 if client is None else 3)  # here and by each worker once
    again = ingest(tomogram, tmp_path / "volume", voxel_size=14.5, client=client)
    assert again.percentiles == volume.percentiles
    assert traffic.requests == len(way.asked)


def test_picks_are_written_to_an_address(
    s3: S3, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    picks = Picks(zyx=np.array([[1.0, 2.0, 3.0]]), score=np.array([0.5]), voxel_size=10.0, tomogram="TS_1")
    write_picks(picks, s3.address("picks/TS_1.star"))
    write_picks(picks, tmp_path / "TS_1.star")
    found = s3.bucket.client.get_object(Bucket="tomograms", Key="picks/TS_1.star")["Body"].read()
    assert found == (tmp_path / "TS_1.star").read_bytes()


def test_a_picker_without_a_name_needs_a_place_for_its_map(s3: S3, folder: Path) -> None:
    nameless = PlaceDependent()
    del nameless.fingerprint
    with pytest.raises(PlanError, match="picker without a fingerprint, and scratch on an object store"):
        pick(open_tomogram(folder), nameless, OPTIONS, scratch=s3.address("scratch"))


def test_nothing_warns_of_what_was_left_open(s3: S3, stored: dict[str, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in ("TS_1.zarr", "TS_1.mrc", "packed.mrc.gz"):
            opened(s3, key).read(ALL)
