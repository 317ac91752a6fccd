"""`tomocpt-stream train` and `finetune`: a picker from nothing, and one that learns on."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tomocpt_stream.errors import PlanError
from tomocpt_stream.options import LENGTH, NOT_NEGATIVE, add_options
from tomocpt_stream.portal_option import portal_examples, portal_options
from tomocpt_stream.terminal import count, show_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from tomocpt_stream.augmentation import Augmentation
    from tomocpt_stream.labelled import LabelledTomogram
    from tomocpt_stream.loop import Step
    from tomocpt_stream.picker import Picker
    from tomocpt_stream.progress import Progress

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_TABLE = click.Path(exists=True, dir_okay=False, path_type=Path)
# What is asked of simulated tomograms and what of a table; neither has a meaning for the other.
_OF_PHANTOMS = ("steps", "tomograms", "validation", "workers", "maps", "held_maps", "picker")
_OF_BOTH = ("table", "folder", "output", "seed", "devices", "minutes", "architecture", "batch_size")
_TIME_OVER = 75  # as of a command that is to be tried again
# What keeps nothing of its parts: ended, it would begin again each time.
_IN_ONE = ("calibrate", "fill")


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every run."""
    options = [
        click.option(
            "--folder",
            type=click.Path(file_okay=False, path_type=Path),
            required=True,
            metavar="DIR",
            help="Keeps working volumes, checkpoints, curves and pictures; run again, it goes on from there.",
        ),
        click.option(
            "--output",
            type=click.Path(dir_okay=False, path_type=Path),
            required=True,
            metavar="FILE.safetensors",
            help="The trained picker.",
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, help="Of weights, crops and what is kept aside."
        ),
        click.option(
            "--devices",
            type=click.IntRange(min=1),
            default=1,
            help="GPUs that share the crops of a step; takes the package lightning if more than 1.",
        ),
        click.option(
            "--minutes",
            type=LENGTH,
            help="End after so many, with exit code 75 and what was done kept: the same command goes on. "
            "Calibration is done in one.",
        ),
    ]
    return add_options(options)(command)


def _changes(context: click.Context, parameter: click.Parameter, text: str) -> Augmentation:
    """Return the changes of crops that a text says: a name, and fields of `Augmentation` after it."""
    from tomocpt_stream.augmentation import Augmentation

    named, *fields = text.split(",")
    full = {"scale": 0.15, "shift": 0.1, "noise": 0.2, "blur": 1.0, "sharpen": 0.5}
    full |= {"tilt": 15.0, "zoom": 0.1, "filters": 0.2}
    known: dict[str, dict[str, float]] = {"none": {}, "turns": {}, "full": full}
    if named not in known:
        raise click.BadParameter(f"{named!r} is none of {', '.join(known)}.", context, parameter)
    try:
        pairs = (field.split("=") for field in fields)
        chosen: dict[str, Any] = known[named] | {name: float(number) for name, number in pairs}
        return Augmentation(turns=named != "none", **chosen)
    except (TypeError, ValueError, PlanError) as error:
        numbers = ", ".join(one for one, kind in Augmentation.__annotations__.items() if kind == "float")
        raise click.BadParameter(
            f"{text!r} ({error}); fields are {numbers}, each with =NUMBER.", context, parameter
        ) from error


def _table_options(
    *, epochs: int, learning_rate: float, batch_size: int, schedule: str, stop_after: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what adds the options of a run on a table, with its defaults."""
    options = [
        click.option(
            "--epochs", type=click.IntRange(min=1), default=epochs, help="Times that every particle is seen."
        ),
        click.option(
            "--learning-rate", type=LENGTH, default=learning_rate, help="Highest rate of the optimiser."
        ),
        click.option(
            "--schedule",
            type=click.Choice(["plateau", "cosine", "constant"]),
            default=schedule,
            help="plateau: the rate is halved when the validation loss has not fallen for --patience epochs.",
        ),
        click.option("--patience", type=click.IntRange(min=1), default=6, help="Epochs, for plateau."),
        click.option(
            "--stop-after",
            type=click.IntRange(min=0),
            default=stop_after,
            help="End when the validation loss has not fallen for so many epochs; 0: never.",
        ),
        click.option("--weight-decay", type=NOT_NEGATIVE, default=1e-10, help="Of AdamW."),
        click.option("--batch-size", type=click.IntRange(min=1), default=batch_size, help="Crops a step."),
        click.option(
            "--average",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            help="Decay a step of a running average of the weights, such as 0.99; 0: none.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            help="Of the network's multiplications; bfloat16 is faster where the processor has it.",
        ),
        click.option(
            "--augment",
            callback=_changes,
            default="turns",
            metavar="none|turns|full[,FIELD=NUMBER...]",
            help="turns: flips and 90° about the beam; full: small tilts, size, intensities, filters too; "
            "numbers of Augmentation may follow: full,wedge=45 leaves ±45° of tilts or more to half of them.",
        ),
        click.option(
            "--partial",
            is_flag=True,
            help="The picks are true but not all: learn nothing around candidates that none explains.",
        ),
        click.option(
            "--validate/--no-validate",
            "validate",
            default=True,
            help="Keep a fifth aside to choose the best by, or learn from all and keep the last weights.",
        ),
        click.option(
            "--calibrate/--no-calibrate",
            default=True,
            help="Shift the scores so that 0.3 is the best threshold on what is kept aside.",
        ),
    ]

    return add_options(options)


@click.command("finetune", short_help="Train a picker on, with your own tomograms.")
@click.argument("table", type=_TABLE, metavar="[TABLE.csv]", required=False)
@portal_options
@click.option("--picker", default="base", metavar="NAME|FILE", help="The picker to begin with.")
@_run_options
@_table_options(epochs=20, learning_rate=5e-5, batch_size=4, schedule="cosine", stop_after=0)
def finetune_command(table: Path | None, output: Path, augment: Augmentation, **settings: Any) -> None:
    """Train a picker on with the tomograms and picks of TABLE.csv, of the portal (--portal), or of both.

    Columns of the table: tomogram, picks (any format that convert reads), diameter (longest axis, Å), and
    where wanted contrast (dark or bright), particle (one kind of a file that has several), group
    (tomograms that validation must not part), annotated (a mask, or a box such as 0:200 0:512 0:300 in
    voxels z y x: nothing is learnt outside), partial (yes: see --partial), others (picks of other kinds,
    * for those of the same file: to be told apart), weight (1: how often it is seen), voxel_size (Å, where
    the header is wrong) and beam_axis (y: not turned yet). Paths are relative to the table. Every particle
    of the kind should be in the picks: what is not there is learnt as background.
    """
    from tomocpt_stream.training import fine_tune

    _refuse_place(output, settings["folder"])
    own = [] if settings["picker"] == "base" else [settings["picker"]]
    examples = _examples(table, output, own, settings)
    if not examples:
        raise click.UsageError("Give TABLE.csv or --portal: tomograms to learn from.")

    settings["validation"], minutes = settings.pop("validate"), settings.pop("minutes")

    def made(progress: Progress, on_step: Callable[[Step], None]) -> Picker:
        return fine_tune(examples, augmentation=augment, progress=progress, on_step=on_step, **settings)

    _write(made, output, "finetune", f"picker, fine-tuned on {count(len(examples), 'tomogram')}", minutes)


@click.command("train", short_help="Train a picker from nothing.")
@click.option(
    "--table",
    type=_TABLE,
    metavar="TABLE.csv",
    help="Your own tomograms, as for finetune.  [default, without --portal: simulated ones]",
)
@portal_options
@_run_options
@click.option(
    "--architecture",
    type=click.Choice(["small", "paper"]),
    default="small",
    help="4.6 million weights, or the paper's 41 million.",
)
@click.option(
    "--label", type=click.Choice(["gaussian", "binary"]), default="gaussian", help="What is learnt."
)
@click.option("--particle-radius", type=LENGTH, default=10.0, help="Radius in working voxels.")
@_table_options(epochs=150, learning_rate=4e-4, batch_size=10, schedule="plateau", stop_after=36)
@click.option(
    "--steps", type=click.IntRange(min=1), default=3000, help="Without --table: steps of the optimiser."
)
@click.option(
    "--tomograms", type=click.IntRange(min=1), default=200, help="Simulated tomograms to learn from."
)
@click.option(
    "--validation", type=click.IntRange(min=1), default=12, help="More of them, to choose the best by."
)
@click.option("--workers", type=click.IntRange(min=1), default=2, help="Tomograms simulated at once.")
@click.option(
    "--maps", type=_FOLDER, metavar="DIR", help="Density maps (.mrc) that simulated tomograms also hold."
)
@click.option(
    "--held-maps", type=_FOLDER, metavar="DIR", help="Those of --validation, of other proteins than --maps."
)
@click.option("--picker", metavar="NAME|FILE", help="Go on from this picker on simulated tomograms.")
@click.pass_context
def train_command(context: click.Context, /, table: Path | None, output: Path, **settings: Any) -> None:
    """Train a picker from nothing: on your own tomograms with --table, else on simulated ones.

    With --table or --portal the options up to --calibrate hold, whose defaults are the paper's; every
    particle of the kind should be in the picks. Without them, the recipe of the shipped picker: tomograms
    of many shapes, and --steps with the options after it hold.
    """
    own = table is not None or bool(settings["portal"])
    _refuse_idle(context, own=own)
    _refuse_place(output, settings["folder"])
    if not own:
        from tomocpt_stream.destinations import refuse_overwriting

        maps = [one for one in (settings["maps"], settings["held_maps"]) if one is not None]
        files = [str(path) for folder in maps for path in folder.iterdir()]
        parent = [] if settings["picker"] in (None, "base") else [settings["picker"]]
        refuse_overwriting([*files, *parent], output)
        phantoms = {name: settings[name] for name in (*_OF_PHANTOMS, "folder", "seed", "devices")}
        phantoms["architecture"] = settings["architecture"]
        if context.get_parameter_source("batch_size") is ParameterSource.COMMANDLINE:
            phantoms["batch_size"] = settings["batch_size"]  # whose default is that of a table
        _write(lambda *told: _base(*told, **phantoms), output, "train", "picker", settings["minutes"])
        return
    from tomocpt_stream.training import train

    examples = _examples(table, output, [], settings)
    minutes = settings.pop("minutes")
    validation = settings.pop("validate")  # --validation is a number of phantoms
    chosen = {name: value for name, value in settings.items() if name not in _OF_PHANTOMS}
    chosen |= {"validation": validation, "augmentation": chosen.pop("augment")}

    def made(progress: Progress, on_step: Callable[[Step], None]) -> Picker:
        return train(examples, progress=progress, on_step=on_step, **chosen)

    _write(made, output, "train", f"picker, trained on {count(len(examples), 'tomogram')}", minutes)


def _base(
    progress: Progress,
    on_step: Callable[[Step], None],
    *,
    folder: Path,
    devices: int,
    architecture: str,
    batch_size: int | None = None,
    **settings: Any,
) -> Picker:
    """Return a picker trained by the recipe of the shipped one."""
    from tomocpt_stream.curriculum import Recipe, base_options, train_base
    from tomocpt_stream.diary import Diary
    from tomocpt_stream.loop import OnStep
    from tomocpt_stream.network import named_architecture
    from tomocpt_stream.picker import load_picker

    options = base_options(steps=settings.pop("steps"), seed=settings["seed"])
    options = replace(options, architecture=named_architecture(architecture))
    options = replace(options, batch_size=batch_size or options.batch_size)
    workers, picker = settings.pop("workers"), settings.pop("picker")
    maps, held_maps = _maps(settings.pop("maps")), _maps(settings.pop("held_maps"))
    with closing(Diary(folder)) as diary:
        return train_base(
            folder,
            recipe=Recipe(**settings, maps=maps, held_maps=held_maps, options=options),
            start=None if picker is None else load_picker(picker),
            workers=workers,
            devices=devices,
            progress=progress,
            listeners=[diary, OnStep(on_step)],
        )


def _maps(folder: Path | None) -> tuple[str, ...]:
    """Return the maps of a folder, by name."""
    if folder is None:
        return ()
    found = sorted(str(path) for path in folder.glob("*.mrc"))
    if not found:
        raise PlanError(
            f"{folder} without a map", expected="files that end in .mrc", remedy="choose another folder"
        )
    return tuple(found)


def _refuse_idle(context: click.Context, *, own: bool) -> None:
    """Refuse options that would decide nothing."""
    given = {
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    idle = given & set(_OF_PHANTOMS) if own else given - {*_OF_PHANTOMS, *_OF_BOTH}
    if idle:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in idle))
        raise PlanError(
            f"{names} {'with' if own else 'without'} --table or --portal",
            expected="options of a run on simulated tomograms, or of one on your own",
            remedy="leave them out" if own else "give --table or --portal, or leave them out",
        )


def _examples(
    table: Path | None, output: Path, others: list[str], settings: dict[str, Any]
) -> list[LabelledTomogram]:
    """Return the tomograms of a table and of the portal; the output overwrites none of the files."""
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.training_table import read_table

    examples = [] if table is None else read_table(table)
    inputs = [str(path) for one in examples for path in (one.tomogram, one.picks)]
    inputs += [] if table is None else [str(table)]
    refuse_overwriting([*inputs, *settings["truth"], *others], output)
    radius = settings.get("particle_radius", 10.0)
    if settings["portal"] and "particle_radius" not in settings:  # that of the picker which learns on
        from tomocpt_stream.picker import load_picker

        radius = load_picker(settings["picker"], device="cpu").particle_radius
    examples += portal_examples(settings, output, particle_radius=radius)
    return [replace(one, partial=True) for one in examples] if settings.pop("partial") else examples


def _refuse_place(output: Path, folder: Path) -> None:
    """Refuse, before hours of training, what cannot take the picker, or is what the run goes on from."""
    if output.suffix != ".safetensors":
        raise PlanError(
            f"the output {output}", expected="a name that ends in .safetensors", remedy="rename it"
        )
    place, run = output.resolve(), folder.resolve() / "run"
    if run in place.parents:
        raise PlanError(
            f"the output {output} among the checkpoints of the run",
            expected=f"a place outside {folder / 'run'}",
            remedy="choose another place for the output",
        )
    there = next(one for one in place.parents if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PlanError(
            f"the output {output} in {there}, where nothing can be written",
            expected="a folder",
            remedy="choose another place for the output",
        )


def _write(
    made: Callable[[Progress, Callable[[Step], None]], Picker],
    output: Path,
    stage: str,
    what: str,
    minutes: float | None,
) -> None:
    """Make a picker, showing how it comes along, and write it; end where so many minutes are over."""
    from tomocpt_stream.loop import TimeOver

    end = None if minutes is None else monotonic() + 60 * minutes

    def refuse_late() -> None:
        if end is not None and monotonic() > end:
            raise TimeOver

    with show_progress() as shown:

        def progress(stage: str, done: int, total: int) -> None:
            shown(stage, done, total)
            if stage not in _IN_ONE:
                refuse_late()

        def listen(step: Step) -> None:
            shown(stage, step.step, step.steps)
            if step.validation is not None:
                click.echo(f"step {step.step}: loss {step.loss:.5f}, validation {step.validation:.5f}")
            if step.step < step.steps:
                refuse_late()

        try:
            picker = made(progress, listen)
        except TimeOver:
            click.echo(f"{minutes:g} minutes are over; the same command goes on")
            click.get_current_context().exit(_TIME_OVER)
    picker.save(output)
    click.echo(f"{what} -> {output}")
