"""What the CZ CryoET Data Portal takes in, and the points that it makes of it; without STAR files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tomocpt_stream.formats import read_picks
from tomocpt_stream.formats.copick import parse_picks
from tomocpt_stream.formats.csv_dialects import instances
from tomocpt_stream.formats.ndjson import parse_ndjson

if TYPE_CHECKING:
    from pathlib import Path

# The portal divides by `binning` whatever it reads; where a file has Å, that is the voxel size.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "Point__csv_comma_delimiter_binning_1": ("points.csv", {"format": "portal_csv"}),
    "Point__csv_tab_delimiter_binning_2": ("points_tab_delim.csv", {"format": "portal_csv"}),
    "Point__csv_with_header_comma_delimiter_binning_1": ("points_with_header.csv", {"format": "portal_csv"}),
    "Point__csv_with_header_pipe_delimiter_binning_2": (
        "points_with_header_pipe_delim.csv",
        {"format": "portal_csv"},
    ),
    "Point__mod_binning_2": ("points.mod", {"half_voxel": False}),
    "Point__copick_disregard_orientation_binning_4": ("copick.json", {"voxel_size": 10.0}),
    "OrientedPoint__imod_with_slan_angles_binning_1": (
        "oriented_points.mod",
        {"format": "imod_slicer", "half_voxel": False},
    ),
    "OrientedPoint__copick_binning_10": ("copick.json", {"voxel_size": 10.0}),
    "InstanceSegmentation__tardis_binning_2": ("tardis.csv", {"voxel_size": 2.0}),
    "InstanceSegmentation__copick_binning_2": ("copick_instance.json", {"voxel_size": 5.0}),
}


def test_every_pair_that_is_no_star_file_is_here(shared_data: Path) -> None:
    index = json.loads((shared_data / "portal" / "expected_ndjson" / "index.json").read_text())
    names = [entry["file"].removesuffix(".ndjson") for entry in index]
    assert {name for name in names if "star" not in name} == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_the_portals_points_come_from_its_inputs(shared_data: Path, name: str) -> None:
    folder = shared_data / "portal"
    file, options = PAIRS[name]
    index = json.loads((folder / "expected_ndjson" / "index.json").read_text())
    (config,) = next(entry for entry in index if entry["file"] == f"{name}.ndjson")["source_cfg"].values()
    expected = parse_ndjson((folder / "expected_ndjson" / f"{name}.ndjson").read_bytes(), name)
    (found,) = read_picks(folder / "in" / file, **options).values()
    # Voxels of the file's own binning; Å have been divided by the voxel size already.
    binning = 1.0 if "voxel_size" in options else float(config.get("binning", 1))
    np.testing.assert_allclose(found.zyx / binning, expected.zyx, atol=1e-9)
    if expected.rotations is not None:
        assert found.rotations is not None
        np.testing.assert_allclose(found.rotations, expected.rotations, atol=1e-6)
    if file == "tardis.csv":
        assert expected.instances is not None
        assert instances(folder / "in" / file) == expected.instances.tolist()
    if file == "copick_instance.json":
        # All 0 in the file: the portal counts the points where it makes instances of them.
        assert not parse_picks((folder / "in" / file).read_bytes(), file).instances.any()


def test_the_binning_of_copick_is_its_voxel_size(shared_data: Path) -> None:
    index = json.loads((shared_data / "portal" / "expected_ndjson" / "index.json").read_text())
    for entry in index:
        (config,) = entry["source_cfg"].values()
        if config["file_format"] in ("copick", "tardis"):
            assert PAIRS[entry["file"].removesuffix(".ndjson")][1]["voxel_size"] == config["binning"]
