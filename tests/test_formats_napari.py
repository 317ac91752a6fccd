from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from tests.tables import refused, some_picks
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks, write_picks

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "index,axis-0,axis-1,axis-2,score,tomogram,particle,voxel_size"


def as_napari_reads(path: Path) -> tuple[np.ndarray, dict[str, list[str]]]:
    """A points layer by the rules of napari's own reader of .csv: an index, axes, all else features."""
    with path.open(newline="") as stream:
        names, *rows = list(csv.reader(stream))
    assert names[0] == "index"
    assert names[1:4] == ["axis-0", "axis-1", "axis-2"]
    axes = [name.startswith("axis-") for name in names]
    table = np.array(rows, dtype=object).reshape(-1, len(names))
    features = [not axis and name != "index" for axis, name in zip(axes, names, strict=True)]
    found = {name: table[:, i].tolist() for i, name in enumerate(names) if features[i]}
    return table[:, axes].astype(float), found


def test_the_layer_is_one_of_napari(tmp_path: Path) -> None:
    picks = [some_picks(4), some_picks(2, tomogram="TS, 02")]
    write_picks(picks, tmp_path / "a.csv", format="napari")
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == HEADER
    data, features = as_napari_reads(tmp_path / "a.csv")
    np.testing.assert_array_equal(data, np.concatenate([table.zyx for table in picks]))
    assert features["tomogram"] == ["TS_01"] * 4 + ["TS, 02"] * 2
    np.testing.assert_array_equal(np.array(features["score"][:4], np.float32), picks[0].score)
    assert pd.read_csv(tmp_path / "a.csv")["index"].tolist() == list(range(6))


def test_a_layer_is_known_by_its_header(tmp_path: Path) -> None:
    write_picks(some_picks(4, turned=True), tmp_path / "a.csv", format="napari")
    found = read_picks(tmp_path / "a.csv")["TS_01"]
    np.testing.assert_array_equal(found.zyx, some_picks(4).zyx)
    np.testing.assert_array_equal(found.rotations, some_picks(4, turned=True).rotations)
    assert found.particle == "ribosome"


def test_a_bare_layer_is_of_the_tomogram_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "TS_03.csv").write_text("index,axis-0,axis-1,axis-2\n0.0,1.0,2.0,3.0\n1.0,4.5,5.0,6.0\n")
    found = read_picks(tmp_path / "TS_03.csv")["TS_03"]
    assert found.zyx.tolist() == [[1, 2, 3], [4.5, 5, 6]]
    assert found.score.tolist() == [1, 1]


def test_points_added_in_napari_may_have_no_features(tmp_path: Path) -> None:
    rows = "0,1,2,3,0.25,TS_01,ribosome,10\n1,4,5,6,,TS_01,ribosome,\n2,7,8,9,nan,TS_01,ribosome,nan\n"
    (tmp_path / "a.csv").write_text(f"{HEADER}\n{rows}")
    found = read_picks(tmp_path / "a.csv")["TS_01"]
    assert found.score.tolist() == [0.25, 1, 1]
    assert found.voxel_size == 10
    (tmp_path / "a.csv").write_text(f"{HEADER}\n0,1,2,3,.5,TS_01,,\n1,4,5,6,.5,,,\n")
    assert [(table.tomogram, len(table)) for table in read_kinds(tmp_path / "a.csv")] == [
        ("TS_01", 1),
        ("a", 1),
    ]


@pytest.mark.parametrize(
    "header",
    ["index,axis-0,axis-1", "index,axis-0,axis-1,axis-2,axis-3", "index,axis-0,axis-1,axis-2,a,a", "x,y,z"],
)
def test_other_layers_are_refused(tmp_path: Path, header: str) -> None:
    message = "twice" if header.endswith("a,a") else "three-dimensional image"
    assert message in refused(tmp_path / "a.csv", f"{header}\n", "napari")


def test_a_place_must_be_a_number(tmp_path: Path) -> None:
    assert "line 2" in refused(tmp_path / "a.csv", f"{HEADER}\n0,1,nan,3,1,a,b,10\n")
    with pytest.raises(FormatError, match="printable"):
        write_picks(some_picks(1, tomogram="a\nb"), tmp_path / "a.csv", format="napari")
