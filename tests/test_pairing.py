from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from tomocpt_stream.pairing import Edges, best_pairs

Array = np.ndarray[Any, Any]


def _edges(lengths: Array) -> Edges:
    """Return the edges of a matrix of lengths, in which NaN is no edge."""
    rows, columns = np.nonzero(np.isfinite(lengths))
    shape = (len(lengths), lengths.shape[1])
    return Edges(rows, columns, lengths[rows, columns], shape)


def _check_is_best(lengths: Array) -> None:
    edges = _edges(lengths)
    taken = best_pairs(edges)
    rows, columns = edges.rows[taken], edges.columns[taken]
    assert len(set(rows)) == len(set(columns)) == len(taken)
    assert (np.diff(rows) > 0).all()
    missing = 1e3 * (np.nansum(lengths) + 1)
    i, j = linear_sum_assignment(np.where(np.isfinite(lengths), lengths, missing))
    best = lengths[i, j]
    assert len(taken) == np.isfinite(best).sum()
    assert edges.lengths[taken].sum() == pytest.approx(np.nansum(best))


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0, 1),
    steps=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_graph(shape: tuple[int, int], share: float, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, steps, shape) * 0.25  # few steps: many equal sums, and lengths of 0
    _check_is_best(np.where(rng.random(shape) < share, lengths, np.nan))


@pytest.mark.parametrize(("left", "right", "tolerance"), [(400, 400, 1.4), (300, 420, 2.0), (500, 150, 1.2)])
def test_crowds(left: int, right: int, tolerance: float) -> None:
    rng = np.random.default_rng(left)
    lengths = cdist(rng.normal(0, 2, (left, 3)), rng.normal(0.3, 2, (right, 3)))
    _check_is_best(np.where(lengths <= tolerance, lengths, np.nan))


def test_a_chain_shifts_as_a_whole() -> None:
    # Each point is nearest to the next one's partner; at the end of the chain that leaves one alone.
    size = 20_000
    rows, columns = np.repeat(np.arange(size), 2), np.repeat(np.arange(size), 2)
    columns[1::2] += 1
    lengths = np.where(rows == columns, 2.0, 1.0)
    longer = Edges(rows, columns, lengths, (size, size + 1))
    assert longer.lengths[best_pairs(longer)].sum() == size
    even = Edges(rows[:-1], columns[:-1], lengths[:-1], (size, size))
    assert even.lengths[best_pairs(even)].sum() == 2 * size


def test_no_edges() -> None:
    assert len(best_pairs(_edges(np.full((3, 2), np.nan)))) == 0
    assert len(best_pairs(_edges(np.zeros((0, 2))))) == 0
