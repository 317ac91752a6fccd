from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tables import refused, survives
from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks
from tomocpt_stream.formats.dynamo import matrices_of
from tomocpt_stream.formats.relion import matrices_of as matrices_of_relion

if TYPE_CHECKING:
    from pathlib import Path


def row(
    tag: int = 1, *, tomogram: str = "1", cls: str = "0", xyz: str = "10 20 30", score: str = "0.5"
) -> str:
    return f"{tag} 1 1 0.5 -1 2 10 20 30 {score} 0 0 1 -60 60 -60 60 0 0 {tomogram} 1 {cls} 0 {xyz} 0 0\n"


def test_the_real_table_is_read(shared_data: Path) -> None:
    path = shared_data / "star" / "dynamo_example.tbl"
    tables = read_kinds(path, base_index=0)
    stored = np.loadtxt(path)
    assert sum(map(len, tables)) == len(stored) == 4934
    assert [int(table.tomogram) for table in tables] == list(
        dict.fromkeys(stored[:, 19].astype(int).tolist())
    )
    for table in tables:
        rows = stored[stored[:, 19] == int(table.tomogram)]
        np.testing.assert_allclose(table.zyx[:, ::-1], rows[:, 23:26] + rows[:, 3:6])
        np.testing.assert_allclose(table.score, rows[:, 9], rtol=1e-6)
    one = read_kinds(path, base_index=1)[0]
    np.testing.assert_allclose(one.zyx, tables[0].zyx - 1)


def test_particles_of_the_real_table_stand_on_their_spheres(shared_data: Path) -> None:
    """They lie on vesicles (column 21): in this convention alone does their z lead away from the centre."""
    stored = np.loadtxt(shared_data / "star" / "dynamo_example.tbl")
    mean = []
    for tomogram, region in np.unique(stored[:, 19:21], axis=0)[:12]:
        rows = stored[(stored[:, 19] == tomogram) & (stored[:, 20] == region)]
        xyz = rows[:, 23:26] + rows[:, 3:6]
        solved = np.linalg.lstsq(np.c_[2 * xyz, np.ones(len(xyz))], (xyz**2).sum(axis=1), rcond=None)[0]
        outward = xyz - solved[:3]
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        mean.append(np.einsum("ni,ni->n", matrices_of(rows[:, 6:9])[:, :, 2], outward).mean())
    assert min(mean) > 0.9


def test_angles_are_those_that_relion_has_for_the_same_rotation() -> None:
    """Both programs turn the reference; tdrot = psi - 90, narot = rot + 90."""
    angles = np.random.default_rng(0).uniform([-180, 0, -180], [180, 180, 180], (50, 3))
    tdrot, tilt, narot = angles.T
    ours = matrices_of_relion(np.column_stack([narot - 90, tilt, tdrot + 90]))
    np.testing.assert_allclose(matrices_of(angles), ours, atol=1e-12)


def test_the_base_index_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.tbl"
    path.write_text(row())
    with pytest.raises(FormatError, match=r"first voxel is 0 or 1.*base_index"):
        read_picks(path)
    np.testing.assert_allclose(read_picks(path, base_index=1)["1"].zyx, [[31.0, 18.0, 9.5]])


def test_tomograms_have_the_names_of_the_doc(tmp_path: Path) -> None:
    path = tmp_path / "a.tbl"
    path.write_text(row(1, tomogram="3") + row(2, tomogram="7") + row(3, tomogram="3"))
    (tmp_path / "a.doc").write_text("3 /data/TS_03.rec\n7 volumes/TS 07.mrc\n\n")
    found = read_picks(path, base_index=0)
    assert {name: len(table) for name, table in found.items()} == {"TS_03": 2, "TS 07": 1}
    (tmp_path / "b.doc").write_text("3 x/A.mrc\n")
    assert set(read_picks(path, base_index=0, tomograms=tmp_path / "b.doc")) == {"A", "7"}
    (tmp_path / "b.doc").write_text("three x/A.mrc\n")
    with pytest.raises(FormatError, match="line 1 of"):
        read_picks(path, base_index=0, tomograms=tmp_path / "b.doc")
    sizes = {"TS_03": ((10, 20, 30), 5.0)}
    assert read_picks(path, base_index=0, tomograms=sizes)["TS_03"].voxel_size == 5


def test_classes_are_kinds_where_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "a.tbl"
    path.write_text(row(1, cls="1") + row(2, cls="2"))
    assert [table.particle for table in read_kinds(path, base_index=0)] == ["1", "2"]
    path.write_text(row(1, cls="2") + row(2, cls="2"))
    assert [table.particle for table in read_kinds(path, base_index=0)] == [""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row() + "1 2 3\n", "line 2 of .* has 3 cells"),
        (row() + row(xyz="10 nan 30"), "line 2 of .* column 25 'nan'"),
        (row() + row(xyz="10 1e12 30"), "line 2"),
        (row() + row(xyz=f"10 {'9' * 400} 30"), "line 2"),
        (row(tomogram="1.5"), "line 1 of .* whole numbers"),
        ("1 2 3\n", "26 columns or more"),
        ("tag aligned\n", "26 columns or more"),
        (row() + "\0" * 10, "line 2 .* bytes of zero"),
        (row() + "1 " * 70_000, "line 2 .* characters and more"),
        (row() + "\udcff", "no text"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, text: str, message: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    found = refused(tmp_path / "a.tbl", data, base_index=0)
    assert re.search(message, found), found


def test_a_table_without_rows_has_no_picks(tmp_path: Path) -> None:
    (tmp_path / "a.tbl").write_text("")
    assert read_picks(tmp_path / "a.tbl", base_index=0) == {}


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1200), junk=st.binary(max_size=8), end=st.integers(0, 1400))
def test_mutations_of_the_real_table(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, end: int
) -> None:
    data = (shared_data / "star" / "dynamo_example.tbl").read_bytes()[:1300]
    path = tmp_path_factory.getbasetemp() / "mutant.tbl"
    path.write_bytes((data[:at] + junk + data[at + len(junk) :])[:end])
    survives(lambda: read_kinds(path, base_index=1))
