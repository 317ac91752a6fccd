"""Which annotation files of the CZ CryoET Data Portal lie on which tomograms: metadata only, no points.

A file lies on a tomogram where both its voxel spacing and its alignment are those of the tomogram. With
the same run and spacing but another alignment it is in another frame, and its voxels are other places.
Where neither says its alignment they count as one in a run that has one alignment at most, and are
refused in any other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_scope import in_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tomocpt_stream.portal_queries import PortalAPI
    from tomocpt_stream.portal_records import TomogramRecord

PointShape = Literal["OrientedPoint", "Point", "InstanceSegmentation"]

POINTS: tuple[PointShape, ...] = get_args(PointShape)
"""Shapes that are points; of one annotation's the first of these is taken, which says the most."""

MASK = "SegmentationMask"

_ANNOTATION = {
    "id": "id",
    "object_name": "objectName",
    "object_id": "objectId",
    "object_state": "objectState",
    "object_description": "objectDescription",
    "object_count": "objectCount",
    "ground_truth": "groundTruthStatus",
    "curator_recommended": "isCuratorRecommended",
    "method_type": "methodType",
    "method": "annotationMethod",
    "software": "annotationSoftware",
    "publication": "annotationPublication",
    "precision": "confidencePrecision",
    "recall": "confidenceRecall",
    "deposition_id": "depositionId",
    "run_id": "runId",
    "last_modified": "lastModifiedDate",
}
_SHAPE = {"shape_id": "id", "shape": "shapeType"}
_FILE = {
    "file_id": "id",
    "format": "format",
    "s3_path": "s3Path",
    "https_path": "httpsPath",
    "bytes": "fileSize",
    "source": "source",
    "alignment_id": "alignmentId",
    "voxel_spacing_id": "tomogramVoxelSpacingId",
}


@dataclass(frozen=True, kw_only=True)
class AnnotationRecord:
    """One file of one annotation on the portal; what the portal leaves open is None.

    `id` is that of the annotation. `object_count` is what the portal says the file holds.
    """

    id: int
    object_name: str
    object_id: str
    object_state: str | None
    object_description: str | None
    object_count: int | None
    ground_truth: bool | None
    curator_recommended: bool | None
    method_type: str
    method: str
    software: str | None
    publication: str | None
    precision: float | None
    recall: float | None
    deposition_id: int | None
    run_id: int | None
    last_modified: str
    shape_id: int
    shape: str
    file_id: int
    format: str
    s3_path: str | None
    https_path: str | None
    bytes: float | None
    source: str | None
    alignment_id: int | None
    voxel_spacing_id: int | None

    @property
    def address(self) -> str:
        """Where the file is: in the bucket, or else at the mirror."""
        return self.s3_path or self.https_path or ""

    def __str__(self) -> str:
        truth = {True: ", ground truth", False: ", no ground truth", None: ""}[self.ground_truth]
        return (
            f"AN-{self.id} ({self.object_name}, {self.shape}, {self.method_type}{truth}, "
            f"CZCDP-{self.deposition_id})"
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which annotations are asked for; None asks for any.

    `object` is a name with the wildcards * ? [ ], or an id such as GO:0022626, without regard to case.
    `ground_truth` False takes those that are said not to be any. `method` is a type (manual, automated,
    hybrid, simulated) or a name of a method with wildcards. `deposition` and `annotation` are numbers.
    """

    object: str | None = None
    ground_truth: bool | None = None
    method: str | None = None
    deposition: int | None = None
    annotation: int | None = None

    def left(self, rows: Sequence[dict[str, Any]], records: Sequence[TomogramRecord]) -> list[dict[str, Any]]:
        """Return the rows of annotations that are asked for; PortalError says what left none."""
        where = f"the runs of {_tomograms(records)}"
        if not rows:
            raise _none(f"{where} have no annotations at all", "look at the runs on the portal")
        tests: list[tuple[str, Any, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], str]]] = [
            ("object", self.object, self._names, lambda row: f"{row['objectName']} ({row['objectId']})"),
            ("ground_truth", self.ground_truth, self._truth, lambda row: str(row["groundTruthStatus"])),
            ("method", self.method, self._made, lambda row: str(row["methodType"])),
            (
                "deposition",
                self.deposition,
                lambda row: bool(row["depositionId"] == self.deposition),
                lambda row: f"CZCDP-{row['depositionId']}",
            ),
            (
                "annotation",
                self.annotation,
                lambda row: bool(row["id"] == self.annotation),
                lambda row: f"AN-{row['id']}",
            ),
        ]
        found = list(rows)
        for name, value, test, shown in tests:
            if value is not None:
                before, found = found, [row for row in found if test(row)]
                if not found:
                    raise _none(
                        f"{name}={value!r} leaves none of {len(before)} annotations on {where}",
                        f"choose from what is there: {listed(map(shown, before))}",
                    )
        return found

    def _names(self, row: dict[str, Any]) -> bool:
        asked = (self.object or "").casefold()
        return any(fnmatchcase(str(row[key]).casefold(), asked) for key in ("objectName", "objectId"))

    def _truth(self, row: dict[str, Any]) -> bool:
        return row["groundTruthStatus"] is self.ground_truth

    def _made(self, row: dict[str, Any]) -> bool:
        asked = (self.method or "").casefold()
        return row["methodType"] == asked or fnmatchcase(str(row["annotationMethod"]).casefold(), asked)


@dataclass(frozen=True)
class Placed:
    """Annotation files and the tomograms they lie on.

    `on` has the files by the id of their tomogram. `elsewhere` are those that would lie on one but for
    their alignment. `other_shapes` are the shapes of annotations that have none of those asked for.
    """

    on: dict[int, list[AnnotationRecord]]
    elsewhere: tuple[tuple[TomogramRecord, AnnotationRecord], ...]
    other_shapes: Counter[str]


def place_annotations(
    records: Sequence[TomogramRecord], wanted: Wanted, shapes: Sequence[str], api: PortalAPI
) -> Placed:
    """Return the files of annotations that are asked for, in one of some shapes, with their tomograms.

    Files of a tomogram come in the order of their annotations and ids.

    Raises
    ------
    PortalError
        The portal does not answer, or there is no such file; then the message says what left none.
    """
    runs = {record.run_id for record in records}
    rows = wanted.left(_rows(api, "annotations", _ANNOTATION, "runId", runs), records)
    annotations = {row["id"]: row for row in rows}
    rows = _rows(api, "annotationShapes", {**_SHAPE, "": "annotationId"}, "annotationId", annotations)
    taken = {row["id"]: row for row in rows if row["shapeType"] in shapes}
    having = {row["annotationId"] for row in taken.values()}
    other = Counter(str(row["shapeType"]) for row in rows if row["annotationId"] not in having)
    if not taken:
        raise _none(
            f"none of {len(annotations)} annotations on the runs of {_tomograms(records)} has the shape "
            f"{' or '.join(shapes)}",
            f"choose from what is there: {listed(other) or 'nothing'}",
        )
    rows = _rows(api, "annotationFiles", {**_FILE, "": "annotationShapeId"}, "annotationShapeId", taken)
    files = [_record(annotations, taken, row) for row in sorted(rows, key=lambda row: int(row["id"]))]
    on, elsewhere = _place(records, sorted(files, key=lambda file: file.id), api)
    return Placed(on, elsewhere, other)


def tomogram_names(records: Iterable[TomogramRecord]) -> dict[int, str]:
    """Return a name for each tomogram by its id: that of its record where no other has it too.

    Where several have it, as tomograms of one run do and runs of different datasets may, each is called
    by name, voxel spacing (Å) and id: TS_1-10.012-16531.
    """
    names = {record.id: record.name for record in records}
    full = {record.id: f"{record.name}-{record.voxel_spacing:.3f}-{record.id}" for record in records}
    taken = Counter(names.values()) + Counter(set(full.values()))
    return {key: name if taken[name] == 1 else full[key] for key, name in names.items()}


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names as people list them, each once, and how many more there are."""
    every = list(dict.fromkeys(names))
    shown = every[:most] if len(every) > most + 1 else every
    rest = [f"{len(every) - len(shown)} more"] if len(shown) < len(every) else []
    return ", ".join([*shown, *rest])


def _place(
    records: Sequence[TomogramRecord], files: Sequence[AnnotationRecord], api: PortalAPI
) -> tuple[dict[int, list[AnnotationRecord]], tuple[tuple[TomogramRecord, AnnotationRecord], ...]]:
    spaced = defaultdict(list)
    for file in files:
        spaced[file.voxel_spacing_id].append(file)
    places = {record.id: (record.voxel_spacing_id, record.alignment_id, record.run_id) for record in records}
    fitting = in_frames(places, {(file.voxel_spacing_id, file.alignment_id) for file in files}, api)
    on: dict[int, list[AnnotationRecord]] = {}
    elsewhere = []
    for record in {record.id: record for record in records}.values():
        near = [] if record.voxel_spacing_id is None else spaced[record.voxel_spacing_id]
        here = [file for file in near if file.alignment_id == record.alignment_id and record.id in fitting]
        elsewhere += [(record, file) for file in near if file not in here]
        if here:
            on[record.id] = here
    if not on:
        raise _misplaced(records, files, elsewhere)
    return on, tuple(elsewhere)


def _misplaced(
    records: Sequence[TomogramRecord],
    files: Sequence[AnnotationRecord],
    elsewhere: Sequence[tuple[TomogramRecord, AnnotationRecord]],
) -> PortalError:
    if elsewhere:
        return _none(
            f"{len(elsewhere)} annotation files have the voxel spacing of {_tomograms(records)} but another "
            f"alignment, so that their voxels are other places: {listed(refusals(elsewhere))}",
            "choose the tomograms of that alignment",
        )
    spacings = f"TomogramVoxelSpacing {listed(sorted({str(file.voxel_spacing_id) for file in files}))}"
    return _none(
        f"{len(files)} annotation files on the runs of {_tomograms(records)} have another voxel spacing "
        f"({spacings})",
        "choose the tomograms of that voxel spacing",
    )


def refusals(elsewhere: Iterable[tuple[TomogramRecord, AnnotationRecord]]) -> list[str]:
    """Return for each file in another frame what it is, and which alignments differ."""
    return [
        f"{file} on {_alignment(file)}, not {_alignment(record)} of TM-{record.id}"
        if file.alignment_id != record.alignment_id
        else f"{file} on an unknown alignment, as TM-{record.id} is, in a run of several"
        for record, file in elsewhere
    ]


def _alignment(owner: AnnotationRecord | TomogramRecord) -> str:
    return "an unknown alignment" if owner.alignment_id is None else f"AL-{owner.alignment_id}"


def _rows(
    api: PortalAPI, table: str, fields: dict[str, str], key: str, ids: Iterable[int]
) -> list[dict[str, Any]]:
    return api.rows(table, fields.values(), key=key, ids=ids)


def _record(
    annotations: dict[int, dict[str, Any]], shapes: dict[int, dict[str, Any]], row: dict[str, Any]
) -> AnnotationRecord:
    shape = shapes[row["annotationShapeId"]]
    annotation = annotations[shape["annotationId"]]
    parts = ((_ANNOTATION, annotation), (_SHAPE, shape), (_FILE, row))
    return AnnotationRecord(**{name: data[field] for names, data in parts for name, field in names.items()})


def _tomograms(records: Sequence[TomogramRecord]) -> str:
    return f"{len(records)} tomograms" if len(records) != 1 else f"TM-{records[0].id} ({records[0].name})"


def _none(found: str, remedy: str) -> PortalError:
    return PortalError(found, expected="an annotation that fits", remedy=remedy)
