from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import SourceError
from tomocpt_stream.picks import Picks


def _picks(**changes: object) -> Picks:
    picks = Picks(
        zyx=np.array([[1.0, 2.0, 3.0], [4.0, 5.5, 6.0], [7.0, 8.0, 9.25]]),
        score=np.array([0.9, 0.1, 0.5], dtype=np.float32),
        rotations=Rotation.from_euler("ZYZ", [[10, 20, 30], [0, 0, 0], [90, 0, 0]], degrees=True).as_matrix(),
        voxel_size=10.0,
        tomogram="TS_01",
        shape=(10, 20, 30),
        particle="ribosome",
    )
    return replace(picks, **changes)  # type: ignore[arg-type]


def test_angstrom_is_xyz_times_the_voxel_size_without_a_half_voxel() -> None:
    np.testing.assert_array_equal(_picks().angstrom()[1], [60.0, 55.0, 40.0])


def test_angstrom_asks_for_a_missing_voxel_size() -> None:
    with pytest.raises(SourceError, match="TS_01 without a voxel size"):
        _picks(voxel_size=None).angstrom()


def test_above_is_strict_and_rounds_the_threshold_to_float32() -> None:
    picks = _picks()
    assert picks.above(0.1).score.tolist() == pytest.approx([0.9, 0.5])
    assert len(picks.above(0.0999)) == 3
    assert len(picks.above(2.0)) == 0


def test_above_keeps_rotations_and_names_beside_their_picks() -> None:
    picks = _picks()
    kept = picks.above(0.4)
    assert kept.rotations is not None
    assert picks.rotations is not None
    np.testing.assert_array_equal(kept.rotations, picks.rotations[[0, 2]])
    assert (kept.tomogram, kept.particle) == ("TS_01", "ribosome")
    assert (kept.shape, kept.voxel_size) == ((10, 20, 30), 10.0)


def test_take_orders_by_indices() -> None:
    assert _picks().take(np.array([2, 0])).zyx[:, 0].tolist() == [7.0, 1.0]


def test_arrays_are_read_only_copies() -> None:
    source = np.zeros((2, 3))
    picks = Picks(source, np.zeros(2, dtype=np.float32))
    source[0, 0] = 5.0
    assert picks.zyx[0, 0] == 0.0
    for array in (picks.zyx, picks.score):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_dataframe_names_its_columns() -> None:
    table = _picks().to_dataframe()
    assert list(table.columns[:6]) == ["tomogram", "particle", "z", "y", "x", "score"]
    assert table[["z", "y", "x"]].to_numpy()[1].tolist() == [4.0, 5.5, 6.0]
    matrix = table[[f"r{i}{j}" for i in range(3) for j in range(3)]].to_numpy().reshape(3, 3, 3)
    np.testing.assert_array_equal(matrix, _picks().rotations)


def test_no_picks_are_picks() -> None:
    empty = Picks(np.zeros((0, 3)), np.zeros(0, dtype=np.float32), voxel_size=5.0, tomogram="a")
    assert len(empty) == 0
    assert empty.angstrom().shape == (0, 3)
    assert empty.above(0.5).to_dataframe().shape == (0, 6)
    assert Picks([], []).zyx.shape == (0, 3)  # type: ignore[arg-type]


def test_picks_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(_picks()))
    np.testing.assert_array_equal(again.zyx, _picks().zyx)
    assert again.tomogram == "TS_01"
    assert not again.score.flags.writeable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zyx": np.zeros((3, 2))}, r"zyx of shape \(3, 2\)"),
        ({"zyx": np.zeros(3)}, r"zyx of shape \(3,\)"),
        ({"score": np.zeros(2)}, r"score of shape \(2,\)"),
        ({"rotations": np.zeros((3, 3))}, r"rotations of shape \(3, 3\)"),
        ({"zyx": np.array([[0.0, 0, 0], [0, np.nan, 0], [0, 0, 0]])}, "pick 1 of TS_01"),
        ({"voxel_size": 0.0}, "voxel size of 0.0"),
        ({"voxel_size": float("nan")}, "voxel size of nan"),
    ],
)
def test_wrong_tables_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        _picks(**changes)
