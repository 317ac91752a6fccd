"""Arrays that this package wrote, read so that no lost or damaged chunk goes unnoticed.

Zarr reads an absent chunk as the fill value, and Blosc decodes one that was cut short to whatever lies
behind it in memory. Here both are a CheckpointError that names the store and the object, and so is a
chunk that does not decode. A chunk with a flipped byte mostly does: that is what `verification` finds.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath

from tomocpt_stream.errors import ActionableError, CheckpointError
from tomocpt_stream.zarrays import CheckedStore

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from tomocpt_stream.zarrays import Missing

AGAIN = "delete this store and run again"


class OwnStore(CheckedStore):
    """A store that checks the objects of one array, those below `prefix`; any other goes through."""

    def __init__(self, store: Store, prefix: str, missing: Missing) -> None:
        super().__init__(store, str(store), missing, blosc=True)
        self._prefix = prefix

    def __str__(self) -> str:
        return self._address

    @property
    def unchecked(self) -> Store:
        """The store inside."""
        return self._store

    def _with_store(self, store: Store) -> OwnStore:
        return OwnStore(store, self._prefix, self._missing)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, or None where it is absent and may be."""
        if not key.startswith(self._prefix):
            return await self._store.get(key, prototype, byte_range)
        return await super().get(key, prototype, byte_range)

    def _lost(self, key: str) -> ActionableError:
        return CheckpointError(
            f"{self} has lost its object {key}", expected="every chunk that was stored", remedy=AGAIN
        )

    def _cut_short(self, key: str, size: int, needed: int) -> ActionableError:
        return CheckpointError(
            f"{self} has an object {key} that is cut short: {size} bytes",
            expected=f"at least {needed} bytes",
            remedy=AGAIN,
        )


class CheckedArray(zarr.Array[Any]):
    """A zarr array that this package wrote; what is lost or damaged is a CheckpointError, never voxels.

    What the store itself raises (no connection, no permission) comes through as it is. `store` is the
    store as it was given, which checks nothing.
    """

    @property
    def store(self) -> Store:
        """The store that the array lies in."""
        found = self.async_array.store
        return found.unchecked if isinstance(found, OwnStore) else found

    def __getitem__(self, selection: Any) -> Any:
        """Return the elements of a selection, as `zarr.Array` does."""
        try:
            return super().__getitem__(selection)
        except Exception as error:
            self._explain(selection, error)
            raise

    def get_coordinate_selection(self, selection: Any, **options: Any) -> Any:
        """Return the elements at points, as `zarr.Array` does."""
        try:
            return super().get_coordinate_selection(selection, **options)
        except Exception as error:
            self._explain(selection, error)
            raise

    def _explain(self, selection: Any, error: Exception) -> None:
        """Raise the error that names the object which a codec failed at; return where none did."""
        if isinstance(error, ActionableError | IndexError | MemoryError | OSError):
            return
        for place in self._places(selection):
            box = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(place, self.chunks, self.shape, strict=True)
            )
            key = f"{self.path}/{self.metadata.encode_chunk_key(place)}"
            try:
                super().__getitem__(box)
            except ActionableError:
                raise
            except Exception as cause:
                try:
                    sync(self.store.get(key, default_buffer_prototype()))
                except Exception:  # the store has failed, not the codec: its own error says more
                    return
                raise CheckpointError(
                    f"{self.store} has an object {key} that cannot be decoded ({cause})",
                    expected="the bytes that were stored",
                    remedy=AGAIN,
                ) from cause

    def _places(self, selection: Any) -> list[tuple[int, ...]]:
        """Return the chunks that a selection may touch."""
        whole = not isinstance(selection, tuple) or len(selection) != self.ndim
        axes = (None,) * self.ndim if whole else selection
        if all(isinstance(axis, np.ndarray) for axis in axes):
            places = (axis // size for axis, size in zip(axes, self.chunks, strict=True))
            return sorted(set(zip(*(np.ravel(axis).tolist() for axis in places), strict=True)))
        ranges = []
        for axis, size, length in zip(axes, self.chunks, self.shape, strict=True):
            start, stop, _ = (axis if isinstance(axis, slice) else slice(None)).indices(length)
            ranges.append(range(start // size, -(-stop // size)))
        return list(product(*ranges))


def checked(array: zarr.Array[Any], missing: Missing = "error") -> CheckedArray:
    """Return an array that this package wrote as one that notices chunks that are lost or damaged.

    `missing="fill"` is for an array of which only some chunks are ever written.
    """
    if isinstance(array, CheckedArray):
        return array
    metadata: Any = array.metadata
    path = StorePath(OwnStore(array.store, f"{array.path}/c/", missing), array.path)
    return CheckedArray(zarr.AsyncArray(metadata, path, config=array.async_array.config))
