"""The stages of an ingestion: which jobs there are, and what their answers say together.

The jobs run on two threads of the calling process or on the workers of a client; either way they are
the same, and so are the bytes that they leave.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from tomocpt_stream.decoded import DECODED
from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import BrokenSourceError, SourceError
from tomocpt_stream.ingestion import (
    CHUNKS,
    Ingestion,
    IngestionAddress,
    NotFiniteError,
    key_of,
    search_fill,
    store_tile,
    with_traffic,
)
from tomocpt_stream.percentiles import Selection, unpack
from tomocpt_stream.progress import WorkerProgress, total
from tomocpt_stream.stages import Here, Job, Stage
from tomocpt_stream.statistics import (
    count_broken,
    count_lower_halves,
    count_upper_halves,
    measured_blocks,
    source_blocks,
)
from tomocpt_stream.threads import run_in_threads
from tomocpt_stream.tiles import cut, plan_tiles, voxels_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tomocpt_stream.frame import Box
    from tomocpt_stream.percentiles import Counts
    from tomocpt_stream.progress import Progress, Tally
    from tomocpt_stream.stages import Address
    from tomocpt_stream.statistics import Blocks


@dataclass(frozen=True)
class Intake:
    """One ingestion and where its jobs run: on the workers of `client`, or here where it is None.

    `volume` is what the calling process has open, `fingerprint` that of the volume in the store. A
    worker opens both once for all stages that know the same of the fill: `token` tells one run.
    """

    volume: Ingestion
    fingerprint: str
    client: Any
    progress: Progress
    token: str = field(default_factory=lambda: uuid4().hex)

    def run(self) -> tuple[Ingestion, tuple[float, ...]]:
        """Store all that is missing; return the volume, which knows its fill now, and p5, p50, p95.

        Raises
        ------
        SourceError
            Voxels are NaN or infinite, or so many are equal that p5 = p95; any other that reading
            the source raises.
        DuplicateError
            A chunk came out with other voxels than another run has put a receipt of.
        """
        try:
            known = self._with_fill()
            known._store_tiles()
            return known.volume, known._percentiles()
        except NotFiniteError:
            raise self._broken() from None
        finally:
            DECODED.forget()

    def _with_fill(self) -> Intake:
        """Return this with the fill of the source, which is searched once for a store."""
        if self.volume.rule == "tomocpt":
            return self
        voxels = math.prod(self.volume.tomogram.shape)
        (facts,) = self._answers("fill", search_fill, [Job("the whole source", None)], 0, voxels)
        found = self.volume
        return replace(self, volume=Ingestion(found.group, found.tomogram, found.grid, found.rule, facts))

    def _store_tiles(self) -> None:
        """Store every chunk that has no receipt yet."""
        volume = self.volume
        stored = volume.receipts.names()
        jobs, done = [], 0
        for tile in plan_tiles(volume.grid, volume.tomogram.shape, volume.tomogram.chunks, volume.rule):
            counted = sum(voxels_of(chunk) for chunk in cut(tile, CHUNKS) if key_of(chunk) in stored)
            done += counted
            if counted < voxels_of(tile):
                jobs.append(Job(f"tile {_label(tile)}", (tile, counted)))
        for _ in self._answers("ingest", store_tile, jobs, done, math.prod(volume.grid.shape)):
            pass

    def _percentiles(self) -> tuple[float, ...]:
        """Return p5, p50, p95 in two passes; equal ones are an error that says how many voxels are equal."""
        groups = measured_blocks(self.volume)
        jobs = [Job(_part(number, groups), blocks) for number, blocks in enumerate(groups)]
        voxels = sum(voxels_of(box) for blocks in groups for box in blocks)
        upper = self._sum(count_upper_halves, jobs, 0, 2 * voxels)
        selection = Selection(upper[0])
        jobs = [Job(job.label, (job.payload, selection.bins)) for job in jobs]
        lower = self._sum(count_lower_halves, jobs, voxels, 2 * voxels)
        found = selection.values(lower)
        if found[0] == found[2]:
            raise _flat(self.volume.tomogram.source, found[0], selection.share(found[0], lower))
        return found

    def _sum(self, function: Callable[..., bytes], jobs: list[Job], done: int, voxels: int) -> Counts:
        parts = self._answers("statistics", function, jobs, done, voxels)
        whole = unpack(next(parts))
        for part in parts:
            whole += unpack(part)
        return whole

    def _broken(self) -> SourceError:
        """Return the error that says how many voxels are NaN or infinite; they are counted once, by all."""
        source = self.volume.tomogram
        groups, voxels = source_blocks(self.volume), math.prod(source.shape)
        jobs = [Job(_part(number, groups), blocks) for number, blocks in enumerate(groups)]
        found = list(self._answers("check", count_broken, jobs, 0, voxels))
        count, first = sum(count for count, _ in found), min(first for _, first in found)
        if not count:
            return SourceError(
                f"{source.source}: some voxels were NaN or infinite, and were not when they were read again",
                expected="the same voxels at every read",
                remedy="run again; the file has changed or its disk is failing",
            )
        place = ", ".join(str(index) for index in np.unravel_index(first, source.shape))
        return BrokenSourceError(
            f"{source.source}: {count} of {voxels} voxels are NaN or infinite, "
            f"the first at z, y, x = {place}",
            expected="finite voxels",
            remedy="replace them before picking, for instance by the mean of the tomogram",
        )

    def _answers(
        self, name: str, function: Callable[..., Any], jobs: list[Job], done: int, voxels: int
    ) -> Iterator[Any]:
        """Yield the answers of jobs, of which `done` of all `voxels` are done before the first."""
        source = self.volume.tomogram
        work = function if self.client is None else partial(with_traffic, function)
        stage = Stage(name, source.name, work, self._address(), len(jobs))
        most, report = done, self.progress

        def watch(tallies: list[Tally]) -> None:
            nonlocal most
            if (now := done + int(total(tallies))) > most:  # less where a worker was lost
                most = now
                report(name, now, voxels)
            if isinstance(report, WorkerProgress):
                report.workers(name, tallies)

        report(name, done, voxels)
        if self.client is None:
            with closing(run_in_threads(stage, jobs, watch)) as answers:
                yield from (answer for _, answer in answers)
        else:
            for _, (answer, fetched) in run_jobs(stage, jobs, client=self.client, watch=watch):
                if source.traffic is not None and fetched is not None:
                    source.traffic.include(fetched)
                yield answer

    def _address(self) -> Address[Ingestion]:
        volume = self.volume
        if self.client is None:
            return Here(volume)
        return IngestionAddress(
            store=volume.group.store,
            tomogram=volume.tomogram,
            grid=volume.grid,
            rule=volume.rule,
            facts=volume.facts,
            fingerprint=self.fingerprint,
            run=self.token,
            token=f"volume {self.token} {volume.facts}",
        )


def _label(box: Box) -> str:
    """Return a box for people."""
    return " ".join(f"{axis} {side.start}:{side.stop}" for axis, side in zip("zyx", box, strict=True))


def _part(number: int, groups: list[Blocks]) -> str:
    """Return the blocks of a job for people."""
    return f"part {number + 1} of {len(groups)} ({_label(groups[number][0])} and on)"


def _flat(source: str, value: float, share: float) -> SourceError:
    return SourceError(
        f"{source}: {share:.1%} of the voxels have the value {value:g}, so that p5 = p95",
        expected="voxels of many values",
        remedy="check that this is the reconstruction and not a mask or an empty volume",
    )
