from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from skimage.feature import peak_local_max

from tomocpt_stream import peaks
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.frame import Frame, Grid, working_grid
from tomocpt_stream.peaks import CANDIDATE, REACH, find_peaks, order, scan, scan_block, space

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from tomocpt_stream.frame import Box, Shape

Array = np.ndarray[Any, Any]
KINDS = ("smooth", "noise", "levels", "plateau", "constant", "sparse")
NORMS = st.sampled_from([1.0, 2.0, np.inf])
SHAPES = st.tuples(*[st.integers(1, 14)] * 3)


def _map(kind: str, shape: Shape, seed: int, dtype: str = "float32") -> Array:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(shape)
    smooth = ndimage.gaussian_filter(noise, 1.0) * 3
    made = {
        "noise": noise,
        "smooth": smooth,
        "levels": np.round(smooth * 4) / 4,
        "plateau": np.minimum(smooth, 0.2),
        "constant": np.full(shape, 0.75),
        "sparse": np.where(rng.random(shape) < 0.03, np.round(rng.random(shape), 1), 0.0),
    }[kind]
    scaled = made * 20 if np.dtype(dtype).kind in "iu" else made
    return np.asarray(np.clip(scaled, 0 if np.dtype(dtype).kind == "u" else None, None), dtype=dtype)


def _box(spans: Any) -> Box:
    return tuple(slice(*span) for span in spans)  # type: ignore[return-value]


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=SHAPES,
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(["float32", "float64", "float16", "int16", "int32", "uint8", ">f4", ">i2"]),
    threshold=st.sampled_from([-5, -1.0, 0, 0.1, 0.2, 0.3, 0.75, 2.5, 100.0]),
    distance=st.one_of(st.integers(0, 9), st.floats(0.0, 6.0), st.sampled_from([2**0.5, 5**0.5, 1e9])),
    p_norm=NORMS,
)
@example("plateau", (14, 14, 14), 0, "float32", 0.1, 3, 2)
@example("constant", (4, 5, 6), 0, "float32", 0.1, 3, 2)
@example("constant", (1, 1, 1), 0, "float32", 0.1, 3, 2)
@example("levels", (1, 14, 14), 3, "float64", 0, 5, 1)
def test_peaks_are_those_of_skimage_in_list_and_order(
    kind: str, shape: Shape, seed: int, dtype: str, threshold: float, distance: float, p_norm: float
) -> None:
    array = _map(kind, shape, seed, dtype)
    native = np.dtype(dtype).newbyteorder("=")
    reference = array.astype("float32" if dtype == "float16" else native)
    level = float(np.float16(threshold)) if dtype == "float16" else threshold
    expected = peak_local_max(  # type: ignore[no-untyped-call]
        reference,
        footprint=np.ones((3, 3, 3)),
        min_distance=distance,
        p_norm=p_norm,
        threshold_abs=level,
        exclude_border=False,
    )
    found = find_peaks(array, threshold=threshold, min_distance=distance, p_norm=p_norm, refine=False)
    np.testing.assert_array_equal(found.zyx, expected)
    np.testing.assert_array_equal(found.score, reference[tuple(expected.T)].astype("float32"))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), shape=SHAPES, seed=st.integers(0, 10**6))
def test_candidates_do_not_depend_on_the_boxes(
    data: st.DataObject, kind: str, shape: Shape, seed: int
) -> None:
    array = _map(kind, shape, seed)
    whole = scan(array, _box((0, n) for n in shape), 0.05)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    boxes = list(product(*[list(pairwise(cut)) for cut in cuts]))
    halo = data.draw(st.integers(REACH, REACH + 3))
    parts = []
    for spans in data.draw(st.permutations(boxes)):
        origin = tuple(max(0, start - halo) for start, _ in spans)
        ends = tuple(min(n, stop + halo) for (_, stop), n in zip(spans, shape, strict=True))
        block = array[tuple(slice(a, b) for a, b in zip(origin, ends, strict=True))]
        part = scan_block(block.copy(), origin, _box(spans), shape, 0.05)  # type: ignore[arg-type]
        assert part.tobytes() == scan(array, _box(spans), 0.05).tobytes()
        parts.append(part)
    assert order(np.concatenate(parts), shape).tobytes() == order(whole, shape).tobytes()


def test_a_scan_reads_the_box_and_its_reach_only() -> None:
    class Recorder:
        shape, dtype = (40, 40, 40), np.dtype("float32")
        asked: tuple[slice, ...] = ()

        def __getitem__(self, box: tuple[slice, ...]) -> Array:
            Recorder.asked = box
            return np.zeros([s.stop - s.start for s in box], dtype=self.dtype)

    scan(Recorder(), _box([(0, 10), (10, 20), (30, 40)]), 0.5)
    assert Recorder.asked == (slice(0, 15), slice(5, 25), slice(25, 40))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 400),
    extent=st.integers(1, 30),
    distance=st.one_of(st.integers(0, 12), st.floats(0.5, 12.0)),
    p_norm=NORMS,
    seed=st.integers(0, 10**6),
)
def test_spacing_is_the_sequential_greedy(
    n: int, extent: int, distance: float, p_norm: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    points = np.unique(rng.integers(0, extent, (n, 3)), axis=0)
    rng.shuffle(points)
    kept = space(points, distance, p_norm)
    name = {1.0: "cityblock", 2.0: "euclidean", np.inf: "chebyshev"}[p_norm]
    expected: list[int] = []
    for row, point in enumerate(points):
        if not expected or distance <= 1 or cdist([point], points[expected], name).min() >= distance:
            expected.append(row)
    assert np.flatnonzero(kept).tolist() == expected


def test_spacing_works_in_many_blocks_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    points = np.unique(rng.integers(0, 40, (6000, 3)), axis=0)
    rng.shuffle(points)
    whole = space(points, 3.5, 2)
    monkeypatch.setattr("tomocpt_stream.spacing._FIRST_BLOCK", 16)
    monkeypatch.setattr("tomocpt_stream.spacing._LARGEST_BLOCK", 512)
    monkeypatch.setattr("tomocpt_stream.spacing._SMALLEST_HEAD", 8)
    monkeypatch.setattr("tomocpt_stream.spacing._PAIRS", 50)
    np.testing.assert_array_equal(space(points, 3.5, 2), whole)


def test_spacing_a_plateau_holds_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(cKDTree):  # type: ignore[misc]
        def query_pairs(self, *arguments: Any, **options: Any) -> Any:
            found = super().query_pairs(*arguments, **options)
            held.append(len(found))
            return found

    monkeypatch.setattr("tomocpt_stream.spacing.cKDTree", Watched)
    points = np.argwhere(np.ones((24, 24, 24), dtype=bool))
    kept = points[space(points, 12, np.inf)]
    np.testing.assert_array_equal(kept, list(product((0, 12), repeat=3)))
    assert max(held) <= 2_000_000 < len(points) ** 2 / 2


@pytest.mark.parametrize("p_norm", [1, 2, np.inf])
def test_a_peak_at_exactly_the_distance_is_kept(p_norm: float) -> None:
    array = np.zeros((1, 1, 20), dtype="float32")
    array[0, 0, [3, 8, 12]] = [1.0, 0.9, 0.8]
    found = find_peaks(array, threshold=0.5, min_distance=5, p_norm=p_norm, refine=False)
    assert found.zyx[:, 2].tolist() == [3, 8]


def test_faces_and_corners_have_peaks() -> None:
    array = np.zeros((9, 9, 9), dtype="float32")
    places = [(0, 0, 0), (8, 8, 8), (0, 4, 8), (4, 4, 4)]
    for score, place in enumerate(places, start=1):
        array[place] = score
    found = find_peaks(array, threshold=0.5, min_distance=3, refine=False)
    assert found.zyx.tolist() == [list(place) for place in reversed(places)]


def test_the_threshold_is_rounded_to_the_maps_type() -> None:
    array = np.zeros((5, 5, 5), dtype="float32")
    array[2, 2, 2] = 0.1  # above 0.1 in float64, equal to it in float32
    assert len(find_peaks(array, threshold=0.1, min_distance=1)) == 0
    assert len(find_peaks(array.astype("float64"), threshold=0.1, min_distance=1)) == 1
    assert len(find_peaks(array, threshold=1e300, min_distance=1)) == 0


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.75, 1.0])
def test_a_constant_map_has_no_peaks_however_large(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "MAX_CANDIDATES", 50)
    monkeypatch.setattr(peaks, "_BOX_VOXELS", 40)
    assert len(find_peaks(np.full((6, 6, 6), 0.75), threshold=threshold, min_distance=2)) == 0


def test_a_flood_names_map_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "MAX_CANDIDATES", 50)
    array = np.full((6, 6, 6), 0.75)
    array[5, 5, 5] = 0.5
    with pytest.raises(SourceError, match=r"map of 6 × 6 × 6 voxels has 215 candidate peaks"):
        find_peaks(array, threshold=0.3, min_distance=2)
    with pytest.raises(SourceError, match="TS_07 has 215"):
        scan(array, _box([(0, 6)] * 3), 0.3, name="TS_07")


def test_a_flood_is_refused_before_the_whole_map_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "MAX_CANDIDATES", 500)
    monkeypatch.setattr(peaks, "_BOX_VOXELS", 100)

    class Endless:
        shape, dtype, read = (10**6, 10, 10), np.dtype("float32"), 0

        def __getitem__(self, box: tuple[slice, ...]) -> Array:
            Endless.read += 1
            grid = np.meshgrid(*[np.arange(s.start, s.stop) for s in box], indexing="ij")
            return np.asarray(np.minimum(grid[0], 3) / 4, dtype=self.dtype)

    with pytest.raises(SourceError, match="candidate peaks"):
        find_peaks(Endless(), threshold=0.1, min_distance=2)
    assert Endless.read < 100


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_is_an_error_that_names_the_voxel(dtype: str) -> None:
    array = np.zeros((12, 12, 12), dtype=dtype)
    array[2, 3, 4] = np.nan
    with pytest.raises(SourceError, match=r"NaN at voxel \(2, 3, 4\)"):
        find_peaks(array, threshold=0.5, min_distance=2)
    with pytest.raises(SourceError, match=r"NaN at voxel \(2, 3, 4\)"):
        scan(array, _box([(0, 2), (2, 12), (4, 12)]), 0.5)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.zeros((3, 3)), {}),
        (np.zeros((0, 3, 3)), {}),
        (np.zeros((3, 3, 3)), {"p_norm": 3}),
        (np.zeros((3, 3, 3)), {"threshold": float("nan")}),
        (np.zeros((3, 3, 3)), {"min_distance": -1}),
        (np.zeros((3, 3, 3)), {"min_distance": float("nan")}),
    ],
)
def test_options_without_sense_are_refused(array: Array, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        find_peaks(array, **({"threshold": 0.5, "min_distance": 2} | options))


def test_complex_maps_are_refused() -> None:
    with pytest.raises(SourceError, match="complex64"):
        find_peaks(np.zeros((3, 3, 3), dtype="complex64"), threshold=0, min_distance=1)


def test_boolean_and_listed_maps_are_maps() -> None:
    array = np.zeros((9, 9, 9), dtype=bool)
    array[4, 5, 3] = True
    listed: Any = array.astype(int).tolist()
    assert find_peaks(array, threshold=0.5, min_distance=1, refine=False).zyx.tolist() == [[4, 5, 3]]
    assert find_peaks(listed, threshold=0.5, min_distance=1, refine=False).zyx.tolist() == [[4, 5, 3]]


@pytest.mark.parametrize("refine", [True, False])
def test_a_zarr_map_in_pieces_gives_the_peaks_of_the_whole(
    tmp_path: Path, refine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = _map("levels", (37, 21, 26), 5)
    expected = find_peaks(array, threshold=0.2, min_distance=3, refine=refine)
    stored = zarr.create_array(tmp_path / "map.zarr", data=array, chunks=(8, 8, 8))
    monkeypatch.setattr(peaks, "_BOX_VOXELS", 2000)
    found = find_peaks(stored, threshold=0.2, min_distance=3, refine=refine)
    assert len(found) > 20
    assert found.zyx.tobytes() == expected.zyx.tobytes()
    assert found.score.tobytes() == expected.score.tobytes()
    assert found.voxel_size is None
    assert found.shape == (37, 21, 26)


@dataclass
class _Map:
    """A heat map in memory, as the protocol asks for it."""

    array: npt.NDArray[np.float32]
    frame: Frame
    grid: Grid
    candidate_floor: float = 0.05
    name: str = "TS_01"
    scans: int = 0

    @property
    def is_constant(self) -> bool:
        return bool((self.array == self.array.flat[0]).all())

    def candidate_table(self) -> npt.NDArray[np.void]:
        table = scan(self.array, _box((0, n) for n in self.array.shape), self.candidate_floor)
        return table[np.random.default_rng(0).permutation(len(table))]

    def scan(self, threshold: float) -> npt.NDArray[np.void]:
        self.scans += 1
        return scan(self.array, _box((0, n) for n in self.array.shape), threshold)


def _heatmap(seed: int = 1, kind: str = "levels") -> _Map:
    frame = Frame(
        shape=(30, 40, 50),
        voxel_size=8.0,
        file_shape=(40, 60, 100),
        file_voxel_size=4.0,
        beam_axis="y",
        level_scale=(2.0, 2.0, 2.0),
        level_shift=(0.5, 0.5, 0.5),
    )
    grid = working_grid(frame.shape, 8.0, 12.0)
    return _Map(_map(kind, grid.shape, seed), frame, grid)


@pytest.mark.parametrize("refine", [True, False])
def test_a_heatmap_gives_its_arrays_peaks_in_file_voxels(refine: bool) -> None:
    heatmap = _heatmap()
    plain = find_peaks(heatmap.array, threshold=0.3, min_distance=2.5, refine=refine)
    found = find_peaks(heatmap, threshold=0.3, min_distance=2.5, refine=refine)
    assert len(found) > 20
    assert found.score.tobytes() == plain.score.tobytes()
    np.testing.assert_array_equal(found.zyx, heatmap.frame.to_file(heatmap.grid.to_source(plain.zyx)))
    assert (found.voxel_size, found.shape, found.tomogram) == (4.0, (40, 60, 100), "TS_01")
    assert heatmap.scans == 0


def test_a_threshold_below_the_floor_reads_the_map_again() -> None:
    heatmap = _heatmap()
    plain = find_peaks(heatmap.array, threshold=-0.2, min_distance=2, refine=False)
    found = find_peaks(heatmap, threshold=-0.2, min_distance=2, refine=False)
    assert found.score.tolist() == plain.score.tolist()
    assert heatmap.scans == 1


def test_a_constant_or_low_heatmap_has_no_picks() -> None:
    constant = find_peaks(_heatmap(kind="constant"), threshold=0.3, min_distance=2)
    low = find_peaks(_heatmap(), threshold=99, min_distance=2)
    assert len(constant) == len(low) == 0
    assert constant.voxel_size == low.voxel_size == 4.0


def test_a_flooded_heatmap_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmap = _heatmap()
    table = heatmap.candidate_table()
    monkeypatch.setattr(heatmap, "candidate_table", lambda: table)
    monkeypatch.setattr(peaks, "MAX_CANDIDATES", 10)
    with pytest.raises(SourceError, match=r"TS_01 has \d+ candidate peaks"):
        find_peaks(heatmap, threshold=0.1, min_distance=2)


def test_flipping_a_map_flips_its_peaks() -> None:
    array = _map("smooth", (12, 13, 14), 8)
    flipped = find_peaks(array[::-1, ::-1, ::-1], threshold=0.3, min_distance=1)
    straight = find_peaks(array, threshold=0.3, min_distance=1)
    np.testing.assert_allclose(11 - flipped.zyx[:, 0], straight.zyx[:, 0], atol=1e-5)
    np.testing.assert_array_equal(flipped.score, straight.score)


def test_the_candidate_type_is_the_stored_one() -> None:
    assert CANDIDATE.itemsize == 28
    assert CANDIDATE.names == ("z", "y", "x", "score", "dz", "dy", "dx")
