"""Credentials that are passed: each place gets its own, workers have them too, and nothing keeps them."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.blobs import NamedBlobPicker, blobs
from tests.buckets import portal_zarr
from tests.scorers import PlaceDependent
from tomocpt_stream import picker
from tomocpt_stream.__main__ import main
from tomocpt_stream.errors import CheckpointError, FormatError, SourceError
from tomocpt_stream.formats import read_picks, write_picks
from tomocpt_stream.heatmap import PickOptions, open_heatmap, predict
from tomocpt_stream.lazy import heatmap_lazy
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.pipeline import VOLUME, pick, plan_pick
from tomocpt_stream.remote import ForbiddenError, connect
from tomocpt_stream.request import PickRequest
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.verification import verify
from tomocpt_stream.volume import ingest, open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result
    from distributed import Client

    from tests.buckets import S3, Way
    from tomocpt_stream.picks import Picks

SHAPE = (20, 40, 44)
VOXELS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
MASK = np.zeros(SHAPE, np.float32)
MASK[:, 10:36, :30] = 1
OPTIONS = PickOptions(60.0, threshold=0.5, min_distance=20.0, stitch="crop", batch_size=3, contrast="dark")
SECRET = "hush-hush-hush"
LAB, OTHER = ({"key": name, "secret": SECRET} for name in ("LABKEY", "OTHERKEY"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tomogram and its mask on the disk."""
    folder = tmp_path_factory.mktemp("private")
    portal_zarr(folder / "TS_1.zarr", VOXELS, 10.0, 32, levels=1)
    portal_zarr(folder / "mask.zarr", MASK, 10.0, 32, levels=1)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Picks:
    """The picks of the disk."""
    return pick(open_tomogram(folder / "TS_1.zarr"), PlaceDependent(), OPTIONS, mask=folder / "mask.zarr")


@pytest.fixture
def lab(s3: S3, way: Way, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    """The way to a place of the lab and another place, each with a key of its own; none is at hand."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    for place in ("lab", "other"):
        for name in ("TS_1.zarr", "mask.zarr"):
            s3.bucket.put_folder(folder / name, f"{place}/{name}")
    for key in s3.bucket.keys("lab/scratch") + s3.bucket.keys("other/maps"):
        s3.bucket.client.delete_object(Bucket=s3.bucket.name, Key=key)
    way.private |= {"lab/": "LABKEY", "other/": "OTHERKEY"}
    return way


def same(one: Picks, other: Picks) -> bool:
    return (one.zyx.tobytes(), one.score.tobytes()) == (other.zyx.tobytes(), other.score.tobytes())


def refuse_secrets(s3: S3) -> None:
    """Fail where an object of the bucket holds a secret, or a key's name."""
    for key in [*s3.bucket.keys("lab/"), *s3.bucket.keys("other/")]:
        data = s3.bucket.client.get_object(Bucket=s3.bucket.name, Key=key)["Body"].read()
        assert not any(word in data for word in (SECRET.encode(), b"LABKEY", b"OTHERKEY")), key


def test_workers_have_the_credentials_of_each_place_and_nothing_keeps_them(
    s3: S3, lab: Way, ours: Picks, workers: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(ours) > 5
    tomogram = open_tomogram(s3.address("other/TS_1.zarr"), storage_options=s3.options(**OTHER))
    theirs = pick(
        tomogram,
        PlaceDependent(),
        OPTIONS,
        mask=s3.address("lab/mask.zarr"),
        scratch=s3.address("lab/scratch"),
        keep_heatmap=connect(s3.address("other/maps/a"), s3.options(**OTHER), read_only=False),
        client=workers,
        verify=True,
        storage_options=s3.options(**LAB),
    )
    assert same(ours, theirs)
    assert {one.signer for one in lab.asked} == {"LABKEY", "OTHERKEY"}
    assert not [one for one in lab.asked if one.status == 403]
    heatmap = open_heatmap(s3.address("other/maps/a"), storage_options=s3.options(**OTHER))
    assert pickle.loads(pickle.dumps(heatmap)).array[0, 0, 0] == heatmap.array[0, 0, 0]
    with pytest.raises(ForbiddenError, match="refuses its object"):
        open_heatmap(s3.address("other/maps/a"), storage_options=s3.options(**LAB))
    refuse_secrets(s3)
    logs = [*capfd.readouterr(), str(workers.get_worker_logs()), str(workers.get_scheduler_logs())]
    assert not any(SECRET in log for log in logs)


def test_each_call_takes_them(s3: S3, lab: Way, folder: Path, ours: Picks) -> None:
    given = s3.options(**LAB)
    tomogram, scorer = open_tomogram(folder / "TS_1.zarr"), PlaceDependent()
    grid, plan = plan_pick(tomogram, scorer, OPTIONS)
    place = s3.address("lab/scratch")
    ingest(tomogram, f"{place}/v", voxel_size=grid.voxel_size, storage_options=given)
    volume = open_volume(f"{place}/v", storage_options=given)
    mask = s3.address("lab/mask.zarr")
    heatmap = predict(
        volume, scorer, plan, store=f"{place}/m", options=OPTIONS, mask=mask, storage_options=given
    )
    lazy = heatmap_lazy(tomogram, scorer, OPTIONS, mask=mask, scratch=place, storage_options=given)
    part = (slice(0, 4), slice(0, 4), slice(0, 4))
    np.testing.assert_array_equal(lazy[part].compute(scheduler="sync"), heatmap.array[part])
    assert any(VOLUME in one.path for one in lab.asked)
    write_picks(ours, f"{place}/TS_1.star", storage_options=given)
    (back,) = read_picks(f"{place}/TS_1.star", storage_options=given).values()
    np.testing.assert_allclose(back.zyx, ours.zyx, atol=1e-5)
    for call in (
        lambda: open_volume(f"{place}/v", storage_options=s3.options()),
        lambda: read_picks(f"{place}/TS_1.star", storage_options=s3.options(**OTHER)),
        lambda: write_picks(ours, f"{place}/no.star", storage_options=s3.options(**OTHER)),
    ):
        with pytest.raises(ForbiddenError, match="refuses its object"):
            call()
    assert not s3.bucket.keys("lab/scratch/no.star")


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["pick", "--diameter", "80", *map(str, words)])
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return result


@pytest.fixture
def words(s3: S3, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of the lab's place, as typed; a stand-in for the shipped picker."""
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker())
    found = s3.options(access_key_id="LABKEY", secret_access_key=SECRET)
    return [word for name, value in found.items() for word in ("--storage-option", f"{name}={value}")]


def test_the_command_writes_all_it_writes_to_addresses(
    s3: S3, lab: Way, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_mrc(
        tmp_path / "TS_2.mrc", blobs((30, 50, 44), np.array([[8.0, 10.3, 9.0], [20.6, 12.0, 33.2]])), 10
    )
    place = s3.address("lab/scratch")
    shown = run("TS_2.mrc", *words, "--output", f"{place}/picks", "--keep-heatmap", f"{place}/maps")
    assert f"{place}/picks/TS_2.star" in shown.output
    run("TS_2.mrc", "--output", "picks/")
    for name in ("TS_2.star", "TS_2.png"):
        found = s3.bucket.client.get_object(Bucket=s3.bucket.name, Key=f"lab/scratch/picks/{name}")
        assert found["Body"].read() == (tmp_path / "picks" / name).read_bytes()
    assert open_heatmap(f"{place}/maps/TS_2.zarr", storage_options=s3.options(**LAB)).name == "TS_2"
    assert [path.name for path in tmp_path.iterdir()] == ["TS_2.mrc", "picks"]
    assert not [key for key in s3.bucket.keys("lab/") if "probe" in key]
    refuse_secrets(s3)


def test_a_place_that_takes_nothing_is_refused_before_any_work(
    s3: S3, lab: Way, words: list[str], folder: Path
) -> None:
    shown = run(folder / "TS_1.zarr", *words, "--output", s3.address("other/all.star"), code=1)
    assert re.match(r"Error: s3://tomograms/other refuses its object", shown.output)


@pytest.mark.parametrize("wrong", ["secret hush-hush-hush", SECRET])
def test_what_is_no_option_is_not_repeated(wrong: str, folder: Path) -> None:
    assert "each is KEY=VALUE" in run(folder / "TS_1.zarr", "--storage-option", wrong, code=2).output


def test_a_secret_in_an_address_is_not_repeated(words: list[str], tmp_path: Path) -> None:
    for address in (f"s3://LABKEY:{SECRET}@box/a.zarr", f"https://host/a.mrc?X-Amz-Signature={SECRET}"):
        for last in ((), (address,)):
            said = run(address, *last, "--output", f"{tmp_path}/", code=1).output
            assert "pass credentials in storage_options" in said or "given more than once" in said
            assert SECRET not in said


@pytest.mark.parametrize("name", ["a.star", "a.picks"])
def test_a_signature_of_a_file_of_picks_is_not_repeated(name: str) -> None:
    with pytest.raises((FormatError, SourceError)) as error:
        read_picks(f"https://host/{name}?X-Amz-Signature={SECRET}")
    assert f"https://host/{name}" in str(error.value)
    assert SECRET not in str(error.value)


def test_options_are_for_the_provider_of_the_first_address() -> None:
    plain: dict[str, Any] = {
        "picker": "base",
        "stitch": "hann",
        "tta": False,
        "batch_size": 4,
        "memory": None,
    }
    given = {"endpoint": "there", "timeout": "5"}
    less = {"timeout": "5"}
    asked = PickRequest(
        tomograms=("a.mrc", "https://host/b.zarr", "gs://box/c.zarr"),
        output="s3://box/picks",
        scratch="gs://box/scratch",
        mask="s3://box/mask.zarr",
        device="auto",
        diameter=80.0,
        storage_options=given,
        **plain,
    )
    every = [*asked.tomograms, asked.output, asked.scratch, asked.mask, None, "GS://other/d.zarr"]
    assert [asked.options_for(one) for one in every] == [less, less, given, less, given, less, less, given]
    portal = replace(asked, tomograms=("s3://cryoet-data-portal-public/a.zarr",), scratch="s3://box/scratch")
    assert portal.options_for(portal.tomograms[0]) == less
    assert portal.options_for(portal.scratch) == given
    # What the portal has is read as it always is.
    records: Any = {"gs://box/c.zarr": None}
    asked = replace(asked, records=records)
    assert [asked.options_for(one) for one in every] == [less, less, less, less, given, less, less, given]
    assert "there" not in repr(asked)


def test_picks_are_written_below_a_file_address(
    tmp_path: Path, ours: Picks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("some.star", "some.mod"):
        address = f"file://{tmp_path}/more%20of/{name}"
        write_picks(ours, address)
        (found,) = read_picks(address, voxel_size=ours.voxel_size).values()
        assert len(found) == len(ours)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["more of", "some.mod", "some.star"]


def test_errors_in_a_file_name_its_address(s3: S3, way: Way) -> None:
    s3.bucket.put("broken.star", b"data_particles\n\nloop_\n_rlnCoordinateX #1\n1.0\n")
    with pytest.raises(FormatError) as caught:
        read_picks(s3.address("broken.star"), storage_options=s3.options())
    assert "s3://tomograms/broken.star" in caught.value.found
    with pytest.raises(FormatError, match=r"no object s3://tomograms/nowhere\.star"):
        read_picks(s3.address("nowhere.star"), storage_options=s3.options())


def test_inspect_takes_its_picture_and_its_picker_where_the_tomogram_is(
    lab: Way, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", lab.url)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    loaded: list[dict[str, Any]] = []

    def load(source: str, *, device: str, storage_options: dict[str, Any]) -> NamedBlobPicker:
        assert (source, device) == (s3.address("lab/mine.safetensors"), "auto")
        loaded.append(storage_options)
        return NamedBlobPicker()

    monkeypatch.setattr(picker, "load_picker", load)
    words = ["inspect", s3.address("lab/TS_1.zarr"), "--diameter", "80", "--picker"]
    words += [s3.address("lab/mine.safetensors"), "--output", s3.address("lab/size.png")]
    options = ["--storage-option", "key=LABKEY", "--storage-option", f"secret={SECRET}"]
    result = CliRunner().invoke(main, [*words, *options])
    assert result.exit_code == 0, result.output
    assert f"picture -> {s3.address('lab/size.png')}" in result.stdout
    drawn = s3.bucket.client.get_object(Bucket=s3.bucket.name, Key="lab/size.png")["Body"].read()
    assert drawn.startswith(b"\x89PNG")
    assert loaded == [LAB]


def test_inspect_gives_its_options_to_one_provider(
    folder: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first address, which is that of the picture here, as it is for `pick`."""
    loaded: list[dict[str, Any]] = []

    def load(*_: str, device: str, storage_options: dict[str, Any]) -> NamedBlobPicker:
        assert device == "auto"
        loaded.append(storage_options)
        return NamedBlobPicker()

    monkeypatch.setattr(picker, "load_picker", load)
    words = ["inspect", str(folder / "TS_1.zarr"), "--diameter", "80", "--no-picture", "--picker"]
    options = ["--storage-option", "key=LABKEY", "--storage-option", "timeout=5"]
    for more in ([], ["--output", "gs://box/size.png"]):
        result = CliRunner().invoke(main, [*words, s3.address("lab/mine.safetensors"), *more, *options])
        assert result.exit_code == 0, result.output
    assert loaded == [{"key": "LABKEY", "timeout": "5"}, {"timeout": "5"}]


def test_a_store_at_an_address_is_verified_with_its_options(lab: Way, s3: S3, folder: Path) -> None:
    volume = ingest(open_tomogram(folder / "TS_1.zarr"), folder / "well.zarr", voxel_size=10.0)
    assert verify(volume.store) == []
    s3.bucket.put_folder(folder / "well.zarr", "lab/well.zarr")
    options = s3.options(**LAB)
    assert verify(s3.address("lab/well.zarr"), storage_options=options) == []
    chunk = next(key for key in s3.bucket.keys("lab/well.zarr") if "/c/" in key)
    s3.bucket.client.delete_object(Bucket=s3.bucket.name, Key=chunk)
    (said, *_) = verify(s3.address("lab/well.zarr"), storage_options=options)
    assert "lost its object" in said
    with pytest.raises(CheckpointError, match="neither a volume nor a heat map"):
        verify(s3.address("lab/nothing.zarr"), storage_options=options)
