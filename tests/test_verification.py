"""Verification: whatever is done to a stored object, a sentence names it; and nothing else is named."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from numcodecs import Blosc
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from tests.cuts import budget
from tests.scorers import SMALL, MatchedFilter
from tomocpt_stream import verification
from tomocpt_stream.blocks import plan_blocks
from tomocpt_stream.errors import CheckpointError, JobError, PlanError
from tomocpt_stream.heatmap import PickOptions, predict
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.verification import open_stored, refuse_damaged, verify, verify_chunks
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distributed import Client

SHAPE = (70, 60, 66)


def source() -> Any:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    voxels[:, :30] = 0.0  # fill, so that there are marks
    return open_tomogram(voxels, voxel_size=10.0, name="TS_1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume `v` of 2 x 1 x 2 chunks and its map `m` of 3 x 2 x 3; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    volume = ingest(source(), folder / "v", voxel_size=10.0)
    options = PickOptions(60.0, stitch="crop", batch_size=3, contrast="dark")
    cut: dict[str, Any] = {"stitch": "crop", "batch_size": 3, "chunk": 30}
    plan = plan_blocks(volume.shape, SMALL, memory=budget(volume.shape, SMALL, 0, **cut), **cut)
    assert len(plan.tasks) > 1  # so that there are seams
    predict(volume, MatchedFilter(), plan, store=folder / "m", options=options)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def table(folder: Path, key: str = "1.1.1") -> str:
    """The name of the candidates of a chunk, which has some."""
    receipt = json.loads((folder / "m" / "receipts" / "heatmap" / f"{key}.json").read_text())
    assert receipt["candidates"] > 2
    return str(receipt["table"])


@pytest.mark.parametrize(("name", "arrays", "chunks"), [("v", {"0", "fill"}, 4), ("m", {"0", "marks"}, 18)])
def test_what_was_stored_is_well(made: Path, name: str, arrays: set[str], chunks: int) -> None:
    reports: list[tuple[str, int, int]] = []
    assert verify(made / name, progress=lambda *report: reports.append(report)) == []
    assert reports[0] == ("verify", 0, math.prod(SHAPE))
    assert reports[-1] == ("verify", math.prod(SHAPE), math.prod(SHAPE))
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    refuse_damaged(made / name)
    stored = open_stored(LocalStore(made / name))
    assert set(stored.arrays) == arrays
    assert len(list(stored.chunks())) == chunks


ARRAY_OBJECTS = ["v/0/c/1/0/0", "v/fill/c/0/0/1", "m/0/c/2/1/0", "m/marks/c/0/0/2"]


@pytest.mark.parametrize("path", ARRAY_OBJECTS)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, r"not what was stored \(sha256 \w{12} instead of \w{12}\)|cannot be decoded"),
        (cut, "cut short: "),
        (lambda path: path.write_bytes(b""), "cut short: 0 bytes"),
        (lambda path: path.unlink(), "lost its object"),
    ],
)
def test_a_damaged_chunk_is_named(copy: Path, path: str, damage: Callable[[Path], None], says: str) -> None:
    store, key = path[0], path[2:]
    before = (copy / path).read_bytes()
    damage(copy / path)
    (found,) = verify(copy / store)
    assert f"object {key} " in f"{found} "
    assert str(copy / store) in found
    assert re.search(says, found)
    with pytest.raises(
        CheckpointError, match=f"1 objects are damaged or missing: .*{key}.*delete this store"
    ):
        refuse_damaged(copy / store)
    (copy / path).write_bytes(before)
    assert verify(copy / store) == []


def test_any_wrong_byte_of_any_object_is_named_or_changes_nothing(copy: Path) -> None:
    numbers = np.random.default_rng(1)
    paths = [path for path in sorted((copy / "m").rglob("*")) if path.is_file() and path.suffix != ".json"]
    assert len(paths) == 18 * 3 + 1  # chunks, marks, candidates, seams
    before = {path: data for path in paths if (data := path.read_bytes())}
    for path in numbers.permutation(np.array(list(before), dtype=object))[:12]:
        changed = bytearray(before[path])
        changed[numbers.integers(len(changed))] ^= 1 << numbers.integers(8)
        path.write_bytes(changed)
        key = path.relative_to(copy / "m").as_posix()
        found = verify(copy / "m")
        same = key.startswith(("0/", "marks/")) and _decoded(copy, key) == _decoded_bytes(before[path])
        assert [key in sentence for sentence in found] == ([] if same else [True])
        path.write_bytes(before[path])


def _decoded_bytes(data: bytes) -> bytes:
    return bytes(Blosc().decode(data))


def _decoded(folder: Path, key: str) -> bytes:
    try:
        return _decoded_bytes((folder / "m" / key).read_bytes())
    except RuntimeError:
        return b""


def test_the_voxels_of_another_chunk_are_not_those_of_this_one(copy: Path) -> None:
    shutil.copy(copy / "m/0/c/0/1/0", copy / "m/0/c/1/1/0")
    (found,) = verify(copy / "m")
    assert "object 0/c/1/1/0 that is not what was stored" in found


@pytest.mark.parametrize("key", ["1.1.1", "seams"])
def test_damaged_candidates_are_named(copy: Path, key: str) -> None:
    name = "candidates/seams" if key == "seams" else table(copy, key)
    path = copy / "m" / name
    before = path.read_bytes()
    path.unlink()
    assert verify(copy / "m") == [f"file://{copy}/m has lost its object {name}"]
    path.write_bytes(before)
    flip(path)
    (found,) = verify(copy / "m")
    assert f"object {name} that is not what was stored" in found
    for wrong in (before[:-1], before[:-30], before + before[:30]):
        path.write_bytes(wrong)
        (found,) = verify(copy / "m")
        assert name in found


def test_a_table_of_no_candidates_may_be_absent(copy: Path) -> None:
    empty = [path for path in (copy / "m" / "candidates").iterdir() if path.stat().st_size == 0]
    assert empty
    for path in empty:
        path.unlink()
    assert verify(copy / "m") == []


@pytest.mark.parametrize(("store", "key"), [("v", "1.0.0"), ("m", "2.0.1")])
def test_a_chunk_without_a_receipt_is_named(copy: Path, store: str, key: str) -> None:
    folder = copy / store / "receipts" / {"v": "volume", "m": "heatmap"}[store]
    receipt = folder / f"{key}.json"
    before = receipt.read_bytes()
    receipt.unlink()
    assert verify(copy / store) == [f"file://{copy}/{store} has no receipt of chunk {key}"]
    receipt.write_bytes(before[:-2])
    (found,) = verify(copy / store)
    assert f"{key}.json of the store is no JSON" in found
    receipt.write_text("{}")
    (found,) = verify(copy / store)
    assert f"receipt of chunk {key} without " in found
    assert "sha256" in found
    receipt.write_bytes(before)
    (folder / "9.9.9.json").write_bytes(before)
    assert verify(copy / store) == [f"file://{copy}/{store} has a receipt of 9.9.9, which is no chunk"]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sha256", "0" * 64, "0/c/1/1/1 that is not what was stored"),
        ("marks_sha256", "0" * 64, "marks/c/1/1/1 that is not what was stored"),
        ("candidates_sha256", "0" * 64, "candidates/1.1.1-"),
        ("candidates", 1, "candidates/1.1.1-"),
        ("minimum", -99.0, "receipt of chunk 1.1.1 with minimum -99.0 instead of "),
        ("maximum", 99.0, "receipt of chunk 1.1.1 with maximum 99.0 instead of "),
        ("scored", 1, "receipt of chunk 1.1.1 with scored 1 instead of "),
        ("plateau", 7, "candidates and has"),
        ("config", "0" * 64, "receipt of chunk 1.1.1 that is of another configuration"),
    ],
)
def test_an_altered_receipt_is_noticed(copy: Path, field: str, value: Any, says: str) -> None:
    change(copy / "m" / "receipts" / "heatmap" / "1.1.1.json", **{field: value})
    (found,) = verify(copy / "m")
    assert says in found


@pytest.mark.parametrize(("field", "name"), [("sha256", "0"), ("fill_sha256", "fill")])
def test_an_altered_receipt_of_a_volume_is_noticed(copy: Path, field: str, name: str) -> None:
    change(copy / "v" / "receipts" / "volume" / "0.0.1.json", **{field: "0" * 64})
    (found,) = verify(copy / "v")
    assert f"object {name}/c/0/0/1 that is not what was stored" in found


def attributes(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "zarr.json").read_text())["attributes"]["tomocpt_stream"])


def alter(folder: Path, **fields: Any) -> None:
    found = json.loads((folder / "zarr.json").read_text())
    found["attributes"]["tomocpt_stream"] |= fields
    (folder / "zarr.json").write_text(json.dumps(found))


def test_altered_metadata_are_noticed(copy: Path) -> None:
    finished = attributes(copy / "m")["finished"]
    for name in ("candidates", "scored"):
        alter(copy / "m", finished={**finished, name: finished[name] + 1})
        (found,) = verify(copy / "m")
        assert f"says that it has {finished[name] + 1} {name} and has {finished[name]}" in found
    alter(copy / "m", finished=finished)
    for store in ("v", "m"):
        config = attributes(copy / store)["config"]
        alter(copy / store, config={**config, "format_version": 0})
        (found,) = verify(copy / store)
        assert "configuration has another hash" in found


@pytest.mark.parametrize("name", ["v/0", "v/fill", "m/0", "m/marks"])
def test_a_lost_array_is_named_once(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name)
    assert verify(copy / name[0]) == [f"file://{copy}/{name[0]} has lost its object {name[2:]}/zarr.json"]


def test_older_receipts_are_checked_by_what_they_have(copy: Path) -> None:
    for path in (copy / "m" / "receipts" / "heatmap").iterdir():
        receipt = json.loads(path.read_text())
        (copy / "m" / receipt["table"]).rename(copy / "m" / "candidates" / path.stem)
        for field in ("config", "marks_sha256", "candidates_sha256", "table", "worker", "versions"):
            del receipt[field]
        path.write_text(json.dumps(receipt))
    finished = attributes(copy / "m")["finished"]
    del finished["seams_sha256"]
    alter(copy / "m", finished=finished)
    assert verify(copy / "m") == []
    cut(copy / "m/marks/c/0/0/0")
    cut(copy / "m/candidates/1.1.1")
    (copy / "m/candidates/0.1.0").unlink()
    found = verify(copy / "m")
    named = ["marks/c/0/0/0", "candidates/0.1.0", "candidates/1.1.1"]
    assert [any(name in sentence for sentence in found) for name in named] == [True] * len(found)
    shutil.rmtree(copy / "m/marks")
    alter(copy / "m", config={**attributes(copy / "m")["config"], "mask": "some"})
    assert verify(copy / "m") == [f"file://{copy}/m has lost its object marks/zarr.json"]
    for path in (copy / "v" / "receipts" / "volume").iterdir():
        path.write_text(json.dumps({"sha256": json.loads(path.read_text())["sha256"]}))
    assert verify(copy / "v") == []
    cut(copy / "v/fill/c/0/0/0")
    assert len(verify(copy / "v")) == 1


def test_all_damage_is_named_in_the_order_of_the_chunks(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = [f"0/c/{z}/0/{x}" for z in range(3) for x in range(3)]
    for key in damaged:
        cut(copy / "m" / key)
    found = verify(copy / "m")
    assert [key in sentence for key, sentence in zip(damaged, found, strict=True)] == [True] * 9
    with pytest.raises(CheckpointError, match=r"9 objects .*0/c/0/0/2.*; and 6 more; expected"):
        refuse_damaged(copy / "m")
    monkeypatch.setattr(verification, "JOB_BYTES", 1)  # one chunk a job
    assert verify(copy / "m") == found


def test_what_is_not_finished_is_verified_as_far_as_it_is(copy: Path) -> None:
    found = json.loads((copy / "v" / "zarr.json").read_text())
    del found["attributes"]["tomocpt_stream"]["percentiles"]
    (copy / "v" / "zarr.json").write_text(json.dumps(found))
    (copy / "v/receipts/volume/0.0.0.json").unlink()
    (copy / "v/0/c/0/0/0").unlink()
    assert verify(copy / "v") == []
    cut(copy / "v/0/c/0/0/1")
    (sentence,) = verify(copy / "v")
    assert "0/c/0/0/1" in sentence


def test_chunks_are_verified_by_a_pure_function(copy: Path) -> None:
    opened = open_stored(LocalStore(copy / "v"))
    cut(copy / "v/0/c/0/0/1")
    reports: list[float] = []
    found = verify_chunks(["0.0.0", "0.0.1"], opened, lambda numbers: reports.append(numbers["done"]))
    assert len(found.damage) == 1
    assert reports == [64 * 60 * 64, 64 * 60 * 66]
    assert verify_chunks(["0.0.0"], opened, lambda numbers: None).damage == []
    assert "no receipt of chunk 7.7.7" in verify_chunks(["7.7.7"], opened, lambda numbers: None).damage[0]


def test_what_is_no_volume_and_no_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        verify(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    zarr.create_group(tmp_path / "g")
    for store in (tmp_path, tmp_path / "g", MemoryStore()):
        with pytest.raises(CheckpointError, match="neither a volume nor a heat map"):
            verify(store)


class Failing(WrapperStore[LocalStore]):
    """A store some of whose requests for a chunk fail, or come back cut short."""

    def __init__(self, store: LocalStore, left: dict[str, int] | None = None) -> None:
        super().__init__(store)
        self.left = {"failures": 0, "cuts": 0} if left is None else left

    def _with_store(self, store: LocalStore) -> Failing:
        return Failing(store, self.left)

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        found: Any = await super().get(key, *arguments, **options)
        for what in ("failures", "cuts"):
            if key == "0/c/1/0/0" and self.left[what]:
                self.left[what] -= 1
                if what == "failures":
                    raise ConnectionError("503 Slow Down")
                return found[: len(found) // 2]
        return found


def test_a_store_that_fails_is_not_called_damaged(made: Path) -> None:
    store = Failing(LocalStore(made / "v"))
    for what, times in (("failures", 2), ("cuts", 1)):
        store.left[what] = times
        assert verify(store) == []
        assert store.left[what] == 0
    store.left["failures"] = 10**9
    with pytest.raises(JobError, match="503 Slow Down"):
        verify(store)


def test_workers_find_the_same(copy: Path, workers: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "JOB_BYTES", 200_000)
    assert verify(copy / "m", client=workers) == []
    for key in ("0/c/0/0/1", "0/c/2/1/0"):
        flip(copy / "m" / key)
    (copy / "m" / table(copy)).unlink()
    found = verify(copy / "m", client=workers)
    assert len(found) == 3
    assert found == verify(copy / "m")
    with pytest.raises(PlanError, match="which only this process can use"):
        verify(MemoryStore(), client=workers)
