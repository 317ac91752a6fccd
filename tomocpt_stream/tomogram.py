"""Any source as a lazy tomogram: opening reads the header, `read` brings one box as float32."""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from tomocpt_stream.errors import SourceError
from tomocpt_stream.files import LocalFile, RemoteFile
from tomocpt_stream.frame import Box, Frame, Shape
from tomocpt_stream.mrc import MrcFile
from tomocpt_stream.omezarr import Place, as_voxels, open_zarr
from tomocpt_stream.portal_records import TomogramRecord
from tomocpt_stream.remote import canonical, connect, is_remote, parent
from tomocpt_stream.spool import LIMIT, SpooledStore
from tomocpt_stream.voxel_sizes import ANISOTROPY, contradictions, given_size, stated_size
from tomocpt_stream.voxels import ArrayVoxels, DaskVoxels, Voxels
from tomocpt_stream.zarrays import Missing, address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import dask.array as da  # noqa: TID251

    from tomocpt_stream.traffic import Traffic

BeamAxis = Literal["z", "y"]

MRC_SUFFIXES = (".gz", ".bz2", ".mrc", ".mrcs", ".rec", ".map", ".st")
SUFFIXES = (*MRC_SUFFIXES, ".zarr", ".ome")


class Levels(NamedTuple):
    """How much coarser than level 0 each level of a source is, and how another one is opened."""

    factors: tuple[float, ...]
    reopen: Callable[[int], Tomogram]


class Tomogram:
    """A volume that is read box by box; opening it read no voxel.

    `shape` (z, y, x) and `voxel_size` (Å) are those of the array as `read` returns it; `frame` says
    where it lies in the file. `source` is the address, `dtype` the type of the stored values. A
    tomogram can be pickled: a file travels by its address, an array in memory with its data.
    `read` may be called from several threads.
    """

    def __init__(
        self,
        voxels: Voxels,
        frame: Frame,
        *,
        name: str,
        source: str,
        level: int = 0,
        notes: tuple[str, ...] = (),
        levels: Levels | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.frame = frame
        self.level = level
        self._voxels = voxels
        self._notes = notes
        self._levels = levels

    def __repr__(self) -> str:
        size = f"{self.voxel_size:g}"
        return f"Tomogram({self.name!r}, shape={self.shape}, voxel_size={size}, source={self.source!r})"

    @property
    def shape(self) -> Shape:
        """The shape as read: z, y, x voxels."""
        return self.frame.shape

    @property
    def voxel_size(self) -> float:
        """The voxel size as read, in Å."""
        return self.frame.voxel_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the stored values; `read` returns float32 whatever it is."""
        return self._voxels.dtype

    @property
    def chunks(self) -> Shape:
        """The box (z, y, x voxels) that reads best; a hint."""
        z, y, x = self._voxels.chunks
        return (y, z, x) if self.frame.beam_axis == "y" else (z, y, x)

    @property
    def voxels(self) -> Voxels:
        """The voxels in the axes of the file."""
        return self._voxels

    @property
    def travels(self) -> bool:
        """Whether pickling takes the address along and no voxel, so that any process can read for itself."""
        return self._voxels.travels

    @property
    def traffic(self) -> Traffic | None:
        """What was asked of a remote store by this process and its workers; None for a local source."""
        return self._voxels.traffic

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Plain data that are equal only for the same voxels read in the same way."""
        return {
            "source": self.source,
            "level": self.level,
            "beam_axis": self.frame.beam_axis,
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "voxel_size": self.voxel_size,
            **self._voxels.identity(),
        }

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box as a C-contiguous float32 array of its own.

        Values are what the file holds, NaN and infinity included. `box` is three slices (z, y, x)
        of step one with 0 <= start < stop <= length; a start or stop of None is the face.

        Raises
        ------
        IndexError
            The box leaves the volume or is empty.
        SourceError
            The voxels are not there or cannot be decoded.
        """
        z, y, x = _inside(box, self.shape)
        if self.frame.beam_axis == "z":
            return self._voxels.read((z, y, x))
        # New z is file y; new y counts file z from the far face (frame.turn).
        depth = self._voxels.shape[0]
        found = self._voxels.read((slice(depth - y.stop, depth - y.start), z, x))
        return np.ascontiguousarray(found[::-1].transpose(1, 0, 2))

    def coarsest(self, voxel_size: float) -> Tomogram:
        """Return the coarsest level with voxels of at most `voxel_size` Å; this one if none is coarser."""
        if self._levels is None:
            return self
        sizes = [self.frame.file_voxel_size * factor for factor in self._levels.factors]
        fine = [level for level, size in enumerate(sizes) if size <= voxel_size * (1 + 1e-6)]
        best = max(fine, key=lambda level: sizes[level], default=self.level)
        return self if best == self.level or sizes[best] <= self.voxel_size else self._levels.reopen(best)

    def confirm(self) -> None:
        """Raise a SourceError where the source is not here as it was when it was opened.

        For a process that a tomogram has travelled to: a folder that it does not see looks like one
        whose chunks are all absent.
        """
        self._voxels.confirm()

    def to_dask(self) -> da.Array:
        """Return a float32 dask array whose blocks (`chunks`) are read when they are computed."""
        if isinstance(self._voxels, ArrayVoxels):
            array = self._voxels.to_dask()
            return array[::-1].transpose(1, 0, 2) if self.frame.beam_axis == "y" else array
        import dask.array as da  # noqa: TID251

        blocks: da.Array = da.map_blocks(
            _read_block,
            tomogram=self,
            chunks=da.core.normalize_chunks(self.chunks, self.shape),
            dtype=np.float32,
            meta=np.empty((0, 0, 0), np.float32),
            name=f"tomogram-{uuid4().hex}",  # a name of its own: dask takes equal names for equal voxels
        )
        return blocks

    def describe(self) -> dict[str, Any]:
        """Return the facts of the header and of what was made of them, as plain data."""
        return {
            "name": self.name,
            "source": self.source,
            "shape": list(self.shape),
            "voxel_size": self.voxel_size,
            "dtype": str(self.dtype),
            "level": self.level,
            "beam_axis": self.frame.beam_axis,
            "file_shape": list(self.frame.file_shape),
            "file_voxel_size": self.frame.file_voxel_size,
            "chunks": list(self.chunks),
            **self._voxels.facts(),
        }

    def remarks(self) -> list[str]:
        """Return what a user should know before the tomogram is picked; empty when all is plain."""
        found = [*self._notes, *self._voxels.remarks()]
        z, y, x = self.shape
        if z > min(y, x):
            hint = (
                ', pass beam_axis="y" if the beam runs along y'
                if y <= x and self.frame.beam_axis == "z"
                else ""
            )
            found.append(f"z is not the thinnest axis (z {z}, y {y}, x {x} voxels){hint}")
        return found


def open_tomogram(
    source: object,
    *,
    voxel_size: float | None = None,
    level: int = 0,
    name: str | None = None,
    beam_axis: BeamAxis = "z",
    missing: Missing = "error",
    storage_options: dict[str, Any] | None = None,
) -> Tomogram:
    """Return a lazy tomogram; only the header is read.

    Parameters
    ----------
    source
        Path or address (s3://, gs://, az://, https://, file://) of an MRC file (.mrc, .rec, .map, also
        .gz and .bz2), a zarr array or an OME-Zarr group (format 2 or 3); a numpy, dask or zarr array
        with axes z, y, x; a record of the portal, whose voxel size wins over the header's. Addresses
        are read by obstore, of an MRC file only the bytes that are asked
        for; what else zarr can open (over fsspec, say) is passed as the zarr array. What was fetched is
        kept in a nameless file in the temporary folder (TMPDIR) for as long as the tomogram is there.
    voxel_size
        Å, of the file's level 0; it wins over what the header states, and must be given for arrays.
    level
        Pyramid level of an OME-Zarr group; 0 is the finest.
    name
        What picks call the tomogram; the file's name without its suffixes when None.
    beam_axis
        "y" reads a volume that IMOD has not turned yet as if it had: new z is file y, new y counts
        file z from the far face.
    missing
        "error", or "fill" to read absent zarr chunks as the array's fill value; so are those that a
        store refuses (403), as one does that may not be listed, if it gives the array's metadata.
    storage_options
        For addresses: credentials, `endpoint`, `region`, `skip_signature` (see `remote.connect`), and
        `cache_bytes`, the room on the local disk for what was fetched of a zarr array (16 GiB; 0 for
        none; of an MRC file all that was fetched is kept, at most its length). What they leave open comes
        from the environment; the portal's bucket needs none.

    Raises
    ------
    SourceError
        Nothing is there, or it is no tomogram, or its voxel size is not known.
    """
    if beam_axis not in ("z", "y") or missing not in ("error", "fill"):
        raise SourceError(
            f"beam_axis is {beam_axis!r} and missing is {missing!r}",
            expected='beam_axis "z" or "y", and missing "error" or "fill"',
            remedy="pass one of these",
        )
    record = source if isinstance(source, TomogramRecord) else None
    if record is not None:
        voxel_size, name = voxel_size or record.voxel_spacing, name or record.name
        source = _address_of(record)
    voxels, place, address, default_name = _open(source, level, missing, storage_options)
    if record is not None:
        for note in contradictions(record, place.voxel_sizes, place.file_shape):
            warnings.warn(f"{address}: {note}", UserWarning, stacklevel=2)
    if voxel_size is None:
        size, notes = stated_size(place.voxel_sizes, address)
        for note in notes:
            warnings.warn(f"{address}: {note}", UserWarning, stacklevel=2)
    else:
        size, notes = given_size(voxel_size, place.voxel_sizes, address)
    frame = _frame(voxels.shape, place, size, beam_axis, address)
    reopen = partial(
        _another_level,
        source,
        voxel_size=voxel_size,
        name=name,
        beam_axis=beam_axis,
        missing=missing,
        storage_options=storage_options,
    )
    return Tomogram(
        voxels,
        frame,
        name=name or default_name,
        source=address,
        level=level,
        notes=notes,
        levels=Levels(place.levels, reopen) if len(place.levels) > 1 else None,
    )


def _address_of(record: TomogramRecord) -> str:
    if record.source is None:
        raise SourceError(
            f"the portal has no file of tomogram {record.id} ({record.name})",
            expected="an OME-Zarr or an MRC file",
            remedy="leave it out",
        )
    return record.source


def _another_level(source: object, level: int, **options: Any) -> Tomogram:
    """Return a tomogram at another level; what there was to warn of was said when it was opened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return open_tomogram(source, level=level, **options)


def _open(
    source: object, level: int, missing: Missing, options: Mapping[str, Any] | None
) -> tuple[Voxels, Place, str, str]:
    if isinstance(source, str) and is_remote(source):
        return _open_address(canonical(source), level, missing, options)
    if isinstance(source, str | os.PathLike):
        return _open_path(_local_path(os.fspath(source)), level, missing)
    voxels: Voxels
    if isinstance(source, zarr.Array):
        address = address_of(source)
        voxels = as_voxels(source, missing, address)
    elif isinstance(source, np.ndarray):
        voxels, address = ArrayVoxels(source), ArrayVoxels.kind
    elif _is_dask(source):
        voxels, address = DaskVoxels(source), DaskVoxels.kind
    else:
        raise SourceError(
            f"the source is a {type(source).__name__}",
            expected="a path, or a numpy, zarr or dask array",
            remedy="pass one of these",
        )
    _refuse_level(level, address)
    return voxels, Place(voxels.shape), address, "tomogram"


def _open_path(path: Path, level: int, missing: Missing) -> tuple[Voxels, Place, str, str]:
    address, name = str(path), _name(path)
    if path.is_dir():
        voxels, place = open_zarr(LocalStore(path, read_only=True), "", level, missing, address)
        return voxels, place, address, name
    if not path.exists():
        raise SourceError(
            f"there is no file {address}", expected="a tomogram", remedy="check the path and its spelling"
        )
    _refuse_level(level, address)
    file = MrcFile(LocalFile(path))
    return file, Place(file.shape, file.header.voxel_sizes), address, name


def _open_address(
    address: str, level: int, missing: Missing, options: Mapping[str, Any] | None
) -> tuple[Voxels, Place, str, str]:
    """Open what lies on an object store or a web server; the suffix tells an MRC file from a zarr group."""
    folder, last = parent(address)
    chosen = dict(options or {})
    limit = int(chosen.pop("cache_bytes", LIMIT))
    name = address_name(address)
    if Path(last).suffix.lower() not in MRC_SUFFIXES:
        store = SpooledStore(connect(address, chosen), limit)
        voxels, place = open_zarr(store, "", level, missing, address)
        return voxels, place, address, name
    _refuse_level(level, address)
    file = MrcFile(RemoteFile(connect(folder, chosen), last))
    return file, Place(file.shape, file.header.voxel_sizes), address, name


def _local_path(source: str | bytes) -> Path:
    text = os.fsdecode(source)
    if "://" in text:
        text = url2pathname(urlsplit(text).path)
    return Path(text).expanduser().resolve()


def address_name(address: str) -> str:
    """Return what a tomogram at an address is called when nobody says."""
    return _name(Path(unquote(urlsplit(address).path)))


def _name(path: Path) -> str:
    # An array inside an image is called by its level; the image's name says more.
    while path.name.isdigit() and path.parent.suffix in SUFFIXES:
        path = path.parent
    name = path.name
    while (suffix := Path(name).suffix.lower()) in SUFFIXES and len(name) > len(suffix):
        name = name[: -len(suffix)]
    return name


def _is_dask(source: object) -> bool:
    # A dask array exists only where dask is imported already.
    module = sys.modules.get("dask.array")
    return module is not None and isinstance(source, module.Array)


def _refuse_level(level: int, address: str) -> None:
    if level != 0:
        raise SourceError(
            f"{address} has no level {level}", expected="level 0, the only one", remedy="leave level out"
        )


def _frame(shape: Shape, place: Place, size: float, beam_axis: BeamAxis, address: str) -> Frame:
    if max(place.scale) / min(place.scale) - 1 > ANISOTROPY:
        raise SourceError(
            f"this level of {address} is coarser by {place.scale} along z, y, x",
            expected="one factor along all axes",
            remedy="pass another level",
        )
    scale, shift = place.scale, place.shift
    if beam_axis == "y":
        # y' = n - 1 - z in level 0 and, with its own length, in this level.
        far = place.file_shape[0] - 1 - (shape[0] - 1) * scale[0] - shift[0]
        shape = (shape[1], shape[0], shape[2])
        scale, shift = (scale[1], scale[0], scale[2]), (shift[1], far, shift[2])
    return Frame(
        shape=shape,
        voxel_size=float(f"{size * math.fsum(scale) / 3:.9g}"),
        file_shape=place.file_shape,
        file_voxel_size=size,
        beam_axis=beam_axis,
        level_scale=scale,
        level_shift=shift,
    )


def _inside(box: Sequence[slice], shape: Shape) -> Box:
    """Return a box with plain integers, if it lies inside and is not empty."""
    if len(box) != 3 or not all(isinstance(where, slice) for where in box):
        raise IndexError(f"a box is a tuple of three slices, found {box!r}")
    found = []
    for where, length in zip(box, shape, strict=True):
        start = 0 if where.start is None else operator.index(where.start)
        stop = length if where.stop is None else operator.index(where.stop)
        if where.step not in (None, 1) or not 0 <= start < stop <= length:
            raise IndexError(f"box {box} is empty, has a step or leaves the volume of shape {shape}")
        found.append(slice(start, stop))
    return (found[0], found[1], found[2])


def _read_block(tomogram: Tomogram, block_info: Any = None) -> npt.NDArray[np.float32]:
    """Return the voxels of one block of `Tomogram.to_dask`."""
    tomogram.confirm()  # where the array has travelled to, the source may not be there
    z, y, x = (slice(start, stop) for start, stop in block_info[None]["array-location"])
    return tomogram.read((z, y, x))
