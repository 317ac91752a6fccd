"""Finding tomograms of the portal: what is taken, what is said, and what it costs."""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from tests.portal_rows import (
    ANNOTATIONS_ONLY,
    FIRST_DATASET,
    OWN_TOMOGRAMS,
    SECOND_DATASET,
    many,
    small_world,
)
from tests.portal_rows import tomogram as tomogram_row
from tests.portal_samples import record
from tests.portal_server import Fault, PortalServer, portal_server
from tomocpt_stream import portal, portal_queries
from tomocpt_stream.errors import PortalError
from tomocpt_stream.lattice import Window
from tomocpt_stream.portal import PortalAPI, Selection, find_tomograms, select_tomograms, summary, survey
from tomocpt_stream.portal_records import TomogramRecord

if TYPE_CHECKING:
    from pathlib import Path


def _ids(**asked: Any) -> list[int]:
    return [each.id for each in select_tomograms(**asked).records]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"near": 5}, [8002, 8009, 8010]),
        ({"near": 5, "prefer": "denoised"}, [8001, 8009, 8010]),
        ({"prefer": "denoised"}, [8003, 8009, 8010]),
        ({"prefer": lambda each: each.id}, [8001, 8008, 8010]),
        ({"processing": "filtered_even"}, [8006]),
        ({"processing": ["filtered_odd", "filtered_even"], "prefer": lambda each: each.id}, [8006]),
        ({"voxel_spacing": (4, 8)}, [8002, 8010]),
        ({"alignment_standard": True}, [8004, 8010]),
        ({"alignment_standard": False}, [8005]),
        ({"standard": True}, [8003]),
        ({"ctf_corrected": (False, "unknown")}, [8004, 8009, 8010]),
        ({"visualization_default": True}, [8001]),
        ({"author_submitted": False}, [8010]),
        ({"reconstruction": "Fourier Space"}, [8009]),
        ({"software": "denois*"}, [8001]),
        ({"organism": "escherichia*"}, [8004, 8009]),
        ({"organism": "unknown*"}, [8010]),
        ({"has_ground_truth": True}, [8004]),
        ({"has_ground_truth": "cytosolic *"}, [8004]),
        ({"has_ground_truth": "GO:0022626", "all": True}, [8003, 8004]),
        ({"has_ground_truth": False, "processing": "raw", "voxel_spacing": 10.01}, [8005, 8009]),
        ({"prefer": "all"}, [8001, 8002, 8003, 8004, 8005, 8006, 8007, 8008, 8009, 8010]),
        ({"all": True, "processing": ["raw", "filtered"]}, [8002, 8004, 8005, 8008, 8009, 8010]),
        ({"where": lambda each: each.size[2] < 300, "near": 7.84}, [8004, 8009, 8010]),
    ],
)
def test_filters_and_preferences(api: PortalAPI, asked: dict[str, Any], found: list[int]) -> None:
    assert _ids(deposition=OWN_TOMOGRAMS, meaning="datasets", api=api, **asked) == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"processing": "raw", "voxel_spacing": 4.99},
            "deposition 10310 has 9 tomograms, 2 with voxel_spacing=4.99 Å, and none passes processing=raw "
            r"\(4 of the 9 would, .*or leave out processing: there are 1 with denoised, 1 with filtered",
        ),
        ({"has_ground_truth": "membrane"}, "none passes has_ground_truth=membrane; .*there are 9 with none"),
        ({"has_ground_truth": "cytosolic_ribosome"}, "none passes has_ground_truth"),
        ({"organism": "Homo*"}, r"none passes organism='Homo\*'; .*there are 9 with Escherichia coli"),
        ({"author_submitted": False}, "none passes author_submitted=false; .*7 with unknown, 2 with true"),
        (
            {"run": 502},
            "deposition 10310, run 502 has 2 tomograms .*each holds half .*; .*pass processing or all",
        ),
    ],
)
def test_an_empty_selection_names_what_emptied_it(api: PortalAPI, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PortalError, match=said):
        select_tomograms(deposition=OWN_TOMOGRAMS, api=api, **asked)


def test_a_tie_is_warned_of(api: PortalAPI) -> None:
    with pytest.warns(UserWarning, match="In 1 run the preference does not settle .* 8009 taken") as caught:
        found = find_tomograms(deposition=OWN_TOMOGRAMS, api=api)
    assert caught[0].filename == __file__
    assert isinstance(found, list)
    assert [each.id for each in found] == [8004, 8009]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [each.id for each in find_tomograms(run=501, api=api)] == [8004]
        selection = select_tomograms(deposition=OWN_TOMOGRAMS, api=api)  # its notes say it
    assert set(selection.ties) <= set(selection.notes)


def test_the_two_functions_take_the_same() -> None:
    there, here = inspect.signature(select_tomograms), inspect.signature(find_tomograms)
    assert there.parameters == here.parameters
    assert here.return_annotation == "list[TomogramRecord]"
    assert find_tomograms.__name__ == "find_tomograms"


def test_a_record_says_all_that_the_portal_does(api: PortalAPI) -> None:
    (found,) = select_tomograms(tomogram=8001, api=api).records
    row = next(each for each in small_world()["tomograms"] if each["id"] == 8001)
    assert found == TomogramRecord(
        id=8001,
        name="TS_1",
        run="TS_1",
        run_id=501,
        dataset_id=10440,
        deposition_id=10310,
        alignment_id=701,
        voxel_spacing_id=601,
        voxel_spacing=4.99,
        size=(1260, 1264, 368),
        processing="denoised",
        reconstruction="WBP",
        processing_software="DenoisET",
        reconstruction_software="AreTomo3",
        ctf_corrected=True,
        is_portal_standard=False,
        is_author_submitted=True,
        is_visualization_default=True,
        alignment_is_portal_standard=True,
        s3_zarr=row["s3OmezarrDir"],
        https_zarr=row["httpsOmezarrDir"],
        s3_mrc=row["s3MrcFile"],
        https_mrc=row["httpsMrcFile"],
        bytes_zarr=row["fileSizeOmezarr"],
        bytes_mrc=row["fileSizeMrc"],
        last_modified="2024-11-05T00:00:00+00:00",
    )
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_tomogram_without_a_zarr_is_read_from_its_mrc_file(api: PortalAPI) -> None:
    selection = select_tomograms(dataset=10450, api=api)
    (found,) = selection.records
    assert found.source == found.s3_mrc
    assert found.name == found.run == "TS_1"
    assert found.alignment_is_portal_standard is None
    assert selection.notes[-1] == "The portal has no zarr of this tomogram, whose MRC file is read: 8011."


def test_what_cannot_be_read_is_left_out(api: PortalAPI) -> None:
    rows = small_world()
    (run,) = [each for each in rows["runs"] if each["id"] == 501]
    (spacing,) = [each for each in rows["tomogramVoxelSpacings"] if each["id"] == 602]
    nothing = dict.fromkeys(("s3OmezarrDir", "s3MrcFile"))
    del rows["tomogramAuthors"]
    rows["tomograms"] = [
        tomogram_row(1, run, spacing, None, **nothing),
        tomogram_row(2, run, spacing, None, sizeX=0),
        tomogram_row(3, run, spacing, None, voxelSpacing=0.0),
        tomogram_row(4, run, spacing, None, processing="denoised"),
        tomogram_row(5, run, spacing, None, runId=None),
    ]
    with portal_server(rows) as server:
        other = PortalAPI(server.url, cache=False)
        selection = select_tomograms(deposition=OWN_TOMOGRAMS, api=other)
        assert [each.id for each in selection.records] == [5, 4]
        assert selection.records[0].run_id == selection.records[0].dataset_id == 0
        whys = {each.record.id: each.why for each in selection.left_out}
        assert whys[1] == "the portal names no zarr and no MRC file"
        assert whys[2] == whys[3].replace("0 Å and a size of (630", "10.012 Å and a size of (0")
        with pytest.raises(
            PortalError, match="tomogram 1, 2 has 2 tomograms, and none that can be read: the por"
        ):
            select_tomograms(tomogram=[1, 2], api=other)


def test_the_order_is_that_of_the_runs_whatever_the_server_gives() -> None:
    found = []
    for seed in range(3):
        with portal_server(small_world(), seed=seed) as server:
            api = PortalAPI(server.url, cache=False)
            found.append(select_tomograms(dataset=[10450, 10440, 10445], all=True, api=api))
    assert found[0] == found[1] == found[2]
    assert [each.run for each in found[0].records] == ["TS_1"] * 5 + ["TS_2"] * 2 + ["TS_10"] * 2 + [
        "Position_7",
        "TS_1",
    ]


# How many requests it takes, and what goes wrong on the way.


@pytest.mark.parametrize(("runs", "taken"), [(1500, 1500), (3000, 3000)])
def test_three_thousand_tomograms_take_few_requests(runs: int, taken: int) -> None:
    with portal_server(many(3000, runs=runs, config=10)) as server:
        api = PortalAPI(server.url, cache=False)
        selection = select_tomograms(deposition=OWN_TOMOGRAMS, near=10, api=api)
        assert len(selection) == taken
        assert len(selection) + len(selection.left_out) == 3000
        assert [each.run for each in selection.records] == [f"TS_{1 + number}" for number in range(taken)]
        assert api.requests == len(server.requests) == {1500: 9, 3000: 12}[runs]
        assert selection.ties == ()


def test_a_selection_takes_few_requests(api: PortalAPI) -> None:
    select_tomograms(deposition=OWN_TOMOGRAMS, api=api)
    assert api.requests == 2
    select_tomograms(deposition=ANNOTATIONS_ONLY, api=api)
    assert api.requests == 2 + 6  # files without an alignment are counted apart


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503, times=3), Fault(status=502, times=2), Fault(most_bytes=2500), Fault(delay=0.02)],
)
def test_a_server_in_trouble_gives_the_same(
    server: PortalServer, api: PortalAPI, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = select_tomograms(dataset=[10440, 10445], has_ground_truth=False, api=api)
    monkeypatch.setattr(portal_queries, "_SMALLEST_PAGE", 1)
    server.fault = fault
    assert select_tomograms(dataset=[10440, 10445], has_ground_truth=False, api=api) == expected


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(html=True), "no JSON"),
        (Fault(data_null=True), "no data and no error"),
        (Fault(lacking=frozenset({"Tomogram.ctfCorrected"})), "upgrade tomocpt-stream"),
        (Fault(status=403), "answers 403"),
    ],
)
def test_a_server_that_stays_in_trouble_is_told_of(
    server: PortalServer, api: PortalAPI, fault: Fault, said: str
) -> None:
    server.fault = fault
    with pytest.raises(PortalError, match=said):
        select_tomograms(deposition=OWN_TOMOGRAMS, api=api)


def test_a_field_that_nobody_asks_for_may_be_lacking(server: PortalServer, api: PortalAPI) -> None:
    server.fault = Fault(lacking=frozenset({"Tomogram.neuroglancerConfig", "Run.s3Prefix"}))
    assert len(select_tomograms(deposition=OWN_TOMOGRAMS, api=api)) == 2


def test_offline_the_same_selection_comes_from_the_cache(server: PortalServer, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"deposition": ANNOTATIONS_ONLY, "organism": "*", "has_ground_truth": (True)}
    expected = select_tomograms(**asked, api=PortalAPI(server.url, cache=tmp_path))
    server.fault = Fault(status=503)
    offline = PortalAPI(server.url, cache=tmp_path, offline=True)
    assert select_tomograms(**asked, api=offline) == expected
    assert select_tomograms(**asked, processing="raw", api=offline).records == expected.records
    assert offline.requests == 0
    with pytest.raises(PortalError, match="offline, and no whole answer"):
        select_tomograms(deposition=OWN_TOMOGRAMS, api=offline)


def test_a_selection_is_kept_for_later_runs(api: PortalAPI, tmp_path: Path) -> None:
    selection = select_tomograms(deposition=OWN_TOMOGRAMS, api=api)
    selection.write(tmp_path / "selection.json")
    assert Selection.read(tmp_path / "selection.json") == selection
    assert json.loads((tmp_path / "selection.json").read_text())["records"][0]["s3_zarr"].endswith(
        "TS_1.zarr"
    )


# What it costs.


def test_a_summary_counts_what_will_be_read_and_scored() -> None:
    records = [
        record("A", size=(630, 620, 184), bytes_zarr=73e6),
        record("B", size=(300, 257, 40), bytes_zarr=7.3e6, voxel_spacing=5.0, processing="denoised"),
        record("B", s3_zarr=None, s3_mrc="s3://b/x.mrc", bytes_mrc=1e6, bytes_zarr=None, size=(96, 96, 96)),
    ]
    found = summary(Selection(tuple(records)))
    assert found == {
        "tomograms": 3,
        "runs": 2,
        "datasets": 1,
        "level": 0,
        "bytes": pytest.approx(64e6 + 6.4e6 + 1e6),
        "bytes_stored": pytest.approx(73e6 + 7.3e6 + 1e6),
        "chunks": 3 * 3 * 1 + 2 * 2 * 1 + 1,
        "windows": 14 * 13 * 4 + 7 * 6 * 1 + 8,  # 48 voxels each
        "seconds": None,
        "voxel_spacings": {5.0: 1, 10.012: 2},
        "processing": {"denoised": 1, "raw": 2},
        "reconstruction": {"WBP": 3},
    }
    coarse = summary(records, level=1)
    assert coarse["bytes"] == pytest.approx(8e6 + 0.8e6 + 1e6)
    assert coarse["chunks"] == 2 * 2 * 1 + 1 + 1
    assert coarse["windows"] == 7 * 7 * 2 + 4 * 3 * 1 + 8
    scaled = summary(records[:1], voxel_size=20.024, window=Window((32, 32, 32), (4, 4, 4)))
    assert scaled["windows"] == 14 * 13 * 4  # half the voxels, half the stride
    assert summary([])["windows"] == 0


@pytest.mark.parametrize(
    ("windows", "bytes_", "seconds"), [(1.0, 64e9, 728.0), (1e9, 64e4, 100.0), (1.0, None, None)]
)
def test_reading_and_scoring_go_on_at_the_same_time(
    windows: float, bytes_: float | None, seconds: float | None
) -> None:
    found = summary([record(bytes_zarr=73e6)], windows_per_second=windows, bytes_per_second=bytes_)
    assert found["seconds"] == (seconds if seconds is None else pytest.approx(seconds))


def test_a_survey_takes_one_request(api: PortalAPI) -> None:
    kinds = survey(deposition=OWN_TOMOGRAMS, api=api)
    assert api.requests == 1
    assert sum(kind["tomograms"] for kind in kinds) == 9
    assert kinds[0] == {
        "tomograms": 2,
        "voxel_spacing": 10.012,
        "processing": "raw",
        "reconstruction": "Fourier_Space",
        "bytes_zarr": 2.0 * round(4 * 630 * 630 * 184 * 8 / 7),
        "bytes_mrc": 2 * (4.0 * 630 * 630 * 184 + 1024),
    }
    assert [kind["tomograms"] for kind in kinds] == [2, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"deposition": OWN_TOMOGRAMS, "meaning": "datasets"}, 10),
        ({"deposition": OWN_TOMOGRAMS, "meaning": "datasets", "dataset": SECOND_DATASET}, 1),
        ({"deposition": [OWN_TOMOGRAMS, 10320]}, 11),
        ({"dataset": [FIRST_DATASET, "DS-10450"]}, 10),
    ],
)
def test_a_survey_counts_what_was_asked_for(api: PortalAPI, asked: dict[str, Any], count: int) -> None:
    assert sum(kind["tomograms"] for kind in survey(**asked, api=api)) == count


def test_a_survey_of_nothing_is_refused(api: PortalAPI) -> None:
    with pytest.raises(
        PortalError, match="deposition 10358 without a tomogram of its own or of its datasets"
    ):
        survey(deposition=ANNOTATIONS_ONLY, api=api)
    assert api.requests == 2
    with pytest.raises(PortalError, match="meaning=annotations for a survey"):
        survey(deposition=ANNOTATIONS_ONLY, meaning="annotations", api=api)
    with pytest.raises(PortalError, match="no deposition, dataset"):
        survey(api=api)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"level": 3}, "level 3"),
        ({"windows_per_second": 0}, "above zero"),
        ({"bytes_per_second": -1}, "above zero"),
        ({"voxel_size": float("nan")}, "above zero"),
    ],
)
def test_a_summary_of_nonsense_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PortalError, match=said):
        summary([record()], **asked)


def test_the_annotations_are_reached_from_here() -> None:
    from tomocpt_stream import portal_annotations

    assert portal.find_picks is portal_annotations.find_picks
    assert portal.find_masks is portal_annotations.find_masks
    with pytest.raises(AttributeError, match="no attribute 'find_nothing'"):
        _ = portal.find_nothing
