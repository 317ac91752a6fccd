"""Read back what was stored and compare it with its receipts.

Of a volume the voxels and the fill, of a map the scores, the marks and the candidates, object by object:
that each is there, whole, and has the sha256 that its receipt says. Percentiles and candidates are not
computed again. The source's own fill, which is not needed any more, is not looked at.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.peaks import CANDIDATE
from tomocpt_stream.progress import Progress, WorkerProgress, silent, total
from tomocpt_stream.receipts import (
    Receipts,
    StoreLike,
    as_store,
    config_hash,
    is_absent,
    read_bytes,
    read_json,
)
from tomocpt_stream.scoremap import SEAMS
from tomocpt_stream.scoring import SCORED
from tomocpt_stream.stages import Job, Stage
from tomocpt_stream.stored import AGAIN, checked
from tomocpt_stream.tiles import voxels_of
from tomocpt_stream.volume import ATTRIBUTE
from tomocpt_stream.voxels import shared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from zarr.abc.store import Store

    from tomocpt_stream.frame import Box
    from tomocpt_stream.progress import Tally
    from tomocpt_stream.stages import Report
    from tomocpt_stream.stored import CheckedArray

# By kind of store: the attribute that it has when it is finished, its arrays and their field of a receipt.
_FINISHED = {"volume": "percentiles", "heatmap": "finished"}
_HASHED = {
    "volume": {"0": "sha256", "fill": "fill_sha256"},
    "heatmap": {"0": "sha256", "marks": "marks_sha256"},
}
_FIELDS = {
    "volume": {"sha256"},
    "heatmap": {"sha256", "minimum", "maximum", "scored", "candidates", "plateau"},
}
JOB_BYTES = 128 << 20  # decoded voxels that one job reads
THREADS_BYTES = 64 << 20  # of them in memory at once
THREADS = 8
SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """A volume or a map as it lies in its store; one that is not finished has fewer chunks."""

    store: Store
    attributes: dict[str, Any]
    arrays: dict[str, CheckedArray]
    receipts: Receipts

    @property
    def kind(self) -> str:
        """What it is, "volume" or "heatmap"."""
        return str(self.attributes["kind"])

    @property
    def identity(self) -> str:
        """The hash of all that its contents follow from."""
        return str(self.attributes["fingerprint" if self.kind == "volume" else "hash"])

    @property
    def is_finished(self) -> bool:
        """Whether all of it was stored."""
        return _FINISHED[self.kind] in self.attributes

    def chunks(self) -> Iterator[str]:
        """Yield the key ("z.y.x") of every chunk."""
        array = self.arrays["0"]
        counts = (-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))
        return (".".join(map(str, place)) for place in product(*map(range, counts)))

    def box(self, key: str) -> Box:
        """Return the voxels of a chunk."""
        array, place = self.arrays["0"], map(int, key.split("."))
        z, y, x = (
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(place, array.chunks, array.shape, strict=True)
        )
        return (z, y, x)


@dataclass(frozen=True)
class StoredAddress:
    """The address of a `Stored`."""

    store: Store
    token: str

    def open(self) -> Stored:
        """Open it."""
        return open_stored(self.store)


@dataclass
class Findings:
    """What was found of some chunks: sentences, and what their receipts count (candidates, plateau)."""

    damage: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Findings) -> None:
        """Take up what was found of other chunks."""
        self.damage += other.damage
        self.counts.update(other.counts)


def verify(
    store: StoreLike,
    *,
    client: Any = None,
    progress: Progress = silent,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return a sentence for every object of a volume or map that is missing or damaged; none, if all is well.

    `store` is a path, an address (with `storage_options` as those of `remote.connect`) or a zarr store. Of
    a finished one every chunk must have a receipt; of one that is not, the chunks that have one are read.
    With a `client` its workers read. Memory is about 0.1 GB in each process, or that of three chunks where
    they are larger.

    Raises
    ------
    CheckpointError
        The store holds neither a volume nor a map.
    JobError
        The store could not be read, three times; what it said is the cause.
    """
    target = _existing(store, storage_options)
    target = target if client is None else shared(target)
    opened = open_stored(target)
    found = Findings(_lost_arrays(opened))
    if found.damage:
        return found.damage
    names = opened.receipts.names()
    keys = [key for key in opened.chunks() if key in names]
    found.damage += _bookkeeping(opened, names)
    jobs = [Job(f"chunks {group[0]} to {group[-1]}", group) for group in _groups(keys, opened)]
    address = StoredAddress(target, f"verify {target} {opened.identity}")
    stage = Stage("verify", str(opened.attributes["name"]), verify_chunks, address, len(jobs))
    voxels = sum(voxels_of(opened.box(key)) for key in keys)

    def watch(tallies: list[Tally]) -> None:
        progress("verify", int(total(tallies)), voxels)
        if isinstance(progress, WorkerProgress):
            progress.workers("verify", tallies)

    progress("verify", 0, voxels)
    answers = {job.label: answer for job, answer in run_jobs(stage, jobs, client=client, watch=watch)}
    progress("verify", voxels, voxels)
    for job in jobs:  # which end in any order
        found.add(answers[job.label])
    return list(dict.fromkeys(found.damage + _summary(opened, found)))


def refuse_damaged(store: StoreLike, *, client: Any = None, progress: Progress = silent) -> None:
    """Raise a CheckpointError that names what `verify` finds to be missing or damaged."""
    damage = verify(store, client=client, progress=progress)
    if damage:
        more = f"; and {len(damage) - SHOWN} more" if len(damage) > SHOWN else ""
        raise CheckpointError(
            f"{len(damage)} objects are damaged or missing: {'; '.join(damage[:SHOWN])}{more}",
            expected="what was stored, as its receipts say",
            remedy=AGAIN,
        )


def open_stored(store: Store) -> Stored:
    """Open a volume or a map, finished or not; raises CheckpointError where there is neither."""
    found = (read_json(store, "zarr.json") or {}).get("attributes", {}).get(ATTRIBUTE, {})
    if found.get("kind") not in _HASHED:
        raise CheckpointError(
            f"{store} holds neither a volume nor a heat map",
            expected="a store that `ingest` or `predict` wrote",
            remedy="give the folder of a working volume or of a map",
        )
    group = zarr.open_group(store, mode="r", zarr_format=3)
    arrays = {
        name: checked(zarr.open_array(store, path=name, mode="r", zarr_format=3))
        for name in _HASHED[found["kind"]]
        if name in group
    }
    return Stored(store, found, arrays, Receipts(store, found["kind"]))


def verify_chunks(keys: Sequence[str], opened: Stored, report: Report) -> Findings:
    """Return what is missing or damaged of some chunks; `report` is told the voxels that are read.

    Several are read at a time: most of the time of a distant store goes in waiting.
    """

    def examine(key: str) -> Findings:
        one = _verify_chunk(key, opened)
        return _verify_chunk(key, opened) if one.damage else one  # it may be the network that cut it short

    found, done = Findings(), 0
    at_once = max(1, min(THREADS, THREADS_BYTES // _chunk_bytes(opened)))
    with ThreadPoolExecutor(at_once, "verify") as threads:
        for key, one in zip(keys, threads.map(examine, keys), strict=True):
            found.add(one)
            done += voxels_of(opened.box(key))
            report({"done": done, "voxels": done})
    return found


def _verify_chunk(key: str, opened: Stored) -> Findings:
    try:
        receipt = opened.receipts.get(key)
    except CheckpointError as error:
        return Findings([error.found])
    if receipt is None:
        return Findings([_without_receipt(key, opened)])
    if lacking := sorted(_FIELDS[opened.kind] - set(receipt)):
        return Findings([f"{opened.store} has a receipt of chunk {key} without {', '.join(lacking)}"])
    found = Findings()
    if receipt.get("config", opened.identity) != opened.identity:
        found.damage.append(f"{opened.store} has a receipt of chunk {key} that is of another configuration")
    stored = {}
    for name, field_name in _HASHED[opened.kind].items():
        voxels, damage = _read(name, key, receipt.get(field_name), opened)
        found.damage += damage
        if voxels is not None:
            stored[name] = voxels
    if opened.kind == "heatmap":
        found.damage += _verify_table(key, receipt, opened)
        if not found.damage:
            found.damage += _verify_numbers(key, receipt, stored, opened)
        found.counts.update({name: receipt[name] for name in ("candidates", "plateau", "scored")})
    return found


def _read(
    name: str, key: str, wanted: str | None, opened: Stored
) -> tuple[npt.NDArray[Any] | None, list[str]]:
    """Return the elements of an array in a chunk, and what is wrong with them."""
    array = opened.arrays.get(name)
    if array is None:
        return None, [] if wanted is None else [_lost(f"{name}/zarr.json", opened)]
    try:
        voxels = np.ascontiguousarray(array[opened.box(key)])
    except CheckpointError as error:
        return None, [error.found]
    return voxels, _unlike(opened, f"{name}/c/{key.replace('.', '/')}", voxels, wanted)


def _verify_table(key: str, receipt: dict[str, Any], opened: Stored) -> list[str]:
    """Return what is wrong with the candidates of a chunk; a table of none may be absent."""
    name = receipt.get("table", f"candidates/{key}")
    data = read_bytes(opened.store, name)
    if data is None:
        return [_lost(name, opened)] if receipt["candidates"] else []
    wanted = receipt["candidates"] * CANDIDATE.itemsize
    if len(data) != wanted:
        return [f"{opened.store} has an object {name} of {len(data)} bytes instead of {wanted}"]
    return _unlike(opened, name, data, receipt.get("candidates_sha256"))


def _verify_numbers(
    key: str, receipt: dict[str, Any], stored: dict[str, npt.NDArray[Any]], opened: Stored
) -> list[str]:
    """Return the numbers of a receipt that are not those of the chunk's scores and marks."""
    scores, marks = stored["0"], stored.get("marks")
    numbers = {
        "minimum": float(scores.min()),
        "maximum": float(scores.max()),
        "scored": scores.size if marks is None else int(np.count_nonzero(marks & SCORED)),
    }
    return [
        f"{opened.store} has a receipt of chunk {key} with {name} {receipt[name]} instead of {number}"
        for name, number in numbers.items()
        if receipt[name] != number
    ]


def _unlike(opened: Stored, path: str, data: Any, wanted: str | None) -> list[str]:
    """Return a sentence where data have not the sha256 of their receipt; an old one may have none."""
    digest = hashlib.sha256(data).hexdigest()
    if wanted in (None, digest):
        return []
    return [
        f"{opened.store} has an object {path} that is not what was stored (sha256 {digest[:12]} "
        f"instead of {wanted[:12]})"
    ]


def _lost(path: str, opened: Stored) -> str:
    return f"{opened.store} has lost its object {path}"


def _lost_arrays(opened: Stored) -> list[str]:
    """Return a sentence for each array that must be there and is not."""
    wanted = ["0"]
    if opened.attributes.get("fill"):
        wanted.append("fill")
    if opened.attributes["config"].get("mask"):
        wanted.append("marks")
    return [_lost(f"{name}/zarr.json", opened) for name in wanted if name not in opened.arrays]


def _bookkeeping(opened: Stored, names: set[str]) -> list[str]:
    """Return what is wrong with the metadata, and with which chunks have receipts."""
    damage = []
    if config_hash(opened.attributes["config"]) != opened.identity:
        damage.append(
            f"{opened.store} has an object zarr.json whose configuration has another hash than it says"
        )
    keys = list(opened.chunks())
    if opened.is_finished:
        damage += [_without_receipt(key, opened) for key in keys if key not in names]
    damage += [
        f"{opened.store} has a receipt of {key}, which is no chunk" for key in sorted(names - set(keys))
    ]
    return damage


def _without_receipt(key: str, opened: Stored) -> str:
    return f"{opened.store} has no receipt of chunk {key}"


def _summary(opened: Stored, found: Findings) -> list[str]:
    """Return what is wrong with what a finished map says of all its chunks, and with its seams."""
    if opened.kind != "heatmap" or not opened.is_finished:
        return []
    said = opened.attributes["finished"]
    data = read_bytes(opened.store, SEAMS)
    if data is None:
        return [_lost(SEAMS, opened)]
    damage = _unlike(opened, SEAMS, data, said.get("seams_sha256"))
    if damage or found.damage:  # the numbers of what is damaged mean nothing
        return damage
    rows = found.counts["candidates"] + len(data) / CANDIDATE.itemsize
    if said["minimum"] != said["maximum"]:
        rows += found.counts["plateau"]
    numbers = {"candidates": rows, "scored": found.counts["scored"]}
    return [
        f"{opened.store} says that it has {said[name]} {name} and has {number:g}"
        for name, number in numbers.items()
        if said[name] != number
    ]


def _groups(keys: Iterable[str], opened: Stored) -> Iterator[list[str]]:
    """Yield the keys in groups of `JOB_BYTES`."""
    size, ahead = max(1, JOB_BYTES // _chunk_bytes(opened)), iter(keys)
    while group := list(islice(ahead, size)):
        yield group


def _chunk_bytes(opened: Stored) -> int:
    return math.prod(opened.arrays["0"].chunks) * opened.arrays["0"].dtype.itemsize


def _existing(store: StoreLike, storage_options: Mapping[str, Any] | None) -> Store:
    """Return a store; opening a folder that is not there would make it."""
    if is_absent(store):
        raise CheckpointError(
            f"there is no folder {store}",
            expected="a store that `ingest` or `predict` wrote",
            remedy="give the folder of a working volume or of a map",
        )
    return as_store(store, storage_options)
