"""Options that several commands have, each with one meaning in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import click


class _Finite(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        # A range lets what is no number pass.
        return number if math.isfinite(number) else self.fail(f"{value} is not finite.", param, ctx)


LENGTH = _Finite(min=0, min_open=True)
"""A length, or another number above 0."""

NOT_NEGATIVE = _Finite(min=0)
"""A number of 0 or more."""

Command = Callable[..., Any]


def add_options(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Return what adds options to a command, which lists them in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def kept_answers_options(command: Command) -> Command:
    """Add the options that say how fresh the portal's answers are."""
    return add_options(
        [
            click.option(
                "--refresh", is_flag=True, help="Ask the portal again, whatever was kept of its answers."
            ),
            click.option(
                "--offline", is_flag=True, help="Use what was kept of the portal's answers, and no other."
            ),
        ]
    )(command)


def tomograms_option(name: str = "tomograms") -> Callable[[Command], Command]:
    """Return the option --tomograms, whose files a command gets as a tuple of paths called `name`."""
    return click.option(
        "--tomograms",
        name,
        type=click.Path(exists=True),
        multiple=True,
        metavar="FILE",
        help="Names and sizes of tomograms, where a format needs them: a tomograms.star, Warp's .settings or "
        ".tomostar files, repeatable; or a Dynamo .doc.",
    )


def one_or_all(files: Sequence[str]) -> str | Sequence[str] | None:
    """Return the files of --tomograms as the readers of coordinate files take them: a .doc comes alone."""
    return (files[0] if len(files) == 1 else files) or None
