"""Options that several commands have, each with one meaning in all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _Positive(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        # A range lets what is no number pass.
        return number if math.isfinite(number) else self.fail(f"{value} is not finite.", param, ctx)


LENGTH = _Positive(min=0, min_open=True)
"""A length, or another number above 0."""


def tomograms_option(name: str = "tomograms") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
