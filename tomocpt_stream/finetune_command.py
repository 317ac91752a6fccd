"""`tomocpt-stream finetune`: a picker learns on from a table of tomograms and their truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import PlanError
from tomocpt_stream.terminal import count, show_progress

if TYPE_CHECKING:
    from tomocpt_stream.training import Step

_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("finetune", short_help="Train a picker on, with your own tomograms.")
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TABLE.csv")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Keeps working volumes and checkpoints; run again, fine-tuning goes on from there.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE.safetensors",
    help="The fine-tuned picker.",
)
@click.option("--picker", default="base", metavar="NAME|FILE", help="The picker to begin with.")
@click.option("--epochs", type=click.IntRange(min=1), default=20, help="Times that every particle is seen.")
@click.option("--learning-rate", type=_POSITIVE, default=5e-5, help="Highest rate of the optimiser.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, help="Crops a step.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of crops and of what is kept aside.")
def finetune_command(table: Path, folder: Path, output: Path, **settings: Any) -> None:
    """Train a picker on with the tomograms and picks of TABLE.csv.

    Its columns: tomogram, picks (any format that convert reads), diameter (longest axis, Å), and where
    wanted contrast (dark or bright), particle (one kind of a file that has several) and group (tomograms
    that validation must not part). Paths are relative to the table. Every particle of the kind should be
    in the picks: what is not there is learnt as background.
    """
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.finetuning import fine_tune
    from tomocpt_stream.labelled import read_table

    if output.suffix != ".safetensors":
        raise PlanError(
            f"the output {output}", expected="a name that ends in .safetensors", remedy="rename it"
        )
    examples = read_table(table)
    inputs = [str(path) for one in examples for path in (one.tomogram, one.picks)]
    own = [] if settings["picker"] == "base" else [settings["picker"]]
    refuse_overwriting([str(table), *inputs, *own], output)
    with show_progress() as progress:

        def listen(step: Step) -> None:
            progress("finetune", step.step, step.steps)
            if step.validation is not None:
                click.echo(f"step {step.step}: loss {step.loss:.5f}, validation {step.validation:.5f}")

        picker = fine_tune(examples, folder=folder, progress=progress, on_step=listen, **settings)
    picker.save(output)
    click.echo(f"picker, fine-tuned on {count(len(examples), 'tomogram')} -> {output}")
