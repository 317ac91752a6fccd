"""Where tomograms are looked for: depositions, datasets, runs, tomograms, and what was found there.

A deposition means one of three things: the tomograms that were submitted in it, all tomograms of the
datasets that were, or the tomograms that its annotations lie on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_records import TomogramRecord
from tomocpt_stream.portal_selection import listed, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from tomocpt_stream.portal_queries import PortalAPI, Row

Meaning = Literal["tomograms", "datasets", "annotations"]
Ids = int | str | Sequence[int | str]
Frame = tuple[int | None, int | None]
"""The voxel spacing and the alignment of a file, by their ids."""

MEANINGS: dict[Meaning, str] = {
    "tomograms": "the tomograms submitted in it",
    "datasets": "the tomograms of its datasets",
    "annotations": "the tomograms that its annotations lie on",
}
"""What a deposition can mean, in the order in which it is tried."""

_PREFIXES = {"deposition": "CZCDP", "dataset": "DS", "run": "RN", "tomogram": "TM"}
_FIELDS = (
    "name",
    "runId",
    "depositionId",
    "alignmentId",
    "tomogramVoxelSpacingId",
    "voxelSpacing",
    "sizeX",
    "sizeY",
    "sizeZ",
    "processing",
    "reconstructionMethod",
    "processingSoftware",
    "reconstructionSoftware",
    "ctfCorrected",
    "isPortalStandard",
    "isAuthorSubmitted",
    "isVisualizationDefault",
    "s3OmezarrDir",
    "httpsOmezarrDir",
    "s3MrcFile",
    "httpsMrcFile",
    "fileSizeOmezarr",
    "fileSizeMrc",
    "lastModifiedDate",
)
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Scope:
    """What was asked for: ids, and for runs also names, which may be globs; all of it must hold at once."""

    depositions: tuple[int, ...] = ()
    datasets: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()
    run_names: tuple[str, ...] = ()
    tomograms: tuple[int, ...] = ()
    meaning: Meaning | None = None

    def __str__(self) -> str:
        parts = [
            f"deposition {listed(self.depositions)}" * bool(self.depositions),
            f"dataset {listed(self.datasets)}" * bool(self.datasets),
            f"run {listed((*self.runs, *self.run_names))}" * bool(self.runs or self.run_names),
            f"tomogram {listed(self.tomograms)}" * bool(self.tomograms),
        ]
        return ", ".join(filter(None, parts))


def read_scope(
    *,
    deposition: Ids | None = None,
    dataset: Ids | None = None,
    run: Ids | None = None,
    tomogram: Ids | None = None,
    meaning: Meaning | None = None,
) -> Scope:
    """Return what was asked for, with the portal's prefixes (CZCDP-, DS-, RN-, TM-) taken off the ids.

    A run that is neither a number nor has a prefix is a name, or a glob of names.

    Raises
    ------
    PortalError
        Nothing was asked for, or something that is no id.
    """
    if meaning is not None and meaning not in MEANINGS:
        raise PortalError(
            f"meaning={meaning!r}",
            expected=f"one of {', '.join(MEANINGS)}, or None",
            remedy="pass one of them",
        )
    runs = _items("run", run)
    names = tuple(item for item in runs if isinstance(item, str) and not _looks_like_id(item))
    scope = Scope(
        depositions=_ids("deposition", _items("deposition", deposition)),
        datasets=_ids("dataset", _items("dataset", dataset)),
        runs=_ids("run", [item for item in runs if item not in names]),
        run_names=tuple(dict.fromkeys(names)),
        tomograms=_ids("tomogram", _items("tomogram", tomogram)),
        meaning=meaning,
    )
    if not str(scope):
        raise PortalError(
            "no deposition, dataset, run or tomogram",
            expected="at least one of them: the portal has tens of thousands of tomograms",
            remedy="pass for example deposition=10310",
        )
    if meaning is not None and not scope.depositions:
        raise PortalError(
            f"meaning={meaning} without a deposition",
            expected="a deposition whose meaning it is",
            remedy="pass deposition, or leave the meaning out",
        )
    return scope


def _items(kind: str, given: Ids | None) -> list[int | str]:
    """Return what was given as a list; an empty one is a mistake, and not everything."""
    if given is None:
        return []
    items = [given] if isinstance(given, int | str) else list(given)
    if not items or any(item == "" for item in items):
        raise PortalError(
            f"an empty {kind}", expected=f"the id of a {kind}", remedy="pass None to ask for any"
        )
    return items


def _looks_like_id(text: str) -> bool:
    """Return whether a text is a number or has a prefix of the portal; other texts are names of runs."""
    return bool(re.fullmatch(rf"\s*(?:(?:{'|'.join(_PREFIXES.values())})-)?[1-9]\d*\s*", text, re.IGNORECASE))


def _ids(kind: str, items: Iterable[int | str]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_id(kind, item) for item in items))


def _id(kind: str, item: int | str) -> int:
    prefix = _PREFIXES[kind]
    number = 0
    if isinstance(item, str):
        found = re.fullmatch(r"\s*(?:([A-Za-z]+)-)?(\d+)\s*", item, re.ASCII)
        if found and (found[1] or prefix).upper() == prefix:
            number = int(found[2])
        elif found and (other := [k for k, p in _PREFIXES.items() if p == found[1].upper()]):
            raise PortalError(
                f"{item.strip()} as a {kind}, which is the id of a {other[0]}",
                expected=f"{prefix}-{found[2]} or {found[2]} for a {kind}",
                remedy=f"pass it as {other[0]}",
            )
    elif not isinstance(item, bool):
        number = int(item)
    if not 0 < number <= _LARGEST_ID:
        raise PortalError(
            f"{item!r} as a {kind}",
            expected=f"a number such as 10310, or {prefix}-10310",
            remedy="take the id from the portal's page",
        )
    return number


def find_records(scope: Scope, api: PortalAPI) -> tuple[list[TomogramRecord], list[str]]:
    """Return all tomograms of a scope, by id, and sentences on what the depositions were taken to mean.

    Raises
    ------
    PortalError
        Something that was asked for has none, or is not on the portal; or the portal does not answer.
    """
    rows: dict[int, Row] = {}
    notes: list[str] = []
    for deposition in scope.depositions:
        found, meaning = _of_deposition(deposition, scope, api)
        tried = list(MEANINGS)[: list(MEANINGS).index(meaning)] if scope.meaning is None else []
        without = f", as it has no {' and no '.join(tried)} of its own{_within(scope)}" if tried else ""
        notes.append(f"Deposition {deposition} is taken to mean {MEANINGS[meaning]}{without}.")
        rows |= found
    if not scope.depositions:
        rows = _matching(scope, {}, api)
    records = [_record(rows[number], *related) for number, related in _related(rows, api).items()]
    if scope.run_names:
        records = [record for record in records if _named(record, scope)]  # a pattern admits more than a glob
    _refuse_absent(scope, records, api)
    return records, notes


def in_frames(
    tomograms: Mapping[int, tuple[int | None, int | None, int]], frames: Collection[Frame], api: PortalAPI
) -> set[int]:
    """Return the ids of the tomograms on which files of some frames lie.

    `tomograms` gives voxel spacing, alignment and run by id, `frames` are voxel spacings with alignments.
    Both must be those of the tomogram. Where neither the file nor the tomogram says its alignment, they
    have the same only in a run with one alignment at most, for which the portal is asked; a voxel spacing
    that is not said fits nothing.
    """
    within = {
        number: (alignment, run)
        for number, (spacing, alignment, run) in tomograms.items()
        if spacing is not None and (spacing, alignment) in frames
    }
    unsaid = {run for alignment, run in within.values() if alignment is None}
    rows = api.rows("alignments", ("runId",), key="runId", ids=unsaid) if unsaid else []
    count = Counter(row["runId"] for row in rows)
    return {number for number, (alignment, run) in within.items() if alignment is not None or count[run] <= 1}


def _of_deposition(number: int, scope: Scope, api: PortalAPI) -> tuple[dict[int, Row], Meaning]:
    """Return the tomograms of a deposition, and which meaning of it has any."""
    tried: Sequence[Meaning] = [scope.meaning] if scope.meaning else list(MEANINGS)
    for meaning in tried:
        if meaning == "annotations":
            found = _under_annotations(number, scope, api)
        else:
            found = _matching(scope, _deposition_where([number], meaning), api)
        if found:
            return found, meaning
    there = api.lookup({"depositions": (["title"], [number])})["depositions"].get(number)
    if there is None:
        raise _no_such("deposition", [number])
    having = ", nor ".join(MEANINGS[each] for each in tried)
    how = f": neither {having}" if len(tried) > 1 else f", taken as {having}"
    raise PortalError(
        f"deposition {number} ({there['title']!r}) gives no tomograms{_within(scope)}{how}",
        expected="at least one tomogram",
        remedy="check what was asked for on the portal's page of the deposition"
        + (", or leave the meaning out" if scope.meaning else ""),
    )


def _within(scope: Scope) -> str:
    """Return what else was asked for beside the deposition."""
    narrowed = replace(scope, depositions=())
    return f" within {narrowed}" if str(narrowed) else ""


def survey_wheres(scope: Scope) -> list[dict[str, Any]]:
    """Return the conditions for all tomograms of a scope's depositions and datasets, one for each meaning."""
    within = {"run": {"datasetId": {"_in": list(scope.datasets)}}} if scope.datasets else {}
    if not scope.depositions:
        return [within]
    meanings: list[Meaning] = [scope.meaning] if scope.meaning else ["tomograms", "datasets"]
    return [_merged(_deposition_where(scope.depositions, meaning), within) for meaning in meanings]


def _deposition_where(numbers: Sequence[int], meaning: Meaning) -> dict[str, Any]:
    """Return the condition for the tomograms that were submitted in depositions, or in their datasets."""
    if meaning == "tomograms":
        return {"depositionId": {"_in": list(numbers)}}
    return {"run": {"dataset": {"depositionId": {"_in": list(numbers)}}}}


def _under_annotations(number: int, scope: Scope, api: PortalAPI) -> dict[int, Row]:
    """Return the tomograms that a deposition's annotations lie on: those of their spacing and alignment."""
    # One request: a filter of tomograms through their files would give each once for every file.
    where = {"annotationShape": {"annotation": {"depositionId": {"_eq": number}}}}
    spacing = "tomogramVoxelSpacing.id"
    groups = api.totals("annotationFiles", where, by=(spacing, "alignment.id"))
    frames: set[Frame] = {(group["tomogramVoxelSpacing.id"], group["alignment.id"]) for group in groups}
    # Those without an alignment are in no group.
    groups = api.totals("annotationFiles", {**where, "alignmentId": {"_is_null": True}}, by=(spacing,))
    frames |= {(group[spacing], None) for group in groups}
    if not frames:
        return {}
    found = _matching(
        scope, {}, api, key="tomogramVoxelSpacingId", ids={frame[0] for frame in frames if frame[0]}
    )
    places = {
        each: (row["tomogramVoxelSpacingId"], row["alignmentId"], row["runId"]) for each, row in found.items()
    }
    return {each: found[each] for each in in_frames(places, frames, api)}


def _matching(
    scope: Scope, where: dict[str, Any], api: PortalAPI, *, key: str | None = None, ids: Iterable[int] = ()
) -> dict[int, Row]:
    """Return the tomograms that meet a condition and lie in the datasets, runs and tomograms of a scope."""
    where = _merged(where, {"run": {"datasetId": {"_in": list(scope.datasets)}}} if scope.datasets else {})
    for field, given in (("id", scope.tomograms), ("runId", scope.runs)):
        if given and not scope.run_names and key is None:
            key, ids = field, given
        elif given and not (field == "runId" and scope.run_names):
            where = _merged(where, {field: {"_in": list(given)}})
    alternatives = [where]
    if scope.run_names:  # names and ids of runs: either
        alternatives = [_merged(where, each) for each in _run_wheres(scope)]
    found: dict[int, Row] = {}
    for each in alternatives:
        rows = api.rows("tomograms", _FIELDS, each, key=key or "id", ids=ids if key else None)
        found |= {row["id"]: row for row in rows}
    return found


def _run_wheres(scope: Scope) -> list[dict[str, Any]]:
    """Return the conditions for runs by exact names, by each glob, and by ids."""
    exact = [name for name in scope.run_names if not _is_glob(name)]
    wheres: list[dict[str, Any]] = [{"run": {"name": {"_in": exact}}}] if exact else []
    wheres += [{"run": {"name": {"_like": _as_like(name)}}} for name in scope.run_names if _is_glob(name)]
    if scope.runs:
        wheres.append({"runId": {"_in": list(scope.runs)}})
    return wheres


def _is_glob(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _as_like(glob: str) -> str:
    r"""Return an SQL pattern that admits at least what a glob does; % and \ would mean more than a letter."""
    return re.sub(r"\*|\[.*\]", "%", re.sub(r"[?%\\]", "_", glob))


def _named(record: TomogramRecord, scope: Scope) -> bool:
    return record.run_id in scope.runs or any(fits_name(record.run, name) for name in scope.run_names)


def fits_name(run: str, name: str) -> bool:
    """Return whether a run is called so; the name may be a glob."""
    return fnmatchcase(run, name) if _is_glob(name) else run == name


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return two conditions that must both hold as one."""
    both = dict(one)
    for name, value in other.items():
        both[name] = _merged(both[name], value) if isinstance(both.get(name), dict) else value
    return both


def _related(rows: dict[int, Row], api: PortalAPI) -> dict[int, tuple[Row, Row]]:
    """Return the run and the alignment of each tomogram; an empty row where there is none."""
    found = api.lookup(
        {
            "runs": (["name", "datasetId"], _numbers(rows, "runId")),
            "alignments": (["isPortalStandard"], _numbers(rows, "alignmentId")),
        }
    )
    return {
        number: (found["runs"].get(row["runId"], {}), found["alignments"].get(row["alignmentId"], {}))
        for number, row in rows.items()
    }


def _numbers(rows: dict[int, Row], field: str) -> set[int]:
    return {row[field] for row in rows.values() if row[field] is not None}


def _record(row: Row, run: Row, alignment: Row) -> TomogramRecord:
    try:
        name = run.get("name") or row["name"] or f"tomogram {row['id']}"
        return TomogramRecord(
            id=row["id"],
            name=row["name"] or name,
            run=name,
            run_id=run.get("id", 0),
            dataset_id=run.get("datasetId", 0),
            deposition_id=row["depositionId"],
            alignment_id=row["alignmentId"],
            voxel_spacing_id=row["tomogramVoxelSpacingId"],
            voxel_spacing=float(row["voxelSpacing"]),
            size=(int(row["sizeX"]), int(row["sizeY"]), int(row["sizeZ"])),
            processing=str(row["processing"]),
            reconstruction=str(row["reconstructionMethod"]),
            processing_software=row["processingSoftware"],
            reconstruction_software=row["reconstructionSoftware"],
            ctf_corrected=row["ctfCorrected"],
            is_portal_standard=row["isPortalStandard"],
            is_author_submitted=row["isAuthorSubmitted"],
            is_visualization_default=row["isVisualizationDefault"],
            alignment_is_portal_standard=alignment.get("isPortalStandard"),
            s3_zarr=row["s3OmezarrDir"] or None,
            https_zarr=row["httpsOmezarrDir"] or None,
            s3_mrc=row["s3MrcFile"] or None,
            https_mrc=row["httpsMrcFile"] or None,
            bytes_zarr=row["fileSizeOmezarr"],
            bytes_mrc=row["fileSizeMrc"],
            last_modified=row["lastModifiedDate"] or "",
        )
    except (TypeError, ValueError) as error:
        raise PortalError(
            f"tomogram {row.get('id')} of the portal with values of another kind ({error})",
            expected="numbers for the voxel spacing and the size",
            remedy="upgrade tomocpt-stream: the portal's schema may have changed",
        ) from error


def _refuse_absent(scope: Scope, records: Sequence[TomogramRecord], api: PortalAPI) -> None:
    """Raise PortalError for what was asked for by its id or name and gave no tomogram."""
    asked: tuple[tuple[str, Sequence[int], Callable[[TomogramRecord], int]], ...] = (
        ("tomogram", scope.tomograms, lambda record: record.id),
        ("dataset", scope.datasets, lambda record: record.dataset_id),
        ("run", scope.runs, lambda record: record.run_id),
    )
    for kind, numbers, read in asked:
        there = set(map(read, records))
        missing = [number for number in numbers if number not in there]
        if not missing:
            continue
        known = api.lookup({f"{kind}s": ((), missing)})[f"{kind}s"]
        if unknown := [number for number in missing if number not in known]:
            raise _no_such(kind, unknown)
        raise PortalError(
            f"{kind} {listed(missing)} without a tomogram in what was asked for ({scope})",
            expected=f"at least one tomogram of each {kind}",
            remedy=f"leave {'it' if len(missing) == 1 else 'them'} out, or widen what is asked for",
        )
    if nameless := [
        name for name in scope.run_names if not any(fits_name(each.run, name) for each in records)
    ]:
        raise PortalError(
            f"no tomogram of a run called {listed(map(repr, nameless))} in what was asked for ({scope})",
            expected="names of runs as the portal shows them, capitals included, or globs such as 'TS_*'",
            remedy="check the names; a whole number is taken as an id",
        )


def _no_such(kind: str, numbers: Sequence[int]) -> PortalError:
    return PortalError(
        f"the portal has no {kind} {listed(numbers)}",
        expected=f"{plural(len(numbers), 'id')} of what is there",
        remedy=f"take the {kind}'s id from its page; ids of runs and tomograms change when they are replaced",
    )
