"""Which architecture picks best for its time: each learns for the same seconds, on the same tomograms.

    OMP_NUM_THREADS=2 python benchmarks/bench_architectures.py --folder FOLDER --part speeds
    python benchmarks/bench_architectures.py --folder FOLDER --seconds 900 --write

The seconds are those of the training steps, measured before on an idle machine: an architecture whose
step takes twice as long gets half the steps. Tomograms are those of the base picker's recipe, with
--maps and --held-maps that of `curriculum.draw_hard`. F1 is that
of the best threshold over all validation tomograms, pooled. Done parts are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench_network import least
from paper_methods import digest

from tomocpt_stream.blocks import Window
from tomocpt_stream.calibration import calibrate
from tomocpt_stream.curriculum import base_options, prepare
from tomocpt_stream.loop import OnStep, Step, answer, learn
from tomocpt_stream.losses import loss_terms
from tomocpt_stream.memory import freed_memory_kept
from tomocpt_stream.network import build_network, named_architecture, place
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from tomocpt_stream.train_options import TrainOptions

RESULTS = Path(__file__).parent / "results"
_HELD = 1_000_000


def architectures() -> dict[str, dict[str, Any]]:
    """Return what is compared, by name."""
    small = named_architecture("small")
    return {
        "small: feature size 12, window 4": small,
        "12, window 7": small | {"window": 7},
        "12, window 4, without the residual blocks of V2": small | {"use_v2": False},
        "12, window 4, one block a stage": small | {"depths": [1, 1, 1, 1]},
        "24, window 4": small | {"feature_size": 24},
        "paper: 36, window 7": named_architecture("paper"),
    }


def speeds(architecture: dict[str, Any], options: TrainOptions) -> dict[str, float]:
    """Return parameters, seconds to score a window in float32, and seconds of a training step."""
    picker = Picker(build_network(architecture), picker_metadata(architecture, window=Window()))
    batch = np.random.default_rng(0).standard_normal((4, 64, 64, 64), dtype=np.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = place(build_network(architecture), device)
    optimiser = torch.optim.AdamW(network.parameters())
    size = options.batch_size
    voxels, label = torch.randn(size, 64, 64, 64, device=device), torch.rand(size, 64, 64, 64, device=device)

    def step() -> None:
        weighted, gradient = loss_terms(answer(network, voxels, options), label)
        (weighted + options.gradient_weight * gradient).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        float(weighted.detach())  # waits for a GPU

    with freed_memory_kept():
        return {
            "parameters": sum(one.numel() for one in network.parameters()),
            "window": least(lambda: picker.score(batch), 3) / len(batch),
            "step": least(step, 3),
        }


@dataclass(frozen=True)
class Study:
    """What each architecture learns from and for how long, and where the work is kept."""

    folder: Path
    seconds: float
    tomograms: int
    validation: int
    seed: int
    maps: tuple[str, ...]
    held_maps: tuple[str, ...]

    def speed(self, name: str) -> dict[str, float]:
        """Return what `speeds` measured, once."""
        timed = self._place(name) / "speeds.json"
        if not timed.exists():
            write_whole(timed, json.dumps(speeds(architectures()[name], base_options())))
        found: dict[str, float] = json.loads(timed.read_text())
        return found

    def row(self, name: str) -> dict[str, Any]:
        """Return one architecture's figures; what was done before is taken from the folder."""
        speed = self.speed(name)
        steps = max(20, round(self.seconds / speed["step"]))
        asked = f"{self.seconds:g}_{self.tomograms}_{self.validation}_{self.seed}_{self._maps}"
        done = self._place(name) / f"f1_{asked}.json"
        if not done.exists():
            learnt = self._learn(name, steps, self._place(name) / f"run_{asked}")
            write_whole(done, json.dumps(learnt))
        return {"name": name, "steps": steps, **speed, **json.loads(done.read_text())}

    def _learn(self, name: str, steps: int, folder: Path) -> dict[str, float]:
        seeds = range(self.seed, self.seed + self.tomograms)
        held = range(_HELD + self.seed, _HELD + self.seed + self.validation)
        drawn = dict.fromkeys(seeds, self.maps) | dict.fromkeys(held, self.held_maps)
        examples = prepare(self.folder / "tomograms", drawn)
        options = replace(
            base_options(),
            architecture=architectures()[name],
            steps=steps,
            warm_up=min(100, steps // 10),
            checkpoint_every=max(10, steps // 8),
        )

        def tell(step: Step) -> None:
            if step.validation is not None:
                line = f"{name}: step {step.step} of {step.steps}, validation {step.validation:.5f}"
                print(line, flush=True)

        kept_aside = examples[self.tomograms :]
        picker = learn(
            examples[: self.tomograms],
            validation=kept_aside,
            options=options,
            folder=folder,
            listeners=[OnStep(tell)],
        )
        found = calibrate(picker, kept_aside).metadata["provenance"]
        return {"f1": found["calibration"]["f1"], "validation": found["validation_loss"]}

    @property
    def _maps(self) -> str:
        return digest([[Path(one).name for one in some] for some in (self.maps, self.held_maps)])[:6]

    def _place(self, name: str) -> Path:
        place_of = self.folder / name.split(":")[0].replace(" ", "_").replace(",", "")
        place_of.mkdir(parents=True, exist_ok=True)
        return place_of


def page(rows: list[dict[str, Any]], study: Study, only: list[str]) -> str:
    """Return the table."""
    gpu = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    command = (
        f"python benchmarks/{Path(__file__).name} --folder FOLDER --seconds {study.seconds:g} "
        f"--tomograms {study.tomograms} --validation {study.validation} --seed {study.seed}"
        + (" --maps FOLDER --held-maps FOLDER" if study.maps else "")
        + "".join(f' --only "{one}"' for one in only)
    )
    lines = [
        "# Accuracy for time, by architecture",
        "",
        f"- {date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, {hardware}",
        f"- `{command} --write`",
        f"- Each learnt from nothing for {study.seconds:g} s of steps of {base_options().batch_size} crops "
        f"(bfloat16; the seconds of a step are those of the table, measured with nothing beside them), on "
        f"{study.tomograms} tomograms of the base picker's recipe; F1 at the best threshold on "
        f"{study.validation} others" + (" of other proteins." if study.maps else "."),
        "",
        "| architecture | parameters (M) | ms/window, float32 | ms/step | steps | validation loss | F1 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['name']} | {row['parameters'] / 1e6:.1f} | {1e3 * row['window']:.0f} "
        f"| {1e3 * row['step']:.0f} | {row['steps']} | {row['validation']:.4f} | {row['f1']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=("speeds", "learn"), default=["speeds", "learn"])
    parser.add_argument("--seconds", type=float, default=900.0, help="of training, each")
    parser.add_argument("--tomograms", type=int, default=60)
    parser.add_argument("--validation", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the first tomogram")
    parser.add_argument("--maps", type=_maps, default=(), metavar="DIR", help="as for tomocpt-stream train")
    parser.add_argument("--held-maps", type=_maps, default=(), metavar="DIR")
    parser.add_argument("--only", action="append", choices=list(architectures()), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="also write the page to results/")
    asked = parser.parse_args()
    names = asked.only or list(architectures())
    study = Study(
        asked.folder,
        asked.seconds,
        asked.tomograms,
        asked.validation,
        asked.seed,
        asked.maps,
        asked.held_maps,
    )
    if "speeds" in asked.part:
        for name in names:
            print(f"{name}: {study.speed(name)}", flush=True)
    if "learn" in asked.part:
        text = page([study.row(name) for name in names], study, asked.only or [])
        print(text)
        if asked.write:
            kind = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "2cpu"
            name = f"architectures_{kind}-{platform.machine()}_{date.today():%Y%m}.md"
            write_whole(RESULTS / name, text)


def _maps(text: str) -> tuple[str, ...]:
    found = tuple(sorted(map(str, Path(text).glob("*.mrc"))))
    if not found:
        raise argparse.ArgumentTypeError(f"no density map (.mrc) in {text}")
    return found


if __name__ == "__main__":
    main()
