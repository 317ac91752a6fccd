"""The loss of the paper (section 2.3, equations 6 to 9), over the voxels whose truth is known."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia.filters import spatial_gradient3d


def loss_terms(
    answered: torch.Tensor, label: torch.Tensor, known: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted Huber term (equations 7 and 9) and the gradient term (equation 8).

    `answered` (after the sigmoid), `label` and `known` are (n, z, y, x). Both terms are means over the
    voxels of all crops; the gradient term is summed over the six second derivatives. The Huber delta is 1.
    Voxels that are not `known` (bool; None: all are) count nowhere: not in the means, not in the weights, and
    a derivative counts where every voxel that it is taken from is known.
    """
    sums = loss_sums(answered, label, known)
    return sums.weighted / sums.voxels.clamp(min=1), sums.gradient / sums.places.clamp(min=1)


class LossSums(NamedTuple):
    """Both terms of some crops before their means are taken, so that those of several devices add up.

    `weighted` is summed over `voxels` voxels, `gradient` over `places`.
    """

    weighted: torch.Tensor
    voxels: torch.Tensor
    gradient: torch.Tensor
    places: torch.Tensor


def loss_sums(answered: torch.Tensor, label: torch.Tensor, known: torch.Tensor | None = None) -> LossSums:
    """Return the sums that the means of `loss_terms` are taken from, and what they are summed over."""
    if known is None:
        known = torch.ones_like(label, dtype=torch.bool)
    pixel = F.huber_loss(answered, label, reduction="none")
    weighted = voxel_weights(label, known) * pixel
    # Derivatives are linear: those of the difference are the difference of both.
    derived = _derivatives((answered - label) * known)
    gradient = F.huber_loss(derived, torch.zeros_like(derived), reduction="none").sum(dim=1)
    # The stencils of all six lie in the 3 x 3 x 3 voxels about the middle, replicated at the faces.
    unknown = F.max_pool3d((~known).float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
    counted = unknown == 0
    return LossSums((weighted * known).sum(), known.sum(), (gradient * counted).sum(), counted.sum())


def voxel_weights(label: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weights of equation 9, by the counts of each crop; a crop of one kind weighs 1."""
    if known is None:
        known = torch.ones_like(label, dtype=torch.bool)
    positive = label > 0
    voxels = known.sum(dim=(1, 2, 3), keepdim=True)
    count = (positive & known).sum(dim=(1, 2, 3), keepdim=True)
    # A crop with no positive voxel has |N| = M³ and so weight 1; the other bound never divides by 0.
    weights = torch.where(positive, voxels / count.clamp(min=1), voxels / (voxels - count).clamp(min=1))
    return weights.to(label.dtype)


def _derivatives(values: torch.Tensor) -> torch.Tensor:
    """Return the six second derivatives (n, 6, z, y, x) of values (n, z, y, x), the mixed ones last.

    The mixed ones are sums and differences of four neighbours, not a quarter of them: so were they in the
    kornia of the paper, and up to 0.8; from 0.9 on it gives a quarter.
    """
    derived = _by_kornia(values)
    return torch.cat([derived[:, :3], derived[:, 3:] / _mixed_weight()], dim=1)


def _mixed_weight() -> float:
    """Return the weight of a neighbour in a mixed derivative of the kornia at hand."""
    point = torch.zeros(1, 3, 3, 3)
    point[0, 1, 1, 1] = 1
    return float(_by_kornia(point)[:, 3:].abs().max())


def _by_kornia(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        # kornia allocates its constant filters through a constructor that torch has marked as old.
        warnings.simplefilter("ignore", DeprecationWarning)
        derived: torch.Tensor = spatial_gradient3d(values.unsqueeze(1), mode="diff", order=2)
    return derived[:, 0]
