"""The page of the paper's experiments: a table for each, and pictures after its figures 2 to 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from paper_experiments import candidates_at
from paper_scenes import PARTICLES, SceneSpec
from paper_scores import LEVELS

from tomocpt_stream import open_heatmap, open_tomogram
from tomocpt_stream.mask import inside
from tomocpt_stream.report import mean_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from paper_methods import Bench

Row = dict[str, Any]

COLOURS = {
    "shipped": "#0072b2",
    "gaussian labels": "#56b4e9",
    "binary labels": "#e69f00",
    "matching": "#009e73",
    "Gaussians": "#999999",
}
TITLES = {
    "rivals": "Simulated test tomogram sim_val_1",
    "labels": "Gaussian against binary labels (figure 2)",
    "tuning": "Zero-shot against fine-tuning (figure 3)",
    "crowded": "Rubisco in a shell (figure 6)",
    "mask": "Picking within a mask (figure 5)",
    "hard": "Harder cases",
}
_HEAD = (
    "| particle | Å | who | threshold | picks of | precision | recall | F1 | 95 % | F1 at 0.3 "
    "| median distance | mean | rotation ° | cpu s |"
)


_UNCHANGED = " (unchanged)"


@dataclass(frozen=True)
class Pages:
    """Writes tables and pictures into a folder."""

    bench: Bench
    folder: Path

    def write(self, rows: list[Row], head: Sequence[str]) -> Path:
        """Write the page of all rows that are there and the pictures that they suffice for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [*head, ""]
        for name, title in TITLES.items():
            own = [row for row in rows if row["experiment"] == name]
            if own:
                lines += [f"## {title}", "", *table(own), ""]
        if curves := sweep_table([row for row in rows if row["experiment"] == "tuning"]):
            lines += ["## Threshold sweep", "", *curves, ""]
        drawings: dict[str, Callable[[list[Row]], Figure | None]] = {
            "labels": self._labels,
            "tuning": self._tuning,
            "thresholds": _thresholds,
            "crowded": lambda own: self._slices([row for row in own if row["experiment"] == "crowded"]),
            "mask": lambda own: self._slices([row for row in own if row["experiment"] == "mask"]),
            "rivals": _bars,
            "hard": _noise,
        }
        for name, draw in drawings.items():
            figure = draw(rows)
            if figure is not None:
                temporary = self.folder / f".{name}.png"
                figure.savefig(temporary, dpi=110, format="png")
                temporary.replace(self.folder / f"{name}.png")
        page = self.folder / "page.md"
        temporary = page.with_suffix(".part")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(page)
        return page

    def _labels(self, rows: list[Row]) -> Figure | None:
        """Draw maps of both labels, and F1 and distances over the diameter."""
        own = [row for row in rows if row["experiment"] == "labels"]
        maps = [row for row in own if row["who"].endswith("labels")]
        if len(maps) < 2:
            return None
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        axes = figure.subplots(2, 2)
        for axis, row in zip(axes[0], maps[:2], strict=True):
            self._map(axis, row)
        _boxes(axes[1, 0], own, "f1_of_tomograms", "F1")
        _boxes(axes[1, 1], own, "distances", "distance / diameter")
        axes[1, 1].legend(fontsize=7)
        return figure

    def _tuning(self, rows: list[Row]) -> Figure | None:
        """Draw slices with picks by score, scores, F1 and distances."""
        own = [row for row in rows if row["experiment"] == "tuning"]
        own = [row for row in own if row["particle"] == own[0]["particle"]]
        nets = [row for row in own if _is_network(row)]
        if not nets:
            return None
        figure = Figure(figsize=(3.2 * max(3, len(nets)), 7), layout="constrained")
        grid = figure.add_gridspec(2, 6 * len(nets))
        for place, row in enumerate(nets):
            self._slice(figure.add_subplot(grid[0, 6 * place : 6 * place + 6]), row)
        third = 2 * len(nets)
        scores, f1, distances = (figure.add_subplot(grid[1, k * third : (k + 1) * third]) for k in range(3))
        for row in nets:
            scores.hist(row["scores"], bins=np.linspace(0, 1, 26).tolist(), histtype="step", label=row["who"])
        scores.set(xlabel="score", ylabel="candidates")
        scores.legend(fontsize=7)
        _boxes(f1, own, "f1_of_tomograms", "F1", by="who")
        _boxes(distances, own, "distances", "distance / diameter", by="who")
        return figure

    def _slices(self, rows: list[Row]) -> Figure | None:
        if not rows:
            return None
        figure = Figure(figsize=(4 * len(rows), 4.3), layout="constrained")
        for axis, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            self._slice(axis, row)
        return figure

    def _slice(self, axis: Axes, row: Row) -> None:
        """Show the slice with most particles of the first tomogram; circles are picks by score."""
        scene = self.bench.scene(SceneSpec(**row["scenes"][0]))
        tomogram, radius = scene.tomogram, row["diameter"] / 2 / scene.tomogram.voxel_size
        z = _busiest(scene.truth.zyx[:, 0], radius / 2)
        slab = slice(max(0, round(z - radius / 4)), min(tomogram.shape[0], round(z + radius / 4) + 1))
        image = mean_slice(tomogram, 0, slab)
        low, high = (float(value) for value in np.percentile(image, (1, 99)))
        axis.imshow(image, cmap="gray", vmin=low, vmax=high)
        picks = candidates_at(self.bench, row["candidates"][0]).above(row["threshold"])
        if row["experiment"] == "mask" and scene.mask is not None:
            picks = picks.take(inside(picks, str(scene.mask)))
            marks = mean_slice(open_tomogram(scene.mask), 0, slice(round(z), round(z) + 1))
            axis.contour(marks, levels=[0.5], colors="white", linewidths=0.7)
        near = np.abs(picks.zyx[:, 0] - z) < radius
        size = 2 * np.sqrt(np.maximum(radius**2 - (picks.zyx[near, 0] - z) ** 2, 0))
        circles = EllipseCollection(
            size, size, np.zeros(size.size), units="xy", offsets=picks.zyx[near][:, :0:-1], facecolors="none",
            cmap="turbo", offset_transform=axis.transData, linewidths=1.2,
        )  # fmt: skip
        circles.set_array(picks.score[near])
        circles.set_clim(0, 1 if _is_network(row) else float(max(picks.score.max(initial=0), 1e-6)))
        axis.add_collection(circles)
        axis.set(title=f"{row['who']}: F1 {row['f1']:.2f}", xticks=[], yticks=[])

    def _map(self, axis: Axes, row: Row) -> None:
        """Show the heat map of the first tomogram where most particles are."""
        heatmap = open_heatmap(str(self.bench.folder / "maps" / f"{row['candidates'][0]}.zarr"))
        scene = self.bench.scene(SceneSpec(**row["scenes"][0]))
        z = _busiest(scene.truth.zyx[:, 0], row["diameter"] / 4 / scene.tomogram.voxel_size)
        plane = round(z * scene.tomogram.voxel_size / heatmap.voxel_size)
        values: npt.NDArray[np.float32] = np.asarray(heatmap.array[min(plane, heatmap.shape[0] - 1)])
        axis.imshow(values, cmap="magma", vmin=0, vmax=1)
        axis.set(title=f"{row['who']}, {row['particle']}", xticks=[], yticks=[])


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a table."""
    lines = [_HEAD, "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        low, high = row["interval"]
        cells = [
            row["case"],
            f"{row['diameter']:g}",
            row["who"] + (_UNCHANGED if row.get("unchanged") else ""),
            f"{row['threshold']:.3f}",
            f"{row['picks']} of {row['truth']}",
            *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")),
            f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "",
            f"{row['shipped']['f1']:.3f}" if _is_network(row) else "",
            *(f"{100 * row[name]:.1f} %" for name in ("median_distance", "mean_distance")),
            "" if row["rotation_error"] is None else f"{row['rotation_error']:.0f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row.get("unchanged") for row in rows):
        lines += [
            "",
            f"{_UNCHANGED.strip()}: no epoch had a lower validation loss: it is the shipped picker.",
        ]
    return lines


def sweep_table(rows: list[Row]) -> list[str]:
    """Return precision, recall and F1 of the networks at thresholds from 0.1 to 0.9."""
    nets = [row for row in rows if _is_network(row)]
    if not nets:
        return []
    lines = [
        f"| particle | who | {' | '.join(f'{level:.1f}' for level in LEVELS)} |",
        "|---|---|" + "---|" * len(LEVELS),
    ]
    for row in nets:
        cells = [f"{at['precision']:.2f} / {at['recall']:.2f} / {at['f1']:.2f}" for at in row["levels"]]
        lines.append(f"| {row['case']} | {row['who']} | {' | '.join(cells)} |")
    return [*lines, "", "Precision / recall / F1."]


def _thresholds(rows: list[Row]) -> Figure | None:
    nets = [row for row in rows if row["experiment"] == "tuning" and _is_network(row)]
    if not nets:
        return None
    figure = Figure(figsize=(3.6 * len(nets), 3.4), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        curve = np.array(row["curve"])
        for column, name in enumerate(("precision", "recall", "F1"), start=1):
            axis.plot(curve[:, 0], curve[:, column], label=name)
        axis.axvline(0.3, color="black", lw=0.6, ls=":")
        axis.set(title=f"{row['case']}, {row['who']}", xlabel="threshold", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(fontsize=7)
    return figure


def _bars(rows: list[Row]) -> Figure | None:
    own = [row for row in rows if row["experiment"] == "rivals"]
    if not own:
        return None
    cases, names = (list(dict.fromkeys(row[key] for row in own)) for key in ("case", "who"))
    figure = Figure(figsize=(1.8 * len(cases) + 2, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, who in enumerate(names):
        values = {row["case"]: row["f1"] for row in own if row["who"] == who}
        at = [cases.index(case) + 0.8 * (place + 0.5) / len(names) - 0.4 for case in values]
        axis.bar(at, list(values.values()), 0.75 / len(names), label=who, color=_colour(who))
    axis.set(xticks=range(len(cases)), xticklabels=cases, ylabel="F1", ylim=(0, 1.02))
    axis.legend(fontsize=7, loc="lower left")
    return figure


def _noise(rows: list[Row]) -> Figure | None:
    own = [row for row in rows if row["experiment"] == "hard"]
    particles = list(dict.fromkeys(row["particle"] for row in own))
    if not own:
        return None
    figure = Figure(figsize=(3.8 * len(particles), 3.4), layout="constrained")
    for axis, particle in zip(figure.subplots(1, len(particles), squeeze=False)[0], particles, strict=True):
        some = [row for row in own if row["particle"] == particle]
        cases = list(dict.fromkeys(row["case"].split(", ", 1)[1] for row in some))
        for who in dict.fromkeys(row["who"] for row in some):
            values = [row["f1"] for row in some if row["who"] == who]
            axis.plot(range(len(values)), values, "o-", label=who, color=_colour(who))
        axis.set(title=particle, xticks=range(len(cases)), ylabel="F1", ylim=(0, 1.02))
        axis.set_xticklabels(cases, fontsize=7)
        axis.legend(fontsize=7)
    return figure


def _boxes(axis: Axes, rows: list[Row], key: str, title: str, *, by: str = "particle") -> None:
    """Draw a box of the values of each row, beside one another by particle (in order of size) or by name."""
    places = (
        sorted({row[by] for row in rows}, key=lambda p: PARTICLES[p].diameter) if by == "particle" else []
    )
    names = list(dict.fromkeys(row["who"] for row in rows))
    seen = set()
    for row in rows:
        share = 0.8 / len(names)
        at = (
            places.index(row[by]) + (names.index(row["who"]) + 0.5) * share - 0.4
            if places
            else names.index(row["who"])
        )
        colour, values = _colour(row["who"]), [v for v in row[key] if np.isfinite(v)]
        if values:
            box = axis.boxplot(
                values, positions=[at], widths=share * 0.9 if places else 0.6, patch_artist=True, sym=""
            )
            box["boxes"][0].set_facecolor(colour)
        if len(values) <= 10:
            axis.plot([at] * len(values), values, "o", color=colour, mec="black", mew=0.5, ms=4)
        axis.plot([], [], "s", color=colour, label=None if row["who"] in seen else row["who"])
        seen.add(row["who"])
    ticks = [f"{p}\n{PARTICLES[p].diameter:g} Å" for p in places] or names
    axis.set(ylabel=title, xticks=range(len(ticks)), ylim=(0, None))
    axis.set_xticklabels(ticks, fontsize=7, rotation=0 if places else 30)


def _busiest(values: npt.NDArray[np.float64], reach: float) -> float:
    """Return the value that has most others within `reach`."""
    counts = (np.abs(values[:, None] - values[None]) <= reach).sum(axis=1)
    return float(values[int(counts.argmax())])


def _is_network(row: Row) -> bool:
    return "start" in row["method"]


def _colour(who: str) -> str:
    return COLOURS.get(who, "#d55e00")
