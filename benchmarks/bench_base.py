"""How well the shipped picker picks, beside a difference of Gaussians given every advantage.

    python benchmarks/bench_base.py                                    # three phantoms of unseen shapes
    python benchmarks/bench_base.py --sim10a FOLDER --real FOLDER      # and the test tomograms there

Phantoms: unseen seeds, four unseen shapes each, 41 tilts over ±60°, projection SNR 0.05, distractors,
gold and a membrane. The picker is taken at threshold 0.3 as it is shipped. The difference of Gaussians
is searched on the same working volume with the same spacing, and its width and threshold are the best
ones for the truth it is scored against. Picks are matched one to one within half a diameter.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from tomocpt_stream import (
    Picker,
    PickOptions,
    Picks,
    Tomogram,
    find_peaks,
    ingest,
    load_picker,
    match,
    open_tomogram,
    pick,
)
from tomocpt_stream.phantom import SHAPES_HELD_OUT, PhantomOptions, simulate_phantom
from tomocpt_stream.pipeline import plan_pick
from tomocpt_stream.report import draw_picks

RESULTS = Path(__file__).parent / "results"
SEEDS = (9001, 9002, 9003)
WIDTHS = (2.5, 3.5, 4.5, 5.5, 6.5)  # working voxels; the particle's radius is 10
DIAMETERS = {"ribosome": 290.0, "thyroglobulin": 250.0}
# Å of the surroundings of a microtubule: its centre line, in nm (z, y, x), from the data's own README.
LINES = {
    "microtubule_13pf": [(18.97, 190.0, 28.99), (18.97, 107.8, 51.48), (18.97, 35.2, 79.90)],
    "microtubule_14pf": [(21.97, 123.1, 32.98), (21.97, 83.3, 40.5), (21.97, 17.6, 64.96)],
}


@dataclass(frozen=True)
class Score:
    """The figures of one picker on one tomogram."""

    who: str
    picks: int
    precision: float
    recall: float
    f1: float
    mean_distance: float
    threshold: str

    def row(self, what: str) -> str:
        """Return a line of the table."""
        cells = [
            what,
            self.who,
            self.threshold,
            str(self.picks),
            *(f"{value:.3f}" for value in (self.precision, self.recall, self.f1)),
            f"{self.mean_distance:.1f}",
        ]
        return f"| {' | '.join(cells)} |"


def scored(who: str, picks: Picks, truth: Picks, tolerance: float, threshold: str) -> Score:
    """Match picks with the truth."""
    found = match(picks, truth, tolerance=tolerance)
    return Score(who, len(picks), found.precision, found.recall, found.f1, found.mean_distance, threshold)


def difference_of_gaussians(tomogram: Tomogram, picker: Picker, diameter: float) -> dict[float, Picks]:
    """Return the candidates of each width, in voxels of the file, spaced as the picker's are."""
    grid, _ = plan_pick(tomogram, picker, PickOptions(diameter, contrast="dark"))
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        volume = ingest(tomogram, Path(folder) / "volume.zarr", voxel_size=grid.voxel_size)
        low, middle, high = volume.percentiles
        voxels = np.clip((np.asarray(volume.array[:]) - middle) / (high - low), -3, 3)
    found = {}
    for width in WIDTHS:
        scores = ndimage.gaussian_filter(voxels, 1.6 * width) - ndimage.gaussian_filter(voxels, width)  # dark
        peaks = find_peaks(scores, threshold=0.0, min_distance=0.75 * diameter / grid.voxel_size)
        zyx = tomogram.frame.to_file(grid.to_source(peaks.zyx))
        picks = Picks(zyx, peaks.score, voxel_size=tomogram.frame.file_voxel_size, tomogram=tomogram.name)
        found[width] = picks
    return found


def best_of_gaussians(found: dict[float, Picks], truth: Picks, diameter: float) -> Score:
    """Return the difference of Gaussians with the width and threshold that suit the truth best."""
    best = None
    for width, picks in found.items():
        for threshold in np.quantile(picks.score, np.linspace(0, 0.999, 200)):
            score = scored(
                "difference of Gaussians",
                picks.above(float(threshold)),
                truth,
                diameter / 2,
                f"best: {threshold:.3f}, width {width:g}",
            )
            best = score if best is None or score.f1 > best.f1 else best
    assert best is not None
    return best


def one_for_all(found: list[dict[float, Picks]], truths: list[Picks], diameter: float) -> str:
    """Return the best mean F1 of one width and one threshold over all tomograms, as a sentence."""
    best = (0.0, 0.0, 0.0)
    for width in WIDTHS:
        scores = np.concatenate([picks[width].score for picks in found])
        for threshold in np.quantile(scores, np.linspace(0, 0.999, 200)):
            f1 = np.mean(
                [
                    match(picks[width].above(float(threshold)), truth, tolerance=diameter / 2).f1
                    for picks, truth in zip(found, truths, strict=True)
                ]
            )
            best = max(best, (float(f1), width, float(threshold)))
    return (
        f"Mean F1 of the difference of Gaussians with one width ({best[1]:g}) and one threshold "
        f"({best[2]:.3f}), the best for all three: {best[0]:.3f}."
    )


def phantoms(picker: Picker, sheets: int, snr: float) -> list[str]:
    """Return the table of the phantoms."""
    lines = [
        f"Membranes: {'a sheet through the field' if sheets else 'a vesicle'}; SNR {snr:g}.",
        "",
        "| tomogram | picker | threshold | picks | precision | recall | F1 | mean distance Å |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    pooled: dict[str, list[float]] = {"base": [], "difference of Gaussians": []}
    found, truths = [], []
    for k, seed in enumerate(SEEDS):
        kinds = tuple(SHAPES_HELD_OUT[(4 * k + i) % len(SHAPES_HELD_OUT)] for i in range(4))
        options = PhantomOptions(particles=kinds, count=64, snr=snr, sheets=sheets, vesicles=1 - sheets)
        phantom = simulate_phantom(options, seed=seed, name=f"phantom {seed}")
        truth = phantom.picks()
        began = time.perf_counter()
        picks = pick(phantom.tomogram, picker, PickOptions(options.diameter, contrast="dark"))
        seconds = time.perf_counter() - began
        what = f"{seed}: {', '.join(kinds)} ({len(truth)}; {seconds:.0f} s)"
        truths.append(truth)
        found.append(difference_of_gaussians(phantom.tomogram, picker, options.diameter))
        for score in (
            scored("base", picks, truth, options.diameter / 2, "0.3"),
            best_of_gaussians(found[-1], truth, options.diameter),
        ):
            lines.append(score.row(what))
            pooled[score.who].append(score.f1)
    lines += ["", *(f"Mean F1 of {who}: {np.mean(values):.3f}." for who, values in pooled.items())]
    lines += [one_for_all(found, truths, PhantomOptions().diameter)]
    return lines


def sim10a(picker: Picker, folder: Path, pictures: Path | None) -> list[str]:
    """Return the table of the simulated test tomogram: each particle's recall, and what is picked else."""
    tomogram = open_tomogram(folder / "sim_val_1.mrc")
    particles: list[dict[str, Any]] = json.loads((folder / "sim_val_1.json").read_text())["particles"]
    anything = _truth(particles, None)
    lines = [
        f"`sim_val_1.mrc`, {len(particles)} particles of all kinds; tolerance half a diameter.",
        "",
        "| diameter Å | particle | picker | threshold | picks | recall | mean distance Å | on any particle |",
        "|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for kind, diameter in DIAMETERS.items():
        truth = _truth(particles, kind)
        picks = pick(tomogram, picker, PickOptions(diameter, contrast="dark"))
        if pictures is not None:
            draw_picks(tomogram, picks, pictures / f"sim_val_1_{kind}.png", diameter=diameter)
        answers = [("base", "0.3", picks), ("base", "0.5", picks.above(0.5))]
        for width, found in difference_of_gaussians(tomogram, picker, diameter).items():
            # As many picks as the shipped picker makes: what a user who knows the number would take.
            keep = found.take(np.arange(min(len(found), len(picks))))
            answers.append((f"difference of Gaussians, width {width:g}", "same number", keep))
        for who, threshold, some in answers:
            one, all_of_them = (match(some, t, tolerance=diameter / 2) for t in (truth, anything))
            lines.append(
                f"| {diameter:g} | {kind} ({len(truth)}) | {who} | {threshold} | {len(some)} "
                f"| {one.recall:.3f} | {one.mean_distance:.1f} | {all_of_them.tp / max(1, len(some)):.3f} |"
            )
    return lines


def microtubules(picker: Picker, folder: Path, pictures: Path | None) -> list[str]:
    """Return how far picks on the two real microtubules lie from their centre lines."""
    lines = [
        "Real crops, protein bright, diameter 250 Å; distance of the picks from the centre line.",
        "",
        "| tomogram | threshold | picks | within 60 Å | median distance Å | largest gap along the line Å |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, line in LINES.items():
        tomogram = open_tomogram(folder / f"{name}.mrc")
        picks = pick(tomogram, picker, PickOptions(250.0, contrast="bright", threshold=0.1))
        for threshold in (0.1, 0.3):
            some = picks.above(threshold)
            if threshold == 0.3 and pictures is not None:
                draw_picks(tomogram, some, pictures / f"{name}.png", diameter=250.0)
            distances, along = _from_line(some.angstrom()[:, ::-1], np.array(line) * 10)
            gaps = (
                np.diff(np.sort(along[distances < 60])) if (distances < 60).sum() > 1 else np.array([np.nan])
            )
            middle = float(np.median(distances)) if len(distances) else float("nan")
            lines.append(
                f"| {name} | {threshold:g} | {len(some)} | {(distances < 60).mean() if len(some) else 0:.2f} "
                f"| {middle:.0f} | {gaps.max():.0f} |"
            )
    return lines


def _truth(particles: list[dict[str, Any]], kind: str | None) -> Picks:
    points = [[p["z"], p["y"], p["x"]] for p in particles if kind in (None, p["object"])]
    return Picks(
        np.array(points, dtype=float), np.ones(len(points), np.float32), voxel_size=10.0, tomogram="sim_val_1"
    )


def _from_line(points: npt.NDArray[np.float64], line: npt.NDArray[np.float64]) -> tuple[Any, Any]:
    """Return the distance of points from a broken line, and where along it they lie, in Å."""
    best = np.full(len(points), np.inf)
    along = np.zeros(len(points))
    begun = 0.0
    for start, stop in pairwise(line):
        way = stop - start
        length = float(np.linalg.norm(way))
        share = np.clip((points - start) @ way / length**2, 0, 1)
        apart = np.linalg.norm(points - (start + share[:, None] * way), axis=1)
        along = np.where(apart < best, begun + share * length, along)
        best = np.minimum(best, apart)
        begun += length
    return best, along


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sim10a", type=Path, metavar="FOLDER", help="folder of sim_val_1.mrc and .json")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="folder of the two microtubule crops")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw picks there")
    parser.add_argument("--picker", default="base", help="the shipped one, or a file")
    parser.add_argument("--skip-phantoms", action="store_true")
    parser.add_argument("--write", action="store_true", help="also write the page to results/")
    asked = parser.parse_args()
    if asked.pictures is not None:
        asked.pictures.mkdir(parents=True, exist_ok=True)
    picker = load_picker(asked.picker)
    page = [
        "# The shipped picker",
        "",
        f"- {date.today().isoformat()}, picker {picker.fingerprint[:16]}, torch {torch.__version__}, "
        f"{platform.machine()}, 2 threads",
        f"- `python benchmarks/{Path(__file__).name} {' '.join(_plain(sys.argv[1:]))}`",
        "",
    ]
    if not asked.skip_phantoms:
        for sheets in (0, 1):
            page += ["## Phantoms of unseen shapes", "", *phantoms(picker, sheets, 0.05), ""]
    if asked.sim10a is not None:
        page += ["## Simulated test tomogram", "", *sim10a(picker, asked.sim10a, asked.pictures), ""]
    if asked.real is not None:
        page += ["## Microtubules", "", *microtubules(picker, asked.real, asked.pictures), ""]
    print("\n".join(page))
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"base_2cpu-{platform.machine()}_{date.today():%Y%m}.md").write_text("\n".join(page))


def _plain(arguments: list[str]) -> list[str]:
    """Return the arguments without folders of this machine."""
    return [Path(a).name if "/" in a else a for a in arguments]


if __name__ == "__main__":
    main()
