"""How well particles are found, and told from look-alikes after two tomograms, on simulated tomograms.

    python benchmarks/bench_sim10a.py --data FOLDER                            # all of it, in parts
    python benchmarks/bench_sim10a.py --data FOLDER --part zero                # the shipped picker alone
    python benchmarks/bench_sim10a.py --data FOLDER --only rubisco --others --steps 800 --radius 12

DATA holds density maps (maps_10A, maps_5A) and the simulated tomograms (sim10A). Part "zero" is the recall
of each class in sim_val_1 by the picker as it is, at the threshold where 0.8 of the picks are on any
particle. Part "tuned" is F1 after fine-tuning on sim_train_1, sim_train_2 and --lessons more of the same
make, on sim_val_1 and --tomograms others, which nothing has learnt from. Work is kept in --folder; the
same command goes on where the last one ended, and lessons of other options are added to the same page.
With --minutes it ends by itself after that time, with exit code 75.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench_paper import PART_OVER, PartOver, clock, hardware, publish
from bench_pipeline import commit
from paper_methods import FLOOR, acquaintance, digest
from sim10a_lessons import Lesson, teach, waited
from sim10a_page import write_page
from sim10a_scenes import CLASSES, KINDS, Kind, Scene, more_scene, open_scene
from sim10a_scores import pooled, zero_shot

from tomocpt_stream import Picker, PickOptions, Picks, load_picker, pick
from tomocpt_stream.errors import ActionableError
from tomocpt_stream.memory import freed_memory_kept
from tomocpt_stream.pipeline import plan_pick
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PRECISION = 0.8
"""Share of the picks that are on any particle where the recall is taken."""

_TEST, _LESSONS = "sim_val_1", ("sim_train_1", "sim_train_2")
# Numbers of the tomograms that are made to learn from; those for tests count from 0.
_MORE = 200


@dataclass(frozen=True)
class Bench:
    """Where data and work lie, and when this part is over."""

    data: Path
    folder: Path
    tick: Callable[[], None] = field(default=lambda: None)

    def file(self, name: str) -> Scene:
        """Return one of the simulated files."""
        return open_scene(self.data / "sim10A", name)

    def tests(self, more: int) -> list[Scene]:
        """Return the tomograms that nothing learns from: the file, and so many that are made here."""
        scenes = [self.file(_TEST)]
        for number in range(more):
            self.tick()
            scenes.append(self.made(number))
        return scenes

    def made(self, number: int) -> Scene:
        """Return one of the tomograms that are simulated here."""
        return more_scene(number, data=self.data, folder=self.folder / "tomograms")

    def zero(self, kind: Kind, picker: Picker) -> dict[str, Any]:
        """Return the row of a class by a picker as it is."""
        scene = self.file(_TEST)
        picks, cost = self.candidates(picker, scene, kind)
        row = zero_shot(
            picks, scene.truth[kind.name], scene.all(), diameter=kind.diameter, precision=PRECISION
        )
        asked = {"part": "zero", "kind": kind.name, "picker": picker.fingerprint}
        asked |= {"name": f"as it is ({picker.fingerprint[:6]})"}
        return self._kept(f"zero_{kind.name}_{picker.fingerprint[:12]}", asked | row | cost)

    def tuned(self, lesson: Lesson, tests: Sequence[Scene], parent: Picker) -> dict[str, Any]:
        """Return the row of a lesson: the picker that it gives, on the tomograms that are kept for tests."""
        kind = CLASSES[lesson.kind]
        lessons = [self.file(name) for name in _LESSONS]
        for number in range(_MORE, _MORE + lesson.more):
            self.tick()
            lessons.append(self.made(number))
        picker, account = teach(
            lesson, lessons, kind, parent=parent, folder=self.folder / "lessons", tick=self.tick
        )
        found = [self.candidates(picker, scene, kind) for scene in tests]
        row = _pooled(found, tests, kind)
        learnt = [self.candidates(picker, scene, kind) for scene in lessons[: len(_LESSONS)]]
        row["f1_learnt"] = _pooled(learnt, lessons[: len(_LESSONS)], kind)["f1"]
        cost = {name: sum(one[name] for _, one in found) for name in ("windows", "core_seconds")}
        row["waited"] = waited(self.folder / "lessons" / lesson.key)
        asked = {"part": "tuned", "kind": kind.name, "picker": picker.fingerprint, "name": lesson.name}
        whole = asked | row | cost | {"lesson": asdict(lesson), "account": account}
        return self._kept(f"tuned_{lesson.key}", whole)

    def candidates(self, picker: Picker, scene: Scene, kind: Kind) -> tuple[Picks, dict[str, Any]]:
        """Return all candidates of a tomogram, 0.75 diameters apart, and what they cost; kept in files."""
        tomogram = scene.tomogram
        asked = [picker.fingerprint, tomogram.fingerprint, kind.diameter, FLOOR]
        path = self.folder / "candidates" / f"{kind.name}_{scene.name}_{digest(asked)}.npz"
        if not path.exists():
            self.tick()
            options = PickOptions(kind.diameter, threshold=FLOOR, contrast="dark")
            _, plan = plan_pick(tomogram, picker, options)
            began = time.process_time()
            picks = pick(tomogram, picker, options)
            cost = {"windows": plan.windows, "core_seconds": time.process_time() - began}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part.npz")
            np.savez_compressed(temporary, zyx=picks.zyx, score=picks.score, cost=json.dumps(cost))
            temporary.replace(path)
            print(f"    {kind.name} in {scene.name}: {len(picks)} candidates", flush=True)
        with np.load(path, allow_pickle=False) as file:
            kept: dict[str, Any] = json.loads(str(file["cost"]))
            voxel_size = tomogram.voxel_size
            return Picks(file["zyx"], file["score"], voxel_size=voxel_size, tomogram=scene.name), kept

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows that the folder has, those of earlier runs too."""
        found = [json.loads(path.read_text()) for path in sorted((self.folder / "rows").glob("*.json"))]
        return sorted(found, key=lambda row: (row["part"], list(CLASSES).index(row["kind"]), row["name"]))

    def _kept(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "rows" / f"{name}.json", json.dumps(row, indent=1))
        return row


def _pooled(found: Sequence[tuple[Picks, Any]], scenes: Sequence[Scene], kind: Kind) -> dict[str, Any]:
    return pooled(
        {picks.tomogram: picks for picks, _ in found},
        {scene.name: scene.truth[kind.name] for scene in scenes},
        diameter=kind.diameter,
    )


def main() -> int:
    """Run what is not done yet, then write the page."""
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    bench = Bench(asked.data, asked.folder, clock(asked.minutes))
    picker = load_picker(asked.picker)
    kinds = [CLASSES[name] for name in asked.only]
    over = False
    try:
        if "zero" in asked.part:
            for kind in kinds:
                row = bench.zero(kind, picker)
                reached = "never" if row["threshold"] is None else f"recall {row['recall']:.2f}"
                print(f"{kind.name}, as it is: {reached} at {PRECISION:g} precision", flush=True)
        if "tuned" in asked.part:
            tests = bench.tests(asked.tomograms)
            for kind in kinds:
                row = bench.tuned(_lesson(asked, kind, picker), tests, picker)
                print(f"{kind.name}, {row['name']}: F1 {row['f1']:.3f} of {row['truth']}", flush=True)
    except PartOver:
        over = True
        print("time is over; the same command goes on")
    rows = bench.rows()
    if rows:
        page = write_page(rows, _head(asked, picker), bench.folder)
        print(page.read_text())
        if asked.write:
            publish(bench.folder, f"sim10a_{hardware()}_{date.today():%Y%m}")
    return PART_OVER if over else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of maps_10A, maps_5A and sim10A")
    parser.add_argument("--folder", type=Path, default=Path("scratch/sim10a"), help="where work is kept")
    parser.add_argument("--part", nargs="+", choices=("zero", "tuned"), default=["zero", "tuned"])
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="CLASS")
    parser.add_argument("--tomograms", type=_up_to(_MORE), default=9, help="made here, beside sim_val_1")
    parser.add_argument("--lessons", type=_count, default=0, help="made here, beside the two learnt from")
    parser.add_argument("--picker", default="base", help="the shipped one, or a file")
    parser.add_argument("--epochs", type=_some, default=Lesson.epochs)
    parser.add_argument("--steps", type=_count, default=0, help="instead, rounded up to whole epochs")
    parser.add_argument("--batch", type=_some, default=Lesson.batch, help="crops a step")
    parser.add_argument("--rate", type=float, default=Lesson.rate, help="learning rate")
    parser.add_argument("--radius", type=float, help="of the particle when learning, working voxels")
    parser.add_argument("--others", action="store_true", help="the other classes as hard negatives")
    parser.add_argument("--validate", action="store_true", help="keep a slab of each to choose the epoch by")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=Lesson.precision)
    parser.add_argument("--average", type=float, default=0.0, help="decay of the weights' running average")
    parser.add_argument(
        "--augment", nargs="+", type=_change, default=[], metavar="FIELD=NUMBER", help="of Augmentation"
    )
    parser.add_argument("--seed", type=_count, default=0)
    parser.add_argument("--write", action="store_true", help="also write page and pictures to results/")
    parser.add_argument("--minutes", type=float, help="end after so many minutes; run again to go on")
    parser.add_argument("--threads", type=int, default=2, help="of torch, without a GPU")
    asked = parser.parse_args()
    if not (asked.data / "sim10A" / f"{_TEST}.json").exists():
        parser.error(f"no sim10A/{_TEST}.json in {asked.data}")
    return asked


def _count(text: str, *, least: int = 0) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)


def _up_to(most: int) -> Callable[[str], int]:
    def checked(text: str) -> int:
        if _count(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return int(text)

    return checked


def _some(text: str) -> int:
    return _count(text, least=1)


def _change(text: str) -> tuple[str, float]:
    """Return a field of `Augmentation` and its number, both checked before anything is done."""
    name, _, value = text.partition("=")
    try:
        change = (name, float(value))
        Lesson("", "", augment=(change,)).augmentation()
    except (TypeError, ValueError, ActionableError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return change


def _lesson(asked: argparse.Namespace, kind: Kind, picker: Picker) -> Lesson:
    return Lesson(
        kind.name,
        picker.fingerprint,
        epochs=asked.epochs,
        steps=asked.steps,
        batch=asked.batch,
        rate=asked.rate,
        radius=asked.radius,
        others=asked.others,
        validate=asked.validate,
        precision=asked.precision,
        average=asked.average,
        seed=asked.seed,
        augment=tuple(sorted(dict(asked.augment).items())),
        more=asked.lessons,
    )


def _head(asked: argparse.Namespace, picker: Picker) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{asked.threads} CPU threads"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return [
        f"- {date.today().isoformat()}, commit {commit()}, picker {picker.fingerprint[:16]}, "
        f"torch {torch.__version__}, {platform.machine()}, {device}",
        f"- `python benchmarks/{Path(__file__).name} {' '.join(words)}`",
        acquaintance(picker, {kind.name: kind.map for kind in KINDS}),
        "- picks 0.75 diameters apart; pairs one to one, within half a diameter",
    ]


if __name__ == "__main__":
    with freed_memory_kept():
        sys.exit(main())
