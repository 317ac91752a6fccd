from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kornia.filters import spatial_gradient3d

from tomocpt_stream import losses
from tomocpt_stream.losses import loss_terms, voxel_weights
from tomocpt_stream.targets import paint_box


def _second_derivatives(volume: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """The six second derivatives by differences as kornia had them in 2024, the faces repeated."""
    p = np.pad(volume, 1, mode="edge")

    def at(z: int, y: int, x: int) -> npt.NDArray[np.float64]:
        nz, ny, nx = volume.shape
        return p[1 + z : 1 + z + nz, 1 + y : 1 + y + ny, 1 + x : 1 + x + nx]

    return [
        at(0, 0, -1) - 2 * volume + at(0, 0, 1),
        at(0, -1, 0) - 2 * volume + at(0, 1, 0),
        at(-1, 0, 0) - 2 * volume + at(1, 0, 0),
        at(0, -1, -1) + at(0, 1, 1) - at(0, -1, 1) - at(0, 1, -1),
        at(-1, -1, 0) + at(1, 1, 0) - at(-1, 1, 0) - at(1, -1, 0),
        at(-1, 0, -1) + at(1, 0, 1) - at(-1, 0, 1) - at(1, 0, -1),
    ]


def _huber(difference: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    size = np.abs(difference)
    return np.where(size <= 1, size**2 / 2, size - 0.5)


def test_loss_terms_equal_the_equations_in_numpy() -> None:
    rng = np.random.default_rng(0)
    box = (slice(0, 16), slice(0, 16), slice(0, 16))
    label = np.stack([paint_box([[8.2, 7.7, 8]], box, radius=5), paint_box([[0, 3, 15]], box, radius=4)])
    answered = rng.random(label.shape).astype(np.float32)
    weighted, gradient = loss_terms(torch.from_numpy(answered), torch.from_numpy(label))

    expected_weighted, expected_gradient = [], []
    for y, p in zip(label.astype(np.float64), answered.astype(np.float64), strict=True):
        positive = y > 0
        weights = np.where(positive, y.size / positive.sum(), y.size / (~positive).sum())
        expected_weighted.append((weights * _huber(p - y)).mean())
        pairs = zip(_second_derivatives(p), _second_derivatives(y), strict=True)
        expected_gradient.append(sum(_huber(a - b).mean() for a, b in pairs))
    assert float(weighted) == pytest.approx(np.mean(expected_weighted), rel=1e-5)
    assert float(gradient) == pytest.approx(np.mean(expected_gradient), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_gradient_term_is_that_of_the_paper_with_any_kornia(
    monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """Up to kornia 0.8 a mixed derivative is the sum of its neighbours, from 0.9 on a quarter of it."""
    label, answered = torch.rand(2, 1, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    expected = loss_terms(answered, label)
    own = losses._mixed_weight()

    def another(values: torch.Tensor, mode: str, order: int) -> torch.Tensor:
        derived: torch.Tensor = spatial_gradient3d(values, mode=mode, order=order).clone()
        derived[:, :, 3:] *= weight / own
        return derived

    monkeypatch.setattr(losses, "spatial_gradient3d", another)
    again = loss_terms(answered, label)
    for one, two in zip(again, expected, strict=True):
        assert float(one) == pytest.approx(float(two), rel=1e-6)


def test_weights_follow_the_counts_of_each_crop() -> None:
    label = torch.zeros(3, 4, 4, 4)
    label[0, 0, 0, :2] = torch.tensor([0.1, 1.0])
    label[2] = 0.5
    weights = voxel_weights(label)
    assert weights[0, 0, 0, 0] == weights[0, 0, 0, 1] == 64 / 2
    assert weights[0, 1, 1, 1] == pytest.approx(64 / 62)
    # A crop without a positive voxel, and one without a negative voxel, weighs 1 everywhere.
    assert (weights[1] == 1).all()
    assert (weights[2] == 1).all()


def test_a_perfect_answer_costs_nothing() -> None:
    label = torch.from_numpy(paint_box([[5, 5, 5]], (slice(0, 12),) * 3, radius=4))[None]
    assert [float(term) for term in loss_terms(label, label)] == [0.0, 0.0]


def test_unknown_voxels_count_nowhere() -> None:
    rng = np.random.default_rng(2)
    box = (slice(0, 16), slice(0, 16), slice(0, 16))
    label = torch.from_numpy(np.stack([paint_box([[8, 8, 8]], box, radius=5)] * 2))
    answered = torch.from_numpy(rng.random(label.shape).astype(np.float32))
    known = torch.ones_like(label, dtype=torch.bool)
    known[0, :, :6] = False
    known[1, 3:9, 2:11, 5] = False
    first = loss_terms(answered, label, known)
    other = torch.where(known, answered, torch.from_numpy(rng.random(label.shape).astype(np.float32)))
    painted = torch.where(known, label, 1 - label)
    assert loss_terms(other, painted, known) == first
    assert loss_terms(answered, label) != first

    weights = voxel_weights(label, known)
    positive, kept = (label > 0).numpy(), known.numpy()
    for crop in range(2):
        count, voxels = (positive[crop] & kept[crop]).sum(), kept[crop].sum()
        np.testing.assert_allclose(weights[crop].numpy()[positive[crop]], voxels / count, rtol=1e-6)


def test_a_known_slab_costs_what_it_costs_alone() -> None:
    rng = np.random.default_rng(3)
    label, answered = (torch.from_numpy(rng.random((1, 12, 10, 10), dtype=np.float32)) for _ in range(2))
    label[:, :, 5:] = 0
    known = torch.zeros_like(label, dtype=torch.bool)
    known[:, :6] = True
    weighted, _ = loss_terms(answered, label, known)
    alone, _ = loss_terms(answered[:, :6], label[:, :6])
    assert float(weighted) == pytest.approx(float(alone), rel=1e-6)
    # Derivatives at the cut would need voxels behind it, so that they count no more.
    _, gradient = loss_terms(answered, label, known)
    inner = _second_derivatives((answered - label)[0].numpy().astype(np.float64))
    expected = sum(_huber(part)[:5].mean() for part in inner)
    assert float(gradient) == pytest.approx(expected, rel=1e-5)


def test_nothing_known_costs_nothing() -> None:
    label = torch.rand(1, 4, 4, 4)
    terms = loss_terms(1 - label, label, torch.zeros_like(label, dtype=torch.bool))
    assert [float(term) for term in terms] == [0.0, 0.0]
