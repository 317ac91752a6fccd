"""The command of the program that goes on from a file of picks, with its numbers filled in."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tomocpt_stream.picks import Picks

_BOX = 64  # pixels a first extraction may have, to be fast
_DIAMETERS = 2.0  # particle diameters in a box


@dataclass(frozen=True)
class _Box:
    """How particles are cut out first: Å of a pixel, pixels, binning, as text; <...> where unknown."""

    angpix: str
    pixels: str
    twice: str
    binning: str


def next_command(
    format: str,  # noqa: A002  (as in write_picks)
    path: str | Path,
    picks: Iterable[Picks],
    *,
    diameter: float | None = None,
    pixel_size: float | None = None,
    tomograms: str | Path | None = None,
    settings: str | Path | None = None,
) -> str:
    """Return the shell commands that take a file of picks on, "" where no program extracts from it.

    `diameter` is the particle's and `pixel_size` the unbinned tilt series', Å; `tomograms` is RELION's
    tomograms.star and `settings` Warp's .settings. The box holds two diameters in about 64 pixels, for
    a first round. What is not known stays in <angle brackets>.
    """
    sizes = {table.voxel_size for table in picks} - {None}
    voxel_size = next(iter(sizes)) if len(sizes) == 1 else None
    star, stem = shlex.quote(str(path)), Path(path).stem
    series = "<tomograms.star>" if tomograms is None else shlex.quote(str(tomograms))
    box = _box(diameter, pixel_size)
    if format == "warp":
        project = "warp_tiltseries.settings" if settings is None else shlex.quote(str(settings))
        return _warp(star, shlex.quote(stem), project, _number(voxel_size, "Å of a voxel"), diameter, box)
    cut = f"--b {box.twice} --crop {box.pixels} --bin {box.binning} --float16 --stack2d --j 8"
    if format == "relion5":
        return f"relion_tomo_subtomo --p {star} --t {series} --o Extract/job001/ --theme classic {cut}"
    if format == "relion4":
        cut = cut.replace(" --stack2d", "")  # RELION 4 makes volumes only
        return (
            f"relion_tomo_import_particles --i {star} --t {series} --o ImportTomo/job001/\n"
            f"relion_tomo_subtomo --i ImportTomo/job001/optimisation_set.star --o PseudoSubtomo/job002/ "
            f"--theme classic {cut}"
        )
    if format in ("relion31", "relion5-picker"):  # what no extraction reads as it is
        return f"tomocpt-stream convert {star} particles.star --to relion5 --tomograms {series}"
    return ""


def _warp(star: str, stem: str, settings: str, voxel_size: str, diameter: float | None, box: _Box) -> str:
    """Return Warp's export of particles, and the species of M after they were refined in RELION."""
    width = _number(diameter, "Å of the particle")
    refined = "relion/Refine3D/job001/run"
    return (
        f"WarpTools ts_export_particles --settings {settings} --input_star {star} "
        f"--coords_angpix {voxel_size} --output_star relion/{stem}.star --output_angpix {box.angpix} "
        f"--box {box.pixels} --diameter {width} --relative_output_paths --2d\n"
        f"# after a refinement in RELION:\n"
        f"MTools create_species --population <m/project.population> --name {stem} --diameter {width} "
        f"--sym C1 --temporal_samples 1 --half1 {refined}_half1_class001_unfil.mrc "
        f"--half2 {refined}_half2_class001_unfil.mrc --mask <mask.mrc> --particles_relion {refined}_data.star"
    )


def _box(diameter: float | None, pixel_size: float | None) -> _Box:
    if diameter is None:
        return _Box("<Å of an output pixel>", "<box in pixels>", "<twice the box>", "<binning>")
    coarse = _DIAMETERS * diameter / _BOX
    binning = None if pixel_size is None else max(1, math.floor(coarse / pixel_size + 1e-6))
    # Without a pixel size Warp is given a round one, and RELION, which bins by whole numbers, none.
    angpix = float(f"{coarse:.2g}") if pixel_size is None or binning is None else pixel_size * binning
    pixels = 2 * math.ceil(_DIAMETERS * diameter / angpix / 2 - 1e-6)
    if binning is None:
        return _Box(f"{angpix:g}", str(pixels), "<twice the box>", "<binning>")
    return _Box(f"{angpix:.6g}", str(pixels), str(2 * pixels), str(binning))


def _number(value: float | None, what: str) -> str:
    return f"<{what}>" if value is None else f"{value:.10g}"
