"""Labelled tomograms of the stand-in of the portal, whose files lie on a real S3 server."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.blobs import blobs
from tests.buckets import portal_zarr
from tests.portal_rows import COARSE, FINE, FIRST_DATASET, SECOND_DATASET, Rows, small_world
from tests.portal_server import portal_server
from tests.test_portal_annotations import points
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Sampling, read_crop
from tomocpt_stream.errors import FormatError, PortalError, SourceError
from tomocpt_stream.formats import write_picks
from tomocpt_stream.label_queries import read_query
from tomocpt_stream.labelled import LabelledTomogram, open_labelled
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.picks import Picks
from tomocpt_stream.portal_labels import PortalLabels, find_labelled
from tomocpt_stream.portal_queries import PortalAPI
from tomocpt_stream.portal_records import Selection
from tomocpt_stream.tomogram import Tomogram, open_tomogram

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.buckets import S3, Way

SHAPE = (24, 32, 40)
CENTRES = np.array([[8.0, 10.0, 9.0], [15.0, 20.5, 31.0]])
XYZ = [tuple(one[::-1]) for one in CENTRES.tolist()]
WINDOW = Window((32, 32, 32), (4, 4, 4))
# Runs TS_1 and TS_10 of the first dataset have points, and Position_7 of the second; TS_2 has none.
RIBOSOME = f"dataset={FIRST_DATASET} object=*ribosome* diameter=80"


@dataclass
class World:
    """The small world, in which TS_10 has points too; tomograms and points are in the bucket."""

    s3: S3
    folder: Path
    rows: Rows

    def row(self, table: str, number: int) -> dict[str, Any]:
        return next(row for row in self.rows[table] if row["id"] == number)

    def copy(self, table: str, number: int, **changes: Any) -> None:
        self.rows[table].append({**self.row(table, number), **changes})

    @contextmanager
    def api(self) -> Iterator[PortalAPI]:
        with portal_server(self.rows) as server:
            yield PortalAPI(server.url, cache=False)

    def find(self, *queries: str, **asked: Any) -> PortalLabels:
        with self.api() as api:
            options = self.s3.options(max_retries=0)
            return find_labelled(*map(read_query, queries), api=api, storage_options=options, **asked)

    def refused(self, *queries: str) -> str:
        with pytest.raises((PortalError, SourceError, FormatError)) as error:
            self.find(*queries)
        return str(error.value)


@pytest.fixture(scope="module")
def stored(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> World:
    rows, folder = small_world(), tmp_path_factory.mktemp("portal")
    s3.way.reset()
    runs = {row["id"]: row["name"] for row in rows["runs"]}
    rows["annotations"].append({**rows["annotations"][0], "id": 906, "runId": 503, "objectCount": 2})
    rows["annotations"][0]["objectCount"] = 2
    rows["annotationShapes"].append({"id": 916, "annotationId": 906, "shapeType": "Point"})
    file = {"annotationShapeId": 916, "alignmentId": 704, "tomogramVoxelSpacingId": 604}
    rows["annotationFiles"].append({**rows["annotationFiles"][0], "id": 927, **file})
    for number, size in ((501, COARSE), (503, COARSE), (504, 7.84)):
        made = portal_zarr(folder / f"{runs[number]}.zarr", blobs(SHAPE, CENTRES, seed=number), size, 32)
        s3.bucket.put_folder(made, f"labels/{runs[number]}.zarr")
    for row in rows["tomograms"]:
        if row["voxelSpacing"] > 7 and row["runId"] in (501, 503, 504):
            row |= dict(zip(("sizeZ", "sizeY", "sizeX"), SHAPE, strict=True))
            row["s3OmezarrDir"] = s3.address(f"labels/{runs[row['runId']]}.zarr")
        else:
            row["s3OmezarrDir"] = s3.address("labels/gone.zarr")
    for row in rows["annotationFiles"]:
        row["s3Path"] = s3.address(f"labels/{row['id']}.ndjson")
        s3.bucket.put(f"labels/{row['id']}.ndjson", points(*XYZ))
    return World(s3, folder, rows)


@pytest.fixture
def world(stored: World, way: Way) -> World:
    """The world of the module, whose rows a test may change."""
    return World(stored.s3, stored.folder, copy.deepcopy(stored.rows))


def _picks(**fields: Any) -> Picks:
    return Picks(CENTRES, np.ones(len(CENTRES), np.float32), **fields)


def test_voxels_and_truth_come_from_the_bucket(world: World, way: Way, tmp_path: Path) -> None:
    labels = world.find(RIBOSOME, particle_radius=4.0)
    assert [record.run for record in labels.selection.records] == ["TS_1", "TS_10"]
    assert not way.bytes or all(one.path.endswith(".ndjson") for one in way.data())  # no voxel so far
    for one in labels.examples:
        assert isinstance(one.picks, Picks)
        np.testing.assert_array_equal(one.picks.zyx, CENTRES)
        assert (one.picks.particle, one.contrast, one.diameter) == ("cytosolic ribosome", "dark", 80.0)
    picker = Picker(
        build_network(named_architecture("small") | {"depths": [1, 1, 1, 1]}),
        picker_metadata(
            named_architecture("small") | {"depths": [1, 1, 1, 1]}, window=WINDOW, particle_radius=4.0
        ),
    )
    near, _ = open_labelled(labels.examples, picker)
    local = LabelledTomogram(
        open_tomogram(world.folder / "TS_1.zarr", voxel_size=COARSE), _picks(voxel_size=COARSE), 80.0
    )
    (own,) = open_labelled([local], picker)
    crops = [
        read_crop(each.ingest(tmp_path / name), (-4, 0, 4), Sampling(window=WINDOW, radius=4.0))
        for name, each in (("bucket", near), ("disk", own))
    ]
    for theirs, ours in zip(*crops, strict=True):
        np.testing.assert_array_equal(theirs, ours)
    assert crops[0][1].max() > 0.9  # the label of a particle


def test_runs_without_the_truth_are_named_and_left_out(world: World) -> None:
    labels = world.find(RIBOSOME)
    assert any("1 left out, without the truth asked for (TS_2)" in note for note in labels.notes)
    assert "dataset 10440: 2 runs to learn from (4 of cytosolic ribosome)" in labels.notes[0]
    why = {each.record.id: each.why for each in labels.selection.left_out}
    assert why[8006] == "no such points"
    assert "prefer" in why[8003]
    assert 8004 not in why


def test_the_tomogram_is_one_that_the_truth_lies_on(world: World) -> None:
    # Working voxels of 4 Å are nearest to the tomograms of 4.99 Å, on which there are no points.
    labels = world.find(RIBOSOME)
    assert {record.voxel_spacing for record in labels.selection.records} == {COARSE}
    assert FINE in {each.record.voxel_spacing for each in labels.selection.left_out}
    # The automated points lie on the other alignment of TS_1.
    other = world.find(f"{RIBOSOME} method=automated")
    assert [record.id for record in other.selection.records] == [8005]
    every = world.find(f"{RIBOSOME} ground_truth=yes all=yes run=TS_1")
    assert [record.id for record in every.selection.records] == [8003, 8004]
    assert {one.group for one in every.examples} == {"DS-10440/TS_1"}
    assert len({one.tomogram.name for one in every.examples if isinstance(one.tomogram, Tomogram)}) == 2


def test_ambiguous_annotations_are_listed(world: World) -> None:
    world.copy("annotations", 902, id=907)
    world.copy("annotationShapes", 911, id=917, annotationId=907)
    world.copy("annotationFiles", 921, id=928, annotationShapeId=917)
    said = world.refused(RIBOSOME)
    assert "may be the truth of 1 run: TS_1: AN-901 (" in said
    assert "AN-907 (" in said
    assert "manual, ground truth, CZCDP-10310" in said
    for choice in ("ground_truth=yes", "annotation=901,AN-906", "annotation_deposition=10310"):
        (file, *_) = world.find(f"{RIBOSOME} {choice}").annotations
        assert file.id == 901
    assert "no points of AN-77" in world.refused(f"{RIBOSOME} annotation=901,77")
    assert "annotations of 2 objects fit" in world.refused(
        f"dataset={FIRST_DATASET} object=* diameter=80 annotation=905,906"
    )


def test_what_is_not_there_is_said(world: World) -> None:
    assert "cytosolic ribosome (GO:0022626)" in world.refused(
        f"dataset={FIRST_DATASET} object=ribosome diameter=9"
    )
    assert "the portal has no dataset 77" in world.refused("dataset=77 object=* diameter=9")
    assert "without a run beside those of exclude=*" in world.refused(f"{RIBOSOME} exclude=*")
    left = world.find(f"{RIBOSOME} exclude=TS_1").selection
    assert [record.run for record in left.records] == ["TS_10"]
    misspelt = world.find(f"{RIBOSOME} exclude=TS_1,TS-10,TS_0*")
    assert "No run of dataset 10440 is called TS-10 or TS_0*, which exclude= names." in misspelt.notes


def test_tomograms_that_cannot_be_read_stop_it_or_are_left_out(world: World) -> None:
    world.row("tomograms", 8004)["s3OmezarrDir"] = world.s3.address("labels/gone.zarr")
    said = world.refused(RIBOSOME)
    assert said.startswith("1 of 2 tomograms cannot be read: TS_1: ")
    labels = world.find(f"{RIBOSOME} missing=skip")
    assert [record.run for record in labels.selection.records] == ["TS_10"]
    assert [file.id for file in labels.annotations] == [906]
    assert any(each.record.id == 8004 and "cannot be read" in each.why for each in labels.selection.left_out)
    world.row("annotationFiles", 927)["s3Path"] = world.s3.address("labels/gone.ndjson")
    assert "gone.ndjson" in world.refused(RIBOSOME)
    assert "1 of 2 tomograms cannot be read" in world.refused(f"{RIBOSOME} missing=skip")


def test_runs_kept_for_the_test_are_learnt_from_by_nobody(world: World) -> None:
    first, last = (world.find(f"{RIBOSOME} ground_truth=yes test=1 test_seed={seed}") for seed in (0, 3))
    for labels, kept, learnt in ((first, "TS_1", "TS_10"), (last, "TS_10", "TS_1")):
        assert [record.run for record in labels.tests[0].records] == [kept]
        assert [record.run for record in labels.selection.records] == [learnt]
        assert f"1 kept for the test ({kept})" in labels.notes[0]
    assert world.find(f"{RIBOSOME} test=1").tests[0].records == first.tests[0].records
    assert "test=2 of 2 runs" in world.refused(f"{RIBOSOME} test=2")
    # Another query of the same runs leaves it alone, too.
    actin = f"dataset={FIRST_DATASET} object=actin* diameter=70"
    both = world.find(f"{RIBOSOME} test=1 test_seed=3", actin)
    assert [one.group for one in both.examples] == ["DS-10440/TS_1"] * 2
    assert [[record.run for record in test.records] for test in both.tests] == [["TS_10"], []]
    assert "no run that is not kept for the test" in world.refused(f"{RIBOSOME} test=1", actin)


def test_several_queries_and_their_citations(world: World, tmp_path: Path) -> None:
    position = f"dataset={SECOND_DATASET} object=*ribosome* diameter=80"
    labels = world.find(f"{RIBOSOME} ground_truth=yes test=1", position)
    with world.api() as api:
        labels.write_account(tmp_path / "out", api=api)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "citations.bib",
        "citations.md",
        "selection.json",
        "test_1.json",
    ]
    cited = (tmp_path / "out" / "citations.md").read_text()
    assert "AN-904" in cited
    assert "10.1038/s41592-024-02477-2" in cited
    assert Selection.read(tmp_path / "out" / "test_1.json").records == labels.tests[0].records
    kept = Selection.read(tmp_path / "out" / "selection.json")
    assert {record.dataset_id for record in kept.records} == {FIRST_DATASET, SECOND_DATASET}
    # A selection that was kept is taken as it is.
    again = world.find(f"selection={tmp_path}/out/selection.json object=*ribosome* diameter=80")
    assert again.selection.records == kept.records
    assert json.loads((tmp_path / "out" / "selection.json").read_text())["notes"] == list(labels.notes)


def test_truth_of_a_file_is_matched_by_the_names_of_runs(world: World, tmp_path: Path) -> None:
    star = tmp_path / "truth.star"
    names = ("rec_TS_1_10.01Apx", "TS_10", "TS_100")
    write_picks([_picks(voxel_size=COARSE, shape=SHAPE, tomogram=name) for name in names], star)
    query = f"dataset={FIRST_DATASET} diameter=80 truth={star}"
    labels = world.find(query)
    assert [record.run for record in labels.selection.records] == ["TS_1", "TS_10"]
    for one in labels.examples:
        assert isinstance(one.picks, Picks)
        np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)
        assert one.picks.voxel_size == COARSE
    assert labels.annotations == ()
    assert any("Picks of no run that is asked for: TS_100" in note for note in labels.notes)
    assert any("without the truth asked for (TS_2)" in note for note in labels.notes)
    # Voxels of 4.99 Å are those of the finer tomogram of TS_1, whatever is preferred.
    write_picks(_picks(voxel_size=5.0, shape=SHAPE, tomogram="TS_1"), star)
    assert "TS_1: " in world.refused(query)  # the finer tomogram, which is not in the bucket
    write_picks(_picks(voxel_size=3.0, shape=SHAPE, tomogram="TS_1"), star)
    assert "in voxels of 3 Å; expected voxels of one of its tomograms: 4.99, 10.012 Å" in world.refused(query)
    write_picks(_picks(voxel_size=COARSE, shape=SHAPE, tomogram="elsewhere"), star)
    assert "their tomograms are elsewhere; expected tomograms called as the runs are: TS_1, TS_2" in (
        world.refused(query)
    )


def test_truth_in_other_formats_and_in_several_files(world: World, tmp_path: Path) -> None:
    paths = [tmp_path / "TS_1.csv", tmp_path / "TS_10.star"]
    write_picks(_picks(tomogram="TS_1"), paths[0])
    known: dict[str, Any] = {"voxel_size": COARSE, "shape": SHAPE}
    write_picks(_picks(tomogram="TS_10", **known), paths[1], format="relion5")
    query = f"dataset={FIRST_DATASET} diameter=80 truth={paths[0]},{paths[1]}"
    assert "voxels of an unsaid size" in world.refused(query)  # TS_1 has two
    labels = world.find(f"{query} voxel_spacing={COARSE} run=TS_1,TS_10")
    for one in labels.examples:
        assert isinstance(one.picks, Picks)
        np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)
    assert len(labels.examples) == 2
    again = world.refused(f"{query},{paths[0]} voxel_spacing={COARSE}")
    assert "picks of the run of 'TS_1' twice" in again
    kinds = [_picks(tomogram="TS_1", particle=name, **known) for name in ("a", "b")]
    write_picks(kinds, tmp_path / "kinds.csv")
    both = f"dataset={FIRST_DATASET} diameter=80 truth={tmp_path / 'kinds.csv'}"
    assert "of the kinds a, b" in world.refused(both)
    assert "has no picks of 'c'" in world.refused(f"{both} particle=c")
    (one,) = world.find(f"{both} particle=b").examples
    assert one.particle == "b"


def test_picks_of_runs_that_are_not_asked_for_do_not_matter(world: World, tmp_path: Path) -> None:
    """Where places need the size of the tomogram, too: RELION's lie about a centre that no run here has."""
    star = tmp_path / "all.star"
    names = ("rec_TS_1_10.01Apx", "TS_10", "TS_100")
    tables = [_picks(voxel_size=COARSE, shape=SHAPE, tomogram=name) for name in names]
    write_picks(tables, star, format="relion5")
    query = f"dataset={FIRST_DATASET} diameter=80 truth={star} voxel_spacing={COARSE}"
    for runs, asked in (("TS_1,TS_10", ["TS_1", "TS_10"]), ("TS_1", ["TS_1"])):
        labels = world.find(f"{query} run={runs}")
        assert [record.run for record in labels.selection.records] == asked
        for one in labels.examples:
            assert isinstance(one.picks, Picks)
            np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)
        assert any("Picks of no run that is asked for" in note and "TS_100" in note for note in labels.notes)


def test_a_name_that_several_runs_have_is_refused(world: World, tmp_path: Path) -> None:
    write_picks(_picks(voxel_size=COARSE, shape=SHAPE, tomogram="TS_1"), tmp_path / "t.star")
    said = world.refused(f"dataset={FIRST_DATASET},10450 diameter=80 truth={tmp_path / 't.star'}")
    assert "'TS_1' of" in said
    assert "may be any of 2 runs" in said
