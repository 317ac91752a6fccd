"""What is done about a chunk that was scored twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.storage import MemoryStore

from tomocpt_stream.duplicates import TOLERANCE, compare, sha256
from tomocpt_stream.errors import CheckpointError, DuplicateError

CHUNK = ((8, 16), (0, 8), (8, 12))
SCORES = np.random.default_rng(0).random((8, 8, 4)).astype(np.float32)
MARKS = "a" * 64


def receipt(scores: npt.NDArray[np.float32], worker: str, **changed: Any) -> dict[str, Any]:
    fields = {"sha256": sha256(scores), "marks_sha256": MARKS, "chunk": CHUNK, "worker": worker}
    return {**fields, "machine": "Xeon 8592+", "device": "cpu", **changed}


def store(scores: npt.NDArray[np.float32]) -> zarr.Array[Any]:
    """A map with the scores of the first run in its chunk."""
    array = zarr.create_array(MemoryStore(), name="0", shape=(16, 16, 12), chunks=(8, 8, 4), dtype="float32")
    array[8:16, 0:8, 8:12] = scores
    return array


def meet(
    first: npt.NDArray[np.float32], then: npt.NDArray[np.float32], stored: Any = None, **changed: Any
) -> None:
    """The first run has left its receipt; another one comes with its own scores."""
    there = store(first if stored is None else stored)
    compare(there, "1.0.2", then, receipt(first, "node1:7"), receipt(then, "node2:9", **changed))


def moved(by: float) -> npt.NDArray[np.float32]:
    scores = SCORES.copy()
    scores[3, 2, 1] += np.float32(by)
    return scores


@pytest.mark.parametrize("changed", [{}, {"machine": "EPYC 9754"}, {"device": "cuda:0"}])
def test_equal_scores_agree(changed: dict[str, Any]) -> None:
    meet(SCORES, SCORES, **changed)


def test_equal_scores_are_not_read_again() -> None:
    compare(None, "1.0.2", SCORES, receipt(SCORES, "a"), receipt(SCORES, "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [1e-7, 1.0])
def test_like_machines_must_agree_bit_for_bit(by: float) -> None:
    with pytest.raises(DuplicateError) as raised:
        meet(SCORES, moved(by))
    assert "chunk 1.0.2 of " in raised.value.found
    assert "node1:7 on Xeon 8592+ (cpu)" in raised.value.found
    assert "node2:9 on Xeon 8592+ (cpu)" in raised.value.found
    assert raised.value.expected == "the same scores bit for bit"
    assert isinstance(raised.value, CheckpointError)
    assert raised.value.final


@pytest.mark.parametrize("changed", [{"machine": "EPYC 9754"}, {"device": "cuda:0"}])
@pytest.mark.parametrize("by", [1e-6, -9e-6])
def test_other_devices_may_differ_a_little(changed: dict[str, Any], by: float) -> None:
    meet(SCORES, moved(by), **changed)


@pytest.mark.parametrize("changed", [{"machine": "EPYC 9754"}, {"device": "cuda:0"}])
@pytest.mark.parametrize("by", [1.1e-5, -1.1e-5, 1.0, np.nan])
def test_other_devices_may_not_differ_much(changed: dict[str, Any], by: float) -> None:
    with pytest.raises(DuplicateError) as raised:
        meet(SCORES, moved(by), **changed)
    for word in changed.values():
        assert word in raised.value.found
    assert raised.value.expected == f"scores that differ by at most {TOLERANCE:g} between devices"


@pytest.mark.parametrize("changed", [{}, {"device": "cuda:0"}])
@pytest.mark.parametrize("marks", [None, "b" * 64])
def test_marks_are_equal_on_all_devices(changed: dict[str, Any], marks: str | None) -> None:
    with pytest.raises(DuplicateError):
        meet(SCORES, SCORES, marks_sha256=marks, **changed)


def test_scores_of_one_run_under_the_receipt_of_another() -> None:
    """Two wrote at the same moment: what is there says nothing about the first one's scores."""
    with pytest.raises(DuplicateError):
        meet(SCORES, moved(1e-6), stored=moved(1e-6), machine="EPYC 9754")


def test_receipts_read_from_a_store_name_the_chunk_in_lists() -> None:
    later = receipt(moved(1e-6), "b", device="cuda:0", chunk=[[8, 16], [0, 8], [8, 12]])
    compare(store(SCORES), "1.0.2", moved(1e-6), receipt(SCORES, "a"), later)


def test_a_hash_is_that_of_the_voxels_in_order() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = np.asfortranarray(whole)
    assert sha256(whole) == sha256(view) == sha256(whole.copy())
    assert sha256(whole) != sha256(whole[::-1])
    assert len(sha256(whole)) == 64
