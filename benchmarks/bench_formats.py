"""Coordinate files: what comes back from each format, how fast, and one picture of all of them.

    python benchmarks/bench_formats.py
    python benchmarks/bench_formats.py --picks 10000 --write

Picks of a simulated tomogram, with scores and orientations, are written in every format that is written and
read, and read back: the page says how far the farthest one has moved. The picture draws each format's picks
on the tomogram as rings of a radius of their own: where the formats agree, the rings are concentric. Then
`--picks` of them are written and read, STAR beside the `starfile` library on the same table.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import starfile
from bench_pipeline import RESULTS, versions
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial.transform import Rotation

from tomocpt_stream.formats import FORMATS, read_picks, write_picks
from tomocpt_stream.phantom import PhantomOptions, simulate_phantom
from tomocpt_stream.picks import Picks
from tomocpt_stream.report import mean_slice

SHAPE = (96, 256, 256)
PIXEL, BINNING = 1.25, 8
VOXEL = PIXEL * BINNING
NAME = "TS_01"

TOMOGRAMS = f"""data_global

loop_
_rlnTomoName #1
_rlnTomoTiltSeriesPixelSize #2
_rlnTomoTomogramBinning #3
_rlnTomoSizeX #4
_rlnTomoSizeY #5
_rlnTomoSizeZ #6
{NAME} {PIXEL} {BINNING} {SHAPE[2] * BINNING} {SHAPE[1] * BINNING} {SHAPE[0] * BINNING}
"""


def both_ways() -> list[str]:
    """Return the formats that are written and read."""
    return [name for name, kind in FORMATS.items() if kind.reads and kind.writes]


def there_and_back(picks: Picks, kind: str, folder: Path) -> tuple[Picks, float, float, int]:
    """Write and read picks; return what came back, both times in s, and the bytes on the disk."""
    folder.mkdir()
    suffix = FORMATS[kind].suffixes[0] if FORMATS[kind].suffixes else ""
    path = folder / f"{NAME}{suffix}"
    sizes = folder.parent / "tomograms.star"
    began = time.perf_counter()
    write_picks(picks, path, format=kind, tomograms=sizes)
    written = time.perf_counter()
    found = read_picks(path, format=kind, voxel_size=VOXEL, shape=SHAPE, tomograms=sizes)
    read = time.perf_counter()
    size = sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())
    (table,) = found.values()
    return table, written - began, read - written, size


def agreement(picks: Picks, found: Picks) -> str:
    """Return a table row's cells: greatest error in voxels, of scores, of rotations in degrees."""
    moved = float(np.abs(found.zyx - picks.zyx).max())
    scores = float(np.abs(found.score - picks.score).max())
    turned = "none kept"
    if found.rotations is not None and picks.rotations is not None:
        between = Rotation.from_matrix(found.rotations) * Rotation.from_matrix(picks.rotations).inv()
        turned = f"{np.degrees(between.magnitude()).max():.1g}"
    return f"{moved:.1g} | {scores:.1g} | {turned}"


def draw(tomogram: Any, tables: dict[str, Picks], path: Path, diameter: float) -> None:
    """Draw the picks of each format as rings on the slice through most of them."""
    truth = next(iter(tables.values()))
    heights, counts = np.unique(np.round(truth.zyx[:, 0]), return_counts=True)
    near = [counts[np.abs(heights - at) < diameter / VOXEL / 4].sum() for at in heights]
    z = int(heights[np.argmax(near)])
    half = max(1, round(diameter / VOXEL / 8))
    image = mean_slice(tomogram, 0, slice(max(0, z - half), min(SHAPE[0], z + half + 1)))
    figure = Figure(figsize=(13, 7.2))
    colours = {name: f"C{i % 10}" for i, name in enumerate(tables)}
    whole, close = figure.subplots(1, 2)
    closest = truth.zyx[np.argsort(np.abs(truth.zyx[:, 0] - z))[:1]][0]
    for axes in (whole, close):
        axes.imshow(image, cmap="gray", vmin=np.percentile(image, 0.5), vmax=np.percentile(image, 99.5))
        for i, (name, table) in enumerate(tables.items()):
            shown = np.abs(table.zyx[:, 0] - z) < diameter / VOXEL / 2
            width = diameter / VOXEL * (0.25 + 0.75 * (i + 1) / len(tables))
            sizes = np.full(int(shown.sum()), width)
            rings = EllipseCollection(
                sizes,
                sizes,
                np.zeros(len(sizes)),
                units="xy",
                offsets=table.zyx[shown][:, [2, 1]],
                offset_transform=axes.transData,
                facecolor="none",
                edgecolor=colours[name],
                linewidth=0.8 if axes is whole else 1.4,
            )
            axes.add_collection(rings)
        axes.set(xlabel="x (voxels)", ylabel="y (voxels)")
    reach = 1.5 * diameter / VOXEL
    close.set(xlim=(closest[2] - reach, closest[2] + reach), ylim=(closest[1] + reach, closest[1] - reach))
    whole.set_title(f"z = {z}: the picks of {len(tables) - 1} formats, each read back, one ring each")
    close.set_title("one particle; inner ring first in the list")
    lines = [Line2D([], [], color=colours[name], label=name) for name in tables]
    close.legend(handles=lines, loc="upper left", fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def many(count: int, rng: np.random.Generator) -> Picks:
    """Return so many picks with scores and orientations."""
    turns = Rotation.random(count, rng=rng).as_matrix()
    zyx = rng.uniform(0, np.array(SHAPE) - 1, (count, 3))
    return Picks(zyx, rng.random(count).astype(np.float32), turns, VOXEL, NAME, SHAPE)


def main() -> None:
    """Print one Markdown page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picks", type=int, default=1_000_000, help="how many are timed")
    parser.add_argument("--write", action="store_true", help="also write page and picture below results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    rng = np.random.default_rng(2026)
    scene = PhantomOptions(shape=SHAPE, voxel_size=VOXEL)
    phantom = simulate_phantom(scene, seed=2026, name=NAME)
    truth = phantom.picks()
    turns = Rotation.random(len(truth), rng=rng).as_matrix()
    scores = rng.random(len(truth)).astype(np.float32)
    truth = Picks(truth.zyx, scores, turns, VOXEL, NAME, SHAPE)
    stem = f"formats_{asked.hardware}_{dt.date.today():%Y%m}"
    rows, tables = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tomograms.star").write_text(TOMOGRAMS)
        large = many(asked.picks, rng)
        for kind in both_ways():
            tables[kind] = there_and_back(truth, kind, folder / f"{kind}-few")[0]
            _, written, read, size = there_and_back(large, kind, folder / f"{kind}-many")
            cells = f"{agreement(truth, tables[kind])} | {written:.1f} | {read:.1f} | {size / 1e6:.0f}"
            rows.append(f"| {kind} | {cells} |")
            print(rows[-1], flush=True)
        began = time.perf_counter()
        frame = starfile.read(folder / "relion31-many" / f"{NAME}.star")
        read = time.perf_counter()
        starfile.write(frame, folder / "peer.star")
        rows.append(
            f"| relion31 by starfile | | | | {time.perf_counter() - read:.1f} | {read - began:.1f} | |"
        )
        picture = RESULTS / f"{stem}.png" if asked.write else Path(f"{stem}.png")
        draw(phantom.tomogram, {"as simulated": truth, **tables}, picture, scene.diameter)
    page = "\n".join(
        [
            "# Coordinate files",
            "",
            *versions("bench_formats.py", "starfile", "imodmodel"),
            "",
            f"{len(truth)} picks of a simulated tomogram of {SHAPE} voxels of {VOXEL:g} Å, written and read "
            f"back (greatest differences); then {asked.picks} of them, timed.",
            "",
            "| format | moved by, voxels | score | rotation, degrees | written in s | read in s | MB |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"![the picks of each format on the tomogram]({picture.name})",
            "",
        ]
    )
    print(page)
    if asked.write:
        (RESULTS / f"{stem}.md").write_text(page)


if __name__ == "__main__":
    main()
