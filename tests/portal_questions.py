"""Questions to the stand-in of the portal, and a world of a few pages to ask them about."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.portal_rows import many
from tests.portal_server import PortalServer, portal_server
from tomocpt_stream import portal_exchange, portal_queries
from tomocpt_stream.portal_exchange import pause_before
from tomocpt_stream.portal_queries import PortalAPI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

# A fifth of what the portal is asked for at once, so that few rows make many pages.
PAGE, SMALLEST = 100, 5
COUNT, RUNS = 243, 122
FIELDS = ("name", "runId")


ALL_RUNS = list(range(1, RUNS + 1))
ALL_TOMOGRAMS = list(range(100_000, 100_000 + COUNT))


@contextmanager
def few_pages() -> Iterator[PortalServer]:
    """A server of COUNT tomograms in RUNS runs."""
    with portal_server(many(COUNT, config=10)) as server:
        yield server


def be_quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make pages small and pauses a thousandth of what they are; return the pauses as they are made."""
    made: list[float] = []

    def short(failures: int) -> float:
        made.append(pause_before(failures))
        return made[-1] / 1000

    monkeypatch.setattr(portal_exchange, "pause_before", short)
    monkeypatch.setattr(portal_queries, "PAGE", PAGE)
    monkeypatch.setattr(portal_queries, "_SMALLEST_PAGE", SMALLEST)
    return made


def api_of(server: PortalServer | str, **settings: Any) -> PortalAPI:
    """Return the way to a server, without a cache and with little patience unless others are given."""
    usual: dict[str, Any] = {"cache": False, "timeout": (2.0, 5.0), "budget": 5.0}
    return PortalAPI(server if isinstance(server, str) else server.url, **(usual | settings))


def runs_of(api: PortalAPI) -> list[int]:
    """Return the ids of all runs, which takes two requests."""
    return [row["id"] for row in api.rows("runs", ("name",))]


# Whether a question is answered as it should be.
ANSWERS: dict[str, Callable[[PortalAPI], Any]] = {
    "pages": lambda api: [row["id"] for row in api.rows("tomograms", FIELDS)] == ALL_TOMOGRAMS,
    "batches": lambda api: (
        [row["id"] for row in api.rows("tomograms", FIELDS, key="runId", ids=ALL_RUNS)] == ALL_TOMOGRAMS
    ),
    "lookup": lambda api: list(api.lookup({"runs": (["name"], ALL_RUNS)})["runs"]) == ALL_RUNS,
    "totals": lambda api: api.totals("tomograms")[0]["count"] == COUNT,
}
