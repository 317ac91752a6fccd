"""The commands `view` and `curate`: picks in another program, and what somebody changed there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import FormatError
from tomocpt_stream.options import LENGTH, one_or_all, tomograms_option
from tomocpt_stream.terminal import count

if TYPE_CHECKING:
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram


@click.command("view", short_help="Open a tomogram with its picks in napari, IMOD or ChimeraX.")
@click.argument("source", metavar="TOMOGRAM")
@click.argument("picks", metavar="PICKS")
@click.option(
    "--in",
    "viewer",
    type=click.Choice(["napari", "imod", "chimerax"]),
    default="napari",
    help="The program that files are written for.",
)
@click.option("--diameter", type=LENGTH, required=True, metavar="Å", help="Size of the circles in Å.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("view"),
    metavar="DIR",
    help="Folder for the files.",
)
@click.option("--format", "kind", metavar="NAME", help="Format of PICKS, where its suffix does not say.")
@tomograms_option()
@click.option("--name", metavar="NAME", help="What PICKS calls the tomogram.  [default: the file's name]")
@click.option("--particle", metavar="NAME", help="The kind of particle that is shown, of several in PICKS.")
@click.option(
    "--base-index", type=click.IntRange(0, 1), help="What a Dynamo table calls the first voxel: 0 or 1."
)
@click.option("--threshold", type=float, default=None, help="Show picks with scores above it.")
@click.option("--voxel-size", type=LENGTH, metavar="Å", help="Voxel size in Å, instead of the file's.")
def view_command(source: str, picks: str, viewer: Any, diameter: float, **settings: Any) -> None:
    """Write files that show TOMOGRAM with its PICKS, and print the command that opens them.

    Nothing is started. Points that are edited there and saved are read as any other picks; `curate`
    gives them their scores back, and says what was changed.
    """
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.formats import companions
    from tomocpt_stream.tomogram import open_tomogram
    from tomocpt_stream.viewers import picks_of, view_files, write_view

    tomogram = open_tomogram(source, voxel_size=settings["voxel_size"], name=settings["name"])
    inputs = [source, picks, *companions(picks), *settings["tomograms"]]
    refuse_overwriting([*map(str, inputs)], *view_files(tomogram, settings["output"], viewer))
    asked = {name: settings[name] for name in ("particle", "base_index")}
    asked["tomograms"] = one_or_all(settings["tomograms"])
    tables = _read(picks, tomogram, format=settings["kind"], **asked)
    shown = picks_of(tables, tomogram)
    if settings["threshold"] is not None:
        shown = shown.above(settings["threshold"])
    view = write_view(tomogram, shown, settings["output"], viewer=viewer, diameter=diameter)
    click.echo(f"{count(len(shown), 'pick')} -> {', '.join(map(str, view.files))}")
    click.echo(view.command)


@click.command("curate", short_help="Say what was changed in picks that somebody edited.")
@click.argument("written", metavar="PICKS", type=click.Path(exists=True, path_type=Path))
@click.argument("edited", metavar="EDITED", type=click.Path(exists=True, path_type=Path))
@click.argument("output", metavar="OUT.csv", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--format", "kind", metavar="NAME", help="Format of PICKS, where its suffix does not say.")
@click.option("--edited-format", metavar="NAME", help="Format of EDITED, where its suffix does not say.")
@click.option("--threshold", type=float, help="That of `view`: picks below it were not shown.")
@click.option("--voxel-size", type=LENGTH, metavar="Å", help="Voxel size in Å, where a file does not say it.")
@click.option("--shape", type=click.IntRange(min=1), nargs=3, help="Voxels along z, y, x, likewise.")
def curate_command(written: Path, edited: Path, output: Path, **settings: Any) -> None:
    """Compare EDITED with the PICKS that it was made of, and write a table of what there is now.

    Picks that are where they were keep their scores, added ones are marked manual with score 1, removed
    ones are listed. The table serves as labels: `read_picks` takes it without those that were removed.
    Tomograms of which EDITED has nothing are left out, unless PICKS has no other.
    """
    import numpy as np

    from tomocpt_stream.curation import curate, write_curated
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.formats import companions, read_picks

    inputs = [str(written), str(edited), *companions(written), *companions(edited)]
    refuse_overwriting(inputs, output)
    if output.suffix.lower() != ".csv":
        raise click.UsageError(f"{output} takes a table, so that its name must end in .csv.")
    sizes = {"voxel_size": settings["voxel_size"], "shape": settings["shape"]}
    before = read_picks(written, format=settings["kind"], **sizes)
    if settings["threshold"] is not None:
        before = {name: table.above(settings["threshold"]) for name, table in before.items()}
    now = read_picks(edited, format=settings["edited_format"], **sizes)
    names = {name: _called(name, before, now) for name in before}
    if not now and len(before) == 1:  # all were removed
        now = {name: table.take(np.zeros(len(table), bool)) for name, table in before.items()}
    if not now or (strange := sorted(set(now) - set(names.values()))):
        raise FormatError(
            f"{edited} has picks of {', '.join(strange[:10]) if now else 'no tomogram'}, and {written} of "
            f"{', '.join(sorted(before)[:10])}",
            expected="the same tomograms in both",
            remedy="give the file that was edited, and the one that it was made of",
        )
    found = [
        curate(before[name], replace(now[called], tomogram=name))
        for name, called in names.items()
        if called in now
    ]
    write_curated(found, output)
    for one in found:
        click.echo(one)
        for (z, y, x), score in zip(one.removed.zyx, one.removed.score, strict=True):
            click.echo(f"  removed: x {x:.1f}, y {y:.1f}, z {z:.1f} (score {score:.3g})")
    click.echo(f"table -> {output}")


def _called(name: str, before: dict[str, Picks], now: dict[str, Picks]) -> str:
    """Return what the edited file calls a tomogram: where each has one, it is the same one."""
    return next(iter(now)) if len(before) == len(now) == 1 else name


def _read(path: str, tomogram: Tomogram, **asked: Any) -> dict[str, Picks]:
    """Return the picks of a file; what it does not say of its tomogram is taken from the tomogram."""
    from tomocpt_stream.formats import read_picks

    try:
        return read_picks(path, **asked)
    except FormatError:
        return read_picks(path, voxel_size=tomogram.voxel_size, shape=tomogram.shape, **asked)
