"""IMOD's binary model files, chunk by chunk: what holds points, sizes, values and slicer angles.

All numbers are big-endian. After a header of 240 bytes come chunks of a name of four letters and,
but for OBJT, CONT and MESH, whose length follows from their counts, a length. Every count is held
against the bytes that are left before anything is read by it, so that no file takes longer or more
memory than its size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LARGEST_FILE = 1 << 30
# Two million points, each in a contour of its own with a slicer angle; a hostile file has empty ones.
MOST_CHUNKS = 4_000_000
HEADER = struct.Struct(">128s4iI4i6f5if2i3f")
OBJECT = struct.Struct(">64s16iiIii3fi8Bii")
SLICER = struct.Struct(">i3f3f32s")
VALUE = np.dtype([("type", ">i2"), ("flags", ">u2"), ("index", ">i4"), ("value", ">f4")])
SCATTERED, ONE_POINT_FLOAT, VALUE_1 = 1 << 9, 0b10000100, 10
_SLICERS = np.dtype(
    [("id", "S4"), ("size", ">i4"), ("time", ">i4"), ("angles", ">f4", 3), ("center", ">f4", 3)]
)
# Z from -0.5, not written by 3dmod yet, several clip planes, bytes in IMAT, and that meshes may be thick.
_MODEL_FLAGS = 0x3E00
_FARTHEST = 1e9


@dataclass(eq=False)
class Contour:
    """Points (n, 3) as x, y, z; `values` (n,) has NaN where a point has none, `sizes` are radii in voxels."""

    points: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float32] | None = None
    values: npt.NDArray[np.float32] | None = None


@dataclass(eq=False)
class Object:
    """One object of a model; its points are spheres of `radius` voxels."""

    name: str
    contours: list[Contour] = field(default_factory=list)
    meshes: int = 0
    radius: int = 5


@dataclass(eq=False)
class Model:
    """A model: `pixel_size` in Å, None where it says none; `slicers` (n, 6): angles x, y, z, centre x, y, z.

    `image` is the size of the image it was drawn on, x, y, z. `shift` is where the part of the image
    began, in voxels, that it was drawn on.
    """

    name: str
    image: tuple[int, int, int]
    objects: list[Object]
    slicers: npt.NDArray[np.float64]
    pixel_size: float | None = None
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)


def parse_model(data: bytes, place: str) -> Model:
    """Return the model of a file's bytes; `place` is what an error calls it.

    Raises FormatError, which names the byte, where a chunk does not fit or a point is no number.
    """
    if len(data) < 8 + HEADER.size or data[:4] != b"IMOD":
        raise FormatError(
            f"{place} begins with {data[:8]!r} and has {len(data)} bytes",
            expected="a binary IMOD model: IMODV1.2 and a header",
            remedy="check that it is a model file; convert text models with IMOD's imodauto or 3dmod",
        )
    header = HEADER.unpack_from(data, 8)
    reading = _Reading(data, place)
    reading.run()
    stated = _stated_size(float(np.float32(header[21])), header[22])
    return Model(
        name=_text(header[0]),
        image=(header[1], header[2], header[3]),
        objects=reading.objects,
        slicers=np.array(reading.slicers, dtype=np.float64).reshape(-1, 6),
        pixel_size=stated or reading.image_size,
        shift=reading.shift if header[5] & 1 << 14 else (0.0, 0.0, 0.0),
    )


def read_model(path: Path) -> Model:
    """Return the model of a file."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise FormatError(
            f"{path} has {size / 1e9:.1f} GB",
            expected=f"a model of points, of at most {LARGEST_FILE / 1e9:.1f} GB",
            remedy="delete the meshes in it",
        )
    return parse_model(path.read_bytes(), str(path))


class _Reading:
    """The chunks of a file from its first object on."""

    def __init__(self, data: bytes, place: str) -> None:
        self.data, self.place, self.at = data, place, 8 + HEADER.size
        self.objects: list[Object] = []
        self.slicers: list[tuple[float, ...]] = []
        self.image_size: float | None = None
        self.shift = (0.0, 0.0, 0.0)

    def run(self) -> None:
        """Read all chunks up to the end mark."""
        readers = {
            b"OBJT": self._object,
            b"CONT": self._contour,
            b"MESH": self._mesh,
            b"SIZE": self._sizes,
            b"COST": self._values,
            b"SLAN": self._slicer,
            b"MINX": self._image,
        }
        for _ in range(MOST_CHUNKS):
            name = self._take(4, "the name of a chunk, or IEOF")
            if name == b"IEOF":
                return
            if not (name.isascii() and name.replace(b" ", b"A").isalnum()):
                raise self._wrong(self.at - 4, f"{name!r}", "the name of a chunk, or IEOF")
            reader = readers.get(name)
            if reader is None:
                self._chunk(name)
            else:
                reader()
        raise self._wrong(self.at, f"more than {MOST_CHUNKS} chunks", "the points of one tomogram")

    def _take(self, size: int, what: str) -> bytes:
        if size < 0 or size > len(self.data) - self.at:
            raise self._wrong(
                self.at, f"{len(self.data) - self.at} bytes left where {what} takes {size}", "a whole file"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def _chunk(self, name: bytes) -> bytes:
        (size,) = struct.unpack(">i", self._take(4, f"the length of {name.decode()}"))
        return self._take(size, f"the chunk {name.decode()}")

    def _object(self) -> None:
        head = OBJECT.unpack(self._take(OBJECT.size, "an object"))
        self.objects.append(Object(_text(head[0])))

    def _contour(self) -> None:
        start = self.at
        count, *_ = struct.unpack(">iIii", self._take(16, "a contour"))
        points = np.frombuffer(self._take(12 * count, f"a contour of {count} points"), ">f4").astype(
            np.float64
        )
        wrong = np.flatnonzero(~(np.abs(points) < _FARTHEST))
        if len(wrong):
            raise self._wrong(
                start + 16 + 4 * int(wrong[0]),
                f"a point with {'xyz'[wrong[0] % 3]} {points[wrong[0]]:g}",
                f"a number below {_FARTHEST:g}",
            )
        self._last_object().contours.append(Contour(points.reshape(-1, 3)))

    def _mesh(self) -> None:
        vertices, indices, *_ = struct.unpack(">iiIhh", self._take(16, "a mesh"))
        if vertices < 0 or indices < 0:
            raise self._wrong(self.at - 16, f"a mesh of {vertices} vertices and {indices} indices", "counts")
        self._take(12 * vertices + 4 * indices, f"a mesh of {vertices} vertices and {indices} indices")
        self._last_object().meshes += 1

    def _sizes(self) -> None:
        contour, data = self._last_contour(), self._chunk(b"SIZE")
        if len(data) == 4 * len(contour.points):
            contour.sizes = np.frombuffer(data, ">f4").astype(np.float32)

    def _values(self) -> None:
        contour, data = self._last_contour(), self._chunk(b"COST")
        stored = np.frombuffer(data[: len(data) // VALUE.itemsize * VALUE.itemsize], VALUE)
        ours = (stored["type"] == VALUE_1) & (stored["flags"] == ONE_POINT_FLOAT)
        ours &= (stored["index"] >= 0) & (stored["index"] < len(contour.points))
        if ours.any():
            contour.values = np.full(len(contour.points), np.nan, np.float32)
            contour.values[stored["index"][ours]] = stored["value"][ours]

    def _slicer(self) -> None:
        data, start = self._chunk(b"SLAN"), self.at
        if len(data) < 28:
            raise self._wrong(start, f"a slicer angle of {len(data)} bytes", "60 bytes")
        values = struct.unpack_from(">6f", data, 4)
        if not np.all(np.abs(values) < _FARTHEST):
            raise self._wrong(start, f"a slicer angle with {values}", f"numbers below {_FARTHEST:g}")
        self.slicers.append(values)

    def _image(self) -> None:
        data = self._chunk(b"MINX")
        if len(data) < 72:
            return
        known = np.frombuffer(data[:72], ">f4").astype(np.float64).reshape(6, 3)
        scale, moved = known[3], known[1] - known[4]
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            return
        if np.ptp(scale) <= 1e-3 * scale[0] and scale[0] != 1:
            self.image_size = _rounded(float(scale[0]))
        if np.isfinite(moved).all():
            x, y, z = (float(value) for value in moved / scale)
            self.shift = (x, y, z)

    def _last_object(self) -> Object:
        if not self.objects:
            raise self._wrong(self.at, "points outside any object", "an object (OBJT) before them")
        return self.objects[-1]

    def _last_contour(self) -> Contour:
        if not self._last_object().contours:
            raise self._wrong(self.at, "sizes or values outside any contour", "a contour (CONT) before them")
        return self.objects[-1].contours[-1]

    def _wrong(self, at: int, found: str, expected: str) -> FormatError:
        return FormatError(
            f"{self.place} has at byte {at} {found}",
            expected=expected,
            remedy="copy the file again, or save it again from 3dmod; a file cut short is usual",
        )


def render_model(
    name: str,
    image: tuple[int, int, int],
    pixel_size: float | None,
    objects: Sequence[Object],
    slicers: npt.NDArray[np.float64],
) -> bytes:
    """Return a model of scattered points with the bytes of `parse_model`.

    No MINX: with one, 3dmod would move the points by the difference of origins to the image it has open.
    """
    units = (1.0, 0) if pixel_size is None else (pixel_size / 10, -9)
    shown = (len(objects), _MODEL_FLAGS, 1, 1, 0, 255, 0, 0, 0, 1, 1, 1, 0, 0, -1, 3, 128)
    parts = [b"IMODV1.2", HEADER.pack(name.encode(), *image, *shown, *units, 0, 0, 0, 0)]
    for index, one in enumerate(objects):
        colour = _COLOURS[index % len(_COLOURS)]
        drawn = (0, 1, *colour, one.radius, 0, 5, 1, 1, 0, 0, 0, 0, 0, 0)
        parts.append(
            b"OBJT" + OBJECT.pack(one.name.encode(), *[0] * 16, len(one.contours), SCATTERED, *drawn)
        )
        for contour in one.contours:
            parts.append(b"CONT" + struct.pack(">iIii", len(contour.points), 0, 0, 0))
            parts.append(contour.points.astype(">f4").tobytes())
            if contour.values is not None:
                stored = np.zeros(len(contour.points), VALUE)
                stored["type"], stored["flags"] = VALUE_1, ONE_POINT_FLOAT
                stored["index"], stored["value"] = np.arange(len(stored)), contour.values
                parts.append(b"COST" + struct.pack(">i", stored.nbytes) + stored.tobytes())
    chunks = np.zeros(len(slicers), np.dtype([*_SLICERS.descr, ("label", "S32")]))
    chunks["id"], chunks["size"], chunks["time"] = b"SLAN", SLICER.size, 1
    chunks["angles"], chunks["center"] = slicers[:, :3], slicers[:, 3:]
    return b"".join([*parts, chunks.tobytes(), b"IEOF"])


_COLOURS = (
    (0.0, 1.0, 0.0),
    (0.0, 1.0, 1.0),
    (1.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.5, 0.0),
    (0.4, 0.4, 1.0),
)
_UNITS = {0: None, 1: 1e10, -2: 1e8, -3: 1e7, -6: 1e4, -9: 10.0, -10: 1.0, -12: 0.01}


def _stated_size(value: float, units: int) -> float | None:
    """Return the pixel size of a header in Å, None where it is in pixels or no size at all."""
    each = _UNITS.get(units)
    if each is None or not (np.isfinite(value) and 0 < value < _FARTHEST):
        return None
    return float(f"{_rounded(value) * each:.9g}")


def _rounded(value: float) -> float:
    """Return a number that was stored in four bytes as the shortest text would have it."""
    return float(str(np.float32(value)))


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", errors="replace").strip()
