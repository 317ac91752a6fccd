"""Whether `contrast="auto"` finds how protein looks: phantoms, simulated and real tomograms.

    python benchmarks/bench_contrast.py                                # 40 phantoms, half of them inverted
    python benchmarks/bench_contrast.py --sim10a FOLDER --real FOLDER      # and the test tomograms there
    python benchmarks/bench_contrast.py --picker FILE                      # of another picker

Phantoms are drawn as those of the shipped picker's training are, at seeds and of shapes that it never
saw, in fields of at most 64 x 128 x 128 working voxels. Half of them have gold at least, half a membrane
at least, and half are bright. Beside what the picker finds stands what the skewness of the grey values
says: protein is dark where the left tail is the longer one.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from tomocpt_stream import Picker, PickOptions, Tomogram, Volume, ingest, load_picker, open_tomogram
from tomocpt_stream.contrast import LITTLE, Finding, find_contrast
from tomocpt_stream.curriculum import draw_phantom
from tomocpt_stream.errors import SourceError
from tomocpt_stream.phantom import SHAPES_HELD_OUT, Phantom, PhantomOptions, simulate_phantom
from tomocpt_stream.pipeline import plan_pick

RESULTS = Path(__file__).parent / "results"
FIRST_SEED = 2_000_000
FIELD = (64, 128, 128)  # working voxels at most
SIM10A = {"sim_val_1": (290.0, 250.0, 180.0), "sim_train_1": (250.0,), "sim_train_2": (250.0,)}
MICROTUBULES = {"microtubule_13pf": (250.0, 200.0, 300.0), "microtubule_14pf": (250.0, 200.0, 300.0)}
HEAD = [
    "| tomogram | protein | found | total score dark, bright | picks dark, bright | windows | s | skewness |",
    "|---|---|---|---:|---:|---:|---:|---|",
]


@dataclass(frozen=True)
class Answer:
    """What was found of one tomogram, and what is true."""

    what: str
    truth: str
    finding: Finding
    seconds: float
    skewness: float

    @property
    def is_right(self) -> bool:
        """Whether the picker found the truth."""
        return self.finding.contrast == self.truth

    @property
    def skewness_is_right(self) -> bool:
        """Whether the skewness of the grey values would have told it."""
        return ("dark" if self.skewness < 0 else "bright") == self.truth

    def row(self) -> str:
        """Return a line of the table."""
        found = self.finding
        said = found.contrast if self.is_right else f"**{found.contrast}**"
        little = 0 < max(found.scores.values()) < LITTLE and found.skewness
        said += " (doubtful, by the grey values)" if little else " (doubtful)" if found.is_doubtful else ""
        scores, picks = ((each["dark"], each["bright"]) for each in (found.scores, found.picks))
        other = f"{self.skewness:+.2f}{'' if self.skewness_is_right else ', wrong'}"
        return (
            f"| {self.what} | {self.truth} | {said} | {scores[0]:.2f}, {scores[1]:.2f} "
            f"| {picks[0]}, {picks[1]} | {found.windows} | {self.seconds:.0f} | {other} |"
        )


def answer(what: str, truth: str, tomogram: Tomogram, picker: Picker, diameter: float) -> Answer:
    """Find the contrast of a tomogram for a particle of `diameter` Å, as `pick` does."""
    grid, plan = plan_pick(tomogram, picker, PickOptions(diameter))
    with tempfile.TemporaryDirectory(prefix="bench-contrast-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubt, which the table has
        volume = ingest(tomogram, Path(folder) / "volume.zarr", voxel_size=grid.voxel_size)
        began = time.perf_counter()
        finding = find_contrast(volume, picker, plan)
        return Answer(what, truth, finding, time.perf_counter() - began, skewness(volume))


def skewness(volume: Volume) -> float:
    """Return the skewness of the grey values as the network sees them."""
    low, middle, high = volume.percentiles
    voxels = np.clip((np.asarray(volume.array[:]) - middle) / (high - low), -3, 3)
    return float(stats.skew(voxels, axis=None))


def drawn(number: int) -> PhantomOptions:
    """Return the options of one phantom; odd ones are bright."""
    seed = FIRST_SEED + number
    options, target = draw_phantom(seed)
    rng = np.random.default_rng([seed, 40])
    kinds = [str(kind) for kind in rng.permutation(SHAPES_HELD_OUT)[: int(rng.integers(1, 4))]]
    most = [round(n * target / options.voxel_size) for n in FIELD]
    z, y, x = (min(n, limit) for n, limit in zip(options.shape, most, strict=True))
    share = z * y * x / math.prod(options.shape)
    return replace(
        options,
        shape=(z, y, x),
        particles=tuple(kinds),
        count=max(3, round(options.count * share)),
        distractors=round(options.distractors * share),
        gold=max(options.gold, 3) if number % 4 < 2 else options.gold,
        vesicles=max(options.vesicles, 1) if number % 8 < 4 else options.vesicles,
        contrast="bright" if number % 2 else "dark",
    )


def simulated(options: PhantomOptions, seed: int) -> Phantom:
    """Return the phantom, with fewer of everything where random packing finds no room."""
    while True:
        try:
            return simulate_phantom(options, seed=seed, name=str(seed))
        except SourceError:
            if options.count == 0:
                raise
            names = ("count", "distractors", "filaments", "gold", "vesicles", "ice")
            options = replace(options, **{name: getattr(options, name) * 3 // 4 for name in names})


def phantom(task: Task) -> Answer:
    """Return the answer for a phantom."""
    made = simulated(drawn(task.number), FIRST_SEED + task.number)
    options = made.options
    what = (
        f"{made.name}: {len(made.picks())} {', '.join(options.particles)}; gold {options.gold}, "
        f"membranes {options.vesicles + options.sheets}, SNR {options.snr:.3f}"
    )
    return answer(what, options.contrast, made.tomogram, task.load(), options.diameter)


def file(task: Task) -> Answer:
    """Return the answer for a tomogram in a file."""
    tomogram = open_tomogram(task.path)
    what = f"{task.path.stem}, {task.diameter:g} Å"
    return answer(what, task.truth, tomogram, task.load(), task.diameter)


@dataclass(frozen=True)
class Task:
    """One tomogram of a section: a phantom by its number, or a file."""

    section: str
    picker: str
    threads: int | None
    number: int = 0
    path: Path = Path()
    diameter: float = 0.0
    truth: str = ""

    def load(self) -> Picker:
        """Return the picker."""
        picker = load_picker(self.picker)
        picker.threads = self.threads or picker.threads
        return picker


def carry_out(task: Task) -> Answer:
    """Do one task; show the line of the table at once."""
    found = file(task) if task.truth else phantom(task)
    print(found.row(), file=sys.stderr, flush=True)
    return found


def tasks(asked: argparse.Namespace) -> list[Task]:
    """Return what was asked for, in the order of the page."""
    how = {"picker": asked.picker, "threads": asked.threads}
    found = [Task("Phantoms of unseen shapes", **how, number=number) for number in range(asked.phantoms)]
    for title, folder, names, truth in (
        ("Simulated test tomograms", asked.sim10a, SIM10A, "dark"),
        ("Real crops with a microtubule", asked.real, MICROTUBULES, "bright"),
    ):
        for name, diameters in names.items() if folder else ():
            path = folder / f"{name}.mrc"
            found += [Task(title, **how, path=path, diameter=each, truth=truth) for each in diameters]
    return found


def section(title: str, answers: list[Answer]) -> list[str]:
    """Return a section of the page: the table and its sums."""
    right, skewed = (
        sum(flags) for flags in zip(*((a.is_right, a.skewness_is_right) for a in answers), strict=True)
    )
    doubtful = sum(a.finding.is_doubtful for a in answers)
    counted = sum(
        a.finding.picks[a.truth] > a.finding.picks["bright" if a.truth == "dark" else "dark"] for a in answers
    )
    sums = (
        f"Right: {right} of {len(answers)}, {doubtful} of them called doubtful. Picks above 0.3 "
        f"alone: {counted}. The skewness of the grey values: {skewed}."
    )
    missed = [a.what for a in answers if not a.is_right]
    return [
        f"## {title}",
        "",
        sums,
        *([f"Missed: {'; '.join(missed)}."] if missed else []),
        "",
        *HEAD,
        *(a.row() for a in answers),
        "",
    ]


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phantoms", type=int, default=40, metavar="N", help="how many of them")
    parser.add_argument("--sim10a", type=Path, metavar="FOLDER", help="folder of the simulated tomograms")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="folder of the two microtubule crops")
    parser.add_argument("--picker", default="base", help="the shipped one, or a file")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the network, instead of the picker's own"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="tomograms at once")
    parser.add_argument("--write", action="store_true", help="also write the page to results/")
    asked = parser.parse_args()
    picker = load_picker(asked.picker)
    picker.threads = asked.threads or picker.threads
    page = [
        "# How protein looks, found by the picker",
        "",
        f"- {date.today().isoformat()}, picker {picker.fingerprint[:16]}, torch {torch.__version__}, "
        f"{platform.machine()}, {picker.threads} threads",
        f"- `python benchmarks/{Path(__file__).name} "
        f"{' '.join(Path(a).name if '/' in a else a for a in sys.argv[1:])}`",
        "- Total score: the sum of the squared scores above 0.05 of what spacing leaves; the larger wins. "
        f"Where both are below {LITTLE:g}, there is too little to tell by, and the longer tail of the grey "
        "values decides (skewness above 0: bright).",
        "- Seconds were taken beside other work.",
        "",
    ]
    wanted = tasks(asked)
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        answers = list(pool.map(carry_out, wanted))
    for title in dict.fromkeys(task.section for task in wanted):
        page += section(title, [a for task, a in zip(wanted, answers, strict=True) if task.section == title])
    print("\n".join(page))
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"contrast_2cpu-{platform.machine()}_{date.today():%Y%m}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
