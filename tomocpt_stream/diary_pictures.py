"""Pictures of a training run: its curves, and what the network answers beside the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter

from tomocpt_stream.whole import whole

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

Volume = npt.NDArray[np.floating] | npt.NDArray[np.bool_]
Image = npt.NDArray[Any]

_CONTRAST = (0.5, 99.5)  # percentiles of the crop shown black and white
_HALF = 0.5  # the outline of a particle in label and answer
_COLOURS = {"label": "#56b4e9", "answer": "#ffb000"}
_UNKNOWN = ListedColormap(["#56b4e9"])
_TINT = 0.45
_LOSS, _VALIDATION, _RATE = "#0072b2", "#d55e00", "#009e73"
_BINS = 400  # points of the curve of the loss; one step's loss says little
_TITLES = ("intensities", "label", "answer")
_DPI = 100


class Look(Protocol):
    """A crop, its label and the network's answer, all (z, y, x); `known` is False where no truth is."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...

    @property
    def epoch(self) -> float:
        """Epochs done."""
        ...

    @property
    def voxels(self) -> npt.NDArray[np.floating]:
        """What the network saw."""
        ...

    @property
    def label(self) -> npt.NDArray[np.floating]:
        """What it should answer."""
        ...

    @property
    def answered(self) -> npt.NDArray[np.floating]:
        """What it answers, from 0 to 1."""
        ...

    @property
    def known(self) -> npt.NDArray[np.bool_] | None:
        """Where the label is the truth; None for everywhere."""
        ...


def draw_look(look: Look, path: Path) -> None:
    """Draw three orthogonal slices of intensities, label and answer as a PNG, which appears whole.

    They go through the particle nearest to the middle of the crop, or through the middle where the label
    is empty. Label and answer have the colours of 0 to 1 and are outlined at 0.5 in the intensities.
    """
    at = _through(look.label)
    z, y, x = look.label.shape
    figure = Figure(figsize=(9.6, 8.6 * 3 * max(y, z) / (2 * x + z) + 0.7), layout="constrained")
    rows = figure.subplots(3, 3, width_ratios=(x, x, z))
    low, high = _black_and_white(look.voxels)
    scale = Normalize(0, 1)
    for axes, volume, title in zip(rows, (look.voxels, look.label, look.answered), _TITLES, strict=True):
        for axis, across in zip(axes, range(3), strict=True):
            image = _cut(volume, across, at)
            if title == "intensities":
                axis.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower")
                _outline(axis, _cut(look.label, across, at), _COLOURS["label"])
                _outline(axis, _cut(look.answered, across, at), _COLOURS["answer"])
                axis.set_title(f"{'zyx'[across]} = {at[across]}", fontsize=9)
            else:
                axis.imshow(np.clip(image, 0, 1), cmap="magma", norm=scale, origin="lower")
            if look.known is not None:
                unknown = _cut(look.known, across, at) == 0
                tint = np.ma.masked_where(~unknown, np.zeros(unknown.shape))
                axis.imshow(tint, cmap=_UNKNOWN, alpha=_TINT, origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(title)
    figure.colorbar(ScalarMappable(scale, "magma"), ax=rows[1:, :], shrink=0.6)
    keys = [Patch(fill=False, edgecolor=colour, label=f"{key} 0.5") for key, colour in _COLOURS.items()]
    if look.known is not None and not np.all(look.known):
        keys.append(Patch(color=_UNKNOWN(0), alpha=_TINT, label="truth unknown"))
    figure.legend(handles=keys, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"step {look.step}, epoch {look.epoch:g}", x=0.02, ha="left", fontsize=11)
    _save(figure, path)


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Draw loss and validation loss over steps, and below them the learning rate, as a PNG.

    `table` has the columns step, loss, validation and learning_rate, one row a step. Beyond 400 steps the
    loss is drawn as means with the range that they are of.
    """
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, means, lows, highs = _binned(table["step"].to_numpy(float), table["loss"].to_numpy(float))
    upper.plot(steps, means, color=_LOSS, linewidth=1.2, label="loss")
    if len(steps) < len(table):
        upper.fill_between(steps, lows, highs, color=_LOSS, alpha=0.2, linewidth=0)
    validated = table[np.isfinite(table["validation"].to_numpy(float))]
    if len(validated):
        best = validated.loc[validated["validation"].idxmin()]
        upper.plot(
            validated["step"],
            validated["validation"],
            color=_VALIDATION,
            marker="." if len(validated) <= _BINS // 4 else "",
            label=f"validation, lowest {best['validation']:.4g} at step {best['step']:.0f}",
        )
        upper.plot([best["step"]], [best["validation"]], "o", color=_VALIDATION, markerfacecolor="none")
    upper.set_ylabel("loss")
    upper.legend(fontsize=9)
    lower.plot(table["step"], table["learning_rate"], color=_RATE)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axis, drawn in ((upper, table[["loss", "validation"]]), (lower, table[["learning_rate"]])):
        numbers = drawn.to_numpy(float)
        if (np.isfinite(numbers) & (numbers > 0)).any():  # a logarithm of nothing is a warning
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.grid(color="0.9", linewidth=0.8, which="both")
        axis.set_axisbelow(True)
    _save(figure, path)


def _through(label: npt.NDArray[np.floating]) -> tuple[int, int, int]:
    """Return the voxel that the slices go through."""
    middle = tuple(n // 2 for n in label.shape)
    inside = np.argwhere(label >= max(_HALF, 0.99 * float(label.max())))  # the peaks of a label
    if len(inside):
        away = ((inside - np.array(middle)) ** 2).sum(axis=1)
        middle = tuple(int(one) for one in inside[away.argmin()])
    return (middle[0], middle[1], middle[2])


def _cut(volume: Volume, across: int, at: tuple[int, int, int]) -> Image:
    """Return a slice as rows and columns: y and x, z and x, y and z."""
    image: Image = np.take(volume, at[across], axis=across)
    return image.T if across == 2 else image


def _black_and_white(voxels: npt.NDArray[np.floating]) -> tuple[float, float]:
    finite = voxels[np.isfinite(voxels)]
    low, high = (float(one) for one in np.percentile(finite, _CONTRAST)) if finite.size else (0.0, 0.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _outline(axis: Axes, image: Image, colour: str) -> None:
    if (image > _HALF).any() and (image < _HALF).any():  # an outline of nothing is a warning
        axis.contour(image, levels=[_HALF], colors=[colour], linewidths=1.2)


def _binned(
    steps: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return means of runs of steps and of their values, with the lowest and the highest value of each."""
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), _BINS), endpoint=False).astype(np.intp))
    if not len(starts):
        return (values,) * 4
    sizes = np.diff(starts, append=len(steps))
    return (
        np.add.reduceat(steps, starts) / sizes,
        np.add.reduceat(values, starts) / sizes,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=_DPI, format="png")
