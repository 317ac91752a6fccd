"""The command `tomocpt-stream`: one subcommand for each verb of the package, and no logic of its own.

The modules that do the work are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.convert_command import convert
from tomocpt_stream.errors import ActionableError
from tomocpt_stream.evaluate_command import evaluate_command
from tomocpt_stream.options import LENGTH, add_options
from tomocpt_stream.portal_commands import portal
from tomocpt_stream.request import (
    PickRequest,
    contrast_option,
    draw_at,
    format_options,
    options_for,
    pick_all,
    storage_option,
)
from tomocpt_stream.terminal import (
    contrast_line,
    count,
    fact_lines,
    facts_line,
    log_to_stderr,
    plan_line,
    show_progress,
    show_warning,
    warn,
)
from tomocpt_stream.train_command import finetune_command, train_command
from tomocpt_stream.view_command import curate_command, view_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from tomocpt_stream.phantom import Phantom
    from tomocpt_stream.tomogram import Tomogram

UPSAMPLING_WARNED_BELOW = 0.75


class Commands(click.Group):
    """A group of commands whose actionable errors end in one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ActionableError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="tomocpt-stream")
def main() -> None:
    """Find the centroids of one kind of particle in cryo-electron tomograms.

    Lengths are in Å. Exit code 0 means that everything asked for was done, 1 that something was
    not, 2 that the command was not understood.
    """
    warnings.showwarning = show_warning
    click.get_current_context().with_resource(log_to_stderr())


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a tomogram is read."""
    options = [
        click.option(
            "--voxel-size", type=LENGTH, metavar="Å", help="Voxel size in Å, instead of the file's."
        ),
        click.option(
            "--beam-axis",
            type=click.Choice(["z", "y"]),
            default="z",
            help="Axis of the file that the electron beam runs along; y for an IMOD volume not yet turned.",
        ),
    ]
    return add_options(options)(command)


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that decide what is scored, and in how much memory."""
    options = [
        click.option(
            "--picker",
            default="base",
            metavar="NAME|FILE|ADDRESS",
            help="The shipped picker or a picker file.",
        ),
        click.option(
            "--stitch", type=click.Choice(["hann", "crop"]), default="hann", help="How windows are joined."
        ),
        click.option(
            "--tta", is_flag=True, help="Average the scores of four mirror images: four times the work."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=4, help="Windows scored at once."),
        click.option(
            "--memory",
            metavar="SIZE",
            help='Memory budget, such as "4 GB" or "800 MB"; of each worker where there are several.',
        ),
        click.option(
            "--device", default="auto", metavar="DEVICE", help="Where the network runs: auto, cpu, cuda."
        ),
    ]
    return add_options(options)(command)


def workers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that spreads the work over processes."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Do the work in N processes on this machine: one for each GPU, or for each two cores.  "
        "[default: in this process]",
    )(command)


@main.command("pick", short_help="Pick particles in tomograms; write STAR files.")
@click.argument("tomograms", nargs=-1, required=True, metavar="TOMOGRAM...")
@click.option(
    "--diameter", type=LENGTH, required=True, metavar="Å", help="Longest axis of the particle in Å."
)
@contrast_option
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.3, help="Picks score more, 0 to 1.")
@click.option(
    "--min-distance",
    type=click.FloatRange(min=0),
    metavar="Å",
    help="Least distance between two picks in Å, centre to centre.  [default: 0.75 diameter]",
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="Å",
    help="Leave out picks nearer than this to a face, in Å.",
)
@click.option(
    "--mask", metavar="FILE|ADDRESS", help="Volume of the same extent; picks are sought where it is not 0."
)
@click.option(
    "--output",
    default="picks/",
    metavar="FILE|DIR|ADDRESS",
    help="A file (.star, .csv) takes the picks of all the tomograms; a folder gets a file for each.",
)
@format_options
@click.option("--keep-heatmap", metavar="DIR|ADDRESS", help="Keep the maps.")
@click.option(
    "--scratch",
    metavar="DIR|ADDRESS",
    help="Keep working volumes and maps here, so that a killed run goes on.  [default: a temporary folder]",
)
@click.option("--verify", is_flag=True, help="Read back what was stored and compare it with its receipts.")
@click.option(
    "--scheduler",
    metavar="ADDRESS|FILE",
    help="Use the workers of a running dask cluster: tcp://HOST:PORT, or its scheduler file.",
)
@click.option(
    "--picture/--no-picture", default=True, help="Draw three slices with the picks beside the STAR."
)
@click.option(
    "--coarsest-level",
    "level",
    flag_value="coarsest",
    default="given",
    show_default=False,
    help="Read the coarsest stored level that is at least as fine as the working voxels.",
)
@click.option(
    "--missing",
    type=click.Choice(["error", "fill"]),
    default="error",
    help="Absent zarr chunks are an error, or the fill value (some writers drop chunks of nothing else).",
)
@storage_option
@workers_option
@source_options
@plan_options
def pick_command(**settings: Any) -> None:
    """Pick particles in one or more TOMOGRAMs and write STAR files, or others.

    A tomogram is an .mrc, .rec or .map file (also .gz, .bz2), a zarr array or an OME-Zarr group, on a
    disk or at an address (s3://, gs://, az://, https://). One that cannot be picked is reported with
    its reason, the others are done, and the exit code is 1.
    """
    pick_all(PickRequest(**settings))


main.add_command(portal)
main.add_command(convert)
main.add_command(evaluate_command)
main.add_command(finetune_command)
main.add_command(train_command)
main.add_command(view_command)
main.add_command(curate_command)


@main.command("inspect", short_help="Say what a tomogram is and what picking costs.")
@click.argument("source", metavar="TOMOGRAM")
@click.option("--diameter", type=LENGTH, metavar="Å", help="Longest axis of the particle in Å.")
@click.option(
    "--output",
    metavar="FILE|ADDRESS",
    help="PNG of the central slice with a circle of --diameter.  [default: NAME_size.png]",
)
@click.option("--picture/--no-picture", default=True, help="Draw that PNG where --diameter is given.")
@contrast_option
@storage_option
@workers_option
@source_options
@plan_options
def inspect_command(source: str, diameter: float | None, output: str | None, **settings: Any) -> None:
    """Say what a TOMOGRAM is and what picking it would take; no voxel is read but for the PNG.

    With --diameter: the working voxel size, the plan in windows, passes per voxel and bytes, and a
    PNG of the central slice with a circle of that size.
    """
    from tomocpt_stream.destinations import place_of
    from tomocpt_stream.tomogram import open_tomogram

    place = None if output is None else place_of(output)
    if isinstance(place, Path) and place.is_dir():
        raise click.UsageError(f"--output {output} is a folder, and takes the name of a PNG.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the remarks say it again
        tomogram = open_tomogram(
            source,
            voxel_size=settings["voxel_size"],
            beam_axis=settings["beam_axis"],
            storage_options=settings["storage_options"],
        )
    for line in fact_lines(tomogram.describe()):
        click.echo(line)
    for remark in tomogram.remarks():
        warn(remark)
    if diameter is None:
        return
    addresses = [source, *([] if output is None else [output])]
    _inspect_plan(
        tomogram, diameter, settings, options_for(settings["picker"], addresses, settings["storage_options"])
    )
    if settings["picture"]:
        from tomocpt_stream.destinations import refuse_overwriting
        from tomocpt_stream.pipeline import safe_name
        from tomocpt_stream.report import draw_size

        place = place or Path(f"{safe_name(tomogram.name)}_size.png")
        refuse_overwriting([source, settings["picker"]], place)
        own = options_for(str(place), [source], settings["storage_options"])
        click.echo(f"picture -> {draw_at(place, partial(draw_size, tomogram, diameter), own)}")


def _inspect_plan(
    tomogram: Tomogram, diameter: float, settings: dict[str, Any], storage_options: dict[str, Any]
) -> None:
    """Print the working voxel size and the plan for a particle of `diameter` Å."""
    from tomocpt_stream.heatmap import PickOptions
    from tomocpt_stream.picker import load_picker
    from tomocpt_stream.pipeline import plan_pick

    picker = load_picker(settings["picker"], device=settings["device"], storage_options=storage_options)
    kept = ("contrast", "stitch", "tta", "batch_size")
    options = PickOptions(diameter=diameter, **{name: settings[name] for name in kept})
    grid, plan = plan_pick(tomogram, picker, options, memory=settings["memory"])
    click.echo(plan_line(grid, plan))
    workers = settings["workers"]
    if workers is not None:
        _, plan = plan_pick(tomogram, picker, options, memory=settings["memory"], workers=workers)
        click.echo(plan_line(grid, plan, workers=workers))
    click.echo(contrast_line(options, plan))
    ratio = grid.voxel_size / tomogram.voxel_size
    click.echo(f"  ratio of working to source voxel size {ratio:.3g}")
    if ratio < UPSAMPLING_WARNED_BELOW:
        warn(
            f"working voxels are {ratio:.2f} of the tomogram's: up-sampling costs {ratio**-3:.1f} times the "
            "work and adds nothing; a tomogram with smaller voxels is better for this particle"
        )


@main.command("simulate", short_help="Simulate a tomogram with known truth.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE.mrc",
    help="The tomogram; the truth goes beside it as FILE_truth.star.",
)
@click.option(
    "--shape", type=click.IntRange(min=8), nargs=3, default=(96, 256, 256), help="Voxels along z, y, x."
)
@click.option("--voxel-size", type=LENGTH, default=10.0, metavar="Å", help="Voxel size in Å.")
@click.option(
    "--diameter", type=LENGTH, default=200.0, metavar="Å", help="Longest axis of the particles in Å."
)
@click.option(
    "--particle",
    "particles",
    multiple=True,
    metavar="KIND|FILE",
    help="A built-in shape, or a density map (.mrc) in its own size; repeatable.  [default: all shapes]",
)
@click.option("--count", type=click.IntRange(min=0), default=60, help="Particles in the field.")
@click.option("--distractors", type=click.IntRange(min=0), default=20, help="Other objects in the field.")
@click.option("--gold", type=click.IntRange(min=0), default=4, help="Gold beads in the field.")
@click.option("--vesicles", type=click.IntRange(min=0), default=1, help="Membrane vesicles in the field.")
@click.option("--sheets", type=click.IntRange(min=0), default=0, help="Membrane sheets across the field.")
@click.option(
    "--tilt-range", type=click.FloatRange(0, 90), default=60.0, help="Tilts from minus to plus this, degrees."
)
@click.option("--tilt-step", type=LENGTH, default=3.0, help="Degrees between two tilts.")
@click.option(
    "--snr", type=LENGTH, default=0.05, help="Variance of signal over variance of noise, per tilt image."
)
@click.option("--contrast", type=click.Choice(["dark", "bright"]), default="dark", help="How protein looks.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The same seed gives the same voxels.")
def simulate_command(output: Path, seed: int, particles: tuple[str, ...], **settings: Any) -> None:
    """Simulate a tomogram with known truth: missing wedge, CTF, dose and noise included."""
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.phantom import PhantomOptions, simulate_phantom

    chosen: dict[str, Any] = settings | ({"particles": particles} if particles else {})
    refuse_overwriting(particles, output)
    with show_progress() as progress:
        phantom = simulate_phantom(PhantomOptions(**chosen), seed=seed, name=output.stem, progress=progress)
    truth = _write_phantom(phantom, output, output.with_name(f"{output.stem}_truth.star"))
    click.echo(f"{facts_line(phantom.tomogram)} -> {output}")
    click.echo(f"{count(len(phantom.picks()), 'particle')} -> {truth}")


@main.command("import-weights", short_help="Make a picker of a tomoCPT checkpoint.")
@click.argument("checkpoint", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT.safetensors")
@click.option("--name", help="Name of the picker in its provenance.  [default: that of the file]")
@click.option(
    "--particle-voxels",
    type=LENGTH,
    metavar="VOXELS",
    help="Size of a particle in working voxels, instead of the file's.",
)
@click.option(
    "--size-is", "measures", type=click.Choice(["diameter", "radius"]), help="What that size measures."
)
@click.option("--contrast", type=click.Choice(["dark", "bright"]), default="dark", help="How protein looked.")
def import_command(checkpoint: Path, output: Path, **settings: Any) -> None:
    """Make a picker of a CHECKPOINT (.ckpt) of tomoCPT, without that program; no code in it runs.

    The picker is used by `pick --picker OUT.safetensors --diameter Å`, which then resamples as that
    program does. Versions before August 2025 call the radius what later ones call the diameter: where
    the file does not tell which, say it with --size-is.
    """
    from tomocpt_stream.checkpoints import import_checkpoint
    from tomocpt_stream.destinations import refuse_overwriting

    refuse_overwriting([str(checkpoint)], output)
    picker = import_checkpoint(checkpoint, **settings)
    picker.save(output)
    scale = picker.metadata["provenance"]["scale"]
    click.echo(f"particle {scale['measures']} {scale['voxels']:g} working voxels, by {scale['source']}")
    click.echo(f"working voxel size: diameter / {2 * picker.particle_radius:g}")
    click.echo(f"picker -> {output}")


@main.command("demo", short_help="Simulate, pick, compare with the truth.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    metavar="DIR",
    help="Folder for tomogram.mrc, truth.star, picks.star and picks.png.",
)
@click.option("--seed", type=click.IntRange(min=0), default=2026, help="Seed of the simulated tomogram.")
@plan_options
def demo_command(output: Path, seed: int, **settings: Any) -> None:
    """Simulate a tomogram of shapes that the shipped picker never saw, pick it, compare with the truth."""
    from tomocpt_stream.evaluation import match
    from tomocpt_stream.phantom import SHAPES_HELD_OUT, PhantomOptions, simulate_phantom

    scene = PhantomOptions(particles=SHAPES_HELD_OUT[:4])
    path = output / "tomogram.mrc"
    with show_progress() as progress:
        phantom = simulate_phantom(scene, seed=seed, name=path.stem, progress=progress)
    truth = _write_phantom(phantom, path, output / "truth.star")
    click.echo(f"simulated {count(len(phantom.picks()), 'particle')} -> {path}, {truth}")
    asked = PickRequest(
        tomograms=(str(path),),
        output=str(output / "picks.star"),
        diameter=scene.diameter,
        contrast=scene.contrast,
        **settings,
    )
    (picks,) = pick_all(asked)
    found = match(picks, phantom.picks(), tolerance=scene.diameter / 2)
    apart = f"mean distance {found.mean_distance:.1f} Å" if found.tp else "no pick near a particle"
    click.echo(
        f"precision {found.precision:.3f}, recall {found.recall:.3f}, F1 {found.f1:.3f}, {apart}; "
        f"matched one to one within {scene.diameter / 2:g} Å"
    )


def _write_phantom(phantom: Phantom, path: Path, truth: Path) -> Path:
    """Write a phantom as an MRC file and its truth as a STAR file; return the latter's path."""
    from tomocpt_stream.formats import write_picks
    from tomocpt_stream.phantom import write_mrc

    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(path, phantom.volume, phantom.options.voxel_size)
    write_picks(phantom.picks(), truth)
    return truth


if __name__ == "__main__":
    main()
