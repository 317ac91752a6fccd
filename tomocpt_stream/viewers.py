"""Files that open a tomogram with its picks in napari, IMOD's 3dmod or ChimeraX.

Each program has a frame of its own: napari shows voxels times a scale, 3dmod the file's own axes with
half a voxel, ChimeraX Å from an origin that a header may have moved and the script puts back. The voxels
are those of the file, at level 0, never turned: picks are in these.
"""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args
from xml.sax.saxutils import quoteattr

import numpy as np
from matplotlib import colormaps

from tomocpt_stream.errors import FormatError, PlanError
from tomocpt_stream.formats import imod, render_picks
from tomocpt_stream.formats.asked import Asked
from tomocpt_stream.report import mean_slice
from tomocpt_stream.tomogram import MRC_SUFFIXES
from tomocpt_stream.whole import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram

Viewer = Literal["napari", "imod", "chimerax"]

VIEWERS: tuple[Viewer, ...] = get_args(Viewer)
_ENDINGS = {
    "napari": ("_picks.csv", "_view.py"),
    "imod": ("_picks.mod",),
    "chimerax": ("_picks.cmm", "_view.cxc"),
}

# Contrast runs between these percentiles of the middle slice: a few gold beads must not set it.
_CONTRAST = (0.5, 99.5)
_COLOURS = "viridis"
# How far the voxel sizes of picks and tomogram may differ before positions are brought over by Å.
_SAME = 1e-3


@dataclass(frozen=True)
class View:
    """The files that were written, and the command that opens them."""

    files: tuple[Path, ...]
    command: str


def picks_of(tables: Mapping[str, Picks], tomogram: Tomogram) -> Picks:
    """Return the picks that a file has of a tomogram, in voxels of the latter's file.

    A file of one table is taken to be about the tomogram, whatever it calls it. Picks that were made in
    voxels of another size are brought over by Å.

    Raises
    ------
    FormatError
        The file has several tables, and none with the tomogram's name.
    """
    if tomogram.name in tables:
        found = tables[tomogram.name]
    elif len(tables) == 1:
        (found,) = tables.values()
    else:
        raise FormatError(
            f"picks of {', '.join(sorted(tables)[:10]) or 'no tomogram'}, and none of {tomogram.name}",
            expected=f"picks of {tomogram.name}, or of one tomogram alone",
            remedy="name the tomogram as the file does, with --name",
        )
    size = tomogram.frame.file_voxel_size
    if found.voxel_size is not None and abs(found.voxel_size / size - 1) > _SAME:
        warnings.warn(
            f"picks in voxels of {found.voxel_size:g} Å are brought over to voxels of {size:g} Å",
            UserWarning,
            stacklevel=2,
        )
        found = replace(found, zyx=found.zyx * (found.voxel_size / size))
    return replace(found, tomogram=tomogram.name, voxel_size=size, shape=tomogram.frame.file_shape)


def view_files(tomogram: Tomogram, folder: str | Path, viewer: Viewer) -> tuple[Path, ...]:
    """Return the files that `write_view` writes: the picks, and the script where there is one."""
    stem = Path(folder) / _plain(tomogram.name)
    return tuple(_beside(stem, ending) for ending in _ENDINGS[viewer])


def write_view(
    tomogram: Tomogram, picks: Picks, folder: str | Path, *, viewer: Viewer, diameter: float
) -> View:
    """Write into `folder` what opens a tomogram with its picks; return the files and the command.

    Picks (in voxels of the tomogram's file) are circles or spheres of `diameter` Å, coloured by score.
    Files are called after the tomogram, and those of an earlier call are replaced; picks that were edited
    there since, or were others, are kept beside with a ~ at the end of their name, as 3dmod keeps them.

    Raises
    ------
    PlanError
        The viewer is not known, the diameter is not positive, the tomogram was opened turned, or lies
        where 3dmod and ChimeraX cannot read it.
    """
    if viewer not in VIEWERS or not (np.isfinite(diameter) and diameter > 0):
        raise PlanError(
            f"viewer {viewer!r} and a diameter of {diameter} Å",
            expected=f"one of {', '.join(VIEWERS)}, and a positive length",
            remedy="pass these",
        )
    if tomogram.frame.beam_axis != "z" or tomogram.level:
        raise PlanError(
            f"{tomogram.name} is read at level {tomogram.level} with beam_axis={tomogram.frame.beam_axis!r}",
            expected="the file as it is: picks are in its voxels",
            remedy="open it without level= and beam_axis=",
        )
    write = {"napari": _napari, "imod": _imod, "chimerax": _chimerax}[viewer]
    Path(folder).mkdir(parents=True, exist_ok=True)
    return write(tomogram, picks, view_files(tomogram, folder, viewer), diameter)


def _napari(tomogram: Tomogram, picks: Picks, files: tuple[Path, ...], diameter: float) -> View:
    """Write a script, and the points as napari itself stores them."""
    points, script = files
    (data,) = render_picks(picks, points, format="napari").values()
    _put(points, data, kept=True)
    middle = tomogram.shape[0] // 2
    low, high = np.percentile(mean_slice(tomogram, 0, slice(middle, middle + 1)), _CONTRAST)
    size = tomogram.voxel_size
    _put(
        script,
        f'''"""Show a tomogram with its picks; edit the points, then save their layer as CSV."""

from pathlib import Path

import napari
from tomocpt_stream import open_tomogram, read_picks

tomogram = open_tomogram({tomogram.source!r}, voxel_size={size!r}, name={tomogram.name!r})
points = Path(__file__).parent / {points.name!r}
tables = read_picks(points, format="napari", voxel_size={size!r})

viewer = napari.Viewer(title={tomogram.name!r})
viewer.add_image(
    tomogram.to_dask(),
    name={tomogram.name!r},
    scale=({size!r},) * 3,
    contrast_limits=({float(low)!r}, {float(high) if high > low else float(low) + 1!r}),
)
shown = dict(name="picks", scale=({size!r},) * 3, size={diameter / size!r}, out_of_slice_display=True)
for picks in tables.values():
    viewer.add_points(
        picks.zyx,
        features={{
            "score": picks.score,
            "tomogram": [picks.tomogram] * len(picks),
            "particle": [picks.particle] * len(picks),
        }},
        face_color="transparent",
        border_color="score",
        border_colormap={_COLOURS!r},
        **shown,
    )
if not tables:  # a layer to put points on
    viewer.add_points(ndim=3, **shown)

if __name__ == "__main__":
    napari.run()
''',
    )
    return View((points, script), shlex.join(["python", str(script)]))


def _imod(tomogram: Tomogram, picks: Picks, files: tuple[Path, ...], diameter: float) -> View:
    """Write a model of scattered points."""
    source = _volume(tomogram, "3dmod")
    (model,) = files
    radius = max(1, round(diameter / 2 / tomogram.voxel_size))
    (data,) = imod.render([picks], "imod", Asked(radius=radius), model.name).values()
    _put(model, data, kept=True)
    return View((model,), shlex.join(["3dmod", str(source), str(model)]))


def _chimerax(tomogram: Tomogram, picks: Picks, files: tuple[Path, ...], diameter: float) -> View:
    """Write markers, and a script that opens the tomogram where they are."""
    source = _volume(tomogram, "ChimeraX")
    markers, script = files
    low, high = (float(picks.score.min()), float(picks.score.max())) if len(picks) else (0.0, 1.0)
    colours = colormaps[_COLOURS]((picks.score - low) / ((high - low) or 1.0))
    rows = [
        f'<marker id="{i}" x="{x:.3f}" y="{y:.3f}" z="{z:.3f}" r="{r:.4f}" g="{g:.4f}" b="{b:.4f}" '
        f'radius="{diameter / 2:g}" note="{score:.6g}"/>'
        for i, ((x, y, z), (r, g, b, _), score) in enumerate(
            zip(picks.angstrom(), colours, picks.score, strict=True), start=1
        )
    ]
    _put(
        markers,
        "\n".join([f"<marker_set name={quoteattr(f'picks of {tomogram.name}')}>", *rows, "</marker_set>\n"]),
        kept=True,
    )
    at = ",".join(str(n // 2) for n in tomogram.shape[::-1])
    size = f"{tomogram.voxel_size:g}"
    _put(
        script,
        "\n".join(
            [
                f"# Markers of {diameter:g} Å, from dark (score {low:.3g}) to bright ({high:.3g})",
                f'open "{source}" format mrc',
                f"volume #1 voxelSize {size} originIndex 0,0,0",
                f"volume #1 orthoplanes xyz positionPlanes {at} style image region all",
                f'open "{markers.absolute()}"',
                "transparency #2 50 target a",
                'mousemode right "move planes"',
                "view\n",
            ]
        ),
    )
    return View((markers, script), shlex.join(["chimerax", str(script)]))


def _volume(tomogram: Tomogram, program: str) -> Path:
    """Return the file of a tomogram that a program can open."""
    path = Path(tomogram.source)
    plain = path.is_file() and path.suffix.lower() in MRC_SUFFIXES and path.suffix not in (".gz", ".bz2")
    if not plain or not str(path).isprintable() or '"' in str(path):
        raise PlanError(
            f"{tomogram.source}, which {program} does not open",
            expected="an MRC file on a disk, without quotes in its name",
            remedy="use --in napari, which reads whatever this package reads, or copy it to an MRC file",
        )
    return path


def _plain(name: str) -> str:
    from tomocpt_stream.pipeline import safe_name

    return safe_name(name)


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _put(path: Path, data: str | bytes, *, kept: bool = False) -> None:
    """Write a file that appears whole; with `kept`, another one of its name stays as NAME~."""
    with whole(path) as partial:
        partial.write_bytes(data if isinstance(data, bytes) else data.encode())
        if kept and path.is_file() and path.read_bytes() != partial.read_bytes():
            path.replace(path.with_name(f"{path.name}~"))
