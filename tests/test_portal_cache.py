"""Answers of the portal on disk: kept, shared, old, damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.portal_questions import (
    ALL_RUNS,
    ANSWERS,
    api_of,
    few_pages,
    runs_of,
)
from tests.portal_server import Fault, PortalServer
from tomocpt_stream import portal_queries
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_cache import FOLDER_VARIABLE, AnswerCache, key_of, usual_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture(scope="module")
def running() -> Iterator[PortalServer]:
    """The stand-in, with a world of a few small pages."""
    with few_pages() as server:
        yield server


def test_an_answer_is_kept_and_shared(server: PortalServer, tmp_path: Path) -> None:
    for question in ANSWERS.values():
        assert question(api_of(server, cache=tmp_path / "new" / "folder"))
    sent = len(server.requests)
    other = api_of(server, cache=str(tmp_path / "new" / "folder"))
    assert all(question(other) for question in ANSWERS.values())
    assert other.requests == 0
    assert len(server.requests) == sent
    assert not list(tmp_path.rglob("*.partial"))


def test_another_question_has_another_answer(server: PortalServer, tmp_path: Path) -> None:
    api = api_of(server, cache=tmp_path)
    questions: list[Callable[[], Any]] = [
        lambda: api.rows("runs", ("name",)),
        lambda: api.rows("runs", ("name", "datasetId")),
        lambda: api.rows("runs", ("name",), {"id": {"_lt": 5}}),
        lambda: api.rows("runs", ("name",), key="id", ids=[1]),
        lambda: api.rows("runs", ("name",), key="datasetId", ids=[1]),
        lambda: api.rows("runs", ("name",), key="id", ids=[2]),
        lambda: api.lookup({"runs": (("name",), [2])}),
        lambda: api.totals("runs"),
        lambda: api.totals("runs", by=["name"]),
    ]
    first = [ask() for ask in questions]
    assert len(list(tmp_path.iterdir())) == len(questions)
    sent = api.requests
    assert [ask() for ask in questions] == first
    assert api.requests == sent


def test_another_endpoint_or_schema_has_another_answer(
    server: PortalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_of(api_of(server, cache=tmp_path))
    other = api_of(server.url + "?x=1", cache=tmp_path)
    assert other.url == server.url  # what is shown leaves the rest out
    runs_of(other)
    assert other.requests == 2
    monkeypatch.setattr(portal_queries, "_client_version", lambda: "99")
    later = api_of(server, cache=tmp_path)
    runs_of(later)
    assert later.requests == 2
    assert "x=1" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_an_old_answer_is_asked_for_again(server: PortalServer, tmp_path: Path) -> None:
    runs_of(api_of(server, cache=tmp_path))
    _age(tmp_path, 3600)
    fresh, stale = api_of(server, cache=tmp_path, max_age=3700), api_of(server, cache=tmp_path, max_age=3500)
    runs_of(fresh)
    assert fresh.requests == 0
    runs_of(stale)
    assert stale.requests == 2
    again = api_of(server, cache=tmp_path, max_age=3500)  # what came is kept
    runs_of(again)
    assert again.requests == 0


def test_refresh_asks_again(server: PortalServer, tmp_path: Path) -> None:
    runs_of(api_of(server, cache=tmp_path))
    _age(tmp_path, 3600)
    refreshed = api_of(server, cache=tmp_path, refresh=True)
    runs_of(refreshed)
    assert refreshed.requests == 2
    runs_of(api_of(server, cache=tmp_path, max_age=60))
    assert len(server.requests) == 4
    with pytest.raises(PortalError, match="refresh and offline together"):
        api_of(server, refresh=True, offline=True)


def test_offline_kept_answers_are_used_whatever_their_age(server: PortalServer, tmp_path: Path) -> None:
    expected = runs_of(api_of(server, cache=tmp_path))
    server.fault = Fault(status=503)
    offline = api_of(server, cache=tmp_path, offline=True)
    assert runs_of(offline) == expected  # a fresh one: nothing to warn of
    _age(tmp_path, 3 * 86400)
    with pytest.warns(UserWarning, match=f"offline: answers of {server.url} from 3 days ago are used"):
        assert runs_of(offline) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert runs_of(offline) == expected
    assert offline.requests == 0


@pytest.mark.parametrize("cache", [True, False])
def test_offline_and_nothing_kept(server: PortalServer, tmp_path: Path, cache: bool) -> None:
    api = api_of(server, cache=tmp_path if cache else False, offline=True)
    where = f"kept in {tmp_path}" if cache else "as there is no cache folder"
    with pytest.raises(PortalError, match=f"offline, and no .*{where}; .*--offline"):
        runs_of(api)
    assert api.requests == 0


def _age(folder: Path, seconds: float) -> None:
    for path in folder.glob("*.json"):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps(entry | {"given": entry["given"] - seconds}))


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "torn": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "no object": lambda _: "[1, 2]",
    "changed": lambda text: text.replace("TS_7", "TS_8"),
    "of another question": lambda text: json.dumps(json.loads(text) | {"key": "0" * 64}),
    "of another version": lambda text: json.dumps(json.loads(text) | {"version": 0}),
    "of no time": lambda text: json.dumps(json.loads(text) | {"given": None}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_answer_is_none(server: PortalServer, tmp_path: Path, damage: str) -> None:
    expected = api_of(server, cache=tmp_path).rows("runs", ("name",))
    (path,) = tmp_path.iterdir()
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(PortalError, match="no whole answer"):
        runs_of(api_of(server, cache=tmp_path, offline=True))
    assert api_of(server, cache=tmp_path).rows("runs", ("name",)) == expected
    again = api_of(server, cache=tmp_path, offline=True)
    assert again.rows("runs", ("name",)) == expected


def test_an_answer_from_the_future_is_old(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put("a", 1)
    _age(tmp_path, -200)  # clocks differ
    assert cache.get("a") is not None
    assert cache.get("a").age < 0  # type: ignore[union-attr]
    _age(tmp_path, -86400)
    assert cache.get("a").age == float("inf")  # type: ignore[union-attr]


def test_answers_are_given_though_they_cannot_be_kept(
    server: PortalServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")
    api = api_of(server, cache=tmp_path / "taken" / "cache")
    assert runs_of(api) == ALL_RUNS
    assert runs_of(api) == ALL_RUNS
    assert [each.message for each in caplog.records if "are not kept in" in each.message] == [
        caplog.records[0].message
    ]


_WRITER = """
import sys
from pathlib import Path
from tomocpt_stream.portal_cache import AnswerCache
cache, letter = AnswerCache(Path(sys.argv[1])), sys.argv[2]
for number in range(150):
    cache.put("shared", [letter] * (1000 + number))
"""


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), each]) for each in "ab"]
    cache, seen = AnswerCache(tmp_path), set()
    while any(writer.poll() is None for writer in writers):
        answer = cache.get("shared")
        if answer is not None:
            seen.add(answer.content[0])
            assert set(answer.content) == {answer.content[0]}
        else:
            assert not seen  # once there is an answer there always is one
    assert [writer.wait() for writer in writers] == [0, 0]
    assert cache.get("shared").content in (["a"] * 1149, ["b"] * 1149)  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def test_the_usual_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert usual_folder("https://host/graphql") == tmp_path / "tomocpt-stream" / "portal"
    for here in ("http://127.0.0.1:80/", "http://localhost/graphql", "http://[::1]:5/"):
        assert usual_folder(here) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert usual_folder("https://host/graphql") == Path.home() / ".cache" / "tomocpt-stream" / "portal"
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "mine"))
    assert usual_folder("http://localhost/graphql") == tmp_path / "mine"
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    assert usual_folder("https://host/graphql") is None


def test_keys_follow_from_what_is_asked_and_not_from_its_order() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of([1, 2]) != key_of([2, 1])
