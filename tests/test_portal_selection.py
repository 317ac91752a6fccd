"""Filters, the preference for one tomogram of each run, ties, and the account of all that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.portal_samples import record
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_selection import choose, filters, known_words, preference, sift

if TYPE_CHECKING:
    import random

    from tomocpt_stream.portal_records import TomogramRecord

KINDS = {
    "raw": record(id=1),
    "denoised": record(id=2, processing="denoised", ctf_corrected=True, is_portal_standard=True),
    "fine": record(
        id=3, voxel_spacing=4.99, reconstruction="SART", ctf_corrected=False, is_portal_standard=False
    ),
    "half": record(id=4, processing="filtered_even", processing_software="cryoCARE"),
    "fourier": record(
        id=5, reconstruction="Fourier_Space", reconstruction_software="RELION 5", is_author_submitted=True
    ),
    "shown": record(id=6, is_visualization_default=True, alignment_is_portal_standard=True),
}


def _passing(**asked: Any) -> set[str]:
    left, out = sift(list(KINDS.values()), filters(**asked), "dataset 10440")
    assert {each.id for each in left}.isdisjoint(each.record.id for each in out)
    assert len(left) + len(out) == len(KINDS)
    return {name for name, each in KINDS.items() if each in left}


@pytest.mark.parametrize(
    ("asked", "passing"),
    [
        ({}, set(KINDS)),
        ({"processing": "denoised"}, {"denoised"}),
        ({"processing": "denoised, filtered_even"}, {"denoised", "half"}),
        ({"processing": ("Denoised", "filtered even")}, {"denoised", "half"}),
        ({"reconstruction": "Fourier Space"}, {"fourier"}),
        ({"reconstruction": "fourier-space"}, {"fourier"}),
        ({"reconstruction": ["Fourier_Space", "sart"]}, {"fourier", "fine"}),
        ({"voxel_spacing": 4.99}, {"fine"}),
        ({"voxel_spacing": 5}, {"fine"}),  # as people write it: 0.01 Å off
        ({"voxel_spacing": (1, 5)}, {"fine"}),
        ({"voxel_spacing": (4.99, 10.012)}, set(KINDS)),
        ({"ctf_corrected": True}, {"denoised"}),
        ({"ctf_corrected": False}, {"fine"}),
        ({"ctf_corrected": "unknown"}, {"raw", "half", "fourier", "shown"}),
        ({"ctf_corrected": (False, "unknown")}, set(KINDS) - {"denoised"}),
        ({"standard": True}, {"denoised"}),
        ({"standard": False}, {"fine"}),
        ({"alignment_standard": True}, {"shown"}),
        ({"visualization_default": True}, {"shown"}),
        ({"author_submitted": True}, {"fourier"}),
        ({"software": "relion*"}, {"fourier"}),
        ({"software": "CRYOCARE"}, {"half"}),
        ({"where": lambda each: each.id > 4}, {"fourier", "shown"}),
        (
            {"processing": "raw", "ctf_corrected": "unknown", "voxel_spacing": 10.01},
            {"raw", "fourier", "shown"},
        ),
    ],
)
def test_filters(asked: dict[str, Any], passing: set[str]) -> None:
    assert _passing(**asked) == passing


def test_a_spacing_within_the_tolerance_is_the_same() -> None:
    for off, same in ((0.0, True), (0.01, True), (-0.01, True), (0.0101, False), (-0.0101, False)):
        (condition,) = filters(voxel_spacing=10.012 + off)
        assert condition.admits(KINDS["raw"]) == same


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"processing": "sharpened"}, "processing='sharpened'; expected one or several of raw, filtered"),
        ({"processing": []}, "processing="),
        ({"reconstruction": "WBP,Fourier"}, "reconstruction='Fourier'; .*Fourier_Space"),
        ({"voxel_spacing": -1}, "voxel_spacing=-1"),
        ({"voxel_spacing": (11, 9)}, "from 11 to 9"),
        ({"voxel_spacing": (1, float("nan"))}, "from 1 to nan"),
        ({"standard": "yes"}, "standard='yes'; .*unknown"),
        ({"ctf_corrected": ()}, "ctf_corrected"),
    ],
)
def test_what_nothing_can_have_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PortalError, match=said):
        filters(**asked)


def test_the_filter_that_leaves_nothing_is_named() -> None:
    with pytest.raises(PortalError) as caught:
        _passing(processing="raw", voxel_spacing=10.01, reconstruction="SART")
    assert str(caught.value) == (
        "dataset 10440 has 6 tomograms, 3 with voxel_spacing=10.01 Å and processing=raw, and none passes "
        "reconstruction=SART (1 of the 6 would, without the conditions before it); "
        "expected at least one that passes all that was asked for; "
        "change or leave out reconstruction: there are 2 with WBP, 1 with Fourier_Space"
    )
    with pytest.raises(
        PortalError, match=r"has 6 tomograms and none passes voxel_spacing=8 Å; .*out voxel_spacing: "
    ):
        _passing(voxel_spacing=8)
    with pytest.raises(PortalError, match=r"author_submitted=false; .*there are 5 with unknown, 1 with true"):
        _passing(author_submitted=False)
    with pytest.raises(PortalError, match=r"none passes where=big"):
        _passing(where=big)


def big(each: TomogramRecord) -> bool:
    return each.size[2] > 1000


def test_who_is_sifted_out_learns_why() -> None:
    _, out = sift(list(KINDS.values()), filters(processing="raw", reconstruction="WBP"), "x")
    assert {each.record.id: each.why for each in out} == {
        2: "processing=raw was asked for, and this one has denoised",
        3: "reconstruction=WBP was asked for, and this one has SART",
        4: "processing=raw was asked for, and this one has filtered_even",
        5: "reconstruction=WBP was asked for, and this one has Fourier_Space",
    }


def _taken(*records: TomogramRecord, halves: bool = False, **asked: Any) -> list[int]:
    return [each.id for each in choose(records, preference(records, **asked), halves=halves).records]


def test_the_spacing_comes_first_then_the_processing_then_the_flags() -> None:
    run = [
        record(id=1, voxel_spacing=4.99, is_portal_standard=True),
        record(id=2, processing="denoised", is_portal_standard=True),
        record(id=3, processing="filtered", is_portal_standard=True),
        record(id=7),
        record(id=5, alignment_is_portal_standard=True),
        record(id=4, is_visualization_default=True),
        record(id=6, is_portal_standard=True),
    ]
    order = []
    while run:
        (taken,) = _taken(*run, near=10)
        order.append(taken)
        run = [each for each in run if each.id != taken]
    assert order == [6, 5, 4, 7, 3, 2, 1]


@pytest.mark.parametrize(
    ("near", "taken"), [(4, 5.0), (10, 10.0), (7.4, 5.0), (7.5, 5.0), (7.6, 10.0), (14, 10.0), (30, 20.0)]
)
def test_the_nearest_spacing_is_taken_and_of_two_as_near_the_finer(near: float, taken: float) -> None:
    run = [
        record(voxel_spacing=size, processing=kind)
        for size, kind in ((5, "denoised"), (10, "raw"), (20, "raw"))
    ]
    (found,) = choose(run, preference(run, near=near)).records
    assert found.voxel_spacing == taken


def test_spacings_that_differ_by_a_rounding_are_as_near() -> None:
    assert _taken(record(id=1, voxel_spacing=10.0), record(id=2, voxel_spacing=10.003), near=10) == [2]


def test_without_a_wish_the_spacing_that_most_runs_have_is_taken() -> None:
    both = [record(run, voxel_spacing=size) for run in ("A", "B", "C") for size in (5.0, 10.0)]
    fine = [record(run, voxel_spacing=5.005) for run in ("D", "E")]
    coarse = [record("F", voxel_spacing=20.0)]
    taken = choose([*both, *coarse], preference([*both, *coarse])).records
    assert [each.voxel_spacing for each in taken] == [10.0, 10.0, 10.0, 20.0]  # as common: the coarser
    every = [*both, *fine, *coarse]
    taken = choose(every, preference(every)).records
    assert [each.voxel_spacing for each in taken] == [5.0, 5.0, 5.0, 5.005, 5.005, 20.0]
    # Tomograms are not counted, runs are.
    many = [*both, *(record("A", voxel_spacing=5.0) for _ in range(5))]
    assert {each.voxel_spacing for each in choose(many, preference(many)).records} == {10.0}


def test_the_order_of_processings_can_be_given() -> None:
    run = [record(id=1), record(id=2, processing="filtered"), record(id=3, processing="denoised")]
    assert _taken(*run) == [1]
    assert _taken(*run, prefer="denoised") == [3]
    assert _taken(*run, prefer="filtered,denoised") == [2]
    assert _taken(*run[::2], prefer=["filtered"]) == [1]  # the others follow in their usual order
    assert "then denoised, raw, filtered, then" in preference(run, prefer="denoised").text
    with pytest.raises(PortalError, match="prefer='nicest'"):
        preference(run, prefer="nicest")
    with pytest.raises(PortalError, match=r'filtered_odd.*half.*pass processing="filtered_odd"'):
        preference(run, prefer="filtered_odd")


def test_a_function_may_decide() -> None:
    run = [record(id=1), record(id=2, size=(1, 1, 1)), record(id=3, size=(1, 1, 1), s3_zarr=None)]

    def smallest(each: TomogramRecord) -> int:
        return each.size[0]

    selection = choose(run, preference(run, prefer=smallest))
    assert [each.id for each in selection.records] == [2]
    assert "what smallest puts first" in selection.notes[0]


def test_halves_are_never_taken_unless_asked_for() -> None:
    run = [
        record(id=1, processing="filtered_even", is_portal_standard=True),
        record("B", processing="filtered_odd"),
    ]
    whole = record(id=3, processing="denoised")
    selection = choose([*run, whole], preference(run))
    assert [each.id for each in selection.records] == [3]
    assert [each.why for each in selection.left_out] == [
        "filtered_odd holds half of the data",
        "filtered_even holds half of the data",
    ]
    assert choose(run, preference(run)).records == ()
    assert _taken(*run, whole, halves=True) == [run[1].id, 3]


def test_a_zarr_comes_before_an_mrc_file() -> None:
    assert _taken(record(id=1, s3_zarr=None, s3_mrc="x"), record(id=2, processing="denoised")) == [2]
    assert _taken(record(id=1, s3_zarr=None, s3_mrc="x")) == [1]


def test_a_tie_is_told_and_the_newest_taken() -> None:
    run = [
        record(id=11, last_modified="2025-01-01T00:00:00+02:00", reconstruction="WBP"),
        record(id=12, last_modified="2024-12-31T23:00:00+00:00", reconstruction="SART"),  # later, by an hour
        record(id=13, last_modified="", reconstruction="SIRT"),
        record(id=14, last_modified="2026-01-01", processing="denoised"),
    ]
    selection = choose(run, preference(run))
    assert [each.id for each in selection.records] == [12]
    (tie,) = selection.ties
    assert tie in selection.notes
    assert "In 1 run the preference" in tie
    assert "run TS_1 (dataset 10440): 12 taken, the newest, not 11, 13" in tie
    assert "They differ in reconstruction." in tie
    assert {each.record.id: each.why for each in selection.left_out} == {
        11: "level with one that is newer (12 of the same run)",
        13: "level with one that is newer (12 of the same run)",
        14: "not the preferred one: processing denoised (12 of the same run)",
    }


def test_of_two_as_new_the_highest_id_is_taken() -> None:
    run = [record(id=22), record(id=23), record(id=21)]
    selection = choose(run, preference(run))
    assert [each.id for each in selection.records] == [23]
    assert "23 taken, the highest id, not 22, 21" in selection.ties[0]
    assert "differ in nothing that is known" in selection.ties[0]
    assert selection.left_out[0].why == "level with one of a higher id (23 of the same run)"


def test_many_ties_make_one_note() -> None:
    runs = [record(f"TS_{number}") for number in range(100) for _ in range(2)]
    selection = choose(runs, preference(runs))
    (tie,) = selection.ties
    assert tie.startswith("In 100 runs ")
    assert tie.count("(dataset") == 6
    assert "; and 94 more." in tie
    assert len(selection.notes) == 2


def test_where_the_preference_decides_nothing_is_told() -> None:
    selection = choose(list(KINDS.values()), preference(list(KINDS.values())))
    assert selection.ties == ()
    assert selection.notes == (
        "One tomogram of each run is taken, by this preference: a zarr before an MRC file, then the voxel "
        "spacing that most runs have (10.012 Å), then raw, filtered, denoised, then the portal's standard, a "
        "standard alignment, and what the portal shows first; then the newest.",
    )
    assert "nearest 10 Å" in preference([], near=10.0).text


def test_runs_of_one_name_in_two_datasets_are_two() -> None:
    assert len(_taken(record(), record(dataset_id=10445))) == 2


def test_tomograms_of_no_run_stand_alone() -> None:
    assert len(_taken(*(record("x", run_id=0, dataset_id=0) for _ in range(3)))) == 3


@pytest.mark.parametrize("near", [0, -3, float("nan"), float("inf")])
def test_a_wish_that_is_no_length_is_refused(near: float) -> None:
    with pytest.raises(PortalError, match="near="):
        preference([], near=near)


def test_words_keep_the_order_they_are_given_in() -> None:
    assert known_words("x", "b , A", ("A", "B")) == ["B", "A"]


@given(st.randoms(use_true_random=False), st.sampled_from([None, 5.0, 10.0]))
def test_any_order_of_the_records_gives_the_same(shuffler: random.Random, near: float | None) -> None:
    records = [
        record(f"TS_{number % 4}", id=number + 1, voxel_spacing=(5.0, 10.0)[number % 3 == 0], processing=kind)
        for number, kind in enumerate(["raw", "filtered", "filtered_odd", "denoised"] * 4)
    ]
    expected = choose(records, preference(records, near=near))
    shuffler.shuffle(records)
    found = choose(records, preference(records, near=near))
    assert found.records == expected.records
    assert found.notes == expected.notes
    assert set(found.left_out) == set(expected.left_out)
