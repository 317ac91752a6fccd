"""One question and its answer over HTTP: time limits, repetitions, and errors that say what went wrong.

What the next try may cure is tried again with growing random pauses until a budget of seconds is used
up: a 429 or 5xx, a time-out, a dropped connection. What it cannot cure is an error at once: another 4xx,
a page of HTML, a query that the schema does not allow.
"""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import requests

from tomocpt_stream.errors import PortalError

AT_ONCE = 4
"""Requests under way at the same time, at most."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LARGEST_ANSWER = 256 * 2**20
# What the server says where it does not want to say more.
_MASKED = "unexpected error"
# Tries for an endpoint that nobody has heard of yet, and for an answer that says nothing.
_FEW = 3
# These come from a gateway that gave up waiting, or from a query that was too much for the server.
_TOO_MUCH = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)
_BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)

_OFFLINE = "use offline=True (--offline) to go on with answers that were kept"


class TooMuchError(Exception):
    """A question that failed, and that may be answered when it asks for less."""


@dataclass
class _Trouble(Exception):
    """A try that failed, and that may be repeated."""

    said: str
    remedy: str
    smaller: bool = False
    tries: float = float("inf")
    after: float = 0.0


class Exchange:
    """An endpoint for GraphQL, how long to wait for it, and how many requests were sent."""

    def __init__(self, url: str, timeout: tuple[float, float], budget: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PortalError(
                f"the endpoint {url!r}",
                expected="an address such as https://host/graphql",
                remedy="correct the argument url or the variable CRYOET_PORTAL_GRAPHQL_URL",
            )
        self.url, self.timeout, self.budget = url, timeout, budget
        port = f":{parts.port}" if parts.port else ""
        self.shown = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"  # without what may be secret
        self.requests = 0
        self.answered = False
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(AT_ONCE)

    def post(
        self, session: requests.Session, question: dict[str, Any], read_timeout: float
    ) -> dict[str, Any]:
        """Return the data of one answer; raise _Trouble where another try may help, else PortalError."""
        with self._free:
            with self._lock:
                self.requests += 1
            deadline = time.monotonic() + self.timeout[0] + read_timeout
            try:
                with closing(
                    session.post(
                        self.url,
                        json=question,
                        timeout=(self.timeout[0], read_timeout),
                        allow_redirects=False,  # a redirected POST becomes a GET
                        stream=True,
                    )
                ) as response:
                    body = self._body(response, deadline)
            except requests.RequestException as error:
                raise self._unreached(error, read_timeout) from None  # its text holds the whole address
        self.answered = True
        self._refuse_status(response, body)
        return self._data(body)

    def _body(self, response: requests.Response, deadline: float) -> bytes:
        """Return the bytes of an answer; one that trickles in, or never ends, is not waited for."""
        parts, length = [], 0
        for part in response.iter_content(2**16):
            parts.append(part)
            length += len(part)
            if time.monotonic() > deadline:
                raise requests.ReadTimeout("the answer is still coming in")
            if length > LARGEST_ANSWER:
                raise PortalError(
                    f"an answer of {self.shown} of more than {LARGEST_ANSWER / 1e6:.0f} MB",
                    expected="at most 500 rows of text",
                    remedy="check that the address is that of the portal's GraphQL",
                )
        return b"".join(parts)

    def _unreached(self, error: requests.RequestException, read_timeout: float) -> Exception:
        """Return the error for a request that got no whole answer, without what addresses may hold."""
        if isinstance(error, requests.exceptions.SSLError):
            return PortalError(
                f"no trusted connection to {self.shown} (the certificate or the TLS version is refused)",
                expected="a certificate that this machine trusts",
                remedy="check the clock, or name your proxy's certificates in REQUESTS_CA_BUNDLE",
            )
        if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
            said = f"no whole answer within {read_timeout:g} s"
            return _Trouble(said, f"try again later, or {_OFFLINE}", smaller=True)
        few = float("inf") if self.answered else _FEW
        if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
            said = f"no connection ({_reason(error)})"
            return _Trouble(said, f"check the network and the endpoint, or {_OFFLINE}", tries=few)
        return PortalError(
            f"a request to {self.shown} that cannot be sent or understood ({type(error).__name__})",
            expected="an answer in JSON",
            remedy="check the endpoint and the proxy settings",
        )

    def _refuse_status(self, response: requests.Response, body: bytes) -> None:
        code = response.status_code
        said = f"{code} {response.reason or ''}".strip()
        if code in _BUSY or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _Trouble(
                said,
                f"the portal is overloaded or down: try again later, or {_OFFLINE}",
                smaller=code in _TOO_MUCH,
                after=_retry_after(response),
            )
        # A query that the schema does not allow comes as a 400 from some servers: its errors say more.
        if code >= HTTPStatus.MULTIPLE_CHOICES and not (
            code == HTTPStatus.BAD_REQUEST and b'"errors"' in body
        ):
            moved = (
                urlsplit(response.headers.get("Location", "")).hostname
                if code < HTTPStatus.BAD_REQUEST
                else None
            )
            raise PortalError(
                f"{self.shown} answers {said}" + (f", and points to {moved}" if moved else ""),
                expected="200 and JSON from the portal's GraphQL endpoint",
                remedy="check the endpoint, and whether a proxy or firewall stands in between",
            )

    def _data(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except ValueError as error:
            start = body[:60].decode("utf-8", "replace").split("\n")[0]
            raise PortalError(
                f"{self.shown} answers 200 with something that is no JSON ({len(body)} bytes, {start!r})",
                expected="JSON from the portal's GraphQL endpoint",
                remedy="check the endpoint, and whether a proxy or a login page stands in between",
            ) from error
        if not isinstance(answer, dict):
            raise self._unclear("JSON that is no object")
        if errors := answer.get("errors"):
            texts = [
                str(each.get("message", each)) if isinstance(each, dict) else str(each) for each in errors
            ]
            self._refuse_errors("; ".join(dict.fromkeys(texts))[:300])
        data = answer.get("data")
        if not isinstance(data, dict):
            raise self._unclear("no data and no error")
        return data

    def _refuse_errors(self, text: str) -> None:
        upgrade = "upgrade tomocpt-stream and cryoet-data-portal: the portal's schema may have changed"
        if _MASKED in text.lower():
            raise _Trouble(
                f"the error {text!r}, which tells nothing",
                f"{upgrade}, or the query is too much for the server: try again later",
                smaller=True,
                tries=_FEW,
            )
        raise PortalError(
            f"{self.shown} refuses the query: {text}",
            expected="the tables and fields that this version asks for",
            remedy=upgrade,
        )

    def _unclear(self, said: str) -> _Trouble:
        return _Trouble(said, f"try again later, or {_OFFLINE}", tries=_FEW)


class Conversation:
    """Questions one after another, over one connection; each is repeated until the budget is used up."""

    def __init__(self, exchange: Exchange, stop: threading.Event | None = None) -> None:
        self._exchange = exchange
        self._stop = stop or threading.Event()  # set by others when the answer is no longer wanted
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"tomocpt-stream/{version('tomocpt-stream')}"
        self._failures = 0
        self._since = 0.0

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def shown(self) -> str:
        """The endpoint, without a password or a query."""
        return self._exchange.shown

    def ask(self, query: str, variables: dict[str, Any], *, divisible: bool) -> dict[str, Any]:
        """Return the data of the answer.

        Raises
        ------
        TooMuchError
            It failed, the pause after that is over, and a smaller question may be answered; only where
            the question is `divisible`.
        PortalError
            It failed for good.
        """
        question = {"query": query, "variables": variables}
        while True:
            read_timeout = self._exchange.timeout[1]
            if self._failures:
                read_timeout = min(read_timeout, max(1.0, self._left()))
            began = time.monotonic()
            try:
                data = self._exchange.post(self._session, question, read_timeout)
            except _Trouble as trouble:
                self._since = self._since if self._failures else began
                self._failures += 1
                self._pause(trouble)
                if trouble.smaller and divisible:
                    raise TooMuchError(trouble.said) from trouble
            else:
                self._failures = 0
                return data

    def _left(self) -> float:
        return self._exchange.budget - (time.monotonic() - self._since)

    def _pause(self, trouble: _Trouble) -> None:
        """Wait before the next try, or give up."""
        pause = max(pause_before(self._failures), trouble.after)
        if self._failures >= trouble.tries or pause > self._left():
            spent = time.monotonic() - self._since
            times = "once" if self._failures == 1 else f"{self._failures} times in {spent:.0f} s"
            raise PortalError(
                f"{self._exchange.shown} failed {times}, at last with {trouble.said}",
                expected="an answer of the CZ CryoET Data Portal",
                remedy=trouble.remedy,
            ) from trouble
        if rest(self._stop, pause):
            raise PortalError(
                f"{self._exchange.shown} failed with {trouble.said}, and is not asked again",
                expected="an answer to each part of a question",
                remedy="see what failed in another part",
            ) from trouble


def rest(stop: threading.Event, seconds: float) -> bool:
    """Wait, and return whether that was broken off."""
    return stop.wait(seconds)


def pause_before(failures: int) -> float:
    """Return the seconds to wait after so many failures, random so that many processes spread out."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.5)


def _retry_after(response: requests.Response) -> float:
    """Return the seconds that the server asks for, as far as they are reasonable."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), 2 * LONGEST_PAUSE) if text.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    """Return why there is no connection; the address, which may hold a secret, stays out."""
    seen: BaseException | None = error
    kinds = []
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        kinds.append(type(seen).__name__)
        reason = getattr(seen, "reason", None)
        inner = reason if isinstance(reason, BaseException) else None
        if inner is None and seen.args and isinstance(seen.args[0], BaseException):
            inner = seen.args[0]
        seen = inner or seen.__cause__ or seen.__context__
    return kinds[-1]
