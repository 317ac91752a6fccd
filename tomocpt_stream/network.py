"""The network: MONAI's SwinUNETR-V2 from an architecture that is plain data.

One channel of normalised intensities in, one channel of logits out, edges in multiples of 32 voxels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.memory import ask_for_huge_pages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COMMON: dict[str, Any] = {
    "network": "SwinUNETR",
    "use_v2": True,
    "merging": "merging",
    "depths": [2, 2, 2, 2],
    "num_heads": [3, 6, 12, 24],
}
# "paper": section 2.2 with the drop rates of its program; 41 million parameters. "small": 4.6 million;
# 4 divides every stage's grid (32, 16, 8, 4), where a window of 7 pads 32 to 35.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "paper": _COMMON
    | {
        "feature_size": 36,
        "window": 7,
        "drop_rate": 0.15,
        "attention_drop_rate": 0.15,
        "path_drop_rate": 0.05,
    },
    "small": _COMMON
    | {"feature_size": 12, "window": 4, "drop_rate": 0.0, "attention_drop_rate": 0.0, "path_drop_rate": 0.0},
}
_LAST_BIAS = "out.conv.conv.bias"
_KEYS = frozenset(ARCHITECTURES["paper"])

# Bytes at the peak of one inference, per feature channel and voxel of the window; see `bytes_per_window`.
_FEATURE_MAPS = 10.0
_ATTENTION_MAPS = 3.0


class LegacyMerging(nn.Module):
    """Joins each 2 x 2 x 2 voxels of a feature map (n, z, y, x, c) into one of 2c, as MONAI up to 1.4 did.

    That order takes two of the eight corners twice and two never, so that its weights cannot be
    reordered into those of later versions: names and shapes are the same, the answers are not.
    """

    CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))

    def __init__(
        self, dim: int, norm_layer: type[nn.LayerNorm] = nn.LayerNorm, spatial_dims: int = 3
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ValueError(f"{spatial_dims} dimensions; the merging is of 3")
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the merged map; odd edges are padded with a plane of zeros at their end."""
        z, y, x = (n % 2 for n in features.shape[1:4])
        padded = nn.functional.pad(features, (0, 0, 0, x, 0, y, 0, z))
        corners = [padded[:, i::2, j::2, k::2] for i, j, k in self.CORNERS]
        merged: torch.Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged


LEGACY_MERGING = "monai-1.4"
_MERGINGS: dict[str, Any] = {"merging": "merging", LEGACY_MERGING: LegacyMerging}


def named_architecture(name: str) -> dict[str, Any]:
    """Return a copy of the architecture called `name`: "paper" or "small"."""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {name!r}", expected=" or ".join(ARCHITECTURES), remedy="choose one of these names"
        )
    return dict(ARCHITECTURES[name])


def build_network(architecture: Mapping[str, Any]) -> nn.Module:
    """Return the network of an architecture, with fresh weights and logits as its answer.

    Keys: "network" ("SwinUNETR"), "feature_size" (a multiple of 12), "window" (edge of an attention
    window), "depths" and "num_heads" (four numbers each), "use_v2", "merging" ("merging": the order of
    MONAI 1.5 and later; LEGACY_MERGING: that of earlier ones), "drop_rate", "attention_drop_rate",
    "path_drop_rate".

    Raises CheckpointError where a key is missing or unknown, or a value builds no network.
    """
    _check(architecture)
    ask_for_huge_pages()
    try:
        network = SwinUNETR(
            in_channels=1,
            out_channels=1,
            feature_size=architecture["feature_size"],
            window_size=architecture["window"],
            depths=tuple(architecture["depths"]),
            num_heads=tuple(architecture["num_heads"]),
            drop_rate=architecture["drop_rate"],
            attn_drop_rate=architecture["attention_drop_rate"],
            dropout_path_rate=architecture["path_drop_rate"],
            use_v2=architecture["use_v2"],
            downsample=_MERGINGS[architecture["merging"]],
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"an architecture that builds no network ({error})",
            expected="sizes that fit one another, such as those of 'small'",
            remedy="correct the architecture, or take the picker's file from its source again",
        ) from error
    deepest = ["encoder10", "decoder5"] + ["swinViT.layers4c.0"] * bool(architecture["use_v2"])
    for name in deepest:
        _keep_float32(network.get_submodule(name))
    return network


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, its convolutions channels last, as a GPU's are fastest."""
    moved: nn.Module = network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return moved


def start_quiet(network: nn.Module, *, confidence: float = 0.02) -> None:
    """Set the last bias so that an untrained network answers about `confidence` everywhere.

    Background is most of any label; a network that starts at 0.5 spends its first steps on that.
    """
    with torch.no_grad():
        network.get_parameter(_LAST_BIAS).fill_(math.log(confidence / (1 - confidence)))


def shift_answers(network: nn.Module, logits: float) -> None:
    """Add a constant to every logit; the order of all scores stays."""
    with torch.no_grad():
        network.get_parameter(_LAST_BIAS).add_(logits)


def bytes_per_window(architecture: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Return the bytes that one window of `shape` voxels needs at the peak of an inference, float32.

    The full-resolution decoder holds a fixed number of maps of feature_size channels: 7.5 in tensors,
    9.3 in resident memory with what oneDNN and the allocator keep at a batch of four, 10 taken here. The
    attention of the first stage, at half resolution, holds 2.7 matrices (tokens x window³ x heads, the
    grid padded up to whole attention windows), 3 taken here. The larger of both, plus input and scores.
    Measured by benchmarks/bench_network.py.
    """
    voxels = math.prod(shape)
    window = architecture["window"]
    tokens = math.prod(math.ceil(n / 2 / window) * window for n in shape)
    features = _FEATURE_MAPS * architecture["feature_size"] * voxels
    attention = _ATTENTION_MAPS * tokens * window**3 * architecture["num_heads"][0]
    return int(4 * (max(features, attention) + 2 * voxels))


def _keep_float32(block: nn.Module) -> None:
    """Take a block out of autocast.

    Where an edge is 2 voxels, oneDNN returns uninitialised memory as the bfloat16 gradient of the weights
    of a channels-last convolution (torch 2.13, AVX-512). The deepest blocks cost nothing in float32.
    """
    inner = block.forward

    def forward(*maps: torch.Tensor) -> torch.Tensor:
        with torch.autocast(maps[0].device.type, enabled=False):
            answer: torch.Tensor = inner(*(part.float() for part in maps))
            return answer

    block.forward = forward


def _check(architecture: Mapping[str, Any]) -> None:
    missing, unknown = sorted(_KEYS - set(architecture)), sorted(set(architecture) - _KEYS)
    if missing or unknown:
        raise CheckpointError(
            f"an architecture without {missing} and with unknown {unknown}",
            expected=f"the keys {sorted(_KEYS)}",
            remedy="use a newer version of the package, or take the picker's file from its source again",
        )
    for key, known in (("network", ["SwinUNETR"]), ("merging", list(_MERGINGS))):
        if architecture[key] not in known:
            raise CheckpointError(
                f"an architecture with {key} {architecture[key]!r}",
                expected=" or ".join(map(repr, known)),
                remedy="use a newer version of the package, or another picker",
            )
    for key in ("depths", "num_heads"):
        # MONAI builds a network of other lengths without a word, and fails at the first window.
        if len(architecture[key]) != 4:
            raise CheckpointError(
                f"an architecture with {key} {architecture[key]!r}",
                expected="four numbers, one for each stage",
                remedy="correct the architecture",
            )
