"""`tomocpt-stream evaluate`: picks against truth, as a table, a JSON file, a curve and its picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import FormatError, PlanError
from tomocpt_stream.options import LENGTH, one_or_all, tomograms_option
from tomocpt_stream.terminal import count, print_table, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pandas as pd

    from tomocpt_stream.curves import Interval, Ranking
    from tomocpt_stream.evaluation import Evaluation, Match
    from tomocpt_stream.picks import Picks

_FILES = ("evaluation.json", "curve.csv", "curve.png")
_NAME = "{tomogram}"
_FEW = 10  # tomograms below which an interval is said to rest on few


@click.command("evaluate", short_help="Compare picks with a truth.")
@click.argument("picks", metavar="PICKS")
@click.argument("truth", metavar="TRUTH")
@click.option(
    "--diameter", type=LENGTH, required=True, metavar="Å", help="Longest axis of the particle in Å."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="Å",
    help="Largest distance of a pick from its particle in Å.  [default: half the diameter]",
)
@click.option(
    "--threshold",
    type=float,
    help="Only picks of a higher score count.  [default: all of them]",
)
@click.option("--sweep", is_flag=True, help="Evaluate at the threshold of the highest F.")
@click.option(
    "--percentiles",
    is_flag=True,
    help="Thresholds of the curve: percentiles 2 to 98 (step 8) of the scores.  [default: every score]",
)
@click.option(
    "--beta", type=LENGTH, default=1.0, help="Recall counts so many times as much as precision in F."
)
@click.option(
    "--mask",
    metavar="FILE",
    help="Picks and particles count where it is not 0; {tomogram} in it stands for the name of each.",
)
@click.option("--particle", metavar="NAME", help="Only this kind (or STAR class), and what names none.")
@click.option("--voxel-size", type=LENGTH, metavar="Å", help="Of the picks, instead of the file's.")
@click.option("--truth-voxel-size", type=LENGTH, metavar="Å", help="Of the truth, instead of the file's.")
@tomograms_option()
@click.option("--format", metavar="FORMAT", help="Of the picks.  [default: by suffix and content]")
@click.option("--truth-format", metavar="FORMAT", help="Of the truth.  [default: by suffix and content]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the bootstrap.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("evaluation"),
    metavar="DIR",
    help="Takes evaluation.json, curve.csv and curve.png.",
)
def evaluate_command(picks: str, truth: str, **settings: Any) -> None:
    """Compare PICKS with TRUTH, both a coordinate file or a folder of such, by the names of tomograms.

    Picks and particles are paired one to one: as many as possible within the tolerance, then the
    shortest. Tomograms without truth are left out, those without picks count as missed; both are
    named. Intervals are of 95 %, from 1000 bootstrap samples of the tomograms at the same threshold.
    Write candidates with a low threshold for a curve that goes far.
    """
    from tomocpt_stream.destinations import refuse_overwriting

    output: Path = settings["output"]
    inputs = [path for path in (picks, truth, *settings["tomograms"], settings["mask"]) if path]
    refuse_overwriting(inputs, *(output / name for name in _FILES))
    if not math.isfinite(settings["diameter"]):
        raise click.UsageError("--diameter takes a finite length in Å.")
    if settings["threshold"] is not None and not math.isfinite(settings["threshold"]):
        raise click.UsageError("--threshold takes a finite number.")
    if settings["sweep"] and settings["threshold"] is not None:
        raise click.UsageError("--sweep chooses the threshold; leave out --threshold.")
    comparison = _compare(picks, truth, settings)
    for line in comparison.remarks():
        warn(line)
    comparison.show()
    comparison.write(output)
    click.echo(f"{', '.join(_FILES)} -> {output}")


@dataclass(frozen=True, eq=False)
class _Comparison:
    """What the command found; `threshold` is None where all picks count."""

    result: Evaluation
    ranking: Ranking
    curve: pd.DataFrame
    intervals: dict[str, Interval]
    threshold: float | None
    settings: Mapping[str, Any]

    def remarks(self) -> Iterator[str]:
        """Yield what a reader of the figures must know."""
        result, tomograms = self.result, len(self.result.matches)
        if result.without_truth:
            yield f"left out, for there is no truth of them: {', '.join(result.without_truth)}"
        if result.without_picks:
            yield f"all particles missed, for there are no picks of them: {', '.join(result.without_picks)}"
        if tomograms == 1:
            yield "one tomogram: no intervals"
        elif tomograms < _FEW:
            yield f"{tomograms} tomograms: intervals from so few are too narrow"
        if len(self.ranking.scores) > 1 and self.ranking.scores[0] == self.ranking.scores[-1]:
            yield "all picks have the same score: the curve is a single point"

    def show(self) -> None:
        """Print a row for each tomogram, the pooled one, and what the scores are worth."""
        beta, matches = self.settings["beta"], self.result.matches
        columns = ["tomogram", "picks", "truth", "TP", "FP", "FN", "precision", "recall", "F1"]
        columns += [f"F{beta:g}"] if beta != 1 else []
        rows = [(name or "?", one) for name, one in matches.items()] + [("pooled", self.result.pooled)]
        print_table([*columns, "mean Å", "RMSE Å"], [_row(name, one, beta) for name, one in rows])
        above = "all picks" if self.threshold is None else f"picks above {self.threshold:.9g}"
        click.echo(f"{above}, matched one to one within {self.settings['tolerance']:g} Å")
        for name, label in (("fbeta", f"F{beta:g}"), ("average_precision", "average precision")):
            click.echo(f"{label} {_with_bounds(self.intervals[name])}")
        if self.settings["sweep"]:
            click.echo("the threshold is the best for these very tomograms: expect less on others")

    def write(self, folder: Path) -> None:
        """Write the figures, the curve and its picture."""
        from tomocpt_stream.report import draw_curve
        from tomocpt_stream.whole import write_whole

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(self._facts()), indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(folder / _FILES[0], text + "\n")
        write_whole(folder / _FILES[1], self.curve.to_csv(index=False))
        pooled = self.result.pooled
        title = (
            f"{count(len(self.result.matches), 'tomogram')} · {count(pooled.truth, 'particle')} · "
            f"{count(len(self.ranking.scores), 'candidate')} · within {self.settings['tolerance']:g} Å · "
            f"average precision {self.ranking.average_precision():.3f}"
        )
        beta = self.settings["beta"]
        draw_curve(self.curve, folder / _FILES[2], title=title, beta=beta, match=pooled, at=self.threshold)

    def _facts(self) -> dict[str, Any]:
        from tomocpt_stream.curves import best_row

        named = ("diameter", "tolerance", "beta", "mask", "particle", "seed")
        facts = {name: self.settings[name] for name in ("picks", "truth", *named)}
        facts |= {"threshold": self.threshold, "threshold_chosen_on_these_tomograms": self.settings["sweep"]}
        tomograms = {name: self._figures(one) for name, one in self.result.matches.items()}
        facts |= {"pooled": self._figures(self.result.pooled), "tomograms": tomograms}
        facts["without_truth"], facts["without_picks"] = self.result.without_truth, self.result.without_picks
        facts["intervals_95"] = {name: asdict(one) for name, one in self.intervals.items()}
        best = self.curve.index == best_row(self.curve).name
        facts["best_of_the_curve"] = self.curve[best].to_dict("records")[0]
        return facts

    def _figures(self, one: Match) -> dict[str, float]:
        return {
            "picks": one.picks,
            "truth": one.truth,
            "tp": one.tp,
            "fp": one.fp,
            "fn": one.fn,
            "precision": one.precision,
            "recall": one.recall,
            "f1": one.f1,
            "fbeta": one.fbeta(self.settings["beta"]),
            "mean_distance": one.mean_distance,
            "mean_distance_over_diameter": one.mean_distance / self.settings["diameter"],
            "rmse": one.rmse,
        }


def _compare(picks: str, truth: str, settings: dict[str, Any]) -> _Comparison:
    from tomocpt_stream.curves import best_row, rank
    from tomocpt_stream.evaluation import Evaluation, match, together

    beta = settings["beta"]
    found, true = _read("picks", picks, settings), _read("truth", truth, settings)
    tolerance = settings["diameter"] / 2 if settings["tolerance"] is None else settings["tolerance"]
    joined = together(found, true, mask=_masks(settings["mask"], true))
    tables = joined.tables
    ranking = rank(
        {n: a for n, (a, _) in tables.items()}, {n: b for n, (_, b) in tables.items()}, tolerance=tolerance
    )
    curve = ranking.curve("percentiles" if settings["percentiles"] else "scores", beta=beta)
    threshold = float(best_row(curve)["threshold"]) if settings["sweep"] else settings["threshold"]
    matches = {
        name: match(some if threshold is None else some.above(threshold), one, tolerance=tolerance)
        for name, (some, one) in tables.items()
    }
    return _Comparison(
        Evaluation(matches, joined.without_picks, joined.without_truth),
        ranking,
        curve,
        ranking.intervals(-math.inf if threshold is None else threshold, beta=beta, seed=settings["seed"]),
        threshold,
        {**settings, "picks": picks, "truth": truth, "tolerance": tolerance},
    )


def _read(side: str, path: str, settings: Mapping[str, Any]) -> dict[str, Picks]:
    """Return the tables of a file or of the files of a folder; each must say its voxel size."""
    from tomocpt_stream.formats import read_kinds

    prefix = "" if side == "picks" else "truth_"
    kind, particle = settings[f"{prefix}format"], settings["particle"]
    options = {
        "voxel_size": settings[f"{prefix}voxel_size"],
        "tomograms": one_or_all(settings["tomograms"]),
        "particle": particle,
    }
    read = [(file, one) for file in _files(path, kind) for one in read_kinds(file, format=kind, **options)]
    kept = [(file, one) for file, one in read if particle is None or one.particle in (particle, "")]
    if read and not kept:
        raise FormatError(
            f"no {side} of {particle!r} in {path}",
            expected=f"one of its kinds: {', '.join(sorted({repr(one.particle) for _, one in read})[:20])}",
            remedy="correct --particle, or leave it out",
        )
    tables: dict[str, Picks] = {}
    for file, table in kept:
        before = tables.setdefault(table.tomogram, table)
        if before is not table:
            several = before.particle != table.particle
            kinds = f"of {before.particle!r} and of {table.particle!r}" if several else "twice"
            raise FormatError(
                f"{path} has {side} on {table.tomogram} {kinds}, the last in {file}",
                expected="one table for each tomogram",
                remedy="choose a kind with --particle" if several else "take a file out of the folder",
            )
    if unsized := [name for name, table in tables.items() if table.voxel_size is None and len(table)]:
        raise FormatError(
            f"{path} does not say the voxel size of {', '.join(unsized[:10])}",
            expected="voxel sizes on both sides, in Å",
            remedy=f"give --{prefix.replace('_', '-')}voxel-size or --tomograms",
        )
    return tables


def _files(path: str, kind: str | None) -> list[str]:
    """Return the coordinate files of a folder, or what is itself one."""
    from tomocpt_stream.formats import FORMATS, SCORES
    from tomocpt_stream.remote import is_remote

    place = Path(path)
    if is_remote(path) or not place.is_dir() or (kind in FORMATS and FORMATS[kind].folder):
        return [path]
    readable = [one for name, one in FORMATS.items() if one.reads and kind in (None, name)]
    suffixes = {suffix for one in readable for suffix in one.suffixes if suffix}
    found = sorted(
        str(file)
        for file in place.iterdir()
        if file.suffix.lower() in suffixes and file.is_file()
        if not (file.name.startswith(".") or file.name.lower().endswith(SCORES))
    )
    if not found:
        raise FormatError(
            f"the folder {path} without a coordinate file",
            expected=f"files that end in {', '.join(sorted(suffixes)) or 'nothing'}",
            remedy="for a folder of another kind (copick, ndjson and others) give --format or --truth-format",
        )
    return found


def _masks(mask: str | None, truth: Mapping[str, Picks]) -> str | dict[str, str] | None:
    """Return one mask for each tomogram."""
    from tomocpt_stream.pipeline import safe_name

    if mask is None or _NAME not in mask:
        if mask is not None and len(truth) > 1:
            raise PlanError(
                f"one mask for {len(truth)} tomograms",
                expected="a mask for each of them",
                remedy=f"put {_NAME} in the path, for the name of each tomogram",
            )
        return mask
    return {name: mask.replace(_NAME, safe_name(name)) for name in truth}


def _row(name: str, one: Match, beta: float) -> list[str]:
    counts = (one.picks, one.truth, one.tp, one.fp, one.fn)
    ratios = (one.precision, one.recall, one.f1, *((one.fbeta(beta),) if beta != 1 else ()))
    distances = ("-" if math.isnan(length) else f"{length:.1f}" for length in (one.mean_distance, one.rmse))
    return [name, *map(str, counts), *(f"{ratio:.3f}" for ratio in ratios), *distances]


def _with_bounds(one: Interval) -> str:
    bounds = "" if math.isnan(one.low) else f" ({one.low:.3f} to {one.high:.3f}, 95 %)"
    return f"{one.value:.3f}{bounds}"


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what is not a number becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
