"""The paper's experiments on simulated tomograms, beside template matching and a difference of Gaussians.

    python benchmarks/bench_paper.py --data FOLDER --small    # three particles, two tomograms; no GPU
    python benchmarks/bench_paper.py --data FOLDER --workers 16 --minutes 25    # everything, in parts

DATA holds density maps (maps_10A, maps_5A) and simulated test tomograms (sim10A). Work is kept in
--folder; the same command goes on where the last one ended. With --minutes it ends by itself, with exit
code 75, when that time is over. Every picker is taken at the threshold that suits it best, with the same
spacing and the same one-to-one rule of half a diameter. Matching knows the true map, defocus and tilts;
the shipped picker knows none of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_pipeline import commit
from paper_experiments import EXPERIMENTS, FULL, SMALL, TINY, Preset, Trial, run_trial, specs_of
from paper_methods import Bench, Network, acquaintance
from paper_page import Pages
from paper_scenes import OTHERS, PARTICLES, open_scene

from tomocpt_stream import load_picker
from tomocpt_stream.memory import freed_memory_kept

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
PART_OVER = 75
"""Exit code where there is more to do: the same command goes on."""


class PartOver(Exception):
    """The time of this part is over."""


def main() -> int:
    """Run what is not done yet, then write the page."""
    parser = _parser()
    asked = parser.parse_args()
    preset = TINY if asked.tiny else SMALL if asked.small else FULL
    preset = replace(preset, angle=asked.angle or preset.angle, binning=asked.binning or preset.binning)
    folder = asked.folder / preset.name
    torch.set_num_threads(asked.threads)
    bench = Bench(asked.data, folder, asked.picker, tick=clock(asked.minutes))
    trials = [
        trial
        for name in asked.only
        for trial in EXPERIMENTS[name](preset)
        if not asked.who or trial.who in asked.who
    ]
    if not trials:
        everybody = {trial.who for make in EXPERIMENTS.values() for trial in make(preset)}
        parser.error(f"no trial of {asked.who}; there are those of {', '.join(sorted(everybody))}")
    if absent := _absent(trials, asked.data):
        parser.error(f"--data {asked.data} lacks {', '.join(absent)}")
    rows: list[dict[str, Any]] = []
    if asked.workers > 1:
        with suppress(PartOver):
            _simulate(trials, bench, asked.workers)
    for number, trial in enumerate(trials, start=1):
        began = time.perf_counter()
        try:
            row = run_trial(trial, bench)
        except PartOver:
            continue  # later trials may have been done before
        rows.append(row)
        print(
            f"{number} of {len(trials)}  {trial.experiment}: {trial.case}, {trial.who}: F1 {row['f1']:.3f}, "
            f"{row['picks']} picks of {row['truth']}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    _write(folder / "rows", rows)
    page = Pages(bench, folder).write(rows, _head(asked, preset, trials))
    print(page.read_text())
    if asked.write:
        name = preset.name if networks(trials) else "matching"
        publish(folder, f"paper_{name}_{hardware()}_{date.today():%Y%m}")
    if len(rows) < len(trials):
        print(f"time is over after {len(rows)} of {len(trials)} trials; the same command goes on")
        return PART_OVER
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of maps_10A, maps_5A and sim10A")
    parser.add_argument("--folder", type=Path, default=Path("scratch/paper"), help="where work is kept")
    parser.add_argument("--small", action="store_true", help="three particles, two tomograms; no GPU")
    parser.add_argument("--tiny", action="store_true", help="next to nothing of each, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--who", nargs="+", help="rows of these alone, such as matching and Gaussians")
    parser.add_argument("--picker", default="base", help="the shipped one, or a file")
    parser.add_argument("--angle", type=_above_zero, help="degrees between two rotations of matching")
    parser.add_argument(
        "--binning", type=int, choices=(1, 2, 3, 4), help="of the volumes that templates are matched with"
    )
    parser.add_argument("--write", action="store_true", help="also write page and pictures to results/")
    parser.add_argument("--minutes", type=float, help="end after so many minutes; run again to go on")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate tomograms at once")
    parser.add_argument("--threads", type=int, default=2, help="of torch, without a GPU")
    return parser


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value <= 180:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 180")
    return value


def _absent(trials: list[Trial], data: Path) -> list[str]:
    """Return the files below the data folder that trials need and do not find."""
    specs = specs_of(trials)
    needed = {f"{PARTICLES[spec.particle].map}.mrc" for spec in specs}
    needed |= {
        f"sim10A/{spec.name}.{end}" for spec in specs if spec.kind == "file" for end in ("mrc", "json")
    }
    if any(spec.kind == "carboxysome" for spec in specs):
        needed |= {f"{name}.mrc" for name in OTHERS}
    return sorted(name for name in needed if not (data / name).is_file())


def _simulate(trials: list[Trial], bench: Bench, workers: int) -> None:
    """Simulate the tomograms that are not there yet, several at once."""
    specs = [spec for spec in specs_of(trials) if spec.kind != "file"]
    folder = bench.folder / "tomograms"
    missing = [spec for spec in specs if not (folder / f"{spec.key}.json").exists()]
    # spawn: a fork would copy torch's threads in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        begun = [pool.submit(open_scene, spec, data=bench.data, folder=folder) for spec in missing]
        try:
            for number, future in enumerate(as_completed(begun), start=1):
                future.result()
                print(f"simulated {number} of {len(missing)} tomograms", flush=True)
                bench.tick()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def clock(minutes: float | None) -> Callable[[], None]:
    """Return what raises PartOver once so many minutes have passed."""
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def tick() -> None:
        if end is not None and time.monotonic() > end:
            raise PartOver

    return tick


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of each experiment, each file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row["experiment"] for row in rows):
        temporary = folder / f".{name}.part"
        temporary.write_text(json.dumps([row for row in rows if row["experiment"] == name], indent=1))
        temporary.replace(folder / f"{name}.json")


def hardware() -> str:
    """Return what the figures were made on, for a file's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"{os.cpu_count()}cpu-{platform.machine()}"


def publish(folder: Path, name: str) -> None:
    """Copy page and pictures to the results, the pictures below the page."""
    RESULTS.mkdir(exist_ok=True)
    text = (folder / "page.md").read_text()
    for picture in sorted(folder.glob("*.png")):
        shutil.copyfile(picture, RESULTS / f"{name}_{picture.name}")
        text += f"\n![{picture.stem}]({name}_{picture.name})\n"
    (RESULTS / f"{name}.md").write_text(text)


def networks(trials: list[Trial]) -> bool:
    """Return whether a network picks in any of the trials."""
    return any(isinstance(method, Network) for trial in trials for method in trial.methods)


def _head(asked: argparse.Namespace, preset: Preset, trials: list[Trial]) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{asked.threads} CPU threads"
    picker, taught = load_picker(asked.picker), networks(trials)
    maps = {name: one.map for name, one in PARTICLES.items()}
    maps |= {f"{one.rpartition('/')[2]} (outside shells)": one for one in OTHERS}
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    matching = f"matching by {preset.angle:g}° on volumes binned {preset.binning} times"
    fields = f"preset {preset.name}: fields {preset.width:g} diameters wide, {preset.tests} test tomograms, "
    return [
        "# The paper's experiments in simulation" + ("" if taught else ": matching and Gaussians alone"),
        "",
        f"- {date.today().isoformat()}, commit {commit()}"
        + (f", picker {picker.fingerprint[:16]}" if taught else "")
        + f", torch {torch.__version__}, {platform.machine()}, {device}",
        f"- `python benchmarks/{Path(__file__).name} {' '.join(words)}`",
        f"- {fields if any(trial.experiment != 'rivals' for trial in trials) else ''}{matching}",
        *([acquaintance(picker, maps)] if taught else []),
        "- each at its best threshold; picks 0.75 diameters apart, matched one to one within half a diameter",
        "- distances in shares of the diameter (their mean is what the paper's equation 13 calls RMSE); CPU "
        "seconds of the last part of a trial, training included",
        "- averages of what was picked (figure 4) take RELION and M, and are not here",
    ]


if __name__ == "__main__":
    with freed_memory_kept():
        sys.exit(main())
