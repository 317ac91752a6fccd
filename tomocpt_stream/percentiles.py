"""Exact percentiles of any number of float32 voxels in bounded memory, in whatever blocks they come.

Two passes of a radix selection: the first counts the upper 16 bits of every value, the second the
lower 16 bits of those values that share their upper half with a wanted order statistic. Counts are
integers, so that neither the cut into blocks nor their order can change the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint16]

_BINS = 1 << 16
_PIECE = 1 << 20
_EXPONENT = 0x7F80  # the exponent's bits in the upper half of a float32: all set in NaN and infinity
# Raw halves in ascending order of value: negative numbers (sign bit set) have their order reversed.
_ASCENDING = np.concatenate([np.arange(_BINS - 1, _BINS // 2 - 1, -1), np.arange(_BINS // 2)])


def exact_percentiles(
    blocks: Callable[[], Iterable[Floats]], wanted: Sequence[int] = (5, 50, 95)
) -> tuple[float, ...]:
    """Return the `wanted` percentiles (whole per cents) of all voxels of all blocks.

    Linear interpolation between neighbours in rank, as `numpy.percentile` does, but with ranks by
    integer arithmetic and in float64, so that the percentile q of the negated voxels is exactly
    minus the percentile 100 - q. `blocks` is called twice, yields float32 arrays of any shape, and
    leaves out what it does not want counted. Memory: about 24 MB beside one block.

    Raises
    ------
    SourceError
        A voxel is NaN or infinite, or there is no voxel.
    """
    coarse = np.zeros(_BINS, np.int64)
    for block in blocks():
        for upper, _ in _halves(block):
            coarse += np.bincount(upper, minlength=_BINS)
    _check(coarse)
    total = int(coarse.sum())
    places = [divmod(percent * (total - 1), 100) for percent in wanted]
    ranks = sorted({rank for place, rest in places for rank in ((place, place + 1) if rest else (place,))})
    above = np.cumsum(coarse[_ASCENDING])
    uppers = {rank: int(_ASCENDING[np.searchsorted(above, rank, side="right")]) for rank in ranks}
    fine = {upper: np.zeros(_BINS, np.int64) for upper in uppers.values()}
    for block in blocks():
        _count_lower(block, fine)
    value = {rank: _value(rank, uppers[rank], coarse, fine) for rank in ranks}
    return tuple(
        (value[place] * (100 - rest) + (value[place + 1] * rest if rest else 0.0)) / 100 + 0.0
        for place, rest in places
    )


def _halves(block: Floats) -> Iterator[tuple[Halves, Halves]]:
    """Yield the upper and the lower 16 bits of the voxels, a piece at a time: counting widens them."""
    pairs = np.ascontiguousarray(block, dtype="<f4").reshape(-1).view("<u2").reshape(-1, 2)
    for start in range(0, len(pairs), _PIECE):
        yield pairs[start : start + _PIECE, 1], pairs[start : start + _PIECE, 0]


def _count_lower(block: Floats, fine: dict[int, Counts]) -> None:
    """Add the counts of the lower halves of those voxels whose upper half is a key of `fine`."""
    for upper, lower in _halves(block):
        for key, counts in fine.items():
            counts += np.bincount(lower[upper == key], minlength=_BINS)


def _value(rank: int, upper: int, coarse: Counts, fine: dict[int, Counts]) -> float:
    """Return the value of ascending rank `rank`, which lies in the bin `upper`."""
    negative = upper >= _BINS // 2
    before = (
        int(coarse[upper + 1 :].sum()) if negative else int(coarse[_BINS // 2 :].sum() + coarse[:upper].sum())
    )
    counts = fine[upper][::-1] if negative else fine[upper]
    place = int(np.searchsorted(np.cumsum(counts), rank - before, side="right"))
    lower = _BINS - 1 - place if negative else place
    return float(np.array([upper << 16 | lower], dtype=np.uint32).view(np.float32)[0])


def _check(coarse: Counts) -> None:
    total = int(coarse.sum())
    if total == 0:
        raise SourceError(
            "no voxel to take percentiles of",
            expected="a volume with voxels that are not fill",
            remedy="check the tomogram: it is empty or all fill",
        )
    broken = int(coarse[(np.arange(_BINS) & _EXPONENT) == _EXPONENT].sum())
    if broken:
        raise SourceError(
            f"{broken} of {total} voxels are NaN or infinite",
            expected="finite voxels",
            remedy="replace them before picking, for instance by the mean of the tomogram",
        )
