from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import mrcfile
import numpy as np
import pytest
import zarr
from scipy.ndimage import map_coordinates

from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import Frame, Grid, Rule, working_grid
from tomocpt_stream.heatmap_mrc import write_heatmap_mrc

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt


class Counted:
    """A zarr array that remembers which layers were read."""

    def __init__(self, array: Any) -> None:
        self.array, self.chunks, self.boxes = array, array.chunks, []  # type: ignore[var-annotated]

    def __getitem__(self, box: Any) -> Any:
        self.boxes.append(box)
        return self.array[box]


def heatmap(frame: Frame, grid: Grid, chunk: int = 5) -> Any:
    """Stand in for a stored map: random scores on a working grid."""
    scores = np.random.default_rng(0).random(grid.shape).astype(np.float32)
    array = zarr.create_array({}, data=scores, chunks=(chunk, chunk + 1, chunk + 2))
    return SimpleNamespace(
        name="TS", frame=frame, grid=grid, shape=grid.shape, array=Counted(array), scores=scores
    )


def frame_of(shape: tuple[int, int, int], *, beam_axis: Literal["z", "y"] = "z", level: float = 1.0) -> Frame:
    file = (shape[1], shape[0], shape[2]) if beam_axis == "y" else shape
    return Frame(
        shape=tuple(int(n / level) for n in shape),  # type: ignore[arg-type]
        voxel_size=4.0 * level,
        file_shape=file,
        file_voxel_size=4.0,
        beam_axis=beam_axis,
        level_scale=(level,) * 3,
        level_shift=((level - 1) / 2,) * 3,
    )


def expected_on_file_grid(map_: Any) -> npt.NDArray[np.float64]:
    """Every voxel of the file by the functions that take picks there, and a library's interpolation."""
    shape = map_.frame.file_shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)
    working = map_.grid.to_working(map_.frame.to_source(places))
    values = map_coordinates(map_.scores.astype(float), working.T, order=1, mode="nearest")
    return np.asarray(values).reshape(shape)


FRAMES = [
    pytest.param(frame_of((12, 14, 16)), id="plain"),
    pytest.param(frame_of((12, 14, 16), beam_axis="y"), id="unturned"),
    pytest.param(frame_of((12, 14, 16), level=2.0), id="level 1"),
]


@pytest.mark.parametrize("rule", ["bspline", "tomocpt"])
@pytest.mark.parametrize("working", [4.0, 6.6, 14.5, 3.1, 70.0])
@pytest.mark.parametrize("frame", FRAMES)
def test_on_the_grid_of_the_tomogram(tmp_path: Path, frame: Frame, working: float, rule: Rule) -> None:
    grid = working_grid(frame.shape, frame.voxel_size, working, rule)
    map_ = heatmap(frame, grid)
    like: Any = SimpleNamespace(name="TS", frame=frame)
    write_heatmap_mrc(map_, tmp_path / "a.mrc", like=like)
    with mrcfile.open(tmp_path / "a.mrc") as file:
        assert file.data.shape == frame.file_shape
        np.testing.assert_allclose(file.data, expected_on_file_grid(map_), atol=1e-5)
        assert file.voxel_size.x == pytest.approx(4.0)
        assert file.header.origin.tolist() == (0, 0, 0)
    layers = [box[1 if frame.beam_axis == "y" else 0] for box in map_.array.boxes]
    assert [one.start for one in layers] == sorted({one.start for one in layers})
    assert max(one.stop - one.start for one in layers) <= 6


@pytest.mark.parametrize("frame", FRAMES)
def test_on_the_working_grid_with_its_origin(tmp_path: Path, frame: Frame) -> None:
    grid = working_grid(frame.shape, frame.voxel_size, 10.0)
    map_ = heatmap(frame, grid)
    write_heatmap_mrc(map_, tmp_path / "a.mrc")
    assert mrcfile.validate(tmp_path / "a.mrc")
    with mrcfile.open(tmp_path / "a.mrc") as file:
        np.testing.assert_array_equal(file.data, map_.scores)
        assert file.voxel_size.z == pytest.approx(10.0)
        # Where voxel 0 of the map lies in a tomogram of 4 Å whose voxel 0 is at 0: the faces coincide.
        assert np.array(file.header.origin.tolist()) == pytest.approx((10.0 - 4.0) / 2)
        assert (file.header.dmin, file.header.dmax) == (map_.scores.min(), map_.scores.max())
        assert file.header.rms == pytest.approx(map_.scores.std(), rel=1e-4)


def test_another_tomogram_is_refused(tmp_path: Path) -> None:
    frame = frame_of((12, 14, 16))
    map_ = heatmap(frame, working_grid(frame.shape, 4.0, 8.0))
    for other in (frame_of((12, 14, 17)), Frame((12, 14, 16), 5.0, (12, 14, 16), 5.0)):
        like: Any = SimpleNamespace(name="other", frame=other)
        with pytest.raises(SourceError, match="the tomogram of the map"):
            write_heatmap_mrc(map_, tmp_path / "a.mrc", like=like)
    assert not list(tmp_path.iterdir())


def test_a_map_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    frame = frame_of((12, 14, 16))
    map_ = heatmap(frame, working_grid(frame.shape, 4.0, 8.0))

    class Broken(Counted):
        def __getitem__(self, box: Any) -> Any:
            raise SourceError("a chunk", expected="it", remedy="it")

    map_.array = Broken(map_.array.array)
    with pytest.raises(SourceError):
        write_heatmap_mrc(map_, tmp_path / "a.mrc")
    assert not list(tmp_path.iterdir())
