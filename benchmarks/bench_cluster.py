"""The engine on dask workers: same bytes, scaling, cost of a task, overlap, memory of a worker.

    python benchmarks/bench_cluster.py --sim10a FOLDER       # all parts, full size; or name some of them

"equality" predicts for client=None and 1, 2, 4 workers, three memory budgets and two chunk sizes, with an
analytic scorer and with the shipped picker, on a phantom and, with --sim10a, on the simulated tomogram
sim_val_1.mrc, and compares every map and every list of picks. "scaling" has a scorer that sleeps, as a
CPU does while a GPU works. "tasks" runs jobs that do nothing. "overlap" reads from a store with injected
latency. "memory" picks an int8 MRC file at twice its voxel size under a budget and takes the peak of
each worker.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import hashlib
import itertools
import os
import platform
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from bench_pipeline import RESULTS, VOXEL_SIZE, BoxMean, Stages, versions, write_tomogram
from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore

from tomocpt_stream import (
    PickOptions,
    Window,
    find_peaks,
    ingest,
    load_picker,
    open_tomogram,
    open_volume,
    pick,
    plan_blocks,
    predict,
)
from tomocpt_stream.cluster import local_cluster
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import PlanError
from tomocpt_stream.phantom import SHAPES_HELD_OUT, PhantomOptions, simulate_phantom, write_mrc
from tomocpt_stream.pipeline import min_distance, plan_pick
from tomocpt_stream.schedule import end
from tomocpt_stream.stages import Job, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from zarr.core.buffer import Buffer, BufferPrototype

    from tomocpt_stream.blocks import BlockPlan
    from tomocpt_stream.progress import Tally
    from tomocpt_stream.tomogram import Tomogram

PARTS = ("equality", "scaling", "tasks", "overlap", "memory")
SIM_DIAMETER = 290.0  # of the ribosomes in sim_val_1.mrc, Å


class Sleeper:
    """Sleeps for each batch as a CPU does while a GPU scores it; its answer has no peak."""

    window = Window((64, 64, 64), (8, 8, 8))
    particle_radius = 10.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.fingerprint = f"sleeps {seconds} s"

    def score(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return a constant below every floor."""
        time.sleep(self.seconds)
        return np.full_like(batch, 0.01)


class LateStore(WrapperStore[Store]):
    """A store whose chunks come late, each by the same time, however many are asked for at once."""

    def __init__(self, store: Store, latency: float) -> None:
        super().__init__(store)
        self.latency = latency

    def _with_store(self, store: Store) -> LateStore:
        return LateStore(store, self.latency)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: Any = None) -> Buffer | None:
        """Return the bytes of an object, late if it is a chunk."""
        if "/c/" in key:
            await asyncio.sleep(self.latency)
        return await self._store.get(key, prototype, byte_range)


class Listener:
    """Keeps the last tallies of the workers."""

    def __init__(self) -> None:
        self.tallies: list[Tally] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Ignore the sum."""

    def workers(self, stage: str, tallies: list[Tally]) -> None:
        """Keep what each worker did."""
        self.tallies = list(tallies) if stage == "predict" else self.tallies


@contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """A client of so many worker processes that have loaded what they need; None for 0."""
    if not workers:
        yield None
        return
    with local_cluster(workers) as client:
        yield client


def equality_table(shape: tuple[int, int, int], sim10a: Path | None, *, every_cut: bool) -> list[str]:
    """Return the table of the first part."""
    cuts = list(itertools.product((0.0, 0.5, 1.0), (64, 96)))
    scorers = {
        "analytic": (BoxMean(), cuts),
        "shipped": (load_picker("base", device="cpu"), cuts if every_cut else [cuts[0], cuts[-1]]),
    }
    lines = [
        "hann, batch 4; the shipped picker in float32 with two threads a batch. Maps and picks of one",
        "tomogram and scorer are compared by sha256 of their bytes: scores, coordinates of picks.",
        "",
        "| tomogram | scorer | workers | budgets MB | chunks | tasks | runs | s | other maps | other picks |",
        "|---|---|---:|---|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        for name, tomogram, diameter in _tomograms(shape, sim10a):
            for scorer, (picker, chosen) in scorers.items():
                seen: tuple[set[str], set[str]] = (set(), set())
                place = Path(folder) / name / scorer
                for workers in (0, 1, 2, 4):
                    row = _equal_runs(
                        place, tomogram, PickOptions(diameter, contrast="dark"), picker, workers, chosen, seen
                    )
                    lines.append(f"| {name} | {scorer} | {row}")
                    print(lines[-1], flush=True)
    return lines


def _tomograms(shape: tuple[int, int, int], sim10a: Path | None) -> Iterator[tuple[str, Tomogram, float]]:
    """Yield the names, tomograms and diameters (Å) of what is picked."""
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        crowd = int(np.prod(shape)) // 120_000
        scene = PhantomOptions(
            shape=shape, particles=SHAPES_HELD_OUT[:4], count=crowd, distractors=crowd // 3, vesicles=0
        )
        phantom = simulate_phantom(scene, seed=5)
        path = Path(folder) / "phantom.mrc"
        write_mrc(path, phantom.volume, scene.voxel_size)
        yield f"phantom {' x '.join(map(str, scene.shape))}", open_tomogram(path), scene.diameter
    if sim10a is not None:
        yield "sim_val_1", open_tomogram(sim10a / "sim_val_1.mrc"), SIM_DIAMETER


def _equal_runs(
    folder: Path,
    tomogram: Tomogram,
    options: PickOptions,
    picker: Any,
    workers: int,
    cuts: list[tuple[float, int]],
    seen: tuple[set[str], set[str]],
) -> str:
    """Predict under every budget and chunk on so many workers; return the rest of a row of the table."""
    grid, _ = plan_pick(tomogram, picker, options)
    seconds, budgets, tasks = [], set(), set()
    with cluster(workers) as client:
        for share, chunk in cuts:
            plan = _plan(grid.shape, picker, options, chunk, share, max(1, workers))
            budgets.add(round((plan.memory or 0) / 1e6))
            tasks.add(len(plan.tasks))
            place = folder / f"{workers} {share} {chunk}"
            began = time.perf_counter()
            volume = ingest(tomogram, place / "volume", voxel_size=grid.voxel_size, client=client)
            heatmap = predict(volume, picker, plan, store=place / "map", options=options, client=client)
            picks = find_peaks(
                heatmap, threshold=0.3, min_distance=round(min_distance(options) / grid.voxel_size, 9)
            )
            seconds.append(time.perf_counter() - began)
            seen[0].add(hashlib.sha256(np.asarray(heatmap.array[:]).tobytes()).hexdigest())
            seen[1].add(hashlib.sha256(picks.zyx.tobytes() + picks.score.tobytes()).hexdigest())
    cells: list[Any] = [workers or "none (client=None)", _listed(budgets), _listed({cut[1] for cut in cuts})]
    cells += [_listed(tasks), len(seconds), f"{min(seconds):.1f} to {max(seconds):.1f}"]
    return " | ".join(map(str, [*cells, len(seen[0]) - 1, len(seen[1]) - 1])) + " |"


def _plan(shape: Any, picker: Any, options: PickOptions, chunk: int, share: float, workers: int) -> BlockPlan:
    """Return the plan of a budget between the least that does (share 0) and the most that is of use (1)."""

    def plan(memory: int) -> BlockPlan:
        return plan_blocks(
            shape,
            picker.window,
            stitch=options.stitch,
            batch_size=options.batch_size,
            bytes_per_window=getattr(picker, "bytes_per_window", None),
            memory=memory,
            chunk=chunk,
            workers=workers,
        )

    most = plan_blocks(
        shape, picker.window, stitch=options.stitch, bytes_per_window=picker.bytes_per_window, memory=10**13
    ).projected_bytes
    low, high = 0, 2 * most
    while high - low > 1_000_000:
        middle = (low + high) // 2
        try:
            plan(middle)
        except PlanError:
            low = middle
        else:
            high = middle
    return plan(round(high + share * max(0, most - high)))


def scaling_table(shape: tuple[int, int, int], seconds: float) -> list[str]:
    """Return the table of the second part."""
    scorer = Sleeper(seconds)
    rows = []
    first: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        volume = _noise_volume(Path(folder), shape)
        for workers in (1, 2, 4, 8):
            with cluster(workers) as client:
                _warm(
                    client,
                    scorer,
                    PickOptions(2 * scorer.particle_radius * VOXEL_SIZE, contrast="dark"),
                    folder,
                )
                for stitch in ("hann", "crop"):
                    options = PickOptions(
                        2 * scorer.particle_radius * VOXEL_SIZE, stitch=stitch, contrast="dark"
                    )
                    plan = plan_blocks(volume.shape, scorer.window, stitch=stitch, workers=workers)
                    last = end((task.window_count for task in plan.tasks), workers)
                    before = _processor_seconds(client)
                    store = Path(folder) / f"{stitch} {workers}"
                    wall, busy = _timed(volume, scorer, plan, store, options, client)
                    rate, spent = plan.windows / wall, _processor_seconds(client) - before
                    wall_of_one, rate_of_one = first.setdefault(stitch, (wall, rate))
                    cells = [stitch, workers, len(plan.tasks), plan.windows, f"{wall:.1f}", f"{rate:.1f}"]
                    cells += [f"{rate / rate_of_one / workers:.2f}", f"{plan.windows / workers / last:.2f}"]
                    cells += [f"{wall_of_one / wall:.2f}", f"{sum(busy) / workers / wall:.0%}"]
                    cells += [f"{spent:.0f}"]
                    rows.append(f"| {' | '.join(map(str, cells))} |")
                    print(rows[-1], flush=True)
    return [
        f"A scorer that sleeps {seconds:g} s a batch of 4, {' x '.join(map(str, shape))} working voxels,",
        f"worker processes on one machine of {os.cpu_count()} cores, each plan cut for its workers.",
        "Efficiency: windows/s over those of one worker times the workers; planned: what is left of it by",
        "tasks that cannot all end together. Speed-up: in wall time, of the whole tomogram; below the",
        "efficiency, as hann scores windows at the seams of tasks in each of them. CPU: of all workers.",
        "",
        "| stitch | workers | tasks | windows | s | windows/s | efficiency | planned | speed-up "
        "| scorers ran | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *sorted(rows, reverse=True, key=lambda row: "hann" in row),
    ]


def _processor_seconds(client: Any) -> float:
    """Return the CPU seconds that all workers have taken so far."""
    times = [psutil.Process(process).cpu_times() for process in client.run(os.getpid).values()]
    return float(sum(spent.user + spent.system for spent in times))


def _timed(
    volume: Any, scorer: Sleeper, plan: BlockPlan, store: Path, options: PickOptions, client: Any
) -> tuple[float, list[float]]:
    """Predict; return the seconds that took, and those that the scorer of each worker ran."""
    listener = Listener()
    began = time.perf_counter()
    predict(volume, scorer, plan, store=store, options=options, client=client, progress=listener)
    wall = time.perf_counter() - began
    return wall, [tally.number("computing") for tally in listener.tallies]


def _warm(client: Any, scorer: Any, options: PickOptions, folder: str) -> None:
    """Have every worker import what it needs."""
    noise = np.random.default_rng(0).normal(size=(70, 300, 300)).astype(np.float32)
    place = Path(folder) / f"warm {time.time()}"
    volume = ingest(open_tomogram(noise, voxel_size=VOXEL_SIZE), place / "volume", voxel_size=VOXEL_SIZE)
    plan = plan_blocks(volume.shape, scorer.window, stitch=options.stitch, workers=16)
    predict(volume, scorer, plan, store=place / "map", options=options, client=client)


def _noise_volume(folder: Path, shape: tuple[int, int, int]) -> Any:
    path = folder / "noise.mrc"
    write_tomogram(path, shape)
    return ingest(open_tomogram(path), folder / "volume", voxel_size=VOXEL_SIZE)


@dataclass(frozen=True)
class Nothing:
    """An address that opens nothing, of the size of a real one."""

    token: str = "nothing"
    filler: bytes = bytes(2500)

    def open(self) -> None:
        """Return nothing."""


def do_nothing(payload: Any, opened: None, report: Any) -> None:
    """Do nothing."""
    del payload, opened
    report({"done": 1})


def tasks_table(counts: tuple[int, ...]) -> list[str]:
    """Return the table of the third part."""
    rows = []
    for count in counts:
        with cluster(2) as client:
            stage = Stage("nothing", "none", do_nothing, Nothing(), count)
            list(run_jobs(stage, [Job("warm", 0)], client=client))
            before = psutil.Process().memory_info().rss
            began = time.perf_counter()
            jobs = (Job(f"task {index} (z 0:96 y 0:96 x 0:96)", tuple(range(24))) for index in range(count))
            done = sum(1 for _ in run_jobs(stage, jobs, client=client))
            wall = time.perf_counter() - began
            grown = psutil.Process().memory_info().rss - before
        rows.append(f"| {done} | {wall:.1f} | {wall / count * 1e3:.2f} | {grown / 1e6:.0f} |")
    return [
        "Jobs that do nothing, with an address of 2.5 kB, on two workers: client and scheduler (one",
        "process), network and workers together.",
        "",
        "| tasks | s | ms a task | memory of scheduler and client grown by MB |",
        "|---:|---:|---:|---:|",
        *rows,
    ]


def overlap_table(shape: tuple[int, int, int]) -> list[str]:
    """Return the table of the fourth part."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        _noise_volume(Path(folder), shape)
        late = LateStore(LocalStore(Path(folder) / "volume"), 0.05)
        options = PickOptions(2 * 10.0 * VOXEL_SIZE, contrast="dark")
        for workers in (0, 1, 2):
            with cluster(workers) as client:
                _warm(client, Sleeper(0.0), options, folder)
                reading, plan, _ = _read_and_score(folder, late, 0.0, workers, client)
                # so long a batch that reading takes half as long as computing
                sleep = 2 * reading / -(-plan.windows // 4) * max(1, workers)
                wall, plan, computing = _read_and_score(folder, late, sleep, workers, client)
            rows.append(
                f"| {workers or 'none'} | {len(plan.tasks)} | {reading:.1f} | {computing:.1f} | {wall:.1f} | "
                f"{wall / computing:.3f} |"
            )
    return [
        f"{' x '.join(map(str, shape))} working voxels in a store whose chunks come 50 ms late, four at a",
        "time; the scorer sleeps so long that reading alone (a scorer of no time) takes half of it.",
        "Computing: seconds in the scorer, of the worker that had most.",
        "",
        "| workers | tasks | reading alone s | computing s | both s | both over computing |",
        "|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


def _read_and_score(
    folder: str, store: Store, seconds: float, workers: int, client: Any
) -> tuple[float, BlockPlan, float]:
    """Predict once; return the wall time, the plan, and the most seconds that a worker's scorer ran."""
    scorer, options = Sleeper(seconds), PickOptions(2 * 10.0 * VOXEL_SIZE, contrast="dark")
    volume = open_volume(store)
    plan = plan_blocks(volume.shape, scorer.window, stitch=options.stitch, workers=max(1, workers))
    place = Path(folder) / f"map {time.time()}"
    wall, busy = _timed(volume, scorer, plan, place, options, client)
    return wall, plan, max(busy)


class Peaks:
    """The highest resident bytes of processes while the block runs, above those at its start."""

    def __init__(self, processes: list[int]) -> None:
        self._processes = [psutil.Process(process) for process in processes]

    def __enter__(self) -> Peaks:
        self.idle = [process.memory_info().rss for process in self._processes]
        self._highest = list(self.idle)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above = [high - idle for high, idle in zip(self._highest, self.idle, strict=True)]

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            now = [process.memory_info().rss for process in self._processes]
            self._highest = [max(pair) for pair in zip(self._highest, now, strict=True)]


def memory_table(shape: tuple[int, int, int], budget: str, workers: int) -> list[str]:
    """Return the table of the fifth part."""
    scorer = BoxMean()
    options = PickOptions(2 * 2 * scorer.particle_radius * VOXEL_SIZE, contrast="dark")
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder, ExitStack() as held:
        path = Path(folder) / "tomogram.mrc"
        write_tomogram(path, shape)
        client = held.enter_context(cluster(workers))
        _warm(client, Sleeper(0.0), options, folder)
        tomogram = open_tomogram(path)
        _, plan = plan_pick(tomogram, scorer, options, memory=budget, workers=workers)
        processes = [*client.run(os.getpid).values(), os.getpid()]
        stages = Stages()
        began = time.perf_counter()
        with Peaks(processes) as peaks:
            picks = pick(
                tomogram,
                scorer,
                options,
                memory=budget,
                client=client,
                scratch=Path(folder) / "scratch",
                progress=stages,
            )
        seconds = time.perf_counter() - began
        stages("peaks and the rest", 1, 1)
    *of_workers, own = (f"{above / 1e6:.0f}" for above in peaks.above)
    head = ["picks", "s", "projected MB", "workers' peaks MB", "client's and scheduler's peak MB"]
    projected = f"{plan.projected_bytes / 1e6:.0f}"
    cells = [f"{len(picks)}", f"{seconds:.1f}", projected, ", ".join(of_workers), own]
    return [
        f"{' x '.join(map(str, shape))} int8 MRC at twice its voxel size, analytic scorer, budget {budget} a",
        f"worker, {workers} workers of two threads, {len(plan.tasks)} tasks,",
        f"{plan.passes_per_voxel:.2f} passes per voxel.",
        "Resident bytes every 10 ms, above those of the idle process.",
        "",
        f"| {' | '.join([*head, *(f'{name} s' for name in stages.seconds)])} |",
        f"|{'---:|' * (len(head) + len(stages.seconds))}",
        f"| {' | '.join([*cells, *(f'{part:.1f}' for part in stages.seconds.values())])} |",
    ]


def _listed(items: Any) -> str:
    return ", ".join(map(str, sorted(items)))


def main() -> None:
    """Run the parts asked for and print one Markdown page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all when none")
    parser.add_argument("--sim10a", type=Path, help="folder with sim_val_1.mrc, for equality")
    parser.add_argument(
        "--every-cut", action="store_true", help="equality: all cuts with the shipped picker too, not two"
    )
    parser.add_argument("--shape", type=int, nargs=3, help="voxels z y x, instead of the full size")
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds a batch, for scaling")
    parser.add_argument("--memory", default="1.5 GB", help="budget of a worker, for memory")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, for memory")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000], help="numbers of tasks, for tasks")
    parser.add_argument("--write", action="store_true", help="also write the page below benchmarks/results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    shape = None if asked.shape is None else (asked.shape[0], asked.shape[1], asked.shape[2])
    tables = {
        "equality": lambda: equality_table(shape or (64, 140, 140), asked.sim10a, every_cut=asked.every_cut),
        "scaling": lambda: scaling_table(shape or (192, 1024, 1024), asked.sleep),
        "tasks": lambda: tasks_table(tuple(asked.counts)),
        "overlap": lambda: overlap_table(shape or (200, 400, 400)),
        "memory": lambda: memory_table(shape or (1024, 2048, 2048), asked.memory, asked.workers),
    }
    page = ["# The engine on dask workers", "", *versions("bench_cluster.py", "dask", "distributed")]
    for part in parts:
        page += ["", f"## {part.capitalize()}", "", *tables[part]()]
        print("\n".join(page[-12:]), flush=True)
    text = "\n".join(page) + "\n"
    print(text)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        theme = "cluster" if len(parts) == len(PARTS) else f"cluster-{'-'.join(parts)}"
        (RESULTS / f"{theme}_{asked.hardware}_{dt.datetime.now(tz=dt.UTC):%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
