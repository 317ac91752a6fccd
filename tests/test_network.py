from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.network import (
    ARCHITECTURES,
    LegacyMerging,
    build_network,
    bytes_per_window,
    named_architecture,
    place,
    start_quiet,
)

TINY = named_architecture("small") | {"depths": [1, 1, 1, 1]}


def test_network_answers_logits_of_the_same_shape() -> None:
    torch.manual_seed(0)
    network = build_network(TINY).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 1, 64, 64, 64))
    assert logits.shape == (2, 1, 64, 64, 64)
    # Logits, not scores: an untrained network answers on both sides of zero.
    assert logits.min() < 0 < logits.max()


def test_named_architectures_have_the_sizes_that_are_stated() -> None:
    networks = {name: build_network(architecture) for name, architecture in ARCHITECTURES.items()}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert sizes["paper"] == 41_021_155
    # The shipped picker's file stays under 25 MB in float32.
    assert 4 * sizes["small"] < 25e6


def test_named_architecture_is_a_copy() -> None:
    named_architecture("small")["feature_size"] = 48
    assert named_architecture("small")["feature_size"] == 12


def test_start_quiet_lowers_the_first_answers() -> None:
    torch.manual_seed(0)
    network = build_network(TINY)
    start_quiet(network, confidence=0.02)
    bias = network.get_parameter("out.conv.conv.bias")
    np.testing.assert_allclose(torch.sigmoid(bias).detach(), 0.02, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_size": 13}, "divisible by 12"),
        ({"network": "UNet"}, "UNet"),
        ({"merging": "legacy"}, "legacy"),
        ({"extra": 1}, "extra"),
        ({"depths": [2]}, "four numbers"),
        ({"num_heads": [0, 6, 12, 24]}, "no network"),
        ({"feature_size": "many"}, "no network"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_network(TINY | change)


def test_missing_keys_and_unknown_names_are_named() -> None:
    with pytest.raises(CheckpointError, match="window"):
        build_network({key: value for key, value in TINY.items() if key != "window"})
    with pytest.raises(CheckpointError, match="'huge'"):
        named_architecture("huge")


@pytest.mark.parametrize("edges", [(4, 4, 4), (5, 3, 7)])
def test_the_older_merging_takes_two_corners_twice_and_two_never(edges: tuple[int, int, int]) -> None:
    merging = LegacyMerging(2)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    features = torch.randn(1, *edges, 2, requires_grad=True)
    answer = merging(features)
    halves = [-(-edge // 2) for edge in edges]
    assert answer.shape == (1, *halves, 4)
    answer.square().sum().backward()
    assert features.grad is not None
    corner = features.grad[0, :2, :2, :2].abs().sum(dim=-1)
    never = [tuple(place) for place in (corner == 0).nonzero().tolist()]
    assert never == [(0, 1, 1), (1, 1, 0)]


@pytest.mark.parametrize("shape", [(64, 64, 64), (32, 32, 64)])
def test_bfloat16_gradients_are_the_same_each_time(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = place(build_network(TINY), torch.device("cpu"))
    voxels = torch.randn(1, 1, *shape)

    def gradient() -> torch.Tensor:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(voxels)
        answer.float().square().mean().backward()
        # Memory that is given back full of NaN shows in a gradient that is never written.
        del answer
        torch.full((10**6,), float("nan"))
        return torch.cat([value.grad.flatten() for value in network.parameters() if value.grad is not None])

    first = gradient()
    assert torch.isfinite(first).all()
    assert all(torch.equal(first, gradient()) for _ in range(3))


def test_bytes_grow_with_window_and_features() -> None:
    small, paper = ARCHITECTURES["small"], ARCHITECTURES["paper"]
    assert bytes_per_window(small, (96, 96, 96)) > 3 * bytes_per_window(small, (64, 64, 64))
    assert bytes_per_window(paper, (64, 64, 64)) > 2 * bytes_per_window(small, (64, 64, 64))
