from __future__ import annotations

import shlex

import numpy as np
import pytest

from tomocpt_stream.formats import FORMATS
from tomocpt_stream.formats.handover import next_command
from tomocpt_stream.picks import Picks

PICKS = [Picks(np.zeros((1, 3)), np.ones(1, np.float32), voxel_size=10.012, tomogram="TS_01")]


def _options(line: str) -> dict[str, str]:
    words = shlex.split(line)
    options: dict[str, str] = {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            options[word] = "" if value.startswith("--") else value
    return options


def test_warp_is_told_the_voxel_size_and_a_box_of_two_diameters() -> None:
    text = next_command("warp", "out/my picks.star", PICKS, diameter=290, pixel_size=1.35)
    export, comment, species = text.splitlines()
    assert export.startswith("WarpTools ts_export_particles ")
    assert comment.startswith("#")
    options = _options(export)
    assert options["--input_star"] == "out/my picks.star"
    assert options["--coords_angpix"] == "10.012"
    assert options["--settings"] == "warp_tiltseries.settings"
    assert (options["--output_angpix"], options["--box"], options["--diameter"]) == ("8.1", "72", "290")
    assert {"--relative_output_paths", "--2d", "--output_star"} <= set(options)
    assert species.startswith("MTools create_species ")
    assert _options(species)["--diameter"] == "290"
    assert {"--half1", "--half2", "--particles_relion", "--population", "--mask"} <= set(_options(species))


def test_relion_5_extracts_from_particles_and_tomograms() -> None:
    text = next_command(
        "relion5",
        "picks.star",
        PICKS,
        diameter=230,
        pixel_size=1.35,
        tomograms="Tomograms/job007/tomograms.star",
    )
    options = _options(text)
    assert text.startswith("relion_tomo_subtomo ")
    assert (options["--p"], options["--t"]) == ("picks.star", "Tomograms/job007/tomograms.star")
    binning, box, whole = (int(options[name]) for name in ("--bin", "--crop", "--b"))
    assert (binning, box, whole) == (5, 70, 140)
    assert box * binning * 1.35 >= 2 * 230
    assert "--stack2d" in options


def test_relion_4_imports_first() -> None:
    first, second = next_command("relion4", "p.star", PICKS, diameter=230, pixel_size=1.35).splitlines()
    assert _options(first)["--i"] == "p.star"
    assert _options(first)["--t"] == "<tomograms.star>"
    assert _options(second)["--i"] == _options(first)["--o"] + "optimisation_set.star"


@pytest.mark.parametrize("diameter", [5.0, 130.0, 1e4])
def test_pixels_are_never_finer_than_those_of_the_tilt_series(diameter: float) -> None:
    options = _options(
        next_command("warp", "p.star", PICKS, diameter=diameter, pixel_size=2.0).splitlines()[0]
    )
    assert float(options["--output_angpix"]) >= 2.0
    assert int(options["--box"]) % 2 == 0
    assert int(options["--box"]) * float(options["--output_angpix"]) >= 2 * diameter


def test_what_is_unknown_is_left_open() -> None:
    text = next_command("warp", "p.star", [])
    assert "--coords_angpix <Å of a voxel> " in text
    assert "--box <box in pixels> " in text
    text = next_command("relion5", "p.star", PICKS, diameter=290)
    assert "--bin <binning>" in text
    assert "--crop 64" in text


def test_files_that_no_extraction_reads_are_converted_first_and_others_have_none() -> None:
    for dialect in ("relion31", "relion5-picker"):
        assert " --to relion5 " in next_command(dialect, "p.star", PICKS)
    for dialect in set(FORMATS) - {"relion31", "relion5-picker", "relion4", "relion5", "warp"}:
        assert next_command(dialect, "p.star", PICKS) == ""
