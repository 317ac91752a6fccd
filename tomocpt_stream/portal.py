"""The CZ CryoET Data Portal: which tomograms it has, and which of them to pick.

Nothing here reads a voxel. What is found are plain records, which `open_tomogram` takes, and which may
be pickled, kept in a file (`Selection.write`) and sent to other machines.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec
from warnings import warn

from tomocpt_stream.errors import PortalError
from tomocpt_stream.frame import working_grid
from tomocpt_stream.lattice import Window
from tomocpt_stream.portal_queries import PortalAPI
from tomocpt_stream.portal_records import LeftOut, Selection, TomogramRecord, by_place
from tomocpt_stream.portal_scope import (
    Ids,
    Meaning,
    Scope,
    find_records,
    in_frames,
    read_scope,
    survey_wheres,
)
from tomocpt_stream.portal_selection import (
    HALVES,
    Filter,
    Flag,
    Prefer,
    choose,
    filters,
    listed,
    plural,
    preference,
    sift,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tomocpt_stream.portal_annotations import find_masks as find_masks
    from tomocpt_stream.portal_annotations import find_picks as find_picks

__all__ = [
    "PortalAPI",
    "Selection",
    "TomogramRecord",
    "find_masks",
    "find_picks",
    "find_tomograms",
    "select_tomograms",
    "summary",
    "survey",
]

P = ParamSpec("P")
CHUNK = 256
"""Edge of a stored chunk of the portal's zarr arrays, in voxels."""


def select_tomograms(  # noqa: PLR0913  (each is a question that somebody asks)
    *,
    deposition: Ids | None = None,
    dataset: Ids | None = None,
    run: Ids | None = None,
    tomogram: Ids | None = None,
    meaning: Meaning | None = None,
    voxel_spacing: float | tuple[float, float] | None = None,
    processing: str | Sequence[str] | None = None,
    reconstruction: str | Sequence[str] | None = None,
    software: str | None = None,
    organism: str | None = None,
    standard: Flag | None = None,
    alignment_standard: Flag | None = None,
    visualization_default: Flag | None = None,
    ctf_corrected: Flag | None = None,
    author_submitted: Flag | None = None,
    has_ground_truth: bool | str | None = None,
    where: Callable[[TomogramRecord], bool] | None = None,
    near: float | None = None,
    prefer: Prefer | None = None,
    all: bool = False,  # noqa: A002  (the word that the command has, too)
    api: PortalAPI | None = None,
) -> Selection:
    """Return the tomograms to pick, what was left out and why, and what was decided on the way.

    Parameters
    ----------
    deposition, dataset, run, tomogram
        Where to look; all that are given must hold. Ids with or without the portal's prefixes
        (CZCDP-10310, DS-10440, RN-, TM-), one or several; a run also by its name, or a glob of names.
    meaning
        What a deposition means: "tomograms" submitted in it, those of its "datasets", or those that its
        "annotations" lie on; otherwise the first of these that has any, which `notes` then says.
    voxel_spacing
        Å, within 0.01, or a pair of the least and the greatest.
    processing
        "raw", "filtered", "denoised", "filtered_even", "filtered_odd", or several of them.
    reconstruction
        "WBP", "SART", "SIRT", "Fourier Space", "Unknown", or several of them.
    software, organism
        Globs: of the software of processing or reconstruction, of the dataset's organism.
    standard, alignment_standard, visualization_default, ctf_corrected, author_submitted
        True, False, "unknown" where the portal does not say, or a tuple of these. False is not "unknown".
    has_ground_truth
        Whether there are ground truth annotations of the tomogram's voxel spacing and alignment; the name
        (a glob) or the id (GO:...) of their object.
    where
        Any other condition.
    near
        Å; of the tomograms of a run one of the voxel spacing nearest to this is taken.
    prefer
        How one of each run is taken: an order of processings in place of raw, filtered, denoised; a
        function whose least value wins; or "all". See `portal_selection.preference`.
    all
        Take every tomogram. It is so, too, where tomograms are asked for by their ids.
    api
        The way to the portal: its endpoint, cache, patience.

    Raises
    ------
    PortalError
        The portal does not answer, something asked for is not there, or no tomogram is left: the message
        names the condition that left none.
    """
    api = api or PortalAPI()
    scope = read_scope(deposition=deposition, dataset=dataset, run=run, tomogram=tomogram, meaning=meaning)
    conditions = filters(
        voxel_spacing=voxel_spacing,
        processing=processing,
        reconstruction=reconstruction,
        software=software,
        where=where,
        standard=standard,
        alignment_standard=alignment_standard,
        visualization_default=visualization_default,
        ctf_corrected=ctf_corrected,
        author_submitted=author_submitted,
    )
    everything = _takes_all(scope, near, prefer, everything=all)
    if not everything:
        preference((), near=near, prefer=prefer)  # a mistake shows before any request
    records, notes = find_records(scope, api)
    usable, useless = _usable(records, scope)
    if organism is not None:
        conditions.append(_organism_filter(organism, usable, api))
    if has_ground_truth is not None:
        conditions.append(_truth_filter(usable, api, wanted=has_ground_truth))
    left, out = sift(usable, conditions, str(scope))
    chosen = Selection(tuple(sorted(left, key=by_place)), (), ("Every tomogram is taken.",))
    if not everything:
        chosen = choose(left, preference(left, near=near, prefer=prefer), halves=processing is not None)
        _refuse_none(chosen, left, scope)
    out = sorted([*useless, *out, *chosen.left_out], key=lambda each: by_place(each.record))
    told = (*notes, *chosen.notes, *_file_notes(chosen.records))
    return Selection(chosen.records, tuple(out), told, chosen.ties)


def _find(select: Callable[P, Selection]) -> Callable[P, list[TomogramRecord]]:
    """Return a function with the arguments of `select_tomograms` that returns the records alone."""

    def find_tomograms(*args: P.args, **kwargs: P.kwargs) -> list[TomogramRecord]:
        """Return the tomograms to pick, in stable order: dataset, run as people count, tomogram.

        The arguments are those of `select_tomograms`. Where the preference does not settle which
        tomogram of a run to take, one is taken and a warning says so.

        Raises
        ------
        PortalError
            As for `select_tomograms`.
        """
        selection = select(*args, **kwargs)
        for tie in selection.ties:
            warn(tie, stacklevel=2)
        return list(selection.records)

    signature = inspect.signature(select).replace(return_annotation="list[TomogramRecord]")
    find_tomograms.__signature__ = signature  # type: ignore[attr-defined]  # what help() shows
    find_tomograms.__qualname__ = "find_tomograms"
    return find_tomograms


find_tomograms = _find(select_tomograms)


def survey(
    *,
    deposition: Ids | None = None,
    dataset: Ids | None = None,
    meaning: Meaning | None = None,
    api: PortalAPI | None = None,
) -> list[dict[str, Any]]:
    """Return how many tomograms there are of each kind, from one request; none of them is listed.

    Each kind has "tomograms", "bytes_zarr" (of all levels), "bytes_mrc", "voxel_spacing" (Å), "processing"
    and "reconstruction"; the commonest comes first. Nothing is left out, and nothing chosen. A deposition
    means the tomograms submitted in it, or else those of its datasets.

    Raises
    ------
    PortalError
        There are none, they are those that annotations lie on, or the portal does not answer.
    """
    api = api or PortalAPI()
    scope = read_scope(deposition=deposition, dataset=dataset, meaning=meaning)
    if meaning == "annotations":
        raise PortalError(
            "meaning=annotations for a survey",
            expected="tomograms, or datasets: what annotations lie on takes a listing",
            remedy="use summary(select_tomograms(...))",
        )
    groups: list[dict[str, Any]] = []
    for where in survey_wheres(scope):
        groups = groups or api.totals(
            "tomograms",
            where,
            sums=("fileSizeOmezarr", "fileSizeMrc"),
            by=("voxelSpacing", "processing", "reconstructionMethod"),
        )
    if not groups:
        raise PortalError(
            f"{scope} without a tomogram of its own or of its datasets",
            expected="at least one",
            remedy="check the id; select_tomograms says what is not there",
        )
    kinds = [
        {
            "tomograms": group["count"],
            "voxel_spacing": group["voxelSpacing"],
            "processing": group["processing"],
            "reconstruction": group["reconstructionMethod"],
            "bytes_zarr": float(group["fileSizeOmezarr"] or 0),
            "bytes_mrc": float(group["fileSizeMrc"] or 0),
        }
        for group in groups
    ]
    return sorted(kinds, key=lambda kind: (-kind["tomograms"], *map(str, kind.values())))


def summary(
    selection: Selection | Sequence[TomogramRecord],
    *,
    level: int = 0,
    voxel_size: float | None = None,
    window: Window | None = None,
    windows_per_second: float | None = None,
    bytes_per_second: float | None = None,
) -> dict[str, Any]:
    """Return what picking some tomograms costs, from their records alone; nothing is asked or read.

    `level` is the one of each zarr that is read; an MRC file has level 0 only. `voxel_size` is that of
    the working grid in Å, each tomogram's own where it is None. The windows are those of all tomograms,
    before any of them is left out as fill or by a mask. `seconds` is the longer of reading and scoring,
    which go on at the same time; None where the rate of either is unknown.

    Raises
    ------
    PortalError
        A level that the portal does not have, or a rate that is none.
    """
    records = selection.records if isinstance(selection, Selection) else tuple(selection)
    if level not in (0, 1, 2):
        raise PortalError(
            f"level {level}", expected="0, 1 or 2", remedy="the portal's tomograms have three levels"
        )
    rates = (windows_per_second, bytes_per_second, voxel_size)
    if any(rate is not None and not 0 < rate < math.inf for rate in rates):
        raise PortalError(
            f"rates and sizes of {rates}", expected="numbers above zero, or None", remedy="correct them"
        )
    window = window or Window()
    windows, chunks, size = 0, 0, 0.0
    for record in records:
        read_level = level if record.s3_zarr else 0
        spacing = record.voxel_spacing * 2**read_level
        shape = record.shape_at(read_level)
        working = working_grid(shape, spacing, voxel_size or spacing).shape
        windows += math.prod(window.lattice(working))
        chunks += math.prod(-(-length // CHUNK) for length in shape)
        size += record.bytes_at(read_level)
    seconds = None
    if windows_per_second is not None and bytes_per_second is not None:
        seconds = max(windows / windows_per_second, size / bytes_per_second)
    return {
        "tomograms": len(records),
        "runs": len({(record.dataset_id, record.run_id) for record in records}),
        "datasets": len({record.dataset_id for record in records}),
        "level": level,
        "bytes": size,
        "bytes_stored": float(sum(record.bytes_zarr or record.bytes_mrc or 0 for record in records)),
        "chunks": chunks,
        "windows": windows,
        "seconds": seconds,
        "voxel_spacings": _counts(round(record.voxel_spacing, 3) for record in records),
        "processing": _counts(record.processing for record in records),
        "reconstruction": _counts(record.reconstruction for record in records),
    }


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _takes_all(scope: Scope, near: float | None, prefer: Prefer | None, *, everything: bool) -> bool:
    """Return whether every tomogram is taken, not one of each run.

    Raises
    ------
    PortalError
        Everything is asked for, and a preference.
    """
    preferred = near is not None or prefer not in (None, "all")
    if preferred and everything:
        raise PortalError(
            "all together with near or prefer",
            expected="every tomogram (all), or one of each run by a preference",
            remedy="leave one of them out",
        )
    return everything or prefer == "all" or (bool(scope.tomograms) and not preferred)


def _usable(records: Sequence[TomogramRecord], scope: Scope) -> tuple[list[TomogramRecord], list[LeftOut]]:
    """Return the records of what can be opened, and the others."""
    useless = [LeftOut(record, why) for record in records if (why := _useless(record))]
    without = {each.record.id for each in useless}
    usable = [record for record in records if record.id not in without]
    if not usable:
        raise PortalError(
            f"{scope} has {plural(len(records), 'tomogram')}, and none that can be read: {useless[0].why}",
            expected="a tomogram with a zarr or an MRC file",
            remedy="ask for something else",
        )
    return usable, useless


def _useless(record: TomogramRecord) -> str:
    if record.source is None:
        return "the portal names no zarr and no MRC file"
    if not 0 < record.voxel_spacing < math.inf or min(record.size) < 1:
        return f"the portal states a voxel spacing of {record.voxel_spacing:g} Å and a size of {record.size}"
    return ""


def _organism_filter(pattern: str, records: Sequence[TomogramRecord], api: PortalAPI) -> Filter:
    rows = api.lookup({"datasets": (["organismName"], {record.dataset_id for record in records} - {0})})[
        "datasets"
    ]
    names = {number: row["organismName"] or "unknown organism" for number, row in rows.items()}

    def read(record: TomogramRecord) -> str:
        return str(names.get(record.dataset_id, "unknown organism"))

    return Filter(
        f"organism={pattern!r}",
        lambda record: fnmatchcase(read(record).casefold(), pattern.casefold()),
        read,
    )


def _truth_filter(records: Sequence[TomogramRecord], api: PortalAPI, *, wanted: bool | str) -> Filter:
    """Return the condition that a tomogram has ground truth, or has some of an object."""
    annotation: dict[str, Any] = {"groundTruthStatus": {"_eq": True}}
    if isinstance(wanted, str) and ":" in wanted:
        annotation["objectId"] = {"_eq": wanted}
    elif isinstance(wanted, str):
        annotation["objectName"] = {"_ilike": _as_pattern(wanted)}
    files = api.rows(
        "annotationFiles",
        ("tomogramVoxelSpacingId", "alignmentId"),
        {"annotationShape": {"annotation": annotation}},
        key="tomogramVoxelSpacingId",
        ids={record.voxel_spacing_id for record in records if record.voxel_spacing_id is not None},
    )
    frames = {(file["tomogramVoxelSpacingId"], file["alignmentId"]) for file in files}
    places = {record.id: (record.voxel_spacing_id, record.alignment_id, record.run_id) for record in records}
    having = in_frames(places, frames, api)

    def has(record: TomogramRecord) -> bool:
        return record.id in having

    return Filter(
        f"has_ground_truth={wanted}",
        lambda record: has(record) == bool(wanted),
        lambda record: "ground truth" if has(record) else "none",
    )


def _as_pattern(glob: str) -> str:
    """Return a glob of * and ? as an SQL pattern."""
    plain = "".join(f"\\{sign}" if sign in "\\%_" else sign for sign in glob)
    return plain.replace("*", "%").replace("?", "_")


def _refuse_none(chosen: Selection, left: Sequence[TomogramRecord], scope: Scope) -> None:
    if not chosen.records:
        raise PortalError(
            f"{scope} has {plural(len(left), 'tomogram')} with all that was asked for, and each holds half "
            f"of the data ({', '.join(HALVES)})",
            expected="at least one of all the data",
            remedy="pass processing or all to get these",
        )


def _file_notes(records: Sequence[TomogramRecord]) -> list[str]:
    """Return what should be known about the files of the tomograms that were taken."""
    flat = [record.id for record in records if record.s3_zarr is None]
    if not flat:
        return []
    which = "this tomogram" if len(flat) == 1 else "these tomograms"
    return [f"The portal has no zarr of {which}, whose MRC file is read: {listed(flat)}."]


def __getattr__(name: str) -> object:
    """Load the functions for annotations when they are first used."""
    if name not in ("find_picks", "find_masks"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tomocpt_stream.portal_annotations"), name)
