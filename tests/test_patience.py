"""A store that fails now and then: what was asked for comes all the same, or is named."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from tomocpt_stream import patience
from tomocpt_stream.errors import CheckpointError, FullStoreError, JobError, SourceError
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.receipts import delete_but, holds_objects, read_bytes, write_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

PROTOTYPE = default_buffer_prototype()
DATA = PROTOTYPE.buffer.from_bytes(b"data")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; none takes any time."""
    made: list[float] = []
    pause = patience._pause

    def at_once(tries: int) -> float:
        made.append(pause(tries))
        return 0.0

    monkeypatch.setattr(patience, "_pause", at_once)
    return made


class Failing(WrapperStore[MemoryStore]):
    """A store whose next requests fail, a listing after its first key."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(MemoryStore())
        self.error = TimeoutError() if error is None else error
        self.failures = self.asked = 0

    def _fail(self) -> None:
        self.asked += 1
        if self.asked <= self.failures:
            raise self.error

    async def get(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        return await super().get(*arguments, **options)

    async def exists(self, key: str) -> bool:
        self._fail()
        return await super().exists(key)

    async def getsize(self, key: str) -> int:
        self._fail()
        return await self._store.getsize(key)

    async def set(self, key: str, value: Any) -> None:
        self._fail()
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        self._fail()
        await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self._fail()
        await super().delete(key)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._store.list_prefix(prefix):
            yield key
            self._fail()


async def _keys(store: PatientStore, prefix: str) -> list[str]:
    return [key async for key in store.list_prefix(prefix)]


REQUESTS: dict[str, Callable[[PatientStore], Any]] = {
    "get": lambda store: read_bytes(store, "a/b"),
    "look for": lambda store: sync(store.exists("a/b")),
    "get the size of": lambda store: sync(store.getsize("a/b")),
    "store": lambda store: sync(store.set("a/b", DATA)),
    "store, if new,": lambda store: sync(store.set_if_not_exists("a/b", DATA)),
    "delete": lambda store: sync(store.delete("a/b")),
    "list": lambda store: sorted(sync(_keys(store, "a/"))),
}


def _filled(error: Exception | None = None) -> Failing:
    failing = Failing(error)
    for key in ("a/b", "a/c", "d"):
        sync(failing._store.set(key, DATA))
    return failing


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_is_repeated(what: str, pauses: list[float]) -> None:
    wanted = REQUESTS[what](PatientStore(_filled()))
    failing = _filled()
    failing.failures = 2
    assert REQUESTS[what](PatientStore(failing)) == wanted
    assert failing.asked == {"list": 4}.get(what, 3)  # a listing asks after each key
    assert pauses == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("kind", [JobError, SourceError])
def test_one_that_always_fails_names_its_object(what: str, kind: Any) -> None:
    failing = _filled()
    failing.failures = 1000
    name = "a/" if what == "list" else "a/b"
    said = f"^wrapping-memory://.* failed 3 times to {what.split(',')[0]} {name} .TimeoutError.;"
    with pytest.raises(kind, match=said) as caught:
        REQUESTS[what](PatientStore(failing, kind))
    assert caught.value.__cause__ is failing.error
    assert failing.asked == 3


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("this", expected="that", remedy="do"),
        ValueError("read-only"),
        NotImplementedError(),
        MemoryError(),
    ],
)
def test_what_a_repetition_cannot_help_comes_through(what: str, error: Exception) -> None:
    failing = _filled(error)
    failing.failures = 1000
    with pytest.raises(type(error)) as caught:
        REQUESTS[what](PatientStore(failing))
    assert caught.value is error
    assert failing.asked == 1


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_says_so_at_once(what: str, number: int) -> None:
    failing = _filled(OSError(number, os.strerror(number)))
    failing.failures = 1000
    with pytest.raises(
        FullStoreError, match=rf"has no room for a/b?.*{os.strerror(number)}.*free some"
    ) as caught:
        REQUESTS[what](PatientStore(failing, SourceError))
    assert caught.value.final  # no other task is tried
    assert failing.asked == 1


@pytest.mark.parametrize("what", REQUESTS)
def test_who_failed_slowly_has_tried_enough(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = _filled(RuntimeError("503 after 10 retries\n\nDebug source:\n" + "x" * 10_000))
    failing.failures = 1000
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    with pytest.raises(JobError, match=r"failed to .* .RuntimeError: 503 after 10 retries.;") as caught:
        REQUESTS[what](PatientStore(failing))
    assert len(str(caught.value)) < 500
    assert failing.asked == 1


def test_an_object_that_is_not_there_is_no_failure(tmp_path: Path) -> None:
    store = PatientStore(LocalStore(tmp_path))
    assert sync(store.get("a", PROTOTYPE)) is None
    assert not sync(store.exists("a"))
    with pytest.raises(FileNotFoundError):
        sync(store.getsize("a"))


def test_a_listing_that_broke_off_gives_each_key_once() -> None:
    failing = _filled()
    failing.failures = 1
    assert sorted(sync(_keys(PatientStore(failing), ""))) == ["a/b", "a/c", "d"]
    failing.asked, failing.failures = 0, 1000
    with pytest.raises(JobError, match="to list everything"):
        sync(_keys(PatientStore(failing), ""))


def test_whoever_stops_listening_is_not_waited_for() -> None:
    failing = _filled()
    failing.failures = 1000
    assert holds_objects(PatientStore(failing))
    assert failing.asked == 0


def test_the_store_inside_is_what_it_is(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    store = PatientStore(PatientStore(inner), SourceError)
    assert store._store is inner
    assert str(store) == str(inner)
    write_bytes(store, "a/b", b"data")
    travelled = pickle.loads(pickle.dumps(store))
    assert read_bytes(travelled, "a/b") == b"data"
    assert travelled == store
    assert travelled._kind is SourceError
    reader = travelled.with_read_only(True)
    assert isinstance(reader, PatientStore)
    with pytest.raises(ValueError, match="read-only"):
        write_bytes(reader, "a/b", b"other")
    delete_but(store, "a/", ())
    assert read_bytes(store, "a/b") is None


def test_others_are_served_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_pause", lambda _: 0.05)
    failing = _filled()
    failing.failures = 1
    order: list[str] = []

    async def ask(store: Any, name: str) -> None:
        await store.get("a/b", PROTOTYPE)
        order.append(name)

    async def both() -> None:
        await asyncio.gather(ask(PatientStore(failing), "patient"), ask(failing._store, "other"))

    sync(both())
    assert order == ["other", "patient"]
