"""Receipts and claims: create-only, asked for singly or many at once, whoever else is writing."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from tests.races import race
from tomocpt_stream import receipts as module
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.receipts import (
    Receipts,
    as_store,
    claim_group,
    config_hash,
    holds_objects,
    is_absent,
    read_bytes,
    read_each,
    read_json,
    within,
    write_bytes,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from zarr.abc.store import Store


class Watched(WrapperStore[Any]):
    """A store that takes a while to answer, and counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls = {"get": 0, "exists": 0, "list": 0, "listed": 0}
        self.under_way = self.most = 0
        self.fails_at: str | None = None

    async def _wait(self, name: str, key: str) -> None:
        self.calls[name] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        if key == self.fails_at:
            raise ConnectionError("reset by peer")

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        await self._wait("get", key)
        return await super().get(key, *arguments, **options)

    async def exists(self, key: str) -> bool:
        await self._wait("exists", key)
        return await super().exists(key)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        self.calls["list"] += 1
        async for key in self._store.list_prefix(prefix):
            self.calls["listed"] += 1
            yield key


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "s") if request.param == "disk" else MemoryStore()


def filled(store: Store, count: int) -> Receipts:
    receipts = Receipts(store, "map")
    for number in range(count):
        write_bytes(store, f"receipts/map/{number}.json", json.dumps({"n": number}).encode())
    return receipts


def test_the_first_receipt_stays(store: Store) -> None:
    receipts = Receipts(store, "map")
    assert receipts.put("0.0.1", {"sha256": "a", "when": 1}) == {"sha256": "a", "when": 1}
    assert receipts.put("0.0.1", {"sha256": "b", "when": 2}) == {"sha256": "a", "when": 1}
    assert receipts.get("0.0.1") == {"sha256": "a", "when": 1}
    assert receipts.get("0.0.2") is None


def test_kinds_do_not_mix(store: Store) -> None:
    Receipts(store, "map").put("0", {"n": 1})
    Receipts(store, "mapped").put("1", {"n": 2})
    assert Receipts(store, "map").all() == {"0": {"n": 1}}
    assert Receipts(store, "map").present(["0", "1"]) == {"0"}
    assert Receipts(store, "other").names() == set()


@settings(max_examples=25, deadline=None)
@given(keys=st.sets(st.integers(0, 300)), asked=st.lists(st.integers(0, 300)))
def test_every_way_to_ask_agrees(keys: set[int], asked: list[int]) -> None:
    receipts = Receipts(MemoryStore(), "map")
    for key in keys:
        receipts.put(f"{key}", {"n": key})
    assert receipts.names() == {f"{key}" for key in keys}
    assert receipts.present([f"{key}" for key in asked]) == {f"{key}" for key in keys & set(asked)}
    found = list(receipts.each())
    assert found == [(key, {"n": int(key)}) for key in sorted(receipts.names())]
    assert list(receipts.all().items()) == found


def test_what_a_killed_writer_left_is_no_receipt(tmp_path: Path) -> None:
    receipts = filled(LocalStore(tmp_path), 2)
    litter = tmp_path / "receipts" / "map" / "1.0.deadbeef.partial"
    litter.write_bytes(b"{")
    assert receipts.names() == {"0", "1"}
    assert len(receipts.all()) == 2
    for path in (tmp_path / "receipts" / "map").glob("*.json"):
        path.unlink()
    assert not holds_objects(LocalStore(tmp_path))
    assert receipts.all() == {}


def test_many_receipts_are_read_at_once_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 100)
    store = Watched(MemoryStore())
    receipts = filled(store, 250)
    ahead = receipts.each()
    first, _ = next(ahead)
    assert (first, store.calls["get"]) == ("0", 100)  # no more are held
    assert store.most == 64
    assert sum(1 for _ in ahead) == 249
    assert store.calls == {"get": 250, "exists": 0, "list": 1, "listed": 250}
    assert store.most == 64


def test_single_receipts_are_asked_for_without_a_listing() -> None:
    store = Watched(MemoryStore())
    receipts = filled(store, 3)
    asked = [str(number) for number in range(1, 101)]
    assert receipts.present(asked) == {"1", "2"}
    assert store.calls == {"get": 0, "exists": 100, "list": 0, "listed": 0}
    assert store.most == 32
    assert receipts.names() == {"0", "1", "2"}
    assert store.calls["get"] == 0
    assert receipts.present([]) == set()


def test_a_store_that_fails_is_not_one_that_has_none() -> None:
    store = Watched(MemoryStore())
    receipts = filled(store, 10)
    store.fails_at = "receipts/map/7.json"
    for ask in (receipts.all, lambda: receipts.present(["1", "7"]), lambda: receipts.get("7")):
        with pytest.raises(ConnectionError, match="reset by peer"):
            ask()
    with pytest.raises(ConnectionError):
        receipts.put("7", {"n": 7})


def test_a_receipt_deleted_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = filled(MemoryStore(), 2)
    monkeypatch.setattr(receipts, "names", lambda: {"0", "1", "gone"})
    assert set(receipts.all()) == {"0", "1"}


@pytest.mark.parametrize("content", [b"", b'{"n": ', b"7", b"[1, 2]", b"\xff\xfe"])
def test_a_receipt_cut_short_is_named(store: Store, content: bytes) -> None:
    receipts = filled(store, 2)
    write_bytes(store, "receipts/map/1.json", content)
    for ask in (receipts.all, lambda: receipts.get("1"), lambda: receipts.put("1", {"n": 1})):
        with pytest.raises(CheckpointError, match=r"receipts/map/1\.json of the store is no JSON"):
            ask()
    assert receipts.names() == {"0", "1"}


def test_a_store_is_not_mended_by_deleting_what_says_what_it_is(store: Store) -> None:
    for key, remedy in {
        "receipts/map/1.json": "delete that object",
        "zarr.json": "delete this store",
    }.items():
        write_bytes(store, key, b'{"n": ')
        with pytest.raises(CheckpointError, match=f"the object {key} of the store") as caught:
            read_json(store, key)
        assert caught.value.remedy == f"{remedy} and run again"


def test_objects_are_read_in_the_order_asked_for(store: Store) -> None:
    for number in range(5):
        write_bytes(store, f"candidates/{number}", bytes([number]))
    keys = [f"candidates/{number}" for number in (3, 9, 0, 3)]
    assert list(read_each(store, iter(keys))) == list(
        zip(keys, [b"\x03", None, b"\x00", b"\x03"], strict=True)
    )
    assert read_bytes(store, "candidates/4") == b"\x04"
    assert read_json(store, "nothing") is None


def test_one_object_is_enough_to_know_that_a_store_holds_some() -> None:
    inner = MemoryStore()
    store = Watched(inner)
    assert not holds_objects(store)
    write_bytes(inner, "a.0.partial", b"")
    assert not holds_objects(store)
    for number in range(100):
        write_bytes(inner, f"b/{number}", b"")
    store.calls["listed"] = 0
    assert holds_objects(store)
    assert store.calls["listed"] <= 2


def test_a_path_becomes_a_store_and_a_file_does_not(tmp_path: Path) -> None:
    assert as_store(tmp_path / "new") == LocalStore(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        as_store(str(tmp_path / "file"))


def test_equal_configurations_have_equal_hashes() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_the_first_claim_of_a_group_stays(store: Store) -> None:
    claim_group(store, {"mine": {"by": 1}})
    claim_group(store, {"mine": {"by": 2}})
    group = zarr.open_group(store, mode="r")
    assert group.attrs.asdict() == {"mine": {"by": 1}}
    assert group.metadata.zarr_format == 3


RACE = """
from zarr.storage import LocalStore
from tomocpt_stream.receipts import Receipts, claim_group, read_json

found = []
for number in range(25):
    store = LocalStore(Path(sys.argv[4]) / str(number))
    meet(number)
    claim_group(store, {"by": ME})
    claimed = read_json(store, "zarr.json")["attributes"]["by"]
    found.append([claimed, Receipts(store, "map").put("0.0.0", {"by": ME})["by"]])
print(json.dumps(found))
"""


def test_processes_that_claim_at_once_agree_whose_it_is(tmp_path: Path) -> None:
    one, other, third = race(RACE, tmp_path / "gate", str(tmp_path / "s"), count=3)
    assert one == other == third
    assert all(claimed in (0, 1, 2) for pair in one for claimed in pair)
    for number, (claimed, put) in enumerate(one):
        store = LocalStore(tmp_path / "s" / str(number))
        assert zarr.open_group(store, mode="r").attrs["by"] == claimed
        assert Receipts(store, "map").all() == {"0.0.0": {"by": put}}


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_by_path_and_by_address_is_one(prefix: str, tmp_path: Path) -> None:
    folder = f"{prefix}{tmp_path}"
    assert within(folder, "a") == str(tmp_path / "a")
    store = as_store(folder)
    assert isinstance(store, LocalStore)
    assert store.root == tmp_path
    assert not is_absent(folder)
    assert is_absent(within(folder, "a"))


def test_a_bucket_is_a_store_that_is_never_absent() -> None:
    assert within("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert str(as_store("s3://bucket/a")) == "s3://bucket/a"
    assert not is_absent("s3://bucket/a")
