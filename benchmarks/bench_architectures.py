"""Which architecture picks best for its time: each learns for the same seconds, on the same tomograms.

    OMP_NUM_THREADS=2 python benchmarks/bench_architectures.py --folder FOLDER --seconds 900 --write

The seconds are those of the training steps, measured before on an idle machine: an architecture whose
step takes twice as long gets half the steps. Tomograms are those of the base picker's recipe. F1 is that
of the best threshold over all validation tomograms, pooled. Done parts are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tomocpt_stream.blocks import Window
from tomocpt_stream.calibration import calibrate
from tomocpt_stream.curriculum import base_options, prepare
from tomocpt_stream.loop import OnStep, Step, answer, learn
from tomocpt_stream.losses import loss_terms
from tomocpt_stream.memory import freed_memory_kept
from tomocpt_stream.network import build_network, named_architecture, place
from tomocpt_stream.picker import Picker, picker_metadata

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


def least(run: Any, repeats: int = 3) -> float:
    """Return the least seconds of several runs after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


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
            "window": least(lambda: picker.score(batch)) / len(batch),
            "step": least(step),
        }


def study(name: str, folder: Path, seconds: float, tomograms: int, validation: int) -> dict[str, Any]:
    """Return one architecture's figures; what was done before is taken from the folder."""
    architecture = architectures()[name]
    place_of = folder / name.split(":")[0].replace(" ", "_").replace(",", "")
    place_of.mkdir(parents=True, exist_ok=True)
    options = replace(base_options(), architecture=architecture)
    timed = place_of / "speeds.json"
    if not timed.exists():
        timed.write_text(json.dumps(speeds(architecture, options)))
    speed: dict[str, Any] = json.loads(timed.read_text())
    done = place_of / f"f1_{seconds:g}.json"
    steps = max(20, round(seconds / speed["step"]))
    if not done.exists():
        examples = prepare(
            folder / "tomograms",
            dict.fromkeys([*range(tomograms), *range(_HELD, _HELD + validation)], ()),
        )
        options = replace(
            options, steps=steps, warm_up=min(100, steps // 10), checkpoint_every=max(10, steps // 8)
        )

        def tell(step: Step) -> None:
            if step.validation is not None:
                print(
                    f"{name}: step {step.step} of {step.steps}, validation {step.validation:.5f}", flush=True
                )

        picker = learn(
            examples[:tomograms],
            validation=examples[tomograms:],
            options=options,
            folder=place_of / f"run_{seconds:g}",
            listeners=[OnStep(tell)],
        )
        found = calibrate(picker, examples[tomograms:]).metadata["provenance"]
        record = {
            "f1": found["calibration"]["f1"],
            "validation": found["validation_loss"],
        }
        done.write_text(json.dumps(record))
    return {"name": name, "steps": steps, **speed, **json.loads(done.read_text())}


def page(rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    """Return the table."""
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    only = "".join(f' --only "{one}"' for one in asked.only or ())
    lines = [
        "# Accuracy for time, by architecture",
        "",
        f"- {date.today().isoformat()}, torch {torch.__version__}, {platform.machine()}, {hardware}",
        f"- `python benchmarks/{Path(__file__).name} --folder FOLDER --seconds {asked.seconds:g} "
        f"--tomograms {asked.tomograms} --validation {asked.validation}{only} --write`",
        f"- Each learnt from nothing for {asked.seconds:g} s of steps of {base_options().batch_size} crops "
        f"(bfloat16), on {asked.tomograms} tomograms of the base picker's recipe; F1 on "
        f"{asked.validation} others.",
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
    parser.add_argument("--seconds", type=float, default=900.0, help="of training, each")
    parser.add_argument("--tomograms", type=int, default=60)
    parser.add_argument("--validation", type=int, default=6)
    parser.add_argument("--only", action="append", choices=list(architectures()), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="also write the page to results/")
    asked = parser.parse_args()
    names = asked.only or list(architectures())
    rows = [study(name, asked.folder, asked.seconds, asked.tomograms, asked.validation) for name in names]
    text = page(rows, asked)
    print(text)
    if asked.write:
        kind = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "2cpu"
        (RESULTS / f"architectures_{kind}-{platform.machine()}_{date.today():%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
