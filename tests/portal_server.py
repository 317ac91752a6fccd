"""A stand-in for the portal's GraphQL server on loopback, with its habits and, on request, its failures."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import TYPE_CHECKING, Any

from graphql import DocumentNode, ExecutionResult, GraphQLError, GraphQLSchema, execute, parse, validate

from tests.portal_answers import attach, masked
from tests.portal_joins import Row, World, parameters
from tests.portal_schema import portal_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SIGN_IN = b"<!DOCTYPE html><html><title>Sign in</title><p>This network asks you to sign in first.</p></html>"


@dataclass
class Fault:
    """What goes wrong from now on, in the next `times` requests (None: in all); as it stands, nothing.

    `status` is answered whatever is asked; `most_bytes` and `most_values` make a 502 of answers that are
    longer, and of queries with more values in their variables; `delay` is in seconds; `hang` takes
    requests and answers none until the server closes; `drop` closes the connection instead of an answer;
    `html` is somebody else's page at status 200; `cut` sends half of the answer; `data_null` is an answer
    without data; `error` is a GraphQL error of that text; `lacking` names fields that this version of the
    server does not have, such as "Tomogram.ctfCorrected".
    """

    status: int | None = None
    times: int | None = None
    most_bytes: int | None = None
    most_values: int | None = None
    delay: float = 0.0
    hang: bool = False
    drop: bool = False
    html: bool = False
    cut: bool = False
    data_null: bool = False
    error: str | None = None
    lacking: frozenset[str] = frozenset()


def _page(status: int) -> tuple[int, bytes]:
    return status, f"<html><h1>{status}</h1></html>".encode()


@dataclass
class PortalServer:
    """A running server: where it is, what it was asked, and how it fails.

    `requests` holds the bodies in the order of arrival, `agents` their User-Agent, `statuses` what was
    answered to each (0: nothing), `most_at_once` how many were under way together.
    """

    rows: Mapping[str, Sequence[Row]]
    seed: int = 0
    url: str = ""
    fault: Fault = field(default_factory=Fault)
    requests: list[dict[str, Any]] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.closing = threading.Event()
        self._counting, self._answering = threading.Lock(), threading.Lock()
        self._under_way = 0
        self._random = Random(self.seed)
        self._worlds: dict[frozenset[str], World] = {}
        self._world(frozenset())

    def reset(self) -> None:
        """Forget what was asked, and work."""
        self.fault, self.most_at_once = Fault(), 0
        for kept in (self.requests, self.agents, self.statuses):
            kept.clear()

    def _world(self, lacking: frozenset[str]) -> World:
        if lacking not in self._worlds:
            self._worlds[lacking] = World(_schema(lacking), self.rows, self._random, lacking)
        return self._worlds[lacking]

    def arrived(self, body: dict[str, Any], agent: str) -> tuple[int, Fault]:
        """Keep a request; return its number and what goes wrong with it."""
        with self._counting:
            self.requests.append(body)
            self.agents.append(agent)
            self.statuses.append(0)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            fault = self.fault
            if fault.times == 0:
                fault = Fault()
            elif fault.times is not None:
                fault.times -= 1
            return len(self.statuses) - 1, fault

    def answered(self, number: int, status: int) -> None:
        """Keep what a request was answered, before the client can see it."""
        with self._counting:
            self._under_way -= 1
            if number < len(self.statuses):
                self.statuses[number] = status

    def answer(self, body: dict[str, Any], fault: Fault) -> tuple[int, bytes]:
        """Return status and text of the answer to a request; status 0 is none at all."""
        time.sleep(fault.delay)
        if fault.hang or fault.drop:
            return 0, b""
        if fault.status is not None:
            return _page(fault.status)
        if fault.html:
            return 200, SIGN_IN
        if fault.data_null:
            return 200, b'{"data": null}'
        if fault.error is not None:
            return 200, json.dumps({"data": None, "errors": [{"message": fault.error}]}).encode()
        if fault.most_values is not None and parameters(body.get("variables") or {}) > fault.most_values:
            return _page(502)
        # One query at a time: the interpreter would not work faster on several.
        with self._answering:
            text = json.dumps(self.execute(body, fault.lacking)).encode()
        return (200, text) if fault.most_bytes is None or len(text) <= fault.most_bytes else _page(502)

    def execute(self, body: dict[str, Any], lacking: frozenset[str] = frozenset()) -> dict[str, Any]:
        """Return the answer of a server that works, but for the fields that its version lacks."""
        document, errors = _document(str(body.get("query")), lacking)
        if document is None or errors:
            return {"data": None, "errors": [masked(one) for one in errors]}
        result = execute(
            _schema(lacking),
            document,
            context_value=self._world(lacking),
            variable_values=body.get("variables"),
            operation_name=body.get("operationName"),
        )
        assert isinstance(result, ExecutionResult)
        shown: dict[str, Any] = {"data": result.data}
        if result.errors:
            shown["errors"] = [masked(one) for one in result.errors]
        return shown


@lru_cache(maxsize=4)
def _schema(lacking: frozenset[str]) -> GraphQLSchema:
    return attach(portal_schema(lacking))


@lru_cache(maxsize=256)
def _document(text: str, lacking: frozenset[str]) -> tuple[DocumentNode | None, list[GraphQLError]]:
    """Return a query parsed, and what is wrong with it; clients ask the same again and again."""
    try:
        document = parse(text)
    except GraphQLError as error:
        return None, [error]
    return document, validate(_schema(lacking), document)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the text waits 40 ms for its header's acknowledgement
    portal: PortalServer

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        number, fault = self.portal.arrived(body, self.headers.get("User-Agent", ""))
        status = 0
        try:
            status, data = self.portal.answer(body, fault)
        finally:
            self.portal.answered(number, status)
        if status == 0:
            if fault.hang:
                self.portal.closing.wait()
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if data[:1] == b"{" else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault.cut:
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Be quiet: clients that give up are part of the tests."""


@contextmanager
def portal_server(rows: Mapping[str, Sequence[Row]], *, seed: int = 0) -> Iterator[PortalServer]:
    """Serve rows, lists of dicts by the name of their query ("tomograms", ...), at `url` of what is given.

    Fields have the API's names (camelCase); those that a row does not name are null or have a default.

    Raises
    ------
    ValueError
        The rows do not fit the schema or one another.
    """
    portal = PortalServer(rows, seed)
    handler = type("Handler", (_Handler,), {"portal": portal})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        portal.url = f"http://127.0.0.1:{server.server_port}/graphql"
        try:
            yield portal
        finally:
            portal.closing.set()
            server.shutdown()
            thread.join()
