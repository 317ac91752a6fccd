"""Pictures of a tomogram and its picks: what one looks at before believing a table of coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETLEFT
from matplotlib.patheffects import withStroke

from tomocpt_stream.errors import SourceError
from tomocpt_stream.whole import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from tomocpt_stream.evaluation import Match
    from tomocpt_stream.frame import Box, Points, Shape
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram

Image = npt.NDArray[np.float32]
Centre = tuple[float, float, float]

# Contrast runs between these percentiles of the voxels shown: a few gold beads must not set it.
_CONTRAST = (0.5, 99.5)
# Voxels held at once while a slab is averaged; 32 MB of float32.
_SLAB_VOXELS = 8_000_000
_PICK_COLOUR = "#ffb000"
_CURVE_COLOURS = {"precision": "#0072b2", "recall": "#009e73", "fbeta": "#d55e00"}
_FEW_ROWS = 50  # of a curve whose rows are dots
_LONG_SIDE = 8.0  # inches of the longer side of the three slices together
_SHORT_SIDE = 4.2  # the narrowest picture whose title can be read
_GAP = 0.5  # inches between two slices: room for one line of text
_MARGIN = (0.75, 0.65, 0.25, 0.9)  # inches left, bottom, right and top
_OUTLINE = [withStroke(linewidth=2.5, foreground="black")]
_BAR = [withStroke(linewidth=5, foreground="black")]


@dataclass(frozen=True)
class _Panel:
    """One orthogonal slice: the axis it is cut across, and the axes along its picture's x and y."""

    across: int
    right: int
    up: int


_XY, _XZ, _ZY = _Panel(0, 2, 1), _Panel(1, 2, 0), _Panel(2, 0, 1)
_NAMES = "zyx"


def draw_picks(
    tomogram: Tomogram,
    picks: Picks,
    path: str | Path,
    *,
    diameter: float,
    centre: Centre | None = None,
    dpi: int = 130,
) -> Path:
    """Draw three orthogonal slices of a tomogram with its picks as circles; return the PNG's path.

    The slices go through `centre` (z, y, x in voxels as read), by default where most picks lie, and
    are averages over a quarter of `diameter` (Å). A pick is a sphere of that diameter: its circle
    shrinks with its distance from the slice and vanishes beyond the radius. Axes are those of the
    tomogram as read, in voxels; the scale bar is in Å. Only the slices' voxels are read.
    """
    radius = _radius(tomogram, diameter)
    points = tomogram.frame.to_source(picks.zyx)
    at = centre if centre is not None else busiest(points, tomogram.shape, radius)
    thickness = max(1, round(radius / 2))
    slabs = [_slab(at[panel.across], thickness, tomogram.shape[panel.across]) for panel in (_XY, _XZ, _ZY)]
    images = [
        mean_slice(tomogram, panel.across, slab) for panel, slab in zip((_XY, _XZ, _ZY), slabs, strict=True)
    ]
    figure, axes = _three_axes(tomogram.shape)
    for panel, axis, image, slab in zip((_XY, _XZ, _ZY), axes, images, slabs, strict=True):
        _show(axis, _oriented(image, panel))
        _circles(axis, points, panel, at[panel.across], radius)
        _mark_slabs(axis, panel, at)
        axis.set_title(f"{_NAMES[panel.across]} = {_span(slab)}", fontsize=9, pad=9)
    _scale_bar(axes[0], tomogram)
    count = f"{len(picks)} pick" + ("" if len(picks) == 1 else "s")
    thick = (slabs[0].stop - slabs[0].start) * tomogram.voxel_size
    _title(figure, tomogram.name, f"{count} · circles of {diameter:g} Å · slices {thick:.0f} Å thick")
    return _save(figure, Path(path), dpi)


def draw_size(tomogram: Tomogram, diameter: float, path: str | Path, *, dpi: int = 130) -> Path:
    """Draw the central z slice with a circle of `diameter` Å in its middle; return the PNG's path.

    The slice is the average over a quarter of the diameter; no other voxel is read.
    """
    radius = _radius(tomogram, diameter)
    middle: Centre = tuple((n - 1) / 2 for n in tomogram.shape)  # type: ignore[assignment]
    slab = _slab(middle[0], max(1, round(radius / 2)), tomogram.shape[0])
    image = mean_slice(tomogram, 0, slab)
    figure, axis = _one_axis(tomogram.shape)
    _show(axis, image)
    _circles(axis, np.array([middle]), _XY, middle[0], radius)
    axis.set_title(f"z = {_span(slab)}", fontsize=9, pad=9)
    axis.set_xlabel("x (voxels)")
    axis.set_ylabel("y (voxels)")
    _scale_bar(axis, tomogram)
    size = f"circle of {diameter:g} Å = {2 * radius:.1f} voxels of {tomogram.voxel_size:g} Å"
    _title(figure, tomogram.name, size)
    return _save(figure, Path(path), dpi)


def draw_curve(
    curve: pd.DataFrame,
    path: str | Path,
    *,
    match: Match,
    title: str,
    at: float | None = None,
    beta: float = 1.0,
    dpi: int = 130,
) -> Path:
    """Draw precision over recall, and precision, recall and F over the threshold; return the PNG's path.

    `curve` is a table of `curves.sweep`; `match`, which is marked, is that of the picks above the threshold
    `at`, or of all of them where that is None.
    """
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kept, name = curve[curve["picks"] > 0], f"F{beta:g}"
    marker = "." if len(kept) <= _FEW_ROWS else ""
    left.plot(kept["recall"], kept["precision"], marker=marker, color=_CURVE_COLOURS["precision"])
    left.plot([match.recall], [match.precision], "o", color=_CURVE_COLOURS["fbeta"], markersize=8)
    left.set_xlabel("recall")
    left.set_ylabel("precision")
    left.set_xlim(-0.02, 1.02)
    left.set_title(f"precision {match.precision:.3f}, recall {match.recall:.3f}", fontsize=10)
    for column, colour in _CURVE_COLOURS.items():
        label = name if column == "fbeta" else column
        right.plot(kept["threshold"], kept[column], label=label, marker=marker, color=colour)
    if at is not None:
        right.axvline(at, color="0.4", linewidth=1, linestyle="--")
    right.set_xlabel("threshold of the score")
    where = "all picks" if at is None else f"picks above {at:.3g}"
    right.set_title(f"{name} {match.fbeta(beta):.3f} of {where}", fontsize=10)
    right.legend(fontsize=9)
    for axis in (left, right):
        axis.set_ylim(-0.02, 1.02)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return _save(figure, Path(path), dpi)


def busiest(points: Points, shape: Shape, radius: float) -> Centre:
    """Return the point (zyx voxels) whose three planes cut the most out of spheres of `radius` voxels.

    Each axis is settled by itself, at the position of a pick, by the sum of the circles' areas;
    among equals the one nearest to the middle wins. Without points it is the middle of the volume.
    """
    centre = [(n - 1) / 2 for n in shape]
    for axis in range(3 if len(points) else 0):
        middle = centre[axis]
        places = np.sort(points[:, axis]) - middle
        first = np.searchsorted(places, places - radius, side="left")
        last = np.searchsorted(places, places + radius, side="right")
        sums = np.concatenate([[0.0], np.cumsum(places)])
        squares = np.concatenate([[0.0], np.cumsum(places**2)])
        # the sum of radius² - (p - q)² over the positions p within a radius of q
        area = (last - first) * (radius**2 - places**2) + 2 * places * (sums[last] - sums[first])
        area -= squares[last] - squares[first]
        best = np.lexsort((np.abs(places), -np.round(area, 6)))[0]
        centre[axis] = float(np.clip(places[best] + middle, 0, shape[axis] - 1))
    return (centre[0], centre[1], centre[2])


def mean_slice(tomogram: Tomogram, axis: int, slab: slice) -> Image:
    """Return the mean along `axis` of the tomogram's voxels in `slab`, read a few planes at a time."""
    plane = math.prod(n for k, n in enumerate(tomogram.shape) if k != axis)
    step = max(1, _SLAB_VOXELS // plane)
    total = np.zeros([n for k, n in enumerate(tomogram.shape) if k != axis], dtype=np.float64)
    for start in range(slab.start, slab.stop, step):
        spans = [slice(0, n) for n in tomogram.shape]
        spans[axis] = slice(start, min(start + step, slab.stop))
        box: Box = (spans[0], spans[1], spans[2])
        total += tomogram.read(box).sum(axis=axis, dtype=np.float64)
    mean: Image = (total / (slab.stop - slab.start)).astype(np.float32)
    return mean


def _radius(tomogram: Tomogram, diameter: float) -> float:
    """Return the particle's radius in voxels; refuse a diameter that is no length."""
    if not (math.isfinite(diameter) and diameter > 0):
        raise SourceError(
            f"a particle diameter of {diameter} Å",
            expected="a positive length",
            remedy="give the longest axis of the particle in Å",
        )
    return diameter / 2 / tomogram.voxel_size


def _slab(position: float, thickness: int, length: int) -> slice:
    """Return the planes of a slice of `thickness` around a position, inside the volume."""
    thickness = min(thickness, length)
    start = min(max(0, round(position - (thickness - 1) / 2)), length - thickness)
    return slice(start, start + thickness)


def _span(slab: slice) -> str:
    return str(slab.start) if slab.stop - slab.start == 1 else f"{slab.start} to {slab.stop - 1}"


def _contrast(image: Image) -> tuple[float, float]:
    """Return the values shown black and white; each slice has its own, as the missing wedge asks for."""
    low, high = (float(value) for value in np.percentile(image, _CONTRAST))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _oriented(image: Image, panel: _Panel) -> Image:
    """Return a slice with the panel's upward axis along its rows."""
    rows, columns = (axis for axis in range(3) if axis != panel.across)
    return image if (rows, columns) == (panel.up, panel.right) else image.T


def _three_axes(shape: Shape) -> tuple[Figure, list[Axes]]:
    """Return a figure whose slices share one scale: xy, below it xz, to its right zy."""
    z, y, x = shape
    inch = _LONG_SIDE / max(x + z, y + z)
    left, bottom, right, top = _MARGIN
    wide = max(left + (x + z) * inch + _GAP + right, _SHORT_SIDE)
    high = bottom + (y + z) * inch + _GAP + top
    figure = Figure(figsize=(wide, high))
    places = [
        (left, bottom + z * inch + _GAP, x * inch, y * inch),
        (left, bottom, x * inch, z * inch),
        (left + x * inch + _GAP, bottom + z * inch + _GAP, z * inch, y * inch),
    ]
    axes = [figure.add_axes((u / wide, v / high, w / wide, h / high)) for u, v, w, h in places]
    axes[0].tick_params(labelbottom=False)
    axes[0].set_ylabel("y (voxels)")
    axes[1].set_xlabel("x (voxels)")
    axes[1].set_ylabel("z (voxels)")
    axes[2].tick_params(labelleft=False)
    axes[2].set_xlabel("z (voxels)")
    return figure, axes


def _one_axis(shape: Shape) -> tuple[Figure, Axes]:
    _, y, x = shape
    inch = _LONG_SIDE / max(x, y)
    left, bottom, right, top = _MARGIN
    wide = max(left + x * inch + right, _SHORT_SIDE)
    high = bottom + y * inch + top
    figure = Figure(figsize=(wide, high))
    return figure, figure.add_axes((left / wide, bottom / high, x * inch / wide, y * inch / high))


def _show(axis: Axes, image: Image) -> None:
    low, high = _contrast(image)
    axis.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", aspect="equal", interpolation="auto")
    axis.locator_params(nbins=5, steps=[1, 2, 5, 10], integer=True)
    axis.tick_params(labelsize=8, length=3)


def _circles(axis: Axes, points: Points, panel: _Panel, at: float, radius: float) -> None:
    """Draw where the spheres around the points meet the slice."""
    away = np.abs(points[:, panel.across] - at)
    near = away < radius
    sizes = 2 * np.sqrt(radius**2 - away[near] ** 2)
    axis.add_collection(
        EllipseCollection(
            widths=sizes,
            heights=sizes,
            angles=np.zeros(len(sizes)),
            units="xy",
            offsets=points[near][:, [panel.right, panel.up]],
            offset_transform=axis.transData,
            facecolors="none",
            edgecolors=_PICK_COLOUR,
            linewidths=1.1,
        )
    )


def _mark_slabs(axis: Axes, panel: _Panel, at: Centre) -> None:
    """Mark at the frame of a slice where the other two lie."""
    right, up = axis.get_xaxis_transform(), axis.get_yaxis_transform()
    for x, y, marker, place in ((at[panel.right], 1.0, CARETDOWN, right), (1.0, at[panel.up], CARETLEFT, up)):
        axis.plot(
            [x],
            [y],
            linestyle="none",
            marker=marker,
            markersize=5,
            color=_PICK_COLOUR,
            clip_on=False,
            transform=place,
        )


def _scale_bar(axis: Axes, tomogram: Tomogram) -> None:
    """Draw a bar of a round number of Å, about a fifth of the slice's width."""
    height, width = tomogram.shape[1:]
    wanted = width * tomogram.voxel_size / 5
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step for step in (1, 2, 5, 10) if step * power <= 1.3 * wanted) * power
    left, low = 0.04 * width, 0.04 * height
    right = left + length / tomogram.voxel_size
    axis.plot([left, right], [low, low], color="white", linewidth=3, path_effects=_BAR, solid_capstyle="butt")
    axis.annotate(
        f"{length:g} Å",
        ((left + right) / 2, low),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        color="white",
        fontsize=9,
        path_effects=_OUTLINE,
    )


def _title(figure: Figure, name: str, facts: str) -> None:
    """Write the name and one line of facts above the slices, small enough to fit."""
    wide, high = figure.get_size_inches()
    fits = wide * 72 / 0.52  # points of width over the width of a letter in font sizes
    for text, below, largest in ((name, 0.17, 12.0), (facts, 0.4, 9.0)):
        size = min(largest, fits / max(1, len(text)))
        figure.text(0.5, 1 - below / high, text, ha="center", va="center", fontsize=size, parse_math=False)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    """Write the picture under another name first, so that a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    return path
