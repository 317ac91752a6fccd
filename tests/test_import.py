"""Importing the package has no effect: law 10."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest

import tomocpt_stream

HEAVY = {
    "torch",
    "monai",
    "zarr",
    "numcodecs",
    "dask",
    "distributed",
    "matplotlib",
    "scipy",
    "pandas",
    "kornia",
}

PROBE = """
import json, logging, sys, threading
before = set(sys.modules)
import {module}
{then}
print(json.dumps({{
    "modules": sorted({{name.split(".")[0] for name in set(sys.modules) - before}}),
    "threads": threading.active_count(),
    "handlers": len(logging.getLogger().handlers) + len(logging.getLogger("tomocpt_stream").handlers),
}}))
"""


def probe(module: str, then: str = "") -> dict[str, object]:
    """Import a module in a fresh interpreter; return what that changed."""
    code = PROBE.format(module=module, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_loads_nothing_heavy() -> None:
    found = probe("tomocpt_stream")
    assert not HEAVY & set(found["modules"])  # type: ignore[call-overload]
    assert found["threads"] == 1
    assert found["handlers"] == 0


def test_rooms_whose_names_keep_the_rooms_name() -> None:
    found = probe(
        "tomocpt_stream", "tomocpt_stream.portal.find_tomograms; tomocpt_stream.portal.TomogramRecord"
    )
    assert not (HEAVY - {"dask"}) & set(found["modules"])  # type: ignore[call-overload]
    assert tomocpt_stream.cluster.local_cluster.__module__ == "tomocpt_stream.cluster"
    with pytest.raises(AttributeError, match="no attribute 'cellar'"):
        _ = tomocpt_stream.cellar


def test_help_of_every_command_loads_nothing_heavy() -> None:
    then = """
from click.testing import CliRunner
main = tomocpt_stream.__main__.main
for name in [None, *main.commands]:
    result = CliRunner().invoke(main, ["--help"] if name is None else [name, "--help"])
    assert result.exit_code == 0, result.output
"""
    assert not HEAVY & set(probe("tomocpt_stream.__main__", then)["modules"])  # type: ignore[call-overload]


def test_light_names_do_not_load_the_network() -> None:
    found = probe(
        "tomocpt_stream", "tomocpt_stream.plan_blocks; tomocpt_stream.Picks; tomocpt_stream.open_tomogram"
    )
    assert not {"torch", "monai", "dask", "distributed"} & set(found["modules"])  # type: ignore[call-overload]


@pytest.mark.parametrize("name", tomocpt_stream.__all__)
def test_every_public_name_resolves_to_its_module(name: str) -> None:
    module = import_module(f"tomocpt_stream.{tomocpt_stream._MODULE_OF[name]}")
    assert getattr(tomocpt_stream, name) is getattr(module, name)
    assert name in dir(tomocpt_stream)


def test_the_names_of_the_design_are_public() -> None:
    promised = {
        *(
            "open_tomogram",
            "Tomogram",
            "ingest",
            "open_volume",
            "Volume",
            "Window",
            "plan_blocks",
            "BlockPlan",
        ),
        *("load_picker", "Picker", "PickOptions", "predict", "open_heatmap", "Heatmap", "find_peaks", "pick"),
        "heatmap_lazy",
        *(
            "Picks",
            "read_picks",
            "write_picks",
            "match",
            "Match",
            "paint_targets",
            "train",
            "fine_tune",
            "simulate_tomogram",
        ),
    }
    assert promised <= set(tomocpt_stream.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pick_everything'"):
        _ = tomocpt_stream.pick_everything
