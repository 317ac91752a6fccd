"""What a header, a caller and the portal say about the size of a voxel, and which of them is believed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape
    from tomocpt_stream.portal_records import TomogramRecord

    Triple = tuple[float, float, float]

# Voxels whose edges differ by more are no cubes.
ANISOTROPY = 0.01
# A header that differs by more from the portal's voxel size is worth a warning.
PORTAL_AGREES = 0.005
# What a header may claim, in Å: beyond it the number is a leftover of a program that filled nothing in.
BELIEVABLE = (0.01, 1e5)


def given_size(voxel_size: float, stated: Triple | None, address: str) -> tuple[float, tuple[str, ...]]:
    """Return the voxel size that the caller gives, and a note where the header states another."""
    size = float(voxel_size)
    if not (math.isfinite(size) and size > 0):
        raise SourceError(
            f"voxel_size for {address} is {voxel_size}",
            expected="a positive length in Å",
            remedy="pass it in Å",
        )
    if stated is None or all(abs(one / size - 1) <= ANISOTROPY for one in stated):
        return size, ()
    z, y, x = stated
    return size, (
        f"the header states voxel sizes of {z:g}, {y:g}, {x:g} Å (z, y, x); {size:g} Å as given is used",
    )


def stated_size(stated: Triple | None, address: str) -> tuple[float, tuple[str, ...]]:
    """Return the voxel size that a header states, if it is one number and can be believed."""
    low, high = BELIEVABLE
    if stated is None or not all(low <= size <= high for size in stated):
        raise SourceError(
            f"{address} states no voxel size in a unit of length"
            + (f" ({stated}, z, y, x)" if stated else ""),
            expected=f"one between {low:g} and {high:g} Å",
            remedy="pass voxel_size in Å",
        )
    if max(stated) / min(stated) - 1 > ANISOTROPY:
        raise SourceError(
            f"{address} states voxel sizes of {stated[0]:g}, {stated[1]:g}, {stated[2]:g} Å along z, y, x",
            expected=f"one voxel size, within {ANISOTROPY:.0%}, along all axes",
            remedy="pass voxel_size in Å if the voxels are cubes, else resample the tomogram",
        )
    size = float(f"{math.fsum(stated) / 3:.7g}")
    if size != 1.0:
        return size, ()
    return size, (
        "the header states a voxel size of exactly 1 Å, which many programs write when they do not know it;"
        " pass voxel_size in Å to be sure",
    )


def contradictions(record: TomogramRecord, stated: Triple | None, shape: Shape) -> list[str]:
    """Return in what a file is not what the portal says of it, a sentence each."""
    found, spacing = [], record.voxel_spacing
    if stated is not None and max(abs(size / spacing - 1) for size in stated) > PORTAL_AGREES:
        sizes = ", ".join(f"{size:g}" for size in stated)
        found.append(
            f"the header states voxel sizes of {sizes} Å (z, y, x); the portal's {spacing:g} Å is used"
        )
    if shape != record.shape:
        found.append(f"the file has {shape} voxels (z, y, x), the portal says {record.shape}")
    return found
