"""The page of the look-alikes' benchmark: tables with the aims beside the figures, curves, bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from sim10a_lessons import Lesson
from sim10a_scenes import CLASSES, SEED

from tomocpt_stream import load_picker
from tomocpt_stream.whole import whole, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

Row = dict[str, Any]

RESOLVED = 0.05
"""Half of an interval's width, at most, for a difference to be seen."""

MEDIAN = 0.06
"""The paper's median distance in diameters."""

_ZERO = (
    "class", "Å", "recall", "95 %", "of", "picks", "precision against all", "recall of all", "threshold",
    "highest precision", "highest F1",
)  # fmt: skip
_TUNED = (
    "class", "lesson", "F1", "95 %", "aim", "reached", "threshold", "precision", "recall", "elsewhere",
    "F1 at 0.3", "95 %", "sim_val_1", "on its lessons", "median distance %", "mean %", "of",
)  # fmt: skip
_COST = (
    "class", "lesson", "voxel Å", "particles learnt from", "for validation", "of", "crops an epoch", "steps",
    "core s a step", "waited %", "core h to learn", "windows", "core s a window", "core h to pick",
)  # fmt: skip
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


def write_page(rows: Sequence[Row], head: Sequence[str], folder: Path) -> Path:
    """Write the page and the pictures that the rows suffice for into a folder; return the page's path."""
    zero, tuned = ([row for row in rows if row["part"] == part] for part in ("zero", "tuned"))
    lines = ["# Finding particles, and telling them from look-alikes", "", *head, ""]
    if zero:
        lines += ["## As it is, on sim_val_1", "", *zero_table(zero), ""]
    if tuned:
        lines += ["## Fine-tuned on sim_train_1, sim_train_2 and what else the lesson names", ""]
        lines += [*tuned_table(tuned), ""]
    lines += ["## What it costs", "", *cost_table(rows), ""]
    pictures = {"curves": _curves(rows)} | ({"bars": _bars(tuned)} if tuned else {})
    for name, figure in pictures.items():
        with whole(folder / f"{name}.png") as partial:
            figure.savefig(partial, dpi=110, format="png")
    page = folder / "page.md"
    write_whole(page, "\n".join(lines).rstrip() + "\n")
    return page


def zero_table(rows: Sequence[Row]) -> list[str]:
    """Return the recalls of each class at the precision that is asked for."""
    lines = _head(_ZERO, 1)
    for row in rows:
        of, best = str(row["truth"]), f"{row['f1']:.2f} at {row['f1_threshold']:.2f}"
        cells = [row["kind"], f"{CLASSES[row['kind']].diameter:g}"]
        if row["threshold"] is None:
            cells += ["never", "", of, "", "", "", ""]
        else:
            cells += [f"{row['recall']:.2f}", _between(row["interval"]), of, str(row["picks"])]
            cells += [f"{row[name]:.2f}" for name in ("precision", "recall_of_all", "threshold")]
        lines.append(_line([*cells, f"{row['highest_precision']:.2f}", best]))
    return [
        *lines,
        "",
        "Recall of the class at the lowest threshold where 0.8 of the picks are on any of the 92 particles, "
        "distractors included (never: no threshold has it); Wilson's interval. Highest F1: of the class "
        "alone, at the threshold that suits it best.",
    ]


def tuned_table(rows: Sequence[Row]) -> list[str]:
    """Return the figures of each lesson beside the aim of its class, and what they can resolve."""
    lines = _head(_TUNED, 2)
    for row in rows:
        aim = CLASSES[row["kind"]].aim
        elsewhere = row["f1_elsewhere"]
        lines.append(
            _line(
                [
                    row["kind"],
                    row["name"],
                    f"{row['f1']:.3f}",
                    _between(row["interval"]),
                    f"{aim:.2f}",
                    reached(row, aim),
                    *(f"{row[name]:.2f}" for name in ("threshold", "precision", "recall")),
                    "" if elsewhere is None else f"{elsewhere:.3f}",
                    f"{row['f1_calibrated']:.3f}",
                    _between(row["interval_calibrated"]),
                    f"{row['f1_of_tomograms']['sim_val_1']:.2f}",
                    f"{row['f1_learnt']:.2f}" if "f1_learnt" in row else "",
                    *(_percent(row[name]) for name in ("median_distance", "mean_distance")),
                    f"{row['truth']} in {row['tomograms']}",
                ]
            )
        )
    return [*lines, "", *_notes(rows)]


def cost_table(rows: Sequence[Row]) -> list[str]:
    """Return core time: what one step and one window took, and what the whole therefore takes."""
    lines = _head(_COST, 2)
    for row in rows:
        account = row.get("account", {})
        a_step, steps = account.get("step_core_seconds"), account.get("steps_in_all", 0)
        a_window = row["core_seconds"] / max(1, row["windows"])
        lines.append(
            _line(
                [
                    row["kind"],
                    row["name"],
                    *(
                        f"{account[name]:g}" if account else ""
                        for name in ("voxel_size", "learnt", "kept", "particles", "crops", "steps_in_all")
                    ),
                    f"{a_step:.1f}" if a_step else "",
                    _percent(row.get("waited")),
                    f"{a_step * steps / 3600:.2f}" if a_step else "",
                    str(row["windows"]),
                    f"{a_window:.2f}",
                    f"{row['core_seconds'] / 3600:.2f}",
                ]
            )
        )
    return [
        *lines,
        "",
        "Core seconds are those of all threads; a step has the share of the looks at the validation crops "
        "that fell to it. Waited: the share of a run's time in which the network had no crops. Particles "
        "near a cut may be in both parts or, in the gap, in none.",
    ]


def command(row: Row) -> str:
    """Return the command of a lesson, without where its files lie."""
    lesson = row["lesson"]
    words = [f"--only {row['kind']} --tomograms {row['tomograms'] - 1}"]
    words.append(f"--steps {lesson['steps']}" if lesson["steps"] else f"--epochs {lesson['epochs']}")
    for name, option in (("rate", "rate"), ("batch", "batch"), ("precision", "precision"), ("seed", "seed")):
        if lesson[name] != getattr(Lesson, name):
            words.append(f"--{option} {lesson[name]}")
    for name, option in (("radius", "radius"), ("average", "average"), ("more", "lessons")):
        words += [f"--{option} {lesson[name]:g}"] if lesson.get(name) else []
    words += [f"--{name}" for name in ("others", "validate") if lesson[name]]
    words += [] if lesson["picker"] == load_picker().fingerprint else ["--picker FILE"]
    changes = " ".join(f"{name}={value:g}" for name, value in lesson["augment"])
    words += [f"--augment {changes}"] if changes else []
    return f"bench_sim10a.py --part tuned {' '.join(words)}"


def reached(row: Row, aim: float) -> str:
    """Return whether an F1 reaches an aim: yes, no, or that its interval reaches as far."""
    if row["f1"] >= aim:
        return "yes"
    return "within the interval" if row["interval"][1] >= aim else "no"


def _notes(rows: Sequence[Row]) -> list[str]:
    wide = [row for row in rows if row["interval"][1] - row["interval"][0] > 2 * RESOLVED]
    far = [row for row in rows if row["median_distance"] is None or row["median_distance"] >= MEDIAN]
    told = f"A difference of {RESOLVED:g} can be told from chance in"
    near = f"the median distance is under {MEDIAN:.0%} of the diameter in"
    return [
        "F1 is the highest over the threshold, chosen on these tomograms; elsewhere: each tomogram at the "
        "threshold that is best for the others. Intervals are bootstraps over tomograms and, in each, over "
        "particles, at a fixed threshold; one that ends at 1 has seen no error to draw. Distances are of the "
        "pairs at the highest F1, in % of the diameter. On its lessons: the highest F1 on the two tomograms "
        "that every lesson has. Tomograms: sim_val_1, and others of the same make whose seeds count from "
        f"{SEED}. Each row is of a command of its own in the same folder:",
        "",
        *(f"- `{command(row)}`" for row in rows),
        "",
        f"{told} {_but(wide, rows)}; {near} {_but(far, rows)}.",
    ]


def _curves(rows: Sequence[Row]) -> Figure:
    """Draw precision over recall for each class, a line a lesson, and where F1 is at its aim."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows))
    for axis, kind in zip(figure.subplots(2, 3).flat, CLASSES.values(), strict=True):
        recall = np.linspace(kind.aim / (2 - kind.aim) + 1e-6, 1, 60)
        axis.plot(recall, kind.aim * recall / (2 * recall - kind.aim), ":", color="black", lw=1)
        for row in rows:
            if row["kind"] == kind.name and row["curve"]:
                zero = row["part"] == "zero"
                label = f"{row['name']}; precision against all" if zero else row["name"]
                colour = "black" if zero else _colour(names, row["name"])
                axis.plot(*np.transpose(row["curve"]), "--" if zero else "-", color=colour, label=label)
        axis.set(
            title=f"{kind.name} (dotted: F1 {kind.aim:g})",
            xlabel="recall of the class",
            ylabel="precision",
            xlim=(0, 1.02),
            ylim=(0, 1.02),
        )
    # One entry for each name: the classes have lessons in common.
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines() if line.get_label()}
    named = {name: line for name, line in lines.items() if not str(name).startswith("_")}
    figure.legend(named.values(), [str(name) for name in named], fontsize=7, loc="outside lower center")
    return figure


def _bars(rows: Sequence[Row]) -> Figure:
    """Draw F1 with its interval for each class and lesson; a line at the aim."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axis: Axes = figure.subplots()
    most = max(sum(row["kind"] == kind for row in rows) for kind in CLASSES)
    width = 0.8 / most
    for place, kind in enumerate(CLASSES.values()):
        axis.hlines(kind.aim, place - 0.45, place + 0.45, color="black", ls=":")
        own = [row for row in rows if row["kind"] == kind.name]
        for number, row in enumerate(own):
            at = place + (number - (len(own) - 1) / 2) * width
            axis.bar(at, row["f1"], 0.9 * width, color=_colour(names, row["name"]))
            axis.vlines(at, *row["interval"], color="black")
    for name in names:
        axis.bar(0, 0, color=_colour(names, name), label=name)
    axis.set(xticks=range(len(CLASSES)), xticklabels=list(CLASSES), ylabel="F1 (dotted: aim)", ylim=(0, 1.02))
    figure.legend(fontsize=7, loc="outside lower center")
    return figure


def _colour(names: Sequence[str], name: str) -> str:
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _head(columns: Sequence[str], words: int) -> list[str]:
    return [_line(columns), f"|{'---|' * words}{'---:|' * (len(columns) - words)}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _between(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f}–{interval[1]:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _but(some: Sequence[Row], rows: Sequence[Row]) -> str:
    """Return which rows are left when some are not."""
    listed = "; ".join(f"{row['kind']} ({row['name']})" for row in some)
    return "no row" if len(some) == len(rows) else f"all rows but {listed}" if some else "all rows"
