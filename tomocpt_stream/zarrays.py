"""Boxes of one zarr array, format 2 and 3, in which nothing missing is read as zeros.

Zarr reads an absent chunk as the fill value, and Blosc decodes a chunk that was cut short to
whatever lies behind it in memory, both without a word. The store below looks at every object on its
way to the decoder, so that no request is made twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import socket
import warnings
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath, WrapperStore

from tomocpt_stream.decoded import DECODED
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.patience import PatientStore, bare
from tomocpt_stream.remote import ForbiddenError
from tomocpt_stream.spool import SpooledStore, together
from tomocpt_stream.voxels import SAMPLE_EDGE, is_shared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from tomocpt_stream.errors import ActionableError
    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.traffic import Traffic

Missing = Literal["error", "fill"]

# In the index of a shard an absent chunk has this offset and this length.
ABSENT = np.uint64(2**64 - 1)
BLOSC_HEADER = 16
LARGEST_SHARD = 256**3
LARGE_CHUNK = 8 << 20


class CheckedStore(WrapperStore[Store]):
    """A store that raises a SourceError where an object of an array is absent, empty or cut short.

    A store that may not be listed refuses what it has not. With `missing="fill"` a refused object counts
    as absent, and its key is in `refused`, where the array's metadata, the object `witness`, are given
    at the same time with the same credentials. With `blosc` whole objects are Blosc's chunks; where
    `index` says which part of a shard is its index, other parts are.
    """

    index: ByteRequest | None = None

    def __init__(
        self, store: Store, address: str, missing: Missing, *, blosc: bool, witness: str | None = None
    ) -> None:
        super().__init__(store)
        self._address = address
        self._missing = missing
        self._blosc = blosc
        self._witness = witness
        self.refused: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what this process was refused: others ask for themselves."""
        return {**self.__dict__, "refused": set()}

    def _with_store(self, store: Store) -> CheckedStore:
        same = CheckedStore(store, self._address, self._missing, blosc=self._blosc, witness=self._witness)
        same.index = self.index
        return same

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object, or None where it is absent and may be."""
        if key in self.refused:
            return None
        try:
            found = await self._store.get(key, prototype, byte_range)
        except ForbiddenError as error:
            if self._witness is None:
                raise
            await self._bear_out(key, error)
            return None
        if found is None:
            if self._missing == "error":
                raise self._lost(key)
            return None
        needed = 1
        if isinstance(byte_range, RangeByteRequest):
            needed = byte_range.end - byte_range.start
            if self.index not in (None, byte_range) and len(found) >= needed:
                needed = _blosc_bytes(found)
        elif self._blosc and byte_range is None:
            needed = _blosc_bytes(found)
        if len(found) < needed:
            raise self._cut_short(key, len(found), needed)
        return found

    async def _bear_out(self, key: str, error: ForbiddenError) -> None:
        """Return where a refused object counts as absent, or raise what the refusal means."""
        if self._missing == "error":
            raise ForbiddenError(
                error.found,
                expected=error.expected,
                remedy=f"{error.remedy}; where chunks may be absent (some writers drop those that hold "
                'nothing but the fill value), pass missing="fill"',
            ) from error
        if await self._store.get(self._witness or "", default_buffer_prototype()) is None:
            raise error
        self.refused.add(key)

    def _lost(self, key: str) -> ActionableError:
        return absent(self._address, key)

    def _cut_short(self, key: str, size: int, needed: int) -> ActionableError:
        return SourceError(
            f"{self._address} has an object {key} that is cut short: {size} bytes",
            expected=f"at least {needed} bytes",
            remedy="copy that object again",
        )


def _blosc_bytes(found: Buffer) -> int:
    """Return the bytes that a whole Blosc chunk has: the last word of its header says so."""
    if len(found) < BLOSC_HEADER:
        return BLOSC_HEADER
    return int.from_bytes(found[12:BLOSC_HEADER].to_bytes(), "little")


def absent(address: str, what: str) -> BrokenSourceError:
    """Return the error for stored objects that are not there."""
    return BrokenSourceError(
        f"{address} has no object {what}",
        expected="every chunk of the array to be stored",
        remedy='copy the array again, or pass missing="fill" to read absent chunks as the fill value'
        " (some writers drop chunks that hold nothing else)",
    )


class ZarrVoxels:
    """One zarr array read as z, y, x; `order` says which of its axes these are.

    Every other axis has length one. With `missing="error"` a chunk that is absent is a SourceError,
    in a shard too; "fill" takes the array's fill value. One that is cut short or cannot be decoded
    is a SourceError always.
    """

    def __init__(self, array: zarr.Array[Any], order: Shape, missing: Missing, address: str) -> None:
        metadata: Any = array.metadata
        self._sharding = _sharding(metadata, address)
        self._stored = bare(array.store)
        self._asked = PatientStore(self._stored, SourceError)
        name = "zarr.json" if metadata.zarr_format == 3 else ".zarray"
        self._witness = f"{array.path}/{name}" if array.path else name
        self._guarded = CheckedStore(
            self._asked, address, missing, blosc=_ends_in_blosc(_codecs(metadata)), witness=self._witness
        )
        self._told = False  # that some objects are refused
        self.array = zarr.Array(zarr.AsyncArray(metadata, StorePath(self._guarded, array.path)))
        self.order = order
        self.missing = missing
        self.address = address
        self.shape: Shape = (array.shape[order[0]], array.shape[order[1]], array.shape[order[2]])
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        self._objects: tuple[int, ...] = tuple(array.shards or array.chunks)
        if self._sharding is not None and _ends_in_blosc(self._sharding.codecs):
            self._guarded.index = self._index_range()
        self._token = uuid4().hex  # under which its chunks are kept when they are decoded

    @property
    def chunks(self) -> Shape:
        """The shape of the stored objects, within the array; of their chunks where shards are large."""
        whole = math.prod(self._objects) <= LARGEST_SHARD
        sizes = self._objects if whole else self.array.chunks
        z, y, x = (min(sizes[axis], self.array.shape[axis]) for axis in self.order)
        return (z, y, x)

    @property
    def travels(self) -> bool:
        """Whether the store is one that other processes see."""
        return is_shared(self._stored)

    @property
    def traffic(self) -> Traffic | None:
        """What this process has asked a remote store for; None for a local source."""
        return self._stored.traffic if isinstance(self._stored, SpooledStore) else None

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box (z, y, x) as a float32 array of its own."""
        region = [slice(0, 1)] * self.array.ndim
        for axis, where in zip(self.order, box, strict=True):
            region[axis] = where
        parts = list(self._parts(region))
        self._fetch((self._key(place), self._wanted(place, part)) for place, part in parts)
        try:
            if self._sharding is not None:
                shards = [(self._key(place), together(self._checked(place, part))) for place, part in parts]
                self._fetch((key, RangeByteRequest(*extent)) for key, found in shards for extent in found)
            found = self._gather(region)
        except (MemoryError, SourceError):
            raise
        except Exception as error:
            raise self._undecodable(region, error) from error
        self._tell_refused()
        others = [axis for axis in range(self.array.ndim) if axis not in self.order]
        shape = [where.stop - where.start for where in box]
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which ingest reports
            return np.ascontiguousarray(found.transpose([*others, *self.order]).reshape(shape), np.float32)

    def _tell_refused(self) -> None:
        """Warn, once, where objects are taken as absent that the store refuses."""
        if self._guarded.refused and not self._told:
            self._told = True
            warnings.warn(
                f"{self.address} refuses objects of which it does not say whether they are absent, "
                f'{min(self._guarded.refused)} among them; with missing="fill" they are read as the fill '
                "value, because the array's metadata are not refused",
                UserWarning,
                stacklevel=3,
            )

    def _fetch(self, wanted: Iterable[tuple[str, ByteRequest | None]]) -> None:
        """Have stored objects of a remote source, or parts of them, on the disk before they are decoded.

        Zarr would ask for the chunks of a shard one after the other.
        """
        if isinstance(self._stored, SpooledStore):
            refused = self._guarded.refused
            sync(self._stored.fetch(one for one in wanted if one[0] not in refused))

    def _wanted(self, place: tuple[int, ...], part: Sequence[slice]) -> ByteRequest | None:
        """Return what to ask for first: the whole object, or the index of a shard that is read in part."""
        if self._sharding is None:
            return None
        edges = zip(place, self._objects, self.array.shape, strict=True)
        everything = [slice(at * size, min((at + 1) * size, length)) for at, size, length in edges]
        return None if self._inner(place, part) == self._inner(place, everything) else self._index_range()

    def _inner(self, place: tuple[int, ...], part: Sequence[slice]) -> tuple[slice, ...]:
        """Return which chunks of a shard a part of the array touches."""
        return tuple(
            slice((where.start - at * size) // chunk, (where.stop - 1 - at * size) // chunk + 1)
            for where, at, size, chunk in zip(part, place, self._objects, self.array.chunks, strict=True)
        )

    def _gather(self, region: Sequence[slice]) -> npt.NDArray[Any]:
        """Return a region of the stored array, from large chunks one after the other.

        Zarr would decode up to ten at once, each beside its encoded bytes: those of cubes of 256 voxels
        take a GB.
        """
        if math.prod(self.array.chunks) * self.dtype.itemsize <= LARGE_CHUNK:
            return np.asarray(self.array[tuple(region)])
        found = np.empty([where.stop - where.start for where in region], self.dtype)
        for place, part in self._parts(region):
            at = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, region, strict=True))
            if self._sharding is not None:
                found[at] = self.array[part]
                continue
            corner = [index * size for index, size in zip(place, self._objects, strict=True)]
            inside = (slice(a.start - zero, a.stop - zero) for a, zero in zip(part, corner, strict=True))
            found[at] = self._chunk(corner)[tuple(inside)]
        return found

    def _chunk(self, corner: Sequence[int]) -> npt.NDArray[Any]:
        """Return all voxels of the chunk that begins at a corner."""
        whole = tuple(
            slice(start, min(start + size, length))
            for start, size, length in zip(corner, self._objects, self.array.shape, strict=True)
        )
        return DECODED.get((self._token, *corner), lambda: np.asarray(self.array[whole]))

    def facts(self) -> dict[str, Any]:
        """Return what the metadata states, as plain data."""
        metadata: Any = self.array.metadata
        codecs = [metadata.compressor] if metadata.zarr_format == 2 else metadata.codecs
        return {
            "kind": f"zarr, format {metadata.zarr_format}",
            "array": self.array.path,
            "stored_shape": list(self.array.shape),
            "stored_chunks": list(self.array.chunks),
            "stored_shards": list(self.array.shards) if self.array.shards else None,
            "axis_order": list(self.order),
            "codecs": [type(codec).__name__ for codec in codecs if codec is not None],
        }

    def identity(self) -> dict[str, Any]:
        """Return plain data that change when the array does.

        A hash of the metadata; then, on a disk, number, bytes and newest time of the objects; in
        memory a hash of all voxels, and elsewhere of some in the middle, all of one stored object.
        """
        text = json.dumps(self.array.metadata.to_dict(), sort_keys=True, default=str)
        marks: dict[str, Any] = {"metadata": hashlib.sha256(text.encode()).hexdigest()}
        if isinstance(self._stored, LocalStore):
            folder = self._stored.root / self.array.path
            states = [path.stat() for path in folder.rglob("*") if path.is_file()]
            marks["objects"] = len(states)
            marks["bytes"] = sum(state.st_size for state in states)
            marks["mtime_ns"] = max(state.st_mtime_ns for state in states)
        elif isinstance(self._stored, MemoryStore):
            digest = hashlib.sha256()
            for start in range(0, self.shape[0], self.chunks[0]):
                planes = slice(start, min(self.shape[0], start + self.chunks[0]))
                digest.update(self.read((planes, slice(0, self.shape[1]), slice(0, self.shape[2]))).tobytes())
            marks["sha256"] = digest.hexdigest()
        else:
            z, y, x = (_middle(n, chunk) for n, chunk in zip(self.shape, self.chunks, strict=True))
            marks["sample"] = hashlib.sha256(self.read((z, y, x)).tobytes()).hexdigest()
        return marks

    def confirm(self) -> None:
        """Raise a SourceError where the store holds no array: all its chunks would be absent ones."""
        if sync(self._asked.get(self._witness, default_buffer_prototype())) is None:
            raise BrokenSourceError(
                f"{socket.gethostname()} finds no array at {self.address}",
                expected="a source that every worker sees under the same address",
                remedy="put it on a file system or an object store that all machines share",
            )

    def remarks(self) -> list[str]:
        """Return nothing: zarr metadata leave no room for guesses."""
        return []

    def _parts(self, region: Sequence[slice]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Yield every stored object that a region touches, with the part of the region it holds."""
        ranges = [
            range(where.start // size, (where.stop - 1) // size + 1)
            for where, size in zip(region, self._objects, strict=True)
        ]
        for place in itertools.product(*ranges):
            yield (
                place,
                tuple(
                    slice(max(where.start, index * size), min(where.stop, (index + 1) * size))
                    for where, index, size in zip(region, place, self._objects, strict=True)
                ),
            )

    def _key(self, place: tuple[int, ...]) -> str:
        key = self.array.metadata.encode_chunk_key(place)
        return f"{self.array.path}/{key}" if self.array.path else key

    def _undecodable(self, region: Sequence[slice], error: Exception) -> SourceError:
        """Return the error that names the object which cannot be decoded."""
        for place, part in self._parts(region):
            try:
                self.array[part]
            except SourceError as cause:
                return cause
            except Exception as cause:  # codecs raise what they like
                return SourceError(
                    f"{self.address} has an object {self._key(place)} that cannot be decoded ({cause})",
                    expected="a whole chunk in the codec that the array's metadata name",
                    remedy="copy that object again",
                )
        return SourceError(
            f"{self.address} could not be read once ({error}), and could when asked again",
            expected="a store that answers every time",
            remedy="run again",
        )

    def _checked(self, place: tuple[int, ...], part: Sequence[slice]) -> list[tuple[int, int]]:
        """Return where those chunks of a shard begin and end that a part of the array touches.

        A SourceError where one is absent or lies beyond the shard's end.
        """
        key = self._key(place)
        index = self._shard_index(key)
        if index is None:  # absent altogether; the store has raised where that is an error
            return []
        chunks = index[self._inner(place, part)].reshape(-1, 2)
        offsets, lengths = chunks[:, 0], chunks[:, 1]
        gone = (offsets == ABSENT) & (lengths == ABSENT)
        if gone.any() and self.missing == "error":
            raise absent(self.address, f"{key}: of its chunks that are needed {gone.sum()} are absent")
        size = np.uint64(sync(self._asked.getsize(key)))
        inside = (lengths > 0) & (offsets <= size) & (lengths <= size - np.minimum(offsets, size))
        if not (gone | inside).all():
            raise SourceError(
                f"{self.address} has an object {key} whose index points beyond its {size} bytes, or to none",
                expected="a whole shard",
                remedy="copy that object again",
            )
        return [(start, start + length) for start, length in chunks[~gone].tolist()]

    def _shard_index(self, key: str) -> npt.NDArray[np.uint64] | None:
        """Return offset and length of every chunk in a shard, None where the shard is absent."""
        shape = self._chunks_of_shard()
        count = 16 * math.prod(shape)
        where = self._index_range()
        total = where.suffix if isinstance(where, SuffixByteRequest) else where.end
        raw = sync(self.array.store.get(key, default_buffer_prototype(), where))
        if raw is None:
            return None
        if len(raw) < total:
            raise SourceError(
                f"{self.address} has an object {key} that is cut short: {len(raw)} bytes",
                expected=f"a shard, whose index alone takes {total} bytes",
                remedy="copy that object again",
            )
        index = np.frombuffer(raw.to_bytes()[:count], "<u8").astype(np.uint64)
        return index.reshape(*shape, 2)

    def _chunks_of_shard(self) -> list[int]:
        return [size // chunk for size, chunk in zip(self._objects, self.array.chunks, strict=True)]

    def _index_range(self) -> RangeByteRequest | SuffixByteRequest:
        """Return where the index of a shard lies in it."""
        codec: Any = self._sharding
        total = 16 * math.prod(self._chunks_of_shard()) + 4 * (len(codec.index_codecs) - 1)
        at_start = codec.index_location.value == "start"
        return RangeByteRequest(0, total) if at_start else SuffixByteRequest(total)


def _codecs(metadata: Any) -> Sequence[Any]:
    """Return what chunks go through until they are stored."""
    if metadata.zarr_format == 3:
        return tuple(metadata.codecs)
    return (*(metadata.filters or ()), *((metadata.compressor,) if metadata.compressor else ()))


def _ends_in_blosc(codecs: Sequence[Any]) -> bool:
    """Return whether what codecs make is Blosc's, by whichever of its names."""
    last = codecs[-1] if codecs else None
    named = getattr(last, "codec_name", "") == "numcodecs.blosc"  # numcodecs' own in format 3
    return named or isinstance(last, numcodecs.Blosc | BloscCodec)


def _middle(length: int, chunk: int) -> slice:
    """Return the voxels of an axis nearest to its middle that are in one chunk."""
    corner = length // 2 // chunk * chunk
    start = max(corner, length // 2 - SAMPLE_EDGE // 2)
    return slice(start, min(length, corner + chunk, start + SAMPLE_EDGE))


def _sharding(metadata: Any, address: str) -> ShardingCodec | None:
    """Return the sharding codec of an array, None where it has none.

    Only the layout that all writers use is read, as the chunks of another could not be checked: one
    level of shards, nothing around them, an index of little-endian words with or without a checksum.
    """
    codecs = [] if metadata.zarr_format == 2 else list(metadata.codecs)
    found = [codec for codec in codecs if isinstance(codec, ShardingCodec)]
    if not found:
        return None
    one = found[0]
    first, *rest = one.index_codecs
    usual = (
        len(codecs) == 1
        and not any(isinstance(codec, ShardingCodec) for codec in one.codecs)
        and isinstance(first, BytesCodec)
        and (first.endian is None or first.endian.value == "little")
        and all(isinstance(codec, Crc32cCodec) for codec in rest)
        and len(rest) <= 1
    )
    if not usual:
        raise SourceError(
            f"{address} has shards inside shards, with codecs around them, or with an encoded index",
            expected="one level of shards with a plain index",
            remedy="rewrite the array with one level of shards",
        )
    return one


def address_of(array: zarr.Array[Any]) -> str:
    """Return where an array lies; one in memory has no address that outlives its process."""
    return "zarr array" if isinstance(bare(array.store), MemoryStore) else str(array.store_path)
