"""Boxes of voxels of an MRC file through a memory map, wherever the file lies.

A file with bytes after the last voxel is read, and `remarks` says so; one that is cut short is a
SourceError.
"""

from __future__ import annotations

import bz2
import gzip
import shutil
import tempfile
import threading
import weakref
import zlib
from contextlib import contextmanager
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.mrc_header import HEADER_BYTES, TYPES, MrcHeader, parse_header
from tomocpt_stream.voxels import planes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tomocpt_stream.files import StoredFile
    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.traffic import Traffic

# Bytes of a plane that are looked at to tell whether they are signed.
SAMPLE_BYTES = 1 << 16


class MrcFile:
    """The voxels of one MRC file, plain or compressed by gzip or bzip2.

    Opening reads the header. `read` maps the sections it needs and copies the box, so that no
    voxel stays in memory and no file stays open; it may be called from several threads. A
    compressed file is unpacked once, at the first read, into a nameless temporary file.
    """

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.compression, raw = _head(file)
        self.header = parse_header(raw, str(file), None if self.compression else file.size)
        if not self.compression:
            _check_length(file, self.header, file.size)
        self._unpacked: IO[bytes] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the address and the header; an unpacked copy belongs to one process."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_unpacked", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back without an unpacked copy."""
        self.__dict__.update(state, _unpacked=None, _lock=threading.Lock())

    @property
    def shape(self) -> Shape:
        """The shape as z, y, x."""
        return self.header.shape

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The type of the voxels as they are stored."""
        header = self.header
        if header.mode == 0 and not (self._bytes_are_signed() if header.signed is None else header.signed):
            return np.dtype("u1")
        return np.dtype(header.byte_order + TYPES[header.mode])

    @property
    def chunks(self) -> Shape:
        """The box that reads best: whole sections of the file, up to 32 MB of them."""
        best = planes(self.header.file_shape)
        z, y, x = self.header.order
        return (best[z], best[y], best[x])

    @property
    def travels(self) -> bool:
        """True: path and header are all that is pickled."""
        return True

    @property
    def traffic(self) -> Traffic | None:
        """What this process has asked a remote store for; None for a local source."""
        return self.file.traffic

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box (z, y, x) as a float32 array of its own."""
        order = self.header.order
        lies = [box[order.index(axis)] for axis in range(3)]
        sections = self._map(lies[0].start, lies[0].stop, self.dtype, lies[1])
        return np.array(sections[:, lies[1], lies[2]].transpose(order), dtype=np.float32, order="C")

    def facts(self) -> dict[str, Any]:
        """Return what the header states, as plain data."""
        header = self.header
        return {
            "kind": "MRC" + (f", {self.compression}" if self.compression else ""),
            "mode": header.mode,
            "byte_order": "little" if header.byte_order == "<" else "big",
            "axis_order": list(header.axes),
            "stated_voxel_sizes": list(header.voxel_sizes or ()),
            "extended_header_bytes": header.extended_bytes,
            "extended_header_type": header.extended_type,
            "stated_minimum": header.stated[0],
            "stated_maximum": header.stated[1],
            "stated_mean": header.stated[2],
            "space_group": header.space_group,
            "labels": list(header.labels),
        }

    def identity(self) -> dict[str, Any]:
        """Return what tells this file from another of the same name."""
        return self.file.identity()

    def confirm(self) -> None:
        """Raise a SourceError where the file is not seen from here as it was when it was opened."""
        self.file.confirm()

    def remarks(self) -> list[str]:
        """Return what a careful reader of the header would want to know."""
        header, found = self.header, list(self.header.remarks)
        extra = self.file.size - header.data_offset - header.data_bytes
        if not self.compression and extra > 0:
            found.append(f"{extra} bytes after the last voxel are ignored")
        if header.space_group == 0 and header.sampling[2] == 1:
            found.append(
                "the header calls the file a stack of images, as of a tilt series (space group 0, mz 1)"
            )
        return found

    def _bytes_are_signed(self) -> bool:
        """Return whether signed bytes spread less than unsigned ones, over voxels of the middle.

        Read the wrong way round, a distribution is cut at its own middle and its halves land at the
        two ends of the range.
        """
        sections, rows, columns = self.header.file_shape
        middle = self._map(sections // 2, sections // 2 + 1, np.dtype("i1"), slice(0, rows))[0]
        some = np.ascontiguousarray(middle[:: max(1, rows * columns // SAMPLE_BYTES)])
        spreads = [float(np.std(some.view(kind), dtype=np.float64)) for kind in ("i1", "u1")]
        # Equal where no value is below 128 or none above: old programs scaled to 0 to 255.
        return spreads[0] < spreads[1] * (1 - 1e-6)

    def _map(self, start: int, stop: int, dtype: np.dtype[Any], rows: slice) -> npt.NDArray[Any]:
        """Return whole sections, of which only the `rows` will be looked at."""
        _, height, columns = self.header.file_shape
        offset = self.header.data_offset + start * height * columns * dtype.itemsize
        shape = (stop - start, height, columns)
        try:
            if not self.compression:
                return self.file.map(offset, dtype, shape, rows)
            with self._lock:
                if self._unpacked is None:
                    self._unpacked = _unpack(self.file, self.compression, self.header)
                    weakref.finalize(self, self._unpacked.close)
                return np.memmap(cast("Any", self._unpacked), dtype, "r", offset, shape)
        except (OSError, ValueError) as error:
            if isinstance(error, SourceError):
                raise
            gone = isinstance(error, FileNotFoundError | ValueError)  # a file cut short is a ValueError
            raise (BrokenSourceError if gone else SourceError)(
                f"sections {start} to {stop} of {self.file} cannot be read ({error})",
                expected=f"the {self.header.data_bytes} bytes of voxels that were there when it was opened",
                remedy="check that the file was not moved, replaced or cut short meanwhile",
            ) from error


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2"}


@contextmanager
def _opened(file: StoredFile, compression: str) -> Iterator[IO[bytes]]:
    """Give the contents of a file, unpacked."""
    with file.stream() as stored:
        if compression == "gzip":
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=stored))
        elif compression == "bzip2":
            yield cast("IO[bytes]", bz2.BZ2File(stored))
        else:
            yield stored


def _head(file: StoredFile) -> tuple[str, bytes]:
    """Return the compression and the first 1024 bytes; the contents decide, not the suffix."""
    try:
        with file.stream() as stored:
            magic = stored.read(3)
        compression = next((name for start, name in _MAGIC.items() if magic.startswith(start)), "")
        with _opened(file, compression) as stream:
            return compression, stream.read(HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"{file} cannot be read ({error})",
            expected="an MRC file (.mrc, .rec, .map, also .gz and .bz2)",
            remedy="check its name and permissions, and that it was copied whole",
        ) from error


def _check_length(file: StoredFile, header: MrcHeader, found: int) -> None:
    needed = header.data_offset + header.data_bytes
    if found < needed:
        raise BrokenSourceError(
            f"{file} is truncated: it holds {found} bytes",
            expected=f"{needed} bytes: {' x '.join(map(str, header.file_shape[::-1]))} voxels of mode"
            f" {header.mode} after {header.data_offset} bytes of header",
            remedy="copy or write the file again",
        )


def _unpack(file: StoredFile, compression: str, header: MrcHeader) -> IO[bytes]:
    """Return an open temporary file, without a name, that holds the unpacked file."""
    target = cast("IO[bytes]", tempfile.TemporaryFile(prefix="tomocpt_stream"))  # noqa: SIM115
    try:
        with _opened(file, compression) as stream:
            shutil.copyfileobj(stream, target, 4 << 20)
        target.flush()
        _check_length(file, header, target.tell())
    except (OSError, EOFError, zlib.error) as error:
        target.close()
        raise BrokenSourceError(  # a second try would take as long
            f"{file} cannot be unpacked ({error})",
            expected=f"{header.data_offset + header.data_bytes} bytes of {compression}-compressed MRC file",
            remedy=f"copy the file again, or make room in the temporary folder {tempfile.gettempdir()}",
        ) from error
    except SourceError:
        target.close()
        raise
    return target
