from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial import KDTree

from tests.scorers import MatchedFilter
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling, changed_crop, example, known_voxels, read_crop
from tomocpt_stream.doubt import MeanParticle, find_doubtful, unexplained
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.evaluation import match
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.labelled import LabelledTomogram, open_labelled
from tomocpt_stream.loop import learn
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import pick
from tomocpt_stream.targets import paint_box
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.train_options import TrainOptions
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.frame import Points
    from tomocpt_stream.volume import Volume

SHAPE = (48, 110, 100)
RADIUS = 5.0
STEPS = 160


def _hollow(seed: int = 0) -> tuple[npt.NDArray[np.float32], Points]:
    """Dark shells about bright middles in noise, which no difference of Gaussians calls dark."""
    rng = np.random.default_rng(seed)
    places = [(z, y, x) for z in (12, 36) for y in range(12, 110, 20) for x in range(10, 100, 20)]
    centres = np.array(places, dtype=np.float64) + rng.uniform(-1.5, 1.5, (len(places), 3))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    away, _ = KDTree(centres).query(grid)
    shells = np.where(away < 2.5, 0.6, np.where(away < RADIUS, -0.8, 0))
    return (shells + 0.5 * rng.standard_normal(SHAPE)).astype(np.float32), centres


def _half(folder: Path, sign: float = 1.0) -> tuple[Example, Volume, Points]:
    """An example that has every other particle, and the others."""
    voxels, centres = _hollow()
    volume = ingest(open_tomogram(sign * voxels, voxel_size=10.0), folder / "volume.zarr", voxel_size=10.0)
    labelled = np.arange(len(centres)) % 2 == 0
    kept = Picks(centres[labelled], np.ones(labelled.sum(), np.float32))
    return example(volume, kept), volume, centres[~labelled]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_particles_that_were_left_out_are_found_by_those_that_were_not(tmp_path: Path, sign: float) -> None:
    chosen, volume, hidden = _half(tmp_path, sign)
    doubt = find_doubtful(chosen, volume, None, tmp_path, radius=RADIUS)
    away, _ = KDTree(doubt.places).query(hidden)
    assert (away < 2).mean() >= 0.9
    # Few of them are nothing, and none is a labelled one.
    assert (KDTree(hidden).query(doubt.places)[0] > RADIUS).sum() <= 3
    assert (KDTree(chosen.centres).query(doubt.places)[0] > RADIUS).all()
    assert doubt.explained >= len(chosen.centres)


def test_no_epoch_teaches_that_an_unlabelled_particle_is_none(tmp_path: Path) -> None:
    """Half of the labels are missing: what is left of them as background is what no candidate covers."""
    chosen, volume, hidden = _half(tmp_path)
    doubt = find_doubtful(chosen, volume, None, tmp_path, radius=RADIUS)
    sampling = Sampling(window=Window((32, 32, 32), (4, 4, 4)), radius=RADIUS)
    false = []
    for item in (chosen, replace(chosen, doubtful=doubt.places)):
        epochs = Epochs([item], sampling)
        taught = 0
        for row in epochs.order(0):
            crop = changed_crop(item, row[1:].tolist(), sampling, np.random.default_rng(0))
            _, truth = read_crop(replace(item, centres=hidden), row[1:].tolist(), sampling)
            known = np.ones(truth.shape, bool) if crop.known is None else crop.known
            taught += int(((truth > 0.1) & (crop.label == 0) & known).sum())
            assert (known & (crop.label > 0)).any() or known.mean() > 1 / 8
        false.append(taught / len(epochs))
    assert false[1] < 0.03 * false[0]


def test_the_search_is_the_same_again_and_reads_its_map(tmp_path: Path) -> None:
    chosen, volume, _ = _half(tmp_path)
    scorer = MatchedFilter(Window((48, 48, 48), (12, 12, 12)), RADIUS)
    first = find_doubtful(chosen, volume, scorer, tmp_path, radius=RADIUS)
    batches = scorer.batches
    again = find_doubtful(chosen, volume, scorer, tmp_path, radius=RADIUS)
    assert batches == scorer.batches > 0
    np.testing.assert_array_equal(first.places, again.places)
    assert first[1:] == again[1:]
    bright = find_doubtful(chosen, volume, scorer, tmp_path, radius=RADIUS, contrast="bright")
    assert scorer.batches > batches
    assert bright.level != first.level


def test_the_mean_particle_is_found_at_its_centre() -> None:
    """Of a volume that holds the mean itself the score is 0.5 there, whatever lies around it."""
    rng = np.random.default_rng(1)
    shells = np.array([1.0, 0.8, -0.4, -1.0, -0.6, 0.0, 0.1, 0.0])
    scorer = MeanParticle(shells, RADIUS)
    shape = scorer.window.shape
    centre = np.array([20, 31, 40])
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    away = np.linalg.norm(grid - centre, axis=-1)
    voxels = np.interp(away, np.arange(8), shells, right=0).astype(np.float32) + np.float32(0.7)
    scores = scorer.score(np.stack([voxels, voxels + 1, rng.random(shape, dtype=np.float32) / 100]))
    for one in scores[:2]:
        assert np.unravel_index(one.argmax(), shape) == tuple(centre)
        assert one.max() == pytest.approx(0.5, abs=0.02)
    assert scores[2].max() < 0.02
    assert scores.dtype == np.float32
    assert scorer.fingerprint != MeanParticle(shells + 1e-9, RADIUS).fingerprint


def test_shells_are_the_mean_by_distance_and_the_annotated_ones_only() -> None:
    centre = np.array([20.3, 24.6, 25.0])
    grid = np.stack(np.meshgrid(*[np.arange(50.0)] * 3, indexing="ij"), axis=-1)
    away = np.linalg.norm(grid - centre, axis=-1)

    @dataclass(frozen=True, eq=False)
    class _Memory:
        array: npt.NDArray[np.float32]
        percentiles: tuple[float, float, float] = (-0.5, 0.0, 0.5)
        shape: tuple[int, int, int] = (50, 50, 50)

    chosen = Example(_Memory(np.exp(-away / 4).astype(np.float32)), np.array([centre, [0.0, 0, 0]]))

    class _Upper:
        def inside(self, spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
            marks = np.ones([b - a for a, b in spans], bool)
            marks[: max(0, 6 - spans[0][0])] = False
            return marks

    mean = MeanParticle.of(replace(chosen, annotated=_Upper()), 6.0)
    # A shell is the mean over what lies within a voxel of it, the outer part of which is larger.
    np.testing.assert_allclose(mean.shells[2:9], np.exp(-np.arange(2, 9) / 4), atol=0.025)


def test_a_candidate_must_score_as_labels_do_and_be_none() -> None:
    @dataclass(frozen=True, eq=False)
    class _Space:
        shape: tuple[int, int, int] = (100, 100, 100)

    rng = np.random.default_rng(4)
    centres = rng.uniform(0, 50, (20, 3))
    chosen = Example(_Space(), centres)  # type: ignore[arg-type]
    far = rng.uniform(70, 100, (30, 3))
    places = np.concatenate([centres + 1, far])
    scores = np.concatenate([np.linspace(0.4, 0.8, 20), np.linspace(0.1, 0.9, 30)])
    doubt = unexplained(chosen, places, scores, 5.0)
    assert doubt.level == pytest.approx(0.7 * 0.42, abs=0.01)
    expected = far[scores[20:] >= doubt.level][::-1]
    np.testing.assert_array_equal(doubt.places, expected)
    assert doubt.explained == 20
    # Particles of other kinds explain candidates too, and their scores do not count.
    others = unexplained(replace(chosen, others=far[-3:]), places, scores, 5.0)
    assert others.level == doubt.level
    np.testing.assert_array_equal(
        others.places, [place for place in expected if KDTree(far[-3:]).query(place)[0] > 5]
    )
    # Where labels score nothing, all that is left is the floor.
    blind = unexplained(chosen, far, scores[20:], 5.0)
    assert blind.level == pytest.approx(0.05)
    assert len(blind.places) == 30
    for none in (np.zeros((0, 3)), far):
        empty = replace(chosen, centres=np.zeros((0, 3)))
        assert not len(unexplained(empty, none, np.full(len(none), 0.5), 5.0).places)


def test_half_of_what_was_annotated_stays_known_whatever_is_doubtful() -> None:
    @dataclass(frozen=True, eq=False)
    class _Space:
        shape: tuple[int, int, int] = (80, 90, 100)

    @dataclass(frozen=True, eq=False)
    class _Left:
        width: int

        def inside(self, spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
            marks = np.zeros([b - a for a, b in spans], bool)
            marks[:, :, : max(0, self.width - spans[2][0])] = True
            return marks

    rng = np.random.default_rng(4)
    shape = _Space().shape
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    chosen = Example(_Space(), rng.uniform(0, 60, (20, 3)))  # type: ignore[arg-type]
    crowd = rng.uniform(0, shape, (5000, 3))
    scores = rng.uniform(0.06, 0.9, 5000)
    best = set(map(tuple, crowd[np.argsort(-scores)[:2000]]))
    for width in (100, 40):
        item = replace(chosen, annotated=_Left(width))
        places = unexplained(item, crowd, scores, 5.0).places
        assert (places[:, 2] < width).all()
        known = known_voxels(replace(item, doubtful=places), box, 5.0)
        assert known is not None
        assert known[:, :, :width].mean() == pytest.approx(0.5, abs=0.02)
        assert set(map(tuple, places)) <= best
    # Those that lie on one another hide little, and so do those beside labels.
    heap = rng.normal((70, 80, 90), 2, (3000, 3))
    assert len(unexplained(chosen, heap, np.full(3000, 0.5), 5.0).places) == 3000


def _field(seed: int) -> tuple[npt.NDArray[np.float32], Points]:
    """Fifty dark balls and forty smaller ones, which are none, in noise."""
    rng = np.random.default_rng(seed)
    shape = (40, 144, 144)
    places = [(z, y, x) for z in (10, 30) for y in range(9, 144, 18) for x in range(9, 144, 18)]
    grid = np.array(places, dtype=np.float64)[rng.permutation(len(places))]
    centres = grid + rng.uniform(-3, 3, grid.shape)
    box = (slice(0, 40), slice(0, 144), slice(0, 144))
    balls = paint_box(centres[:50], box, radius=RADIUS, label="binary")
    balls += paint_box(centres[50:90], box, radius=3.2, label="binary")
    return (0.8 * rng.standard_normal(shape) - balls).astype(np.float32), centres[:50]


def _learnt_f1(folder: Path, share: float, *, partial: bool) -> tuple[float, float]:
    """Return F1 at the thresholds 0.3 and 0.5 of a network that learnt from so many labels of two fields."""
    window = Window((32, 32, 64), (4, 4, 8))
    architecture = named_architecture("small") | {"depths": [1, 1, 1, 1]}
    metadata = picker_metadata(architecture, window=window, particle_radius=RADIUS)
    rows = []
    for seed in (0, 1):
        voxels, centres = _field(seed)
        kept = centres[np.random.default_rng([seed, 9]).permutation(50)[: int(50 * share)]]
        tomogram = open_tomogram(voxels, voxel_size=10.0, name=f"TS_{seed}")
        picks = Picks(kept, np.ones(len(kept), np.float32), voxel_size=10.0)
        rows.append(LabelledTomogram(tomogram, picks, 100.0, partial=partial))
    opened = open_labelled(rows, Picker(build_network(architecture), metadata))
    sampling = Sampling(window=window, radius=RADIUS, augmentation=Augmentation(turns=True))
    options = TrainOptions(
        architecture=architecture,
        steps=STEPS,
        batch_size=2,
        learning_rate=3e-3,
        warm_up=20,
        sampling=sampling,
        checkpoint_every=STEPS,
        average=0.9,
    )
    learnt = Epochs([one.ingest(folder) for one in opened], sampling)
    picker = learn(learnt, options=options, folder=folder / "run")
    voxels, truth = _field(100)
    found = pick(
        open_tomogram(voxels, voxel_size=10.0), picker, PickOptions(100.0, threshold=0.3, contrast="dark")
    )
    wanted = Picks(truth, np.ones(50, np.float32), voxel_size=10.0)
    low, high = (match(found.above(at), wanted, tolerance=50.0).f1 for at in (0.3, 0.5))
    return low, high


@pytest.mark.slow
def test_with_half_of_the_labels_removed_f1_falls_by_at_most_a_twentieth(tmp_path: Path) -> None:
    whole = _learnt_f1(tmp_path / "whole", 1.0, partial=False)
    taught_false = _learnt_f1(tmp_path / "half", 0.5, partial=False)
    half = _learnt_f1(tmp_path / "partial", 0.5, partial=True)
    for at, *scores in zip((0.3, 0.5), whole, taught_false, half, strict=True):
        print("F1 at {}: all labels {:.3f}; half of them {:.3f}, and said so {:.3f}".format(at, *scores))  # noqa: T201
    assert whole[0] > 0.8
    # At the threshold that picks have when none is asked for. After so few steps a network answers 0.5 at
    # most of its particles but not at all, and how many differs from seed to seed by more than this.
    assert half[0] >= whole[0] - 0.05
    # Half of the particles called background halve a network's answers, which takes picks at 0.5 first.
    assert taught_false[1] < half[1] - 0.1
