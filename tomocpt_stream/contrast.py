"""Whether protein is dark or bright in a tomogram: what a picker finds decides, not the grey values.

Some windows of the working volume are scored as they are and turned over; the sign at which the picker
finds more is how protein looks. A pick counts with the square of its score, so that many doubtful ones
do not outweigh a few good ones. Only where the picker hardly finds anything, as of filaments, do the grey
values decide: what lies in ice is their longer tail.

Which windows are taken follows from the volume alone, and each is scored by itself: the answer is one of
volume and picker, whatever the memory, the workers, the stitching, the threshold or the mask. It is kept
in the volume's store, where a later run finds it.
"""

from __future__ import annotations

import logging
import math
import uuid
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice, product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr

from tomocpt_stream.assignment import picker_name
from tomocpt_stream.blocks import CODEC_CONCURRENCY, box_of
from tomocpt_stream.decoded import DECODED
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import ActionableError, CheckpointError
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.peaks import CANDIDATE, find_peaks, order
from tomocpt_stream.progress import Progress, WorkerProgress, silent
from tomocpt_stream.receipts import Receipts, config_hash
from tomocpt_stream.scan import Scoring, Turns, score_chunk
from tomocpt_stream.spacing import space
from tomocpt_stream.stages import Here, Job, Stage, residents
from tomocpt_stream.volume import open_volume
from tomocpt_stream.voxels import shared
from tomocpt_stream.windows import normalise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt
    from zarr.abc.store import Store

    from tomocpt_stream.blocks import BlockPlan, Index, Span, Window
    from tomocpt_stream.frame import Shape
    from tomocpt_stream.progress import Tally
    from tomocpt_stream.stages import Address, Report
    from tomocpt_stream.volume import Volume

Look = Literal["dark", "bright"]
Moments = tuple[int, float, float, float]
"""How many values there are, and the sums of their first three powers."""

WINDOWS = 16
"""So many windows, or all there are, are scored at both signs."""

ROUNDS = 3
"""Where they leave doubt, as many again, up to so many times as many in all."""

# Candidates below the floor say nothing; those above the threshold are told to people as picks.
FLOOR, THRESHOLD = 0.05, 0.3
# Particle radii between two picks: 0.75 diameter, whatever spacing is asked for later.
_SPACING = 1.5
# Doubtful is a total below so many times that of the other sign, or below that of four picks of 0.5.
_CLOSE, LITTLE = 1.5, 1.0
_RECEIPTS, _VERSION = "contrast", 2
# Windows of one round: points k * (1, 7, 5) / 16 modulo 1 of the unit cube, z, y, x, one in each sixteenth of
# each axis. Rounds differ by a shift; those after the third are for windows that are constant fill.
_STEP, _SHIFT, _DRAWN = np.array([1, 7, 5]) / WINDOWS, np.array([0.618, 0.755, 0.570]), 8 * ROUNDS
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """How protein looks in a tomogram, and what says so.

    `picks` (scores above 0.3) and `scores` (the sum of the squares of all scores above 0.05) are what
    the picker finds in `windows` windows when it is fed as if protein were "dark", and "bright".
    `skewness` is that of the windows' grey values, as the network sees them: below 0 where their darker
    tail is the longer one.
    """

    contrast: Look
    windows: int
    picks: dict[str, int]
    scores: dict[str, float]
    skewness: float = 0.0

    def __str__(self) -> str:
        other = _other(self.contrast)
        return (
            f"protein looks {self.contrast}: {self.picks[self.contrast]} picks, total score "
            f"{self.scores[self.contrast]:.2f}, in {self.windows} windows; if {other} "
            f"{self.picks[other]}, {self.scores[other]:.2f}"
        )

    @property
    def is_empty(self) -> bool:
        """Whether the picker found nothing at either sign."""
        return not any(self.scores.values())

    @property
    def is_doubtful(self) -> bool:
        """Whether little was found, or the two signs hardly differ."""
        best = self.scores[self.contrast]
        return best < LITTLE or best < _CLOSE * self.scores[_other(self.contrast)]


def own_contrast(picker: Any) -> Look:
    """Return how protein looked when a picker was trained: its metadata say, else itself, else dark."""
    said, metadata = getattr(picker, "contrast", "dark"), getattr(picker, "metadata", None)
    if isinstance(metadata, Mapping):  # a picker of somebody's own may call anything so
        said = metadata.get("contrast", said)
    return "bright" if said == "bright" else "dark"


def is_negated(picker: Any, contrast: str) -> bool:
    """Return whether protein looks the other way round than the picker was trained to see it."""
    return contrast != own_contrast(picker)


def windows_sampled(plan: BlockPlan) -> int:
    """Return how many windows are scored, at both signs each, before the volume of a plan is predicted."""
    return min(WINDOWS, math.prod(plan.window.lattice(plan.shape)))


def find_contrast(
    volume: Volume,
    picker: Any,
    plan: BlockPlan,
    *,
    client: Any = None,
    progress: Progress = silent,
    turns: Turns | None = None,
) -> Finding:
    """Return whether protein is dark or bright in a volume, by what the picker finds at either sign.

    16 windows, spread over the volume, are scored twice, and up to 48 where these leave doubt: by the
    workers of `client` where there is one. What was found is kept in the volume's store under the
    picker's fingerprint and taken from there the next time. `progress` counts windows; `turns` are the
    picker's in this process, where others call it too. Where little is found, the longer tail of the
    windows' grey values decides; where nothing is found, or the same, it is the picker's own contrast.
    Where doubt is left, a warning says so.

    Raises
    ------
    SourceError
        The picker's scores are not numbers.
    """
    fingerprint = getattr(picker, "fingerprint", None)
    receipts = Receipts(PatientStore(volume.store), _RECEIPTS)
    asked = {"version": _VERSION, "volume": volume.fingerprint, "picker": fingerprint}
    key = config_hash({**asked, "window": repr(plan.window)})[:32]
    kept = None if fingerprint is None else receipts.get(key)
    if kept is not None:
        finding = _from_json(key, kept)
    else:
        with _sampled(volume, picker, plan, client, turns) as address:
            finding = _search(volume, picker, plan.window, address, client, progress)
        if fingerprint is not None and not volume.store.read_only:
            with suppress(OSError, ActionableError):  # where nothing may be written it is found again
                # Of two processes that found it at once, on unlike devices, both follow the first one.
                finding = _from_json(key, receipts.put(key, asdict(finding)))
    _LOGGER.info("%s: %s%s", volume.name, finding, "" if kept is None else " (found before)")
    if finding.is_doubtful:
        warnings.warn(f"{volume.name}: {_doubt(finding)}; give the contrast if you know it", stacklevel=2)
    return finding


def sample(shape: Shape, window: Window) -> Iterator[Index]:
    """Yield windows of the lattice over a volume, spread evenly: all where they are few.

    Of a thick volume the middle half along z is preferred, where the specimen lies.
    """
    lattice = window.lattice(shape)
    if math.prod(lattice) <= WINDOWS:
        yield from np.ndindex(lattice)
        return
    seen = set()
    for turn, number in product(range(_DRAWN), range(WINDOWS)):
        z, y, x = (1 / 3 + number * _STEP + turn * _SHIFT) % 1.0
        places = zip((0.25 + z / 2, y, x), lattice, strict=True)
        index = tuple(int(place * count) for place, count in places)
        if index not in seen:
            seen.add(index)
            yield (index[0], index[1], index[2])


def weigh(
    tables: Sequence[npt.NDArray[np.void]],
    shape: Shape,
    *,
    own: Look,
    radius: float,
    windows: int,
    skewness: float = 0.0,
) -> Finding:
    """Return what candidates of the picker's own sign and of the other one say of a volume of `shape`.

    Candidates nearer to a better one than 0.75 diameter do not count; equal sums are for the own sign.
    Where there are some, but fewer than would say anything, the sign of `skewness` decides.
    """
    picks: dict[str, int] = {}
    scores: dict[str, float] = {}
    for look, table in zip((own, _other(own)), tables, strict=True):
        best = order(table, shape)
        points = np.stack([best[axis].astype(np.int64) for axis in "zyx"], axis=1)
        kept = best["score"][space(points, _SPACING * radius, 2)].astype(np.float64)
        picks[look] = int(np.count_nonzero(kept > np.float32(THRESHOLD)))
        scores[look] = math.fsum(kept**2)
    found = own if scores[own] >= scores[_other(own)] else _other(own)
    if 0 < scores[found] < LITTLE and skewness:
        found = "dark" if skewness < 0 else "bright"
    return Finding(found, windows, picks, scores, skewness)


@dataclass(frozen=True)
class Sampled:
    """A volume whose windows can be scored one by one at both signs."""

    volume: Volume
    picker: Any
    plan: BlockPlan
    turns: Turns

    @cached_property
    def single(self) -> BlockPlan:
        """The plan by which every window is a task of its own, and a batch."""
        stride = self.plan.window.stride
        return replace(self.plan, stitch="crop", tta=False, batch_size=1, chunk=stride, group=(1, 1, 1))

    def candidates(self, index: Index, *, negate: bool) -> npt.NDArray[np.void]:
        """Return the local maxima of one window's core above the floor, spaced, in voxels of the volume."""
        plan = self.single
        scoring = Scoring(volume=self.volume, picker=self.picker, plan=plan, negate=negate, turns=self.turns)
        task = plan.tasks[int(np.ravel_multi_index(index, plan.window.lattice(plan.shape)))]
        # Of a saturated map every voxel is a candidate: what travels is spaced already, a kB or two. At the
        # core's sides are flanks of particles beyond; spacing leaves the better one where both are seen.
        distance = _SPACING * self.picker.particle_radius
        found = find_peaks(score_chunk(task, scoring), threshold=FLOOR, min_distance=distance, refine=False)
        table = np.zeros(len(found), dtype=CANDIDATE)
        table["score"] = found.score
        for axis, (letter, (start, _)) in enumerate(zip("zyx", task.write_spans, strict=True)):
            table[letter] = found.zyx[:, axis] + start
        return table

    def moments(self, index: Index) -> Moments:
        """Return the moments of the grey values of one window's core, as the network sees them."""
        task = self.single.tasks[int(np.ravel_multi_index(index, self.plan.window.lattice(self.plan.shape)))]
        box = box_of(task.write_spans)
        voxels = np.array(self.volume.array[box], dtype=np.float32)
        values = normalise(voxels, self.volume.percentiles).astype(np.float64)
        if self.volume.fill is not None:
            values = values[~np.asarray(self.volume.fill[box], dtype=np.bool_)]
        one, two, three = (float((values**power).sum()) for power in (1, 2, 3))
        return values.size, one, two, three


@dataclass(frozen=True)
class SampledAddress:
    """The address of a `Sampled`; `picker` is the name under which the workers hold the picker."""

    volume: Store
    picker: str
    plan: BlockPlan
    token: str

    def open(self) -> Sampled:
        """Return the volume with the picker that this process holds."""
        zarr.config.set({"async.concurrency": CODEC_CONCURRENCY})  # as the plan's bytes assume
        DECODED.forget()  # what the plan does not count
        turns = residents.named(f"turns of {self.picker}", Turns)
        return Sampled(open_volume(self.volume), residents.named(self.picker), self.plan, turns)


@contextmanager
def _sampled(
    volume: Volume, picker: Any, plan: BlockPlan, client: Any, turns: Turns | None
) -> Iterator[Address[Sampled]]:
    """Yield the address of a volume and a picker for the workers of `client`, who hold it meanwhile."""
    if client is None:
        here = turns or Turns()
        try:
            with zarr.config.set({"async.concurrency": CODEC_CONCURRENCY}):
                yield Here(Sampled(volume, picker, plan, here))
        finally:
            if turns is None:
                here.close()
        return
    from tomocpt_stream.cluster import hold_on_workers

    token = uuid.uuid4().hex
    name = picker_name(picker, otherwise=token)
    lasts = getattr(picker, "fingerprint", None) is not None
    with hold_on_workers(client, name, picker, for_good=lasts):
        yield SampledAddress(shared(volume.store), name, plan, token)


def _search(
    volume: Volume,
    picker: Any,
    window: Window,
    address: Address[Sampled],
    client: Any,
    progress: Progress,
) -> Finding:
    """Return what a round of windows says, or, where that is doubtful, what it says with the next one."""
    tables = [np.zeros(0, dtype=CANDIDATE), np.zeros(0, dtype=CANDIDATE)]
    left = _with_voxels(sample(volume.shape, window), volume, window)
    own, scored = own_contrast(picker), 0
    moments: list[Moments] = []
    indices = list(islice(left, WINDOWS))
    while True:
        found, grey = _score_all(volume.name, indices, address, client, progress)
        tables = [np.concatenate(both) for both in zip(tables, found, strict=True)]
        moments += grey
        scored += len(indices)
        finding = weigh(
            tables,
            volume.shape,
            own=own,
            radius=picker.particle_radius,
            windows=scored,
            skewness=_skewness(moments),
        )
        if not finding.is_doubtful or scored >= ROUNDS * WINDOWS:
            return finding
        indices = list(islice(left, WINDOWS))
        if not indices:
            return finding


def _score_all(
    name: str, indices: Sequence[Index], address: Address[Sampled], client: Any, progress: Progress
) -> tuple[list[npt.NDArray[np.void]], list[Moments]]:
    """Return the candidates of some windows at the picker's own sign and at the other one, and moments."""

    def watch(tallies: list[Tally]) -> None:
        if isinstance(progress, WorkerProgress):
            progress.workers("contrast", tallies)

    jobs = [Job(f"window {index}", index) for index in indices]
    stage = Stage("contrast", name, _score_window, address, len(jobs))
    answers: list[tuple[bytes, bytes, Moments]] = []
    progress("contrast", 0, len(jobs))
    for _, answer in run_jobs(stage, jobs, client=client, watch=watch):
        answers.append(answer)
        progress("contrast", len(answers), len(jobs))
    own, other, grey = zip(*answers, strict=True)
    return [np.frombuffer(b"".join(data), dtype=CANDIDATE) for data in (own, other)], list(grey)


def _skewness(moments: Sequence[Moments]) -> float:
    """Return the skewness of the values that the moments are of; 0 where they are all alike."""
    count, one, two, three = (math.fsum(parts) for parts in zip(*moments, strict=True))
    if not count:
        return 0.0
    mean = one / count
    variance = two / count - mean**2
    third = three / count - 3 * mean * two / count + 2 * mean**3
    return third / variance**1.5 if variance > 1e-9 else 0.0


def _score_window(index: Index, opened: Sampled, report: Report) -> tuple[bytes, bytes, Moments]:
    """Return the candidates of one window at the picker's own sign and at the other one, and its moments."""
    own = opened.candidates(index, negate=False)
    other = opened.candidates(index, negate=True)
    report({"done": 1, "windows": 2})
    return own.tobytes(), other.tobytes(), opened.moments(index)


def _with_voxels(indices: Iterable[Index], volume: Volume, window: Window) -> Iterator[Index]:
    """Yield the windows that are not all constant fill."""
    for index in indices:
        spans: list[Span] = []
        for axis, (k, length) in enumerate(zip(index, volume.shape, strict=True)):
            start, stop = window.span(axis, k)
            spans.append((max(0, start), min(stop, length)))
        if volume.fill is None or not np.asarray(volume.fill[box_of(tuple(spans))]).all():
            yield index


def _doubt(finding: Finding) -> str:
    """Return what is doubtful, for people."""
    if finding.is_empty:
        return f"{finding.contrast} protein is taken, as in the picker's training: nothing was found"
    if finding.scores[finding.contrast] < LITTLE:
        why = ", by the grey values alone" if finding.skewness else ""
        return f"{finding.contrast} protein is taken{why}: little was found"
    return f"{finding.contrast} protein is taken, but the picker finds nearly as much at the other sign"


def _from_json(key: str, kept: dict[str, Any]) -> Finding:
    try:
        finding = Finding(**kept)
        str(finding)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the object receipts/{_RECEIPTS}/{key}.json of the volume's store is no finding ({error})",
            expected="contrast, windows, picks and scores",
            remedy="delete that object and run again",
        ) from error
    return finding


def _other(look: str) -> Look:
    return "bright" if look == "dark" else "dark"
