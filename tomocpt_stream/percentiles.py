"""Exact percentiles of any number of float32 voxels in bounded memory, in whatever blocks they come.

Two passes of a radix selection: the first counts the upper 16 bits of every value, the second the
lower 16 bits of those values that share their upper half with a wanted order statistic. Counts are
integers, so that neither the cut into blocks, nor their order, nor who counts them can change the
answer: the counts of the parts of a volume add up to its own.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import BrokenSourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint16]

WANTED = (5, 50, 95)

_BINS = 1 << 16
_PIECE = 1 << 20
_EXPONENT = 0x7F80  # the exponent's bits in the upper half of a float32: all set in NaN and infinity
_ZEROS = (0, _BINS // 2)  # the upper halves of +0 and of -0, which are one value
# Raw halves in ascending order of value: negative numbers (sign bit set) have their order reversed.
_ASCENDING = np.concatenate([np.arange(_BINS - 1, _BINS // 2 - 1, -1), np.arange(_BINS // 2)])


def exact_percentiles(
    blocks: Callable[[], Iterable[Floats]], wanted: Sequence[int] = WANTED
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
    selection = Selection(count_upper(blocks()), wanted)
    return selection.values(count_lower(blocks(), selection.bins))


def count_upper(blocks: Iterable[Floats]) -> Counts:
    """Return how many voxels have each upper half: (65536,)."""
    counts = np.zeros(_BINS, np.int64)
    for upper, _ in _halves(blocks):
        counts += np.bincount(upper, minlength=_BINS)
    return counts


def count_lower(blocks: Iterable[Floats], bins: Sequence[int]) -> Counts:
    """Return how many voxels of each upper half in `bins` have each lower half: (len(bins), 65536)."""
    counts = np.zeros((len(bins), _BINS), np.int64)
    for upper, lower in _halves(blocks):
        for row, key in zip(counts, bins, strict=True):
            row += np.bincount(lower[upper == key], minlength=_BINS)
    return counts


class Selection:
    """Which upper halves hold the wanted percentiles, by the counts of all (65536,).

    `bins` are those whose lower halves must be counted, six at most for three percentiles, and a
    seventh where zero is among them. `total` is the number of voxels.

    Raises
    ------
    SourceError
        A voxel is NaN or infinite, or there is no voxel.
    """

    def __init__(self, upper: Counts, wanted: Sequence[int] = WANTED) -> None:
        _check(upper)
        self._upper = upper
        self.total = int(upper.sum())
        self._places = [divmod(percent * (self.total - 1), 100) for percent in wanted]
        ranks = {rank for place, rest in self._places for rank in ((place, place + 1) if rest else (place,))}
        above = np.cumsum(upper[_ASCENDING])
        self._bin = {rank: int(_ASCENDING[np.searchsorted(above, rank, side="right")]) for rank in ranks}
        found = set(self._bin.values())
        self.bins = tuple(sorted(found if found.isdisjoint(_ZEROS) else found.union(_ZEROS)))

    def values(self, lower: Counts) -> tuple[float, ...]:
        """Return the percentiles by the counts of the lower halves of `bins`."""
        value = {rank: self._value(rank, lower) for rank in self._bin}
        return tuple(
            (value[place] * (100 - rest) + (value[place + 1] * rest if rest else 0.0)) / 100 + 0.0
            for place, rest in self._places
        )

    def share(self, value: float, lower: Counts) -> float:
        """Return the share of voxels that equal `value`, which is one of rank."""
        raw = [int(bits) for bits in np.array([value, -0.0], np.float32).view(np.uint32)]
        same = raw if value == 0 else raw[:1]
        count = sum(int(lower[self.bins.index(bits >> 16), bits & 0xFFFF]) for bits in same)
        return count / self.total

    def _value(self, rank: int, lower: Counts) -> float:
        """Return the value of an ascending rank."""
        upper = self._bin[rank]
        negative = upper >= _BINS // 2
        if negative:
            before = int(self._upper[upper + 1 :].sum())
        else:
            before = int(self._upper[_BINS // 2 :].sum() + self._upper[:upper].sum())
        counts = lower[self.bins.index(upper)]
        place = int(np.searchsorted(np.cumsum(counts[::-1] if negative else counts), rank - before, "right"))
        half = _BINS - 1 - place if negative else place
        return float(np.array([upper << 16 | half], dtype=np.uint32).view(np.float32)[0])


def pack(counts: Counts) -> bytes:
    """Return counts as few bytes: some kB for those of upper halves, some ten for lower ones."""
    size = np.min_scalar_type(int(counts.max(initial=0))).itemsize
    return bytes([size]) + zlib.compress(counts.astype(f"<u{size}").tobytes(), 1)


def unpack(packed: bytes) -> Counts:
    """Return the counts of `pack`: (n, 65536), one row where there was one axis."""
    found = np.frombuffer(zlib.decompress(packed[1:]), f"<u{packed[0]}")
    return found.astype(np.int64).reshape(-1, _BINS)


def _halves(blocks: Iterable[Floats]) -> Iterator[tuple[Halves, Halves]]:
    """Yield the upper and the lower 16 bits of the voxels, a piece at a time: counting widens them."""
    for block in blocks:
        pairs = np.ascontiguousarray(block, dtype="<f4").reshape(-1).view("<u2").reshape(-1, 2)
        for start in range(0, len(pairs), _PIECE):
            yield pairs[start : start + _PIECE, 1], pairs[start : start + _PIECE, 0]
        del block, pairs  # before the next block is read


def _check(coarse: Counts) -> None:
    total = int(coarse.sum())
    if total == 0:
        raise BrokenSourceError(
            "no voxel to take percentiles of",
            expected="a volume with voxels that are not fill",
            remedy="check the tomogram: it is empty or all fill",
        )
    broken = int(coarse[(np.arange(_BINS) & _EXPONENT) == _EXPONENT].sum())
    if broken:
        raise BrokenSourceError(
            f"{broken} of {total} voxels are NaN or infinite",
            expected="finite voxels",
            remedy="replace them before picking, for instance by the mean of the tomogram",
        )
