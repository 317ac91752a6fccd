"""Template matching with a true map: locally normalised cross-correlation, one rotation after the other.

The template is what the microscope makes of the map: a point is imaged and reconstructed as a phantom is
(tilts, contrast transfer, weighted back-projection), and the map, turned, is convolved with it. Template
and tomogram are whitened by the tomogram's own spectrum, which is how a matched filter treats noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft

from tomocpt_stream import Picks, find_peaks
from tomocpt_stream.imaging import ImagingOptions, back_project, expose, plan_geometry, project

if TYPE_CHECKING:
    from tomocpt_stream.shapes import Template

Field = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

_EDGE = 1.0  # voxels of the mask beyond the particle's farthest point
_FLAT = 0.2  # of the usual local deviation: below, a place has nothing to correlate with


@dataclass(frozen=True, eq=False)
class Matched:
    """The best correlation of each voxel (z, y, x), from -1 to 1, and the row of `rotations` that gave it."""

    scores: Field
    best: npt.NDArray[np.int32]
    rotations: Array

    def picks(self, *, voxel_size: float, diameter: float, name: str) -> Picks:
        """Return all peaks above 0 at least 0.75 diameters apart, with their rotations."""
        peaks = find_peaks(self.scores, threshold=0.0, min_distance=0.75 * diameter / voxel_size)
        places = np.clip(np.rint(peaks.zyx).astype(np.intp), 0, np.array(self.scores.shape) - 1)
        turned = self.rotations[self.best[tuple(places.T)]]
        return Picks(peaks.zyx, peaks.score, rotations=turned, voxel_size=voxel_size, tomogram=name)


def match_template(
    volume: Field,
    template: Template,
    rotations: Array,
    *,
    voxel_size: float,
    imaging: ImagingOptions,
) -> Matched:
    """Correlate a tomogram (z, y, x) with a template turned by each of `rotations` (n, 3, 3).

    The score of a voxel is the correlation of its surroundings, a ball that holds the particle, with the
    template there. The ball's mean is taken off both, and its deviation divided out. Torch's threads are
    used, and the GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reach = math.ceil(template.radius / voxel_size + _EDGE)
    # Voxels behind the far face part the two ends of an axis, which meet in a Fourier transform.
    shape = tuple(fft.next_fast_len(n + reach, real=True) for n in volume.shape)
    padded = np.pad(volume, [(0, s - n) for s, n in zip(shape, volume.shape, strict=True)], mode="reflect")
    spectrum = torch.fft.rfftn(torch.from_numpy(padded - padded.mean()).to(device))
    box = fft.next_fast_len(4 * reach, real=True)
    transfer = _transfer(imaging, box, voxel_size)
    power = _radial_power(spectrum, shape)
    spectrum *= torch.from_numpy(_whitening(power, shape)).to(device)
    whitened = torch.from_numpy(transfer * _whitening(power, (box,) * 3)).to(device)

    ball = _ball(box, template.radius / voxel_size + _EDGE, device)
    mask = torch.fft.rfftn(_place(ball, shape)).conj()
    count = float(ball.sum())
    white = torch.fft.irfftn(spectrum, s=shape)
    mean = torch.fft.irfftn(spectrum * mask, s=shape) / count
    square = torch.fft.irfftn(torch.fft.rfftn(white * white) * mask, s=shape) / count
    deviation = (square - mean**2).clamp_min(0).sqrt()
    least = max(_FLAT * float(deviation.median()), 1e-12)  # nothing matches in a constant volume
    deviation = deviation.clamp_min(least) * math.sqrt(count)
    del white, mean, square, mask

    turner = _Turner(template, box, voxel_size, device)
    best = torch.full(shape, -math.inf, device=device)
    which = torch.zeros(shape, dtype=torch.int32, device=device)
    for index, rotation in enumerate(rotations):
        seen = torch.fft.irfftn(torch.fft.rfftn(turner.turned(rotation)) * whitened, s=(box,) * 3)
        seen = (seen - (seen * ball).sum() / count) * ball
        seen /= seen.norm()
        answer = torch.fft.irfftn(spectrum * torch.fft.rfftn(_place(seen, shape)).conj(), s=shape)
        better = answer > best
        which.masked_fill_(better, index)
        torch.maximum(best, answer, out=best)
    inner = tuple(slice(0, n) for n in volume.shape)
    scores = (best / deviation)[inner].contiguous().cpu().numpy()
    return Matched(scores, which[inner].cpu().numpy(), rotations)


class _Turner:
    """Samples a template, turned about its centre of mass, in a box of working voxels, on a device."""

    def __init__(self, template: Template, box: int, voxel_size: float, device: torch.device) -> None:
        self._density = torch.from_numpy(template.density)[None, None].to(device)
        axis = torch.arange(box, device=device, dtype=torch.float32) - box // 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        self._points = torch.stack([x, y, z], dim=-1) * (voxel_size / template.pitch)
        self._centre = torch.tensor(template.centre[::-1], device=device, dtype=torch.float32)
        # grid_sample counts from -1 at the first voxel to 1 at the last.
        self._scale = 2 / (torch.tensor(template.density.shape[::-1], device=device) - 1)

    def turned(self, rotation: Array) -> torch.Tensor:
        """Return the density (z, y, x), its centre of mass at the voxel box // 2 of each axis."""
        back = torch.from_numpy(rotation.astype(np.float32)).to(self._points.device)
        grid = (self._points @ back + self._centre) * self._scale - 1  # row @ R is R transposed @ column
        sampled = torch.nn.functional.grid_sample(self._density, grid[None], align_corners=True)
        return sampled[0, 0]


def _transfer(imaging: ImagingOptions, box: int, voxel_size: float) -> npt.NDArray[np.complex64]:
    """Return the transform (half space) of the image of a point at the origin of a box."""
    options = replace(imaging, snr=math.inf)
    geometry = plan_geometry(options, (box, box, box), voxel_size, 0)
    nz, ny, nx = (box + 2 * pad for pad in geometry.pad)
    slab = np.zeros((nz, nx, ny), dtype=np.float32)
    slab[tuple(pad + box // 2 for pad in (geometry.pad[0], geometry.pad[2], geometry.pad[1]))] = 1
    images, _ = expose(project(slab, options, geometry.width), options, geometry, np.random.default_rng(0))
    point = back_project(images, options, geometry)
    transformed: npt.NDArray[np.complex64] = fft.rfftn(np.fft.ifftshift(point)).astype(np.complex64)
    return transformed if imaging.contrast == "dark" else -transformed


def _frequency(shape: tuple[int, ...]) -> Field:
    """Return the frequency (cycles a voxel) of each element of a half space."""
    axes = [fft.fftfreq(n) for n in shape[:-1]] + [fft.rfftfreq(shape[-1])]
    squares = np.meshgrid(*(axis**2 for axis in axes), indexing="ij", sparse=True)
    frequency: Field = np.sqrt(sum(squares)).astype(np.float32)
    return frequency


def _radial_power(spectrum: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """Return the mean power in 64 shells from frequency 0 to that of a cube's corner."""
    shell = np.rint(_frequency(shape) * 72).astype(np.intp).ravel()
    power = (spectrum.abs() ** 2).cpu().numpy().ravel()
    mean: Array = np.bincount(shell, power) / np.maximum(1, np.bincount(shell))
    return mean


def _whitening(power: Array, shape: tuple[int, ...]) -> Field:
    """Return the gains (half space) that make a spectrum of this power flat; none at frequency 0."""
    level = np.maximum(power, max(1e-6 * power.max(), 1e-30))
    gains = 1 / np.sqrt(np.interp(_frequency(shape) * 72, np.arange(len(level)), level))
    gains *= math.sqrt(float(np.median(level)))
    gains.flat[0] = 0
    return gains.astype(np.float32)


def _ball(box: int, radius: float, device: torch.device) -> torch.Tensor:
    """Return 1 within `radius` voxels of the voxel box // 2, and 0 elsewhere."""
    axis = torch.arange(box, device=device, dtype=torch.float32) - box // 2
    squares = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    return (squares.sqrt() <= radius).float()


def _place(piece: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return zeros with a piece (cube) whose middle lies at the origin; what does not fit is cut."""
    whole = torch.zeros(shape, device=piece.device)
    middle = piece.shape[0] // 2
    sides = [min(middle, (n - 1) // 2) for n in shape]
    own = tuple(slice(middle - side, middle + side + 1) for side in sides)
    part = piece[own]
    whole[: part.shape[0], : part.shape[1], : part.shape[2]] = part
    return torch.roll(whole, [-side for side in sides], dims=(0, 1, 2))
