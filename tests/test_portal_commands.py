"""`tomocpt-stream portal` against the stand-in of the API and a real S3 server."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.blobs import NamedBlobPicker, blobs
from tests.buckets import portal_zarr
from tests.portal_rows import FIRST_DATASET, OWN_TOMOGRAMS, small_world
from tests.portal_server import portal_server
from tests.test_portal_annotations import FILES
from tomocpt_stream import picker, portal_commands
from tomocpt_stream.__main__ import main
from tomocpt_stream.formats import read_picks
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.pipeline import pick
from tomocpt_stream.portal import find_picks, find_tomograms
from tomocpt_stream.portal_records import Selection
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

    from tests.buckets import S3, Way
    from tests.portal_server import PortalServer
    from tomocpt_stream.request import PickRequest

SHAPE = (30, 60, 64)
CENTRES = np.array([[8.0, 10.3, 9.0], [20.6, 12.0, 33.2], [15.0, 36.4, 20.5], [22.0, 40.0, 38.0]])
RIBOSOME = "cytosolic ribosome"
# TS_2 has half data sets only.
CHOICE = ["--dataset", FIRST_DATASET, "--voxel-spacing", 10.012]
PICK = [*CHOICE, "--diameter", 80, "--no-picture"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> dict[str, Path]:
    """Two tomograms of 10.012 Å in the bucket, and on the disk; by run name. One has a membrane."""
    found = {}
    for number, run in enumerate(("TS_1", "TS_10")):
        voxels = blobs(SHAPE, CENTRES, seed=number)
        folder = portal_zarr(tmp_path_factory.mktemp(run) / f"{run}.zarr", voxels, 10.012, 32)
        s3.bucket.put_folder(folder, f"commands/{run}.zarr")
        found[run] = folder
    membrane = np.zeros(SHAPE, np.float32)
    membrane[:, :24] = 1
    folder = portal_zarr(tmp_path_factory.mktemp("membrane") / "membrane.zarr", membrane, 10.012, 32)
    s3.bucket.put_folder(folder, "commands/membrane.zarr")
    for name in ("ribosome-1.0_point", "ribosome-1.0_orientedpoint"):
        number = {"ribosome-1.0_point": 921, "ribosome-1.0_orientedpoint": 922}[name]
        s3.bucket.put(f"commands/{name}.ndjson", FILES[number])
    return found


@pytest.fixture
def server(
    s3: S3, way: Way, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[PortalServer]:
    """The stand-in; tomograms, points and membrane of 10.012 Å are those in the bucket."""
    rows = small_world()
    runs = {row["id"]: row["name"] for row in rows["runs"] if row["datasetId"] == FIRST_DATASET}
    for row in rows["tomograms"]:
        name = runs.get(row["runId"])
        if name in folders and row["voxelSpacing"] > 9:
            row |= dict(zip(("sizeZ", "sizeY", "sizeX"), SHAPE, strict=True))
            row["s3OmezarrDir"] = s3.address(f"commands/{name}.zarr")
    for row in rows["annotationFiles"]:
        name = row["s3Path"].rpartition("/")[2].replace("-1.0_segmentationmask", "")
        row["s3Path"] = s3.address(f"commands/{name}")
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker())
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    with portal_server(rows) as found:
        monkeypatch.setenv("CRYOET_PORTAL_GRAPHQL_URL", found.url)
        yield found


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["portal", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_list_shows_what_would_be_picked_and_totals(server: PortalServer, tmp_path: Path) -> None:
    shown = run("list", "--deposition", f"CZCDP-{OWN_TOMOGRAMS}", "--diameter", 200)
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:4] == ["dataset", "run", "id", "size"]
    assert lines[0].split()[-2:] == ["level", "GB"]
    assert any("DS-10440" in line and "TS_1" in line and "10.012" in line for line in lines)
    assert any("GB to read at level 0" in line and "windows" in line for line in lines)
    assert "left out" in lines[-1]
    assert "voxel spacing" in shown.stderr  # the preference is said
    detailed = run("list", "--deposition", OWN_TOMOGRAMS, "--left-out").stdout
    assert "left out: TM-" in detailed


def test_list_as_data_is_the_same_selection(server: PortalServer, tmp_path: Path) -> None:
    manifest = tmp_path / "selection.json"
    data = json.loads(run("list", "--dataset", FIRST_DATASET, "--json", "--manifest", manifest).stdout)
    ids = [record["id"] for record in data["records"]]
    assert [record.id for record in Selection.read(manifest).records] == ids
    assert data["summary"]["tomograms"] == len(ids) > 1
    table = list(csv.DictReader(io.StringIO(run("list", "--dataset", FIRST_DATASET, "--csv").stdout)))
    assert [int(row["id"].removeprefix("TM-")) for row in table] == ids
    asked = len(server.requests)
    again = json.loads(run("list", "--selection", manifest, "--json").stdout)
    assert again["records"] == data["records"]
    assert len(server.requests) == asked  # a kept selection asks the portal nothing
    everything = json.loads(run("list", "--dataset", FIRST_DATASET, "--all", "--json").stdout)
    assert len(everything["records"]) > len(ids)


def test_what_cannot_be_asked_is_refused(server: PortalServer, tmp_path: Path) -> None:
    assert "say what is meant" in run("list", code=2).stderr
    assert "no deposition 99999" in run("list", "--deposition", "CZCDP-99999", code=1).stderr
    assert "voxel_spacing" in run("list", "--dataset", FIRST_DATASET, "--voxel-spacing", 7, code=1).stderr
    run("list", "--dataset", FIRST_DATASET, "--manifest", tmp_path / "a.json")
    both = run("list", "--selection", tmp_path / "a.json", "--dataset", FIRST_DATASET, code=2)
    assert "leave out the other options" in both.stderr


def test_a_dataset_is_picked_from_the_bucket(
    server: PortalServer, way: Way, folders: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "picks"
    shown = run("pick", *PICK, "--output", output)
    line = r"fetched \S+ MB in \d+ requests, 1\.0\d times the \S+ MB stored"
    assert len(re.findall(line, shown.stdout)) == 2
    for name, folder in folders.items():
        ours = pick(open_tomogram(folder), NamedBlobPicker(), PickOptions(80.0, contrast="dark"))
        theirs = read_picks(output / f"{name}.star")[name]
        assert len(ours) == len(CENTRES)
        np.testing.assert_allclose(theirs.zyx, ours.zyx, atol=1e-5)
        assert theirs.voxel_size == 10.012
    assert sorted(path.name for path in output.iterdir()) == [
        "TS_1.star",
        "TS_10.star",
        "citations.bib",
        "citations.md",
        "selection.json",
    ]
    assert "10.1038/s41592-024-02477-2" in (output / "citations.md").read_text()
    again = run("pick", "--selection", output / "selection.json", *PICK[4:], "--output", tmp_path / "again")
    assert "2 tomograms" in again.stdout
    assert (tmp_path / "again" / "TS_1.star").read_bytes() == (output / "TS_1.star").read_bytes()


def test_the_voxel_spacing_is_that_of_the_pickers_particles(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PickRequest] = []
    monkeypatch.setattr(portal_commands, "pick_all", lambda request, model: asked.append(request))
    for radius in (10.0, 4.0):  # of which 80 Å are 20 voxels, and 8
        model = NamedBlobPicker(particle_radius=radius)
        monkeypatch.setattr(picker, "load_picker", lambda *_, model=model, **__: model)
        run("pick", "--dataset", FIRST_DATASET, "--run", "TS_1", "--diameter", 80, "--output", tmp_path)
    assert [[record.voxel_spacing for record in each.records.values()] for each in asked] == [
        [4.99],
        [10.012],
    ]


def test_the_picker_may_lie_where_the_output_goes(
    server: PortalServer, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, dict[str, Any]]] = []

    def load(source: str, *, device: str, storage_options: dict[str, Any]) -> NamedBlobPicker:
        assert device == "auto"
        loaded.append((source, storage_options))
        return NamedBlobPicker()

    monkeypatch.setattr(portal_commands, "pick_all", lambda *_: [])
    monkeypatch.setattr(portal_commands, "_write", lambda *_: None)
    monkeypatch.setattr(picker, "load_picker", load)
    mine, lab = s3.address("into/mine.safetensors"), ["--storage-option", "region=us-west-2"]
    for output in (s3.address("into/spot/"), "gs://box/picks/"):
        run("pick", *PICK, "--picker", mine, "--output", output, *lab)
    assert loaded == [(mine, {"region": "us-west-2"}), (mine, {})]


def test_a_dataset_is_picked_into_a_bucket(server: PortalServer, s3: S3, way: Way, tmp_path: Path) -> None:
    lab = ["--storage-option", "key=LABKEY", "--storage-option", "secret=hush-hush"]
    way.private["into/"] = "LABKEY"
    output = s3.address("into/picks")
    shown = run("pick", *PICK, "--output", f"{output}/", *lab)
    assert f"{output}/TS_1.star" in shown.stdout
    assert [key.rpartition("/")[2] for key in s3.bucket.keys("into/")] == [
        "TS_1.star",
        "TS_10.star",
        "citations.bib",
        "citations.md",
        "selection.json",
    ]
    # The portal's objects are asked for without the lab's key.
    signers = {one.signer for one in way.asked if "commands/" in one.path}
    assert signers == {""}
    words = ["annotations", "--tomogram", "TM-8004", "--object", RIBOSOME, "--ground-truth"]
    run(*words, "--output", s3.address("into/all.star"), *lab)
    run(*words, "--output", s3.address("into/points"), *lab)
    assert {"into/all.star", "into/citations.md", "into/points/TS_1.star"} <= set(s3.bucket.keys("into/"))


def test_a_file_takes_no_folder(server: PortalServer, tmp_path: Path) -> None:
    (tmp_path / "picks").write_text("mine")
    assert "takes a folder" in run("pick", *PICK, "--output", tmp_path / "picks", code=2).stderr


def test_one_bad_tomogram_does_not_stop_the_others(server: PortalServer, way: Way, tmp_path: Path) -> None:
    way.fault = lambda method, path, _: "403" if "TS_1.zarr" in path else None
    shown = run("pick", *PICK, "--output", tmp_path / "picks", code=1)
    assert "1 of 2 tomograms were not done" in shown.stderr
    assert "refuses its object" in shown.stderr
    assert [path.name for path in (tmp_path / "picks").glob("*.star")] == ["TS_10.star"]


def test_picks_lie_where_an_object_was_segmented(server: PortalServer, tmp_path: Path) -> None:
    shown = run("pick", *PICK, "--mask-object", "membrane", "--output", tmp_path)
    found = read_picks(tmp_path / "TS_1.star")["TS_1"]
    assert len(found) == 2
    assert found.zyx[:, 1].max() < 24
    # What was not segmented is named and left out, not picked everywhere.
    assert "TS_10" in shown.stderr
    assert not (tmp_path / "TS_10.star").exists()
    none = run("pick", *PICK, "--mask-object", "vault", "--output", tmp_path / "none", code=1)
    assert "vault" in none.stderr
    assert not (tmp_path / "none").exists()


def test_points_are_listed_and_written(server: PortalServer, tmp_path: Path) -> None:
    words = ["annotations", "--tomogram", "TM-8004", "--object", RIBOSOME]
    shown = run(*words, "--ground-truth", "--output", tmp_path / "points")
    assert "3 points on 1 tomogram" in shown.stdout
    found = read_picks(tmp_path / "points" / "TS_1.star")["TS_1"]
    records = find_tomograms(tomogram=8004)
    assert "points lie outside the volume of TS_1 (1 of 3)" in shown.stderr
    with pytest.warns(UserWarning, match="points lie outside"):
        wanted = find_picks(records, object=RIBOSOME, ground_truth=True)["TS_1"]
    np.testing.assert_allclose(found.zyx, wanted.zyx, atol=1e-5)
    assert "Ada" in (tmp_path / "points" / "citations.md").read_text()
    run(*words, "--ground-truth", "--output", tmp_path / "all.star")
    assert len(read_picks(tmp_path / "all.star")["TS_1"]) == 3
    table = run(*words, "--ground-truth").stdout
    assert table.splitlines()[1].split() == ["TS_1", "cytosolic", "ribosome", "3"]


def test_points_are_written_in_any_format(server: PortalServer, tmp_path: Path) -> None:
    words = ["annotations", "--tomogram", "TM-8004", "--object", RIBOSOME, "--ground-truth"]
    run(*words, "--output", tmp_path / "points", "--format", "copick")
    (found,) = read_picks(tmp_path / "points", format="copick").values()
    run(*words, "--output", tmp_path / "all.csv", "--format", "csv")
    np.testing.assert_allclose(found.zyx, read_picks(tmp_path / "all.csv")["TS_1"].zyx, atol=1e-4)
    assert len(found) == 3
