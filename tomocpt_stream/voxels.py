"""What a source of voxels offers to a tomogram, and the sources that are arrays already."""

from __future__ import annotations

import hashlib
import pickle
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from zarr.storage import LocalStore, MemoryStore, WrapperStore, ZipStore

from tomocpt_stream.errors import PlanError, SourceError

if TYPE_CHECKING:
    import dask.array as da  # noqa: TID251
    from zarr.abc.store import Store

    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.traffic import Traffic

PLANE_BYTES = 32 << 20
SAMPLE_EDGE = 32


class Voxels(Protocol):
    """The voxels of one volume as z, y, x, whatever holds them."""

    @property
    def shape(self) -> Shape:
        """The shape as z, y, x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values as stored."""

    @property
    def chunks(self) -> Shape:
        """The box that reads best; a hint."""

    @property
    def travels(self) -> bool:
        """Whether pickling takes the address along and no voxel."""

    @property
    def traffic(self) -> Traffic | None:
        """What this process has asked a remote store for; None for a local source."""

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box inside the volume as a C-contiguous array of its own."""

    def facts(self) -> dict[str, Any]:
        """Return what the header states, as plain data."""

    def identity(self) -> dict[str, Any]:
        """Return plain data that change when the voxels do."""

    def confirm(self) -> None:
        """Raise a SourceError where the source is not here as it was when it was opened."""

    def remarks(self) -> list[str]:
        """Return what had to be assumed, a sentence each."""


def is_shared(store: Store) -> bool:
    """Return whether another process that unpickles a zarr store reads the same objects in it."""
    inner = _innermost(store)
    if isinstance(inner, LocalStore):
        return inner.root.is_absolute()
    # The stores over obstore and fsspec may lie in memory too.
    protocol = getattr(getattr(inner, "fs", None), "protocol", "")
    in_memory = "memory" in protocol or type(getattr(inner, "store", None)).__name__ == "MemoryStore"
    return not (isinstance(inner, MemoryStore) or in_memory)


def shared(store: Store) -> Store:
    """Return a store as other processes find it; PlanError for one that they cannot write into."""
    found = _absolute(store)
    why = ""
    try:
        pickle.dumps(found)
    except Exception as error:  # a store may raise what it likes
        why = f" ({error})"
    # A zip file has one writer.
    if not why and is_shared(found) and not isinstance(_innermost(found), ZipStore):
        return found
    raise PlanError(
        f"a client, and the store {store}, which only this process can use{why}",
        expected="a store that every worker can read and write",
        remedy="give a folder on a disk that all workers see, or the store of a bucket",
    )


def _absolute(store: Store) -> Store:
    """Return a store without relative paths: workers have working directories of their own."""
    if isinstance(store, WrapperStore):
        inner = _absolute(store._store)
        return store if inner is store._store else store._with_store(inner)
    if type(store) is LocalStore and not store.root.is_absolute():
        return LocalStore(store.root.absolute(), read_only=store.read_only)
    return store


def _innermost(store: Store) -> Store:
    while isinstance(store, WrapperStore):
        store = store._store
    return store


def planes(shape: Shape) -> Shape:
    """Return a box of whole planes of the first axis, as many as take up to 32 MB in float32."""
    count, rows, columns = shape
    return (max(1, min(count, PLANE_BYTES // (rows * columns * 4))), rows, columns)


def check_dtype(dtype: np.dtype[Any], address: str) -> None:
    """Raise a SourceError where values are not real numbers."""
    if dtype.kind not in "buif":
        raise SourceError(
            f"{address} holds values of type {dtype}",
            expected="real numbers: bool, integers, or floats of 16, 32 or 64 bits",
            remedy="convert it to float32",
        )


def as_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a C-contiguous float32 copy."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which ingest reports
        return np.array(values, dtype=np.float32, order="C")


class ArrayVoxels:
    """The voxels of a numpy array."""

    kind = "numpy array"
    traffic: Traffic | None = None

    def __init__(self, array: Any) -> None:
        if array.ndim != 3 or 0 in array.shape:
            raise SourceError(
                f"the {self.kind} has shape {array.shape}",
                expected="three axes z, y, x, none of them empty",
                remedy="pass one volume",
            )
        check_dtype(np.dtype(array.dtype), f"the {self.kind}")
        self.array = array
        self.shape: Shape = (array.shape[0], array.shape[1], array.shape[2])
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)

    @property
    def chunks(self) -> Shape:
        """Whole planes."""
        return planes(self.shape)

    @property
    def travels(self) -> bool:
        """False: the voxels, or a graph that may hold them, are in memory."""
        return False

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box (z, y, x) as a float32 array of its own."""
        return as_float32(self.array[box])

    def to_dask(self) -> da.Array:
        """Return the voxels as a float32 dask array."""
        import dask.array as da  # noqa: TID251

        array: da.Array = da.from_array(self.array, chunks=self.chunks).astype(np.float32)
        return array

    def facts(self) -> dict[str, Any]:
        """Return the kind of array."""
        return {"kind": self.kind}

    def identity(self) -> dict[str, Any]:
        """Return a hash of all voxels."""
        digest = hashlib.sha256()
        for plane in range(self.shape[0]):
            digest.update(np.ascontiguousarray(self.array[plane]).tobytes())
        return {"sha256": digest.hexdigest()}

    def confirm(self) -> None:
        """Do nothing: the array is here."""

    def remarks(self) -> list[str]:
        """Return nothing: nothing had to be assumed."""
        return []


class DaskVoxels(ArrayVoxels):
    """The voxels of a dask array, computed box by box in the threads of the process that reads."""

    kind = "dask array"

    @property
    def chunks(self) -> Shape:
        """The largest block along each axis."""
        z, y, x = (max(sizes) for sizes in self.array.chunks)
        return (z, y, x)

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box (z, y, x) as a float32 array of its own."""
        # Never a cluster's scheduler: a worker that reads would wait for a task behind itself.
        return as_float32(np.asarray(self.array[box].compute(scheduler="threads")))

    def to_dask(self) -> da.Array:
        """Return the voxels as a float32 dask array."""
        array: da.Array = self.array.astype(np.float32)
        return array

    def identity(self) -> dict[str, Any]:
        """Return the name of the graph, which dask makes from what the graph is made of."""
        return {"graph": str(self.array.name)}
