"""`tomocpt-stream portal`: what the CZ CryoET Data Portal has, picking it, and its annotations."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.formats import FORMATS
from tomocpt_stream.options import LENGTH, Command, add_options, kept_answers_options
from tomocpt_stream.request import (
    PickRequest,
    contrast_option,
    format_options,
    options_for,
    pick_all,
    storage_option,
)
from tomocpt_stream.terminal import count, print_table, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tomocpt_stream.destinations import Place
    from tomocpt_stream.portal_queries import PortalAPI
    from tomocpt_stream.portal_records import Selection, TomogramRecord

COLUMNS = ("dataset", "run", "id", "size x y z", "Å", "processing", "method", "level", "GB")
# What a run is measured against where nobody says how fast it is: an H100-class GPU, a fast link.
WINDOWS_PER_SECOND, BYTES_PER_SECOND = 100.0, 100e6

FLAG = click.Choice(["yes", "no", "unknown"])
_FLAGS: dict[str, bool | str] = {"yes": True, "no": False, "unknown": "unknown"}


@click.group("portal", short_help="List, pick and evaluate on the CZ CryoET Data Portal.")
def portal() -> None:
    """Work on the CZ CryoET Data Portal: list tomograms, pick them, fetch annotations.

    Ids are given with or without their prefixes: CZCDP-10310, DS-10440, RN-1, TM-1. Nothing is
    downloaded whole: tomograms are read from the portal's bucket as they are picked.
    """


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which tomograms are meant."""
    options: list[Callable[[Command], Command]] = [
        click.option("--deposition", multiple=True, metavar="ID", help="Deposition, such as CZCDP-10310."),
        click.option("--dataset", multiple=True, metavar="ID", help="Dataset, such as DS-10440."),
        click.option(
            "--run", multiple=True, metavar="ID|NAME", help="Run: an id, a name or a glob of names."
        ),
        click.option("--tomogram", multiple=True, metavar="ID", help="Tomogram, such as TM-16531."),
        click.option(
            "--meaning",
            type=click.Choice(["tomograms", "datasets", "annotations"]),
            help="What a deposition means: its own tomograms, those of its datasets, or those that its "
            "annotations lie on.  [default: the first of these that has any]",
        ),
        click.option(
            "--voxel-spacing",
            type=LENGTH,
            metavar="Å",
            help="Only this voxel spacing, within 0.01 Å.",
        ),
        click.option("--processing", multiple=True, metavar="KIND", help="raw, filtered, denoised, ..."),
        click.option("--reconstruction", multiple=True, metavar="METHOD", help="WBP, SART, SIRT, ..."),
        click.option("--organism", metavar="GLOB", help="Organism of the dataset."),
        click.option("--standard", type=FLAG, help="Whether the portal calls it standard."),
        click.option("--ctf-corrected", type=FLAG, help="Whether the CTF was corrected."),
        click.option("--ground-truth-of", metavar="OBJECT", help="Only where there is ground truth of this."),
        click.option(
            "--near",
            type=LENGTH,
            metavar="Å",
            help="Of a run's tomograms take one of the voxel spacing nearest to this.",
        ),
        click.option("--prefer", metavar="KINDS", help="Order of processings, such as denoised,raw."),
        click.option("--all", "everything", is_flag=True, help="Take every tomogram, not one of each run."),
        click.option(
            "--selection",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Take the tomograms that an earlier `portal list --manifest FILE` selected.",
        ),
        kept_answers_options,
    ]
    return add_options(options)(command)


def chosen(settings: dict[str, Any], near: float | None = None) -> tuple[Selection, PortalAPI]:
    """Take the options of `selection_options` out of `settings`; return what they select, and print notes."""
    from tomocpt_stream.portal import PortalAPI, Selection, select_tomograms

    api = PortalAPI(refresh=settings.pop("refresh"), offline=settings.pop("offline"))
    kept, truth = settings.pop("selection"), settings.pop("ground_truth_of")
    asked: dict[str, Any] = {
        name: list(settings.pop(name)) or None
        for name in ("deposition", "dataset", "run", "tomogram", "processing", "reconstruction")
    }
    asked |= {name: settings.pop(name) for name in ("meaning", "voxel_spacing", "organism")}
    asked |= {name: _FLAGS.get(settings.pop(name) or "") for name in ("standard", "ctf_corrected")}
    asked["has_ground_truth"] = truth
    wanted, prefer, everything = settings.pop("near"), settings.pop("prefer"), settings.pop("everything")
    if kept is not None:
        if any(value is not None for value in asked.values()):
            raise click.UsageError("--selection says which tomograms are meant; leave out the other options.")
        selection = Selection.read(kept)
    elif not any(asked[name] for name in ("deposition", "dataset", "run", "tomogram")):
        raise click.UsageError(
            "say what is meant: --deposition, --dataset, --run, --tomogram or --selection."
        )
    else:
        if not everything:
            asked |= {"near": wanted or near, "prefer": prefer.split(",") if prefer else None}
        selection = select_tomograms(**asked, all=everything, api=api)
    for note in selection.notes:
        click.echo(note, err=True)
    for tie in selection.ties:
        if tie not in selection.notes:
            warn(tie)
    return selection, api


@portal.command("list", short_help="List tomograms, with sizes and totals.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--left-out", is_flag=True, help="Say of each tomogram that was left out why.")
@click.option(
    "--manifest",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep the selection for later runs (--selection FILE).",
)
@click.option("--level", type=click.IntRange(0, 2), default=0, help="Level whose bytes are counted.")
@click.option(
    "--diameter",
    type=LENGTH,
    metavar="Å",
    help="Count windows for a particle.",
)
@selection_options
def list_command(**settings: Any) -> None:
    """List the tomograms that would be picked, what they hold and what reading them takes.

    The time is that of 100 windows and 100 MB a second, whichever takes longer. No voxel is read.
    """
    from tomocpt_stream.portal import summary

    level, diameter = settings["level"], settings["diameter"]
    working = None if diameter is None else diameter / 20
    selection, _ = chosen(settings, near=working)
    if settings["manifest"] is not None:
        selection.write(settings["manifest"])
    total = summary(
        selection,
        level=level,
        voxel_size=working,
        windows_per_second=WINDOWS_PER_SECOND,
        bytes_per_second=BYTES_PER_SECOND,
    )
    if settings["as_json"]:
        click.echo(json.dumps({**selection.to_json(), "summary": total}, indent=1))
    elif settings["as_csv"]:
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *_rows(selection.records, level)])
        click.echo(text.getvalue(), nl=False)
    else:
        print_table(COLUMNS, _rows(selection.records, level))
        click.echo(
            f"{count(total['tomograms'], 'tomogram')} of {count(total['runs'], 'run')} in "
            f"{count(total['datasets'], 'dataset')}: {total['bytes'] / 1e9:.1f} GB to read at level {level} "
            f"({total['bytes_stored'] / 1e9:.1f} GB stored), {total['windows']} windows, about "
            f"{total['seconds'] / 3600:.1f} h"
        )
        _say_left_out(selection, each=settings["left_out"])


def _rows(records: Iterable[TomogramRecord], level: int) -> list[tuple[str, ...]]:
    return [
        (
            f"DS-{record.dataset_id}",
            record.run,
            f"TM-{record.id}",
            " ".join(map(str, record.size)),
            f"{record.voxel_spacing:.3f}",
            record.processing,
            record.reconstruction,
            str(level if record.s3_zarr else 0),
            f"{record.bytes_at(level if record.s3_zarr else 0) / 1e9:.3f}",
        )
        for record in records
    ]


def _say_left_out(selection: Selection, *, each: bool) -> None:
    if each:
        for out in selection.left_out:
            click.echo(f"left out: TM-{out.record.id} of {out.record.run}: {out.why}")
    elif selection.left_out:
        reasons = Counter(out.why for out in selection.left_out).most_common(5)
        said = "; ".join(f"{number} because {why}" for why, number in reasons)
        click.echo(f"{len(selection.left_out)} left out (--left-out names them): {said}")


@portal.command("pick", short_help="Pick the tomograms of a deposition, dataset or run.")
@click.option("--diameter", type=LENGTH, required=True, metavar="Å")
@click.option(
    "--output",
    required=True,
    metavar="DIR|ADDRESS",
    help="One STAR a tomogram, with selection.json, citations.md and citations.bib.",
)
@contrast_option
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.3, help="Picks score more, 0 to 1.")
@click.option("--min-distance", type=click.FloatRange(min=0), metavar="Å", help="[default: 0.75 diameter]")
@click.option("--margin", type=click.FloatRange(min=0), default=0.0, metavar="Å", help="Keep off the faces.")
@click.option("--mask-object", metavar="OBJECT", help="Pick only where this was segmented, such as membrane.")
@click.option(
    "--coarsest-level", is_flag=True, help="Read the coarsest level that is as fine as the working voxels."
)
@format_options
@click.option("--scratch", metavar="DIR|ADDRESS", help="Keep working volumes and maps; a killed run goes on.")
@click.option(
    "--picker", default="base", metavar="NAME|FILE|ADDRESS", help="The shipped picker or a picker file."
)
@click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda.")
@click.option("--memory", metavar="SIZE", help='Memory budget, such as "4 GB".')
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes on this machine.")
@click.option("--scheduler", metavar="ADDRESS|FILE", help="A running dask cluster.")
@click.option("--picture/--no-picture", default=True, help="Draw three slices with the picks.")
@storage_option
@selection_options
def pick_command(output: str, mask_object: str | None, **settings: Any) -> None:
    """Pick particles in the selected tomograms, which are read from the portal's bucket as they are picked.

    One tomogram of each run is taken, by default one of the voxel spacing nearest to the picker's working
    voxels (diameter / 20 for the shipped one). One that cannot be picked is reported with its reason, the
    others are done, and the exit code is 1. --storage-option is for --output, --scratch and --picker.
    """
    from tomocpt_stream.annotation_files import tomogram_names
    from tomocpt_stream.citations import as_bibtex, as_table, citations
    from tomocpt_stream.destinations import place_of
    from tomocpt_stream.picker import load_picker

    folder = place_of(output)
    if isinstance(folder, Path) and folder.is_file():
        raise click.UsageError(f"--output {output} is a file, and takes a folder.")
    addresses = [str(place) for place in (settings["scratch"], output) if place]
    own = options_for(settings["picker"], addresses, settings["storage_options"])
    picker = load_picker(settings["picker"], device=settings["device"], storage_options=own)
    selection, api = chosen(settings, near=settings["diameter"] / (2 * picker.particle_radius))
    names = tomogram_names(selection.records)
    masks = {} if mask_object is None else _masks(selection, mask_object, api)
    click.echo(f"{count(len(selection), 'tomogram')} -> {output}")
    found = citations(selection.records, api=api)
    for name, text in {
        "selection.json": json.dumps(selection.to_json(), indent=1, allow_nan=False),
        "citations.md": as_table(found),
        "citations.bib": as_bibtex(found),
    }.items():
        _write(folder, name, text, settings["storage_options"])
    taken = [record for record in selection.records if mask_object is None or names[record.id] in masks]
    sources = {record.source or names[record.id]: record for record in taken}
    pick_all(
        PickRequest(
            tomograms=tuple(sources),
            records=sources,
            names={source: names[record.id] for source, record in sources.items()},
            masks={source: masks.get(names[record.id]) for source, record in sources.items()},
            output=f"{folder}/",
            stitch="hann",
            tta=False,
            batch_size=4,
            level="coarsest" if settings.pop("coarsest_level") else "given",
            **settings,
        ),
        picker,
    )


def _write(folder: Place, name: str, text: str, storage_options: Mapping[str, Any]) -> None:
    """Write a text file into a folder or below an address, whole or not at all."""
    from tomocpt_stream.receipts import put_object
    from tomocpt_stream.whole import write_whole

    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text)
    else:
        put_object(f"{folder}/{name}", text.encode(), storage_options)


def _masks(selection: Selection, wanted: str, api: PortalAPI) -> dict[str, str]:
    """Return the address of the mask of each tomogram; those without one are named."""
    from tomocpt_stream.annotation_files import tomogram_names
    from tomocpt_stream.portal import find_masks

    masks = find_masks(selection.records, object=wanted, api=api)
    lacking = [name for name in tomogram_names(selection.records).values() if name not in masks]
    if lacking:
        warn(f"no {wanted} was segmented on {', '.join(lacking)}: not picked")
    return masks


@portal.command("annotations", short_help="Fetch points that people put on tomograms, as files.")
@click.option("--object", "wanted", metavar="NAME|ID", help="Object: a name with wildcards, or GO:...")
@click.option("--ground-truth/--not-ground-truth", default=None, help="Only what is (not) ground truth.")
@click.option("--method", metavar="METHOD", help="manual, automated, hybrid, simulated, or a method's name.")
@click.option(
    "--shape", type=click.Choice(["OrientedPoint", "Point", "InstanceSegmentation"]), help="Kind of points."
)
@click.option(
    "--output",
    metavar="FILE|DIR|ADDRESS",
    help="A file (.star, .csv) takes all points; a folder gets a file for each tomogram.  "
    "[default: only a table]",
)
@click.option(
    "--format",
    type=click.Choice([name for name, kind in FORMATS.items() if kind.writes]),
    default="relion31",
    help="Of the points; README has frame, units, scores and angles of each.",
)
@storage_option
@selection_options
def annotations_command(
    wanted: str | None,
    output: str | None,
    format: str,  # noqa: A002  (the option's name)
    **settings: Any,
) -> None:
    """List the points of an object on the selected tomograms; with --output, write them as files.

    Coordinates are voxels of the tomogram's level 0. Annotations on another alignment are refused. A
    citations.md goes beside the points.
    """
    from tomocpt_stream.annotation_files import Wanted
    from tomocpt_stream.citations import as_table, citations
    from tomocpt_stream.destinations import below, place_of, split, takes_all
    from tomocpt_stream.formats import write_picks
    from tomocpt_stream.pipeline import safe_name
    from tomocpt_stream.portal_annotations import fetch_picks

    options = settings.pop("storage_options")
    kind = FORMATS[format]
    one = output is not None and takes_all(output, kind.suffix)
    truth, method, shape = (settings.pop(name) for name in ("ground_truth", "method", "shape"))
    selection, api = chosen(settings)
    found = fetch_picks(
        selection.records,
        Wanted(object=wanted, ground_truth=truth, method=method),
        shape=shape,
        missing="skip",
        api=api,
    )
    for note in found.notes:
        warn(note)
    rows = [(name, picks.particle or "", str(len(picks))) for name, picks in found.picks.items()]
    print_table(("tomogram", "object", "points"), rows)
    click.echo(f"{count(sum(map(len, found.picks.values())), 'point')} on {count(len(rows), 'tomogram')}")
    if output is None:
        return
    folder, name = split(place_of(output)) if one else (place_of(output), "")
    cited = as_table(citations(selection.records, found.annotations, api=api))
    tables = (
        {name: found.picks}
        if one
        else {f"{safe_name(each)}{kind.suffix}": picks for each, picks in found.picks.items()}
    )
    for file, points in tables.items():
        place = folder if kind.project and not one else below(folder, file)
        write_picks(points, place, format=format, storage_options=options)
    _write(folder, "citations.md", cited, options)
    click.echo(f"points -> {output}")
