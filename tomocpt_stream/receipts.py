"""The ledger of a store: one create-only receipt for each finished object, put after its data.

A zarr chunk whose voxels all have the fill value is not stored at all, and a killed writer leaves
temporary files, so that neither the presence nor the absence of a chunk says whether it is done. A
receipt does. Receipts are small JSON objects below `receipts/` in the same store as the data; the
first one stays, whoever comes second.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from tomocpt_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

StoreLike = str | Path | Store

PREFIX = "receipts"


def as_store(store: StoreLike) -> Store:
    """Return a zarr store: a path becomes a local one, a store stays what it is."""
    if isinstance(store, Store):
        return store
    path = Path(store)
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path} is a file",
            expected="a folder, or a place where nothing is yet",
            remedy="give another path",
        )
    return LocalStore(path)


def config_hash(config: dict[str, Any]) -> str:
    """Return the sha256 of a configuration (plain data); equal configurations have equal hashes."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


class Receipts:
    """The receipts of one kind of object (`kind`, a plain word) in a store."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store = store
        self._prefix = f"{PREFIX}/{kind}"

    def all(self) -> dict[str, dict[str, Any]]:
        """Return every receipt by its object's key."""
        keys = sync(_collect(self._store.list_prefix(f"{self._prefix}/")))
        names = [key for key in keys if key.endswith(".json")]  # a killed writer leaves *.partial
        found = {name[len(self._prefix) + 1 : -len(".json")]: read_json(self._store, name) for name in names}
        return {key: receipt for key, receipt in sorted(found.items()) if receipt is not None}

    def put(self, key: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """Store the receipt of object `key` unless it has one; return the receipt that is stored."""
        name = f"{self._prefix}/{key}.json"
        data = default_buffer_prototype().buffer.from_bytes(json.dumps(receipt, sort_keys=True).encode())
        sync(self._store.set_if_not_exists(name, data))
        return read_json(self._store, name) or receipt


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Return the JSON object stored at `key`, or None where there is none."""
    data = read_bytes(store, key)
    return None if data is None else dict(json.loads(data))


def holds_objects(store: Store) -> bool:
    """Return whether a store holds any object, but for what a killed writer left behind."""
    keys = sync(_collect(store.list_prefix("")))
    return any(not key.endswith(".partial") for key in keys)


def read_bytes(store: Store, key: str) -> bytes | None:
    """Return the bytes stored at `key`, or None where there are none."""
    found = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def write_bytes(store: Store, key: str, data: bytes) -> None:
    """Store `data` at `key`, whole or not at all."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


async def _collect(items: AsyncIterator[str]) -> list[str]:
    return [item async for item in items]
