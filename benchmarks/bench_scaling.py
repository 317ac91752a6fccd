"""A tomogram that grows with the number of workers: how much of each worker's time the device computes.

    python benchmarks/bench_scaling.py
    python benchmarks/bench_scaling.py --shape 96 512 512 --sleep 0.1 --write

The scorer sleeps as a CPU does while a GPU scores, so that eight workers fit on a machine without any.
`bench_cluster.py scaling` has the same for one tomogram of fixed size, where eight workers have an eighth of
the work each.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import tempfile
from pathlib import Path

from bench_cluster import Sleeper, _noise_volume, _processor_seconds, _timed, _warm, cluster
from bench_pipeline import RESULTS, VOXEL_SIZE, versions

from tomocpt_stream import PickOptions, plan_blocks
from tomocpt_stream.schedule import end

# By the number of workers: how often the tomogram of one worker lies side by side along y and x.
COPIES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}


def rows(shape: tuple[int, int, int], seconds: float) -> list[str]:
    """Predict for every number of workers and return the rows of the table."""
    scorer, found = Sleeper(seconds), []
    alone: dict[str, float] = {}
    for workers, (down, across) in COPIES.items():
        grown = (shape[0], down * shape[1], across * shape[2])
        with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder, cluster(workers) as client:
            volume = _noise_volume(Path(folder), grown)
            _warm(
                client, scorer, PickOptions(2 * scorer.particle_radius * VOXEL_SIZE, contrast="dark"), folder
            )
            for stitch in ("crop", "hann"):
                options = PickOptions(2 * scorer.particle_radius * VOXEL_SIZE, stitch=stitch, contrast="dark")
                plan = plan_blocks(volume.shape, scorer.window, stitch=stitch, workers=workers)
                last = end((task.window_count for task in plan.tasks), workers)
                before = _processor_seconds(client)
                wall, busy = _timed(volume, scorer, plan, Path(folder) / stitch, options, client)
                spent, rate = _processor_seconds(client) - before, plan.windows / wall
                first = alone.setdefault(stitch, rate)
                cells = [stitch, workers, " x ".join(map(str, grown)), len(plan.tasks), plan.windows]
                cells += [f"{wall:.1f}", f"{rate:.1f}", f"{rate / first / workers:.2f}"]
                cells += [f"{plan.windows / workers / last:.2f}", f"{sum(busy) / workers / wall:.0%}"]
                found.append(f"| {' | '.join(map(str, [*cells, f'{spent:.0f}']))} |")
                print(found[-1], flush=True)
    return sorted(found)


def main() -> None:
    """Print one Markdown page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=[192, 768, 768], help="voxels of one worker")
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds a batch of 4 windows")
    parser.add_argument("--write", action="store_true", help="also write the page below benchmarks/results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    z, y, x = asked.shape
    lines = [
        "# A tomogram that grows with the workers",
        "",
        *versions("bench_scaling.py", "dask", "distributed"),
        "",
        f"A scorer that sleeps {asked.sleep:g} s a batch of 4, {z} x {y} x {x} working voxels for each",
        f"worker, on one machine of {os.cpu_count()} cores; each plan cut for its workers. Efficiency:",
        "windows/s over those of one worker times the workers; planned: what is left of it by tasks that",
        "cannot all end together. Start, reading, stitching, storing and the end are in the seconds.",
        "",
        "| stitch | workers | voxels | tasks | windows | s | windows/s | efficiency | planned "
        "| scorers ran | CPU s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *rows((z, y, x), asked.sleep),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"scaling_{asked.hardware}_{dt.datetime.now(tz=dt.UTC):%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
