"""Patience with the portal: what is asked again, what ends it, and what is said then."""

from __future__ import annotations

import inspect
import threading
import time
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.clock import Clock
from tests.portal_questions import (
    ALL_RUNS,
    ANSWERS,
    FIELDS,
    PAGE,
    RUNS,
    api_of,
    few_pages,
    runs_of,
)
from tests.portal_server import Fault, PortalServer
from tomocpt_stream import portal_cache, portal_exchange, portal_queries
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_exchange import Exchange, pause_before
from tomocpt_stream.portal_queries import PortalAPI

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture(scope="module")
def running() -> Iterator[PortalServer]:
    """The stand-in, with a world of a few small pages."""
    with few_pages() as server:
        yield server


def _switches(fault: Fault) -> list[str]:
    return [name for name, value in vars(fault).items() if value is True]


@pytest.mark.parametrize("question", ANSWERS)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, times=4),
        Fault(status=429, times=4),
        Fault(status=502, times=5),
        Fault(status=500, times=5),
        Fault(drop=True, times=2),
        Fault(cut=True, times=2),
        Fault(data_null=True, times=2),
        Fault(error="Unexpected error.", times=2),
    ],
    ids=lambda fault: str(fault.status or fault.error or _switches(fault)[0]),
)
def test_a_failure_that_passes_is_waited_for(
    server: PortalServer, question: str, fault: Fault, pauses: list[float]
) -> None:
    server.fault = replace(fault)
    assert ANSWERS[question](api_of(server))
    assert len(pauses) == fault.times


def test_pauses_grow_and_are_random() -> None:
    for failures in range(1, 12):
        seen = [pause_before(failures) for _ in range(200)]
        middle = min(30.0, 0.5 * 2 ** (failures - 1))
        assert 0.5 * middle <= min(seen) < 0.8 * middle < 1.2 * middle < max(seen) <= 1.5 * middle


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that only goes while somebody pauses, for twice as long after each failure."""
    clock = Clock()

    def rest(_: threading.Event, seconds: float) -> bool:
        clock.now += seconds
        return False

    monkeypatch.setattr(portal_exchange, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(portal_exchange, "rest", rest)
    monkeypatch.setattr(portal_exchange, "pause_before", lambda failures: 2.0**failures)
    return clock


@pytest.mark.parametrize(("status", "reason"), [(503, "Service Unavailable"), (502, "Bad Gateway")])
@pytest.mark.parametrize(
    ("budget", "times"), [(13.9, "3 times in 6 s"), (14.0, "4 times in 14 s"), (0.0, "once")]
)
def test_a_budget_ends_the_patience(
    server: PortalServer, clock: Clock, status: int, reason: str, budget: float, times: str
) -> None:
    server.fault = Fault(status=status)
    api = api_of(server, budget=budget)
    with pytest.raises(
        PortalError, match=f"{server.url} failed {times}, at last with {status} {reason}; "
    ) as caught:
        runs_of(api)
    assert api.requests == int(times[0].replace("o", "1"))
    assert "offline=True" in caught.value.remedy
    assert clock.now <= budget


def test_each_success_makes_a_new_budget(server: PortalServer, clock: Clock) -> None:
    api = api_of(server, budget=3.0)
    for _ in range(3):
        server.fault = Fault(status=503, times=1)
        assert api.totals("runs")[0]["count"] == RUNS
    assert clock.now == 6.0
    # The same within one question of many pages: a failure each time that more is tried again.
    server.fault = Fault(most_bytes=2300)
    assert ANSWERS["pages"](api_of(server, budget=7.0))
    assert server.statuses.count(502) == 3
    assert clock.now == 6.0 + 6.0 + 2.0


def test_a_server_that_says_when_is_asked_then() -> None:
    response = requests.Response()
    for text, seconds in (
        ("7", 7.0),
        ("100000", 60.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
    ):
        response.headers["Retry-After"] = text
        assert portal_exchange._retry_after(response) == seconds


def test_the_pause_is_as_long_as_the_server_asks_for(
    server: PortalServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portal_exchange, "_retry_after", lambda _: 3.5)  # after a pause of 2 s, then of 4 s
    server.fault = Fault(status=429, times=2)
    assert runs_of(api_of(server, budget=100)) == ALL_RUNS
    assert clock.now == 3.5 + 4.0


def test_who_is_busy_is_asked_for_as_much_again(server: PortalServer) -> None:
    server.fault = Fault(status=503, times=2)
    runs_of(api_of(server))
    assert {body["variables"]["page"]["limit"] for body in server.requests} == {PAGE}


def test_the_last_tries_wait_no_longer_than_the_budget(
    server: PortalServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    post = Exchange.post

    def spy(exchange: Exchange, session: Any, question: Any, read_timeout: float) -> Any:
        waits.append(read_timeout)
        return post(exchange, session, question, read_timeout)

    monkeypatch.setattr(Exchange, "post", spy)
    server.fault = Fault(status=503, times=3)
    assert api_of(server, timeout=(1, 90), budget=20).totals("runs")
    assert waits == [90, 18, 14, 6]
    assert clock.now == 14


def test_a_redirection_is_told_and_not_followed(server: PortalServer) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Be quiet."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(307)
            self.send_header("Location", server.url)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(PortalError, match=r"answers 307 .*and points to 127.0.0.1; expected"):
            runs_of(api_of(f"http://127.0.0.1:{other.server_port}/"))
        thread.join()
    assert not server.requests


def test_a_server_that_never_answers_is_left(server: PortalServer) -> None:
    server.fault = Fault(hang=True)
    api = api_of(server, timeout=(1.0, 0.1), budget=0.15)
    with pytest.raises(PortalError, match="no whole answer within"):
        runs_of(api)
    assert 1 <= api.requests <= 3


def test_one_that_hangs_once_is_asked_again(server: PortalServer) -> None:
    server.fault = Fault(hang=True, times=1)
    assert runs_of(api_of(server, timeout=(1.0, 0.3))) == ALL_RUNS


def test_an_answer_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange("http://127.0.0.1:1/graphql", (0.0, 0.0), 1.0)

    class Slow(requests.Response):
        def iter_content(self, *_: Any, **__: Any) -> Iterator[bytes]:
            while True:
                time.sleep(0.01)
                yield b"x" * 50

    with pytest.raises(requests.ReadTimeout):
        exchange._body(Slow(), time.monotonic() + 0.05)
    monkeypatch.setattr(portal_exchange, "LARGEST_ANSWER", 199)
    with pytest.raises(PortalError, match=r"an answer of .* of more than"):
        exchange._body(Slow(), time.monotonic() + 60)


@pytest.mark.parametrize("status", [301, 302, 400, 401, 403, 404, 418])
def test_what_a_repetition_cannot_help_is_an_error_at_once(server: PortalServer, status: int) -> None:
    server.fault = Fault(status=status)
    api = api_of(server)
    with pytest.raises(
        PortalError, match=f"answers {status} ?.*; expected 200 and JSON.*; check the endpoint"
    ):
        runs_of(api)
    assert api.requests == 1


def test_somebody_elses_page_is_no_answer(server: PortalServer) -> None:
    server.fault = Fault(html=True)
    api = api_of(server)
    with pytest.raises(PortalError, match=r"no JSON \(\d+ bytes, '<!DOCTYPE html>.*login page"):
        runs_of(api)
    assert api.requests == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(data_null=True), "at last with no data and no error"),
        (
            Fault(error="Unexpected error."),
            "'Unexpected error.', which tells nothing; .*upgrade tomocpt-stream",
        ),
        (Fault(lacking=frozenset({"Run.name"})), "upgrade tomocpt-stream"),
        (Fault(drop=True), r"no connection \(\w.*check the network"),
    ],
)
def test_what_tells_nothing_is_tried_three_times(server: PortalServer, fault: Fault, said: str) -> None:
    server.fault = fault
    api = api_of(server)
    with pytest.raises(PortalError, match=rf"failed 3 times in \d+ s.*{said}"):
        runs_of(api)
    assert api.requests == 3


def test_a_server_that_has_answered_gets_the_whole_budget(server: PortalServer) -> None:
    api = api_of(server)
    runs_of(api)
    server.fault = Fault(drop=True, times=6)
    assert runs_of(api) == ALL_RUNS


def test_an_error_that_says_something_is_passed_on(server: PortalServer) -> None:
    server.fault = Fault(error="Cannot query field 'name' on type 'Run'.")
    api = api_of(server)
    with pytest.raises(
        PortalError, match=r"refuses the query: Cannot query field 'name' on type 'Run'.*; upgrade"
    ):
        runs_of(api)
    assert api.requests == 1
    exchange = api._exchange
    response = requests.Response()
    response.status_code = 400  # as other servers of GraphQL answer
    exchange._refuse_status(response, b'{"errors": []}')
    with pytest.raises(PortalError, match="answers 400"):
        exchange._refuse_status(response, b"<html>")


def test_one_failing_batch_ends_all(server: PortalServer) -> None:
    server.fault = Fault(status=403, delay=0.05)
    api = api_of(server)
    with pytest.raises(PortalError, match="403"):
        api.rows("tomograms", FIELDS, key="runId", ids=range(1, 4000))
    assert api.requests <= 12  # of 40 batches: those that were under way, and those that took their places


ADDRESS = "http://user:geheim@127.0.0.1:1/graphql?token=secret"


def test_nobody_is_there() -> None:
    api = PortalAPI(ADDRESS, cache=False, timeout=(1, 1), budget=5)
    with pytest.raises(
        PortalError, match=r"http://127.0.0.1:1/graphql failed 3 times .*no connection"
    ) as caught:
        runs_of(api)
    assert "Connection refused" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + api.url
    assert shown.count("graphql failed") == 1
    assert "/graphql?" not in shown.replace(ADDRESS, "")  # what requests says holds the whole address
    assert not any(word in shown.replace(ADDRESS, "") for word in ("geheim", "secret"))


@pytest.mark.parametrize("url", ["ftp://host/graphql", "host/graphql", "http://", "graphql"])
def test_an_endpoint_is_an_address(url: str) -> None:
    with pytest.raises(PortalError, match=r"the endpoint .*CRYOET_PORTAL_GRAPHQL_URL"):
        PortalAPI(url, cache=False)


def test_no_time_out_is_unbounded() -> None:
    parameters = inspect.signature(PortalAPI).parameters
    assert parameters["timeout"].default == (10.0, 90.0)
    assert parameters["budget"].default == 120.0
    assert inspect.getsource(portal_queries).count("\nPAGE = 500\n") == 1
    assert portal_cache._SKEW < portal_queries.MAX_AGE


def test_whoever_waits_for_the_next_try_learns_that_another_failed(
    server: PortalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portal_exchange, "pause_before", lambda _: 60.0)
    answer = server.answer

    def one_fails(body: dict[str, Any], _: Fault) -> tuple[int, bytes]:
        first = body["variables"]["where"]["runId"]["_in"][0] == 1
        while first and server.statuses.count(503) < 2:
            time.sleep(0.01)
        return answer(body, Fault(status=403 if first else 503))

    monkeypatch.setattr(server, "answer", one_fails)
    with pytest.raises(PortalError, match="403"):  # and not after a minute
        api_of(server, budget=1000).rows("tomograms", FIELDS, key="runId", ids=range(1, 301))
    assert server.statuses.count(503) == 2
