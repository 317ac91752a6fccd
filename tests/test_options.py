from __future__ import annotations

from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from tomocpt_stream.__main__ import main
from tomocpt_stream.options import LENGTH, one_or_all, tomograms_option

if TYPE_CHECKING:
    from pathlib import Path


def test_the_option_means_the_same_in_every_command_that_reads_or_writes_picks() -> None:
    found = {
        name: option
        for name in ("pick", "convert", "evaluate", "view")
        for option in main.commands[name].params
        if isinstance(option, click.Option) and "--tomograms" in option.opts
    }
    assert len(found) == 4
    assert len({option.help for option in found.values()}) == 1
    assert all(option.multiple for option in found.values())


def test_files_of_tomograms_come_as_the_readers_take_them(tmp_path: Path) -> None:
    taken: list[object] = []

    @click.command()
    @tomograms_option("sizes")
    def command(sizes: tuple[str, ...]) -> None:
        taken.append(one_or_all(sizes))

    (tmp_path / "a.doc").touch()
    (tmp_path / "b.star").touch()
    doc, star = str(tmp_path / "a.doc"), str(tmp_path / "b.star")
    for words in ([], ["--tomograms", doc], ["--tomograms", star, "--tomograms", doc]):
        assert CliRunner().invoke(command, words).exit_code == 0
    assert taken == [None, doc, (star, doc)]
    refused = CliRunner().invoke(command, ["--tomograms", str(tmp_path / "c.star")])
    assert refused.exit_code == 2
    assert "c.star" in refused.output


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "wide"])
def test_a_length_is_finite_and_above_0(text: str) -> None:
    taken: list[float] = []

    @click.command()
    @click.option("--diameter", type=LENGTH)
    def command(diameter: float) -> None:
        taken.append(diameter)

    assert CliRunner().invoke(command, ["--diameter", "1.5"]).exit_code == 0
    refused = CliRunner().invoke(command, ["--diameter", text])
    assert refused.exit_code == 2
    assert text in refused.output
    assert taken == [1.5]
