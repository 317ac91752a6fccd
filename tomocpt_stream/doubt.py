"""Where a particle may be that nobody labelled: the candidates that no label explains.

Labels that are true but not complete would teach a network that the particles left out are none. So
nothing is learnt around a candidate that looks like a particle as much as the labelled ones do, by the map
of the picker that learns on or, where there is none yet, by the mean of the labelled particles themselves.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.spatial import KDTree

from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.crops import DOUBT, Sampling, known_at, read_crop
from tomocpt_stream.heatmap import CANDIDATE_FLOOR, PickOptions, predict
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import config_hash

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.crops import Example
    from tomocpt_stream.frame import Points
    from tomocpt_stream.heatmap import Contrast, Scorer
    from tomocpt_stream.volume import Volume

Float32 = npt.NDArray[np.float32]

# A candidate has to score so much of what all but a twentieth of the labelled particles score: less than
# they do, for they were taught to the scorer, or are in its mean.
_QUANTILE, _LENIENT = 0.05, 0.7
# Of what was annotated so much may become unknown: a network must see some background. Measured at
# this many even places along each axis.
_MOST, _SAMPLES = 0.5, 27
# Labelled particles that a mean is made of: more would not change it.
_ENOUGH = 300


class Doubt(NamedTuple):
    """Places (n, 3) zyx working voxels that may be particles, all of at least the score `level`.

    `candidates` of the map were looked at; labels explain `explained` of them.
    """

    places: Points
    level: float
    candidates: int
    explained: int


@dataclass(frozen=True, eq=False)
class MeanParticle:
    """A scorer that looks for the mean of labelled particles, all directions taken together.

    `shells` are mean normalised intensities by the distance from a centre, 0, 1, 2... voxels.
    """

    shells: npt.NDArray[np.float64]
    particle_radius: float

    @classmethod
    def of(cls, chosen: Example, radius: float) -> MeanParticle:
        """Return the mean of the particles of an example, by the first few hundred of them."""
        reach = math.ceil(DOUBT * radius)
        sampling = Sampling(Window((2 * reach + 1,) * 3, (0, 0, 0)), radius)
        sums, counts = np.zeros(reach + 2), np.zeros(reach + 2)
        for centre in chosen.certain[:_ENOUGH]:
            middle = np.rint(centre)
            start = middle.astype(np.int64) - reach
            voxels, _ = read_crop(replace(chosen, negate=False), start.tolist(), sampling)
            # Each voxel counts for the two shells that it lies between.
            away = np.minimum(_distances(reach, centre - middle), reach + 0.5)
            shell = away.astype(np.int64)
            for step, share in ((0, 1 - away + shell), (1, away - shell)):
                weights = share.ravel()
                sums += np.bincount((shell + step).ravel(), weights * voxels.ravel(), reach + 2)
                counts += np.bincount((shell + step).ravel(), weights, reach + 2)
        return cls((sums / np.maximum(counts, 1e-9))[: reach + 1], radius)

    @property
    def window(self) -> Window:
        """What it sees at once."""
        reach = len(self.shells) - 1
        edge = 64 + 2 * reach
        return Window((edge, edge, edge), (reach, reach, reach))

    @property
    def fingerprint(self) -> str:
        """Of all that its scores follow from."""
        return hashlib.sha256(b"mean particle 1" + self.shells.tobytes()).hexdigest()

    def score(self, batch: Float32) -> Float32:
        """Return 0.5 where a window holds the mean particle, less where it holds less of it, from 0 to 1."""
        reach = len(self.shells) - 1
        shape = batch.shape[1:]
        found = fft.irfftn(fft.rfftn(batch, axes=(1, 2, 3)) * self._spectrum, shape, axes=(1, 2, 3))
        # The kernel begins at the window's first voxel, and so lies `reach` voxels before its middle.
        found = np.roll(found, (-reach, -reach, -reach), axis=(1, 2, 3))
        return np.asarray(np.clip(found, 0, 1), dtype=np.float32)

    @cached_property
    def _spectrum(self) -> npt.NDArray[np.complex64]:
        """The transform of the kernel, which is even, has no mean and gives the mean particle 0.5."""
        reach = len(self.shells) - 1
        away = _distances(reach, np.zeros(3))
        kernel = np.interp(away, np.arange(reach + 1), self.shells)
        inside = away <= reach
        kernel = np.where(inside, kernel - kernel[inside].mean(), 0)
        kernel *= 0.5 / max((kernel * kernel).sum(), 1e-12)
        spectrum: npt.NDArray[np.complex64] = fft.rfftn(kernel.astype(np.float32), self.window.shape)
        return spectrum


def find_doubtful(
    chosen: Example,
    volume: Volume,
    scorer: Scorer | None,
    folder: Path,
    *,
    radius: float,
    contrast: Contrast = "dark",
    progress: Progress = silent,
) -> Doubt:
    """Return the candidates of an example that no particle of any kind explains and that are as good.

    The map of `scorer`, or where it is None of the mean labelled particle, is kept in `folder`, and a
    search that was killed goes on there. A candidate is explained by a particle within `radius` working
    voxels. As good is one that scores 0.7 of what all but a twentieth of the labelled particles do; the best
    of them are taken until half of what was annotated would be unknown.
    """
    found: Scorer = MeanParticle.of(chosen, radius) if scorer is None else scorer
    # The mean is of the intensities as they are, whichever way protein looks.
    seen: Contrast = "dark" if scorer is None else contrast
    options = PickOptions(2 * radius * volume.voxel_size, CANDIDATE_FLOOR, contrast=seen, stitch="crop")
    plan = plan_blocks(volume.shape, found.window, stitch="crop", batch_size=options.batch_size)
    name = config_hash({"scorer": getattr(found, "fingerprint", None), "contrast": seen})
    heatmap = predict(
        volume, found, plan, store=folder / f"candidates-{name[:12]}.zarr", options=options, progress=progress
    )
    picks = find_peaks(heatmap, threshold=CANDIDATE_FLOOR, min_distance=radius)
    places = volume.grid.to_working(volume.frame.to_source(picks.zyx))
    return unexplained(chosen, places, picks.score.astype(np.float64), radius)


def unexplained(chosen: Example, places: Points, scores: npt.NDArray[np.float64], radius: float) -> Doubt:
    """Return the candidates, best first, that no particle explains and that score as labelled ones do."""
    labels = np.concatenate([chosen.certain, chosen.others])
    if not len(places) or not len(chosen.certain):
        return Doubt(np.zeros((0, 3)), CANDIDATE_FLOOR, len(places), 0)
    away, _ = KDTree(labels).query(places)
    free = away > radius
    # What a label scores: its best candidate, or nothing.
    near = KDTree(places).query_ball_point(chosen.certain, radius)
    own = [max((float(scores[k]) for k in some), default=0.0) for some in near]
    level = max(CANDIDATE_FLOOR, _LENIENT * float(np.quantile(own, _QUANTILE)))
    good = np.flatnonzero(free & (scores >= level))
    good = good[known_at(chosen, places[good])]
    best = good[np.argsort(-scores[good], kind="stable")]
    best = best[: _most(chosen, places[best], radius)]
    return Doubt(places[best], level, len(places), int((~free).sum()))


def _most(chosen: Example, places: Points, radius: float) -> int:
    """Return how many of the places, best first, may be doubtful: by even samples of what was annotated."""
    axes = [(np.arange(_SAMPLES) + 0.5) * length / _SAMPLES - 0.5 for length in chosen.volume.shape]
    samples = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    samples = samples[known_at(chosen, samples)]
    explained, _ = KDTree(np.concatenate([chosen.centres, chosen.others])).query(samples)
    reach = np.minimum(explained, DOUBT * radius)
    # The first place of all that makes a sample unknown; with more places it stays so.
    near = KDTree(places.reshape(-1, 3)).query_ball_point(samples, reach)
    first = np.sort([min(some, default=len(places)) for some in near])
    allowed = int(_MOST * len(samples))
    return int(first[allowed]) if allowed < len(first) else len(places)


def _distances(reach: int, offset: Points) -> npt.NDArray[np.float64]:
    """Return the distances of a cube's voxels from its middle moved by `offset` (zyx voxels)."""
    z, y, x = (np.arange(-reach, reach + 1) - at for at in offset)
    distances: npt.NDArray[np.float64] = np.sqrt(
        z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
    )
    return distances
