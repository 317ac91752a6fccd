"""Two tasks in one process take turns: one computes, one reads ahead, and an error gives the turn back."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import pytest
from zarr.storage import MemoryStore

from tests.cuts import plans
from tests.scorers import SMALL, PlaceDependent
from tomocpt_stream.heatmap import Heatmap, PickOptions, predict
from tomocpt_stream.scan import Batches, Scoring, Sweep, Turns
from tomocpt_stream.scoring import _Layers
from tomocpt_stream.stitch import Stitcher
from tomocpt_stream.threads import run_in_threads
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest
from tomocpt_stream.windows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(60)  # a turn that is never given back

SHAPE = (30, 26, 28)
OPTIONS = PickOptions(60.0, stitch="crop", batch_size=3, contrast="dark")
PLAN = plans(SHAPE, SMALL, stitch="crop", batch_size=3, chunk=16)["bricks"]


@pytest.fixture(scope="module")
def volume() -> Volume:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return ingest(open_tomogram(voxels, voxel_size=10.0), MemoryStore(), voxel_size=10.0)


@pytest.fixture(scope="module")
def expected(volume: Volume) -> list[bytes]:
    return contents(predict(volume, PlaceDependent(), PLAN, store=MemoryStore(), options=OPTIONS))


def contents(heatmap: Heatmap) -> list[bytes]:
    return [np.asarray(heatmap.array[:]).tobytes(), heatmap.candidate_table().tobytes()]


def predict_in_two_threads(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, picker: PlaceDependent
) -> Heatmap:
    """What a worker does: two threads, one work, one picker."""
    monkeypatch.setattr(
        "tomocpt_stream.heatmap.run_jobs",
        lambda stage, jobs, *, client, watch=lambda _: None: run_in_threads(stage, jobs, watch),
    )
    monkeypatch.setattr("tomocpt_stream.stages.Attempts.wait", lambda *_: None)
    return predict(volume, picker, PLAN, store=MemoryStore(), options=OPTIONS)


@dataclass
class Count:
    """How many are at something at once, now and at most."""

    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int) -> None:
        with self.lock:
            self.now += number
            self.most = max(self.most, self.now)

    @contextmanager
    def one(self) -> Iterator[None]:
        self.add(1)
        try:
            yield
        finally:
            self.add(-1)


def under_way(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Count the tasks that are being computed."""
    count, enter, leave = Count(), Sweep.__enter__, Sweep.__exit__

    def counted_in(self: Sweep) -> Sweep:
        enter(self)
        count.add(1)
        return self

    def counted_out(self: Sweep, *error: object) -> None:
        count.add(-1)
        leave(self, *error)

    monkeypatch.setattr(Sweep, "__enter__", counted_in)
    monkeypatch.setattr(Sweep, "__exit__", counted_out)
    return count


def test_one_computes_and_one_reads_ahead(
    volume: Volume, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring, reading, held = Count(), Count(), Count()
    computing = under_way(monkeypatch)
    overlapped = threading.Event()

    class Counted(Rows):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            held.add(1)
            reading.add(1)
            super().__init__(*arguments, **options)

        def _advance(self) -> None:
            super()._advance()
            if self.is_last:
                reading.add(-1)

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            held.add(-1)

        def _read(self, row: int) -> Any:
            if scoring.now:
                overlapped.set()
            return super()._read(row)

    class Exclusive(PlaceDependent):
        def score(self, batch: Any) -> Any:
            with scoring.one():
                time.sleep(0.005)  # as long as another thread needs to come to this
                if self.batches == 4:
                    overlapped.wait(5)  # the next row, or the next task's first, is read meanwhile
                return super().score(batch)

    monkeypatch.setattr("tomocpt_stream.scan.Rows", Counted)
    heatmap = predict_in_two_threads(volume, monkeypatch, Exclusive())
    assert contents(heatmap) == expected
    assert overlapped.is_set()
    # The last row of one task is computed while another one holds its first: no third has any voxels.
    assert (scoring.most, computing.most, reading.most, held.most) == (1, 1, 1, 2)
    assert (scoring.now, computing.now, reading.now, held.now) == (0, 0, 0, 0)


class Stumbling:
    """Wraps a method so that one of its calls, whoever makes it, raises an error instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, call: int) -> None:
        self.calls = 0
        whole, lock = getattr(kind, name), threading.Lock()

        def stumble(*arguments: Any, **options: Any) -> Any:
            with lock:
                self.calls += 1
                number = self.calls
            if number == call:
                raise OSError("the disk has stumbled")
            return whole(*arguments, **options)

        monkeypatch.setattr(kind, name, stumble)


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PlaceDependent, "score"),
        (Rows, "_read"),
        (Rows, "_take"),
        (Stitcher, "__init__"),
        (Stitcher, "add"),
        (Stitcher, "planes"),
        (Batches, "flush"),
        (Sweep, "numbers"),
        (_Layers, "finish"),
        (_Layers, "_store"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_error_gives_the_turn_back(
    volume: Volume,
    expected: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    name: str,
    call: int,
) -> None:
    stumbling = Stumbling(monkeypatch, kind, name, call)
    heatmap = predict_in_two_threads(volume, monkeypatch, PlaceDependent())
    assert stumbling.calls > call
    assert contents(heatmap) == expected


@pytest.mark.parametrize(("kind", "name"), [(Rows, "__init__"), (Stitcher, "__init__"), (Rows, "_read")])
def test_nothing_is_held_after_an_error(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str
) -> None:
    work = Scoring(volume=volume, picker=PlaceDependent(), plan=PLAN, negate=False, turns=Turns())
    before = threading.active_count()
    Stumbling(monkeypatch, kind, name, 1)
    with pytest.raises(OSError, match="stumbled"), Sweep(PLAN.tasks[0], work) as began:
        for _ in began.rows():
            pass
    assert not work.turns.reading.locked()
    assert not work.turns.computing.locked()
    assert threading.active_count() == before


def test_scores_of_two_tasks_are_never_held_at_once(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: WeakSet[Stitcher] = WeakSet()
    most = [0]
    make = Stitcher.__init__

    def init(self: Stitcher, *args: Any) -> None:
        alive.add(self)
        most.append(len(alive))
        make(self, *args)

    store = _Layers._store_layer

    def store_slowly(self: _Layers, block: Any) -> None:
        time.sleep(0.02)  # the next task begins while this one's last layer is stored
        store(self, block)

    monkeypatch.setattr(Stitcher, "__init__", init)
    monkeypatch.setattr(_Layers, "_store_layer", store_slowly)
    predict_in_two_threads(volume, monkeypatch, PlaceDependent())
    assert len(most) > 3
    assert max(most) == 1
