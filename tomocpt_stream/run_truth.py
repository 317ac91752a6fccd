"""Coordinate files as the truth of runs of the portal: of which run a table is, and of which tomogram.

The name in a file is that of the run, or comes from it by what programs add (`series_name`). Where the
file says its voxel size, it is the run's tomogram of that voxel spacing that is meant.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from tomocpt_stream.annotation_files import listed
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds
from tomocpt_stream.formats.series_names import series_name
from tomocpt_stream.portal_records import LeftOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tomocpt_stream.picks import Picks
    from tomocpt_stream.portal_records import Selection, TomogramRecord

Run: TypeAlias = tuple[int, int]
"""A run of the portal: dataset and id."""

Extent: TypeAlias = tuple[tuple[int, int, int], float]
"""Shape z, y, x and voxel size in Å."""

_SOME: Extent = ((1, 1, 1), 1.0)
# Voxel sizes that differ by less are one that somebody rounded: 10 Å for 10.012.
_ROUNDED = 0.01


@dataclass(frozen=True)
class RunTruth:
    """Tomograms, their picks by id, tomograms that are left out, and sentences on what fits nothing."""

    records: tuple[TomogramRecord, ...]
    picks: dict[int, Picks]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def read_truth(
    paths: Sequence[str],
    records: Sequence[TomogramRecord],
    of_each_run: Callable[[Sequence[TomogramRecord]], Selection],
    *,
    particle: str | None = None,
) -> RunTruth:
    """Return the picks of files by the tomograms they lie on; of several of a run, `of_each_run` decides.

    Raises
    ------
    FormatError
        A file cannot be read; no table is of any run, or one may be of several runs; a run has two tables
        or kinds of particles; or it is not clear, or not possible, whose voxels a table counts.
    """
    tables = _Tables(records, particle)
    unsized = [path for path in paths if not tables.add(path)]
    chosen = of_each_run([record for record in records if tables.may_be_of(record, sized=bool(unsized))])
    picks: dict[int, Picks] = {}
    for layer in _layers(chosen.records):
        read = _Tables(layer, particle, tables.found)
        for path in unsized:  # which need the size of the tomogram, and count no voxels of their own
            read.add(path, read.sizes(path))
        tables.strange |= {name: None for name in read.strange if not tables.knows(name)}
        for record in layer:
            if (table := read.found.get(run_key(record))) is not None:
                picks[record.id] = replace(table, voxel_size=record.voxel_spacing, shape=record.shape)
    if not picks:
        raise FormatError(
            f"no picks of any run in {listed(paths)}: their tomograms are {listed(tables.strange)}",
            expected=f"tomograms called as the runs are: {listed(dict.fromkeys(r.run for r in records))}",
            remedy="rename the tomograms in the files",
        )
    notes = list(chosen.ties)
    if tables.strange:
        notes.append(f"Picks of no run that is asked for: {listed(tables.strange)}.")
    out = [LeftOut(record, "no picks of it in the files of truth") for record in records]
    chosen_out = {each.record.id: each for each in chosen.left_out}
    left = tuple(chosen_out.get(each.record.id, each) for each in out if each.record.id not in picks)
    taken = tuple(record for record in chosen.records if record.id in picks)
    return RunTruth(taken, picks, left, tuple(notes))


class _Tables:
    """The tables of files by the runs they are of, and the names that are of none (`strange`)."""

    def __init__(
        self,
        records: Sequence[TomogramRecord],
        particle: str | None,
        found: Mapping[Run, Picks] | None = None,
    ) -> None:
        self.records, self.particle = records, particle
        self.found: dict[Run, Picks] = dict(found or {})
        self.strange: dict[str, None] = {}
        self._called: dict[str, set[Run]] = defaultdict(set)
        self._series: dict[str, set[Run]] = defaultdict(set)
        for record in records:
            self._called[record.run].add(run_key(record))
            self._called[record.name].add(run_key(record))
            self._series[series_name(record.run)].add(run_key(record))

    def add(self, path: str, sizes: Mapping[str, Extent] | None = None) -> bool:
        """Take the tables of a file; return whether it could be read without the `sizes` of tomograms."""
        try:
            tables = read_kinds(path, tomograms=dict(sizes) if sizes else None, particle=self.particle)
        except FormatError:
            if sizes is None:
                return False
            raise
        known = {table.particle for table in tables}
        if self.particle is not None and self.particle in known:
            tables = [table for table in tables if table.particle == self.particle]
        elif self.particle is not None and known - {""}:
            raise FormatError(
                f"{path} has no picks of {self.particle!r}",
                expected=f"one of its kinds: {listed(sorted(known))}",
                remedy="correct particle=",
            )
        for table in tables:
            self._take(path, table)
        return True

    def sizes(self, path: str) -> dict[str, Extent]:
        """Return the sizes of tomograms by their runs and by the names in a file that needs sizes.

        A name that is of no run here is given some size: where its picks lie does not matter.
        """
        of_run = {run_key(record): (record.shape, record.voxel_spacing) for record in self.records}
        sizes = {record.run: of_run[run_key(record)] for record in self.records}
        with suppress(FormatError):  # what else the file lacks is said when it is read
            for table in read_kinds(path, shape=_SOME[0], voxel_size=_SOME[1], particle=self.particle):
                keys = self._keys(table.tomogram)
                sizes[table.tomogram] = of_run[next(iter(keys))] if len(keys) == 1 else _SOME
        return sizes

    def may_be_of(self, record: TomogramRecord, *, sized: bool) -> bool:
        """Return whether a table's voxels may be those of a tomogram; `sized`: some were not read yet."""
        table = self.found.get(run_key(record))
        if table is None:
            return sized
        spacings = {other.voxel_spacing for other in self.records if run_key(other) == run_key(record)}
        shown = listed(f"{spacing:g}" for spacing in sorted(spacings))
        if table.voxel_size is None and len({round(spacing, 1) for spacing in spacings}) > 1:
            raise FormatError(
                f"the picks of {record.run} are in voxels of an unsaid size; its tomograms have {shown} Å",
                expected="one voxel size",
                remedy="choose it by voxel_spacing=",
            )
        if table.voxel_size is not None and not any(_close(table.voxel_size, one) for one in spacings):
            raise FormatError(
                f"the picks of {record.run} are in voxels of {table.voxel_size:g} Å",
                expected=f"voxels of one of its tomograms: {shown} Å",
                remedy="convert them (`tomocpt-stream convert`), or ask for tomograms of that spacing",
            )
        return table.voxel_size is None or _close(table.voxel_size, record.voxel_spacing)

    def knows(self, name: str) -> bool:
        """Return whether a name is that of a run."""
        return bool(self._keys(name))

    def _keys(self, name: str) -> set[Run]:
        return self._called.get(name) or self._series.get(series_name(name)) or set()

    def _take(self, path: str, table: Picks) -> None:
        name, keys = table.tomogram, self._keys(table.tomogram)
        if len(keys) > 1:
            raise FormatError(
                f"the tomogram {name!r} of {path} may be any of {len(keys)} runs",
                expected="one run of that name",
                remedy="ask for one dataset at a time",
            )
        if not keys:
            self.strange[name] = None
            return
        (key,) = keys
        if key in self.found:
            kinds = {table.particle, self.found[key].particle}
            several = f"of the kinds {listed(sorted(kinds))}" if len(kinds) > 1 else "twice"
            raise FormatError(
                f"picks of the run of {name!r} {several}, in {path}",
                expected="one table of one kind for each run",
                remedy="choose a kind by particle=" if len(kinds) > 1 else "put them into one file",
            )
        self.found[key] = table


def _layers(records: Iterable[TomogramRecord]) -> list[list[TomogramRecord]]:
    """Return records in lists that have each run at most once."""
    layers: list[list[TomogramRecord]] = []
    depth: dict[Run, int] = defaultdict(int)
    for record in records:
        place = depth[run_key(record)]
        depth[run_key(record)] += 1
        if place == len(layers):
            layers.append([])
        layers[place].append(record)
    return layers


def run_key(record: TomogramRecord) -> Run:
    """Return what tomograms of one run have in common; one of no run has nothing in common with others."""
    return record.dataset_id, record.run_id or -record.id


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDED * other
