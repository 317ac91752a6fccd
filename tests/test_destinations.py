"""Names and places of answers: nothing twice, no input overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tomocpt_stream.destinations import destinations, refuse_overwriting, unique_names
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.request import PickRequest


def mrc(path: Path) -> str:
    """Write a small tomogram; return its path as a command gets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(path, np.arange(1000, dtype=np.float32).reshape(10, 10, 10), 10.0)
    return str(path)


def test_a_folder_gets_one_star_for_each_tomogram(tmp_path: Path) -> None:
    sources = [mrc(tmp_path / "in" / f"{name}.mrc") for name in ("a", "b.1")]
    found = destinations(sources, str(tmp_path / "out"), heatmaps=tmp_path / "maps")
    first, second = (found[source] for source in sources)
    assert (first.name, second.name) == ("a", "b.1")
    assert (first.picks, second.picks) == (tmp_path / "out" / "a.star", tmp_path / "out" / "b.1.star")
    assert (first.picture, second.picture) == (tmp_path / "out" / "a.png", tmp_path / "out" / "b.1.png")
    assert first.heatmap == tmp_path / "maps" / "a.zarr"
    assert not first.shared


def test_a_star_file_takes_all_and_each_has_its_picture(tmp_path: Path) -> None:
    sources = [mrc(tmp_path / f"{name}.mrc") for name in "ab"]
    star = tmp_path / "all.star"
    found = destinations(sources, str(star))
    assert {one.picks for one in found.values()} == {star}
    assert [Path(one.picture).name for one in found.values()] == ["all_a.png", "all_b.png"]
    assert all(one.shared and one.heatmap is None for one in found.values())
    assert destinations(sources[:1], str(star))[sources[0]].picture == tmp_path / "all.png"


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = mrc(tmp_path / "a.mrc")
    with pytest.raises(PlanError, match=r"picks\.csv.*a \.star file or a folder"):
        destinations([source], str(tmp_path / "picks.csv"))
    dotted = destinations([source], f"{tmp_path}/run.2/")[source]
    assert dotted.picks == tmp_path / "run.2" / "a.star"
    (tmp_path / "there.star").mkdir()
    assert (
        destinations([source], str(tmp_path / "there.star"))[source].picks == tmp_path / "there.star/a.star"
    )


def test_equal_names_get_their_folders_in_front(tmp_path: Path) -> None:
    sources = [mrc(tmp_path / folder / "TS.mrc") for folder in ("x/one", "y/one", "two")]
    sources += [mrc(tmp_path / "two" / "TS.rec"), mrc(tmp_path / "other.mrc")]
    names = unique_names(sources)
    assert names[sources[0]] == "x_one_TS"
    assert names[sources[1]] == "y_one_TS"
    assert [names[source] for source in sources[2:]] == ["TS.mrc", "TS.rec", "other"]
    assert len({name.casefold() for name in names.values()}) == len(sources)


def test_names_are_safe_whatever_a_file_is_called(tmp_path: Path) -> None:
    source = mrc(tmp_path / "a b;$(x).mrc")
    assert unique_names([source]) == {source: "a_b_x_"}
    missing = str(tmp_path / "not there.mrc")
    assert unique_names([missing]) == {missing: "not_there.mrc"}


def test_a_source_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mrc(tmp_path / "a.mrc")
    monkeypatch.chdir(tmp_path)
    for again in (source, "a.mrc", "./a.mrc", f"file://{source}"):
        with pytest.raises(PlanError, match="more than once"):
            unique_names([source, again])


def test_an_address_is_one_however_it_is_written() -> None:
    sources = ["s3://box/x/TS%201.zarr", "s3://box/y/TS 1.zarr", "s3://box/../a.zarr"]
    assert list(unique_names(sources).values()) == ["x_TS_1", "y_TS_1", "a"]
    with pytest.raises(PlanError, match=r"s3://box/x/TS%201\.zarr given more than once"):
        unique_names([*sources, "s3a://box/x/TS 1.zarr/"])


def test_answers_may_go_to_an_address() -> None:
    sources = ["s3://box/x/TS%201.zarr", "b"]
    found = destinations(sources, "S3://out.1/new folder", heatmaps="gs://maps/")
    assert [(one.picks, one.picture, one.heatmap) for one in found.values()] == [
        ("s3://out.1/new%20folder/TS_1.star", "s3://out.1/new%20folder/TS_1.png", "gs://maps/TS_1.zarr"),
        ("s3://out.1/new%20folder/b.star", "s3://out.1/new%20folder/b.png", "gs://maps/b.zarr"),
    ]
    found = destinations(sources, "s3://out.1/all.star")
    assert {(one.picks, one.shared) for one in found.values()} == {("s3://out.1/all.star", True)}
    assert [one.picture for one in found.values()] == ["s3://out.1/all_TS_1.png", "s3://out.1/all_b.png"]
    assert destinations(["b"], "s3://out.1")["b"].picks == "s3://out.1/b.star"
    for output in ("s3://out.1/picks.csv", "https://host/picks/"):
        with pytest.raises(PlanError, match=rf"the output {output}"):
            destinations(["b"], output)
    with pytest.raises(SourceError, match="between two slashes"):
        destinations(["b"], "s3://out/../picks/")


def test_an_input_at_an_address_is_never_an_output() -> None:
    for output in ("s3://box/a%20b.zarr/", "s3a://box/a b.zarr/picks", "s3://box/a b.zarr/0/all.star"):
        with pytest.raises(PlanError, match="lies inside one"):
            destinations(["s3://box/a b.zarr/"], output)
    with pytest.raises(PlanError, match="is an input"):
        destinations(["a.mrc"], "s3://box/all.star", inputs=["s3://box/all.star"])
    with pytest.raises(PlanError, match="is an input"):
        destinations(["s3://box/maps/a.zarr"], "out/", heatmaps="s3://box/maps")
    assert destinations(["s3://box/a.zarr"], "s3://box/a.zarr.picks/")
    assert destinations(["s3://box/a.zarr"], "s3:/box/a.zarr/")  # a folder on the disk


def test_an_input_is_never_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mrc(tmp_path / "a.mrc")
    zarr.create_array("b.zarr", shape=(8, 8, 8), dtype="float32")
    with pytest.raises(PlanError, match="is an input"):
        refuse_overwriting(["a.mrc"], tmp_path / "sub" / ".." / "a.mrc")
    with pytest.raises(PlanError, match="is an input"):
        refuse_overwriting(["file://" + str(tmp_path / "a.mrc")], Path("a.mrc"))
    with pytest.raises(PlanError, match="lies inside one"):
        destinations(["b.zarr"], "b.zarr/")
    with pytest.raises(PlanError, match="is an input"):
        destinations(["b.zarr"], "out", heatmaps=tmp_path)
    with pytest.raises(PlanError, match="is an input"):
        destinations(["a.mrc"], "out", inputs=["out/a.star"])
    refuse_overwriting(["a.mrc"], Path("a.star"), None)


def test_sizes_may_come_from_the_folder_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """*.tomostar files often lie where everything else does."""
    monkeypatch.chdir(tmp_path)
    mrc(tmp_path / "a.mrc")
    asked: dict[str, Any] = {
        "diameter": 100,
        "picker": "base",
        "stitch": "hann",
        "tta": False,
        "batch_size": 4,
    }
    request = PickRequest(("a.mrc",), output="a.star", memory=None, device="cpu", sizes=(".",), **asked)
    assert request.destinations()["a.mrc"].picks == Path("a.star")


def test_a_link_to_an_input_is_the_input(tmp_path: Path) -> None:
    source = mrc(tmp_path / "a.mrc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.star").symlink_to(source)
    with pytest.raises(PlanError, match="is an input"):
        destinations([source], str(tmp_path / "out"))
