"""What is done about a chunk that was scored twice: two runs must agree, and the first one stays.

A task may run twice: its worker was lost after it had stored some chunks, or two programs work on one
store. On like machines the scores are equal bit for bit. On unlike ones they agree to 1e-5 (float32);
anything else means that a picker, a device or a disk is not to be trusted, and is an error.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.errors import DuplicateError

if TYPE_CHECKING:
    import numpy.typing as npt
    import zarr

TOLERANCE = 1e-5
"""How far scores of two devices may differ."""

_SAME = ("sha256", "marks_sha256")


def sha256(voxels: npt.NDArray[Any]) -> str:
    """Return the sha256 of an array's bytes in C order."""
    return hashlib.sha256(voxels.tobytes()).hexdigest()


def compare(
    stored: zarr.Array[Any],
    key: str,
    scores: npt.NDArray[np.float32],
    first: dict[str, Any],
    receipt: dict[str, Any],
) -> None:
    """Raise a DuplicateError where the `first` receipt of a chunk and that of `scores` do not agree.

    `stored` is the map, `key` the chunk ("z.y.x").
    """
    if all(first.get(field) == receipt[field] for field in _SAME):
        return
    alike = all(first.get(field) == receipt[field] for field in ("machine", "device"))
    if not alike and first.get("marks_sha256") == receipt["marks_sha256"]:
        z, y, x = (slice(start, stop) for start, stop in receipt["chunk"])
        there = np.asarray(stored[z, y, x], dtype=np.float32)
        # Where the two wrote at the same moment, the scores may be this run's under the other's receipt.
        if sha256(there) == first["sha256"] and np.abs(there - scores).max() <= TOLERANCE:
            return
    raise DuplicateError(
        f"chunk {key} of {stored.store_path} was scored twice with different results, by "
        f"{first.get('worker')} on {first.get('machine')} ({first.get('device')}) and by "
        f"{receipt['worker']} on {receipt['machine']} ({receipt['device']})",
        expected="the same scores bit for bit"
        if alike
        else f"scores that differ by at most {TOLERANCE:g} between devices",
        remedy="check both machines and that the same versions run on both, delete the store and run again",
    )
