from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from tests.portal_rows import FIRST_DATASET
from tests.test_portal_labels import RIBOSOME, SHAPE, World, _picks, stored, world
from tomocpt_stream.__main__ import Commands
from tomocpt_stream.formats import write_picks
from tomocpt_stream.portal_option import portal_examples, portal_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from tests.buckets import Way

__all__ = ["stored", "world"]


@click.group(cls=Commands)
def learn() -> None:
    pass


@learn.command("labels")
@click.option("--output", type=click.Path(path_type=Path))
@portal_options
def labels(output: Path, **settings: Any) -> None:
    found = portal_examples(settings, output)
    assert not settings  # all of the options are taken out
    click.echo(" ".join(sorted(one.group for one in found)))


@pytest.fixture
def reached(world: World, way: Way, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with world.api() as api:
        monkeypatch.setenv("CRYOET_PORTAL_GRAPHQL_URL", api.url)
        yield world


def run(output: Path, *words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(learn, ["labels", "--output", str(output), *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_what_is_found_is_said_and_credited_beside_the_output(reached: World, tmp_path: Path) -> None:
    shown = run(tmp_path / "new" / "mine.safetensors", "--portal", f"{RIBOSOME} test=1")
    assert shown.stdout == "DS-10440/TS_10\n"
    assert "1 run to learn from (2 of cytosolic ribosome); 1 kept for the test (TS_1)" in shown.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *("citations.md", "citations.bib", "selection.json", "test.json")
    }


def test_truth_is_for_queries_without_an_object(reached: World, tmp_path: Path) -> None:
    star, output = tmp_path / "truth.star", tmp_path / "mine.safetensors"
    write_picks(_picks(voxel_size=10.012, shape=SHAPE, tomogram="TS_10"), star)
    own = f"dataset={FIRST_DATASET} diameter=80"
    assert run(output, "--portal", own, "--truth", star).stdout == "DS-10440/TS_10\n"
    both = run(output, "--portal", own, "--portal", f"{RIBOSOME} run=TS_1", "--truth", star)
    assert both.stdout == "DS-10440/TS_1 DS-10440/TS_10\n"
    assert "every --portal names" in run(output, "--portal", RIBOSOME, "--truth", star, code=1).stderr
    signed = run(output, "--portal", RIBOSOME, "--truth", "https://host/a.star?sig=SECRET", code=1).stderr
    assert "https://host/a.star, but" in signed
    assert "SECRET" not in signed
    assert "--truth is for --portal" in run(output, "--truth", star, code=2).stderr
    assert run(output).stdout == "\n"


def test_what_is_asked_with_is_not_overwritten(reached: World, tmp_path: Path) -> None:
    """The account of a run would be the selection of the next one, without the runs that are kept."""
    run(tmp_path / "mine.safetensors", "--portal", RIBOSOME)
    kept = tmp_path / "selection.json"
    before = kept.read_bytes()
    again = f"selection={kept} object=*ribosome* diameter=80 test=1"
    said = run(tmp_path / "next.safetensors", "--portal", again, code=1).stderr
    assert f"the output {kept} is an input" in said
    assert kept.read_bytes() == before
    assert run(tmp_path / "next" / "mine.safetensors", "--portal", again).stdout == "DS-10440/TS_10\n"


def test_an_earlier_test_does_not_stay_beside_what_is_learnt_now(reached: World, tmp_path: Path) -> None:
    output = tmp_path / "mine.safetensors"
    run(output, "--portal", f"{RIBOSOME} test=1")
    (tmp_path / "test_mine.json").write_text("{}")
    assert (tmp_path / "test.json").exists()
    run(output, "--portal", RIBOSOME)  # learns from that run
    assert sorted(path.name for path in tmp_path.glob("test*")) == ["test_mine.json"]
