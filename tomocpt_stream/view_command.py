"""The command `view`: files that open a tomogram with its picks in another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import FormatError
from tomocpt_stream.terminal import count

if TYPE_CHECKING:
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram

LENGTH = click.FloatRange(min=0, min_open=True)


@click.command("view", short_help="Open a tomogram with its picks in napari, IMOD or ChimeraX.")
@click.argument("source", metavar="TOMOGRAM")
@click.argument("picks", metavar="PICKS", type=click.Path(path_type=Path))
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
@click.option(
    "--tomograms",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="RELION's tomograms.star, where PICKS needs its sizes.",
)
@click.option("--name", metavar="NAME", help="What PICKS calls the tomogram.  [default: the file's name]")
@click.option("--threshold", type=float, default=None, help="Show picks with scores above it.")
@click.option("--voxel-size", type=LENGTH, metavar="Å", help="Voxel size in Å, instead of the file's.")
def view_command(source: str, picks: Path, viewer: Any, diameter: float, **settings: Any) -> None:
    """Write files that show TOMOGRAM with its PICKS, and print the command that opens them.

    Nothing is started. Points that are edited there and saved are read by `convert` and `evaluate` as
    any other picks.
    """
    from tomocpt_stream.tomogram import open_tomogram
    from tomocpt_stream.viewers import picks_of, write_view

    tomogram = open_tomogram(source, voxel_size=settings["voxel_size"], name=settings["name"])
    tables = _read(picks, settings["kind"], settings["tomograms"], tomogram)
    shown = picks_of(tables, tomogram)
    if settings["threshold"] is not None:
        shown = shown.above(settings["threshold"])
    view = write_view(tomogram, shown, settings["output"], viewer=viewer, diameter=diameter)
    click.echo(f"{count(len(shown), 'pick')} -> {', '.join(map(str, view.files))}")
    click.echo(view.command)


def _read(path: Path, kind: str | None, tomograms: Path | None, tomogram: Tomogram) -> dict[str, Picks]:
    """Return the picks of a file; what it does not say of its tomogram is taken from the tomogram."""
    from tomocpt_stream.formats import read_picks

    try:
        return read_picks(path, format=kind, tomograms=tomograms)
    except FormatError:
        return read_picks(
            path,
            format=kind,
            tomograms=tomograms,
            voxel_size=tomogram.voxel_size,
            shape=tomogram.shape,
        )
