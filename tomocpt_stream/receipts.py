"""The ledger of a store: one create-only receipt for each finished object, put after its data.

A zarr chunk whose voxels all have the fill value is not stored at all, and a killed writer leaves
temporary files, so that neither the presence nor the absence of a chunk says whether it is done. A
receipt does. Receipts are small JSON objects below `receipts/` in the same store as the data; the
first one stays, whoever comes second.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from tomocpt_stream.errors import CheckpointError, JobError
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.remote import canonical, connect, is_remote, parent

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Container,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from tomocpt_stream.errors import ActionableError

StoreLike = str | Path | Store
Result = TypeVar("Result")

PREFIX = "receipts"
QUESTIONS = 32  # whether an object is there: asked at once
READS = 64  # receipts under way at once
BATCH = 1024  # receipts held at once, about a kB each
LITTER_AGE = 60  # seconds after which a temporary file has no writer any more


def as_store(store: StoreLike, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Return a zarr store: a path becomes a local one, an address a remote one, a store stays what it is.

    `storage_options` are those of `remote.connect`, for an address.
    """
    if isinstance(store, Store):
        return store
    if isinstance(store, str) and is_remote(store):
        return connect(store, storage_options, read_only=False)
    path = Path(
        local_path(store)
    ).absolute()  # what is opened here may be read in a process with another folder
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path} is a file",
            expected="a folder, or a place where nothing is yet",
            remedy="give another path",
        )
    return LocalStore(path)


def is_absent(store: StoreLike) -> bool:
    """Return whether a path is no folder: opening it as a store would make one."""
    return (
        isinstance(store, str | Path) and not is_remote(str(store)) and not Path(local_path(store)).is_dir()
    )


def within(folder: str | Path, name: str) -> str:
    """Return the path, or the address, of something in a folder."""
    text = str(folder)
    return f"{text.rstrip('/')}/{name}" if is_remote(text) else str(Path(local_path(text)) / name)


def local_path(path: str | Path) -> str:
    """Return a path on a disk without file:// in front."""
    text = str(path)
    return url2pathname(urlsplit(text).path) if text.lower().startswith("file://") else text


def config_hash(config: dict[str, Any]) -> str:
    """Return the sha256 of a configuration (plain data); equal configurations have equal hashes."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


class Receipts:
    """The receipts of one kind of object (`kind`, a plain word) in a store."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store = store
        self._prefix = f"{PREFIX}/{kind}"

    def names(self) -> set[str]:
        """Return the keys of all objects that have a receipt, from one listing; none is read."""
        first, last = len(self._prefix) + 1, -len(".json")
        listed = sync(_collect(self._store.list_prefix(f"{self._prefix}/")))
        whole = (name for name in listed if name.endswith(".json"))  # a killed writer leaves *.partial
        return {name[first:last] for name in whole}

    def present(self, keys: Sequence[str]) -> set[str]:
        """Return those of `keys` that have a receipt; nothing is listed, however full the store is."""
        found = sync(_together(self._store.exists, [self._name(key) for key in keys], QUESTIONS))
        return {key for key, there in zip(keys, found, strict=True) if there}

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the receipt of object `key`, or None where it has none."""
        return read_json(self._store, self._name(key))

    def each(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every object's key and receipt, sorted by key.

        Many are read at once and only a batch of them is held: an object store that takes 50 ms to
        answer gives 10^5 of them in minutes.
        """
        keys = sorted(self.names())
        for key, data in read_each(self._store, map(self._name, keys)):
            if data is not None:  # None: deleted since it was listed
                yield key[len(self._prefix) + 1 : -len(".json")], _as_json(key, data)

    def all(self) -> dict[str, dict[str, Any]]:
        """Return every receipt by its object's key, in the order of the keys."""
        return dict(self.each())

    def put(self, key: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """Store the receipt of object `key` unless it has one; return the receipt that is stored."""
        name = self._name(key)
        data = default_buffer_prototype().buffer.from_bytes(json.dumps(receipt, sort_keys=True).encode())
        sync(self._store.set_if_not_exists(name, data))
        return read_json(self._store, name) or receipt

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}.json"


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Return the JSON object stored at `key`, or None where there is none."""
    data = read_bytes(store, key)
    return None if data is None else _as_json(key, data)


def _as_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        # What a lost receipt said is found out again; what a store is, is not.
        lost = "that object" if key.startswith(f"{PREFIX}/") else "this store"
        raise CheckpointError(
            f"the object {key} of the store is no JSON ({len(data)} bytes: {error})",
            expected="a whole JSON object",
            remedy=f"delete {lost} and run again",
        ) from error


def claim_group(store: Store, attributes: dict[str, Any]) -> None:
    """Make the root of a store a zarr group with these attributes, unless there is one.

    Of several processes that claim one store at once the first wins: read back what is stored. This
    holds for stores whose `set_if_not_exists` is atomic: those of zarr on disks, in memory and over
    obstore, not the one over fsspec.
    """
    node = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    data = default_buffer_prototype().buffer.from_bytes(json.dumps(node, indent=2).encode())
    sync(store.set_if_not_exists("zarr.json", data))


def holds_objects(store: Store) -> bool:
    """Return whether a store holds any object, but for what a killed writer left behind."""
    return sync(_any_whole(store.list_prefix("")))


def read_bytes(store: Store, key: str) -> bytes | None:
    """Return the bytes stored at `key`, or None where there are none."""
    found = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def read_each(store: Store, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Yield keys in their order, each with the bytes stored there or None; many are read at once."""

    async def read(key: str) -> bytes | None:
        found = await store.get(key, default_buffer_prototype())
        return None if found is None else found.to_bytes()

    source = iter(keys)
    while batch := list(islice(source, BATCH)):
        yield from zip(batch, sync(_together(read, batch, READS)), strict=True)


def delete_but(store: Store, prefix: str, kept: Container[str]) -> None:
    """Delete what lies below a prefix and is not in `kept`; what a writer has under way is let be."""
    for key in sync(_collect(store.list_prefix(prefix))):
        if key not in kept and not key.endswith(".partial"):
            sync(store.delete(key))


def delete_litter(store: Store) -> None:
    """Delete the temporary files that killed writers left in a folder, but none that may yet be renamed.

    A chunk takes a fraction of a second to write, so that one of a minute ago has no writer any more.
    Both times are those of the file system, whatever the clocks of the machines say.
    """
    if isinstance(store, LocalStore):
        now = (store.root / "zarr.json").stat().st_mtime  # just put
        for path in store.root.rglob("*.partial"):
            with suppress(FileNotFoundError):  # renamed meanwhile
                if path.stat().st_mtime < now - LITTER_AGE:
                    path.unlink()


def write_bytes(store: Store, key: str, data: bytes) -> None:
    """Store `data` at `key`, whole or not at all."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def get_object(
    address: str, storage_options: Mapping[str, Any] | None = None, kind: type[ActionableError] = JobError
) -> bytes | None:
    """Return what is stored at an address, None where there is nothing; errors as for `put_object`."""
    folder, name = parent(canonical(address))
    return read_bytes(PatientStore(connect(folder, storage_options), kind), name)


def put_object(
    address: str,
    data: bytes,
    storage_options: Mapping[str, Any] | None = None,
    kind: type[ActionableError] = JobError,
) -> None:
    """Store `data` at an address, whole or not at all; a store that does not answer is an error of `kind`."""
    folder, name = parent(canonical(address))
    write_bytes(PatientStore(connect(folder, storage_options, read_only=False), kind), name, data)


def delete_object(address: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Delete what is stored at an address."""
    folder, name = parent(canonical(address))
    sync(connect(folder, storage_options, read_only=False).delete(name))


async def _together(
    action: Callable[[str], Awaitable[Result]], keys: Sequence[str], most: int
) -> list[Result]:
    """Return what `action` returns for each key, with at most `most` of them under way."""
    free = asyncio.Semaphore(most)

    async def one(key: str) -> Result:
        async with free:
            return await action(key)

    return await asyncio.gather(*map(one, keys))


async def _any_whole(names: AsyncIterator[str]) -> bool:
    async for name in names:
        if not name.endswith(".partial"):
            return True
    return False


async def _collect(items: AsyncIterator[str]) -> list[str]:
    return [item async for item in items]
