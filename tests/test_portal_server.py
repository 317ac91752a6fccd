"""The stand-in of the portal: the public client works against it, and it fails as it is told."""

from __future__ import annotations

import datetime as dt
import importlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import requests
from gql.transport.exceptions import TransportConnectionFailed, TransportError, TransportQueryError
from graphql import GraphQLError

from tests.portal_rows import ANNOTATIONS_ONLY, COARSE, FINE, FIRST_DATASET, OWN_TOMOGRAMS, many, small_world
from tests.portal_schema import entities, portal_schema
from tests.portal_server import Fault, PortalServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.portal_rows import Rows

# The package has no type information.
cdp: Any = importlib.import_module("cryoet_data_portal")

MASKED = "Unexpected error."
ALL = {one["id"] for one in small_world()["tomograms"]}


@pytest.fixture(scope="module")
def client(running: PortalServer) -> Any:
    return cdp.Client(running.url)


def ask(server: PortalServer, query: str, **variables: Any) -> Any:
    """Return the data of an answer without errors."""
    found = requests.post(server.url, json={"query": query, "variables": variables}, timeout=10).json()
    assert "errors" not in found, found
    return found["data"]


def refusal(server: PortalServer, query: str, **variables: Any) -> str:
    """Return the message of an answer that is an error; its status is 200 all the same."""
    answer = requests.post(server.url, json={"query": query, "variables": variables}, timeout=10)
    assert answer.status_code == 200
    (error,) = answer.json()["errors"]
    assert not answer.json()["data"]
    return str(error["message"])


def ids(found: list[Any]) -> list[int]:
    return sorted(one.id for one in found)


class TestPublicClient:
    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ([cdp.Tomogram.processing == "denoised"], [8001, 8003]),
            ([cdp.Tomogram.processing == "denoised", cdp.Tomogram.voxel_spacing > 9.5], [8003]),
            ([cdp.Tomogram.voxel_spacing >= FINE, cdp.Tomogram.voxel_spacing <= 5], [8001, 8002]),
            ([cdp.Tomogram.size_z < 200, cdp.Tomogram.run_id != 501], [8006, 8007, 8008, 8009, 8011]),
            ([cdp.Tomogram.run.dataset.deposition_id == 10320], [8011]),
            ([cdp.Tomogram.deposition_id == 10320], [8010, 8011]),
            (
                [cdp.Tomogram.run.name.like("TS\\_1%"), cdp.Tomogram.run.dataset_id == 10440],
                [*range(8001, 8006), 8008, 8009],
            ),
            ([cdp.Tomogram.run.name.ilike("position_7")], [8010]),
            ([cdp.Tomogram.id._in([8001, 8010, 9999])], [8001, 8010]),
            ([cdp.Tomogram.s3_omezarr_dir.is_null(True)], [8011]),
            ([cdp.Tomogram.name == None], [8011]),  # noqa: E711
            ([cdp.Tomogram.alignment.is_portal_standard == True], [8001, 8002, 8003, 8004, 8010]),  # noqa: E712
            ([cdp.Tomogram.authors.name == "Bo Li"], [8001]),
            ([cdp.Tomogram.last_modified_date > "2025-01-01"], [8010]),
        ],
    )
    def test_find(self, client: Any, filters: list[Any], expected: list[int]) -> None:
        assert ids(cdp.Tomogram.find(client, filters)) == expected

    def test_rows_come_whole(self, client: Any) -> None:
        """What a row does not name is null where the schema allows it, and has a value where not."""
        found = cdp.Tomogram.get_by_id(client, 8001)
        row = found.to_dict()
        assert (row["name"], row["voxel_spacing"], row["size_x"], row["run_id"]) == ("TS_1", FINE, 1260, 501)
        assert row["scale_1_dimensions"] == "630,632,184"
        assert row["key_photo_url"] is None
        assert row["fiducial_alignment_status"] == "FIDUCIAL"
        assert row["last_modified_date"] == dt.datetime(2024, 11, 5, tzinfo=dt.UTC)
        assert cdp.Tomogram.get_by_id(client, 1) is None

    def test_every_type_of_row(self, client: Any) -> None:
        world = small_world()
        kinds = [kind for kind in vars(cdp).values() if hasattr(kind, "_gql_root_field")]
        tables = {entity.table for entity in entities(portal_schema()).values()}
        # The package has a class for these too, which it does not export.
        assert {kind._gql_root_field for kind in kinds} == tables - {"identifiedObjects"}
        for kind in kinds:
            rows = world.get(kind._gql_root_field, [])
            assert ids(kind.find(client)) == sorted(row["id"] for row in rows), kind

    def test_to_one(self, client: Any) -> None:
        found = cdp.AnnotationFile.get_by_id(client, 922)
        annotation = found.annotation_shape.annotation
        assert annotation.deposition.id == ANNOTATIONS_ONLY
        assert annotation.run.dataset.deposition.title == "Ribosomes in lysed cells"
        assert found.alignment.id == 702
        assert found.tomogram_voxel_spacing.voxel_spacing == COARSE
        assert cdp.Tomogram.get_by_id(client, 8011).alignment is None

    def test_to_many(self, client: Any) -> None:
        deposition = cdp.Deposition.get_by_id(client, OWN_TOMOGRAMS)
        assert ids(deposition.datasets) == [10440, 10445]
        assert ids(deposition.tomograms) == sorted(ALL - {8010, 8011})
        first = next(one for one in deposition.datasets if one.id == FIRST_DATASET)
        assert ids(first.runs) == [501, 502, 503]
        run = next(one for one in first.runs if one.id == 501)
        assert ids(run.tomogram_voxel_spacings) == [601, 602]
        assert ids(run.annotations) == [901, 902, 903, 905]
        assert sorted(one.type for one in deposition.deposition_types) == ["dataset", "tomogram"]
        assert cdp.TomogramVoxelSpacing.get_by_id(client, 604).annotation_files == []

    def test_each_step_is_a_request(self, server: PortalServer, client: Any) -> None:
        tomogram = cdp.Tomogram.get_by_id(client, 8001)
        assert [tomogram.run.name for _ in range(3)] == ["TS_1"] * 3
        assert len(server.requests) == 4
        assert server.statuses == [200] * 4
        assert all("cryoet_data_portal_client" in agent for agent in server.agents)

    def test_wrong_names(self, server: PortalServer, client: Any) -> None:
        """The client's own schema refuses enums that do not exist, before it asks."""
        with pytest.raises(GraphQLError, match="Fourier Space"):
            cdp.Tomogram.find(client, [cdp.Tomogram.reconstruction_method == "Fourier Space"])
        assert server.requests == []

    def test_errors_arrive(self, client: Any) -> None:
        far = cdp.AnnotationFile.annotation_shape.annotation.run.dataset.deposition.id == OWN_TOMOGRAMS
        with pytest.raises(TransportQueryError, match="Max filter depth exceeded"):
            cdp.AnnotationFile.find(client, [far])
        near = cdp.AnnotationFile.annotation_shape.annotation.run.dataset.deposition_id == OWN_TOMOGRAMS
        assert ids(cdp.AnnotationFile.find(client, [near])) == [921, 922, 923, 924, 925, 926]

    def test_data_null_trips_it(self, server: PortalServer, client: Any) -> None:
        server.fault = Fault(data_null=True)
        with pytest.raises(AssertionError):
            cdp.Tomogram.find(client)

    def test_its_retries(self, server: PortalServer, client: Any) -> None:
        server.fault = Fault(status=503, times=1)
        assert len(cdp.Dataset.find(client)) == 3
        assert server.statuses == [503, 200]
        server.fault = Fault(status=502)
        with pytest.raises((TransportConnectionFailed, TransportError, OSError)):
            cdp.Dataset.find(client)
        assert server.statuses[2:] == [502] * 4


class TestFaults:
    QUERY = "{ datasets { id } }"

    def post(self, server: PortalServer, timeout: float = 10, **variables: Any) -> requests.Response:
        return requests.post(server.url, json={"query": self.QUERY, "variables": variables}, timeout=timeout)

    def test_status(self, server: PortalServer) -> None:
        server.fault = Fault(status=403, times=2)
        assert [self.post(server).status_code for _ in range(3)] == [403, 403, 200]
        assert server.statuses == [403, 403, 200]

    def test_pages_of_others(self, server: PortalServer) -> None:
        server.fault = Fault(html=True)
        answer = self.post(server)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "text/html"
        assert answer.text.startswith("<!DOCTYPE html>")

    def test_answers_that_say_nothing(self, server: PortalServer) -> None:
        server.fault = Fault(data_null=True)
        assert self.post(server).json() == {"data": None}
        server.fault = Fault(error="Too busy")
        assert refusal(server, self.QUERY) == "Too busy"

    def test_sizes(self, server: PortalServer) -> None:
        size = len(self.post(server).content)
        server.fault = Fault(most_bytes=size)
        assert self.post(server).status_code == 200
        server.fault = Fault(most_bytes=size - 1)
        assert self.post(server).status_code == 502
        server.fault = Fault(most_values=3)
        assert [self.post(server, ids=list(range(n))).status_code for n in (3, 4)] == [200, 502]

    @pytest.mark.parametrize("fault", [Fault(drop=True), Fault(cut=True)])
    def test_broken_lines(self, server: PortalServer, fault: Fault) -> None:
        server.fault = fault
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            self.post(server)

    def test_hanging(self, server: PortalServer) -> None:
        server.fault = Fault(hang=True, times=1)
        with pytest.raises(requests.ReadTimeout):
            self.post(server, timeout=0.05)
        assert self.post(server).status_code == 200

    def test_delay(self, server: PortalServer) -> None:
        server.fault = Fault(delay=0.05)
        assert self.post(server).elapsed.total_seconds() >= 0.05

    def test_how_many_are_under_way(self, server: PortalServer) -> None:
        server.fault = Fault(drop=True, times=2)
        arrived = [server.arrived({}, "agent") for _ in range(3)]
        assert [fault.drop for _, fault in arrived] == [True, True, False]
        for number, _ in arrived:
            server.answered(number, 200 + number)
        assert self.post(server).status_code == 200
        assert server.most_at_once == 3
        assert server.statuses == [200, 201, 202, 200]
        server.reset()
        assert (server.requests, server.statuses, server.most_at_once) == ([], [], 0)

    def test_another_version(self, server: PortalServer, client: Any) -> None:
        """One field that the server lacks spoils the whole query, and its error does not say so."""
        server.fault = Fault(lacking=frozenset({"Tomogram.ctfCorrected"}))
        assert refusal(server, "{ tomograms { id ctfCorrected } }") == MASKED
        assert refusal(server, "{ tomograms(where: {ctfCorrected: {_eq: true}}) { id } }") == MASKED
        with pytest.raises(TransportQueryError, match=MASKED):
            cdp.Tomogram.find(client)
        assert {row["id"] for row in ask(server, "{ tomograms { id } }")["tomograms"]} == ALL
        server.fault = Fault()
        assert ask(server, "{ tomograms { ctfCorrected } }")["tomograms"]

    def test_only_fields_that_exist_can_lack(self, server: PortalServer) -> None:
        with pytest.raises(KeyError, match=r"Tomogram\.colour"):
            server.execute({"query": self.QUERY}, frozenset({"Tomogram.colour"}))


def _add(table: str, **row: Any) -> Callable[[Rows], None]:
    return lambda rows: rows.setdefault(table, []).append(row)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_add("tomogram", id=1), "no such tables: .'tomogram'."),
        (_add("runs", id=9, datasetId=10440, colour="red"), "runs has no field colour"),
        (_add("runs", id=9), "row 9 of runs must have datasetId"),
        (_add("runs", name="TS_9", datasetId=10440), "must have id"),
        (_add("runs", id=501, datasetId=10440), "runs: an id occurs twice"),
        (_add("runs", id=9, datasetId=1), "runs 9: datasetId 1 does not exist"),
        (_add("runs", id=9, datasetId=10440, name=None), "name of runs may not be null"),
        (_add("runs", id="9", datasetId=10440), "id of runs: Int cannot represent"),
        (
            _add("tomograms", id=9, depositionId=10310, processing="odd"),
            "processing of tomograms: Value 'odd'",
        ),
        (
            _add("datasets", id=9, depositionId=10310, releaseDate="soon"),
            "releaseDate of datasets: Invalid iso",
        ),
    ],
)
def test_rows_must_fit(spoil: Callable[[Rows], None], expected: str) -> None:
    rows = small_world()
    spoil(rows)
    with pytest.raises(ValueError, match=expected):
        PortalServer(rows)


def test_many_tomograms_are_long_to_list() -> None:
    """What a query for all fields takes is mostly one that nobody needs."""
    server = PortalServer(many(40, config=5000))
    whole = server.execute({"query": "{ tomograms { id name neuroglancerConfig } }"})["data"]["tomograms"]
    assert len(whole) == 40
    assert all(len(row["neuroglancerConfig"]) == 5000 for row in whole)
    per_run = Counter(row["name"] for row in whole)
    assert set(per_run.values()) == {2}
