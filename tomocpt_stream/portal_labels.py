"""Labelled tomograms of the CZ CryoET Data Portal: voxels and truth come from its bucket as they are read.

Of each run a tomogram is taken on which the truth lies; runs without truth are left out and named. A run
with two annotations that may be the truth is an error: one of them may be wrong, or each half of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.annotation_files import POINTS, listed, place_annotations, refusals, tomogram_names
from tomocpt_stream.citations import as_bibtex, as_table, citations
from tomocpt_stream.errors import ActionableError, PortalError, SourceError
from tomocpt_stream.label_queries import LabelQuery, read_query
from tomocpt_stream.labelled import LabelledTomogram
from tomocpt_stream.picks import Picks
from tomocpt_stream.portal import select_tomograms
from tomocpt_stream.portal_annotations import read_placed
from tomocpt_stream.portal_queries import PortalAPI
from tomocpt_stream.portal_records import LeftOut, Selection, TomogramRecord, by_place
from tomocpt_stream.portal_scope import fits_name
from tomocpt_stream.portal_selection import choose, plural, preference
from tomocpt_stream.run_truth import Run, read_truth, run_key
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tomocpt_stream.annotation_files import AnnotationRecord

_OPENED_AT_ONCE = 8
_KEPT = "Kept for the test of "


@dataclass(frozen=True)
class PortalLabels:
    """Labelled tomograms of the portal, and an account of what was taken and what was not.

    `selection` has the records of `examples`, and what was left out and why; `tests`, one for each query,
    those that were kept aside. `annotations` are the files that the truth was read from. `notes` are
    whole sentences.
    """

    examples: tuple[LabelledTomogram, ...]
    selection: Selection
    tests: tuple[Selection, ...]
    annotations: tuple[AnnotationRecord, ...]
    notes: tuple[str, ...]

    def write_account(self, folder: Path, *, api: PortalAPI | None = None) -> None:
        """Write citations.md, citations.bib, selection.json and, where runs are kept for it, test.json.

        Of several queries each has its own test: test_1.json, test_2.json. Selections are what
        `portal list` and `portal pick` take as --selection. A test that an earlier account left there is
        deleted, as its runs may be learnt from now.
        """
        cited = citations(self.selection.records, self.annotations, api=api)
        selections = (self.selection, *self.tests)
        texts = {
            name: json.dumps(selection.to_json(), indent=1, allow_nan=False)
            for name, selection in zip(_selection_names(len(self.tests)), selections, strict=True)
            if selection.records
        }
        texts |= {"citations.md": as_table(cited), "citations.bib": as_bibtex(cited)}
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / "test.json", *folder.glob("test_*.json")):
            if path.name not in texts and _is_test(path):
                path.unlink()
        for name, text in texts.items():
            write_whole(folder / name, text)


def account_names(queries: int) -> list[str]:
    """Return the names of the files that `PortalLabels.write_account` may write for so many queries."""
    return ["citations.md", "citations.bib", *_selection_names(queries)]


def _selection_names(queries: int) -> list[str]:
    tests = ["test.json"] if queries == 1 else [f"test_{number}.json" for number in range(1, queries + 1)]
    return ["selection.json", *tests]


def _is_test(path: Path) -> bool:
    """Return whether a file is a test that an account wrote; others may be called so, too."""
    try:
        return any(note.startswith(_KEPT) for note in Selection.read(path).notes)
    except (ActionableError, OSError):
        return False


@dataclass(frozen=True)
class _Truth:
    """The tomograms of a query on which its truth lies: as files of the portal, or as picks, by id."""

    query: LabelQuery
    records: Sequence[TomogramRecord]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]
    files: Mapping[int, Sequence[AnnotationRecord]]
    picks: Mapping[int, Picks]


def find_labelled(
    *queries: LabelQuery | str,
    particle_radius: float = 10.0,
    api: PortalAPI | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> PortalLabels:
    """Return the labelled tomograms of some queries; headers of tomograms and points are read, no voxels.

    `particle_radius` is the picker's, in working voxels: of the tomograms of a run one of the voxel spacing
    nearest to diameter / (2 particle_radius) is taken. Those of one run are of one group, which no split
    parts; a run that one query keeps for the test, no other learns from. `storage_options` are those of
    `open_tomogram`; the portal's bucket needs none.

    Raises
    ------
    PortalError
        The portal does not answer; nothing fits what was asked for; annotations are ambiguous.
    SourceError, FormatError
        Tomograms or points cannot be read, or files of truth do not fit the runs.
    """
    if not queries:
        raise PortalError(
            "no query", expected="at least one", remedy='pass "dataset=... object=... diameter=..."'
        )
    api = api or PortalAPI()
    asked = [read_query(query) if isinstance(query, str) else query for query in queries]
    truths = [_locate(query, particle_radius, api) for query in asked]
    held = {run for truth in truths for run in _drawn(truth)}
    every = {record.id: record for truth in truths for record in truth.records}
    names = tomogram_names(every.values())
    found = [_label(truth, held, names, storage_options) for truth in truths]
    notes = tuple(note for one in found for note in one.notes)
    learnt = {record.id: record for one in found for record in one.selection.records}
    out = {(each.record.id, each.why): each for one in found for each in one.selection.left_out}
    used = {file.file_id: file for one in found for file in one.annotations}
    return PortalLabels(
        tuple(example for one in found for example in one.examples),
        Selection(tuple(sorted(learnt.values(), key=by_place)), tuple(out.values()), notes),
        tuple(one.tests[0] for one in found),
        tuple(used.values()),
        notes,
    )


def _locate(query: LabelQuery, particle_radius: float, api: PortalAPI) -> _Truth:
    """Return the tomograms of a query on which its truth lies, of each run the preferred one."""
    if query.selection is not None:
        given = Selection.read(query.selection)
    else:
        scope = query.scope()
        given = select_tomograms(
            deposition=scope.depositions or None,
            dataset=scope.datasets or None,
            run=(*scope.runs, *scope.run_names) or None,
            tomogram=scope.tomograms or None,
            meaning=query.meaning,
            organism=query.organism,
            all=True,
            api=api,
            **query.conditions(),
        )
    excluded = [
        record for record in given.records if any(fits_name(record.run, name) for name in query.exclude)
    ]
    gone = {record.id for record in excluded}
    records = [record for record in given.records if record.id not in gone]
    if not records:
        raise PortalError(
            f"{query} without a run beside those of exclude={','.join(query.exclude)}",
            expected="at least one",
            remedy="exclude fewer",
        )
    out = [*given.left_out, *(LeftOut(record, "its run is excluded") for record in excluded)]
    notes = []
    if unmet := [name for name in query.exclude if not any(fits_name(one.run, name) for one in excluded)]:
        notes.append(f"No run of {query} is called {' or '.join(unmet)}, which exclude= names.")
    near = query.near or query.diameter / (2 * particle_radius)
    liking = preference(records, near=near, prefer=query.prefer or None)

    def of_each_run(able: Sequence[TomogramRecord]) -> Selection:
        if query.all or query.selection is not None or query.tomogram:
            return Selection(tuple(able))
        return choose(able, liking, halves=bool(query.processing))

    if query.truth:
        read = read_truth(query.truth, records, of_each_run, particle=query.particle)
        out += read.left_out
        return _Truth(query, read.records, out, [*notes, *read.notes], {}, read.picks)
    placed = place_annotations(records, query.wanted(), [query.shape] if query.shape else POINTS, api)
    files = _asked_for(query, placed.on)
    chosen = of_each_run([record for record in records if record.id in files])
    _refuse_ambiguous(chosen.records, files)
    if placed.elsewhere:
        refused = listed(refusals(placed.elsewhere))
        notes.append(f"{len(placed.elsewhere)} annotation files lie on another alignment: {refused}")
    out += [*chosen.left_out, *(LeftOut(one, "no such points") for one in records if one.id not in files)]
    return _Truth(query, chosen.records, out, [*notes, *chosen.ties], files, {})


def _asked_for(
    query: LabelQuery, on: Mapping[int, Sequence[AnnotationRecord]]
) -> dict[int, Sequence[AnnotationRecord]]:
    """Return the files of the annotations whose numbers were given, all where none was."""
    wanted = query.annotations()
    if not wanted:
        return dict(on)
    there = {file.id for files in on.values() for file in files}
    if missing := sorted(wanted - there):
        others = listed(dict.fromkeys(str(file) for files in on.values() for file in files))
        raise PortalError(
            f"no points of {', '.join(f'AN-{number}' for number in missing)} on the tomograms of {query}",
            expected="annotations that have points on these tomograms",
            remedy=f"choose from what is there: {others}",
        )
    kept = {key: [file for file in files if file.id in wanted] for key, files in on.items()}
    return {key: files for key, files in kept.items() if files}


def _refuse_ambiguous(
    records: Iterable[TomogramRecord], files: Mapping[int, Sequence[AnnotationRecord]]
) -> None:
    """Raise where several annotations of one tomogram may be its truth."""
    several = {
        record.run: list(dict.fromkeys(map(str, files[record.id])))
        for record in records
        if len({file.id for file in files[record.id]}) > 1
    }
    if several:
        shown = "; ".join(f"{run}: {', '.join(each)}" for run, each in list(several.items())[:6])
        more = f"; and {len(several) - 6} more runs" if len(several) > 6 else ""
        raise PortalError(
            f"several annotations may be the truth of {plural(len(several), 'run')}: {shown}{more}",
            expected="one annotation of each tomogram",
            remedy="choose by object=, ground_truth=yes, method=, annotation_deposition= or annotation=",
        )


def _drawn(truth: _Truth) -> list[Run]:
    """Return the runs that a query keeps for the test: by its seed and the runs alone."""
    runs = sorted(
        {run_key(record): by_place(record) for record in truth.records}.items(), key=lambda one: one[1]
    )
    wanted = truth.query.test
    if wanted >= len(runs):
        raise PortalError(
            f"test={wanted} of {plural(len(runs), 'run')} with truth in {truth.query}",
            expected="at least one run to learn from",
            remedy="lower test=",
        )
    order = np.random.default_rng(truth.query.test_seed).permutation(len(runs))
    return [runs[place][0] for place in order[:wanted]]


def _label(
    truth: _Truth, held: set[Run], names: Mapping[int, str], options: Mapping[str, Any] | None
) -> PortalLabels:
    """Return the examples of one query: what is not kept for the test, opened, with its picks."""
    query = truth.query
    learnt = [record for record in truth.records if run_key(record) not in held]
    if not learnt:
        raise PortalError(
            f"{query} has no run that is not kept for the test",
            expected="at least one run to learn from",
            remedy="lower test=",
        )
    picks, notes = dict(truth.picks), list(truth.notes)
    annotations: tuple[AnnotationRecord, ...] = ()
    if truth.files:
        own = tomogram_names(learnt)
        files = {record.id: truth.files[record.id] for record in learnt}
        found = read_placed(learnt, files, missing=query.missing, storage_options=options)
        picks = {key: found.picks[name] for key, name in own.items() if name in found.picks}
        annotations, notes = found.annotations, [*notes, *found.notes]
    opened, failed = _opened([record for record in learnt if record.id in picks], names, options)
    if failed and (query.missing == "error" or not opened):
        raise SourceError(
            f"{len(failed)} of {plural(len(learnt), 'tomogram')} cannot be read: "
            f"{listed((f'{record.run}: {why}' for record, why in failed), 3)}",
            expected="tomograms that are where the portal says",
            remedy="leave them out with exclude=, or with missing=skip",
        )
    out = [*truth.left_out, *(LeftOut(record, f"it cannot be read: {why}") for record, why in failed)]
    out += [LeftOut(record, "its points cannot be read") for record in learnt if record.id not in picks]
    examples = tuple(
        LabelledTomogram(
            tomogram=tomogram,
            picks=replace(picks[record.id], tomogram=names[record.id]),
            diameter=query.diameter,
            contrast=query.contrast,
            particle=picks[record.id].particle or "",
            group=f"DS-{record.dataset_id}/{record.run}",
            origin=f"TM-{record.id} of {record.run} (DS-{record.dataset_id})",
        )
        for record, tomogram in opened
    )
    records = tuple(record for record, _ in opened)
    lying = {file.file_id for one in records for file in truth.files.get(one.id, ())}
    annotations = tuple(file for file in annotations if file.file_id in lying)
    notes = [_summary(truth, examples, records, held), *notes]
    kept = sorted((record for record in truth.records if run_key(record) in held), key=by_place)
    test = Selection(tuple(kept), (), (f"{_KEPT}{query}, not learnt from.",))
    return PortalLabels(examples, Selection(records, tuple(out)), (test,), annotations, tuple(notes))


def _opened(
    records: Sequence[TomogramRecord], names: Mapping[int, str], options: Mapping[str, Any] | None
) -> tuple[list[tuple[TomogramRecord, Tomogram]], list[tuple[TomogramRecord, str]]]:
    """Return the tomograms whose headers can be read, and why others cannot; several at a time."""

    def attempt(record: TomogramRecord) -> Tomogram | str:
        try:
            return open_tomogram(record, name=names[record.id], storage_options=dict(options or {}) or None)
        except (ActionableError, OSError) as error:
            return str(error)

    opened, failed = [], []
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        for record, found in zip(records, pool.map(attempt, records), strict=True):
            if isinstance(found, Tomogram):
                opened.append((record, found))
            else:
                failed.append((record, found))
    return opened, failed


def _summary(
    truth: _Truth,
    examples: Sequence[LabelledTomogram],
    records: Sequence[TomogramRecord],
    held: set[Run],
) -> str:
    """Return what a query gave, as a sentence: runs, particles, what is kept aside, what has no truth."""
    counts: dict[str, int] = defaultdict(int)
    for one in examples:
        counts[one.particle or "particles"] += len(one.picks) if isinstance(one.picks, Picks) else 0
    found = ", ".join(f"{count} of {name}" for name, count in counts.items())
    parts = [
        f"{truth.query}: {plural(len({run_key(one) for one in records}), 'run')} to learn from ({found})"
    ]
    kept = dict.fromkeys(record.run for record in truth.records if run_key(record) in held)
    parts += [f"{len(kept)} kept for the test ({listed(kept)})"] if kept else []
    having = {run_key(record) for record in truth.records}
    none = dict.fromkeys(each.record.run for each in truth.left_out if run_key(each.record) not in having)
    parts += [f"{len(none)} left out, without the truth asked for ({listed(none)})"] if none else []
    return "; ".join(parts) + "."
