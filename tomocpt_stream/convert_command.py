"""`tomocpt-stream convert`: picks from one format to another, a stored heat map to an MRC file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from tomocpt_stream.formats import FORMATS
from tomocpt_stream.options import LENGTH, one_or_all, tomograms_option
from tomocpt_stream.request import storage_option
from tomocpt_stream.terminal import count, show_progress

MRC = (".mrc", ".map", ".rec")


@click.command("convert", short_help="Convert picks to another format, or a heat map to MRC.")
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option(
    "--to",
    "written",
    type=click.Choice([name for name, kind in FORMATS.items() if kind.writes]),
    help="Format of OUT.  [default: by its suffix]",
)
@click.option(
    "--from",
    "read",
    type=click.Choice([name for name, kind in FORMATS.items() if kind.reads]),
    help="Format of IN.  [default: by its suffix and contents]",
)
@click.option(
    "--voxel-size",
    type=LENGTH,
    metavar="Å",
    help="Voxel size in Å of the tomograms, where IN does not say it.",
)
@click.option("--shape", type=click.IntRange(min=1), nargs=3, help="Voxels of the tomograms along z, y, x.")
@tomograms_option()
@click.option(
    "--pixel-size",
    type=LENGTH,
    metavar="Å",
    help="Unbinned pixel size of the tilt series in Å, where IN or OUT count in its pixels.",
)
@click.option("--mean-binned", is_flag=True, help="Tomogram voxels are means of pixels, as IMOD bins them.")
@click.option(
    "--name-pattern",
    metavar="PATTERN",
    help="Finds the tilt series in a tomogram's name: {} is the series, * anything.",
)
@click.option("--optimisation-set", is_flag=True, help="Write RELION's optimisation_set.star beside OUT too.")
@click.option(
    "--half-voxel/--no-half-voxel",
    default=True,
    help="In IMOD models the centre of the first voxel is 0.5, 0.5, 0; or 0, 0, 0, as the portal reads them.",
)
@click.option(
    "--base-index", type=click.IntRange(0, 1), help="What a Dynamo table calls the first voxel: 0 or 1."
)
@click.option("--particle", metavar="NAME", help="Only this kind, or STAR class.  [default: all]")
@click.option("--threshold", type=float, help="Only picks with a score above this.  [default: all]")
@click.option(
    "--like",
    metavar="TOMOGRAM",
    help="Write the heat map on the grid of this tomogram, the one that was picked.  [default: its own grid]",
)
@storage_option
def convert(source: str, output: str, like: str | None, **settings: Any) -> None:
    """Convert the picks of IN to another format, or a stored heat map to an MRC file.

    An OUT that ends in .mrc, .map or .rec takes the heat map IN, a store that `pick --keep-heatmap` or
    --scratch left; its origin, in Å, says where its first voxel lies. Other OUTs take picks. In formats of
    one tomogram a file (.mod, .ndjson, .coords, copick's) an OUT without suffix is a folder, --to its format.
    """
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.remote import is_remote

    refuse_overwriting([source, *([like] if like else [])], output)
    if Path(output).suffix.lower() in MRC:
        if is_remote(output):
            raise click.UsageError("a heat map becomes MRC on a disk; copy it from there.")
        _write_map(source, output, like, settings["storage_options"])
        return
    if like is not None:
        raise click.UsageError("--like is for a heat map; OUT must then end in .mrc, .map or .rec.")
    _write_picks(source, output, **settings)


def _write_map(source: str, output: str, like: str | None, storage_options: dict[str, str]) -> None:
    from tomocpt_stream.heatmap import open_heatmap
    from tomocpt_stream.heatmap_mrc import write_heatmap_mrc
    from tomocpt_stream.tomogram import open_tomogram

    heatmap = open_heatmap(source, storage_options=storage_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only its size is looked at
        size = heatmap.frame.file_voxel_size
        opened = like and open_tomogram(like, voxel_size=size, storage_options=storage_options)
    with show_progress(heatmap.name) as progress:
        write_heatmap_mrc(heatmap, output, like=opened or None, progress=progress)
    click.echo(f"heat map of {heatmap.name} -> {output}")


def _write_picks(source: str, output: str, **asked: Any) -> None:
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.formats import companions, places_of, read_kinds, render_picks, store_files

    particle, threshold, written = (asked.pop(name) for name in ("particle", "threshold", "written"))
    given, beside = asked.pop("tomograms"), asked.pop("optimisation_set")
    asked["tomograms"] = one_or_all(given)
    tables = read_kinds(source, format=asked.pop("read"), particle=particle, **asked)
    kinds = sorted({table.particle for table in tables})
    if particle is not None:
        tables = [table for table in tables if table.particle == particle]
        if not tables:
            raise click.UsageError(f"{source} has no {particle!r} among {', '.join(map(repr, kinds[:20]))}.")
    if threshold is not None:
        tables = [table.above(threshold) for table in tables]
    shared = {name: value for name, value in asked.items() if name not in ("voxel_size", "shape")}
    options = shared.pop("storage_options")
    files = render_picks(tables, output, format=written, optimisation_set=beside, **shared)
    inputs = [source, *companions(source), *(one for one in given if not Path(one).is_dir())]
    refuse_overwriting(inputs, *places_of(output, files))
    store_files(output, files, options)
    tomograms = len({table.tomogram for table in tables})
    click.echo(f"{count(sum(map(len, tables)), 'pick')} of {count(tomograms, 'tomogram')} -> {output}")
