from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import numpy.typing as npt
import pytest

from tomocpt_stream.errors import SourceError
from tomocpt_stream.imaging import ImagingOptions, back_project, expose, plan_geometry, project
from tomocpt_stream.phantom import (
    SHAPES_HELD_OUT,
    PhantomOptions,
    simulate_phantom,
    simulate_tomogram,
    write_mrc,
)
from tomocpt_stream.shapes import map_template
from tomocpt_stream.specimen import Canvas, SpecimenOptions, stamp_of
from tomocpt_stream.tomogram import open_tomogram

Voxels = npt.NDArray[Any]
SMALL = PhantomOptions(
    shape=(32, 64, 64),
    diameter=100.0,
    particles=("globule", "torus"),
    count=6,
    distractors=2,
    filaments=0,
    gold=1,
    gold_diameter=50.0,
    vesicles=0,
    tilt_step=6.0,
)
PLAIN: dict[str, Any] = {
    "defocus": 0.0,
    "amplitude_contrast": 1.0,
    "b_factor": 0.0,
    "dose": 0.0,
    "snr": math.inf,
}
ALONE: dict[str, Any] = {"count": 1, "distractors": 0, "gold": 0}


def test_options_are_those_of_the_specimen_and_of_the_microscope() -> None:
    names = {field.name for field in fields(PhantomOptions)}
    assert names == {field.name for part in (SpecimenOptions, ImagingOptions) for field in fields(part)}
    with pytest.raises(SourceError, match="separation"):
        PhantomOptions(separation=-1.0)
    with pytest.raises(SourceError, match="snr"):
        PhantomOptions(snr=-1.0)


def test_every_field_is_documented() -> None:
    for part in (SpecimenOptions, ImagingOptions):
        listed = (part.__doc__ or "").split("\n\n", 1)[1]
        for field in fields(part):
            assert any(
                field.name in line.split(" : ")[0].replace(",", " ").split()
                for line in (listed + "\n").splitlines()
                if " : " in line
            ), field.name


def test_a_tomogram_comes_with_its_truth() -> None:
    tomogram, truth = simulate_tomogram(SMALL, seed=3, name="mine")
    assert (tomogram.name, tomogram.shape, tomogram.voxel_size) == ("mine", (32, 64, 64), 10.0)
    assert tomogram.dtype == np.float32
    assert (truth.tomogram, truth.shape, truth.voxel_size) == ("mine", (32, 64, 64), 10.0)
    assert truth.zyx.shape == (6, 3)
    assert truth.rotations is not None
    assert truth.rotations.shape == (6, 3, 3)
    assert (truth.score == 1).all()
    assert truth.particle == "globule+torus"
    assert simulate_tomogram(SMALL, seed=3)[0].name == "phantom_3"


def test_a_phantom_tells_all_that_lies_in_it() -> None:
    phantom = simulate_phantom(SMALL, seed=3)
    assert phantom.volume.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert phantom.volume.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert len(phantom.picks()) == 6
    assert len(phantom.picks(kind="torus")) == 3
    assert phantom.picks(kind="torus").particle == "torus"
    assert len(phantom.picks("distractor")) == 2
    assert len(phantom.picks("target", "distractor", "gold")) == 9
    assert len(phantom.picks("membrane")) == 0
    assert np.array_equal(phantom.picks().zyx[0], phantom.objects[0].zyx)


def test_a_seed_gives_the_same_bytes_whatever_the_threads() -> None:
    script = """
import hashlib
from tests.test_phantom import SMALL, simulate_phantom
print(hashlib.sha256(simulate_phantom(SMALL, seed=5).volume.tobytes()).hexdigest())
"""
    root = Path(__file__).parents[1]
    hashes = set()
    for threads in ("1", "3"):
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        environment = {**os.environ, **variables}
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        hashes.add(run.stdout.strip())
    assert len(hashes) == 1
    assert (
        simulate_phantom(SMALL, seed=5).volume.tobytes() != simulate_phantom(SMALL, seed=6).volume.tobytes()
    )


def test_noise_leaves_the_specimen_alone() -> None:
    quiet, noisy = (simulate_phantom(replace(SMALL, snr=snr), seed=2) for snr in (1.0, 0.01))
    assert np.array_equal(quiet.picks().zyx, noisy.picks().zyx)
    assert not np.array_equal(quiet.volume, noisy.volume)


@pytest.mark.parametrize("kind", ["globule", "domains", "subunits", "blob:7"])
def test_truth_is_the_centre_of_mass_of_what_is_reconstructed(kind: str) -> None:
    options = replace(
        SMALL,
        shape=(48, 48, 48),
        diameter=160.0,
        particles=(kind,),
        tilt_range=80.0,
        tilt_step=2.0,
        **ALONE,
        **PLAIN,
    )
    phantom = simulate_phantom(options, seed=1)
    density = -phantom.volume.astype(np.float64)
    density = np.where(density > 0.25 * np.percentile(density, 99.9), density, 0)
    centre = [(density * axis).sum() / density.sum() for axis in np.indices(density.shape)]
    assert np.abs(np.array(centre) - phantom.picks().zyx[0]).max() < 0.3


def test_protein_is_dark_unless_bright_is_asked_for() -> None:
    options = replace(SMALL, snr=math.inf, **{**ALONE, "particles": ("globule",)})
    dark, bright = (
        simulate_phantom(replace(options, contrast=contrast), seed=4) for contrast in ("dark", "bright")
    )
    z, y, x = np.rint(dark.picks().zyx[0]).astype(int)
    assert dark.volume[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2].mean() < -2
    assert np.array_equal(bright.volume, -dark.volume)


def test_noise_hides_particles_by_the_stated_snr() -> None:
    """The noise-free and the noisy volume agree the less, the lower the SNR."""
    clean = simulate_phantom(replace(SMALL, snr=math.inf), seed=2).volume.ravel()
    agreement = [
        np.corrcoef(clean, simulate_phantom(replace(SMALL, snr=snr), seed=2).volume.ravel())[0, 1]
        for snr in (0.01, 0.05, 0.25)
    ]
    assert agreement[0] < agreement[1] < agreement[2]
    # Volumes add signal and noise of variances a and a / (b snr): r^2 = b snr / (1 + b snr).
    odds = [r**2 / (1 - r**2) for r in agreement]
    assert odds[2] / odds[1] == pytest.approx(5, rel=0.25)


def test_an_empty_field_is_noise() -> None:
    phantom = simulate_phantom(replace(SMALL, **{**ALONE, "count": 0}), seed=0)
    assert phantom.objects == ()
    assert phantom.volume.std(dtype=np.float64) == pytest.approx(1, abs=1e-4)


def test_an_empty_field_without_noise_is_zero() -> None:
    phantom = simulate_phantom(replace(SMALL, snr=math.inf, **{**ALONE, "count": 0}), seed=0)
    assert np.isfinite(phantom.volume).all()


def test_targets_may_be_density_maps(shared_data: Path) -> None:
    path = str(shared_data / "maps_10A" / "6pxm.mrc")
    options = replace(SMALL, particles=(path, "globule"), count=4, diameter=130.0, separation=0.7)
    phantom = simulate_phantom(options, seed=1)
    assert len(phantom.picks(kind="6pxm")) == 2
    assert phantom.picks().particle == "6pxm+globule"
    diameters = {item.kind: item.diameter for item in phantom.objects if item.role == "target"}
    assert diameters == {"6pxm": pytest.approx(130, abs=10), "globule": 130.0}
    scaled = simulate_phantom(replace(options, scale_maps=True, diameter=110.0), seed=1)
    assert [item.diameter for item in scaled.objects if item.role == "target"] == pytest.approx([110.0] * 4)


def resimulate(maps: Path, record: dict[str, Any], *, transpose: bool = False) -> Voxels:
    """Return a noise-free tomogram of the particles that another simulator recorded."""
    options = ImagingOptions(snr=math.inf, defocus=record["defocus_um"])
    geometry = plan_geometry(options, tuple(record["shape_zyx"]), 10.0, 20)
    nz, ny, nx = (n + 2 * p for n, p in zip(geometry.shape, geometry.pad, strict=True))
    canvas = Canvas(np.zeros((nz, nx, ny), dtype=np.float32), geometry.pad, geometry.shape)
    templates = {
        path.stem: map_template(str(path), None, 10.0)
        for path in (*maps.glob("maps_10A/*.mrc"), *maps.glob("maps_5A/*.mrc"))
        if path.stem in {item["pdb"] for item in record["particles"]}
    }
    for item in record["particles"]:
        rotation = np.array(item["rotation_matrix"])
        at = np.array([item["z"], item["y"], item["x"]]) + np.array(geometry.pad)
        stamp, corner = stamp_of(templates[item["pdb"]], at, rotation.T if transpose else rotation, 10.0)
        canvas.paint(stamp, corner, overlap=True)
    images, _ = expose(
        project(canvas.density, options, geometry.width), options, geometry, np.random.default_rng(0)
    )
    return back_project(images, options, geometry)


def test_an_independent_simulation_is_matched_in_place_turn_and_sign(shared_data: Path) -> None:
    """Positions, rotations, contrast and wedge agree with a set that another program simulated."""
    record = json.loads((shared_data / "sim10A" / "sim_val_1.json").read_text())
    theirs = mrcfile.read(shared_data / "sim10A" / "sim_val_1.mrc").astype(np.float32).ravel()
    ours = resimulate(shared_data, record).ravel()
    turned = resimulate(shared_data, record, transpose=True).ravel()
    agreement = np.corrcoef(theirs, ours)[0, 1]
    assert agreement > 0.09
    assert agreement > 1.5 * np.corrcoef(theirs, turned)[0, 1]


def test_a_written_phantom_reads_back(tmp_path: Path) -> None:
    phantom = simulate_phantom(SMALL, seed=1)
    write_mrc(tmp_path / "p.mrc", phantom.volume, 10.0)
    assert [path.name for path in tmp_path.iterdir()] == ["p.mrc"]
    back = open_tomogram(tmp_path / "p.mrc")
    assert back.voxel_size == pytest.approx(10.0)
    assert np.array_equal(back.read((slice(0, 32), slice(0, 64), slice(0, 64))), phantom.volume)
    assert mrcfile.validate(str(tmp_path / "p.mrc"))


def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "p.mrc"
    write_mrc(target, np.zeros((4, 5, 6), dtype=np.int8), 2.0)
    before = target.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(mrcfile.mrcfile.MrcFile, "set_data", fail)
    with pytest.raises(OSError, match="no space"):
        write_mrc(target, np.ones((4, 5, 6), dtype=np.int8), 2.0)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["p.mrc"]


@pytest.mark.parametrize("array", [np.zeros((4, 4), dtype=np.float32), np.zeros((4, 4, 4), dtype=np.float64)])
def test_what_has_no_mrc_mode_is_refused(tmp_path: Path, array: Voxels) -> None:
    with pytest.raises(SourceError, match="astype"):
        write_mrc(tmp_path / "p.mrc", array, 1.0)
    assert not list(tmp_path.iterdir())


def test_held_out_shapes_make_a_scene_of_the_acceptance_kind() -> None:
    options = PhantomOptions(particles=SHAPES_HELD_OUT[:4], count=60, snr=0.05)
    phantom = simulate_phantom(options, seed=1)
    assert phantom.volume.shape == (96, 256, 256)
    assert [len(phantom.picks(kind=kind)) for kind in SHAPES_HELD_OUT[:4]] == [15] * 4
    assert len(phantom.picks("distractor")) == 22
    assert len(phantom.picks("gold")) == 3
    assert len(phantom.picks("membrane")) == 1
