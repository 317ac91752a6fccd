from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

from tomocpt_stream.errors import SourceError
from tomocpt_stream.omezarr import Place, open_zarr
from tomocpt_stream.receipts import write_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.zarrays import ZarrVoxels

FINE = np.random.default_rng(0).normal(size=(12, 10, 8)).astype("f4")


def write_image(
    store: Any,
    arrays: dict[str, np.ndarray[Any, Any]],
    *,
    form: Any = 3,
    axes: Sequence[Any] | None = ("z", "y", "x"),
    unit: str | None = "angstrom",
    transforms: dict[str, list[dict[str, Any]] | None] | None = None,
    common: list[dict[str, Any]] | None = None,
) -> None:
    """Write an OME-Zarr group whose datasets are `arrays`, with the transforms given by path."""
    image: dict[str, Any] = {"datasets": []}
    if axes is not None:
        image["axes"] = [
            {"name": name, "type": "space" if name in "zyx" else "other", **({"unit": unit} if unit else {})}
            if isinstance(name, str)
            else name
            for name in axes
        ]
    for path, data in arrays.items():
        array = zarr.create_array(
            store, name=path, shape=data.shape, dtype=data.dtype, chunks=data.shape, zarr_format=form
        )
        array[:] = data
        dataset: dict[str, Any] = {"path": path}
        steps = (transforms or {}).get(path)
        if steps is not None:
            dataset["coordinateTransformations"] = steps
        image["datasets"].append(dataset)
    if common is not None:
        image["coordinateTransformations"] = common
    attributes = {"multiscales": [image]}
    zarr.open_group(store, mode="a", zarr_format=form).attrs.update(
        {"ome": {"version": "0.5", **attributes}} if form == 3 else attributes
    )


def scale(*values: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(values)}


def translation(*values: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(values)}


def read(found: ZarrVoxels) -> Any:
    z, y, x = found.shape
    return found.read((slice(0, z), slice(0, y), slice(0, x)))


def binned(data: Any, factor: int = 2) -> Any:
    z, y, x = (n // factor for n in data.shape)
    return data.reshape(z, factor, y, factor, x, factor).mean(axis=(1, 3, 5)).astype("f4")


@pytest.mark.parametrize("form", [2, 3])
def test_a_bare_array_states_no_voxel_size(tmp_path: Path, form: Any) -> None:
    zarr.create_array(tmp_path, shape=FINE.shape, dtype="f4", zarr_format=form)[:] = FINE
    found, place = open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    assert place == Place((12, 10, 8))
    np.testing.assert_array_equal(read(found), FINE)
    with pytest.raises(SourceError, match="a has no level 1; expected one of those it has: level 0 only"):
        open_zarr(LocalStore(tmp_path), "", 1, "error", "a")


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize(
    ("unit", "value"), [("angstrom", 10.012), ("nanometer", 1.0012), ("micrometer", 0.0010012)]
)
def test_units_become_angstrom(tmp_path: Path, form: Any, unit: str, value: float) -> None:
    write_image(
        LocalStore(tmp_path), {"0": FINE}, form=form, unit=unit, transforms={"0": [scale(*[value] * 3)]}
    )
    found, place = open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    assert place == Place((12, 10, 8), (10.012, 10.012, 10.012))
    np.testing.assert_array_equal(read(found), FINE)


@pytest.mark.parametrize("unit", [None, "pixel", "Furlong", ["angstrom"]])
def test_without_a_unit_of_length_there_is_no_voxel_size(unit: Any) -> None:
    store = MemoryStore()
    write_image(
        store,
        {"0": FINE, "1": binned(FINE)},
        unit=unit,
        transforms={"0": [scale(7, 7, 7)], "1": [scale(14, 14, 14)]},
    )
    _, place = open_zarr(store, "", 1, "error", "a")
    assert place == Place((12, 10, 8), None, (2, 2, 2), (0.5, 0.5, 0.5))


def test_axes_are_found_by_name() -> None:
    store = MemoryStore()
    stored = FINE.transpose(2, 1, 0)[None, None]
    write_image(
        store,
        {"s0": stored},
        axes=("t", "c", "X", "y", "Z"),
        transforms={"s0": [scale(1, 1, 2, 3, 4)]},
        common=[scale(9, 9, 10, 10, 10), translation(0, 0, 5, 5, 5)],
    )
    found, place = open_zarr(store, "", 0, "error", "a")
    assert place == Place((12, 10, 8), (40, 30, 20))
    np.testing.assert_array_equal(read(found), FINE)


def test_several_times_or_channels_are_refused() -> None:
    store = MemoryStore()
    write_image(store, {"0": np.stack([FINE, FINE])}, axes=("c", "z", "y", "x"))
    with pytest.raises(SourceError, match=r"several volumes: axes c, z, y, x and shape \(2, 12, 10, 8\)"):
        open_zarr(store, "", 0, "error", "a")


@pytest.mark.parametrize("axes", [("z", "y"), ("a", "b", "z"), ("y", "x", "z", "t")])
def test_axes_that_do_not_fit_the_array_are_refused(axes: tuple[str, ...]) -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE}, axes=axes)
    with pytest.raises(SourceError, match="expected a volume with axes z, y, x"):
        open_zarr(store, "", 0, "error", "a")


@pytest.mark.parametrize("data", [np.zeros((10, 8), "f4"), np.zeros((1, 10, 8), "f4")])
def test_images_are_refused(data: Any) -> None:
    store = MemoryStore()
    zarr.create_array(store, name="bare", shape=data.shape, dtype="f4")
    with pytest.raises(SourceError, match="2-D image"):
        open_zarr(store, "bare", 0, "error", "a")
    zarr.create_array(store, name="scalar", shape=(), dtype="f4")
    with pytest.raises(SourceError, match="axes none and shape"):
        open_zarr(store, "scalar", 0, "error", "a")


def test_the_metadata_of_early_versions_are_read() -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE[None, None]}, form=2, axes=None)
    found, place = open_zarr(store, "", 0, "error", "a")
    np.testing.assert_array_equal(read(found), FINE)
    assert place == Place((12, 10, 8))
    store = MemoryStore()
    write_image(store, {"0": FINE}, form=2)
    write_bytes(
        store, ".zattrs", b'{"multiscales": [{"axes": ["z", "y", "x"], "datasets": [{"path": "0"}]}]}'
    )
    np.testing.assert_array_equal(read(open_zarr(store, "", 0, "error", "a")[0]), FINE)


@pytest.mark.parametrize(
    ("steps", "shift"),
    [
        ([scale(20, 20, 20)], (0.5, 0.5, 0.5)),  # block means, as the portal writes without saying so
        ([scale(20, 20, 20), translation(5, 5, 5)], (0.5, 0.5, 0.5)),
        ([scale(20, 20, 20), translation(0, 0, 0)], (0, 0, 0)),  # every other voxel, and said so
        ([scale(20, 20, 20), translation(2.5, 5, 10)], (0.25, 0.5, 1)),
    ],
)
def test_where_a_coarser_level_lies(steps: list[dict[str, Any]], shift: Any) -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE, "1": binned(FINE)}, transforms={"0": [scale(10, 10, 10)], "1": steps})
    found, place = open_zarr(store, "", 1, "error", "a")
    assert found.shape == (6, 5, 4)
    assert place == Place((12, 10, 8), (10, 10, 10), (2, 2, 2), shift)
    np.testing.assert_array_equal(read(found), binned(FINE))
    assert open_zarr(store, "", 0, "error", "a")[1] == Place((12, 10, 8), (10, 10, 10))


def test_translations_count_from_that_of_level_0_and_axes_by_name() -> None:
    store = MemoryStore()
    write_image(
        store,
        {"0": FINE.transpose(2, 1, 0), "1": FINE.transpose(2, 1, 0)[::2, :, ::4]},
        axes=("x", "y", "z"),
        transforms={
            "0": [scale(3, 5, 7), translation(100, 200, 300)],
            "1": [scale(6, 5, 28), translation(101.5, 200, 307)],
        },
    )
    _, place = open_zarr(store, "", 1, "error", "a")
    assert place == Place((12, 10, 8), (7, 5, 3), (4, 1, 2), (1, 0, 0.5))


def test_a_level_without_a_scale_is_taken_from_the_shapes() -> None:
    store = MemoryStore()
    fine = np.zeros((9, 10, 11), "f4")
    write_image(store, {"0": fine, "1": np.zeros((3, 3, 3), "f4")})
    _, place = open_zarr(store, "", 1, "error", "a")
    assert place == Place((9, 10, 11), None, (3, 3, 4), (1, 1, 1.5))


def test_rounded_scales_are_whole_factors() -> None:
    store = MemoryStore()
    write_image(
        store,
        {"0": FINE, "1": binned(FINE)},
        transforms={"0": [scale(*[6.657] * 3)], "1": [scale(*[13.313] * 3)]},
    )
    assert open_zarr(store, "", 1, "error", "a")[1].scale == (2, 2, 2)


def test_a_level_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_image(store, {"0": FINE, "half": binned(FINE)})
    with pytest.raises(SourceError, match="no level 2; expected one of those it has: levels 0 to 1"):
        open_zarr(store, "", 2, "error", "a")
    with pytest.raises(SourceError, match="no level -1"):
        open_zarr(store, "", -1, "error", "a")
    (tmp_path / "half" / "zarr.json").unlink()
    with pytest.raises(
        SourceError, match="names an array 'half' that is not there; expected one of those that are: 0"
    ):
        open_zarr(store, "", 1, "error", "a")
    (tmp_path / "0" / "zarr.json").unlink()
    with pytest.raises(SourceError, match="'0' that is not there; expected one of those that are: none"):
        open_zarr(store, "", 0, "error", "a")


def test_folders_that_are_no_image_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a is neither a zarr array nor a zarr group; it holds nothing"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"it holds notes.txt; .* check the path"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    write_image(LocalStore(tmp_path / "run1"), {"0": FINE})
    zarr.create_group(LocalStore(tmp_path), overwrite=False)
    with pytest.raises(SourceError, match=r"no OME-Zarr image; it holds run1; .* for instance a/run1"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")


def test_values_that_are_not_real_numbers_are_refused(tmp_path: Path) -> None:
    for number, kind in enumerate(["c8", "c16", "M8[s]"]):
        zarr.create_array(LocalStore(tmp_path / str(number)), shape=(4, 4, 4), dtype=kind, zarr_format=2)
        with pytest.raises(SourceError, match="expected real numbers"):
            open_zarr(LocalStore(tmp_path / str(number)), "", 0, "error", "a")


def test_an_array_in_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path), shape=(4, 4, 4), dtype="f4", chunks=(4, 4, 4))
    text = (tmp_path / "zarr.json").read_text()
    (tmp_path / "zarr.json").write_text(text.replace('"zstd"', '"no_such_codec"'))
    with pytest.raises(SourceError, match=r"array metadata that cannot be used .*no_such_codec"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(SourceError, match="the metadata of a cannot be read"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")
    (tmp_path / "zarr.json").write_text("[1, 2]")
    with pytest.raises(SourceError, match="the metadata of a cannot be read"):
        open_zarr(LocalStore(tmp_path), "", 0, "error", "a")


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b"])
def test_dataset_paths_stay_inside_the_group(path: str) -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE}, form=2)
    write_bytes(store, ".zattrs", json.dumps({"multiscales": [{"datasets": [{"path": path}]}]}).encode())
    with pytest.raises(SourceError, match="leaves the group"):
        open_zarr(store, "", 0, "error", "a")


def test_a_group_below_the_root_of_a_store() -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE}, transforms={"0": [scale(5, 5, 5)]})
    zarr.create_array(store, name="deep/er", shape=FINE.shape, dtype="f4")[:] = FINE
    found, _ = open_zarr(store, "deep/er", 0, "error", "a")
    np.testing.assert_array_equal(read(found), FINE)


def test_the_portals_layout_with_axes_x_y_z(shared_data: Path) -> None:
    folder = shared_data / "omezarr" / "portal_xyz_v04.zarr"
    found, place = open_zarr(LocalStore(folder, read_only=True), "", 0, "error", "a")
    assert place == Place((4, 4, 4))
    stored = zarr.open_array(folder / "0", mode="r", zarr_format=2)[:]
    assert found.order == (2, 1, 0)
    np.testing.assert_array_equal(read(found), np.transpose(stored))
    assert found.chunks == (4, 4, 4)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_published_2d_samples_are_refused(shared_data: Path, version: str) -> None:
    folder = shared_data / "omezarr" / f"neuroglancer_simple_{version}"
    for level in range(3):
        with pytest.raises(SourceError, match="2-D image: axes y, x"):
            open_zarr(LocalStore(folder, read_only=True), "", level, "error", "a")


def test_a_published_sample_in_micrometers(shared_data: Path) -> None:
    store = LocalStore(shared_data / "omezarr" / "ngio_v04_zyx.zarr", read_only=True)
    found, place = open_zarr(store, "", 1, "error", "a")
    assert place == Place((3, 64, 64), (20000, 5000, 5000), (1, 2, 2), (0, 0.5, 0.5))
    with pytest.raises(SourceError, match="has no object 1/0/0/0"):  # the sample holds metadata only
        found.read((slice(0, 3), slice(0, 32), slice(0, 32)))
    labels, _ = open_zarr(store, "labels/label", 0, "fill", "a")
    assert np.count_nonzero(read(labels)) == 0


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({"axes": ["z", "y", "x"], "datasets": []}, "no datasets"),
        ({"axes": ["z", "y", "x"]}, "KeyError: 'datasets'"),
        ({"datasets": [{"coordinateTransformations": []}]}, "KeyError: 'path'"),
        (
            {
                "axes": ["z", "y", "x"],
                "datasets": [{"path": "0", "coordinateTransformations": [scale(1, 2)]}],
            },
            "for 3 axes",
        ),
        (
            {
                "axes": ["z", "y", "x"],
                "datasets": [{"path": "0", "coordinateTransformations": [scale(1, 0, 2)]}],
            },
            "a scale of",
        ),
        (
            {
                "axes": ["z", "y", "x"],
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale"}]}],
            },
            "KeyError",
        ),
        ([], "list"),
    ],
)
def test_metadata_that_make_no_sense_say_why(image: Any, says: str) -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE}, form=2)
    write_bytes(store, ".zattrs", json.dumps({"multiscales": [image]}).encode())
    with pytest.raises(SourceError, match=f"a has OME-Zarr metadata that make no sense .*{says}"):
        open_zarr(store, "", 0, "error", "a")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["z", "y", "x", "scale", "0", "angstrom"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "multiscales",
                    "ome",
                    "axes",
                    "datasets",
                    "path",
                    "name",
                    "unit",
                    "type",
                    "scale",
                    "coordinateTransformations",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_metadata_are_read_or_refused(data: st.DataObject) -> None:
    store = MemoryStore()
    write_image(store, {"0": FINE}, form=2, transforms={"0": [scale(5, 5, 5)]})
    attributes = {
        "multiscales": [
            {
                "axes": [{"name": n, "type": "space", "unit": "angstrom"} for n in "zyx"],
                "datasets": [{"path": "0", "coordinateTransformations": [scale(5, 5, 5)]}],
            }
        ]
    }
    # Replace one node of valid metadata, at any depth, by anything.
    node: Any = {"root": attributes}
    key: Any = "root"
    while data.draw(st.booleans()) and isinstance(node[key], dict | list) and node[key]:
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
    node[key] = data.draw(JSON)
    attributes = node[key] if key == "root" else attributes
    write_bytes(store, ".zattrs", json.dumps(attributes).encode())
    try:
        found, place = open_zarr(store, "", 0, "error", "a")
    except SourceError:
        return
    assert found.shape == place.file_shape
    assert sorted(found.shape) == [8, 10, 12]
    assert place.voxel_sizes is None or min(place.voxel_sizes) > 0
