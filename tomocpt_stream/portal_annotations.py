"""Annotations of the CZ CryoET Data Portal: points as picks, segmentations as masks.

The portal's points are voxels of their tomogram, 0 at the centre of the first one, as picks are.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote

import numpy as np

from tomocpt_stream.annotation_files import (
    MASK,
    POINTS,
    AnnotationRecord,
    Placed,
    PointShape,
    Wanted,
    listed,
    place_annotations,
    refusals,
    tomogram_names,
)
from tomocpt_stream.errors import ActionableError, FormatError, PortalError, SourceError
from tomocpt_stream.formats.ndjson import LARGEST_FILE, PointRecords, parse_ndjson
from tomocpt_stream.picks import Picks
from tomocpt_stream.portal_queries import PortalAPI
from tomocpt_stream.receipts import read_bytes
from tomocpt_stream.remote import RemoteStore, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tomocpt_stream.portal_records import TomogramRecord

Missing = Literal["error", "skip"]

# Files under way at once: they are small, and each costs a round trip.
READS = 16


@dataclass(frozen=True)
class PortalPicks:
    """Picks by tomogram name, the annotation files they were read from, and what somebody should know."""

    picks: dict[str, Picks]
    annotations: tuple[AnnotationRecord, ...]
    notes: tuple[str, ...] = ()


def find_picks(  # noqa: PLR0913  (the public signature of the design)
    records: Sequence[TomogramRecord],
    *,
    object: str | None = None,  # noqa: A002  (the portal's word)
    ground_truth: bool | None = None,
    method: str | None = None,
    shape: PointShape | None = None,
    deposition: int | str | None = None,
    annotation: int | str | None = None,
    missing: Missing = "error",
    api: PortalAPI | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Picks]:
    """Return the points that people put on tomograms, in voxels of their level 0, by tomogram name.

    A tomogram without such points has no entry. The portal keeps no scores: each is 1. The names are
    those of `tomogram_names`; `particle` is the object's name. What `fetch_picks` notes is warned about.

    Parameters
    ----------
    records
        Tomograms as `find_tomograms` returns them. Points lie on one whose voxel spacing and alignment
        are theirs; those on another alignment are refused.
    object
        A name with the wildcards * ? [ ], or an id such as GO:0022626, without regard to case. Left out,
        all points must be of one object.
    ground_truth
        True or False takes what is said to be ground truth, or not to be any.
    method
        "manual", "automated", "hybrid", "simulated", or a method's name with wildcards.
    shape
        "OrientedPoint", "Point" or "InstanceSegmentation". Left out, the first of these that an
        annotation has.
    deposition, annotation
        Their numbers, with or without CZCDP- or AN-.
    missing
        "skip" leaves out tomograms one of whose files is not there or cannot be read, and says so.
    storage_options
        As for `open_tomogram`, for the store of the files.

    Raises
    ------
    PortalError
        The portal does not answer; nothing fits (the message says which filter left none); points of
        several objects fit; or a file is not there.
    FormatError
        A file is none of points; the message names its line.
    SourceError
        The store does not answer or refuses a file.
    """
    found = fetch_picks(
        records,
        Wanted(
            object=object,
            ground_truth=ground_truth,
            method=method,
            deposition=number_of(deposition, "CZCDP"),
            annotation=number_of(annotation, "AN"),
        ),
        shape=shape,
        missing=missing,
        api=api,
        storage_options=storage_options,
    )
    for note in found.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return found.picks


def fetch_picks(
    records: Sequence[TomogramRecord],
    wanted: Wanted,
    *,
    shape: PointShape | None = None,
    missing: Missing = "error",
    api: PortalAPI | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> PortalPicks:
    """Return the points of tomograms as `find_picks` does, with their annotations and the notes.

    Notes say which files were refused for their alignment, where several annotations of one object were
    put together, which files hold another number of objects than the portal says, have points outside
    the volume, or were skipped, and, unless `shape` is given, which annotations have no points.
    """
    _check(shape, get_args(PointShape), "shape")
    _check(missing, get_args(Missing), "missing")
    placed = place_annotations(records, wanted, [shape] if shape else POINTS, api or PortalAPI())
    found = read_placed(records, placed.on, missing=missing, storage_options=storage_options)
    notes = [*found.notes, *_refused(placed)]
    if placed.other_shapes and shape is None:
        others = listed(f"{count} {name}" for name, count in placed.other_shapes.items())
        notes.append(f"annotations without points are passed over: {others}")
    return PortalPicks(found.picks, found.annotations, tuple(notes))


def read_placed(
    records: Sequence[TomogramRecord],
    on: Mapping[int, Sequence[AnnotationRecord]],
    *,
    missing: Missing = "error",
    storage_options: Mapping[str, Any] | None = None,
) -> PortalPicks:
    """Return the points of annotation files that `place_annotations` found on tomograms, by their ids.

    Errors are those of `find_picks`, without the portal's; notes are of the files' contents.
    """
    chosen = {key: _one_shape_each(files) for key, files in on.items()}
    _refuse_mixture(chosen)
    points, notes = _read_all(chosen, missing, storage_options)
    picks, used = {}, {}
    names = tomogram_names(records)
    for record in {record.id: record for record in records}.values():
        files = chosen.get(record.id, [])
        if files and all(file.file_id in points for file in files):
            name = names[record.id]
            picks[name] = _picks(record, name, [(file, points[file.file_id]) for file in files])
            used.update({file.file_id: file for file in files})
    notes += _togetherness(chosen, names) + _outside(picks)
    return PortalPicks(picks, tuple(used.values()), tuple(notes))


def find_masks(
    records: Sequence[TomogramRecord],
    *,
    object: str,  # noqa: A002  (the portal's word)
    ground_truth: bool | None = None,
    method: str | None = None,
    deposition: int | str | None = None,
    annotation: int | str | None = None,
    api: PortalAPI | None = None,
) -> dict[str, str]:
    """Return the address of one object's segmentation on each tomogram that has one, by tomogram name.

    It is that of an OME-Zarr, or else of an MRC file, with the voxels of the tomogram. Where several
    annotations fit, the newest is taken, of those the one of the highest number, with a warning. The
    other parameters are those of `find_picks`.

    Raises
    ------
    PortalError
        The portal does not answer, nothing fits, or segmentations of several objects do.
    """
    wanted = Wanted(
        object=object,
        ground_truth=ground_truth,
        method=method,
        deposition=number_of(deposition, "CZCDP"),
        annotation=number_of(annotation, "AN"),
    )
    placed = place_annotations(records, wanted, [MASK], api or PortalAPI())
    _refuse_mixture(placed.on)
    names, addresses, ties = tomogram_names(records), {}, []
    for key, files in placed.on.items():
        best = max(files, key=lambda file: (file.last_modified, file.id, file.format == "zarr", file.file_id))
        addresses[names[key]] = best.address
        others = {str(file) for file in files if file.id != best.id}
        if others:
            ties.append(f"{names[key]}: {best}, not {listed(sorted(others))}")
    notes = [f"of several segmentations the newest is taken on {listed(ties)}"] if ties else []
    for note in [*notes, *_refused(placed)]:
        warnings.warn(note, UserWarning, stacklevel=2)
    return addresses


def _one_shape_each(files: Iterable[AnnotationRecord]) -> list[AnnotationRecord]:
    """Return one file of each annotation: that of the shape that says the most."""
    best: dict[int, AnnotationRecord] = {}
    for file in sorted(files, key=lambda file: (POINTS.index(file.shape), -file.file_id)):
        best.setdefault(file.id, file)
    return [best[key] for key in sorted(best)]


def _refuse_mixture(chosen: Mapping[int, Sequence[AnnotationRecord]]) -> None:
    """Raise where files are of several objects, of which one table of picks or one mask would make one."""
    every = {file.file_id: file for files in chosen.values() for file in files}.values()
    count: dict[str, int] = defaultdict(int)
    for name in sorted(file.object_name for file in every):
        count[name] += 1
    if len({name.casefold() for name in count}) > 1:
        raise PortalError(
            f"annotations of {len(count)} objects fit: "
            f"{listed((f'{name} ({n} files)' for name, n in count.items()), 30)}",
            expected="those of one object",
            remedy="pass object=, one of these names or its id, and call once for each",
        )


def _read_all(
    chosen: Mapping[int, Sequence[AnnotationRecord]], missing: Missing, options: Mapping[str, Any] | None
) -> tuple[dict[int, PointRecords], list[str]]:
    """Return the points of all files by their ids, and notes; each file is read once, many at a time."""
    files = list({file.file_id: file for each in chosen.values() for file in each}.values())
    open_store = lru_cache(None)(partial(_open_store, options=options))
    points, counts, skipped = {}, [], []
    with ThreadPoolExecutor(READS) as pool:
        for file, found in zip(files, pool.map(partial(_read, open_store), files), strict=True):
            if isinstance(found, ActionableError):
                if missing == "error":
                    pool.shutdown(cancel_futures=True)
                    raise found
                skipped.append(str(found))
                continue
            points[file.file_id] = found
            if file.object_count not in (None, found.objects):
                counts.append(f"{file}: {found.objects}, not {file.object_count} ({file.address})")
    if files and not points:
        raise PortalError(
            f"none of {len(files)} annotation files can be read: {listed(skipped, 3)}",
            expected="at least one",
            remedy="look at the first of these errors",
        )
    notes = [f"{len(skipped)} annotation files are skipped: {listed(skipped)}"] if skipped else []
    if counts:
        notes.append(f"the number of objects is not what the portal says of {listed(counts)}")
    return points, notes


def _read(open_store: Callable[[str], RemoteStore], file: AnnotationRecord) -> PointRecords | ActionableError:
    """Return the points of a file, or the error: threads have others to wait for."""
    scheme, _, rest = file.address.partition("://")
    place, _, key = rest.partition("/")
    if (file.bytes or 0) > LARGEST_FILE:
        return FormatError(
            f"{file.address} has {(file.bytes or 0) / 1e9:.1f} GB",
            expected=f"a file of points, of at most {LARGEST_FILE / 1e9:.1f} GB",
            remedy="leave out this annotation",
        )
    try:
        store = open_store(f"{scheme}://{place}")
        data = read_bytes(store, key if scheme.startswith("s3") else unquote(key))
        if data is not None:
            return parse_ndjson(data, file.address)
    except ActionableError as error:
        return error
    except Exception as error:  # stores fail in their own ways, after all retries
        return SourceError(
            f"{file.address} of {file} could not be read ({type(error).__name__}: {error})",
            expected="a store that answers",
            remedy="check the connection and run again",
        )
    return PortalError(
        f"there is no object {file.address}, where the portal says {file} is",
        expected="the file",
        remedy='leave out that tomogram or annotation, or pass missing="skip"',
    )


def _open_store(address: str, options: Mapping[str, Any] | None) -> RemoteStore:
    return connect(address, options)


def _picks(
    record: TomogramRecord, name: str, parts: Sequence[tuple[AnnotationRecord, PointRecords]]
) -> Picks:
    zyx = np.concatenate([points.zyx for _, points in parts])
    turned = [points.rotations for _, points in parts if points.rotations is not None]
    return Picks(
        zyx=zyx,
        score=np.ones(len(zyx), np.float32),
        rotations=np.concatenate(turned) if sum(map(len, turned)) == len(zyx) and turned else None,
        voxel_size=record.voxel_spacing,
        tomogram=name,
        shape=record.shape,
        particle=parts[0][0].object_name,
    )


def _togetherness(chosen: Mapping[int, Sequence[AnnotationRecord]], names: Mapping[int, str]) -> list[str]:
    several = [f"{names[key]}: {listed(map(str, files))}" for key, files in chosen.items() if len(files) > 1]
    if not several:
        return []
    return [
        f"points of several annotations of one object are put together, and may mark a particle twice, on "
        f"{listed(several, 4)}; choose with ground_truth=, method=, deposition= or annotation="
    ]


def _outside(picks: Mapping[str, Picks]) -> list[str]:
    """Return a note on points that lie in no voxel."""
    found = []
    for name, each in picks.items():
        beyond = (each.zyx < -0.5) | (each.zyx > np.array(each.shape) - 0.5)
        if count := int(beyond.any(axis=1).sum()):
            found.append(f"{name} ({count} of {len(each)})")
    return [f"points lie outside the volume of {listed(found)}"] if found else []


def _refused(placed: Placed) -> list[str]:
    """Return a note on files in another frame."""
    if not placed.elsewhere:
        return []
    return [
        f"{len(placed.elsewhere)} annotation files lie on another alignment and are refused: "
        f"{listed(refusals(placed.elsewhere))}"
    ]


def number_of(text: int | str | None, prefix: str) -> int | None:
    """Return the number of an id, which may have its prefix."""
    plain = str(text).strip().upper().removeprefix(f"{prefix}-")
    if text is None or plain.isdecimal():
        return None if text is None else int(plain)
    raise PortalError(
        f"the id {text!r}", expected=f"a number, or {prefix}- and a number", remedy="check the id"
    )


def _check(value: str | None, known: tuple[str, ...], name: str) -> None:
    if value is not None and value not in known:
        raise PortalError(
            f"{name}={value!r}", expected=f"one of {', '.join(known)}", remedy="choose one of them"
        )
