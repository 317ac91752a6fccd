"""Tomograms with their truth, as users have them: files and picks become examples to learn from."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import KDTree

from tomocpt_stream.crops import Example, example
from tomocpt_stream.doubt import find_doubtful
from tomocpt_stream.errors import ActionableError, FormatError, SourceError
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.known import open_region
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import VOLUME, level_for, plan_pick, scratch_folder
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import config_hash
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.truth_files import TruthFiles, same_voxels
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tomocpt_stream.frame import Grid, Points, Rule
    from tomocpt_stream.heatmap import Contrast, Scorer
    from tomocpt_stream.known import Annotated, Region
    from tomocpt_stream.picker import Picker
    from tomocpt_stream.tomogram import BeamAxis

# A crop that is seen more often than this in an epoch is learnt by heart.
_MOST_WEIGHT = 100.0
OTHER_KINDS = "*"

_LOGGER = logging.getLogger(__name__)


def _nowhere() -> Points:
    return np.zeros((0, 3))


@dataclass(frozen=True, eq=False)
class LabelledTomogram:
    """A tomogram with the truth of one kind of particle.

    Every particle of that kind is in `picks`, or in that part of the tomogram which is `annotated`: a mask
    (what `open_mask` takes) or a box, "z0:z1,y0:y1,x0:x1" in voxels of the file or three slices. Outside of
    it nothing is learnt. Where the picks are true but `partial`, nothing is learnt around candidates that
    no pick explains.

    `tomogram` is open, or what `open_tomogram` takes; `picks` are in its voxels, or a file of any format
    that `read_picks` knows: of several tomograms in it those of this one's name count, or of its tilt
    series', of several kinds those of `particle`. `diameter` (longest axis, Å) sets the working grid;
    `contrast` says how protein looks, "dark" or "bright". Tomograms of one `group` are all learnt from or
    all kept for validation; without one a tomogram is a group by itself. `origin` is how errors call it.

    `others` are particles of other kinds, picks or a file, or "*" for the other kinds of the file `picks`:
    half of the crops without a particle are drawn where they lie. `weight` is how often crops of this
    tomogram are seen in an epoch, 1 when not given. `voxel_size` (Å) comes before what the header of a
    tomogram that is not open yet states, and before what the file of picks says that it counts.
    """

    tomogram: Tomogram | str | Path
    picks: Picks | str | Path
    diameter: float
    contrast: str = "dark"
    particle: str = ""
    group: str = ""
    origin: str = field(default="", compare=False)
    annotated: Annotated | None = None
    partial: bool = False
    others: Picks | str | Path | None = None
    weight: float = 1.0
    voxel_size: float | None = None
    beam_axis: BeamAxis = "z"

    def __post_init__(self) -> None:
        """Refuse what no picker can be fed with."""
        for what, length in (("diameter", self.diameter), ("voxel size", self.voxel_size)):
            if length is not None and not (math.isfinite(length) and length > 0):
                raise SourceError(
                    f"{self}: a {what} of {length} Å",
                    expected="a positive number",
                    remedy="give the longest axis of the particle, or the edge of a voxel, in Å",
                )
        if self.contrast not in ("dark", "bright"):
            raise SourceError(
                f"{self}: contrast {self.contrast!r}",
                expected="dark or bright",
                remedy="say how protein looks in this tomogram",
            )
        if not (math.isfinite(self.weight) and 0 < self.weight <= _MOST_WEIGHT):
            raise SourceError(
                f"{self}: a weight of {self.weight}",
                expected=f"a number above 0, at most {_MOST_WEIGHT}",
                remedy="leave a tomogram that must not count out of the table",
            )
        if self.others == OTHER_KINDS and (isinstance(self.picks, Picks) or not self.particle):
            raise SourceError(
                f"{self}: others {OTHER_KINDS!r} without a file of several kinds",
                expected="a file of picks, and the kind of particle in it that is the target",
                remedy="name the particle, or give the picks of the other kinds",
            )

    def __str__(self) -> str:
        name = self.tomogram.name if isinstance(self.tomogram, Tomogram) else str(self.tomogram)
        return self.origin or name


@dataclass(frozen=True, eq=False)
class Opened:
    """A labelled tomogram whose header and picks were read: no voxel yet.

    `fingerprint` is that of all that its crops follow from: voxels, grid, centres, contrast, and where
    given the annotated region, the particles of other kinds, whether picks are partial, and the weight.
    """

    tomogram: Tomogram
    picks: Picks
    grid: Grid
    negate: bool
    group: str
    fingerprint: str
    region: Region | None = None
    others: Points = field(default_factory=_nowhere)
    """Voxels of the file."""
    partial: bool = False
    weight: float = 1.0
    contrast: Contrast = "dark"
    radius: float = 10.0
    """Of the particle, working voxels."""
    rule: Rule = "bspline"
    """How the working grid is sampled."""

    def ingest(self, folder: Path, *, scorer: Scorer | None = None, progress: Progress = silent) -> Example:
        """Return the example, its working volume streamed into `folder` unless it is there already.

        Of partial picks the candidates that none explains are its doubtful places: those of the map of
        `scorer`, which is kept in `folder`, or where it is None those that look like the mean particle.
        """
        place = folder / scratch_folder(self.tomogram, self.grid, self.rule)
        store, size = place / VOLUME, self.grid.voxel_size
        volume = ingest(self.tomogram, store, voxel_size=size, rule=self.rule, progress=progress)
        made = replace(
            example(volume, self.picks, negate=self.negate),
            annotated=self.region,
            others=self._working(self.others),
            weight=self.weight,
        )
        if not self.partial:
            return made
        doubt = find_doubtful(
            made, volume, scorer, place, radius=self.radius, contrast=self.contrast, progress=progress
        )
        _LOGGER.info(
            "%s: partial picks: %d of %d candidates score at least %.3g, as labelled particles do, and are "
            "none of them: nothing is learnt around them",
            self.tomogram.name,
            len(doubt.places),
            doubt.candidates,
            doubt.level,
        )
        return replace(made, doubtful=doubt.places)

    def _working(self, zyx: Points) -> Points:
        return self.grid.to_working(self.tomogram.frame.to_source(zyx))


def open_labelled(items: Iterable[LabelledTomogram], picker: Picker) -> list[Opened]:
    """Open tomograms and read their truth, for the particle radius and the contrast of a picker.

    Raises
    ------
    SourceError, FormatError
        One cannot be read, has most of its particles outside its volume, or is there twice at one
        diameter, so that a particle of one row would be a negative of the other. It names the row.
    """
    opened: list[Opened] = []
    seen: dict[str, str] = {}
    items = list(items)
    files = TruthFiles(use for item in items for use in _uses(item))
    for item in items:
        try:
            one = _open(item, picker, files)
        except (ActionableError, OSError) as error:
            kind = type(error) if isinstance(error, ActionableError) else SourceError
            raise _named(item, error, kind) from error
        place = scratch_folder(one.tomogram, one.grid)
        if place in seen:
            raise SourceError(
                f"{item} is the tomogram of {seen[place]} again, at the same diameter",
                expected="one row for a tomogram and a diameter",
                remedy="put all of its particles into one file",
            )
        seen[place] = str(item)
        opened.append(one)
    return opened


def _uses(item: LabelledTomogram) -> Iterator[tuple[str | Path, object]]:
    """Yield the files of picks that an item names, each with what tells its tomogram from others."""
    whole = item.tomogram
    user = config_hash(whole.fingerprint) if isinstance(whole, Tomogram) else str(whole)
    for path in (item.picks, item.others):
        if path is not None and not isinstance(path, Picks) and path != OTHER_KINDS:
            yield path, user


def _open(item: LabelledTomogram, picker: Picker, files: TruthFiles) -> Opened:
    whole = item.tomogram
    if not isinstance(whole, Tomogram):
        whole = open_tomogram(whole, voxel_size=item.voxel_size, beam_axis=item.beam_axis)
    voxel, extent = whole.frame.file_voxel_size, max(whole.frame.file_shape)
    if not 2 <= item.diameter / voxel <= extent:
        raise SourceError(
            f"a diameter of {item.diameter:g} Å, {item.diameter / voxel:.3g} voxels of {whole.name}",
            expected=f"at least 2 voxels, and no more than its longest edge of {extent}",
            remedy="give the longest axis of the particle in Å",
        )
    options = PickOptions(diameter=item.diameter)
    tomogram = level_for(whole, picker, options)
    grid, _ = plan_pick(tomogram, picker, options)
    for remark in tomogram.remarks():
        _LOGGER.warning("%s: %s", item, remark)
    picks = _within(_truth(item, tomogram, files), tomogram, item.diameter)
    if item.partial and not len(picks):
        raise SourceError(
            f"partial picks of {tomogram.name} without a single one",
            expected="at least one particle, by which others are known",
            remedy="leave the tomogram out, or pick some of its particles",
        )
    negate = item.contrast != picker.contrast
    made: dict[str, Any] = {
        "tomogram": tomogram.fingerprint,
        "grid": grid.to_json(),
        "centres": hashlib.sha256(picks.zyx.tobytes()).hexdigest(),
        "negate": negate,
    }
    # What is not asked for is not in the account, so that earlier runs stay what they were.
    region = None
    if item.annotated is not None:
        region, made["annotated"] = open_region(item.annotated, tomogram.frame, grid)
    others = _others(item, tomogram, picks, files)
    if len(others):
        made["others"] = hashlib.sha256(others.tobytes()).hexdigest()
    made |= {"partial": True} if item.partial else {}
    made |= {"weight": item.weight} if item.weight != 1 else {}
    made |= {"rule": picker.rule} if picker.rule != "bspline" else {}
    group = item.group or f"{tomogram.name} ({config_hash(tomogram.fingerprint)[:6]})"
    opened = Opened(
        tomogram,
        picks,
        grid,
        negate,
        group,
        config_hash(made),
        region,
        others,
        item.partial,
        item.weight,
        "bright" if item.contrast == "bright" else "dark",
        picker.particle_radius,
        picker.rule,
    )
    _refuse_nowhere(opened)
    return opened


def _refuse_nowhere(opened: Opened) -> None:
    """Refuse a region that has none of the particles: most likely it is another tomogram's."""
    if opened.region is None or not len(opened.picks):
        return
    frame, shape = opened.tomogram.frame, np.array(opened.grid.shape)
    places = opened.grid.to_working(frame.to_source(opened.picks.zyx))
    for z, y, x in np.rint(places).astype(np.int64).clip(0, shape - 1).tolist():
        if opened.region.inside(((z, z + 1), (y, y + 1), (x, x + 1))).any():
            return
    raise SourceError(
        f"none of {len(places)} particles in the annotated part of {opened.tomogram.name}",
        expected="a part of the tomogram in which the particles were annotated",
        remedy="check that mask or box belong to this tomogram, and the order z, y, x",
    )


def _others(item: LabelledTomogram, tomogram: Tomogram, picks: Picks, files: TruthFiles) -> Points:
    """Return the particles of other kinds, voxels of the file, without those that are of this kind."""
    if item.others is None:
        return _nowhere()
    if isinstance(item.others, Picks):
        return _apart(same_voxels(item.others, tomogram).zyx, picks, item.diameter, tomogram)
    every = item.others == OTHER_KINDS
    path = item.picks if every and not isinstance(item.picks, Picks) else item.others
    tables = files.read(path, tomogram, own_voxels=item.voxel_size is not None)
    chosen = [one.zyx for one in tables.own if not every or one.particle != item.particle]
    zyx = _apart(np.concatenate([_nowhere(), *chosen]), picks, item.diameter, tomogram)
    if not len(zyx):
        raise FormatError(
            f"no other particles of {tomogram.name!r} in {path}; its tomograms are {_some(tables.names)}; "
            f"kinds {_some(tables.kinds)}",
            expected="particles that are not of this kind, of this tomogram by its name",
            remedy="leave others out, or correct the names",
        )
    return zyx


def _apart(zyx: Points, picks: Picks, diameter: float, tomogram: Tomogram) -> Points:
    """Return the places that are no pick: farther than a quarter of a diameter from each."""
    if not len(picks) or not len(zyx):
        return zyx
    away, _ = KDTree(picks.zyx).query(zyx)
    apart: Points = zyx[away > diameter / 4 / tomogram.frame.file_voxel_size]
    return apart


def _truth(item: LabelledTomogram, tomogram: Tomogram, files: TruthFiles) -> Picks:
    """Return the picks of an item, in voxels of the tomogram's file."""
    if isinstance(item.picks, Picks):
        return same_voxels(item.picks, tomogram)
    wanted = item.particle or None
    tables = files.read(item.picks, tomogram, particle=wanted, own_voxels=item.voxel_size is not None)
    found = [table for table in tables.own if wanted is None or table.particle in (wanted, "")]
    if len(found) == 1:
        return found[0]
    # A file without any pick, or one that has the tomogram, and this kind of particle only in others.
    if not tables.names or (tables.listed and not found and wanted in tables.kinds):
        _LOGGER.warning("%s: no particle in %s; all of it is learnt as background", item, item.picks)
        return Picks(_nowhere(), np.zeros(0, np.float32), tomogram=tomogram.name)
    kinds = sorted({table.particle for table in found or tables.own})
    raise FormatError(
        f"{item.picks} has {len(found)} tables for {tomogram.name!r}"
        + (f" of {wanted!r}" if wanted else "")
        + f"; its tomograms are {_some(tables.names)}"
        + (f"; kinds {_some(kinds)}" if kinds else ""),
        expected="one table: a tomogram by its name or its tilt series', and one kind of particle",
        remedy="correct the tomogram's name or the particle; a tomogram that has none takes an empty file",
    )


def _within(picks: Picks, tomogram: Tomogram, diameter: float) -> Picks:
    """Return the particles that reach into a tomogram; refuse picks that mostly do not."""
    frame = tomogram.frame
    margin = diameter / 2 / frame.file_voxel_size
    beyond = (picks.zyx < -margin) | (picks.zyx > np.array(frame.file_shape) - 1 + margin)
    there = np.asarray(~beyond.any(axis=1))
    outside = len(picks) - int(there.sum())
    if 2 * outside > len(picks):
        raise SourceError(
            f"{outside} of {len(picks)} particles outside {tomogram.name} of {frame.file_shape} voxels (zyx)",
            expected="coordinates in the voxels of this tomogram",
            remedy="check the voxel size that the coordinates were written with, and their axes",
        )
    if not outside:
        return picks
    _LOGGER.warning(
        "%s: %d of %d particles lie outside of its %s voxels (zyx) and are left out",
        tomogram.name,
        outside,
        len(picks),
        frame.file_shape,
    )
    return picks.take(there)


def _named(
    item: LabelledTomogram, error: ActionableError | OSError, kind: type[ActionableError]
) -> ActionableError:
    if isinstance(error, ActionableError):
        return kind(f"{item}: {error.found}", expected=error.expected, remedy=error.remedy)
    return kind(f"{item}: {error}", expected="files that can be read", remedy="check the paths")


def _some(names: Iterable[str]) -> str:
    def shown() -> Iterator[str]:
        for index, name in enumerate(names):
            if index < 10:
                yield repr(name)
            elif index == 10:
                yield "and more"

    return ", ".join(shown()) or "none"
