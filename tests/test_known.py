from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import Frame, working_grid
from tomocpt_stream.known import PartRegion, open_region
from tomocpt_stream.mask import Mask
from tomocpt_stream.phantom import write_mrc

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (20, 30, 40)
FRAME = Frame(SHAPE, 10.0, SHAPE, 10.0)
WHOLE = ((0, 20), (0, 30), (0, 40))
BOX = (slice(2, 9), slice(0, 30), slice(11, 33))


@pytest.mark.parametrize(
    "text", ["2:9,0:30,11:33", " 2:9, 0:30, 11:33 ", "2:9 : 11:33", "2:9 0:30 11:33", "2:9;:;11:33"]
)
def test_a_box_is_the_voxels_that_it_names(text: str) -> None:
    expected = np.zeros(SHAPE, bool)
    expected[BOX] = True
    if text == "2:9 : 11:33":
        text = "2:9, :, 11:33"
    for annotated in (text, BOX, (slice(2, 9), slice(None), slice(11, 33))):
        region, made_of = open_region(annotated, FRAME, working_grid(SHAPE, 10.0, 10.0))
        np.testing.assert_array_equal(region.inside(WHOLE), expected)
        np.testing.assert_array_equal(region.inside(((3, 12), (4, 9), (0, 20))), expected[3:12, 4:9, 0:20])
        assert made_of == "2:9,0:30,11:33"


@pytest.mark.parametrize("voxel_size", [10.0, 17.0, 6.3])
@pytest.mark.parametrize("beam_axis", ["z", "y"])
def test_a_box_equals_the_mask_of_its_voxels(voxel_size: float, beam_axis: Any) -> None:
    """On any working grid, in the axes of the file, whether it is turned or not."""
    source = SHAPE if beam_axis == "z" else (SHAPE[1], SHAPE[0], SHAPE[2])
    frame = Frame(source, 10.0, SHAPE, 10.0, beam_axis)
    grid = working_grid(source, 10.0, voxel_size)
    voxels = np.zeros(SHAPE, np.uint8)
    box = (slice(2, 9), slice(5, 24), slice(11, 33))
    voxels[box] = 1
    region, _ = open_region(box, frame, grid)
    mask, _ = open_region(voxels, frame, grid)
    assert isinstance(mask, Mask)
    z, y, x = ((0, n) for n in grid.shape)
    np.testing.assert_array_equal(region.inside((z, y, x)), mask.inside((z, y, x)))


@pytest.mark.parametrize(("level", "beam_axis"), [(2, "z"), (2, "y"), (3, "z"), (3, "y")])
def test_a_box_equals_the_mask_on_a_coarser_level(level: int, beam_axis: Any) -> None:
    """Its last voxels reach beyond the file, and their middles may lie between two of the file's."""
    rng = np.random.default_rng([level, beam_axis == "y"])
    for _ in range(20):
        file = tuple(int(n) for n in rng.integers(12, 30, 3))
        turned = file if beam_axis == "z" else (file[1], file[0], file[2])
        z, y, x = (-(-n // level) for n in turned)
        shift = (level - 1) / 2
        frame = Frame(
            (z, y, x), 10.0 * level, (file[0], file[1], file[2]), 10.0, beam_axis, (level,) * 3, (shift,) * 3
        )
        grid = working_grid((z, y, x), 10.0 * level, float(rng.uniform(8, 40)))
        low = [int(rng.integers(0, n // 2)) for n in file]
        sides = [slice(a, n if rng.random() < 0.5 else a + n // 2) for a, n in zip(low, file, strict=True)]
        voxels = np.zeros(file, np.uint8)
        voxels[tuple(sides)] = 1
        region, _ = open_region((sides[0], sides[1], sides[2]), frame, grid)
        mask, _ = open_region(voxels, frame, grid)
        spans = tuple((0, n) for n in grid.shape)
        np.testing.assert_array_equal(
            region.inside((spans[0], spans[1], spans[2])), mask.inside((spans[0], spans[1], spans[2]))
        )


def test_a_box_is_in_voxels_of_the_finest_level() -> None:
    frame = Frame((10, 15, 20), 20.0, SHAPE, 10.0, "z", (2.0, 2.0, 2.0), (0.5, 0.5, 0.5))
    region, _ = open_region("4:10,0:30,11:33", frame, working_grid((10, 15, 20), 20.0, 20.0))
    z, _, x = (np.flatnonzero(side) for side in region.sides)  # type: ignore[attr-defined]
    assert z.tolist() == [2, 3, 4]
    assert x.tolist() == list(range(5, 16))


def test_a_mask_file_of_another_voxel_size_is_a_region(tmp_path: Path) -> None:
    coarse = np.zeros((10, 15, 20), np.int8)
    coarse[3:6] = 1
    write_mrc(tmp_path / "mask.mrc", coarse, 20.0)
    region, made_of = open_region(tmp_path / "mask.mrc", FRAME, working_grid(SHAPE, 10.0, 10.0))
    planes = region.inside(WHOLE).all(axis=(1, 2))
    assert np.flatnonzero(planes).tolist() == list(range(5, 11))  # voxel k lies at 20 k Å
    write_mrc(tmp_path / "other.mrc", 1 - coarse, 20.0)
    _, other = open_region(str(tmp_path / "other.mrc"), FRAME, working_grid(SHAPE, 10.0, 10.0))
    assert made_of != other


def test_a_part_of_a_region_counts_from_its_own_start() -> None:
    region, _ = open_region(BOX, FRAME, working_grid(SHAPE, 10.0, 10.0))
    part = PartRegion(region, (5, 0, 10))
    np.testing.assert_array_equal(
        part.inside(((0, 10), (2, 9), (0, 12))), region.inside(((5, 15), (2, 9), (10, 22)))
    )


@pytest.mark.parametrize(
    "box",
    ["2:2,0:30,0:40", "9:2,0:30,0:40", "0:21,0:30,0:40", "25:26,0:30,0:40", "-1:5,:,:", "0:5,:",
     "0.5:3,:,:", "1:2,3:4,5:6,7:8", "0:" + 5000 * "9" + ",:,:",
     (slice(0, 2.5), slice(None), slice(None)), (slice("a", 5), slice(None), slice(None)),
     (slice(0, 5), slice(0, 5)), (slice(-3, 5), slice(0, 5), slice(0, 5)),
     (slice(0, 5, 2), slice(0, 5), slice(0, 5)), (1, 2, 3)],
)  # fmt: skip
def test_a_box_that_is_none_is_refused(box: Any) -> None:
    with pytest.raises(SourceError, match="z from 0 to 20, y from 0 to 30, x from 0 to 40"):
        open_region(box, FRAME, working_grid(SHAPE, 10.0, 10.0))


def test_a_box_between_coarse_voxels_still_has_one() -> None:
    """A working voxel is three of the file's: a box that holds no middle has none, and says so."""
    grid = working_grid(SHAPE, 10.0, 30.0)
    region, _ = open_region("1:2,0:30,0:40", FRAME, grid)
    assert region.inside(((0, grid.shape[0]), (0, 1), (0, 1))).ravel().tolist()[:2] == [True, False]
    with pytest.raises(SourceError, match="box 0:1,0:30,0:40"):
        open_region("0:1,0:30,0:40", FRAME, grid)
