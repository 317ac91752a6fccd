from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.volumes import MemoryVolume
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Batch, Example, Sampling
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.feed import Crops, Feed, held_crops, loader_threads, step_crops
from tomocpt_stream.train_options import TrainOptions

SAMPLING = Sampling(window=Window((32, 32, 32), (4, 4, 4)), radius=4.0)
OPTIONS = TrainOptions(batch_size=5, sampling=SAMPLING, seed=3, validation_crops=3)


def _example() -> Example:
    array = np.random.default_rng(0).standard_normal((40, 100, 120), dtype=np.float32)
    return Example(MemoryVolume(array), np.array([[20.0, 50.0, 60.0]]))


def _numbered(item: int) -> Crops:
    return Crops(torch.full((1, 2, 2, 2), float(item)), torch.zeros(1, 2, 2, 2), None)


def test_crops_come_in_order_and_no_more_are_drawn_than_may_wait() -> None:
    drawn: list[int] = []
    later = threading.Event()

    def draw(item: int) -> Crops:
        if item == 0:
            assert later.wait(60)  # the first is ready after the second
        drawn.append(item)
        later.set()
        return _numbered(item)

    with Feed(draw, range(20), threads=2) as feed:
        first = next(feed)
        assert float(first.voxels.max()) == 0
        assert feed.waited > 0
        rest = [int(crops.voxels.max()) for crops in feed]
    assert rest == list(range(1, 20))
    assert drawn[0] == 1

    started: list[int] = []

    def count(item: int) -> Crops:
        started.append(item)
        return _numbered(item)

    with Feed(count, range(20), threads=2) as feed:
        next(feed)
    assert len(started) <= 5


def test_an_error_comes_where_its_crops_are_due() -> None:
    def draw(item: int) -> Crops:
        if item == 1:
            raise OSError("no such chunk")
        return _numbered(item)

    with Feed(draw, range(3)) as feed:
        next(feed)
        with pytest.raises(OSError, match="no such chunk"):
            next(feed)
    with Feed(draw, range(0)) as nothing:
        assert list(nothing) == []


@pytest.mark.parametrize("by_epochs", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_shares_of_all_devices_are_the_crops_of_the_step(ranks: int, *, by_epochs: bool) -> None:
    item = _example()
    examples = Epochs([item], SAMPLING, seed=3) if by_epochs else [item]
    # With epochs, the last step of the first one is short.
    steps = (0, examples.steps(5) - 1, examples.steps(5)) if isinstance(examples, Epochs) else (0, 4)
    for step in steps:
        whole = step_crops(examples, OPTIONS, step)
        assert whole.known is None
        shares = [step_crops(examples, OPTIONS, step, rank=rank, ranks=ranks) for rank in range(ranks)]
        size = len(whole.voxels)
        for rank, share in enumerate(shares):
            if rank < size:
                assert share.known is None
                assert torch.equal(share.voxels, whole.voxels[rank::ranks])
                assert torch.equal(share.label, whole.label[rank::ranks])
            else:
                assert share.known is not None
                assert len(share.voxels) == 1
                assert not share.known.any()


def test_what_is_not_known_stays_with_its_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = Epochs([_example()], SAMPLING, seed=3)
    plain = Epochs.batch

    def partly(self: Epochs, size: int, step: int) -> Batch:
        batch = plain(self, size, step)
        dark = batch.voxels < 0
        return batch._replace(known=dark) if size > 1 or step % 2 else batch

    monkeypatch.setattr(Epochs, "batch", partly)
    share = step_crops(epochs, OPTIONS, 0, rank=1, ranks=2)  # places 1 and 3
    assert share.known is not None
    assert torch.equal(share.known, share.voxels < 0)
    share = step_crops(epochs, OPTIONS, 0, rank=0, ranks=2)
    assert share.known is None


def test_validation_crops_are_always_the_same() -> None:
    epochs = Epochs([_example()], SAMPLING, seed=3)
    for held in (epochs, [_example()]):
        (draw, count), (again, _) = held_crops(held, OPTIONS), held_crops(held, OPTIONS)
        assert count == 3
        assert all(torch.equal(draw(k).voxels, again(k).voxels) for k in range(count))
    assert held_crops(epochs, replace(OPTIONS, validation_crops=10**6))[1] == len(epochs)
    assert held_crops((), OPTIONS)[1] == 0
    wider = replace(OPTIONS, sampling=replace(SAMPLING, widths=(0.99, 0.495)))
    one, other = (held_crops([_example()], asked)[0](0).label for asked in (OPTIONS, wider))
    assert one.max() > 0
    assert (other >= one).all()
    assert not torch.equal(one, other)


def test_a_network_on_the_cpu_has_one_thread_of_crops_beside_it() -> None:
    assert loader_threads(torch.device("cpu")) == 1
    assert 1 <= loader_threads(torch.device("cuda"), ranks=4) <= 8
