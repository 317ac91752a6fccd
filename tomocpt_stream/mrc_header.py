"""The header of an MRC file as facts.

The reader follows the MRC2014 format (Cheng et al. 2015, J. Struct. Biol. 192, 146-150) and is
lenient where old programs are: files without the `MAP ` identifier, without a machine stamp, or with
unsigned bytes in mode 0 are read, and `remarks` says what was assumed. A file that could only be read
by guessing at its voxels is a SourceError.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape

ByteOrder = Literal["<", ">"]

HEADER_BYTES = 1024
IMOD_STAMP = 1146047817
IMOD_SIGNED_BYTES = 1
# A longest edge far beyond any camera: what separates a size from one read in the wrong byte order.
LONGEST_EDGE = 1 << 20

TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_REFUSED = {
    3: "complex 16-bit integers, a Fourier transform",
    4: "complex 32-bit floats, a Fourier transform",
    16: "RGB colours",
    101: "4-bit integers, two voxels in a byte",
}
_STAMPS: dict[bytes, ByteOrder] = {b"DD": "<", b"DA": "<", b"\x11\x11": ">"}
_OTHER_FILES = {
    b"II*\x00": "a TIFF file",
    b"MM\x00*": "a TIFF file",
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a PNG image",
}
# Words 1-25 (sizes to extended header), 39-40 (IMOD) and 56 (labels) of the header.
_WORDS = "3i 1i 3i 3i 3f 3f 3i 3f 1i 1i"


@dataclass(frozen=True)
class MrcHeader:
    """The facts of an MRC header; nothing of it is in doubt but what `remarks` lists.

    `file_shape` is (sections, rows, columns). `axes` names the axis (1 x, 2 y, 3 z) that columns,
    rows and sections run along. `cell` (Å) and `sampling` (intervals) are x, y, z. `stated` is the
    minimum, maximum and mean that the header states. `signed` is None where the header does not
    tell whether bytes of mode 0 are signed.
    """

    file_shape: Shape
    mode: int
    byte_order: ByteOrder
    axes: tuple[int, int, int]
    cell: tuple[float, float, float]
    sampling: tuple[int, int, int]
    stated: tuple[float, float, float]
    space_group: int
    extended_bytes: int
    extended_type: str
    has_map_id: bool
    signed: bool | None
    labels: tuple[str, ...]
    remarks: tuple[str, ...] = field(default=())

    @property
    def order(self) -> tuple[int, int, int]:
        """The file axis (0 sections, 1 rows, 2 columns) along which z, y and x run."""
        found = self.axes[::-1]
        return (found.index(3), found.index(2), found.index(1))

    @property
    def shape(self) -> Shape:
        """The shape as z, y, x, whatever the order of the axes in the file."""
        z, y, x = self.order
        return (self.file_shape[z], self.file_shape[y], self.file_shape[x])

    @property
    def voxel_sizes(self) -> tuple[float, float, float] | None:
        """The voxel size in Å along z, y, x; None where the header states none.

        Cell and sampling belong to the axes x, y, z of the cell, not to columns, rows and sections,
        so that the order of the axes does not touch them.
        """
        sizes = [
            length / count if count > 0 else 0.0
            for length, count in zip(self.cell, self.sampling, strict=True)
        ]
        if not all(math.isfinite(size) and size > 0 for size in sizes):
            return None
        # A float32 holds seven digits: what lies beyond them is noise, and 10.52 should read 10.52.
        x, y, z = (float(f"{size:.7g}") for size in sizes)
        return (z, y, x)

    @property
    def data_offset(self) -> int:
        """The byte at which the voxels start."""
        return HEADER_BYTES + self.extended_bytes

    @property
    def data_bytes(self) -> int:
        """The bytes that the voxels take."""
        return math.prod(self.file_shape) * np.dtype(TYPES[self.mode]).itemsize


def parse_header(raw: bytes, source: str, size: int | None = None) -> MrcHeader:
    """Return the facts in the first 1024 bytes of an MRC file.

    `size` is that of the whole file in bytes, None where it is not known (a compressed file); it
    helps to tell the byte order of a file without a machine stamp.

    Raises
    ------
    SourceError
        No MRC header, or one of a kind that is no tomogram: an unknown or complex mode, a single
        image, a stack of volumes.
    """
    if len(raw) < HEADER_BYTES:
        raise SourceError(
            f"{source} holds {len(raw)} bytes",
            expected=f"an MRC header of {HEADER_BYTES} bytes",
            remedy="copy the file again; it is cut short or is no MRC file",
        )
    order, remarks = _byte_order(raw, source, size)
    words = _words(raw, order)
    axes = words[16:19] if sorted(words[16:19]) == [1, 2, 3] else (1, 2, 3)
    signed, byte_remark = _signedness(raw, order, words)
    if words[3] == 0 and byte_remark:
        remarks.append(byte_remark)
    (label_count,) = struct.unpack_from(f"{order}i", raw, 220)
    labels = [raw[224 + 80 * i : 304 + 80 * i] for i in range(min(max(label_count, 0), 10))]
    header = MrcHeader(
        file_shape=(words[2], words[1], words[0]),
        mode=words[3],
        byte_order=order,
        axes=(axes[0], axes[1], axes[2]),
        cell=(words[10], words[11], words[12]),
        sampling=(words[7], words[8], words[9]),
        stated=(words[19], words[20], words[21]),
        space_group=words[22],
        extended_bytes=words[23],
        extended_type=_text(raw[104:108]) if words[23] else "",
        has_map_id=raw[208:211] == b"MAP",
        signed=signed,
        labels=tuple(text for text in map(_text, labels) if text),
        remarks=tuple(remarks),
    )
    _check(header, source)
    return header


def _words(raw: bytes, order: ByteOrder) -> tuple[Any, ...]:
    return struct.unpack_from(order + _WORDS, raw)


def _text(raw: bytes) -> str:
    return raw.split(b"\x00")[0].decode("ascii", errors="replace").strip()


def _byte_order(raw: bytes, source: str, size: int | None) -> tuple[ByteOrder, list[str]]:
    """Return the order in which the header makes sense; the stamp decides only where both do."""
    orders: tuple[ByteOrder, ByteOrder] = ("<", ">")
    sensible = [order for order in orders if _is_sensible(_words(raw, order))]
    stamped = _STAMPS.get(raw[212:214])
    if not sensible:
        raise _no_header(raw, source, stamped or "<")
    if stamped in sensible:
        return stamped, []
    if len(sensible) == 2:
        fitting = [order for order in sensible if size is None or _bytes_needed(_words(raw, order)) <= size]
        sensible = sorted(fitting or sensible, key=lambda order: _bytes_needed(_words(raw, order)))
    name = "little" if sensible[0] == "<" else "big"
    why = "no machine stamp" if stamped is None else "a machine stamp that contradicts the sizes"
    return sensible[0], [f"the header has {why}; its sizes and mode make sense as {name}-endian"]


def _is_sensible(words: tuple[Any, ...]) -> bool:
    sizes, mode, axes = words[0:3], words[3], words[16:19]
    # Files older than the axis order leave it zero.
    return (
        all(0 < n <= LONGEST_EDGE for n in sizes)
        and (mode in TYPES or mode in _REFUSED)
        and (sorted(axes) == [1, 2, 3] or axes == (0, 0, 0))
        and words[23] >= 0
    )


def _bytes_needed(words: tuple[Any, ...]) -> int:
    itemsize = np.dtype(TYPES.get(words[3], "u1")).itemsize
    return int(HEADER_BYTES + words[23] + math.prod(words[0:3]) * itemsize)


def _no_header(raw: bytes, source: str, order: ByteOrder) -> SourceError:
    known = next((name for magic, name in _OTHER_FILES.items() if raw.startswith(magic)), None)
    if known:
        return SourceError(
            f"{source} is {known}",
            expected="an MRC file (.mrc, .rec, .map, also .gz and .bz2) or a zarr folder",
            remedy="convert it to MRC or OME-Zarr first",
        )
    words = _words(raw, order)
    return SourceError(
        f"{source} has columns, rows, sections {words[0:3]}, mode {words[3]}, axis order {words[16:19]} and"
        f" {words[23]} bytes of extended header where an MRC file states them",
        expected="positive sizes, mode 0, 1, 2, 6 or 12, and an axis order made of 1, 2 and 3",
        remedy="check that the file is an MRC file and is whole",
    )


def _signedness(raw: bytes, order: ByteOrder, words: tuple[Any, ...]) -> tuple[bool | None, str]:
    """Return whether bytes of mode 0 are signed, and what was assumed to say so.

    In this order: IMOD's own flag; a stated minimum below zero, or a stated maximum above 127 that
    no signed byte reaches; MRC2014, which has them signed, where the file claims to follow it. An
    older file that states no usable range leaves the question open.
    """
    stamp, flags = struct.unpack_from(f"{order}2i", raw, 152)
    if stamp == IMOD_STAMP:
        return bool(flags & IMOD_SIGNED_BYTES), ""
    low, high, mean = words[19:22]
    if -128 <= low <= mean <= high <= 255 and low < high:
        if low < 0:
            return True, ""
        if high > 127:
            return False, f"bytes of mode 0 are read as unsigned, as the header states a maximum of {high:g}"
        return True, ""
    if raw[208:211] == b"MAP":
        return True, ""
    return (
        None,
        "the header does not say whether bytes are signed; the reading with the smaller spread is taken",
    )


def _check(header: MrcHeader, source: str) -> None:
    if header.mode in _REFUSED:
        raise SourceError(
            f"{source} has mode {header.mode} ({_REFUSED[header.mode]})",
            expected="a volume of real numbers: mode 0, 1, 2, 6 or 12",
            remedy="convert it, for instance with `newstack -mode 2`",
        )
    if 401 <= header.space_group <= 630:
        raise SourceError(
            f"{source} is a stack of volumes (space group {header.space_group}, {header.file_shape[0]}"
            f" sections in volumes of {header.sampling[2]})",
            expected="one volume in a file",
            remedy="write each volume of the stack to a file of its own",
        )
    if min(header.file_shape) == 1:
        raise SourceError(
            f"{source} is a single image: columns, rows, sections {header.file_shape[::-1]}",
            expected="a volume with more than one voxel along every axis",
            remedy="pass the reconstructed tomogram",
        )
