"""The heat map: what is picked and how, and the prediction of a map task by task.

`predict` plans nothing and owns no loop over windows: it claims a store, hands each task of the plan
to `scoring.score_task`, and settles afterwards what lies at the borders of tasks.
"""

from __future__ import annotations

import math
import time
import uuid
import warnings
from array import array
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import zarr

from tomocpt_stream.assignment import assigned
from tomocpt_stream.blocks import CODEC_CONCURRENCY, STITCHES, Stitch, Window, box_of
from tomocpt_stream.contrast import find_contrast, is_negated
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.duplicates import sha256
from tomocpt_stream.errors import PlanError
from tomocpt_stream.mask import MaskLike, open_mask
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, flood, order, scan
from tomocpt_stream.progress import Progress, Tally, WorkerProgress, silent, total
from tomocpt_stream.receipts import (
    StoreLike,
    as_store,
    config_hash,
    delete_but,
    delete_litter,
    write_bytes,
)
from tomocpt_stream.scoremap import SEAMS, Heatmap, allowed_ones, claim_store, member, open_heatmap
from tomocpt_stream.scoring import Work, score_task
from tomocpt_stream.seams import unsettled
from tomocpt_stream.stages import Job, Stage
from tomocpt_stream.volume import ATTRIBUTE
from tomocpt_stream.voxels import shared

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Span
    from tomocpt_stream.contrast import Finding
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.stages import Address, Report
    from tomocpt_stream.volume import Volume

__all__ = ["Heatmap", "PickOptions", "Scorer", "open_heatmap", "predict"]

Contrast = Literal["dark", "bright", "auto"]
Level = Literal["given", "coarsest"]

FORMAT_VERSION = 1
CANDIDATE_FLOOR = 0.05


class Scorer(Protocol):
    """Anything that can stand where a picker stands."""

    @property
    def window(self) -> Window:
        """What it sees at once."""

    @property
    def particle_radius(self) -> float:
        """The particle's radius in working voxels."""

    def score(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return a score for each voxel of a batch of normalised windows (batch, z, y, x)."""


@dataclass(frozen=True)
class PickOptions:
    """What is picked and how; lengths in Å.

    diameter
        The particle's longest axis. It sets the scale, and the spacing where none is given.
    threshold
        Picks have scores strictly above it.
    min_distance
        Euclidean, centre to centre; a pick at exactly this distance is kept. None: 0.75 diameter.
    contrast
        How protein looks in this tomogram, "dark" (RELION, IMOD) or "bright" (Warp's default); "auto"
        takes the one at which the picker finds more, see `contrast.find_contrast`.
    stitch
        "crop" keeps each window's own voxels, "hann" and "gaussian" blend overlapping windows.
    tta
        Score the identity and a flip of each axis, and take the mean: four times the work.
    batch_size
        Windows scored at once; part of the numerics.
    margin
        No pick is reported within this distance of the volume's faces.
    level
        "given" reads the level that the tomogram was opened at; "coarsest" the coarsest stored level
        that is at least as fine as the working voxel size, an eighth or less of the bytes. Picks are
        in voxels of level 0 all the same.
    """

    diameter: float
    threshold: float = 0.3
    min_distance: float | None = None
    contrast: Contrast = "auto"
    stitch: Stitch = "hann"
    tta: bool = False
    batch_size: int = 4
    margin: float = 0.0
    level: Level = "given"

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        lengths = (self.diameter, self.min_distance or 0.0, self.margin, self.threshold)
        if not all(isinstance(n, int | float | np.number) for n in (*lengths, self.batch_size)):
            raise PlanError(f"options {self}", expected="numbers, lengths in Å", remedy="give numbers")
        if (
            not np.isfinite(lengths).all()
            or self.diameter <= 0
            or self.margin < 0
            or (self.min_distance or 0) < 0
        ):
            raise PlanError(
                f"diameter {self.diameter} Å, min_distance {self.min_distance} Å, margin {self.margin} Å, "
                f"threshold {self.threshold}",
                expected="a diameter above 0 and lengths of at least 0, all finite",
                remedy="give lengths in Å",
            )
        if self.contrast not in get_args(Contrast) or self.stitch not in STITCHES:
            raise PlanError(
                f"contrast {self.contrast!r} and stitch {self.stitch!r}",
                expected=f"contrast {' or '.join(get_args(Contrast))}; stitch {', '.join(STITCHES)}",
                remedy="choose one of them",
            )
        if self.level not in get_args(Level):
            raise PlanError(
                f"level {self.level!r}",
                expected=f"one of {', '.join(get_args(Level))}",
                remedy='leave it out, or give "coarsest"',
            )
        if self.batch_size < 1 or int(self.batch_size) != self.batch_size:
            raise PlanError(
                f"a batch of {self.batch_size} windows",
                expected="a whole number, at least 1",
                remedy="give a positive number",
            )


def predict(  # noqa: PLR0913  (the public signature of the design)
    volume: Volume,
    picker: Scorer,
    plan: BlockPlan,
    *,
    store: StoreLike,
    options: PickOptions,
    mask: MaskLike | None = None,
    client: Any = None,
    finding: Finding | None = None,
    progress: Progress = silent,
    storage_options: Mapping[str, Any] | None = None,
) -> Heatmap:
    """Score a volume task by task into `store` and return the heat map.

    `store` is a path, an address or a zarr store. `storage_options` are those of `remote.connect` for
    `store` and `mask` where they are addresses; where these differ, pass one of them opened.

    `mask` is a file, a zarr or numpy array or a Tomogram over the same specimen: windows without a
    voxel of it are not scored, candidates outside it are dropped. A run that was killed goes on
    where it stopped, under any memory budget; a finished store is returned at once. A picker
    without `.fingerprint` cannot be told from another one: nothing of it is resumed.

    With contrast "auto" some windows are scored first, at both signs; `finding` is what `find_contrast`
    said of this volume and picker, where it was asked already. The map is that of the contrast found.

    Raises
    ------
    PlanError
        Plan, picker, volume and options do not belong together.
    CheckpointError
        The store holds something else, or a map that depends on other options.
    SourceError
        The picker's scores are not numbers, or the map has over 5 million candidates.
    """
    _check_request(volume, picker, plan, options)
    allowed = None if mask is None else open_mask(mask, volume.frame, volume.grid, storage_options)
    contrast: str = options.contrast
    if contrast == "auto":
        finding = finding or find_contrast(volume, picker, plan, client=client, progress=progress)
        contrast = finding.contrast
    negate = is_negated(picker, contrast)
    config = _config(volume, picker, plan, negate=negate, mask=allowed)
    target = as_store(store, storage_options)
    target = target if client is None else shared(target)
    asked = PatientStore(target)
    attributes = claim_store(asked, volume, plan, config, floor=min(CANDIDATE_FLOOR, options.threshold))
    if "finished" in attributes:
        return open_heatmap(target)
    group = zarr.open_group(asked, mode="r+")
    work = Work(
        volume=volume,
        picker=picker,
        plan=plan,
        scores=member(group, "0"),
        marks=member(group, "marks") if "marks" in group else None,
        floor=float(attributes["floor"]),
        negate=negate,
        config=attributes["hash"],
        mask=allowed,
    )
    with zarr.config.set({"async.concurrency": CODEC_CONCURRENCY}), assigned(work, client) as address:
        stats = _score(work, address, client, progress)
        finished = _finish(work, address, client)
    if allowed is not None and not finished["scored"]:
        warnings.warn(f"the mask of {volume.name} has no voxel inside: nothing was scored", stacklevel=2)
    found = {} if finding is None else {"contrast": asdict(finding)}
    ours = {**attributes, "finished": finished, "run": stats, **found}
    group.attrs.put({**group.attrs.asdict(), ATTRIBUTE: ours})
    delete_litter(target)
    return open_heatmap(target)


def _score(work: Work, address: Address[Work], client: Any, progress: Progress) -> dict[str, float]:
    """Score every task that lacks a chunk; report in voxels of the volume. Return what that took."""
    plan, began = work.plan, time.perf_counter()
    voxels = math.prod(plan.shape)
    spared = found = 0
    latest: list[Tally] = []

    def jobs() -> Iterator[Job]:
        nonlocal spared
        done = work.receipts.names()
        for task in plan.tasks:
            if all(key in done for key, _ in plan.chunks_of(task.write_spans)):
                spared += task.window_count
            else:
                yield Job(f"task {task.index + 1} of {len(plan.tasks)} ({_label(task.write_spans)})", task)

    def watch(tallies: list[Tally]) -> None:
        latest[:] = tallies
        progress("predict", int(voxels * (spared + total(tallies)) / plan.windows), voxels)
        if isinstance(progress, WorkerProgress):
            progress.workers("predict", tallies)

    progress("predict", 0, voxels)
    stage = Stage("predict", work.volume.name, score_task, address, len(plan.tasks))
    for _, candidates in run_jobs(stage, jobs(), client=client, watch=watch):
        found += candidates
        if found > MAX_CANDIDATES:
            raise flood(work.volume.name, found)
    progress("predict", voxels, voxels)
    numbers = ("windows", "bytes_read", "computing", "waited")
    return {
        "tasks": sum(tally.jobs for tally in latest),
        "workers": len(latest),
        "seconds": time.perf_counter() - began,
        **{name: total(latest, name) for name in numbers},
    }


def _finish(work: Work, address: Address[Work], client: Any) -> dict[str, Any]:
    """Settle what lies at the borders of tasks from the stored map; return the map's summary."""
    spans = array("i")  # of each chunk: its task's write box, its own, its settled one; 72 bytes
    low, high, scored, candidates, plateau = math.inf, -math.inf, 0, 0, 0
    tables = {SEAMS}
    most: dict[str, float] = {}
    for key, receipt in work.receipts.each():
        tables.add(receipt.get("table", f"candidates/{key}"))
        for name in ("write", "chunk", "settled"):
            for span in receipt[name]:
                spans.extend(span)
        low, high = min(low, receipt["minimum"]), max(high, receipt["maximum"])
        most[key] = receipt["maximum"]
        scored += receipt["scored"]
        candidates += receipt["candidates"]
        plateau += receipt["plateau"]
    if low != high:
        candidates += plateau
    boxes = unsettled(np.frombuffer(spans, dtype=np.int32).reshape(-1, 3, 3, 2), work.plan)
    jobs = [Job(f"seam {_label(box)}", box) for box in boxes if _most_in(box, work, most) > work.floor]
    found = [np.zeros(0, dtype=CANDIDATE)]
    stage = Stage("seams", work.volume.name, _settle_seam, address, len(jobs))
    for _, table in run_jobs(stage, jobs, client=client):
        found.append(np.frombuffer(table, dtype=CANDIDATE))
        candidates += len(found[-1])
        if candidates > MAX_CANDIDATES:
            break
    if candidates > MAX_CANDIDATES:
        raise flood(work.volume.name, candidates)
    seams = order(np.concatenate(found), work.plan.shape)  # the jobs end in any order
    write_bytes(work.scores.store, SEAMS, seams.tobytes())
    # Every chunk has its receipt now, so that a table which none names was left by a run that was killed.
    delete_but(work.scores.store, "candidates/", tables)
    summary = {"minimum": low, "maximum": high, "scored": scored, "candidates": candidates}
    return {**summary, "seams_sha256": sha256(seams)}


def _most_in(box: tuple[Span, Span, Span], work: Work, most: dict[str, float]) -> float:
    """Return the greatest score of the chunks that a box touches; at most the floor, it has no candidate."""
    z, y, x = ((start // c * c, stop) for (start, stop), c in zip(box, work.plan.chunk, strict=True))
    return max(most[key] for key, _ in work.plan.chunks_of((z, y, x)))


def _settle_seam(box: tuple[Span, Span, Span], work: Work, report: Report) -> bytes:
    """Return the table of the candidates in a box of the stored map."""
    del report
    found = scan(work.scores, box_of(box), work.floor, name=work.volume.name)
    return (found if work.marks is None else allowed_ones(found, work.marks)).tobytes()


def _label(spans: tuple[Span, Span, Span]) -> str:
    """Return a box for people."""
    return " ".join(f"{axis} {start}:{stop}" for axis, (start, stop) in zip("zyx", spans, strict=True))


def _check_request(volume: Volume, picker: Scorer, plan: BlockPlan, options: PickOptions) -> None:
    asked = {
        "shape": (tuple(plan.shape), tuple(volume.shape)),
        "window": (plan.window, Window(picker.window.shape, picker.window.halo)),
        "stitch": (plan.stitch, options.stitch),
        "batch_size": (plan.batch_size, options.batch_size),
        "tta": (plan.tta, options.tta),
    }
    wrong = [f"{name} {have} against {want}" for name, (have, want) in asked.items() if have != want]
    if wrong:
        raise PlanError(
            f"the plan differs from what is to be predicted: {'; '.join(wrong)}",
            expected="a plan made for this volume, picker and options",
            remedy="call plan_blocks with the volume's shape, the picker's window and the options' "
            "stitch, batch_size and tta",
        )


def _config(
    volume: Volume, picker: Scorer, plan: BlockPlan, *, negate: bool, mask: Mask | None
) -> dict[str, Any]:
    """Return everything that a map depends on."""
    return {
        "format_version": FORMAT_VERSION,
        "volume": volume.fingerprint,
        "picker": str(getattr(picker, "fingerprint", None) or f"unnamed {uuid.uuid4()}"),
        "window": [list(plan.window.shape), list(plan.window.halo)],
        "stitch": plan.stitch,
        "batch_size": plan.batch_size,
        "tta": plan.tta,
        "chunk": list(plan.chunk),
        "numerics": getattr(picker, "numerics", None),
        "normalisation": "clip((x - p50) / (p95 - p5), -3, 3)",
        "negate": negate,
        "mask": None if mask is None else config_hash(mask.fingerprint),
    }
