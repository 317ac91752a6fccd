"""What is left to be searched for peaks: every voxel that no task has settled, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuts import plans
from tests.scorers import SMALL
from tomocpt_stream.blocks import BlockPlan, box_of, spans_of
from tomocpt_stream.scoremap import pieces
from tomocpt_stream.seams import unsettled, without

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.blocks import Span

Spans = tuple["Span", "Span", "Span"]


def volume(spans: Spans) -> int:
    return int(np.prod([max(0, stop - start) for start, stop in spans]))


def covered(shape: Any, boxes: list[Spans]) -> npt.NDArray[np.int64]:
    """How many of some boxes each voxel lies in."""
    count = np.zeros(shape, dtype=np.int64)
    for spans in boxes:
        assert volume(spans) > 0
        count[box_of(spans)] += 1
    return count


def receipts(plan: BlockPlan, settled: Any) -> npt.NDArray[np.int32]:
    """What the receipts of a plan's chunks say: write box, chunk and what `settled(chunk)` is of it."""
    found = []
    for task in plan.tasks:
        for _, box in plan.chunks_of(task.write_spans):
            chunk = spans_of(box)
            found.append((task.write_spans, chunk, settled(chunk)))
    return np.array(found, dtype=np.int32)


@st.composite
def inside(draw: Any, outer: Spans, low: int = 0) -> Spans:
    """Any box within another one, empty ones too."""
    spans = []
    for start, stop in outer:
        first = draw(st.integers(start, stop))
        spans.append((first, draw(st.integers(first, stop))))
    return (spans[0], spans[1], spans[2])


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_what_is_left_of_any_box(data: st.DataObject) -> None:
    edge = st.integers(0, 9)
    outer: Any = tuple(data.draw(st.tuples(st.integers(0, 4), st.integers(5, 9))) for _ in range(3))
    # Empty ones, some that begin after they end, and some that lie apart are nothing.
    inner: Any = tuple((data.draw(edge), data.draw(edge)) for _ in range(3))
    boxes = list(without(outer, inner))
    assert len(boxes) <= 6
    expected = np.zeros((9, 9, 9), dtype=np.int64)
    expected[box_of(outer)] = 1
    expected[box_of(inner)] = 0
    assert np.array_equal(covered((9, 9, 9), boxes), expected)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    chunk=st.integers(5, 24),
    cut=st.sampled_from(["whole", "columns", "layers", "bricks", "chunks"]),
)
def test_any_receipts_leave_exactly_what_is_not_settled(data: Any, shape: Any, chunk: int, cut: str) -> None:
    plan = plans(shape, SMALL, chunk=chunk)[cut]
    chunks = receipts(plan, lambda spans: data.draw(inside(spans)))
    _check(plan, chunks)


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    cuts=st.permutations(["whole", "columns", "layers", "bricks", "chunks"]),
    margin=st.integers(0, 6),
)
def test_receipts_of_several_runs_in_any_order(data: Any, shape: Any, cuts: list[str], margin: int) -> None:
    """Some chunks from a run under one budget, the others from another one's: no task is whole."""
    ways = plans(shape, SMALL, chunk=13)
    plan = ways[cuts[0]]
    one, two = (_margins(ways[cut], margin) for cut in cuts[:2])
    taken = np.array(data.draw(st.lists(st.booleans(), min_size=len(one), max_size=len(one))))
    order = np.array(data.draw(st.permutations(range(len(one)))))
    by_chunk = [boxes[np.lexsort(boxes[:, 1].reshape(len(boxes), 6).T)] for boxes in (one, two)]
    _check(plan, np.where(taken[:, None, None, None], *by_chunk)[order])


def _margins(plan: BlockPlan, margin: int) -> npt.NDArray[np.int32]:
    """Receipts of tasks that settle all but a margin at those faces that are not the volume's."""
    boxes = receipts(plan, lambda chunk: chunk)
    for write, _, settled in boxes:
        for axis, length in enumerate(plan.shape):
            low = 0 if write[axis, 0] == 0 else write[axis, 0] + margin
            high = length if write[axis, 1] == length else write[axis, 1] - margin
            start, stop = settled[axis]
            settled[axis] = max(start, low), max(start, low, min(stop, high))
    return boxes


def _check(plan: BlockPlan, chunks: npt.NDArray[np.int32]) -> None:
    boxes = list(unsettled(chunks, plan))
    settled = [spans for _, _, spans in chunks.tolist() if volume(spans) > 0]
    assert (covered(plan.shape, boxes + settled) == 1).all()
    assert all(
        stop - start <= 2 * c for box in boxes for (start, stop), c in zip(box, plan.chunk, strict=True)
    )


@pytest.mark.parametrize("depth", [60, 62])
def test_a_whole_task_leaves_the_shell_of_its_box(depth: int) -> None:
    """Not the faces of its chunks, even where the last of them is too thin to be settled at all."""
    plan = plans((depth, 60, 60), SMALL, chunk=20)["whole"]

    def settled(chunk: Spans) -> list[Span]:
        ends = zip(chunk, plan.shape, strict=True)
        return [(max(4, start), max(4, start, min(length - 4, stop))) for (start, stop), length in ends]

    shell = without(((0, depth), (0, 60), (0, 60)), ((4, depth - 4), (4, 56), (4, 56)))
    expected = [piece for spans in shell for piece in pieces(spans, (40, 40, 40))]
    assert list(unsettled(receipts(plan, settled), plan)) == expected
    assert len(expected) == 24


def test_a_map_that_is_settled_leaves_nothing() -> None:
    plan = plans((40, 40, 40), SMALL, chunk=20)["columns"]
    assert list(unsettled(receipts(plan, lambda chunk: chunk), plan)) == []


def test_no_receipt_no_box() -> None:
    plan = plans((40, 40, 40), SMALL, chunk=20)["columns"]
    assert list(unsettled(np.zeros((0, 3, 3, 2), dtype=np.int32), plan)) == []
