from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from tomocpt_stream.blocks import Window
from tomocpt_stream.errors import CheckpointError, PlanError
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.picker import FORMAT_VERSION, Picker, load_picker, picker_metadata
from tomocpt_stream.remote import ForbiddenError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.buckets import S3, Way

TINY = named_architecture("small") | {"depths": [1, 1, 1, 1]}
WINDOW = Window((32, 32, 64), (4, 4, 8))
KEY = "tomocpt_stream.picker"


def _picker(seed: int = 0, **fields: Any) -> Picker:
    torch.manual_seed(seed)
    return Picker(build_network(TINY), picker_metadata(TINY, window=WINDOW, **fields))


def _batch(size: int = 2, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((size, *WINDOW.shape), dtype=np.float32)


@pytest.fixture(scope="module")
def picker() -> Picker:
    return _picker()


@pytest.fixture(scope="module")
def saved(picker: Picker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pickers") / "one.safetensors"
    picker.save(path)
    return path


def _rewritten(saved: Path, target: Path, **changes: Any) -> Path:
    """Write the saved picker with other metadata; a value of None leaves a key out."""
    plain = json.loads(_text(saved)) | changes
    plain = {key: value for key, value in plain.items() if value is not None}
    save_file(load_file(saved), target, metadata={KEY: json.dumps(plain)})
    return target


def _text(path: Path) -> str:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    text: str = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"][KEY]
    return text


def test_scores_have_the_shape_of_the_batch_and_lie_in_0_1(picker: Picker) -> None:
    scores = picker.score(_batch(3))
    assert scores.shape == (3, *WINDOW.shape)
    assert scores.dtype == np.float32
    assert scores.flags.c_contiguous
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.std() > 0


def test_a_score_depends_on_neither_slot_nor_neighbours(picker: Picker) -> None:
    batch = _batch(4)
    scores = picker.score(batch)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(picker.score(batch[order]), scores[order])
    alone = np.zeros_like(batch)
    alone[1] = batch[3]
    np.testing.assert_array_equal(picker.score(alone)[1], scores[3])
    np.testing.assert_array_equal(picker.score(batch), scores)


def test_scoring_leaves_batch_and_threads_as_they_were(picker: Picker) -> None:
    batch = _batch()
    batch.flags.writeable = False
    kept, threads = batch.copy(), torch.get_num_threads()
    picker.score(batch)
    np.testing.assert_array_equal(batch, kept)
    assert torch.get_num_threads() == threads


def test_scores_do_not_follow_the_threads_of_the_caller(picker: Picker) -> None:
    threads = torch.get_num_threads()
    scores = picker.score(_batch())
    try:
        torch.set_num_threads(threads + 1)
        np.testing.assert_array_equal(picker.score(_batch()), scores)
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_is_close_and_is_told_in_the_numerics(saved: Path) -> None:
    picker = load_picker(saved, device="cpu")
    exact = picker.score(_batch())
    assert picker.numerics == {"dtype": "float32", "threads": 2}
    picker.dtype = "bfloat16"
    assert picker.numerics["dtype"] == "bfloat16"
    scores = picker.score(_batch())
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, exact, atol=0.05)
    assert not np.array_equal(scores, exact)


@pytest.mark.parametrize("size", [1, 2])
def test_stated_bytes_cover_the_tensors_of_a_score(size: int) -> None:
    picker = Picker(build_network(TINY), picker_metadata(TINY, window=Window()))
    batch = np.zeros((size, 64, 64, 64), dtype=np.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        picker.score(batch)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    stated = size * picker.bytes_per_window
    assert 0.5 * stated < live.max() <= stated


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((2, 32, 32, 32), np.float32),
        np.zeros(WINDOW.shape, np.float32),
        np.zeros((1, *WINDOW.shape), np.float64),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(picker: Picker, batch: npt.NDArray[np.float32]) -> None:
    with pytest.raises(PlanError, match="float"):
        picker.score(batch)


def test_saved_and_loaded_pickers_score_alike(picker: Picker, saved: Path) -> None:
    loaded = load_picker(saved, device="cpu")
    np.testing.assert_array_equal(loaded.score(_batch()), picker.score(_batch()))
    assert loaded.metadata == picker.metadata
    assert loaded.fingerprint == picker.fingerprint
    assert loaded.window == WINDOW
    assert loaded.particle_radius == 10.0
    assert loaded.contrast == "dark"
    assert loaded.address == str(saved)
    assert picker.address is None


def test_file_says_everything_about_the_picker(saved: Path) -> None:
    plain = json.loads(_text(saved))
    assert plain["format_version"] == FORMAT_VERSION
    assert plain["label"] == {"kind": "gaussian", "widths": [0.95, 0.5]}
    assert plain["normalisation"] == {"rule": "percentiles", "low": 5, "middle": 50, "high": 95, "clip": 3.0}
    assert plain["architecture"] == TINY
    assert plain["provenance"] == {}


def test_fingerprint_follows_weights_and_scale_but_not_provenance() -> None:
    marks = [
        _picker(0).fingerprint,
        _picker(1).fingerprint,
        _picker(0, particle_radius=12.0).fingerprint,
        _picker(0, contrast="bright").fingerprint,
    ]
    assert len(set(marks)) == 4
    assert _picker(0, provenance={"step": 3}).fingerprint == marks[0]


def test_a_shifted_picker_answers_by_a_constant_less(picker: Picker) -> None:
    lower = picker.shifted(-1.5, calibration={"shift": -1.5})
    before, after = (one.score(_batch()).astype(np.float64) for one in (picker, lower))
    np.testing.assert_allclose(np.log(after / (1 - after)), np.log(before / (1 - before)) - 1.5, atol=1e-3)
    assert lower.metadata["provenance"] == {"calibration": {"shift": -1.5}}
    assert picker.metadata["provenance"] == {}
    assert lower.fingerprint != picker.fingerprint


def test_saving_appears_whole_and_leaves_nothing_else(picker: Picker, tmp_path: Path) -> None:
    target = tmp_path / "new" / "picker.safetensors"
    picker.save(target)
    assert [path.name for path in target.parent.iterdir()] == ["picker.safetensors"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert target.stat().st_mode == plain.stat().st_mode
    before = target.read_bytes()
    picker.save(target)
    assert target.read_bytes() == before


def test_weights_in_half_precision_load_as_float32(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    half = {name: value.to(torch.float16) for name, value in load_file(saved).items()}
    save_file(half, path, metadata={KEY: _text(saved)})
    loaded = load_picker(path, device="cpu")
    np.testing.assert_allclose(
        loaded.score(_batch()), load_picker(saved, device="cpu").score(_batch()), atol=0.02
    )


def test_missing_foreign_and_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file at"):
        load_picker(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no file at /"):
        load_picker(f"file://{tmp_path}/none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"\x80\x04 this is no safetensors file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_picker(foreign)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read"):
        load_picker(cut)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(saved), bare)
    with pytest.raises(CheckpointError, match="no picker's metadata"):
        load_picker(bare)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format version 2"),
        ({"format_version": None}, "format version None"),
        ({"halo": None}, "without \\['halo'\\]"),
        ({"resampling": "nearest"}, "resampling .nearest."),
        ({"contrast": "grey"}, "grey"),
        ({"particle_radius": -1}, "-1"),
        ({"window": [64]}, "window"),
        ({"normalisation": {"rule": "z-score"}}, "z-score"),
        ({"architecture": TINY | {"feature_size": 24}}, "of another shape .*\\(12.*for \\(24"),
        ({"architecture": TINY | {"depths": [2, 1, 1, 1]}}, "missing \\(swinViT"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = _rewritten(saved, tmp_path / "changed.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_picker(path)


def test_metadata_that_are_no_table_are_refused(saved: Path, tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        path = tmp_path / "text.safetensors"
        save_file(load_file(saved), path, metadata={KEY: text})
        with pytest.raises(CheckpointError, match="metadata that are no"):
            load_picker(path)


def test_wrong_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    weights, path = load_file(saved), tmp_path / "wrong.safetensors"
    name = next(iter(weights))
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, f"1 tensors missing \\({name}\\)"),
        (weights | {"spare": torch.zeros(2)}, "1 tensors unknown \\(spare\\)"),
        (weights | {name: torch.zeros(3)}, f"another shape \\({name} \\(3,\\)"),
        (weights | {name: weights[name].to(torch.int32)}, "1 tensors not floating"),
        (weights | {name: torch.full_like(weights[name], torch.nan)}, "not finite"),
    ):
        save_file(changed, path, metadata={KEY: _text(saved)})
        with pytest.raises(CheckpointError, match=message):
            load_picker(path)


def test_base_picker_ships_with_the_package() -> None:
    picker = load_picker("base", device="cpu")
    assert picker.address == "base"
    assert picker.particle_radius == 10.0
    assert picker.window == Window((64, 64, 64), (8, 8, 8))
    assert picker.metadata["provenance"]["data"] == "simulated tomograms"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_picker_is_pickled_by_its_address_and_asks_for_its_device_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    trained = _picker()
    trained.save(tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    loaded = load_picker("mine.safetensors", device=device)
    loaded.threads = 1
    data = pickle.dumps(loaded)
    assert len(data) < 1000
    monkeypatch.chdir("/")  # the other process may be elsewhere
    asked: list[str] = []

    def is_available() -> bool:
        asked.append("cuda")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    there: Picker = pickle.loads(data)
    assert (there.fingerprint, there.threads, there.placement) == (trained.fingerprint, 1, device)
    assert bool(asked) == (device == "auto")  # the reader's own device, not the writer's
    sent: Picker = pickle.loads(pickle.dumps(trained))  # with its weights: it has no address
    assert (sent.fingerprint, sent.address) == (trained.fingerprint, None)


def test_a_picker_at_an_address_is_loaded_with_its_options(
    picker: Picker, saved: Path, s3: S3, way: Way, tmp_path: Path
) -> None:
    s3.bucket.put("pickers/one.safetensors", saved.read_bytes())
    way.private["pickers/"] = "LABKEY"
    options = s3.options(key="LABKEY", secret="hush-hush")
    address = s3.address("pickers/one.safetensors")
    loaded = load_picker(address, device="cpu", storage_options=options)
    assert (loaded.address, loaded.fingerprint) == (address, picker.fingerprint)
    data = pickle.dumps(loaded)
    assert len(data) < 1000  # by its address
    there: Picker = pickle.loads(data)
    np.testing.assert_array_equal(there.score(_batch()), picker.score(_batch()))
    assert {one.signer for one in way.asked} == {"LABKEY"}
    loaded.save(tmp_path / "copy.safetensors")
    assert b"hush" not in (tmp_path / "copy.safetensors").read_bytes()
    s3.bucket.put("open/one.safetensors", saved.read_bytes())
    web = f"{way.url}/{s3.bucket.name}/open/one.safetensors"
    assert load_picker(web, device="cpu").fingerprint == picker.fingerprint
    with pytest.raises(CheckpointError, match="no object at s3://"):
        load_picker(s3.address("pickers/two.safetensors"), storage_options=options)
    with pytest.raises(ForbiddenError, match="refuses its object"):
        load_picker(address, storage_options=s3.options(skip_signature=True))
    s3.bucket.put("pickers/one.safetensors", saved.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"s3://.* cannot be read"):
        load_picker(address, storage_options=options)


def test_another_file_at_the_address_of_a_pickled_picker_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    _picker(0).save(path)
    data = pickle.dumps(load_picker(path, device="cpu"))
    _picker(1).save(path)
    with pytest.raises(CheckpointError, match="the same file"):
        pickle.loads(data)
