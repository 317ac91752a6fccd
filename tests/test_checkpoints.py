from __future__ import annotations

import hashlib
import os
import zipfile
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from monai.networks.nets.swin_unetr import SwinUNETR
from torch.optim.swa_utils import SWALR

from tests.lightning_files import TINY, network, state_of, write_checkpoint
from tomocpt_stream import checkpoints
from tomocpt_stream.__main__ import main
from tomocpt_stream.checkpoints import architecture_of, import_checkpoint
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.network import LEGACY_MERGING, build_network, named_architecture
from tomocpt_stream.picker import load_picker
from tomocpt_stream.pipeline import plan_pick, scratch_folder
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

THEIRS = TINY | {"merging": LEGACY_MERGING}


class OldMerging(torch.nn.Module):
    """The merging of MONAI 1.4, written another way: each corner by its name in that release's order."""

    def __init__(self, dim: int, norm_layer: Any = torch.nn.LayerNorm, spatial_dims: int = 3) -> None:
        super().__init__()
        self.reduction = torch.nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d, h, w = x.shape[1:4]
        x = torch.nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        corners = x.unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2)  # n d h w c, and a corner's z y x
        order = ["000", "100", "010", "001", "101", "010", "001", "111"]
        taken = [corners[..., int(at[0]), int(at[1]), int(at[2])] for at in order]
        answer: torch.Tensor = self.reduction(self.norm(torch.cat(taken, dim=-1)))
        return answer


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return network(THEIRS)


@pytest.fixture(scope="module")
def checkpoint(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("their") / "weights.ckpt", state_of(theirs))


def test_the_picker_scores_as_a_network_of_their_merging_order(
    theirs: nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    reference = SwinUNETR(
        in_channels=1,
        out_channels=1,
        feature_size=12,
        window_size=4,
        depths=(1, 1, 1, 1),
        num_heads=(3, 6, 12, 24),
        use_v2=True,
        downsample=cast("Any", OldMerging),
    ).eval()
    reference.load_state_dict(theirs.state_dict(), strict=True)
    import_checkpoint(checkpoint).save(tmp_path / "theirs.safetensors")
    picker = load_picker(tmp_path / "theirs.safetensors", device="cpu")
    batch = np.random.default_rng(0).normal(size=(1, 64, 64, 64)).astype(np.float32)
    with torch.inference_mode():
        wanted = torch.sigmoid(reference(torch.from_numpy(batch)[None])[:, 0]).numpy()
        newer = build_network(TINY).eval()
        newer.load_state_dict(theirs.state_dict(), strict=True)
        other = torch.sigmoid(newer(torch.from_numpy(batch)[None])[:, 0]).numpy()
    np.testing.assert_allclose(picker.score(batch), wanted, atol=1e-5)
    # The newer order takes the same weights without a word, and answers otherwise.
    assert np.abs(other - wanted).max() > 1e-3


def test_the_metadata_say_how_to_feed_the_network(checkpoint: Path) -> None:
    picker = import_checkpoint(checkpoint, name="base 2025", contrast="bright")
    metadata = picker.metadata
    assert metadata["architecture"] == THEIRS
    assert metadata["window"] == [64, 64, 64]
    assert metadata["particle_radius"] == 10.0
    assert metadata["resampling"] == picker.rule == "tomocpt"
    assert metadata["normalisation"] == {
        "rule": "percentiles",
        "low": 5,
        "middle": 50,
        "high": 95,
        "clip": 3.0,
    }
    assert metadata["contrast"] == "bright"
    provenance = metadata["provenance"]
    assert provenance["name"] == "base 2025"
    assert provenance["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert provenance["pytorch_lightning"] == "2.4.0"
    assert (provenance["epoch"], provenance["step"]) == (31, 4032)
    assert provenance["trained_on_lengths"] == "250,240"


@pytest.mark.parametrize(
    ("era", "target", "given", "radius"),
    [
        ("refactor", 20, {}, 10.0),
        ("paper", 10, {}, 10.0),
        ("paper", 20, {}, 20.0),
        ("paper", 20, {"measures": "diameter"}, 10.0),
        ("refactor", 20, {"particle_voxels": 24}, 12.0),
        ("early", None, {"particle_voxels": 10, "measures": "radius"}, 10.0),
    ],
)
def test_the_target_size_means_what_its_version_meant(
    era: str, target: float | None, given: dict[str, Any], radius: float, theirs: nn.Module, tmp_path: Path
) -> None:
    chunk = None if era == "early" else 64
    path = write_checkpoint(tmp_path / "a.ckpt", state_of(theirs), era=era, target=target, chunk=chunk)
    if era == "early":
        with pytest.warns(UserWarning, match="64 voxels taken"):
            picker = import_checkpoint(path, **given)
    else:
        picker = import_checkpoint(path, **given)
    assert picker.particle_radius == radius


def test_a_size_of_unknown_meaning_is_refused(theirs: nn.Module, tmp_path: Path) -> None:
    early = write_checkpoint(tmp_path / "a.ckpt", state_of(theirs), era="early")
    with pytest.raises(CheckpointError, match="how many voxels"):
        import_checkpoint(early)
    with pytest.raises(CheckpointError, match="radius or a diameter"):
        import_checkpoint(early, particle_voxels=20)


def test_the_grid_of_an_imported_picker_is_that_of_their_rule(checkpoint: Path) -> None:
    picker = import_checkpoint(checkpoint)
    tomogram = open_tomogram(np.zeros((70, 75, 77), np.float32), voxel_size=10.0, name="TS_01")
    grid, _ = plan_pick(tomogram, picker, PickOptions(diameter=300.0, contrast="dark"))
    assert grid.shape == (46, 50, 51)  # rounded down; ours are rounded up
    assert grid.scale == (70 / 46, 75 / 50, 77 / 51)
    assert scratch_folder(tomogram, grid, "tomocpt") != scratch_folder(tomogram, grid)


def test_the_teacher_of_a_distillation_is_left_out(
    theirs: nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    state = state_of(theirs)
    state["teacher.model.out.conv.conv.bias"] = torch.ones(1)
    path = write_checkpoint(tmp_path / "a.ckpt", state)
    assert import_checkpoint(path).fingerprint == import_checkpoint(checkpoint).fingerprint


def test_what_a_late_checkpoint_holds_besides_is_passed_over(
    theirs: nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    module = torch.nn.Module()
    module.model = theirs
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    # Older releases of torch keep a function in the state of its averaging, and metrics may be NumPy's.
    averaging = {"anneal_func": SWALR._cosine_anneal, "last_lr": np.float64(4e-5)}
    callbacks = {"SWA": {"scheduler_state": averaging, "average_model_state": state}}
    path = write_checkpoint(tmp_path / "a.ckpt", state, callbacks=callbacks, memory_buffer=[torch.ones(3)])
    assert import_checkpoint(path).fingerprint == import_checkpoint(checkpoint).fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_numbers_become_float32(dtype: torch.dtype, theirs: nn.Module, tmp_path: Path) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of(theirs).items()}
    import_checkpoint(write_checkpoint(tmp_path / "a.ckpt", state)).save(tmp_path / "a.safetensors")
    read = build_network(THEIRS)
    load_picker(tmp_path / "a.safetensors", device="cpu").copy_weights(read)
    for key, value in read.named_parameters():
        assert torch.equal(value, state[f"model.{key}"].float()), key


INDEX = "model.swinViT.layers1.0.blocks.0.attn.relative_position_index"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.encoder2.layer.conv1.conv.weight": None}, "1 tensors missing .encoder2.layer.conv1"),
        ({"model.extra.weight": torch.ones(2)}, "1 tensors unknown .extra.weight"),
        ({"head.weight": torch.ones(2)}, "belong to no network .head.weight"),
        ({"model.out.conv.conv.bias": torch.ones(2)}, r"another shape .out.conv.conv.bias \(2,\) for \(1,\)"),
        ({"model.out.conv.conv.bias": torch.tensor([float("nan")])}, "not finite"),
        ({"rotation_head.0.weight": torch.ones(2)}, "self-supervised"),
        ({"model.swinViT.patch_embed.proj.weight": None}, "no tensor 'swinViT.patch_embed"),
        ({"model.swinViT.patch_embed.proj.weight": torch.ones(4800, 1, 2, 2, 2)}, "at most 48 features"),
        ({INDEX: None}, "relative positions"),
        ({INDEX: torch.zeros(64, 64, dtype=torch.int64)}, "relative positions"),
    ],
)
def test_each_key_and_shape_is_checked_both_ways(
    change: dict[str, torch.Tensor | None], message: str, theirs: nn.Module, tmp_path: Path
) -> None:
    state = {key: value for key, value in (state_of(theirs) | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(write_checkpoint(tmp_path / "a.ckpt", state))


def test_the_full_size_has_the_shapes_that_were_published() -> None:
    shapes = published_shapes()
    assert len(shapes) == 167
    architecture = architecture_of(shapes, "a file")
    assert architecture == named_architecture("paper") | {"merging": LEGACY_MERGING}
    built = build_network(architecture)
    assert {key: tuple(value.shape) for key, value in built.state_dict().items()} == shapes


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The 167 tensors of a published checkpoint, without "model."."""
    shapes: dict[str, tuple[int, ...]] = {}

    def pair(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def convolutions(name: str, inner: int, outer: int, *, shortcut: bool) -> None:
        shapes[f"{name}.conv1.conv.weight"] = (outer, inner, 3, 3, 3)
        shapes[f"{name}.conv2.conv.weight"] = (outer, outer, 3, 3, 3)
        if shortcut:
            shapes[f"{name}.conv3.conv.weight"] = (outer, inner, 1, 1, 1)

    pair("swinViT.patch_embed.proj", 36, 1, 2, 2, 2)
    for stage in (1, 2, 3, 4):
        c, heads = 36 * 2 ** (stage - 1), 3 * 2 ** (stage - 1)
        for block in (0, 1):
            name = f"swinViT.layers{stage}.0.blocks.{block}"
            pair(f"{name}.norm1", c)
            pair(f"{name}.norm2", c)
            shapes[f"{name}.attn.relative_position_bias_table"] = (2197, heads)
            shapes[f"{name}.attn.relative_position_index"] = (343, 343)
            pair(f"{name}.attn.qkv", 3 * c, c)
            pair(f"{name}.attn.proj", c, c)
            pair(f"{name}.mlp.linear1", 4 * c, c)
            pair(f"{name}.mlp.linear2", c, 4 * c)
        shapes[f"swinViT.layers{stage}.0.downsample.reduction.weight"] = (2 * c, 8 * c)
        pair(f"swinViT.layers{stage}.0.downsample.norm", 8 * c)
        convolutions(f"swinViT.layers{stage}c.0.layer", c, c, shortcut=False)
    convolutions("encoder1.layer", 1, 36, shortcut=True)
    for encoder, c in ((2, 36), (3, 72), (4, 144), (10, 576)):
        convolutions(f"encoder{encoder}.layer", c, c, shortcut=False)
    for decoder, inner, outer in ((5, 576, 288), (4, 288, 144), (3, 144, 72), (2, 72, 36), (1, 36, 36)):
        shapes[f"decoder{decoder}.transp_conv.conv.weight"] = (inner, outer, 2, 2, 2)
        convolutions(f"decoder{decoder}.conv_block", 2 * outer, outer, shortcut=True)
    pair("out.conv.conv", 1, 36, 1, 1, 1)
    return shapes


class Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_hostile_checkpoint_runs_nothing(
    theirs: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "a.ckpt", state_of(theirs), callbacks={"x": Calls()})
    with pytest.raises(CheckpointError, match=rf"a\.ckpt has .*{os.name}\.system"):
        import_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_other_modes_are_refused(theirs: nn.Module, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt", state_of(theirs), mode="selfSupervised")
    with pytest.raises(CheckpointError, match="mode 'selfSupervised'"):
        import_checkpoint(path)


@pytest.mark.parametrize("chunk", [48, 0, 2**20, "64"])
def test_windows_that_do_not_fit_are_refused(chunk: Any, theirs: nn.Module, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt", state_of(theirs), chunk=chunk)
    with pytest.raises(CheckpointError, match="multiple of 32"):
        import_checkpoint(path)


def repacked(
    source: Path,
    target: Path,
    changes: Mapping[str, bytes | None] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy a zip file; `changes` by the last part of a member's name: other bytes, or None for none."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = (changes or {}).get(name.split("/")[-1], old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def test_files_that_are_no_checkpoint_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, str]] = [(tmp_path / "none.ckpt", "no file")]
    text, legacy = tmp_path / "text.ckpt", tmp_path / "legacy.ckpt"
    text.write_text("weights")
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    cases += [(text, "no zip file"), (legacy, "no zip file")]
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:-5000])
    cases.append((cut, "no zip file"))
    packed = repacked(checkpoint, tmp_path / "packed.ckpt", compression=zipfile.ZIP_DEFLATED)
    cases.append((packed, "stored as they are"))
    changes: list[tuple[str, bytes | None, str]] = [
        ("data.pkl", None, "0 pickles"),
        ("byteorder", b"big", "little-endian"),
        ("data.pkl", b"N.", "no table"),
        ("data.pkl", b"}.", "no state_dict"),
        ("3", None, "no member 'weights/data/3'"),
        ("3", b"1234", "no whole tensor"),
    ]
    for number, (member, data, message) in enumerate(changes):
        changed = repacked(checkpoint, tmp_path / f"{number}.ckpt", {member: data})
        cases.append((changed, message))
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path)


def test_a_damaged_byte_is_found(checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        data[archive.getinfo("weights/data/5").header_offset + 200] ^= 1
    (tmp_path / "weights.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged member 'weights/data/5'"):
        import_checkpoint(tmp_path / "weights.ckpt")


def test_sizes_over_the_bounds_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("LARGEST_WEIGHTS", "at most 5000"),
        ("LARGEST_FILE", "at most 5000"),
        ("LARGEST_PICKLE", "data.pkl"),
        ("_MOST_MEMBERS", "members"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, name, 5000 if name.startswith("LARGEST") else 10)
            with pytest.raises(CheckpointError, match=message):
                import_checkpoint(checkpoint)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(theirs: nn.Module, tmp_path: Path) -> None:
    state = state_of(theirs)
    state["model.out.conv.conv.bias"] = torch.ones(1).expand(2**30)
    with pytest.raises(CheckpointError, match="bias' that is no whole tensor"):
        import_checkpoint(write_checkpoint(tmp_path / "a.ckpt", state))


def test_the_command_writes_a_picker(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "base.safetensors"
    result = CliRunner().invoke(main, ["import-weights", str(checkpoint), str(output), "--name", "base"])
    assert result.exit_code == 0, result.output
    assert "particle diameter 20 working voxels" in result.output
    assert load_picker(output, device="cpu").metadata["provenance"]["name"] == "base"
    again = CliRunner().invoke(main, ["import-weights", str(checkpoint), str(checkpoint)])
    assert again.exit_code == 1
    assert zipfile.is_zipfile(checkpoint)
