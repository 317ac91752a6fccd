"""The recipes of `deploy/`: every command is right, every script runs where what it needs is here."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from click import ClickException
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.command_lines import (
    DEPLOY,
    IMAGE,
    PROJECT,
    ROOT,
    TOOL,
    check,
    commands,
    fenced,
    names_imported,
    run,
    text,
)
from tomocpt_stream.formats import read_picks
from tomocpt_stream.phantom import PhantomOptions, simulate_phantom, write_mrc

if TYPE_CHECKING:
    from pathlib import Path

PLACES = ("container", "kubernetes", "local", "slurm")
SCRIPTS = sorted(DEPLOY.glob("*/*.py"))


def all_commands() -> list[Any]:
    found = []
    for place in PLACES:
        lines = [line for block in fenced(text(place), "bash") for line in commands(block)]
        assert len(lines) >= 5, place
        found += [pytest.param(line, id=f"{place}-{number}") for number, line in enumerate(lines)]
    return found


def test_each_place_has_a_readme_and_at_most_three_files() -> None:
    assert sorted(path.name for path in DEPLOY.iterdir()) == list(PLACES)
    for place in PLACES:
        names = [path.name for path in (DEPLOY / place).iterdir() if path.name != "__pycache__"]
        assert "README.md" in names
        assert len(names) <= 3, names


@pytest.mark.parametrize("line", all_commands())
def test_a_command_of_a_readme_is_right(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "tomocpt-stream pick a.mrc --diameter 290 --no-such",
        "tomocpt-stream choose a.mrc",
        "dask worker --scheduler-file a.json --nthreads 2 --memory-limit 0 --no-such 1",
        "dask worker --scheduler-file a.json --nthreads 4 --memory-limit 0",
        "dask worker --scheduler-file a.json --nthreads 2",
        "dask worker tcp://a:1 --nthreads 2 --memory-limit 4GX",
        "dask worker tcp://a:1 --nthreads 2 --memory-limit 0 --lifetime 7h50m",
        "export DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION=7h50m",
        "dask scheduler --scheduler-fil",
        "dask cuda worker --lifetime 7h",
        "python deploy/local/pick_local.py a.mrc",
        "python deploy/local/no_such.py a.mrc",
        "python deploy/slurm/pick_slurm.py a.mrc --diameter 290 --no-such",
        "pip install '.[no_such]'",
        "sbatch --gpus-per-job=1 deploy/slurm/pick.sbatch a.mrc --diameter 290",
        "first=$(sbatch deploy/slurm/pick.sbatch a.mrc)",
        "docker run --rm -v here:/data tomocpt-stream:0.0.0 pick a.mrc --diameter 290",
        f"docker build -f deploy/container/Dockerfile --build-arg CUDA=13 -t {IMAGE} .",
        "apptainer run --nv tomocpt-stream.sif pick a.mrc",
        "kubectl exec deployment/tomocpt-worker -- tar x",
        "kubectl apply -f deploy/kubernetes/volume.yaml",
        "sed 's|images: |image: lab/|' deploy/kubernetes/pick.yaml | kubectl apply -f -",
        "cargo install tomocpt-stream",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, ClickException, SystemExit, FileNotFoundError, ValueError)):
        check(line)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_of_the_package_is_there(path: Path) -> None:
    imported = names_imported(path.read_text())
    assert imported
    assert all(hasattr(import_module(module), name) for module, name in imported)


@pytest.fixture(scope="module")
def tomograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a simulated tomogram whose particles are 290 Å long."""
    folder = tmp_path_factory.mktemp("tomograms")
    scene = PhantomOptions(
        shape=(44, 44, 88), voxel_size=14.5, diameter=290.0, count=4, distractors=0, gold=0, vesicles=0
    )
    write_mrc(folder / "TS_01.mrc", simulate_phantom(scene, seed=1).volume, scene.voxel_size)
    return folder


def test_local_picks_with_the_script_and_with_the_command(tomograms: Path) -> None:
    script = DEPLOY / "local" / "pick_local.py"
    names = ["TS_01.mrc", "no_such.mrc"]
    done = run([sys.executable, script, *names, "--diameter", "290", "--workers", "2"], tomograms)
    assert done.returncode == 1, done.stderr
    assert "no_such.mrc: there is no file" in done.stderr
    first = (tomograms / "picks" / "TS_01.star").read_bytes()
    assert len(read_picks(tomograms / "picks" / "TS_01.star")["TS_01"]) >= 2
    lines = commands(fenced(text("local"), "bash")[0])
    (line,) = [line for line in lines if line.startswith("tomocpt-stream")]
    words = line.replace("TS_02.mrc ", "").split()
    done = run([sys.executable, "-m", "tomocpt_stream", *words[1:]], tomograms)
    assert done.returncode == 0, done.stderr
    assert (tomograms / "picks" / "TS_01.star").read_bytes() == first


def pins() -> dict[str, str]:
    """Return the version of each package of the tested set."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_tested_set_holds_what_is_required() -> None:
    extras = PROJECT["optional-dependencies"]
    required = [*PROJECT["dependencies"], *extras["dev"], *extras["dashboard"]]
    for one in map(Requirement, required):
        assert one.specifier.contains(pins()[canonicalize_name(one.name)]), one


def test_the_extras_and_the_release_of_dask_that_dask_cuda_takes() -> None:
    extras = {
        name: [Requirement(one) for one in found] for name, found in PROJECT["optional-dependencies"].items()
    }
    assert [one.name for one in extras["slurm"]] == ["dask-jobqueue"]
    assert [one.name for one in extras["kubernetes"]] == ["dask-kubernetes"]
    assert extras["cluster"][0].extras == {"slurm", "kubernetes"}
    (cuda,) = extras["gpu"]
    assert cuda.name == "dask-cuda"
    assert cuda.marker is not None
    assert cuda.marker.evaluate({"sys_platform": "linux"})
    assert not cuda.marker.evaluate({"sys_platform": "darwin"})
    ranges = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    assert all(ranges[name].contains("2026.7.1") for name in ("dask", "distributed"))


def test_what_the_source_distribution_holds_is_there() -> None:
    included = TOOL["hatch"]["build"]["targets"]["sdist"]["include"]
    assert "/deploy" in included
    assert all((ROOT / name.removeprefix("/")).exists() for name in included)
