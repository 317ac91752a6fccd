"""The heat map: what is picked and how, and the prediction of a map task by task.

`predict` plans nothing and owns no loop over windows: it claims a store, hands each task of the plan
to `scoring.score_task`, and settles afterwards what lies at the borders of tasks.
"""

from __future__ import annotations

import uuid
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import zarr

from tomocpt_stream.blocks import CODEC_CONCURRENCY, STITCHES, Stitch, Window, box_of
from tomocpt_stream.errors import PlanError
from tomocpt_stream.mask import MaskLike, open_mask
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, flood, scan
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import Receipts, StoreLike, as_store, config_hash, write_bytes
from tomocpt_stream.scoremap import (
    SEAMS,
    Heatmap,
    allowed_ones,
    as_spans,
    claim_store,
    member,
    open_heatmap,
    pieces,
)
from tomocpt_stream.scoring import RECEIPTS, Work, score_task
from tomocpt_stream.volume import ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Span
    from tomocpt_stream.mask import Mask
    from tomocpt_stream.volume import Volume

__all__ = ["Heatmap", "PickOptions", "Scorer", "open_heatmap", "predict"]

Contrast = Literal["dark", "bright"]

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
        How protein looks in this tomogram, "dark" (RELION, IMOD) or "bright" (Warp's default).
    stitch
        "crop" keeps each window's own voxels, "hann" and "gaussian" blend overlapping windows.
    tta
        Score the identity and a flip of each axis, and take the mean: four times the work.
    batch_size
        Windows scored at once; part of the numerics.
    margin
        No pick is reported within this distance of the volume's faces.
    """

    diameter: float
    threshold: float = 0.3
    min_distance: float | None = None
    contrast: Contrast = "dark"
    stitch: Stitch = "hann"
    tta: bool = False
    batch_size: int = 4
    margin: float = 0.0

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
    progress: Progress = silent,
) -> Heatmap:
    """Score a volume task by task into `store` (a path or a zarr store) and return the heat map.

    `mask` is a file, a zarr or numpy array or a Tomogram over the same specimen: windows without a
    voxel of it are not scored, candidates outside it are dropped. A run that was killed goes on
    where it stopped, under any memory budget; a finished store is returned at once. A picker
    without `.fingerprint` cannot be told from another one: nothing of it is resumed.

    Raises
    ------
    PlanError
        Plan, picker, volume and options do not belong together.
    CheckpointError
        The store holds something else, or a map that depends on other options.
    SourceError
        The picker's scores are not numbers, or the map has over 5 million candidates.
    """
    _check_request(volume, picker, plan, options, client)
    allowed = None if mask is None else open_mask(mask, volume.frame, volume.grid)
    negate = options.contrast != _trained_contrast(picker)
    config = _config(volume, picker, plan, negate=negate, mask=allowed)
    target = as_store(store)
    attributes = claim_store(target, volume, plan, config, floor=min(CANDIDATE_FLOOR, options.threshold))
    if "finished" in attributes:
        return open_heatmap(target)
    group = zarr.open_group(target, mode="r+")
    receipts = Receipts(target, RECEIPTS)
    work = Work(
        volume=volume,
        picker=picker,
        plan=plan,
        scores=member(group, "0"),
        marks=member(group, "marks") if "marks" in group else None,
        floor=float(attributes["floor"]),
        negate=negate,
        mask=allowed,
        done=frozenset(receipts.all()),
    )
    with zarr.config.set({"async.concurrency": CODEC_CONCURRENCY}):
        stats = _run(work, progress)
        finished = _finish(work, receipts)
    if allowed is not None and not finished["scored"]:
        warnings.warn(f"the mask of {volume.name} has no voxel inside: nothing was scored", stacklevel=2)
    group.attrs.put({**group.attrs.asdict(), ATTRIBUTE: {**attributes, "finished": finished, "run": stats}})
    return open_heatmap(target)


def _run(work: Work, progress: Progress) -> dict[str, float]:
    """Score every task; report in voxels of the volume."""
    windows, voxels = work.plan.windows, int(np.prod(work.plan.shape))
    seen = 0

    def report(count: int) -> None:
        nonlocal seen
        seen += count
        progress("predict", voxels * seen // windows, voxels)

    progress("predict", 0, voxels)
    totals = {"windows": 0.0, "bytes_read": 0.0, "seconds": 0.0, "forward": 0.0, "candidates": 0.0}
    for task in work.plan.tasks:
        stats = score_task(task, work, report)
        totals = {key: value + stats[key] for key, value in totals.items()}
        if totals["candidates"] > MAX_CANDIDATES:
            raise flood(work.volume.name, int(totals["candidates"]))
    return totals


def _finish(work: Work, receipts: Receipts) -> dict[str, Any]:
    """Settle what lies at the borders of tasks from the stored map; return the map's summary."""
    done = receipts.all()
    tables = [np.zeros(0, dtype=CANDIDATE)]
    for spans in _unsettled(list(done.values()), work.plan):
        found = scan(work.scores, box_of(spans), work.floor, name=work.volume.name)
        tables.append(found if work.marks is None else allowed_ones(found, work.marks))
    seams = np.concatenate(tables)
    write_bytes(work.scores.store, SEAMS, seams.tobytes())
    summary = {
        "minimum": min(receipt["minimum"] for receipt in done.values()),
        "maximum": max(receipt["maximum"] for receipt in done.values()),
        "scored": sum(receipt["scored"] for receipt in done.values()),
    }
    count = len(seams) + sum(receipt["candidates"] for receipt in done.values())
    if summary["minimum"] != summary["maximum"]:
        count += sum(receipt["plateau"] for receipt in done.values())
    if count > MAX_CANDIDATES:
        raise flood(work.volume.name, count)
    return {**summary, "candidates": count}


def _unsettled(receipts: Sequence[dict[str, Any]], plan: BlockPlan) -> Iterator[tuple[Span, Span, Span]]:
    """Yield boxes of the voxels whose neighbourhood left the block that their task held.

    The chunks of one task are taken together where all of them come from it: what is left is then
    the shell of its write box.
    """
    groups: dict[tuple[Span, Span, Span], list[dict[str, Any]]] = {}
    for receipt in receipts:
        groups.setdefault(as_spans(receipt["write"]), []).append(receipt)
    for write, members in groups.items():
        if len(members) == sum(1 for _ in plan.chunks_of(write)):
            settled = [as_spans(member["settled"]) for member in members]
            # An empty span lies where its chunk begins, not where the settled voxels of others end.
            some = [s for s in settled if all(start < stop for start, stop in s)]
            joined = [
                (min(s[axis][0] for s in some), max(s[axis][1] for s in some)) if some else (0, 0)
                for axis in range(3)
            ]
            pairs = [(write, as_spans(joined))]
        else:
            pairs = [(as_spans(member["chunk"]), as_spans(member["settled"])) for member in members]
        for outer, inner in pairs:
            for shell in _without(outer, inner):
                yield from pieces(shell, tuple(2 * c for c in plan.chunk))


def _without(
    outer: tuple[Span, Span, Span], inner: tuple[Span, Span, Span]
) -> Iterator[tuple[Span, Span, Span]]:
    """Yield up to six boxes that make up `outer` without `inner`."""
    rest = list(outer)
    for axis in range(3):
        (start, stop), (low, high) = rest[axis], inner[axis]
        low, high = min(max(start, low), stop), max(start, min(high, stop))
        for span in ((start, low), (max(low, high), stop)):
            if span[0] < span[1]:
                yield as_spans([*rest[:axis], span, *rest[axis + 1 :]])
        rest[axis] = (low, max(low, high))
        if rest[axis][0] == rest[axis][1]:
            return


def _check_request(
    volume: Volume, picker: Scorer, plan: BlockPlan, options: PickOptions, client: Any
) -> None:
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
    if client is not None:
        raise PlanError(
            f"a client ({type(client).__name__})",
            expected="client=None: this version predicts in the calling process",
            remedy="leave client out",
        )


def _trained_contrast(picker: Scorer) -> str:
    """Return how protein looks to a picker; one that does not say sees it dark."""
    metadata = getattr(picker, "metadata", None) or {}
    return str(metadata.get("contrast", "dark"))


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
