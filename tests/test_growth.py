from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream.growth import grow
from tomocpt_stream.pairing import Edges, best_pairs

Array = np.ndarray[Any, Any]


def _graph(shape: tuple[int, int], share: float, steps: int, seed: int) -> Edges:
    rng = np.random.default_rng(seed)
    rows, columns = np.nonzero(rng.random(shape) < share)
    lengths: Array = rng.integers(0, steps, len(rows)) * 0.25
    return Edges(rows, columns, lengths, shape)


def _beginning(edges: Edges, rows: int) -> Edges:
    some = edges.rows < rows
    return Edges(edges.rows[some], edges.columns[some], edges.lengths[some], (rows, edges.shape[1]))


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9)),
    share=st.floats(0, 1),
    steps=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_beginning_has_its_best_pairs(
    shape: tuple[int, int], share: float, steps: int, seed: int
) -> None:
    edges = _graph(shape, share, steps, seed)
    found = grow(edges)
    for rows in range(1, shape[0] + 1):
        beginning = _beginning(edges, rows)
        lengths = beginning.lengths[best_pairs(beginning)]
        assert found.gains[:rows].sum() == len(lengths)
        assert found.sums[rows - 1] == pytest.approx(lengths.sum(), abs=1e-9)
        if steps == 1000:  # else there may be several best sets, whose squares differ
            assert found.squares[rows - 1] == pytest.approx((lengths**2).sum(), abs=1e-9)


@pytest.mark.parametrize("patience", [0, 1, 40, 300])
def test_counts_are_exact_where_lengths_would_take_too_long(patience: int) -> None:
    edges = _graph((120, 90), 0.04, 1000, 5)
    whole, cut = grow(edges), grow(edges, patience=patience)
    np.testing.assert_array_equal(cut.gains, whole.gains)
    known = np.isfinite(cut.sums)
    assert not known[-1]
    assert (np.diff(known.astype(int)) <= 0).all()
    np.testing.assert_allclose(cut.sums[known], whole.sums[known], atol=1e-9)


def test_nothing_to_pair() -> None:
    assert not grow(_graph((3, 2), 0.0, 2, 0)).gains.any()
    assert len(grow(_graph((0, 2), 1.0, 2, 0)).sums) == 0
