"""Where the truth of a tomogram is known: a mask or a box of it that was annotated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import Frame
from tomocpt_stream.mask import MaskLike, open_mask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tomocpt_stream.blocks import Span
    from tomocpt_stream.frame import Box, Grid, Shape

Spans: TypeAlias = "tuple[Span, Span, Span]"
Annotated: TypeAlias = "MaskLike | tuple[slice, slice, slice]"

_SIDE = r"(\d{0,9}):(\d{0,9})"
_BOX = re.compile(rf"\s*{_SIDE}[\s,;]+{_SIDE}[\s,;]+{_SIDE}\s*")
# What is meant as a box, though it may be none: no file is called so.
_LIKE_A_BOX = re.compile(r"[\s\d,;.+-]*:[\s\d:,;.+-]*")
_AXES = "zyx"


class Region(Protocol):
    """Some of the voxels of a working grid, asked box by box."""

    def inside(self, spans: Spans) -> npt.NDArray[np.bool_]:
        """Return which voxels of a box (z, y, x) of the working grid belong to it."""


@dataclass(frozen=True, eq=False)
class BoxRegion:
    """A box of the working grid; `sides` are marks of the voxels of each axis."""

    sides: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]

    def inside(self, spans: Spans) -> npt.NDArray[np.bool_]:
        """Return which voxels of a box of the working grid lie in this one."""
        z, y, x = (side[start:stop] for side, (start, stop) in zip(self.sides, spans, strict=True))
        marks: npt.NDArray[np.bool_] = z[:, None, None] & y[None, :, None] & x[None, None, :]
        return marks


@dataclass(frozen=True, eq=False)
class PartRegion:
    """A region in voxels of a part of the grid, which begins at `start`."""

    whole: Region
    start: Shape

    def inside(self, spans: Spans) -> npt.NDArray[np.bool_]:
        """Return which voxels of a box of the part belong to the region."""
        z, y, x = ((low + at, high + at) for (low, high), at in zip(spans, self.start, strict=True))
        return self.whole.inside((z, y, x))


def open_region(
    annotated: Annotated, frame: Frame, grid: Grid, storage_options: Mapping[str, Any] | None = None
) -> tuple[Region, Any]:
    """Return the annotated region of a tomogram on its working grid, and what it follows from, as plain data.

    `annotated` is whatever `open_mask` takes (0 is outside), or a box in voxels of the file (level 0, the
    file's axes): three slices, or text "z0:z1,y0:y1,x0:x1", where an end that is left out is the file's. A
    working voxel is inside where the file's voxel nearest to its middle is.

    Raises SourceError where a mask does not fit or a box has no voxel of the file.
    """
    box = _as_box(annotated, frame)
    if box is None:
        mask = open_mask(annotated, frame, grid, storage_options)
        return mask, mask.fingerprint
    sides = []
    # Along which axis of the file each axis of the source runs.
    runs = (1, 0, 2) if frame.beam_axis == "y" else (0, 1, 2)
    z, y, x = (frame.file_shape[across] for across in runs)
    finest = Frame((z, y, x), frame.file_voxel_size, frame.file_shape, frame.file_voxel_size, frame.beam_axis)
    for axis, across in enumerate(runs):
        source = np.zeros((grid.shape[axis], 3))
        source[:, axis] = np.arange(grid.shape[axis])
        source = np.floor(grid.to_source(source) + 0.5).clip(0, np.array(frame.shape) - 1)
        # As a mask of the file's voxels would be read: a voxel of a coarser level may have its middle
        # between two of them, or beyond the last one.
        place = np.floor(finest.to_source(frame.to_file(source)) + 0.5).clip(0, np.array(finest.shape) - 1)
        nearest = finest.to_file(place)[:, across]
        sides.append((nearest >= box[across].start) & (nearest < box[across].stop))
    if not all(side.any() for side in sides):
        raise _no_box(_text(box), frame.file_shape)
    return BoxRegion((sides[0], sides[1], sides[2])), _text(box)


def is_box(text: str) -> bool:
    """Return whether a text means a box rather than where a mask is."""
    return _LIKE_A_BOX.fullmatch(text) is not None


def _as_box(annotated: Annotated, frame: Frame) -> Box | None:
    """Return a box with its ends, None where a mask is meant."""
    pairs: list[tuple[Any, Any]]
    if isinstance(annotated, str) and is_box(annotated):
        found = _BOX.fullmatch(annotated)
        if found is None:
            raise _no_box(annotated[:80], frame.file_shape)
        pairs = [(int(found[k] or 0), int(found[k + 1]) if found[k + 1] else None) for k in (1, 3, 5)]
    elif isinstance(annotated, tuple):
        if len(annotated) != 3 or not all(
            isinstance(side, slice) and side.step in (None, 1) for side in annotated
        ):
            raise _no_box(str(annotated), frame.file_shape)
        pairs = [(0 if side.start is None else side.start, side.stop) for side in annotated]
    else:
        return None
    try:
        sides = [
            (index(start), length if stop is None else index(stop))
            for (start, stop), length in zip(pairs, frame.file_shape, strict=True)
        ]
    except TypeError as error:
        raise _no_box(str(annotated), frame.file_shape) from error
    for (start, stop), length in zip(sides, frame.file_shape, strict=True):
        if not 0 <= start < stop <= length:
            raise _no_box(",".join(f"{a}:{b}" for a, b in sides), frame.file_shape)
    z, y, x = (slice(start, stop) for start, stop in sides)
    return (z, y, x)


def _text(box: Box) -> str:
    return ",".join(f"{side.start}:{side.stop}" for side in box)


def _no_box(found: str, shape: Shape) -> SourceError:
    whole = ", ".join(f"{axis} from 0 to {length}" for axis, length in zip(_AXES, shape, strict=True))
    return SourceError(
        f"the annotated box {found}",
        expected=f"z0:z1,y0:y1,x0:x1 in voxels of the file, {whole}",
        remedy="give where the box begins and, one voxel beyond it, where it ends",
    )
