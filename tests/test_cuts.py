"""The answer does not depend on how the work was cut: columns, layers, bricks and chunks of one map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from tests.cuts import plans
from tests.scorers import SMALL, PlaceDependent
from tomocpt_stream.heatmap import Heatmap, PickOptions, predict
from tomocpt_stream.peaks import find_peaks
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.scoring import RECEIPTS
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import Volume, ingest

SHAPE = (44, 40, 42)


def _volume(shape: Any = SHAPE, *, fill: bool = False, seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if fill:
        array[:, :, 30:] = 7.0
        array[30:] = 7.0
    return ingest(open_tomogram(array, voxel_size=10.0), MemoryStore(), voxel_size=10.0)


def _mask() -> Any:
    """A box over the borders of chunks and a few voxels apart, at half the resolution."""
    inside = np.zeros(tuple(n // 2 for n in SHAPE), dtype=bool)
    inside[5:11, 6:12, 4:12] = inside[20, 2, 18] = True
    return inside


def _contents(heatmap: Heatmap) -> dict[str, bytes]:
    """Everything that a map says, as bytes."""
    found = {
        "scores": np.asarray(heatmap.array[:]).tobytes(),
        "marks": b"" if heatmap.marks is None else np.asarray(heatmap.marks[:]).tobytes(),
        "candidates": heatmap.candidate_table().tobytes(),
        "scored": str(heatmap.scored_voxels).encode(),
    }
    for distance, refine in ((4.0, True), (2.5, False)):
        picks = find_peaks(heatmap, threshold=0.3, min_distance=distance, refine=refine)
        found |= {f"zyx {distance}": picks.zyx.tobytes(), f"score {distance}": picks.score.tobytes()}
    return found


def _options(stitch: Any) -> PickOptions:
    return PickOptions(60.0, stitch=stitch, batch_size=3, contrast="dark")


@pytest.mark.parametrize("stitch", ["crop", "hann"])
@pytest.mark.parametrize(
    ("masked", "fill"), [(False, False), (True, False), (False, True)], ids=["plain", "mask", "fill"]
)
def test_every_cut_gives_the_same_map_and_peaks(stitch: Any, masked: bool, fill: bool) -> None:
    volume, mask = _volume(fill=fill), _mask() if masked else None
    cuts = plans(SHAPE, SMALL, stitch=stitch, batch_size=3, chunk=16)
    assert len({len(plan.tasks) for plan in cuts.values()}) == len(cuts) == 5
    maps = {
        cut: predict(volume, PlaceDependent(), plan, store=MemoryStore(), options=_options(stitch), mask=mask)
        for cut, plan in cuts.items()
    }
    whole = maps["whole"]
    assert len(whole.candidate_table()) > 10
    assert whole.candidate_table().tobytes() == whole.scan(whole.candidate_floor).tobytes()
    assert (whole.scored_voxels < np.prod(SHAPE)) == (masked or fill)
    expected = _contents(whole)
    for cut, heatmap in maps.items():
        assert _contents(heatmap) == expected, cut


@settings(deadline=None, max_examples=18, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(1, 44), st.integers(1, 44), st.integers(1, 44)),
    stitch=st.sampled_from(["crop", "hann", "gaussian"]),
    chunk=st.integers(3, 40),
    cut=st.sampled_from(["layers", "bricks", "chunks"]),
    masked=st.booleans(),
)
def test_any_volume_in_any_cut(shape: Any, stitch: Any, chunk: int, cut: str, masked: bool) -> None:
    assume(np.prod(shape) > 200)  # a few voxels are constant or nearly so: an error of their own
    assume(np.prod(shape) < 300 * chunk**3)  # not thousands of chunks
    volume = _volume(shape)
    mask = np.arange(np.prod(shape)).reshape(shape) % 997 == 0 if masked else None
    cuts = plans(shape, SMALL, stitch=stitch, batch_size=3, chunk=chunk)
    whole, parts = (
        predict(volume, PlaceDependent(), plan, store=MemoryStore(), options=_options(stitch), mask=mask)
        for plan in (cuts["whole"], cuts[cut])
    )
    assert _contents(whole) == _contents(parts)


class _Interrupted(PlaceDependent):
    """It is stopped, as by Ctrl-C, after a number of batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def score(self, batch: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().score(batch)


@pytest.mark.parametrize("stitch", ["crop", "hann"])
@pytest.mark.parametrize(
    ("first", "then"), [("layers", "columns"), ("columns", "layers"), ("bricks", "whole")]
)
def test_a_map_begun_in_one_cut_goes_on_in_another(stitch: Any, first: str, then: str) -> None:
    volume, options = _volume(), _options(stitch)
    cuts = plans(SHAPE, SMALL, stitch=stitch, batch_size=3, chunk=16)
    full, store = PlaceDependent(), MemoryStore()
    whole = predict(volume, full, cuts["whole"], store=MemoryStore(), options=options)
    with pytest.raises(KeyboardInterrupt):
        predict(volume, _Interrupted(full.batches // 2), cuts[first], store=store, options=options)
    begun = Receipts(store, RECEIPTS).all()
    assert 0 < len(begun) < 3 * 3 * 3
    resumed = predict(volume, PlaceDependent(), cuts[then], store=store, options=options)
    assert _contents(resumed) == _contents(whole)
    ended = Receipts(store, RECEIPTS).all()
    assert {key: ended[key] for key in begun} == begun
