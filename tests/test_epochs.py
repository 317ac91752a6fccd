from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.volumes import MemoryVolume
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling, changed_crop, read_crop
from tomocpt_stream.epochs import Epochs, Part, split

SAMPLING = Sampling(window=Window((64, 64, 64), (8, 8, 8)), radius=10.0)
SMALL = Sampling(window=Window((32, 32, 32), (4, 4, 4)), radius=4.0)


def _example(shape: tuple[int, int, int], centres: list[list[float]], seed: int = 0) -> Example:
    array = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return Example(MemoryVolume(array), np.array(centres, dtype=np.float64).reshape(-1, 3))


def test_crops_lie_at_a_stride_of_32_and_cover_every_voxel() -> None:
    epochs = Epochs([_example((70, 150, 200), [[30, 70, 100]])], SAMPLING)
    rows = np.concatenate([epochs.positive, epochs.negative])
    assert len(np.unique(rows, axis=0)) == len(rows)
    for axis, whole in enumerate((70, 150, 200), start=1):
        starts = np.unique(rows[:, axis])
        assert starts[0] == -8
        assert starts[-1] + 64 == whole + 8
        assert (np.diff(starts[:-1]) == 32).all()
        assert starts[-1] - starts[-2] <= 32


def test_a_crop_is_positive_where_its_label_is() -> None:
    centres = [[0.2, 3.1, 199.4], [35.0, 149.0, 20.0], [69.5, 80.0, 100.0], [-4.0, 60.0, 60.0]]
    item = _example((70, 150, 200), centres)
    epochs = Epochs([item], SAMPLING)
    for kind, rows in (("positive", epochs.positive), ("negative", epochs.negative)):
        for _, *start in rows.tolist():
            assert read_crop(item, start, SAMPLING)[1].any() == (kind == "positive")
    # Each particle, those at and behind the faces too, reaches some crop.
    for centre in centres:
        assert len(Epochs([replace(item, centres=np.array([centre]))], SAMPLING).positive)


def test_a_sphere_that_ends_between_two_voxels_makes_no_crop_positive() -> None:
    item = _example((40, 70, 70), [[20.0, 20.5, 24.0]])  # a crop begins at 28, one radius on
    epochs = Epochs([item], SMALL)
    for rows, positive in ((epochs.positive, True), (epochs.negative, False)):
        assert len(rows)
        for row in rows[:, 1:].tolist():
            assert read_crop(item, row, SMALL)[1].any() == positive


def test_an_epoch_has_each_positive_crop_once_and_as_many_others() -> None:
    examples = [_example((40, 100, 120), [[20, 50, 60]]), _example((40, 100, 120), [], seed=1)]
    epochs = Epochs(examples, SMALL, seed=3)
    assert len(epochs) == 2 * len(epochs.positive)
    orders = [{tuple(row) for row in epochs.order(epoch).tolist()} for epoch in (0, 1)]
    positive = {tuple(row) for row in epochs.positive.tolist()}
    for order in orders:
        assert len(order) == len(epochs)
        assert positive < order
    assert orders[0] != orders[1]
    assert {row[0] for order in orders for row in order - positive} == {0, 1}


def test_the_steps_of_an_epoch_give_its_crops() -> None:
    item = _example((40, 100, 120), [[20, 50, 60]])
    epochs = Epochs([item], SMALL, seed=3)
    sizes = [len(epochs.batch(5, step)[0]) for step in range(epochs.steps(5))]
    assert sum(sizes) == len(epochs)
    assert set(sizes[:-1]) == {5}
    voxels, label, _ = epochs.batch(5, epochs.steps(5) + 1)
    for row, crop, painted in zip(epochs.order(1)[5:10].tolist(), voxels, label, strict=True):
        expected = read_crop(item, row[1:], SMALL)
        np.testing.assert_array_equal(crop, expected[0])
        np.testing.assert_array_equal(painted, expected[1])


def test_batches_follow_from_seed_and_step_alone() -> None:
    turned = replace(SMALL, augmentation=Augmentation(turns=True, noise=0.2))
    examples = [_example((40, 100, 120), [[20, 50, 60]])]
    one, other = Epochs(examples, turned, seed=3), Epochs(examples, turned, seed=3)
    one.batch(4, 0)
    one.batch(4, 99)
    first, second = one.batch(4, 7), other.batch(4, 7)
    np.testing.assert_array_equal(first.voxels, second.voxels)
    np.testing.assert_array_equal(first.label, second.label)
    assert not np.array_equal(one.batch(4, 7)[0], Epochs(examples, turned, seed=4).batch(4, 7)[0])


def test_without_a_particle_there_are_no_crops() -> None:
    assert len(Epochs([_example((40, 100, 120), [])], SMALL)) == 0


def test_from_five_groups_on_whole_ones_are_kept() -> None:
    examples = [_example((8, 8, 8), [[4, 4, 4]] * (k != 3)) for k in range(11)]
    groups = [f"g{k}" for k in range(10)] + ["g0"]
    parted = split(examples, groups, SMALL, seed=1)
    assert len({id(item) for item in [*parted.training, *parted.validation]}) == 11
    assert parted.remarks[0].startswith(f"validation: {len(parted.validation)} of 11 tomograms (")
    held = {groups[examples.index(item)] for item in parted.validation}
    learnt = {groups[examples.index(item)] for item in parted.training}
    assert len(held) == 2
    assert not held & learnt
    assert "g3" in learnt
    assert all(name in parted.remarks[0] for name in held)
    assert any(split(examples, groups, SMALL, seed=k).validation != parted.validation for k in range(2, 6))


def test_with_fewer_each_gives_a_slab_behind_a_gap() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, (40, 200, 90), size=(60, 3))
    item = replace(_example((40, 200, 90), []), centres=centres)
    parted = split([item], ["one"], SMALL)
    (learnt,), (held,) = parted.training, parted.validation
    assert "20% along y of one" in parted.remarks[0] or "20% along x of one" in parted.remarks[0]
    axis = int(np.flatnonzero(np.not_equal(held.volume.shape, item.volume.shape))[0])
    lost = round(100 * (60 - len(learnt.centres) - len(held.centres)) / 60)
    assert lost > 0
    assert parted.remarks[0].endswith(f"of its particles, {lost}% in the gap")
    whole = item.volume.shape[axis]
    assert held.volume.shape[axis] == round(0.2 * whole)
    assert learnt.volume.shape[axis] == whole - 32 - round(0.2 * whole)
    spans = []
    for one in (learnt.volume, held.volume):
        assert isinstance(one, Part)
        spans.append((one.start[axis], one.start[axis] + one.shape[axis]))
    low, high = sorted(spans)
    assert high[0] - low[1] == 32
    assert (low[0], high[1]) == (0, whole)


def test_a_slab_is_the_volume_between_its_faces() -> None:
    centres = [[20, y, 45.25] for y in range(5, 200, 10)]
    item = _example((40, 200, 90), centres)
    parted = split([item], ["one"], SMALL)
    part = parted.validation[0]
    assert isinstance(part.volume, Part)
    start = [first + more for first, more in zip(part.volume.start, (2, 3, 30), strict=True)]
    voxels, label = read_crop(part, (2, 3, 30), SMALL)
    expected = read_crop(item, start, SMALL)
    np.testing.assert_array_equal(voxels, expected[0])
    np.testing.assert_array_equal(label, expected[1])
    assert label.any()


@pytest.mark.parametrize(
    ("shape", "centres"), [((40, 70, 70), [[20, 5, 5], [20, 65, 65]]), ((40, 200, 90), [[20, 100, 45]])]
)
def test_what_cannot_be_parted_is_learnt_whole(
    shape: tuple[int, int, int], centres: list[list[float]]
) -> None:
    item = _example(shape, centres)
    parted = split([item], ["one"], SMALL)
    assert parted.training == [item]
    assert not parted.validation
    assert parted.remarks[0].startswith("validation: nothing of one")


@dataclass(frozen=True, eq=False)
class _Marked:
    """A region as an array, which knows how many voxels were asked of it."""

    marks: npt.NDArray[np.bool_]
    asked: list[int]

    def inside(self, spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
        z, y, x = (slice(*span) for span in spans)
        self.asked.append(self.marks[z, y, x].size)
        return self.marks[z, y, x]


def test_crops_are_positive_or_negative_by_what_is_known_of_them() -> None:
    rng = np.random.default_rng(5)
    shape = (40, 150, 120)
    marks = np.zeros(shape, bool)
    marks[5:30, 20:90, 40:] = True
    marks[:, 130:, :20] = True
    region = _Marked(marks, [])
    item = replace(
        _example(shape, []),
        centres=np.array([[15.0, 18, 45], [31.5, 88.0, 119.5], [8, 60, 20], [20, 147, 2]]),
        doubtful=rng.uniform(0, shape, (6, 3)),
        annotated=region,
    )
    epochs = Epochs([item], SMALL)
    assert sum(region.asked) <= marks.size  # each voxel is read once
    assert max(region.asked) <= 32 * 32 * 120
    positive, negative = (
        {tuple(row[1:]) for row in part.tolist()} for part in (epochs.positive, epochs.negative)
    )
    every = Epochs([replace(item, annotated=None, doubtful=np.zeros((0, 3)))], SMALL)
    left_out = 0
    for _, *start in np.concatenate([every.positive, every.negative]).tolist():
        crop = changed_crop(item, start, SMALL, rng)
        assert crop.known is not None
        # What lies behind a face is the same voxels again.
        z, y, x = (slice(max(0, -at), n - at) for at, n in zip(start, shape, strict=True))
        known, label = crop.known[z, y, x], crop.label[z, y, x]
        if (label[known] > 0).any():
            assert tuple(start) in positive
        elif known.mean() >= 1 / 8:
            assert tuple(start) in negative
        else:
            left_out += 1
    assert len(positive) + len(negative) + left_out == len(every.positive) + len(every.negative)
    assert min(len(positive), len(negative), left_out) > 2


def test_weights_say_how_often_a_crop_is_seen() -> None:
    one, two = (_example((40, 200, 120), [[20, 50, 60]], seed=k) for k in (0, 1))
    epochs = Epochs([replace(one, weight=2.5), replace(two, weight=0.5)], SMALL, seed=2)
    alone = len(Epochs([one], SMALL).positive)
    seen = np.zeros(2)
    for epoch in range(40):
        order = epochs.order(epoch)
        assert len(order) == len(epochs) == 2 * 3 * alone
        rows = {tuple(row) for row in epochs.positive.tolist()}
        drawn = [row for row in order.tolist() if tuple(row) in rows]
        assert len(drawn) == 3 * alone
        others = [tuple(row) for row in order.tolist() if tuple(row) not in rows]
        assert len(set(others)) == len(others)
        seen += np.bincount([row[0] for row in drawn], minlength=2)
        counts = [drawn.count(row) for row in epochs.positive.tolist() if row[0] == 0]
        assert set(counts) <= {2, 3}
    np.testing.assert_allclose(seen / 40 / alone, [2.5, 0.5], atol=0.1)


def test_half_of_the_negatives_hold_particles_of_other_kinds() -> None:
    others = np.array([[20.0, 30, 180]])
    item = replace(_example((40, 300, 200), [[20, 250, 60]]), others=others)
    epochs = Epochs([item], SMALL)
    count = len(epochs) - len(epochs.positive)

    def held(order: npt.NDArray[np.int64]) -> int:
        return sum(
            bool(read_crop(replace(item, centres=others), row[1:], SMALL)[1].any()) for row in order.tolist()
        )

    assert [held(epochs.order(epoch)) for epoch in range(3)] == [round(count / 2)] * 3
    none = Epochs([item], replace(SMALL, hard=0.0))
    assert held(none.order(0)) == 0
    every = Epochs([item], replace(SMALL, hard=1.0))
    assert held(every.order(0)) == min(count, held(every.negative))


def test_no_voxel_is_both_learnt_from_and_kept() -> None:
    """Through halos, reflection and tilted crops too, which read beyond their own box."""
    shape = (40, 200, 90)
    read = {"learnt": np.zeros(shape, bool), "kept": np.zeros(shape, bool)}
    side = ["learnt"]

    @dataclass(frozen=True, eq=False)
    class _Watched(MemoryVolume):
        def __getitem__(self, box: tuple[slice, ...]) -> npt.NDArray[np.float32]:
            read[side[0]][box] = True
            return self.array[box]

    rng = np.random.default_rng(7)
    array = rng.standard_normal(shape, dtype=np.float32)
    watched = _Watched(array)
    volume = replace(MemoryVolume(array), array=watched)  # type: ignore[arg-type]
    item = Example(volume, rng.uniform(0, shape, (40, 3)))
    parted = split([item], ["one"], SMALL)
    changed = replace(SMALL, augmentation=Augmentation(turns=True, tilt=15, zoom=0.2))
    for name, examples in (("learnt", parted.training), ("kept", parted.validation)):
        side[0] = name
        epochs = Epochs(examples, changed)
        for step in range(epochs.steps(4)):
            epochs.batch(4, step)
    assert read["learnt"].sum() > 0.3 * array.size
    assert read["kept"].sum() > 0.15 * array.size
    assert not (read["learnt"] & read["kept"]).any()


def test_slabs_and_groups_are_kept_by_the_particles_that_were_annotated() -> None:
    rng = np.random.default_rng(3)
    shape = (40, 200, 200)
    marks = np.zeros(shape, bool)
    marks[:, :, 100:] = True
    item = replace(_example(shape, []), centres=rng.uniform(0, shape, (80, 3)), annotated=_Marked(marks, []))
    for seed in range(3):
        parted = split([item], ["one"], SMALL, seed=seed)
        assert all(len(Epochs(side, SMALL).positive) for side in (parted.training, parted.validation))
    # All that is annotated lies in one fifth along x: only cuts along y leave some on both sides.
    marks[:, :, :170] = False
    assert "along y" in split([item], ["one"], SMALL).remarks[0]
    nothing = replace(item, annotated=_Marked(np.zeros(shape, bool), []))
    groups = [f"g{k}" for k in range(5)]
    for seed in range(8):
        parted = split([item, *[nothing] * 3, replace(item)], groups, SMALL, seed=seed)
        assert nothing not in parted.validation


def test_a_slab_takes_its_region_and_its_other_places_along() -> None:
    centres = [[20, y, 45.25] for y in range(5, 200, 10)]
    marks = np.random.default_rng(1).random((40, 200, 90)) > 0.5
    item = replace(
        _example((40, 200, 90), centres),
        annotated=_Marked(marks, []),
        doubtful=np.array([[10.0, 190, 10], [10, 20, 10]]),
        others=np.array([[30.0, 185, 80]]),
        weight=3.0,
    )
    part = split([item], ["one"], SMALL).validation[0]
    assert isinstance(part.volume, Part)
    assert part.weight == 3.0
    first = part.volume.start
    np.testing.assert_array_equal(part.others + first, item.others)
    start = [0, 2, 5]
    known = changed_crop(part, start, SMALL, np.random.default_rng(0)).known
    whole = changed_crop(item, list(np.add(start, first)), SMALL, np.random.default_rng(0)).known
    assert known is not None
    np.testing.assert_array_equal(known, whole)


def test_nothing_known_gives_no_crops() -> None:
    item = _example((40, 100, 120), [[20, 50, 60]])
    nothing = replace(item, annotated=_Marked(np.zeros((40, 100, 120), bool), []))
    assert len(Epochs([nothing], SMALL)) == 0
    assert len(Epochs([nothing, item], SMALL)) == len(Epochs([item], SMALL))


class _Overtaken(Epochs):
    """Another thread asks for epoch 1 whenever an order has been kept."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_order" and value[0] == 0:
            self.order(1)


def test_threads_in_two_epochs_read_their_own_orders() -> None:
    examples = [_example((40, 100, 120), [[20, 50, 60]])]
    found = _Overtaken(examples, SMALL, seed=3).order(0)
    np.testing.assert_array_equal(found, Epochs(examples, SMALL, seed=3).order(0))
