"""What travels to a worker, and what it opens there."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from tests.scorers import SMALL, PlaceDependent
from tomocpt_stream.assignment import WorkAddress, assigned, picker_name
from tomocpt_stream.blocks import CODEC_CONCURRENCY, BlockPlan, Window, plan_blocks
from tomocpt_stream.errors import JobError, PlanError
from tomocpt_stream.heatmap import Heatmap, PickOptions, predict
from tomocpt_stream.mask import Mask, open_mask
from tomocpt_stream.scoring import Work
from tomocpt_stream.stages import Here, residents
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest
from tomocpt_stream.voxels import shared

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

SHAPE = (44, 40, 42)
OPTIONS = PickOptions(60.0, stitch="hann", batch_size=3, contrast="dark")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    folder = tmp_path_factory.mktemp("volume")
    return ingest(open_tomogram(voxels, voxel_size=10.0), folder / "volume.zarr", voxel_size=10.0)


@pytest.fixture
def plan() -> BlockPlan:
    return plan_blocks(SHAPE, SMALL, stitch="hann", batch_size=3, chunk=16, workers=4)


def work_on(volume: Volume, plan: BlockPlan, folder: Path, picker: Any = None, **options: Any) -> Work:
    """What `predict` makes of a volume, without its map."""
    scores = zarr.create_array(LocalStore(folder / "map.zarr"), name="0", shape=SHAPE, dtype="float32")
    fields: dict[str, Any] = {
        "marks": None,
        "floor": 0.05,
        "negate": False,
        "config": "of this map",
        **options,
    }
    return Work(volume=volume, picker=picker or PlaceDependent(), plan=plan, scores=scores, **fields)


class Holding:
    """Stands for a client: what its workers hold, they hold in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[tuple[str, bool]] = []
        monkeypatch.setattr("tomocpt_stream.cluster.hold_on_workers", self._hold)

    @contextmanager
    def _hold(self, client: Any, name: str, thing: Any, *, for_good: bool) -> Iterator[None]:
        assert client is self
        self.held.append((name, for_good))
        residents.keep(name, lambda: thing)
        yield
        residents.drop(name)


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Holding:
    return Holding(monkeypatch)


def test_an_address_and_a_task_are_small(tmp_path: Path, volume: Volume, holding: Holding) -> None:
    """A job of a large map: 1024 x 2048 x 2048 voxels, 10,000 windows, a mask of its own."""
    window = Window()
    plan = plan_blocks((1024, 2048, 2048), window, stitch="hann", workers=64)
    assert len(plan.tasks) > 50
    assert plan.windows > 10_000
    mask = open_mask(np.ones(SHAPE, dtype=bool), volume.frame, volume.grid)
    with assigned(work_on(volume, plan, tmp_path, mask=mask), holding) as address:
        assert isinstance(address, WorkAddress)
        job = len(cloudpickle.dumps((address, plan.tasks[len(plan.tasks) - 1])))
    assert job < 4000  # 0.9 kB, and the mask


def test_an_address_opens_what_the_process_holds(
    tmp_path: Path, volume: Volume, plan: BlockPlan, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_on(volume, plan, tmp_path, floor=0.125, negate=True)
    with zarr.config.set({"async.concurrency": 64}):
        with assigned(work, holding) as address:
            opened = pickle.loads(pickle.dumps(address)).open()
        assert zarr.config.get("async.concurrency") == CODEC_CONCURRENCY  # as the plan's bytes assume
    assert opened.picker is work.picker
    assert (opened.plan, opened.floor, opened.negate, opened.config) == (plan, 0.125, True, work.config)
    assert str(opened.scores.store) == str(work.scores.store)
    assert np.array_equal(opened.volume.array[:], volume.array[:])
    assert opened.volume.percentiles == volume.percentiles
    assert opened.marks is None
    with pytest.raises(JobError, match="does not hold the picker identity"):
        address.open()


def test_maps_of_one_picker_take_turns(
    tmp_path: Path, volume: Volume, plan: BlockPlan, holding: Holding
) -> None:
    works = [work_on(volume, plan, tmp_path / name) for name in "ab"]
    with assigned(works[0], holding) as one, assigned(works[1], holding) as two:
        assert one.open().turns is two.open().turns
        assert one.token != two.token
    assert not [name for name in residents._named if "turns of picker identity" in name]


def test_without_a_client_the_work_is_the_address(tmp_path: Path, volume: Volume, plan: BlockPlan) -> None:
    work = work_on(volume, plan, tmp_path)
    with assigned(work, None) as address:
        assert address == Here(work)


class _Unnamed:
    """A picker without a fingerprint."""

    window = SMALL


def test_a_picker_is_held_under_what_it_scores_by(
    tmp_path: Path, volume: Volume, plan: BlockPlan, holding: Holding
) -> None:
    pickers: list[Any] = [
        PlaceDependent(),
        PlaceDependent(Window((8, 8, 8), (1, 1, 1))),
        _Unnamed(),
        _Unnamed(),
    ]
    for number, picker in enumerate(pickers):
        work = work_on(volume, plan, tmp_path / f"{number}", picker, config=f"map {number}")
        with assigned(work, holding):
            pass
    names = [name for name, _ in holding.held]
    assert len(set(names)) == 4
    assert [for_good for _, for_good in holding.held] == [True, True, False, False]


def test_numerics_are_part_of_a_pickers_name() -> None:
    one, two = PlaceDependent(), PlaceDependent()
    assert picker_name(one, otherwise="x") == picker_name(two, otherwise="y")
    two.numerics = {"dtype": "bfloat16"}  # type: ignore[attr-defined]
    assert picker_name(one, otherwise="x") != picker_name(two, otherwise="x")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["zarr", "fsspec", "obstore"])
def test_a_store_in_memory_is_refused(kind: str, wrapped: bool) -> None:
    if kind == "obstore":
        obstore = pytest.importorskip("obstore.store")
        store: Any = ObjectStore(obstore.MemoryStore())
    else:
        store = MemoryStore() if kind == "zarr" else FsspecStore.from_url("memory://map.zarr")
    with pytest.raises(PlanError, match="expected a store that every worker can read and write"):
        shared(WrapperStore(store) if wrapped else store)


class _Locked(LocalStore):
    """A store that cannot be pickled."""

    def __getstate__(self) -> Any:
        return threading.Lock()


def test_a_store_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"which only this process can use \(cannot pickle"):
        shared(_Locked(tmp_path))


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative: Any = LocalStore("map.zarr", read_only=True)
    found: Any = shared(relative)
    inside: Any = shared(WrapperStore(WrapperStore(relative)))
    monkeypatch.chdir("/")
    assert found.root == tmp_path / "map.zarr"
    assert found.read_only
    assert inside._store._store.root == tmp_path / "map.zarr"
    assert isinstance(inside, WrapperStore)


def test_an_absolute_store_stays_what_it_is(tmp_path: Path) -> None:
    local = LocalStore(tmp_path)
    wrapped = WrapperStore(local)
    assert shared(local) is local
    assert shared(wrapped) is wrapped


def contents(heatmap: Heatmap) -> list[bytes]:
    assert heatmap.marks is not None
    arrays = (heatmap.array[:], heatmap.marks[:], heatmap.candidate_table())
    return [np.asarray(array).tobytes() for array in arrays]


def test_a_mask_in_memory_reaches_the_workers(
    tmp_path: Path, volume: Volume, plan: BlockPlan, workers: Client
) -> None:
    mask = np.zeros(tuple(n // 2 for n in SHAPE), dtype=bool)
    mask[5:11, 6:12, 4:12] = mask[20, 2, 18] = True
    request: dict[str, Any] = {"volume": volume, "picker": PlaceDependent(), "plan": plan, "options": OPTIONS}
    here = predict(**request, store=tmp_path / "here.zarr", mask=mask)
    there = predict(**request, store=tmp_path / "there.zarr", mask=mask, client=workers)
    assert 0 < here.scored_voxels < np.prod(SHAPE)
    assert len(here.candidate_table()) > 0
    assert contents(here) == contents(there)


def test_a_second_run_takes_nothing_from_a_stored_mask(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.random.default_rng(0).random(SHAPE) < 0.5
    mask, store = open_mask(voxels, volume.frame, volume.grid), LocalStore(tmp_path)
    first = mask.stored(store, "mask")

    async def delete(*_: Any) -> None:
        pytest.fail("a chunk that another run reads just now was taken away")

    monkeypatch.setattr(LocalStore, "delete", delete)
    monkeypatch.setattr(LocalStore, "delete_dir", delete)
    second = mask.stored(store, "mask")
    for stored in (first, second):
        again: Mask = pickle.loads(pickle.dumps(stored))
        assert np.array_equal(again.inside(((0, 44), (0, 40), (0, 42))), voxels)


def test_the_map_or_the_volume_in_memory_and_a_client(
    tmp_path: Path, volume: Volume, plan: BlockPlan, workers: Client
) -> None:
    memory = MemoryStore()
    request: dict[str, Any] = {
        "picker": PlaceDependent(),
        "plan": plan,
        "options": OPTIONS,
        "client": workers,
    }
    with pytest.raises(PlanError, match="which only this process can use"):
        predict(volume, store=memory, **request)
    assert not memory._store_dict
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    held = ingest(open_tomogram(voxels, voxel_size=10.0), MemoryStore(), voxel_size=10.0)
    with pytest.raises(PlanError, match="which only this process can use"):
        predict(held, store=tmp_path / "map.zarr", **request)


class _Connected(PlaceDependent):
    """A picker with something that belongs to its process."""

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = "connected"
        self.lock = threading.Lock()


def test_a_picker_that_cannot_be_sent_is_refused(
    tmp_path: Path, volume: Volume, plan: BlockPlan, workers: Client
) -> None:
    with pytest.raises(PlanError, match=r"the picker connected.* cannot be sent to workers .*__reduce__"):
        predict(volume, _Connected(), plan, store=tmp_path / "map.zarr", options=OPTIONS, client=workers)


SCRIPT = """
import sys
import numpy as np
from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.cluster import local_cluster
from tomocpt_stream.heatmap import PickOptions, predict
from tomocpt_stream.volume import open_volume


class Mine:
    window = Window((16, 16, 16), (3, 3, 3))
    particle_radius = 3.0

    def score(self, batch):
        return np.tanh(batch * batch.mean(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    volume = open_volume(sys.argv[1])
    plan = plan_blocks(volume.shape, Mine.window, stitch="crop", batch_size=2, chunk=20, workers=4)
    options = PickOptions(60.0, stitch="crop", batch_size=2, contrast="dark")
    with local_cluster(1) as client:
        maps = [predict(volume, Mine(), plan, store=name, options=options, client=c) for name, c in
            (("here.zarr", None), ("there.zarr", client))]
    print(len(plan.tasks), maps[0].array[:].std() > 0, (maps[0].array[:] == maps[1].array[:]).all())
"""


def test_a_picker_of_a_script_reaches_the_workers(tmp_path: Path, volume: Volume) -> None:
    """Its class is in no module that a worker could import; the map's path is relative."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-W", "error", str(script), str(volume.store.root)]  # type: ignore[attr-defined]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["12", "True", "True"]
