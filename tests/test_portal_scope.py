"""What is meant by a deposition, a dataset, a run, a tomogram, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.portal_rows import (
    ANNOTATIONS_ONLY,
    FIRST_DATASET,
    OWN_TOMOGRAMS,
    SECOND_DATASET,
    small_world,
)
from tests.portal_server import portal_server
from tomocpt_stream.annotation_files import POINTS, Wanted, place_annotations
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal import PortalAPI, select_tomograms
from tomocpt_stream.portal_scope import _as_like, fits_name, in_frames, read_scope


def _ids(**asked: Any) -> list[int]:
    return [each.id for each in select_tomograms(**asked).records]


def test_a_deposition_means_its_own_tomograms(api: PortalAPI) -> None:
    selection = select_tomograms(deposition=OWN_TOMOGRAMS, api=api)
    assert [each.id for each in selection.records] == [8004, 8009]
    assert selection.notes[0] == "Deposition 10310 is taken to mean the tomograms submitted in it."
    assert selection.notes[1].startswith("One tomogram of each run is taken, by this preference: ")
    assert {each.record.id: each.why for each in selection.left_out} == {
        8001: "not the preferred one: voxel spacing 4.99 Å, processing denoised (8004 of the same run)",
        8002: "not the preferred one: voxel spacing 4.99 Å, processing filtered (8004 of the same run)",
        8003: "not the preferred one: processing denoised (8004 of the same run)",
        8005: "not the preferred one: a flag (8004 of the same run)",
        8006: "filtered_even holds half of the data",
        8007: "filtered_odd holds half of the data",
        8008: "level with one of a higher id (8009 of the same run)",
    }
    assert [each.record.id for each in selection.left_out] == [8001, 8002, 8003, 8005, 8006, 8007, 8008]


def test_or_those_of_its_datasets(api: PortalAPI) -> None:
    assert _ids(deposition=OWN_TOMOGRAMS, meaning="datasets", api=api) == [8004, 8009, 8010]


def test_without_tomograms_of_its_own_the_next_meaning_is_tried(api: PortalAPI) -> None:
    rows = small_world()
    for each in rows["tomograms"]:
        each["depositionId"] = 10320
    with portal_server(rows) as server:
        other = PortalAPI(server.url, cache=False)
        selection = select_tomograms(deposition=OWN_TOMOGRAMS, api=other)
    assert [each.id for each in selection.records] == [8004, 8009, 8010]
    assert selection.notes[0] == (
        "Deposition 10310 is taken to mean the tomograms of its datasets, as it has no tomograms of its own."
    )


def test_a_deposition_of_annotations_means_what_they_lie_on(api: PortalAPI) -> None:
    selection = select_tomograms(deposition=ANNOTATIONS_ONLY, api=api)
    assert [each.id for each in selection.records] == [8004, 8010]
    assert selection.notes[0] == (
        "Deposition 10358 is taken to mean the tomograms that its annotations lie on, as it has no tomograms "
        "and no datasets of its own."
    )
    # Those of another spacing are not under them, those of the other alignment are: a file lies there.
    assert _ids(deposition=ANNOTATIONS_ONLY, all=True, api=api) == [8003, 8004, 8005, 8010]
    assert _ids(deposition=ANNOTATIONS_ONLY, dataset=SECOND_DATASET, api=api) == [8010]
    assert _ids(deposition=ANNOTATIONS_ONLY, run=501, processing="denoised", api=api) == [8003]
    assert _ids(deposition=OWN_TOMOGRAMS, meaning="annotations", all=True, api=api) == [8003, 8004]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"deposition": ANNOTATIONS_ONLY, "meaning": "tomograms"},
            r"deposition 10358 \('Automated picks'\).*, taken as the tomograms submitted in it; "
            ".*leave the meaning out",
        ),
        ({"deposition": 10320, "meaning": "annotations"}, "deposition 10320 .* gives no tomograms, taken as"),
        (
            {"deposition": 10320, "dataset": FIRST_DATASET},
            "gives no tomograms within dataset 10440: neither the",
        ),
        ({"deposition": 99}, "the portal has no deposition 99"),
        ({"deposition": [OWN_TOMOGRAMS, 99]}, "the portal has no deposition 99"),
        ({"dataset": [FIRST_DATASET, 77, 78]}, "the portal has no dataset 77, 78"),
        (
            {"dataset": [FIRST_DATASET, 10450], "deposition": OWN_TOMOGRAMS},
            "dataset 10450 without a tomogram in what was asked for .deposition 10310, dataset 10440, 10450",
        ),
        ({"run": 999}, "the portal has no run 999"),
        ({"run": [501, 505], "dataset": FIRST_DATASET}, "run 505 without a tomogram"),
        ({"run": "ts_1"}, "no tomogram of a run called 'ts_1'.*capitals"),
        ({"run": ["TS_1", "XS*"]}, r"called 'XS\*'"),
        ({"tomogram": [8001, 5]}, "the portal has no tomogram 5"),
        (
            {"tomogram": 8001, "dataset": SECOND_DATASET},
            "tomogram 8001 without a tomogram|tomogram 8001 .* in what",
        ),
    ],
)
def test_what_is_not_there_is_named(api: PortalAPI, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PortalError, match=said):
        select_tomograms(**asked, api=api)


def test_several_depositions_are_joined(api: PortalAPI) -> None:
    selection = select_tomograms(deposition=["CZCDP-10320", ANNOTATIONS_ONLY], all=True, api=api)
    assert [each.id for each in selection.records] == [8003, 8004, 8005, 8010, 8011]
    assert [note[:16] for note in selection.notes[:2]] == ["Deposition 10320", "Deposition 10358"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"dataset": "DS-10440"}, [8004, 8009]),
        ({"dataset": [10440, "ds-10445"]}, [8004, 8009, 8010]),
        ({"run": 503}, [8009]),
        ({"run": " RN-503 "}, [8009]),
        ({"run": "503"}, [8009]),
        ({"run": "TS_1"}, [8004, 8011]),
        ({"run": "TS_1", "dataset": 10450}, [8011]),
        ({"run": "TS_1", "deposition": 10320}, [8011]),
        ({"run": "TS_1*", "dataset": 10440}, [8004, 8009]),
        ({"run": "TS?1"}, [8004, 8011]),
        ({"run": "*_[27]", "processing": "raw"}, [8010]),
        ({"run": ["TS_10", "Pos*", "RN-501"]}, [8004, 8009, 8010]),
        ({"run": ["TS_1", "TS_10"], "tomogram": 8001}, None),
        ({"run": "TS_1", "tomogram": [8001, 8011]}, [8001, 8011]),
        ({"run": 501, "tomogram": [8002, 8001]}, [8001, 8002]),
        ({"tomogram": "TM-8006"}, [8006]),
        ({"tomogram": [8009, 8008, 8006]}, [8006, 8008, 8009]),
        ({"tomogram": [8009, 8008, 8001, 8003], "prefer": "denoised"}, [8003, 8009]),
    ],
)
def test_scopes(api: PortalAPI, asked: dict[str, Any], found: list[int] | None) -> None:
    if found is None:
        with pytest.raises(PortalError, match="run called 'TS_10'"):
            _ids(**asked, api=api)
    else:
        assert _ids(**asked, api=api) == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "no deposition, dataset, run or tomogram; .*deposition=10310"),
        ({"processing": "raw"}, "no deposition"),
        (
            {"deposition": "DS-10440"},
            "DS-10440 as a deposition, which is the id of a dataset; expected CZCDP-10440",
        ),
        ({"dataset": "CZCDP-10310"}, "which is the id of a deposition; .*pass it as deposition"),
        ({"run": "DS-7"}, "DS-7 as a run, which is the id of a dataset"),
        ({"tomogram": "rn-7"}, "rn-7 as a tomogram, which is the id of a run"),
        ({"deposition": "EMPIAR-10310"}, "'EMPIAR-10310' as a deposition; expected a number"),
        ({"deposition": "10310; drop"}, "as a deposition"),
        ({"deposition": "١٠"}, "as a deposition"),
        ({"deposition": -1}, "-1 as a deposition"),
        ({"deposition": 0}, "0 as a deposition"),
        ({"deposition": True}, "True as a deposition"),
        ({"deposition": 2**31}, "2147483648 as a deposition"),
        ({"deposition": []}, "an empty deposition"),
        ({"run": ""}, "an empty run"),
        ({"deposition": 1, "meaning": "all"}, "meaning='all'"),
        ({"dataset": 1, "meaning": "datasets"}, "meaning=datasets without a deposition"),
        ({"deposition": 1, "processing": "rough"}, "processing='rough'"),
        ({"deposition": 1, "prefer": "rough"}, "prefer='rough'"),
        ({"deposition": 1, "near": -1}, "near=-1"),
        ({"deposition": 1, "near": 10, "all": True}, "all together with near or prefer"),
        ({"deposition": 1, "prefer": "raw", "all": True}, "all together with near or prefer"),
    ],
)
def test_a_mistake_shows_before_anything_is_asked(api: PortalAPI, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PortalError, match=said):
        select_tomograms(**asked, api=api)
    assert api.requests == 0


def test_an_alignment_that_nobody_says_is_one_where_the_run_has_no_other(api: PortalAPI) -> None:
    frames = {(1, 2), (1, None), (None, 2), (None, None)}
    several, one, none = 501, 502, 505  # the runs' numbers of alignments
    places: dict[int, tuple[int | None, int | None, int]] = {
        1: (1, 2, several),
        2: (1, 3, one),
        3: (2, 2, one),
        4: (None, 2, one),
        5: (None, None, one),
    }
    assert in_frames(places, frames, api) == {1}
    assert api.requests == 0  # where all is said nothing is asked
    places |= {6: (1, None, several), 7: (1, None, one), 8: (1, None, none), 9: (2, None, one)}
    assert in_frames(places, frames, api) == {1, 7, 8}
    assert api.requests == 1


def test_what_lies_on_tomograms_of_no_known_alignment_is_the_same_for_all() -> None:
    rows = small_world()
    for each in [*rows["tomograms"], *rows["annotationFiles"]]:
        if each["alignmentId"] in (701, 702):
            each["alignmentId"] = None
    ribosome = Wanted(object="cytosolic ribosome")
    truth: dict[str, Any] = {"run": 501, "dataset": FIRST_DATASET, "has_ground_truth": ribosome.object}
    under: dict[str, Any] = {"deposition": OWN_TOMOGRAMS, "meaning": "annotations", "run": 501}
    with portal_server(rows) as server:  # of two alignments
        api = PortalAPI(server.url, cache=False)
        records = select_tomograms(tomogram=[8003, 8004], all=True, api=api).records
        with pytest.raises(PortalError, match="as TM-8003 is, in a run of several"):
            place_annotations(records, ribosome, POINTS, api)
        for asked in (truth, under):
            with pytest.raises(PortalError):
                select_tomograms(**asked, all=True, api=api)
    rows["alignments"] = [each for each in rows["alignments"] if each["id"] != 702]
    with portal_server(rows) as server:
        api = PortalAPI(server.url, cache=False)
        assert set(place_annotations(records, ribosome, POINTS, api).on) == {8003, 8004}
        for asked in (truth, under):
            assert {8003, 8004} <= set(_ids(**asked, all=True, api=api))


def test_a_glob_finds_what_it_says_and_nothing_else(api: PortalAPI) -> None:
    assert _as_like("TS_1*") == "TS_1%"
    assert _as_like("a%b?c") == "a_b_c"
    assert _as_like("x[*]y[]z]") == "x%"
    assert fits_name("TS_1", "TS_[0-9]")
    assert not fits_name("TSA1", "TS_*")
    assert not fits_name("ts_1", "TS_*")
    assert read_scope(run=["TS_1", "TS_1", 7, "RN-7"]).run_names == ("TS_1",)
    assert str(read_scope(run=["TS_1", 7])) == "run 7, TS_1"
