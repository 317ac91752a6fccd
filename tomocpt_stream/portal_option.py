"""The options of commands that learn from the portal: --portal, --truth, and how it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tomocpt_stream.errors import PortalError
from tomocpt_stream.options import Command, add_options, kept_answers_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tomocpt_stream.labelled import LabelledTomogram


def portal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what of the portal is learnt from; `portal_examples` takes them out again."""
    options: list[Callable[[Command], Command]] = [
        click.option(
            "--portal",
            multiple=True,
            metavar="QUERY",
            help="Learn from tomograms of the CZ CryoET Data Portal, which are read from its bucket, "
            'repeatable: "dataset=10003 object=*ribosome* diameter=250". Further keys: the options of '
            "`portal list` and `portal annotations`, annotation (AN-...), contrast, exclude=RUN, test=N "
            "(runs to keep aside), test_seed, missing=skip, truth=FILE, particle.",
        ),
        click.option(
            "--truth",
            multiple=True,
            metavar="FILE|ADDRESS",
            help="Picks for each --portal that names no object, in any format that convert reads, "
            "repeatable; its tomograms are called as the runs are.",
        ),
        kept_answers_options,
    ]
    return add_options(options)(command)


def portal_examples(
    settings: dict[str, Any], output: Path, *, particle_radius: float = 10.0
) -> list[LabelledTomogram]:
    """Take the options of `portal_options` out of `settings`; return what they mean, none without --portal.

    What was found is printed, and written beside `output`: citations.md, citations.bib, selection.json
    and, of runs that are kept for it, test.json (test_1.json, ... where --portal is given several times).
    """
    texts, truth = settings.pop("portal"), settings.pop("truth")
    refresh, offline = settings.pop("refresh"), settings.pop("offline")
    if not texts:
        if truth:
            raise click.UsageError("--truth is for --portal; a table names its picks itself.")
        return []
    from tomocpt_stream.destinations import refuse_overwriting
    from tomocpt_stream.label_queries import read_query
    from tomocpt_stream.portal_labels import account_names, find_labelled
    from tomocpt_stream.portal_queries import PortalAPI
    from tomocpt_stream.remote import shown

    queries = [read_query(text, truth=truth) for text in texts]
    if unused := sorted(set(truth) - {path for query in queries for path in query.truth}):
        raise PortalError(
            f"--truth {', '.join(map(shown, unused))}, but every --portal names an object or its own truth",
            expected="a --portal that neither names an object nor a truth",
            remedy="leave out --truth, or object= where the portal has none",
        )
    inputs = [path for query in queries for path in (query.selection, *query.truth) if path]
    account = [output.parent / name for name in account_names(len(queries))]
    refuse_overwriting(inputs, output, *account)
    api = PortalAPI(refresh=refresh, offline=offline)
    labels = find_labelled(*queries, particle_radius=particle_radius, api=api)
    for note in labels.notes:
        click.echo(note, err=True)
    labels.write_account(output.parent, api=api)
    return list(labels.examples)
