from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.portal_rows import many, small_world
from tests.portal_server import portal_server
from tests.portal_tomograms import records
from tomocpt_stream.annotation_files import (
    MASK,
    POINTS,
    Placed,
    Wanted,
    listed,
    place_annotations,
    tomogram_names,
)
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_queries import PortalAPI

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.portal_server import PortalServer

RIBOSOME = Wanted(object="cytosolic ribosome")


@pytest.fixture(scope="module")
def portal() -> Iterator[PortalServer]:
    """The small world, for tests that ask and change nothing."""
    with portal_server(small_world()) as server:
        yield server


def placed(portal: PortalServer, wanted: Wanted, *ids: int, shapes: Iterable[str] = POINTS) -> Placed:
    return place_annotations(
        records(small_world(), ids), wanted, list(shapes), PortalAPI(portal.url, cache=False)
    )


def test_files_lie_on_tomograms_of_their_spacing_and_alignment(portal: PortalServer) -> None:
    found = placed(portal, RIBOSOME, 8010, 8003, 8004, 8005, 8003, 8001)
    assert {key: [file.file_id for file in files] for key, files in found.on.items()} == {
        8010: [925],
        8003: [921],
        8004: [921],
        8005: [922],
    }
    assert {(record.id, file.file_id) for record, file in found.elsewhere} == {
        (8003, 922),
        (8004, 922),
        (8005, 921),
    }
    assert not found.other_shapes


def test_a_record_says_what_the_portal_does_and_travels(portal: PortalServer) -> None:
    file = placed(portal, RIBOSOME, 8003).on[8003][0]
    assert (file.id, file.file_id, file.shape_id, file.shape, file.format) == (
        901,
        921,
        911,
        "Point",
        "ndjson",
    )
    assert (file.object_name, file.object_id, file.object_count) == ("cytosolic ribosome", "GO:0022626", 3)
    assert (file.ground_truth, file.method_type, file.method) == (True, "manual", "template matching")
    assert (file.deposition_id, file.run_id, file.alignment_id, file.voxel_spacing_id) == (
        10310,
        501,
        701,
        602,
    )
    assert file.address.startswith("s3://cryoet-data-portal-public/10440/TS_1/")
    assert str(file) == "AN-901 (cytosolic ribosome, Point, manual, ground truth, CZCDP-10310)"
    assert pickle.loads(pickle.dumps(file)) == file


@pytest.mark.parametrize(
    ("wanted", "annotations"),
    [
        (Wanted(object="GO:0022626"), {901, 904}),
        (Wanted(object="go:0022626"), {901, 904}),
        (Wanted(object="*RIBO*"), {901, 904}),
        (Wanted(object="c?tosolic [r]ibosome"), {901, 904}),
        (Wanted(object="*actin*"), {905}),
        (Wanted(), {901, 904, 905}),
        (Wanted(ground_truth=True), {901}),
        (Wanted(ground_truth=False), {904}),
        (Wanted(method="MANUAL"), {901}),
        (Wanted(method="template*"), {901, 904, 905}),
        (Wanted(method="template*", deposition=10358), {904}),
        (Wanted(deposition=10310), {901, 905}),
        (Wanted(annotation=905), {905}),
    ],
)
def test_what_is_asked_for_is_found(portal: PortalServer, wanted: Wanted, annotations: set[int]) -> None:
    found = placed(portal, wanted, 8003, 8010)
    assert {file.id for files in found.on.values() for file in files} == annotations


@pytest.mark.parametrize(
    ("wanted", "said", "there"),
    [
        (Wanted(object="ribosome"), "object='ribosome' leaves none of 5", r"membrane \(GO:0016020\)"),
        (Wanted(object="*ribo*", method="hybrid"), "method='hybrid' leaves none of 3", "manual, automated"),
        (Wanted(object="membrane", ground_truth=True), "ground_truth=True leaves none of 1", "None"),
        (Wanted(deposition=10320), "deposition=10320 leaves none of 5", "CZCDP-10310"),
        (Wanted(object="*ribo*", annotation=1), "annotation=1 leaves none of 3", "AN-901, AN-902"),
    ],
)
def test_the_filter_that_leaves_none_is_named(
    portal: PortalServer, wanted: Wanted, said: str, there: str
) -> None:
    with pytest.raises(PortalError, match=there) as error:
        placed(portal, wanted, 8003, 8010)
    assert error.value.found.startswith(said)
    assert error.value.found.endswith("annotations on the runs of 2 tomograms")


def test_other_reasons_for_nothing_are_named(portal: PortalServer) -> None:
    with pytest.raises(PortalError, match=r"the runs of TM-8006 \(TS_2\) have no annotations at all"):
        placed(portal, RIBOSOME, 8006)
    with pytest.raises(
        PortalError, match=r"has the shape OrientedPoint or Point or .* is there: SegmentationMask"
    ):
        placed(portal, Wanted(object="membrane"), 8003)
    with pytest.raises(PortalError, match=r"have another voxel spacing \(TomogramVoxelSpacing 602"):
        placed(portal, RIBOSOME, 8001)
    with pytest.raises(PortalError, match=r"another alignment.*AN-902 .* on AL-702, not AL-701 of TM-8003"):
        placed(portal, Wanted(annotation=902), 8003)


def test_shapes_that_are_not_asked_for_are_counted(portal: PortalServer) -> None:
    found = placed(portal, Wanted(), 8003)
    assert dict(found.other_shapes) == {"SegmentationMask": 1}
    masks = placed(portal, Wanted(), 8003, shapes=[MASK])
    assert [file.file_id for file in masks.on[8003]] == [923, 924]
    assert dict(masks.other_shapes) == {"Point": 1, "OrientedPoint": 1, "InstanceSegmentation": 1}


def test_an_unknown_alignment_is_none_that_is_known() -> None:
    rows = small_world()
    rows["annotationFiles"][0]["alignmentId"] = None
    with portal_server(rows) as portal:
        with pytest.raises(PortalError, match="on an unknown alignment, not AL-701"):
            placed(portal, Wanted(annotation=901), 8003)
        both = [replace(record, alignment_id=None) for record in records(rows, [8003])]
        with pytest.raises(
            PortalError, match=r"AN-901.* on an unknown alignment, as TM-8003 is, in a run of"
        ):
            place_annotations(both, RIBOSOME, POINTS, PortalAPI(portal.url, cache=False))
    rows["alignments"] = [row for row in rows["alignments"] if row["id"] != 702]
    for row in [*rows["tomograms"], *rows["annotationFiles"]]:
        row["alignmentId"] = 701 if row["alignmentId"] == 702 else row["alignmentId"]
    with portal_server(rows) as portal:
        found = place_annotations(both, RIBOSOME, POINTS, PortalAPI(portal.url, cache=False))
    assert [file.file_id for file in found.on[8003]] == [921]
    assert [file.file_id for _, file in found.elsewhere] == [922]


def test_a_tomogram_of_no_known_spacing_has_no_files() -> None:
    rows = small_world()
    rows["annotationFiles"][0]["tomogramVoxelSpacingId"] = None
    record = replace(records(rows, [8003])[0], voxel_spacing_id=None)
    with portal_server(rows) as portal, pytest.raises(PortalError, match="have another voxel spacing"):
        place_annotations([record], RIBOSOME, POINTS, PortalAPI(portal.url, cache=False))


def test_files_come_in_the_order_of_their_annotations_and_each_once() -> None:
    rows = small_world()
    rows["annotationShapes"][0]["annotationId"] = 905  # file 921, before 926
    rows["annotationShapes"][4]["annotationId"] = 901
    with portal_server(rows) as portal:
        found = placed(portal, Wanted(), 8003, 8003)
    assert [file.file_id for file in found.on[8003]] == [926, 921]
    assert [file.file_id for _, file in found.elsewhere] == [922]


def test_thousands_of_runs_take_few_requests() -> None:
    rows = many(600, runs=600, config=1)
    ids = range(600)
    rows["annotations"] = [
        {"id": 1 + i, "runId": 1 + i, "objectName": "ribosome", "objectId": "GO:1", "depositionId": 10310}
        for i in ids
    ]
    rows["annotationShapes"] = [{"id": 1 + i, "annotationId": 1 + i, "shapeType": "Point"} for i in ids]
    rows["annotationFiles"] = [
        {
            "id": 1 + i,
            "annotationShapeId": 1 + i,
            "alignmentId": 1 + i,
            "tomogramVoxelSpacingId": 1 + i,
            "format": "ndjson",
            "s3Path": f"s3://bucket/{i}.ndjson",
            "httpsPath": "",
        }
        for i in ids
    ]
    with portal_server(rows) as portal:
        api = PortalAPI(portal.url, cache=False)
        every = records(rows, [row["id"] for row in rows["tomograms"]])
        found = place_annotations(every, Wanted(object="ribosome"), POINTS, api)
        assert len(found.on) == 600
        assert api.requests == 6


NAMES = st.sampled_from(["TS_1", "TS_2", "TS_1-10.012-3", "TS_1-4.990-2", ""])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from([4.99, 10.012])), max_size=6))
def test_names_are_the_runs_and_differ(drawn: list[tuple[str, float]]) -> None:
    base = records(small_world(), [8003])[0]
    every = [
        replace(base, id=number, name=name, voxel_spacing=spacing)
        for number, (name, spacing) in enumerate(drawn)
    ]
    found = tomogram_names([*every, *every])
    assert len(set(found.values())) == len(found) == len(every)
    for record in every:
        alone = sum(other.name == record.name for other in every) == 1
        full = f"{record.name}-{record.voxel_spacing:.3f}-{record.id}"
        assert found[record.id] in ([record.name, full] if alone else [full])


def test_a_run_name_is_kept_where_it_is_the_only_one() -> None:
    found = tomogram_names(records(small_world(), [8003, 8006, 8011]))
    assert found == {8003: "TS_1-10.012-8003", 8006: "TS_2", 8011: "TS_1-13.480-8011"}


def test_long_lists_say_how_many_more_there_are() -> None:
    assert listed([]) == ""
    assert listed(["b", "a", "b"]) == "b, a"
    assert listed(map(str, range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, 8"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 2 more"
    assert listed("abcd", 2) == "a, b, 2 more"
