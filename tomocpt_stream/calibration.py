"""Where a picker's threshold lies: its scores are shifted until 0.3 is the best one on known truth."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.crops import Sampling, known_at, read_crop
from tomocpt_stream.evaluation import match
from tomocpt_stream.memory import freed_memory_kept
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.picks import Picks
from tomocpt_stream.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from tomocpt_stream.crops import Example
    from tomocpt_stream.picker import Picker

_LOGGER = logging.getLogger(__name__)

LEAST_PARTICLES = 10
"""With fewer to be found, one more or less would move the best threshold anywhere."""

_USUAL = 0.3
_BATCH = 4  # windows scored at once; a third faster than one at a time on a CPU
_THRESHOLDS = np.round(np.arange(0.05, 0.985, 0.01), 2)


def calibrate(
    picker: Picker,
    examples: Sequence[Example],
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Picker:
    """Return the picker with its scores shifted so that 0.3 is its best threshold on `examples`.

    Equation 9 weighs a particle's voxels some fifty times, so an answer of 0.3 is given where a particle
    is unlikely. One constant on all logits moves the threshold of the highest F1 (all examples pooled,
    matches within half a diameter) to the usual 0.3; no pick overtakes another. What lies outside an
    example, or where nothing is known of it, counts neither way. With fewer than 10 particles, or none of
    them found, the scores stay; the log and the provenance say so. The map of one example at a time is
    held in memory.
    """
    counts = np.zeros((len(_THRESHOLDS), 3), dtype=np.int64)
    particles = sum(int(_inside(item).sum()) for item in examples)
    if particles >= LEAST_PARTICLES:
        with freed_memory_kept():
            for done, item in enumerate(examples):
                counts += _counts(picker, item)
                progress("calibrate", done + 1, len(examples))
    record, shift = _best(counts), 0.0
    if particles < LEAST_PARTICLES:
        record = {"remark": f"{particles} validation particles, fewer than {LEAST_PARTICLES}"}
    elif not record["f1"]:
        record = {"remark": f"none of {particles} validation particles found"}
    if "remark" in record:
        _LOGGER.warning("scores are not calibrated: %s", record["remark"])
    else:
        best = record["threshold"]
        shift = math.log(_USUAL / (1 - _USUAL)) - math.log(best / (1 - best))
        _LOGGER.info(
            "calibrated on %d particles: threshold %.2f becomes %.1f, F1 %.3f",
            particles,
            best,
            _USUAL,
            record["f1"],
        )
    record |= {"shift": shift, "particles": particles}
    return picker.shifted(shift, **(provenance or {}), calibration=record)


def _best(counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the best threshold, the middle of the plateau of the best ones, and its F1."""
    tp, fp, fn = counts.T
    scores = 2 * tp / np.maximum(1, 2 * tp + fp + fn)
    best = float(np.median(_THRESHOLDS[scores >= scores.max() - 0.005]))
    return {"threshold": best, "f1": float(scores.max())}


def _counts(picker: Picker, item: Example) -> npt.NDArray[np.int64]:
    """Return the pairs, the picks alone and the particles alone, a row a threshold."""
    radius = picker.particle_radius
    picks = find_peaks(_heatmap(picker, item), threshold=float(_THRESHOLDS[0]), min_distance=1.5 * radius)
    picks = picks.take(known_at(item, picks.zyx, radius))
    truth = Picks(item.centres, np.ones(len(item.centres), dtype=np.float32))
    inside, rows = _inside(item), []
    for threshold in _THRESHOLDS:
        found = match(picks.above(float(threshold)), truth, tolerance=radius)
        pairs = int(inside[found.pairs[:, 1]].sum())
        rows.append((pairs, found.fp, int(inside.sum()) - pairs))
    return np.array(rows, dtype=np.int64)


def _inside(item: Example) -> npt.NDArray[np.bool_]:
    """Return which particles have their centre in the volume, where the truth is known."""
    inside: npt.NDArray[np.bool_] = np.all(
        (item.centres > -0.5) & (item.centres < np.array(item.volume.shape) - 0.5), axis=1
    )
    return inside & known_at(item, item.centres)


def _heatmap(picker: Picker, item: Example) -> npt.NDArray[np.float32]:
    """Return the whole map of one example, its windows cropped, in memory."""
    window, shape = picker.window, item.volume.shape
    sampling = Sampling(window=window, radius=picker.particle_radius)
    scores = np.empty(shape, dtype=np.float32)
    own = tuple(slice(h, n - h) for h, n in zip(window.halo, window.shape, strict=True))
    places = list(np.ndindex(*window.lattice(shape)))
    for first in range(0, len(places), _BATCH):
        some = places[first : first + _BATCH]
        starts = [[window.span(axis, k)[0] for axis, k in enumerate(index)] for index in some]
        batch = np.stack([read_crop(item, start, sampling)[0] for start in starts])
        for index, answer in zip(some, picker.score(batch), strict=True):
            inner = tuple(slice(k * s, (k + 1) * s) for k, s in zip(index, window.stride, strict=True))
            target = scores[inner]
            target[:] = answer[own][tuple(slice(0, n) for n in target.shape)]
    return scores
