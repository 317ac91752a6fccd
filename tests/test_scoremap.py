"""The store of a map: who claims it, whoever else does at that moment."""

from __future__ import annotations

import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from tests.cuts import budget
from tests.races import Interrupted, race
from tests.scorers import SMALL, Identity
from tomocpt_stream.blocks import plan_blocks
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.heatmap import PickOptions, predict
from tomocpt_stream.receipts import read_json, write_bytes
from tomocpt_stream.scoremap import Heatmap, claim_store, member, open_heatmap
from tomocpt_stream.stored import OwnStore
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

    from tomocpt_stream.volume import Volume

SHAPE = (30, 40, 50)


@pytest.fixture(scope="module")
def volume() -> Volume:
    source = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return ingest(open_tomogram(source, voxel_size=10.0), MemoryStore(), voxel_size=10.0)


def claim(store: Store, volume: Volume, floor: float, **config: Any) -> dict[str, Any]:
    plan = plan_blocks(volume.shape, SMALL, chunk=24)
    return claim_store(store, volume, plan, {"mask": "some", **config}, floor=floor)


def score(store: Store, volume: Volume, threshold: float, *, tasks: bool = False) -> Heatmap:
    options = PickOptions(60.0, stitch="crop", batch_size=3, threshold=threshold, contrast="dark")
    cut: dict[str, Any] = {"stitch": "crop", "batch_size": 3, "chunk": 24}
    memory = budget(volume.shape, SMALL, 0, **cut) if tasks else None
    plan = plan_blocks(volume.shape, SMALL, memory=memory, **cut)
    assert (len(plan.tasks) > 1) == tasks
    return predict(volume, Identity(), plan, store=store, options=options)


CLAIMS = [
    ("get", "zarr.json"),
    ("list", ""),
    ("put", "zarr.json"),
    ("get", "0/zarr.json"),
    ("set", "0/zarr.json"),
    ("set", "marks/zarr.json"),
]


@pytest.mark.parametrize(("method", "key"), CLAIMS)
@pytest.mark.parametrize("in_memory", [False, True])
def test_two_claims_agree_on_the_floor(
    tmp_path: Path, volume: Volume, method: str, key: str, in_memory: bool
) -> None:
    inner: Store = MemoryStore() if in_memory else LocalStore(tmp_path / "m")
    others: list[dict[str, Any]] = []
    store = Interrupted(inner, method, key, lambda: others.append(claim(inner, volume, 0.01)))
    ours = claim(store, volume, 0.05)
    assert store.happened
    assert ours == others[0] == (read_json(inner, "zarr.json") or {})["attributes"]["tomocpt_stream"]
    assert ours["floor"] == (0.05 if key in ("0/zarr.json", "marks/zarr.json") else 0.01)
    group = zarr.open_group(inner, mode="r")
    for name, kind in (("0", "f4"), ("marks", "u1")):
        array = member(group, name)
        assert (array.shape, array.chunks, array.dtype) == (SHAPE, (24, 24, 24), np.dtype(kind))


@pytest.mark.parametrize(("method", "key"), CLAIMS[:3])
def test_the_second_claim_for_another_map_is_refused(volume: Volume, method: str, key: str) -> None:
    inner = MemoryStore()
    store = Interrupted(inner, method, key, lambda: claim(inner, volume, 0.05, stitch="hann"))
    with pytest.raises(CheckpointError, match="another stitch"):
        claim(store, volume, 0.05, stitch="crop")
    assert claim(inner, volume, 0.05, stitch="hann")["config"]["stitch"] == "hann"


def test_something_else_that_comes_in_between_is_not_touched(volume: Volume) -> None:
    inner = MemoryStore()
    store = Interrupted(inner, "list", "", lambda: write_bytes(inner, "photographs/1.jpg", b"..."))
    with pytest.raises(CheckpointError, match="not a heat map"):
        claim(store, volume, 0.05)
    assert list(inner._store_dict) == ["photographs/1.jpg"]


@pytest.mark.parametrize(("method", "key"), [*CLAIMS[:5], ("set", "0/c/0/0/0"), ("set", "0/c/1/1/2")])
def test_another_prediction_in_between_changes_nothing(volume: Volume, method: str, key: str) -> None:
    once = score(MemoryStore(), volume, 0.3)
    inner = MemoryStore()
    store = Interrupted(inner, method, key, lambda: score(inner, volume, 0.3))
    found = score(store, volume, 0.3)
    assert store.happened
    assert np.asarray(found.array[:]).tobytes() == np.asarray(once.array[:]).tobytes()
    assert found.candidate_table().tobytes() == once.candidate_table().tobytes()
    for summary in (found.finished, once.finished):  # which candidates are seams goes with the tasks
        assert len(summary.pop("seams_sha256")) == 64
    assert found.finished == once.finished


def test_predictions_with_two_thresholds_share_the_first_ones_floor(volume: Volume) -> None:
    inner = MemoryStore()
    store = Interrupted(inner, "put", "zarr.json", lambda: score(inner, volume, 0.01))
    assert score(store, volume, 0.3).candidate_floor == 0.01


def test_a_chunk_that_is_lost_before_the_seams_are_searched_is_named(tmp_path: Path, volume: Volume) -> None:
    victim = tmp_path / "m" / "0" / "c" / "0" / "0" / "0"
    for damage, says in (
        (victim.unlink, "has lost its object"),
        (lambda: victim.write_bytes(b"x"), "cut short"),
    ):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        store = Interrupted(LocalStore(tmp_path / "m"), "put", "receipts/heatmap/1.1.2.json", damage)
        with pytest.raises(CheckpointError, match=says) as caught:
            score(store, volume, 0.3, tasks=True)
        assert "0/c/0/0/0" in str(caught.value)
        assert store.happened


@pytest.mark.parametrize("content", [None, b'{"shape": [1', b""])
def test_an_array_without_its_metadata_is_named(
    tmp_path: Path, volume: Volume, content: bytes | None
) -> None:
    heatmap = score(LocalStore(tmp_path), volume, 0.3)
    (tmp_path / "0" / "zarr.json").unlink()
    if content is not None:
        (tmp_path / "0" / "zarr.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path.as_posix()} has no array '0' that can be opened"):
        open_heatmap(heatmap.store)


def test_a_map_travels_by_the_address_of_its_store(tmp_path: Path, volume: Volume) -> None:
    heatmap = score(LocalStore(tmp_path / "m"), volume, 0.3)
    parcel = pickle.dumps(heatmap)
    assert len(parcel) < 500
    again: Heatmap = pickle.loads(parcel)
    assert again.store == LocalStore(tmp_path / "m")
    assert not isinstance(again.array.store, OwnStore)
    (tmp_path / "m" / "0" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(CheckpointError, match="0/c/0/0/0"):
        again.to_dask()[0, 0, 0].compute(scheduler="synchronous")


AT_ONCE = """
import numpy as np
from tests.scorers import SMALL, Identity
from tomocpt_stream.blocks import plan_blocks
from tomocpt_stream.heatmap import PickOptions, predict
from tomocpt_stream.volume import open_volume

volume = open_volume(sys.argv[4])
options = PickOptions(60.0, stitch="crop", batch_size=3, threshold=0.03 + 0.01 * ME, contrast="dark")
plan = plan_blocks(volume.shape, SMALL, stitch="crop", batch_size=3, chunk=24)
found = []
for number in range(5):
    meet(number)
    heatmap = predict(volume, Identity(), plan, store=f"{sys.argv[4]}-{number}", options=options)
    found.append([heatmap.candidate_floor, len(heatmap.candidates())])
print(json.dumps(found))
"""


def test_two_processes_predict_into_one_store_at_once(tmp_path: Path, volume: Volume) -> None:
    source = np.asarray(volume.array[:])
    ingest(open_tomogram(source, voxel_size=10.0), tmp_path / "v", voxel_size=10.0)
    one, other = race(AT_ONCE, tmp_path / "gate", str(tmp_path / "v"))
    assert one == other
    for number, (floor, candidates) in enumerate(one):
        assert floor in (0.03, 0.04)
        folder = tmp_path / f"v-{number}"
        stored = json.loads((folder / "zarr.json").read_text())["attributes"]["tomocpt_stream"]
        assert stored["floor"] == floor
        once = score(MemoryStore(), volume, floor)
        assert len(once.candidates()) == candidates
        chunks = zarr.open_array(folder, path="0", mode="r")
        assert np.asarray(chunks[:]).tobytes() == np.asarray(once.array[:]).tobytes()
