"""Pages, batches and halving of questions to the portal, against the stand-in."""

from __future__ import annotations

from importlib.metadata import version
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from tests.portal_questions import (
    ALL_TOMOGRAMS,
    ANSWERS,
    COUNT,
    FIELDS,
    PAGE,
    RUNS,
    SMALLEST,
    api_of,
    few_pages,
    runs_of,
)
from tests.portal_rows import FIRST_DATASET, OWN_TOMOGRAMS, small_world
from tests.portal_server import Fault, PortalServer, portal_server
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_queries import URL_VARIABLE, PortalAPI, default_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture(scope="module")
def running() -> Iterator[PortalServer]:
    """The stand-in, with a world of a few small pages."""
    with few_pages() as server:
        yield server


def test_rows_come_in_pages_and_in_order(server: PortalServer) -> None:
    api = api_of(server)
    rows = api.rows("tomograms", FIELDS, {"depositionId": {"_eq": OWN_TOMOGRAMS}})
    assert [row["id"] for row in rows] == ALL_TOMOGRAMS
    assert all(set(row) == {"id", "name", "runId"} for row in rows)
    assert api.requests == len(server.requests) == 3
    assert all(body["variables"]["page"]["limit"] == PAGE for body in server.requests)
    assert set(server.agents) == {f"tomocpt-stream/{version('tomocpt-stream')}"}


@pytest.mark.parametrize(("count", "requests_sent"), [(0, 1), (1, 1), (99, 1), (100, 1), (101, 2), (200, 2)])
def test_no_page_is_asked_for_in_vain(server: PortalServer, count: int, requests_sent: int) -> None:
    api = api_of(server)
    rows = api.rows("tomograms", (), {"id": {"_lt": 100_000 + count, "_gt": 7}})
    assert [row["id"] for row in rows] == ALL_TOMOGRAMS[:count]
    assert api.requests == requests_sent


def test_a_row_that_comes_several_times_is_one(server: PortalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeat(data: dict[str, Any]) -> None:
        data["found"] = [row for row in data["found"] for _ in range(3)]

    _through(server, monkeypatch, repeat)
    api = api_of(server)
    assert ANSWERS["pages"](api)
    assert api.requests == 3
    assert "count(distinct: true, columns: id)" in server.requests[0]["query"]  # not of the repetitions


def test_several_threads_ask_no_more_at_once(server: PortalServer) -> None:
    server.fault = Fault(delay=0.02)
    api = api_of(server)
    threads = [Thread(target=ANSWERS[question], args=(api,)) for question in ("batches", "lookup", "batches")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert api.requests >= 6
    assert server.most_at_once == 4


def test_a_condition_on_many_others_gives_each_row_once() -> None:
    with portal_server(small_world()) as server:
        api = api_of(server)
        where = {"tomogramVoxelSpacing": {"annotationFiles": {"s3Path": {"_like": "%"}}}}
        assert [row["id"] for row in api.rows("tomograms", (), where)] == [8003, 8004, 8005, 8010]
        assert [row["id"] for row in api.rows("alignments", ["id"])] == [701, 702, 703, 704, 705]


def test_ids_are_asked_for_in_batches_a_few_at_a_time(server: PortalServer) -> None:
    server.fault = Fault(delay=0.05)
    api = api_of(server)
    rows = api.rows(
        "tomograms", FIELDS, {"processing": {"_eq": "raw"}}, key="runId", ids=[*range(1, 600), 5, 5]
    )
    assert [row["id"] for row in rows] == ALL_TOMOGRAMS[:RUNS]
    assert api.requests == 6
    assert 2 <= server.most_at_once <= 4
    assert max(len(body["variables"]["where"]["runId"]["_in"]) for body in server.requests) == PAGE
    assert api.rows("tomograms", FIELDS, key="runId", ids=[]) == []
    assert api.rows("tomograms", FIELDS, key="id", ids=[100_001, 7]) == [
        {"id": 100_001, "name": "TS_2", "runId": 2}
    ]


def test_several_tables_are_looked_up_together(server: PortalServer) -> None:
    api = api_of(server)
    found = api.lookup(
        {
            "runs": (["name"], range(1, 2000, 2)),
            "datasets": (["title"], [FIRST_DATASET, 5]),
            "alignments": ([], []),
        }
    )
    assert found["runs"] == {number: {"id": number, "name": f"TS_{number}"} for number in range(1, RUNS, 2)}
    assert found["datasets"] == {FIRST_DATASET: {"id": FIRST_DATASET, "title": "Many tomograms"}}
    assert found["alignments"] == {}
    assert api.requests == 10
    assert api.lookup({"runs": ([], [])}) == {"runs": {}}
    assert api.requests == 10


def test_totals_come_from_one_request(server: PortalServer) -> None:
    api = api_of(server)
    (total,) = api.totals("tomograms", sums=["fileSizeMrc", "sizeZ"])
    assert total == {
        "count": COUNT,
        "fileSizeMrc": pytest.approx(COUNT * (4 * 630**2 * 184 + 1024)),
        "sizeZ": COUNT * 184,
    }
    groups = api.totals("tomograms", {"runId": {"_lte": 2}}, by=["processing", "run.name"])
    assert sorted((each["processing"], each["run.name"], each["count"]) for each in groups) == [
        ("denoised", "TS_1", 1),
        ("denoised", "TS_2", 1),
        ("raw", "TS_1", 1),
        ("raw", "TS_2", 1),
    ]
    assert api.requests == 2


@pytest.mark.parametrize("question", ["pages", "batches", "lookup"])
def test_what_is_too_much_for_the_server_is_halved(server: PortalServer, question: str) -> None:
    server.fault = Fault(most_bytes=1600)
    api = api_of(server)
    assert ANSWERS[question](api)
    assert 502 in server.statuses
    assert api.requests < 35


def test_queries_of_too_many_values_are_halved(server: PortalServer) -> None:
    server.fault = Fault(most_values=40)
    api = api_of(server)
    assert ANSWERS["lookup"](api)
    assert ANSWERS["batches"](api)


def test_after_a_failure_that_passed_pages_grow_again(server: PortalServer) -> None:
    server.fault = Fault(status=502, times=5)  # as long as it takes to get to the smallest pages
    api = api_of(server)
    assert ANSWERS["pages"](api)
    sizes = [body["variables"]["page"]["limit"] for body in server.requests]
    assert sizes[:6] == [100, 50, 25, 12, 6, SMALLEST]
    assert sizes[6:] == sorted(sizes[6:])
    assert sizes[-1] >= 40
    assert api.requests < 24


def _through(
    server: PortalServer, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]
) -> None:
    execute = server.execute

    def changed(*args: Any) -> dict[str, Any]:
        answer = execute(*args)
        change(answer["data"])
        return answer

    monkeypatch.setattr(server, "execute", changed)


def test_a_limit_of_the_server_loses_nothing(server: PortalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(data: dict[str, Any]) -> None:
        del data["found"][20:]

    _through(server, monkeypatch, cut)
    api = api_of(server)
    assert ANSWERS["pages"](api)
    assert api.requests == 13


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["found"].reverse(), "some out of order"),
        (lambda data: data["found"].clear(), "counts 122 runs and lists 0, then no more"),
        (lambda data: data.pop("found"), "whose part 'found' is not what"),
        (lambda data: data.update(found=[None]), "whose part 'found'"),
        (lambda data: data["found"][0].pop("name"), "whose part 'found'"),
        (lambda data: data["found"][0].update(id="7"), "whose part 'found'"),
        (lambda data: data.update(total=None), "whose part 'total'"),
    ],
)
def test_an_answer_to_another_question_is_refused(
    server: PortalServer, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    _through(server, monkeypatch, change)
    with pytest.raises(PortalError, match=said):
        runs_of(api_of(server))


def test_totals_of_another_kind_are_refused(server: PortalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    _through(server, monkeypatch, lambda data: data.update(found={"aggregate": [{}]}))
    with pytest.raises(PortalError, match="'runsAggregate'"):
        api_of(server).totals("runs")


@pytest.mark.parametrize("names", [("name } evil { x",), ("",), ("a b",)])
def test_nothing_but_names_gets_into_a_query(server: PortalServer, names: tuple[str, ...]) -> None:
    api = api_of(server)
    for ask in (
        lambda: api.rows("runs", names),
        lambda: api.rows(f"runs{names[0]} ", ()),
        lambda: api.lookup({"runs": (names, [1])}),
        lambda: api.totals("runs", by=names),
        lambda: api.totals("runs", sums=names),
    ):
        with pytest.raises(ValueError, match="as names of GraphQL"):
            ask()
    assert api.requests == 0


def test_the_endpoint_is_given_or_named_or_that_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_url().startswith("https://")
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    assert PortalAPI(cache=False).url == default_url()
    monkeypatch.setenv(URL_VARIABLE, "http://mirror:8000/graphql")
    assert PortalAPI(cache=False).url == "http://mirror:8000/graphql"
    assert PortalAPI("http://other/graphql", cache=False).url == "http://other/graphql"
