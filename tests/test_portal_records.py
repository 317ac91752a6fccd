"""Records of tomograms and selections of them: plain data that survive a file and a pickle."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.portal_samples import record
from tomocpt_stream.errors import FormatError
from tomocpt_stream.portal_records import LeftOut, Selection, TomogramRecord, by_place, natural

if TYPE_CHECKING:
    from pathlib import Path

FULL = record(
    alignment_id=701,
    voxel_spacing_id=602,
    processing_software="DenoisET",
    reconstruction_software="AreTomo3",
    ctf_corrected=False,
    is_portal_standard=None,
    is_author_submitted=True,
    https_zarr="https://host/a.zarr",
    s3_mrc="s3://bucket/a.mrc",
    bytes_mrc=3.5e8,
)
SELECTION = Selection(
    (FULL, record("TS_2")), (LeftOut(record("Ångström"), "half"),), ("A note.", "A tie."), ("A tie.",)
)


def test_a_record_is_plain_data() -> None:
    assert FULL.shape == (184, 620, 630)
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert hash(FULL) == hash(pickle.loads(pickle.dumps(FULL)))
    there = TomogramRecord.from_json(json.loads(json.dumps(FULL.to_json())))
    assert there == FULL
    assert there.size == (630, 620, 184)
    assert isinstance(there.size, tuple)
    with pytest.raises(AttributeError):
        FULL.run = "TS_2"  # type: ignore[misc]


def test_a_zarr_is_opened_rather_than_an_mrc_file() -> None:
    assert FULL.source == FULL.s3_zarr
    assert record(s3_zarr=None, s3_mrc="s3://bucket/a.mrc").source == "s3://bucket/a.mrc"
    assert record(s3_zarr=None).source is None


def test_the_levels_share_the_bytes_of_a_zarr() -> None:
    assert [FULL.bytes_at(level) for level in range(3)] == pytest.approx([64e6, 8e6, 1e6])
    assert FULL.shape_at(1) == (92, 310, 315)
    assert FULL.shape_at(2) == (46, 155, 158)
    flat = record(s3_zarr=None, s3_mrc="s3://bucket/a.mrc", bytes_mrc=5e8)
    assert flat.bytes_at(0) == 5e8
    unknown = record(bytes_zarr=None)
    assert unknown.bytes_at(0) == 4 * 630 * 620 * 184
    assert unknown.bytes_at(1) == 4 * 315 * 310 * 92
    assert record(s3_zarr=None).bytes_at(0) == 4 * 630 * 620 * 184


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "8001"}, "id '8001'"),
        ({"id": True}, "id True"),
        ({"voxel_spacing": None}, "voxel_spacing None"),
        ({"voxel_spacing": "10"}, "voxel_spacing '10'"),
        ({"size": [1, 2]}, r"size \[1, 2\]"),
        ({"size": [1, 2, 3.5]}, r"size \[1, 2, 3.5\]"),
        ({"ctf_corrected": 1}, "ctf_corrected 1"),
        ({"s3_zarr": 5}, "s3_zarr 5"),
        ({"colour": "red"}, "unknown colour"),
    ],
)
def test_a_record_of_other_fields_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        TomogramRecord.from_json(FULL.to_json() | change)


def test_a_record_without_what_it_needs_is_refused() -> None:
    data = FULL.to_json()
    del data["voxel_spacing"], data["run"]
    with pytest.raises(FormatError, match="no run, no voxel_spacing"):
        TomogramRecord.from_json(data)
    # What may be unknown may be absent.
    assert TomogramRecord.from_json(
        {k: v for k, v in record(id=7).to_json().items() if v is not None}
    ) == record(id=7)


def test_a_whole_number_is_a_length_too() -> None:
    assert (
        TomogramRecord.from_json(FULL.to_json() | {"voxel_spacing": 10, "bytes_zarr": 5}).voxel_spacing == 10
    )


def test_a_selection_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    SELECTION.write(path)
    assert Selection.read(path) == SELECTION
    assert len(SELECTION) == 2
    Selection(SELECTION.records).write(path)
    assert Selection.read(str(path)) == Selection(SELECTION.records)
    assert [each.name for each in tmp_path.iterdir()] == ["selection.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ('{"format": "tomocpt', "no JSON"),
        ("[]", "no selection"),
        ("{}", "no selection"),
        (json.dumps(SELECTION.to_json() | {"version": 2}), "another version"),
        (json.dumps(SELECTION.to_json() | {"records": None}), "not whole"),
        (json.dumps(SELECTION.to_json() | {"records": [5]}), "not whole"),
        (json.dumps(SELECTION.to_json() | {"records": [{"id": 5}]}), "no dataset_id"),
        (json.dumps({k: v for k, v in SELECTION.to_json().items() if k != "ties"}), "not whole.*ties"),
    ],
)
def test_another_file_is_no_selection(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=f"selection.json: .*{said}"):
        Selection.read(path)


def test_runs_are_sorted_as_people_count() -> None:
    names = [
        "TS_1",
        "TS_2",
        "TS_10",
        "ts_11",
        "TS_100",
        "Position_3_2",
        "Position_3_12",
        "7",
        "007b",
        "",
        "TS_01",
    ]
    expected = [
        "",
        "7",
        "007b",
        "Position_3_2",
        "Position_3_12",
        "TS_01",
        "TS_1",
        "TS_2",
        "TS_10",
        "ts_11",
        "TS_100",
    ]
    assert sorted(names, key=natural) == expected
    records = [record("TS_2"), record("TS_10"), record("TS_1", dataset_id=10001), record("TS_2", id=3)]
    ordered = sorted(records, key=by_place)
    assert [each.run for each in ordered] == ["TS_1", "TS_2", "TS_2", "TS_10"]
    assert ordered[1].id == 3


@given(st.lists(st.text(st.sampled_from("aB_01²٣"), max_size=6)))
def test_any_names_have_one_order(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural) == sorted(backwards, key=natural)
