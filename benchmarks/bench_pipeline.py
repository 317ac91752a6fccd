"""`pick` as a whole: memory against its projection, time by stage, and what the network leaves idle.

    python benchmarks/bench_pipeline.py                     # both parts, full size
    python benchmarks/bench_pipeline.py memory --shape 64 128 128
    python benchmarks/bench_pipeline.py network --repeats 1 --write

"memory" picks an int8 MRC file with an analytic scorer, at the source's voxel size and at twice that,
each in a fresh process; beside it, unless --no-peer, the same scorer on the whole volume in memory
(mrcfile, scipy, scikit-image). "network" picks a smaller volume with the shipped picker.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream import PickOptions, Window, load_picker, open_tomogram, pick
from tomocpt_stream.pipeline import plan_pick

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
VOXEL_SIZE = 10.0
RADIUS = 10.0
LIMIT = 1e9
LAST = "peaks and the rest"
Floats = npt.NDArray[np.float32]


class BoxMean:
    """Scores how dark the mean over a box is: 0 at the median and above it, 1 at no end."""

    window = Window((64, 64, 64), (8, 8, 8))
    particle_radius = RADIUS
    # what `score` allocates for a window: the filtered copy, the divisor and the answer
    bytes_per_window = 3 * 4 * 64**3

    def score(self, batch: Floats) -> Floats:
        """Return the scores of a batch (n, z, y, x)."""
        found = np.empty_like(batch)
        for window, scores in zip(batch, found, strict=True):
            scores[...] = score_volume(window)
        return found


class Timed:
    """A picker whose time inside `score` is taken."""

    def __init__(self, picker: Any) -> None:
        self._picker = picker
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        if name == "score_device":  # every forward pass goes through `score`
            raise AttributeError(name)
        return getattr(self._picker, name)

    def score(self, batch: Floats) -> Floats:
        """Return the picker's scores."""
        began = time.perf_counter()
        scores: Floats = self._picker.score(batch)
        self.seconds += time.perf_counter() - began
        return scores


@dataclass
class Run:
    """One measurement of `memory`: bytes above the process before the call, seconds by stage."""

    name: str
    picks: int
    seconds: float
    voxels: int
    stages: dict[str, float]
    stage_peaks: dict[str, int]
    peak: int
    anonymous: int
    projected: int
    passes: float


class Stages:
    """Seconds between two reports, charged to the stage of the later one."""

    def __init__(self) -> None:
        self.current = "start"
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Charge the time since the last report to this stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        # what comes after the last report of the last stage has no name of its own
        self.current = stage if done < total or stage != "predict" else LAST


class Peak:
    """The highest resident bytes while the block runs, above those at its start."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def __enter__(self) -> Peak:
        self._before = _status("VmRSS"), _status("RssAnon")
        self._exact = _reset_high_water()
        self._highest: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        resident, anonymous = (max(pair) for pair in zip(self._before, *self._highest.values(), strict=True))
        if self._exact:  # the kernel's own mark misses nothing between two samples
            resident = max(resident, _status("VmHWM"))
        self.resident, self.anonymous = resident - self._before[0], anonymous - self._before[1]
        self.stages = {name: found[0] - self._before[0] for name, found in self._highest.items()}

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            stage, now = self._stages.current, (_status("VmRSS"), _status("RssAnon"))
            old = self._highest.get(stage, (0, 0))
            self._highest[stage] = (max(old[0], now[0]), max(old[1], now[1]))


def score_volume(volume: Floats) -> Floats:
    """Return the box means of normalised voxels as scores; they saturate without a plateau."""
    scores: Floats = ndimage.uniform_filter(volume, 9, mode="nearest")
    np.negative(scores, out=scores)
    np.maximum(scores, 0, out=scores)
    scores /= scores + np.float32(0.4)
    return scores


def write_tomogram(path: Path, shape: tuple[int, int, int], dtype: type[np.generic] = np.int8) -> None:
    """Write noise with dark balls on a lattice, a few planes at a time."""
    rng = np.random.default_rng(7)
    mode = {np.int8: 0, np.float32: 2}[dtype]  # type: ignore[index]
    y, x = np.ogrid[: shape[1], : shape[2]]
    pitch = 48
    across = ((y % pitch) - pitch / 2) ** 2 + ((x % pitch) - pitch / 2) ** 2
    with mrcfile.new_mmap(path, shape=shape, mrc_mode=mode, overwrite=True) as file:
        file.voxel_size = VOXEL_SIZE
        for z in range(shape[0]):
            plane = rng.standard_normal(shape[1:], dtype=np.float32) * 20
            plane -= 25 * (across + ((z % pitch) - pitch / 2) ** 2 < RADIUS**2)
            file.data[z] = np.clip(plane, -127, 127).astype(dtype)
            if z % 32 == 31:
                file.flush()


def measure(path: Path, *, ratio: float, memory: str | None) -> Run:
    """Pick the file at a working voxel size of `ratio` times its own; for a process of its own."""
    tomogram, picker = open_tomogram(path), BoxMean()
    options = PickOptions(diameter=2 * RADIUS * VOXEL_SIZE * ratio, stitch="hann", contrast="dark")
    warm = open_tomogram(
        np.random.default_rng(0).normal(size=(70, 70, 70)).astype(np.float32), voxel_size=VOXEL_SIZE
    )
    pick(
        warm, picker, PickOptions(diameter=2 * RADIUS * VOXEL_SIZE * ratio, contrast="dark")
    )  # imports, pools, caches of code
    _, plan = plan_pick(tomogram, picker, options, memory=memory)
    stages = Stages()
    began = time.perf_counter()
    with Peak(stages) as peak:
        found = pick(tomogram, picker, options, memory=memory, progress=stages)
    seconds = time.perf_counter() - began
    stages(LAST, 1, 1)
    return Run(
        name=f"pick, working voxels {ratio:g} of the source's",
        picks=len(found),
        seconds=seconds,
        voxels=int(np.prod(tomogram.shape)),
        stages=stages.seconds,
        stage_peaks=peak.stages,
        peak=peak.resident,
        anonymous=peak.anonymous,
        projected=plan.projected_bytes,
        passes=plan.passes_per_voxel,
    )


def measure_peer(path: Path) -> Run:
    """Find the same balls with the whole volume in memory; for a process of its own."""
    from skimage.feature import peak_local_max

    began = time.perf_counter()
    with Peak(Stages()) as peak:
        volume = mrcfile.read(path).astype(np.float32)
        low, middle, high = np.percentile(volume, (5, 50, 95))
        volume -= np.float32(middle)
        volume /= np.float32(high - low)
        np.clip(volume, -3, 3, out=volume)
        scores = score_volume(volume)
        found = peak_local_max(  # type: ignore[no-untyped-call]
            scores, min_distance=15, threshold_abs=0.3, exclude_border=False
        )
    seconds = time.perf_counter() - began
    return Run(
        name="whole volume in memory (mrcfile, scipy, scikit-image)",
        picks=len(found),
        seconds=seconds,
        voxels=volume.size,
        stages={},
        stage_peaks={},
        peak=peak.resident,
        anonymous=peak.anonymous,
        projected=0,
        passes=1.0,
    )


def in_fresh_process(call: str, **arguments: Any) -> Run:
    """Run `measure` or `measure_peer` in a process of its own."""
    code = [sys.executable, __file__, "child", json.dumps({"call": call, **arguments})]
    done = subprocess.run(code, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def memory_table(shape: tuple[int, int, int], memory: str | None, *, peer: bool) -> list[str]:
    """Return the table of the first part."""
    with tempfile.TemporaryDirectory(prefix="bench-pipeline-") as folder:
        path = Path(folder) / "tomogram.mrc"
        write_tomogram(path, shape)
        runs = [
            in_fresh_process("measure", path=str(path), ratio=ratio, memory=memory) for ratio in (1.0, 2.0)
        ]
        if peer:
            runs.append(in_fresh_process("measure_peer", path=str(path)))
    lines = [
        f"Analytic scorer, {_times(shape)} (zyx) int8 MRC, budget {memory or 'none given'}, hann.",
        "",
        "| run | picks | s | M voxels/s | passes per voxel | peak MB | anonymous MB | projected MB | under |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        *map(_row, runs),
        "",
        "Peak: highest resident bytes (VmHWM) above those before the call; anonymous: without the pages of",
        f"files. Under: the peak is below {LIMIT / 1e9:g} GB and below the projection.",
        "",
        "| run | stage | s | share | peak MB |",
        "|---|---|---:|---:|---:|",
    ]
    for run in runs:
        for stage, seconds in run.stages.items():
            top = run.stage_peaks.get(stage, 0) / 1e6
            lines.append(
                f"| {run.name} | {stage} | {seconds:.1f} | {seconds / run.seconds:.0%} | {top:.0f} |"
            )
    return lines


def _row(run: Run) -> str:
    under = "" if not run.projected else "yes" if run.peak < min(LIMIT, run.projected) else "no"
    cells = [
        run.name,
        run.picks,
        f"{run.seconds:.1f}",
        f"{run.voxels / run.seconds / 1e6:.2f}",
        f"{run.passes:.2f}",
    ]
    cells += [f"{count / 1e6:.0f}" for count in (run.peak, run.anonymous, run.projected)]
    return f"| {' | '.join(map(str, cells))} | {under} |"


def network_table(shape: tuple[int, int, int], repeats: int, source: str, device: str) -> list[str]:
    """Return the table of the second part."""
    picker = load_picker(source, device=device)
    options = PickOptions(diameter=2 * picker.particle_radius * VOXEL_SIZE, contrast="dark")
    picker.score(np.zeros((options.batch_size, *picker.window.shape), dtype=np.float32))
    walls, shares, plan = [], [], None
    with tempfile.TemporaryDirectory(prefix="bench-pipeline-") as folder:
        path = Path(folder) / "tomogram.mrc"
        write_tomogram(path, shape, np.float32)
        tomogram = open_tomogram(path)
        _, plan = plan_pick(tomogram, picker, options)
        for _ in range(repeats):
            timed = Timed(picker)
            began = time.perf_counter()
            pick(tomogram, timed, options)
            walls.append(time.perf_counter() - began)
            shares.append(1 - timed.seconds / walls[-1])
    rates = [plan.windows / wall for wall in walls]
    voxels = int(np.prod(shape))
    return [
        f"Picker {source!r} on {picker.device}, {_times(shape)} (zyx) float32 MRC, {plan.windows} windows of "
        f"{_times(picker.window.shape)}, batch {options.batch_size}, hann, {repeats} runs.",
        "",
        "| | median | least | most |",
        "|---|---:|---:|---:|",
        f"| s | {_spread(walls, '.1f')} |",
        f"| windows/s | {_spread(rates, '.3f')} |",
        f"| thousand voxels/s | {_spread([voxels / wall / 1e3 for wall in walls], '.1f')} |",
        f"| share of wall time outside the forward pass | {_spread(shares, '.1%')} |",
    ]


def commit() -> str:
    """Return the commit that a page is printed by."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions(script: str = "bench_pipeline.py", *others: str) -> list[str]:
    """Return what the figures depend on: commit, machine, versions; `others` are further packages."""
    names = ("numpy", "scipy", "torch", "zarr", "monai", "scikit-image", *others)
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}"
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return [
        f"- commit {commit()}, {dt.datetime.now(tz=dt.UTC):%Y-%m-%d}",
        f"- {machine}, CPython {platform.python_version()}",
        "- " + ", ".join(f"{name} {metadata.version(name)}" for name in names),
        f"- `{' '.join([f'python benchmarks/{script}', *words])}`",
    ]


def main() -> None:
    """Run the parts asked for and print one Markdown page."""
    if sys.argv[1:2] == ["child"]:
        child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["memory", "network", "both"], default="both")
    parser.add_argument("--shape", type=int, nargs=3, help="voxels z y x, instead of the full size")
    parser.add_argument("--memory", help='budget of the first part, such as "900 MB"')
    parser.add_argument("--repeats", type=int, default=3, help="runs of the second part")
    parser.add_argument("--picker", default="base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-peer", action="store_true", help="leave the whole volume in memory out")
    parser.add_argument("--write", action="store_true", help="also write the page below benchmarks/results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    page = ["# `pick` as a whole", "", *versions()]
    if asked.part in ("memory", "both"):
        shape = tuple(asked.shape or (512, 1024, 1024))
        page += ["", "## Memory", "", *memory_table(shape, asked.memory, peer=not asked.no_peer)]
    if asked.part in ("network", "both"):
        shape = tuple(asked.shape or (96, 256, 256))
        page += ["", "## Network", "", *network_table(shape, asked.repeats, asked.picker, asked.device)]
    text = "\n".join(page) + "\n"
    print(text)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        theme = "pipeline" if asked.part == "both" else f"pipeline-{asked.part}"
        month = f"{dt.datetime.now(tz=dt.UTC):%Y%m}"
        (RESULTS / f"{theme}_{asked.hardware}_{month}.md").write_text(text)


def child(asked: dict[str, Any]) -> None:
    """Make one measurement and print it as JSON."""
    calls: dict[str, Callable[..., Run]] = {"measure": measure, "measure_peer": measure_peer}
    call = calls[asked.pop("call")]
    print(json.dumps(asdict(call(Path(asked.pop("path")), **asked))))


def _status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _reset_high_water() -> bool:
    """Set the kernel's mark of the highest resident memory to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") <= _status("VmRSS") * 1.05


def _spread(values: list[float], form: str) -> str:
    return " | ".join(format(value, form) for value in (statistics.median(values), min(values), max(values)))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


if __name__ == "__main__":
    main()
