"""Seconds and bytes of the network: scoring a window and a training step, by architecture and type.

Run: `OMP_NUM_THREADS=2 python benchmarks/bench_network.py --paper --write`. Every figure is the least of
several runs after one to warm up; the bytes are the most that torch held at once during an inference.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench_paper import RESULTS, hardware
from bench_pipeline import versions
from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn

from tomocpt_stream.blocks import Window
from tomocpt_stream.loop import answer
from tomocpt_stream.losses import loss_terms
from tomocpt_stream.network import build_network, bytes_per_window, named_architecture, place
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.train_options import Precision, TrainOptions
from tomocpt_stream.whole import write_whole

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


def forward_seconds(network: nn.Module, layout: torch.memory_format, batch: int, repeats: int) -> float:
    """Return seconds of a window in the bare network, its tensors and weights in a layout."""
    placed = network.to(memory_format=layout)  # type: ignore[call-overload]
    voxels = torch.randn(batch, 1, EDGE, EDGE, EDGE).contiguous(memory_format=layout)

    def forward() -> None:
        with torch.inference_mode():
            placed(voxels)

    return least(forward, repeats) / batch


def choices(batch: int, repeats: int) -> list[str]:
    """Return a table of what was chosen for the shipped network, and what else there is."""
    small = named_architecture("small")
    fused = build_network(small)
    for part in fused.modules():
        if isinstance(part, WindowAttention):
            part.use_flash_attention = True  # torch's scaled_dot_product_attention, of inference alone
    last, first = torch.channels_last_3d, torch.contiguous_format
    rows = {
        "as it is: channels last, window 4": (build_network(small), last),
        "channels first": (build_network(small), first),
        "attention by scaled_dot_product_attention": (fused, last),
        "window 7, which pads grids of 32, 16, 8 to 35, 21, 14": (
            build_network(small | {"window": 7}),
            last,
        ),
        "window 8, which pads none": (build_network(small | {"window": 8}), last),
    }
    lines = ["| shipped network, float32 | s/window |", "|---|---:|"]
    for name, (network, layout) in rows.items():
        lines.append(f"| {name} | {forward_seconds(network.eval(), layout, batch, repeats):.3f} |")
        print(lines[-1], flush=True)
    return lines


def shares(batch: int) -> list[str]:
    """Return a table of the operations that an inference of the shipped network spends its time in."""
    network = place(build_network(named_architecture("small")), CPU).eval()
    voxels = torch.randn(batch, 1, EDGE, EDGE, EDGE).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        network(voxels)
        with torch.profiler.profile() as profile:
            network(voxels)
    spent = {one.key: one.self_cpu_time_total for one in profile.key_averages()}
    whole = sum(spent.values())
    most = sorted(spent.items(), key=lambda one: -one[1])[:10]
    return [
        "| operation | share of an inference |",
        "|---|---:|",
        *(f"| `{name}` | {time / whole:.1%} |" for name, time in most),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--paper", action="store_true", help="the paper's network too: minutes on a CPU")
    parser.add_argument("--write", action="store_true", help="also write the page to results/")
    chosen = parser.parse_args()
    page = ["# The network: seconds and bytes", "", *versions("bench_network.py")]
    page += [
        f"- {torch.get_num_threads()} threads, batch {chosen.batch}; the least of {chosen.repeats} runs",
        "",
    ]
    page += ["## Architectures", ""]
    page.append(
        "| feature size | parameters (M) | type | s/window | s/step of 2 crops | MB/window | MB stated |"
    )
    page.append("|---|---:|---|---:|---:|---:|---:|")
    print("\n".join(page))
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
            page.append(f"| {name} | {millions:.1f} | {precision} | {numbers} |")
            print(page[-1], flush=True)
    page += ["", "## Choices", "", *choices(chosen.batch, chosen.repeats)]
    page += ["", "## Where an inference spends its time", "", *shares(chosen.batch)]
    if chosen.write:
        RESULTS.mkdir(exist_ok=True)
        name = f"network_{hardware()}_{date.today():%Y%m}.md"
        write_whole(RESULTS / name, "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
