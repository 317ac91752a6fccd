"""A scorer that writes down what it scores, and maps that nothing disturbed to compare others with."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.storage import LocalStore

from tests.scorers import SMALL, PlaceDependent
from tests.stores import wait_until
from tomocpt_stream.blocks import BlockPlan, plan_blocks
from tomocpt_stream.heatmap import Heatmap, PickOptions, predict
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.scoring import RECEIPTS
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (60, 90, 90)
OPTIONS = PickOptions(diameter=60.0, stitch="crop", batch_size=4, contrast="dark")
# Each mark is seen by one window only: the bright one in the last row of the fifth of nine columns, the
# dark one in the first row of the sixth.
BRIGHT_MARK, DARK_MARK = (55, 45, 45), (5, 45, 75)

BRIGHT, DARK = 3.0, -3.0  # what normalised voxels are at most and at least


class Watched(PlaceDependent):
    """It writes down every window that it scores, and does a deed when it sees a mark.

    The mark is a voxel with the value `mark`; `folder` is where it writes, tells that it has seen the
    mark, and is told to stop. The deed waits for the file `after`. `shift` is added to all scores.
    """

    def __init__(
        self,
        folder: Path,
        deed: str = "",
        *,
        mark: float = BRIGHT,
        after: Path | None = None,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.folder, self.deed, self.mark, self.after, self.shift = folder, deed, mark, after, shift
        self.fingerprint = f"watched {folder}"

    def score(self, batch: Any) -> Any:
        windows = [window for window in batch if window.any()]  # the last batch is padded with zeros
        lines = [f"{hashlib.sha256(window.tobytes()).hexdigest()}\n" for window in windows]
        with (self.folder / "scored").open("a") as file:
            file.write("".join(lines))
        if self.deed and not self.stopped.exists():
            self._act(marked=bool((batch == self.mark).any()))
        return super().score(batch) + np.float32(self.shift)

    def _act(self, *, marked: bool) -> None:
        if marked:
            wait_until(lambda: self.after is None or self.after.exists())
            with self.seen.open("a") as file:
                file.write(f"{os.getpid()}\n")
        if marked and self.deed == "die once":
            self.mend()
            os.kill(os.getpid(), signal.SIGKILL)
        if marked and self.deed == "fail":
            raise RuntimeError("the device has stumbled")
        if marked and self.deed == "eat":
            eaten = [np.ones(4_000_000) for _ in range(40)]  # 1.3 GB
            wait_until(self.stopped.exists)
            del eaten
        if marked and self.deed == "wait":
            wait_until(self.stopped.exists)
        if self.deed == "dawdle" and self.seen.exists():
            time.sleep(0.3)
        if self.deed == "go slowly":
            time.sleep(0.02)

    @property
    def seen(self) -> Path:
        """The process of every time that the mark was seen."""
        return self.folder / "seen"

    @property
    def stopped(self) -> Path:
        return self.folder / "stopped"

    def mend(self) -> None:
        """Let nothing more be done but scoring."""
        self.stopped.touch()

    def scored(self) -> Counter[str]:
        """How often each window was scored, in whatever process."""
        log = self.folder / "scored"
        return Counter(log.read_text().split()) if log.exists() else Counter()


@dataclass
class Undisturbed:
    """A volume on a disk, its plan, and what a run in the calling process makes of it."""

    volume: Volume
    plan: BlockPlan
    options: PickOptions
    contents: dict[str, bytes]
    scored: Counter[str]

    @property
    def folder(self) -> Path:
        """The folder of the volume."""
        store = self.volume.store
        assert isinstance(store, LocalStore)
        return store.root

    @property
    def chunks(self) -> set[str]:
        """The keys of the map's chunks."""
        return {key for task in self.plan.tasks for key, _ in self.plan.chunks_of(task.write_spans)}

    def request(self) -> dict[str, Any]:
        """What `predict` is called with, picker, store and client apart."""
        return {"volume": self.volume, "plan": self.plan, "options": self.options}

    def rescored(self, picker: Watched) -> int:
        """How many windows were scored that need not have been; none was left out."""
        assert set(picker.scored()) == set(self.scored)
        return (picker.scored() - self.scored).total()

    def windows(self, tasks: int) -> int:
        """The windows of so many tasks."""
        return tasks * max(task.window_count for task in self.plan.tasks)


def contents(heatmap: Heatmap) -> dict[str, bytes]:
    """Everything that a map says, as bytes."""
    picks = find_peaks(heatmap, threshold=0.4, min_distance=4.0)
    return {
        "scores": np.asarray(heatmap.array[:]).tobytes(),
        "candidates": heatmap.candidate_table().tobytes(),
        "zyx": picks.zyx.tobytes(),
        "score": picks.score.tobytes(),
    }


def undisturbed_run(folder: Path, stitch: Any, chunk: int) -> Undisturbed:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    voxels[BRIGHT_MARK], voxels[DARK_MARK] = 1e6, -1e6
    volume = ingest(open_tomogram(voxels, voxel_size=10.0), folder / "volume.zarr", voxel_size=10.0)
    options = replace(OPTIONS, stitch=stitch)
    plan = plan_blocks(SHAPE, SMALL, stitch=stitch, batch_size=4, chunk=chunk)
    plan = replace(plan, group=(3, 1, 1))  # columns of all chunks along z
    picker = Watched(folder)
    heatmap = predict(volume, picker, plan, store=folder / "map.zarr", options=options)
    assert picker.scored().total() == plan.windows
    return Undisturbed(volume, plan, options, contents(heatmap), picker.scored())


def run(case: Undisturbed, picker: Any, store: Any, client: Any, **changed: Any) -> Heatmap:
    return predict(picker=picker, store=store, client=client, **{**case.request(), **changed})


def done(store: LocalStore) -> set[str]:
    return Receipts(store, RECEIPTS).names()
