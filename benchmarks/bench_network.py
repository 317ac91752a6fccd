"""Seconds and bytes of the network: scoring a window and a training step, by architecture and type.

Run: `OMP_NUM_THREADS=2 python benchmarks/bench_network.py`. Every figure is the least of several runs
after one to warm up; the bytes are the most that torch held at once during an inference.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tomocpt_stream.blocks import Window
from tomocpt_stream.loop import answer
from tomocpt_stream.losses import loss_terms
from tomocpt_stream.network import build_network, bytes_per_window, named_architecture, place
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.train_options import Precision, TrainOptions

if TYPE_CHECKING:
    from collections.abc import Callable

EDGE = 64
CPU = torch.device("cpu")


def architectures() -> dict[str, dict[str, Any]]:
    small = named_architecture("small")
    return {
        "small (12, window 4)": small,
        "12, window 7": small | {"window": 7},
        "24, window 4": small | {"feature_size": 24},
        "paper (36, window 7)": named_architecture("paper"),
    }


def least(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def held_bytes(architecture: dict[str, Any]) -> int:
    picker = Picker(build_network(architecture), picker_metadata(architecture, window=Window()))
    batch = np.zeros((1, EDGE, EDGE, EDGE), dtype=np.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        picker.score(batch)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    return int(live.max())


def step_seconds(architecture: dict[str, Any], precision: Precision, repeats: int) -> float:
    options = replace(TrainOptions(), architecture=architecture, precision=precision)
    network = place(build_network(architecture), CPU)
    voxels, label = torch.randn(2, EDGE, EDGE, EDGE), torch.rand(2, EDGE, EDGE, EDGE)

    def step() -> None:
        weighted, gradient = loss_terms(answer(network, voxels, options), label)
        (weighted + 10 * gradient).backward()  # type: ignore[no-untyped-call]
        network.zero_grad()

    return least(step, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--paper", action="store_true", help="the paper's network too: minutes on a CPU")
    chosen = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads for training, batch {chosen.batch}")
    print("| feature size | parameters (M) | type | s/window | s/step of 2 crops | MB/window | MB stated |")
    print("|---|---|---|---|---|---|---|")
    batch = np.random.default_rng(0).standard_normal((chosen.batch, EDGE, EDGE, EDGE), dtype=np.float32)
    types: tuple[Precision, ...] = ("float32", "bfloat16")
    for name, architecture in architectures().items():
        if name.startswith("paper") and not chosen.paper:
            continue
        network = build_network(architecture)
        millions = sum(math.prod(value.shape) for value in network.parameters()) / 1e6
        held, stated = held_bytes(architecture) / 1e6, bytes_per_window(architecture, (EDGE,) * 3) / 1e6
        picker = Picker(network, picker_metadata(architecture, window=Window()))
        for precision in types:
            picker.dtype = precision
            window = least(lambda one=picker: one.score(batch), chosen.repeats) / chosen.batch  # type: ignore[misc]
            step = step_seconds(architecture, precision, chosen.repeats)
            numbers = f"{window:.3f} | {step:.2f} | {held:.0f} | {stated:.0f}"
            print(f"| {name} | {millions:.1f} | {precision} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
