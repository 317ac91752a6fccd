from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.portal_rows import BUCKET, MIRROR, small_world
from tests.portal_server import portal_server
from tests.portal_tomograms import records
from tomocpt_stream import portal
from tomocpt_stream.annotation_files import Wanted
from tomocpt_stream.errors import FormatError, PortalError, SourceError
from tomocpt_stream.portal_annotations import fetch_picks, find_masks, find_picks
from tomocpt_stream.portal_queries import PortalAPI
from tomocpt_stream.remote import ForbiddenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.buckets import S3, Way
    from tomocpt_stream.portal_annotations import PortalPicks

RIBOSOME = "cytosolic ribosome"
TURN = Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).as_matrix()


def points(*xyz: tuple[float, float, float], **more: Any) -> bytes:
    """Return a file of points as the portal writes it: no newline at its end."""
    kind = {"xyz_rotation_matrix": "orientedPoint", "instance_id": "instancePoint"}.get(
        "".join(more), "point"
    )
    return "\n".join(
        json.dumps({"type": kind, "location": dict(zip("xyz", one, strict=True)), **more}) for one in xyz
    ).encode()


FILES = {
    921: points((1, 2, 3), (4.5, 5, 6), (629, 629, 183)),
    922: points((10, 20, 30), (11, 21, 31), xyz_rotation_matrix=TURN.tolist()),
    925: points((1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)),
    926: points((1, 2, 3), (2, 3, 4), (3, 4, 5), instance_id=1),
}


class World:
    """The small world, whose annotation files lie in the bucket of the test server."""

    def __init__(self, s3: S3) -> None:
        self.s3, self.rows, self.contents = s3, small_world(), dict(FILES)
        for row in self.rows["annotationFiles"]:
            key = row["s3Path"].removeprefix(f"{BUCKET}/")
            assert row["httpsPath"] == f"{MIRROR}/{key}"
            row |= {"s3Path": s3.address(key), "httpsPath": f"{s3.way.url}/{s3.bucket.name}/{key}"}
        self.row("annotations", 905)["objectCount"] = 1
        self.private: set[int] = set()

    def row(self, table: str, number: int) -> dict[str, Any]:
        return next(row for row in self.rows[table] if row["id"] == number)

    def copy(self, table: str, number: int, **changes: Any) -> None:
        self.rows[table].append({**self.row(table, number), **changes})

    @contextmanager
    def api(self) -> Iterator[PortalAPI]:
        for number, data in self.contents.items():
            key = self.row("annotationFiles", number)["s3Path"].removeprefix(self.s3.address(""))
            if key:
                self.s3.bucket.put(key, data, private=number in self.private)
        with portal_server(self.rows) as server:
            yield PortalAPI(server.url, cache=False)

    def fetch(self, *ids: int, options: dict[str, Any] | None = None, **asked: Any) -> PortalPicks:
        """Return the points of tomograms of some ids; what `Wanted` does not take is for `fetch_picks`."""
        more = {name: asked.pop(name) for name in ("shape", "missing") if name in asked}
        with self.api() as api:
            return fetch_picks(
                records(self.rows, ids),
                Wanted(**{"object": RIBOSOME, **asked}),
                api=api,
                storage_options=self.s3.options(max_retries=0) if options is None else options,
                **more,
            )


@pytest.fixture
def world(s3: S3, way: Way) -> World:
    """A world that a test may change."""
    for key in s3.bucket.keys("104"):
        s3.bucket.client.delete_object(Bucket=s3.bucket.name, Key=key)
    return World(s3)


def test_points_are_picks_in_voxels_of_their_tomogram(world: World) -> None:
    found = world.fetch(8010, 8003, 8005, 8006)
    assert list(found.picks) == ["Position_7", "TS_1-10.012-8003", "TS_1-10.012-8005"]
    picks = found.picks["TS_1-10.012-8003"]
    assert picks.zyx.tolist() == [[3, 2, 1], [6, 5, 4.5], [183, 629, 629]]
    assert picks.score.tolist() == [1, 1, 1]
    assert picks.rotations is None
    assert (picks.voxel_size, picks.shape) == (10.012, (184, 630, 630))
    assert (picks.tomogram, picks.particle) == ("TS_1-10.012-8003", RIBOSOME)
    turned = found.picks["TS_1-10.012-8005"]
    assert turned.zyx.tolist() == [[30, 20, 10], [31, 21, 11]]
    np.testing.assert_array_equal(turned.rotations, [TURN, TURN])
    assert found.picks["Position_7"].shape == (200, 480, 464)
    assert [file.id for file in found.annotations] == [904, 901, 902]


def test_what_find_tomograms_finds_is_taken(world: World) -> None:
    with world.api() as api:
        found = portal.find_tomograms(tomogram=[8003, 8010], all=True, api=api)
        picks = portal.find_picks(
            found, object=RIBOSOME, shape="Point", api=api, storage_options=world.s3.options()
        )
        assert {name: len(each) for name, each in picks.items()} == {"TS_1": 3, "Position_7": 4}
        assert list(portal.find_masks(found, object="membrane", api=api)) == ["TS_1"]


def test_points_in_another_frame_are_refused_and_named(world: World) -> None:
    (note,) = world.fetch(8003).notes
    assert note.startswith("1 annotation files lie on another alignment and are refused: AN-902 ")
    assert note.endswith("on AL-702, not AL-701 of TM-8003")
    with pytest.raises(PortalError, match="another alignment"):
        world.fetch(8003, annotation=902)


def test_find_picks_warns_of_what_somebody_should_know(world: World) -> None:
    with world.api() as api, pytest.warns(UserWarning, match="AN-902") as caught:
        found = find_picks(
            records(world.rows, [8003]), object=RIBOSOME, api=api, storage_options=world.s3.options()
        )
    assert list(found) == ["TS_1"]
    assert [warning.filename for warning in caught] == [__file__]
    with world.api() as api, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_picks(
            records(world.rows, [8003]),
            ground_truth=True,
            method="manual",
            shape="Point",
            deposition="CZCDP-10310",
            annotation="an-901",
            api=api,
            storage_options=world.s3.options(),
        )
    assert len(found["TS_1"]) == 3


def test_the_portal_of_the_environment_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOMOCPT_STREAM_PORTAL_CACHE", raising=False)
    with world.api() as api:
        monkeypatch.setenv("CRYOET_PORTAL_GRAPHQL_URL", api.url)
        found = find_picks(records(world.rows, [8010]), storage_options=world.s3.options())
        assert len(found["Position_7"]) == 4
        assert find_masks(records(world.rows, [8003]), object="GO:0016020")


def test_points_of_several_objects_are_not_mixed(world: World) -> None:
    with pytest.raises(PortalError, match=r"actin filament \(1 files\), cytosolic ribosome \(2 files\)"):
        world.fetch(8003, 8010, object=None)
    world.row("annotations", 904)["objectName"] = "Cytosolic Ribosome"
    assert len(world.fetch(8003, 8010).picks) == 2


def test_instances_are_points_and_counted_as_objects(world: World) -> None:
    found = world.fetch(8003, object="actin*")
    assert found.picks["TS_1"].zyx.tolist() == [[3, 2, 1], [4, 3, 2], [5, 4, 3]]
    assert found.notes == ()


def test_several_annotations_of_one_object_are_put_together_and_named(world: World) -> None:
    world.row("annotationFiles", 922)["alignmentId"] = 701
    found = world.fetch(8003)
    picks = found.picks["TS_1"]
    assert picks.zyx[:, 2].tolist() == [1, 4.5, 629, 10, 11]
    assert picks.rotations is None  # the manual points have none
    assert [file.id for file in found.annotations] == [901, 902]
    (note,) = found.notes
    assert "may mark a particle twice, on TS_1: AN-901 (" in note
    assert "AN-902 (" in note
    assert world.fetch(8003, deposition=10358).notes == ()


def test_rotations_are_kept_where_all_have_them(world: World) -> None:
    world.row("annotationFiles", 922)["alignmentId"] = 701
    world.row("annotationShapes", 911)["shapeType"] = "OrientedPoint"
    world.contents[921] = FILES[922]
    world.row("annotations", 901)["objectCount"] = 2
    rotations = world.fetch(8003).picks["TS_1"].rotations
    assert rotations is not None
    assert rotations.shape == (4, 3, 3)
    world.contents = {921: b"", 922: b""}
    for number in (901, 902):
        world.row("annotations", number)["objectCount"] = 0
    assert len(world.fetch(8003).picks["TS_1"]) == 0


def test_of_one_annotation_the_shape_that_says_most_is_taken(world: World) -> None:
    world.copy("annotationShapes", 911, id=930, shapeType="OrientedPoint")
    world.copy(
        "annotationFiles",
        921,
        id=931,
        annotationShapeId=930,
        s3Path=world.s3.address("10440/oriented.ndjson"),
    )
    world.contents[931] = points((7, 8, 9), (1, 1, 1), (2, 2, 2), xyz_rotation_matrix=TURN.tolist())
    assert world.fetch(8003, annotation=901).picks["TS_1"].zyx[0].tolist() == [9, 8, 7]
    assert world.fetch(8003, annotation=901, shape="Point").picks["TS_1"].zyx[0].tolist() == [3, 2, 1]
    with pytest.raises(PortalError, match="shape='point'; expected one of OrientedPoint, Point"):
        world.fetch(8003, shape="point")


def test_other_numbers_than_the_portal_says_and_points_outside_are_noted(world: World) -> None:
    world.contents[925] = points(
        (-0.5, 0, 0), (463.5, 479.5, 199.5), (-0.6, 1, 1), (1, 1, 199.6), (1, 480, 1)
    )
    counted, outside = world.fetch(8010).notes
    assert "AN-904 " in counted
    assert ": 5, not 4 (s3://" in counted
    assert outside == "points lie outside the volume of Position_7 (3 of 5)"
    world.row("annotations", 904)["objectCount"] = None
    assert world.fetch(8010).notes == (outside,)


def test_each_file_is_read_once_for_tomograms_of_one_frame(world: World, way: Way) -> None:
    found = world.fetch(8003, 8004, 8003)
    assert len(found.picks) == 2
    assert [one.path.rsplit("/")[-1] for one in way.asked] == ["ribosome-1.0_point.ndjson"]


def test_many_files_are_read_at_a_time(world: World, way: Way) -> None:
    way.latency = 0.05
    for number in range(30):
        world.copy("annotations", 904, id=2000 + number)
        world.copy("annotationShapes", 914, id=3000 + number, annotationId=2000 + number)
        world.copy(
            "annotationFiles",
            925,
            id=4000 + number,
            annotationShapeId=3000 + number,
            s3Path=world.s3.address(f"10445/{number}.ndjson"),
        )
        world.contents[4000 + number] = FILES[925]
    assert len(world.fetch(8010).picks["Position_7"]) == 31 * 4
    assert way.most_at_once > 4


def test_without_an_address_in_the_bucket_the_mirror_is_read(world: World) -> None:
    row = world.row("annotationFiles", 925)
    key = "10445/Position 7 #1.ndjson"
    world.s3.bucket.put(key, FILES[925])
    row |= {
        "s3Path": "",
        "httpsPath": f"{world.s3.way.url}/{world.s3.bucket.name}/10445/Position%207%20%231.ndjson",
    }
    del world.contents[925]
    assert len(world.fetch(8010, options={"max_retries": 0}).picks["Position_7"]) == 4
    row["s3Path"] = world.s3.address("10445/100%25 of 7 #1.ndjson")  # a key as it is, not an address
    world.s3.bucket.put("10445/100%25 of 7 #1.ndjson", FILES[925])
    assert len(world.fetch(8010).picks["Position_7"]) == 4


def test_a_file_that_cannot_be_read_is_named(world: World, way: Way) -> None:
    del world.contents[925]
    with pytest.raises(
        PortalError, match=r"there is no object s3://.*Position_7.*, where the portal says AN-904"
    ):
        world.fetch(8003, 8010)
    world.contents[925] = FILES[925][:-1]
    with pytest.raises(FormatError, match=r"line 4 of s3://.*Position_7/"):
        world.fetch(8003, 8010)
    world.private = {925}
    with pytest.raises(ForbiddenError, match=r"Position_7/.*403"):
        world.fetch(8003, 8010)
    world.private = set()
    way.fault = lambda _, path, __: "503" if "Position_7" in path else None
    with pytest.raises(SourceError, match=r"Position_7/.* of AN-904 .*could not be read"):
        world.fetch(8003, 8010)
    way.reset()
    world.row("annotationFiles", 925)["fileSize"] = 3e9
    with pytest.raises(FormatError, match=r"Position_7/.* has 3\.0 GB"):
        world.fetch(8003, 8010)
    assert not [one for one in way.asked if "Position_7" in one.path]


def test_tomograms_without_a_whole_file_can_be_left_out(world: World) -> None:
    world.row("annotationFiles", 922)["alignmentId"] = 701
    del world.contents[922]
    found = world.fetch(8003, 8010, missing="skip")
    assert list(found.picks) == ["Position_7"]  # half of the points of TS_1 would be worse than none
    assert found.notes[0].startswith("1 annotation files are skipped: there is no object s3://")
    assert [file.id for file in found.annotations] == [904]
    with pytest.raises(PortalError, match="none of 1 annotation files can be read: there is no object"):
        world.fetch(8003, deposition=10358, missing="skip")
    with pytest.raises(PortalError, match="missing='ignore'; expected one of error, skip"):
        world.fetch(8003, missing="ignore")


@pytest.mark.parametrize(
    ("deposition", "annotation"), [("DS-10310", None), ("CZCDP-", None), (None, "901a"), ("-1", 1)]
)
def test_an_id_is_a_number_with_or_without_its_prefix(deposition: Any, annotation: Any) -> None:
    with pytest.raises(PortalError, match="the id '"):
        find_picks([], deposition=deposition, annotation=annotation)


def test_a_mask_is_the_zarr_of_a_segmentation(world: World) -> None:
    with world.api() as api:
        three = records(world.rows, [8003, 8004, 8010])
        found = find_masks(three, object="membrane", api=api)
    address = world.s3.address("10440/TS_1/Annotations/102/membrane-1.0_segmentationmask")
    assert found == {"TS_1-10.012-8003": f"{address}.zarr", "TS_1-10.012-8004": f"{address}.zarr"}
    world.rows["annotationFiles"] = [row for row in world.rows["annotationFiles"] if row["id"] != 923]
    with world.api() as api:
        assert find_masks(three[:1], object="GO:0016020", api=api) == {"TS_1": f"{address}.mrc"}
        with pytest.raises(
            PortalError, match=r"has the shape SegmentationMask.*is there: Point, OrientedPoint"
        ):
            find_masks(three[:1], object=RIBOSOME, api=api)


def test_of_several_masks_the_newest_is_taken_and_named(world: World) -> None:
    for number, date in ((940, "2030-01-01"), (950, "2020-01-01")):
        world.copy("annotations", 903, id=number, lastModifiedDate=date)
        world.copy("annotationShapes", 913, id=number + 1, annotationId=number)
        world.copy(
            "annotationFiles",
            923,
            id=number + 2,
            annotationShapeId=number + 1,
            s3Path=f"s3://b/{number}.zarr",
        )
    world.row("annotations", 903)["lastModifiedDate"] = "2025-01-01"
    with (
        world.api() as api,
        pytest.warns(UserWarning, match=r"newest is taken on TS_1: AN-940 .*not AN-903 .*AN-950"),
    ):
        assert find_masks(records(world.rows, [8003]), object="membrane", api=api) == {
            "TS_1": "s3://b/940.zarr"
        }
    world.row("annotations", 940)["objectName"] = "inner membrane"
    with (
        world.api() as api,
        pytest.raises(PortalError, match=r"inner membrane \(1 files\), membrane \(3 files\)"),
    ):
        find_masks(records(world.rows, [8003]), object="*membrane", api=api)


def test_shapes_that_are_no_points_are_noted(world: World) -> None:
    world.row("annotations", 903)["objectName"] = "ribosome membrane"
    (_, note) = world.fetch(8003, object="*ribosome*").notes
    assert note == "annotations without points are passed over: 1 SegmentationMask"
    assert world.fetch(8003, object="*ribosome*", shape="Point").notes == ()


def test_a_mask_on_another_alignment_is_refused_and_named(world: World) -> None:
    with (
        world.api() as api,
        pytest.warns(UserWarning, match=r"AN-903 .* on AL-701, not AL-702 of TM-8005") as caught,
    ):
        assert len(find_masks(records(world.rows, [8003, 8005]), object="membrane", api=api)) == 1
    assert [warning.filename for warning in caught] == [__file__]
