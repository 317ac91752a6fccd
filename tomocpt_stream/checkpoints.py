"""The public checkpoints of tomoCPT as pickers of this package, without that program and without its code.

A checkpoint is a zip file of PyTorch Lightning: `data.pkl` and one file for each storage. Its weights
fit our network by name; three things besides the names decide whether they give the same scores, and
are written into the picker's metadata: the order in which MONAI 1.4 merges patches, which that program
pins; whether its target size means a radius or a diameter, which changed with its versions; and how
it resamples.
"""

from __future__ import annotations

import hashlib
import math
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tomocpt_stream.blocks import Window
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.network import LEGACY_MERGING, build_network, named_architecture
from tomocpt_stream.picker import Picker, fill_network, picker_metadata
from tomocpt_stream.pickles import LARGEST_PICKLE, Persistent, Standin, read_pickle, refusal

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy.typing as npt

LARGEST_FILE = 8 * 2**30
LARGEST_WEIGHTS = 2 * 2**30
_MOST_MEMBERS = 20_000
_TYPES = {
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "<u2",  # the upper half of a float32
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
}
_PREFIX = "model."
_INDEX = ".attn.relative_position_index"
_FIRST = "swinViT.patch_embed.proj.weight"
# Two Gaussians of 0.33 and 0.165 of the radius: its labels, as factors of equation 2.
_LABEL = {"kind": "gaussian", "widths": [0.99, 0.495]}
_CHUNK = 64
_HALO = 8  # it overlaps windows by a quarter of 64, one half on each side

SizeIs = Literal["diameter", "radius"]


@dataclass(frozen=True)
class _Scale:
    """The size in working voxels that particles are brought to, what it measures, and who says so."""

    voxels: float
    measures: SizeIs
    source: str

    @property
    def radius(self) -> float:
        return self.voxels / 2 if self.measures == "diameter" else self.voxels


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    particle_voxels: float | None = None,
    measures: SizeIs | None = None,
    contrast: Literal["dark", "bright"] = "dark",
) -> Picker:
    """Return the picker in a checkpoint of tomoCPT (.ckpt); nothing in the file is executed.

    `particle_voxels` is the size in working voxels that its training brought particles to, and
    `measures` whether that is their "diameter" or their "radius"; both replace what the file says.
    `contrast` is how protein looked in training, which no checkpoint says. `name` goes into the
    provenance.

    Raises
    ------
    CheckpointError
        The file is no such checkpoint, names anything but tensors and settings, lacks a tensor or has one
        too many or of another shape, or does not say what its target size means.
    """
    path = Path(path)
    found = _Checkpoint(path)
    top = found.top
    weights, buffers = _split(found.state(), path.name)
    architecture = architecture_of(
        {key: tuple(value.shape) for key, value in (weights | buffers).items()}, path.name
    )
    network = build_network(architecture)
    fill_network(network, weights, path.name)
    _check_buffers(network, buffers, path.name)
    settings = top.get("hyper_parameters")
    _refuse_other_modes(settings, path.name)
    scale = _scale(settings, path.name, particle_voxels, measures)
    edge = _window(settings, path.name)
    metadata = picker_metadata(
        architecture,
        window=Window((edge, edge, edge), (_HALO, _HALO, _HALO)),
        particle_radius=scale.radius,
        contrast=contrast,
        label=_LABEL,
        resampling="tomocpt",
        provenance={
            "name": name or path.stem,
            "imported_from": path.name,
            "sha256": found.sha256(),
            "program": "tomoCPT",
            "pytorch_lightning": _text(top.get("pytorch-lightning_version")),
            "epoch": _number(top.get("epoch")),
            "step": _number(top.get("global_step")),
            "scale": {"voxels": scale.voxels, "measures": scale.measures, "source": scale.source},
            "trained_on_lengths": _text(_setting(settings, "config", "prepData", "particle_length_ang")),
            "contrast": "as stated on import; the file does not say",
        },
    )
    return Picker(network, metadata)


def architecture_of(shapes: Mapping[str, tuple[int, ...]], address: str) -> dict[str, Any]:
    """Return the architecture that tensors of these names (MONAI's) and shapes belong to.

    Raises CheckpointError where they belong to no SwinUNETR.
    """
    try:
        depths = [
            len({key.split(".")[4] for key in shapes if key.startswith(f"swinViT.layers{stage}.0.blocks.")})
            for stage in (1, 2, 3, 4)
        ]
        first = [f"swinViT.layers{stage}.0.blocks.0.attn" for stage in (1, 2, 3, 4)]
        feature_size = shapes[_FIRST][0]
        heads = [shapes[f"{name}.relative_position_bias_table"][1] for name in first]
        window = (round(shapes[f"{first[0]}.relative_position_bias_table"][0] ** (1 / 3)) + 1) // 2
    except (KeyError, IndexError) as error:
        raise refusal(
            address, f"no tensor {error}", "the weights of a SwinUNETR, the only network of tomoCPT"
        ) from error
    # What is built is bounded before it is built: a checkpoint may claim any size in a few bytes.
    within = 1 <= feature_size <= 48 and 2 <= window <= 10 and max(depths) <= 4 and max(heads) <= 48
    if not within or min(depths + heads) < 1:
        raise refusal(
            address,
            f"weights of {feature_size} features, windows of {window}, depths {depths} and heads {heads}",
            "at most 48 features, windows of 2 to 10, depths of 1 to 4 and heads of 1 to 48",
        )
    return named_architecture("paper") | {
        "feature_size": feature_size,
        "window": window,
        "depths": depths,
        "num_heads": heads,
        "use_v2": any(key.startswith("swinViT.layers1c.") for key in shapes),
        "merging": LEGACY_MERGING,
    }


class _Checkpoint:
    """A zip file of torch.save, read within bounds: only stored members, no more than they say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = path.name
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise refusal(
                    self.address, f"{path.stat().st_size} bytes", f"a file of at most {LARGEST_FILE} bytes"
                )
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"no file at {path}", expected="a checkpoint (.ckpt)", remedy="check the path"
            ) from error
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise refusal(
                self.address, f"no zip file in it ({error})", "a checkpoint that torch.save wrote"
            ) from error
        if len(members) > _MOST_MEMBERS:
            raise refusal(self.address, f"{len(members)} members", f"at most {_MOST_MEMBERS}")
        self.members = {member.filename: member for member in members}
        pickles = [name for name in self.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(members) != len(self.members):
            raise refusal(self.address, f"{len(pickles)} pickles", "one data.pkl, and each member once")
        self.folder = pickles[0].split("/")[0]
        if self._read(f"{self.folder}/byteorder", 16, missing=b"little").strip() != b"little":
            raise refusal(self.address, "another order of bytes", "little-endian numbers")
        top = read_pickle(self._read(pickles[0], LARGEST_PICKLE), self.address)
        if not isinstance(top, dict):
            raise refusal(self.address, "no table at its top", "a Lightning checkpoint")
        self.top: dict[Any, Any] = top

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of its state_dict; floating ones as float32."""
        table = self.top.get("state_dict")
        if not isinstance(table, dict) or not table:
            raise refusal(self.address, "no state_dict", "a Lightning checkpoint with weights")
        state: dict[str, torch.Tensor] = {}
        taken = 0
        for key, value in table.items():
            if not isinstance(key, str):
                raise refusal(self.address, f"a tensor whose name is a {type(key).__name__}", "text")
            if key.startswith("teacher."):
                continue  # the other network of a distillation
            state[key] = torch.from_numpy(self._tensor(value, key))
            taken += state[key].nbytes
            if taken > LARGEST_WEIGHTS:
                raise refusal(self.address, f"over {taken} bytes of weights", f"at most {LARGEST_WEIGHTS}")
        return state

    def sha256(self) -> str:
        """Return the hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _tensor(self, value: Any, key: str) -> npt.NDArray[Any]:
        if isinstance(value, Standin) and value.name == "torch._utils._rebuild_parameter" and value.arguments:
            value = value.arguments[0]
        broken = refusal(
            self.address, f"{key[:200]!r} that is no whole tensor", "tensors that torch.save wrote"
        )
        if not isinstance(value, Standin) or value.name != "torch._utils._rebuild_tensor_v2":
            raise broken
        if len(value.arguments) < 4 or not isinstance(value.arguments[0], Persistent):
            raise broken
        (offset, size, stride), identity = value.arguments[1:4], value.arguments[0].identity
        if not isinstance(identity, tuple) or len(identity) != 5 or not isinstance(identity[1], Standin):
            raise broken
        _, kind, member, _, elements = identity
        if kind.name not in _TYPES or not isinstance(member, str) or not isinstance(size, tuple):
            raise broken
        numbers = [offset, elements, *size]
        if len(size) > 8 or any(type(n) is not int or not 0 <= n < 2**31 for n in numbers):
            raise broken
        # Only whole tensors in C order: with other strides a small storage could claim any size.
        count = math.prod(size)
        if stride != tuple(math.prod(size[axis + 1 :]) for axis in range(len(size))) or (
            offset + count > elements
        ):
            raise broken
        dtype = np.dtype(_TYPES[kind.name])
        data = self._read(f"{self.folder}/data/{member}", LARGEST_WEIGHTS)
        if len(data) != elements * dtype.itemsize:
            raise broken
        values = np.frombuffer(data, dtype, count, offset * dtype.itemsize).reshape(size)
        if kind.name == "torch.BFloat16Storage":
            return (values.astype("<u4") << 16).view("<f4")
        return values.astype("<i8" if dtype.kind == "i" else "<f4")

    def _read(self, name: str, limit: int, missing: bytes | None = None) -> bytes:
        member = self.members.get(name)
        if member is None:
            if missing is not None:
                return missing
            raise refusal(self.address, f"no member {name[:200]!r}", "each storage that the pickle names")
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not stored or member.file_size > limit:
            raise refusal(
                self.address,
                f"a member {name[:200]!r} of {member.file_size} bytes, packed in {member.compress_size}",
                f"at most {limit} bytes, stored as they are",
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member)
        except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
            raise refusal(
                self.address, f"a damaged member {name[:200]!r} ({error})", "a whole file"
            ) from error


def _split(
    state: Mapping[str, torch.Tensor], address: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the parameters and the position indices of the network, by MONAI's names."""
    heads = [key for key in state if key.startswith(("rotation_head.", "contrastive_head."))]
    if heads:
        raise refusal(
            address,
            f"the weights of a self-supervised run ({heads[0]})",
            "those of a picking run; the last layer of this one has learnt nothing of particles",
        )
    surplus = sorted(key for key in state if not key.startswith(_PREFIX))
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise refusal(
            address,
            f"{len(surplus)} tensors that belong to no network ({', '.join(surplus[:3])[:300]}{more})",
            f"names that begin with {_PREFIX!r}",
        )
    named = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    buffers = {key: value for key, value in named.items() if key.endswith(_INDEX)}
    return {key: value for key, value in named.items() if key not in buffers}, buffers


def _check_buffers(network: torch.nn.Module, found: Mapping[str, torch.Tensor], address: str) -> None:
    """Refuse other indices of relative positions than ours: biases would be read at other places."""
    wanted = {key: value for key, value in network.named_buffers() if key.endswith(_INDEX)}
    wrong = sorted(
        key
        for key in wanted.keys() | found.keys()
        if key not in wanted or key not in found or not torch.equal(wanted[key], found[key])
    )
    if wrong:
        raise refusal(
            address,
            f"{len(wrong)} missing, unknown or other indices of relative positions ({wrong[0]})",
            "those of MONAI for the window of the network",
        )


def _refuse_other_modes(settings: Any, address: str) -> None:
    mode = _setting(settings, "config", "train", "mode")
    if isinstance(mode, str) and "self" in mode.lower():
        raise refusal(address, f"a run of the mode {mode[:80]!r}", "one of the mode 'picking'")


def _scale(settings: Any, address: str, voxels: float | None, measures: SizeIs | None) -> _Scale:
    """Return what the target size is and means; the file decides unless the caller does."""
    source = "stated on import"
    if voxels is None:
        stored = _setting(settings, "config", "prepData", "desired_particle_pixel_size")
        voxels = _number(stored)
        source = "the file"
    if voxels is None:
        raise CheckpointError(
            f"{address} does not say to how many voxels it brings a particle",
            expected="the setting desired_particle_pixel_size",
            remedy="pass --particle-voxels and --size-is (the paper: 10 and radius)",
        )
    if not 2 <= voxels <= 200:
        raise refusal(address, f"a particle of {voxels:g} voxels", "2 to 200 voxels")
    if measures is None:
        measures = _era(settings)
        source += "; its meaning from the settings that its version knew"
    if measures is None:
        raise CheckpointError(
            f"{address} does not say whether its {voxels:g} voxels are a radius or a diameter",
            expected="settings that only one generation of the program had",
            remedy="pass --size-is radius (versions before August 2025) or --size-is diameter",
        )
    return _Scale(voxels, measures, source)


def _era(settings: Any) -> SizeIs | None:
    """Return what the target size measures; settings came and went together with its meaning."""
    if _setting(settings, "config", "train", "n_cpus_for_preprocessing") is not None:
        return "diameter"
    old = (("train", "n_cpus_for_train"), ("infer", "oversubscribe_factor"))
    return "radius" if any(_setting(settings, "config", *keys) is not None for keys in old) else None


def _window(settings: Any, address: str) -> int:
    stored = _setting(settings, "config", "train", "CHUNK_SIZE")
    stored = _setting(settings, "constants_dict", "CHUNK_SIZE") if stored is None else stored
    edge = _CHUNK if stored is None else stored
    if type(edge) is not int or edge % 32 or not 32 <= edge <= 256:
        raise refusal(address, "windows that no network sees", "a multiple of 32 up to 256")
    if stored is None:
        warnings.warn(f"{address} does not say its window: {_CHUNK} voxels taken", stacklevel=3)
    return edge


def _setting(node: Any, *names: str) -> Any:
    """Return a setting by its path through tables and stand-ins, or None; an enum by its value."""
    for name in names:
        if isinstance(node, Standin):
            node = (node.state if isinstance(node.state, dict) else {}) | node.items
        node = node.get(name) if isinstance(node, dict) else None
    enum = isinstance(node, Standin) and len(node.arguments) == 1 and node.state is None and not node.items
    return node.arguments[0] if isinstance(node, Standin) and enum else node


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and -1e15 < value < 1e15 else None


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None
