"""Which tomograms to take: filters, one of each run by a stated preference, and an account of both.

Pure functions over records. The portal has several tomograms of most runs, of other voxel spacings and
other processing, so that a picker let loose on all of them would find each particle several times.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Literal

from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_records import LeftOut, Selection, TomogramRecord, by_place

Flag = bool | Literal["unknown"] | tuple[bool | Literal["unknown"], ...]
"""What a flag must be; "unknown" where the portal does not say. Several: one of them."""

Prefer = Literal["all"] | str | Sequence[str] | Callable[[TomogramRecord], Any]

ORDER = ("raw", "filtered", "denoised")
"""Processing as a picker is best served: pickers are trained on tomograms as they come from the
reconstruction, or filtered; a denoising network invents a texture that none of them has seen."""

HALVES = ("filtered_even", "filtered_odd")
"""Reconstructions of half of the data, made for training denoisers: never taken unless asked for."""

PROCESSING = (*ORDER, *HALVES)
RECONSTRUCTION = ("WBP", "SART", "SIRT", "Fourier_Space", "Unknown")

SAME_SPACING = 0.01
"""Å by which two voxel spacings may differ and be the same: the portal rounds to 0.001, people more."""

_FLAGS = {
    "standard": "is_portal_standard",
    "alignment_standard": "alignment_is_portal_standard",
    "visualization_default": "is_visualization_default",
    "ctf_corrected": "ctf_corrected",
    "author_submitted": "is_author_submitted",
}
_SHOWN = 6  # examples in a sentence


@dataclass(frozen=True)
class Filter:
    """One condition: its `text` as it was asked for, whether a record passes, and what the record has."""

    text: str
    admits: Callable[[TomogramRecord], bool]
    has: Callable[[TomogramRecord], str]


def filters(
    *,
    voxel_spacing: float | tuple[float, float] | None = None,
    processing: str | Sequence[str] | None = None,
    reconstruction: str | Sequence[str] | None = None,
    software: str | None = None,
    where: Callable[[TomogramRecord], bool] | None = None,
    **flags: Flag | None,
) -> list[Filter]:
    """Return the conditions that were asked for; None asks for nothing.

    `flags` are standard, alignment_standard, visualization_default, ctf_corrected, author_submitted.
    `software` is a glob for the software of processing or reconstruction, capitals or not.

    Raises
    ------
    PortalError
        A value that nothing can have.
    """
    found = []
    if voxel_spacing is not None:
        found.append(_spacing_filter(voxel_spacing))
    if processing is not None:
        kinds = known_words("processing", processing, PROCESSING)
        found.append(_word_filter("processing", kinds, lambda record: record.processing))
    if reconstruction is not None:
        kinds = known_words("reconstruction", reconstruction, RECONSTRUCTION)
        found.append(_word_filter("reconstruction", kinds, lambda record: record.reconstruction))
    for name, flag in flags.items():
        if flag is not None:
            found.append(_flag_filter(name, flag))
    if software is not None:
        pattern = software.casefold()
        found.append(
            Filter(
                f"software={software!r}",
                lambda record: any(fnmatchcase(name.casefold(), pattern) for name in _software(record)),
                lambda record: " and ".join(_software(record)) or "unknown software",
            )
        )
    if where is not None:
        name = getattr(where, "__name__", type(where).__name__)
        found.append(Filter(f"where={name}", where, lambda _: "another answer"))
    return found


def _spacing_filter(wanted: float | tuple[float, float]) -> Filter:
    if isinstance(wanted, int | float):
        low, high, text = float(wanted), float(wanted), f"voxel_spacing={wanted:g} Å"
    else:
        low, high = wanted
        text = f"voxel_spacing from {low:g} to {high:g} Å"
    if not 0 < low <= high < float("inf"):
        raise PortalError(
            text, expected="a length in Å, or a low and a high one", remedy="pass for example 10.0 or (9, 11)"
        )
    return Filter(
        text,
        # Rounded, so that exactly the tolerance is still within it.
        lambda record: (
            round(low - SAME_SPACING, 6) <= round(record.voxel_spacing, 6) <= round(high + SAME_SPACING, 6)
        ),
        lambda record: f"{record.voxel_spacing:g} Å",
    )


def _word_filter(name: str, words: Sequence[str], read: Callable[[TomogramRecord], str]) -> Filter:
    return Filter(f"{name}={' or '.join(words)}", lambda record: read(record) in words, read)


def _flag_filter(name: str, flag: Flag) -> Filter:
    field = _FLAGS[name]
    wanted = flag if isinstance(flag, tuple) else (flag,)
    if not wanted or any(each not in (True, False, "unknown") for each in wanted):
        raise PortalError(
            f"{name}={flag!r}",
            expected='True, False, "unknown", or a tuple of these',
            remedy="pass one of them",
        )

    def state(record: TomogramRecord) -> bool | str:
        value = getattr(record, field)
        return "unknown" if value is None else bool(value)

    words = " or ".join(str(each).lower() for each in wanted)
    return Filter(
        f"{name}={words}", lambda record: state(record) in wanted, lambda record: str(state(record)).lower()
    )


def known_words(name: str, asked: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Return words in the portal's spelling: capitals, blanks and dashes do not count.

    Raises
    ------
    PortalError
        One of them is unknown, or there are none.
    """
    spelling = {_plain(word): word for word in known}
    given = asked.split(",") if isinstance(asked, str) else list(asked)
    if not given or (wrong := [word for word in given if _plain(word) not in spelling]):
        raise PortalError(
            f"{name}={', '.join(map(repr, wrong)) if given else repr(asked)}",
            expected=f"one or several of {', '.join(known)}",
            remedy="check the spelling",
        )
    return [spelling[_plain(word)] for word in given]


def _plain(word: str) -> str:
    return word.strip().casefold().replace(" ", "_").replace("-", "_")


def _software(record: TomogramRecord) -> list[str]:
    return [name for name in (record.processing_software, record.reconstruction_software) if name]


def sift(
    records: Sequence[TomogramRecord], conditions: Sequence[Filter], scope: str
) -> tuple[list[TomogramRecord], list[LeftOut]]:
    """Return the records that pass every condition, and the others with the first that they fail.

    Raises
    ------
    PortalError
        None passes; the message names the condition that left nothing, and what the tomograms have
        instead. `scope` says where they come from ("deposition 10310").
    """
    left, out = list(records), []
    for number, condition in enumerate(conditions):
        passed = [record for record in left if condition.admits(record)]
        if not passed and left:
            raise _nothing_left(left, conditions, number, scope, len(records), records)
        out += [
            LeftOut(record, f"{condition.text} was asked for, and this one has {condition.has(record)}")
            for record in left
            if not condition.admits(record)
        ]
        left = passed
    return left, out


def _nothing_left(
    left: Sequence[TomogramRecord],
    conditions: Sequence[Filter],
    number: int,
    scope: str,
    total: int,
    records: Sequence[TomogramRecord],
) -> PortalError:
    """Return the error for a condition that none of those left by the earlier ones passes."""
    condition = conditions[number]
    before = " and ".join(each.text for each in conditions[:number])
    kept = f", {len(left)} with {before}," if before else ""
    has = Counter(condition.has(record) for record in left).most_common()
    others = ", ".join(f"{count} with {what}" for what, count in has[:_SHOWN])
    others += f" and {len(has) - _SHOWN} other kinds" if len(has) > _SHOWN else ""
    alone = sum(map(condition.admits, records))
    without = f" ({alone} of the {total} would, without the conditions before it)" if alone else ""
    return PortalError(
        f"{scope} has {plural(total, 'tomogram')}{kept} and none passes {condition.text}{without}",
        expected="at least one that passes all that was asked for",
        remedy=f"change or leave out {condition.text.split('=')[0].split(' ')[0]}: there are {others}",
    )


@dataclass(frozen=True)
class Preference:
    """By what one tomogram of each run is taken: `text` states it, `rank` sorts, the least is taken."""

    text: str
    rank: Callable[[TomogramRecord], Any]


def preference(
    records: Sequence[TomogramRecord], *, near: float | None = None, prefer: Prefer | None = None
) -> Preference:
    """Return the preference for some records.

    First the voxel spacing: nearest `near` (Å), the finer of two as near; without `near` the one that
    most runs have, the coarser of two as common. Then the processing: raw, filtered, denoised, or in the
    order of `prefer`. Then what is the portal's standard, what lies on a standard alignment, what the
    portal shows first. A zarr comes before an MRC file, whatever else. With a function as `prefer` what
    it returns decides alone, the least first.

    Raises
    ------
    PortalError
        `near` is no length, or `prefer` names what is not there to be preferred.
    """
    if near is not None and not 0 < near < float("inf"):
        raise PortalError(f"near={near!r}", expected="a length in Å", remedy="pass for example near=10.0")
    if callable(prefer):
        chosen = prefer  # in a name of its own: narrowed for the function below
        name = getattr(prefer, "__name__", type(prefer).__name__)
        return Preference(
            f"a zarr before an MRC file, then what {name} puts first",
            lambda record: (record.s3_zarr is None, chosen(record)),
        )
    order = _order(prefer)
    commonness = _commonness(records)

    def spacing(record: TomogramRecord) -> tuple[float, float]:
        size = record.voxel_spacing
        if near is not None:
            return round(abs(size - near), 2), round(size, 2)
        return -commonness.get(record.id, 0), -round(size, 2)

    def rank(record: TomogramRecord) -> tuple[Any, ...]:
        return (
            record.s3_zarr is None,
            *spacing(record),
            order.index(record.processing) if record.processing in order else len(order),
            record.is_portal_standard is not True,
            record.alignment_is_portal_standard is not True,
            record.is_visualization_default is not True,
        )

    if near is not None:
        first = f"voxel spacing nearest {near:g} Å"
    else:
        common = [(commonness[record.id], record.voxel_spacing) for record in records]
        which = f" ({max(common)[1]:g} Å)" if common else ""
        first = f"the voxel spacing that most runs have{which}"
    return Preference(
        f"a zarr before an MRC file, then {first}, then {', '.join(order)}, then the portal's standard, "
        "a standard alignment, and what the portal shows first",
        rank,
    )


def _order(prefer: str | Sequence[str] | None) -> list[str]:
    """Return the order of processings: those that are named, then the others in their usual order."""
    named = [] if prefer is None else known_words("prefer", prefer, PROCESSING)
    if halves := [word for word in named if word in HALVES]:
        raise PortalError(
            f"prefer={', '.join(halves)}, which hold half of the data each",
            expected=f"an order of {', '.join(ORDER)}",
            remedy=f'pass processing="{halves[0]}" to get them all the same',
        )
    return list(dict.fromkeys([*named, *ORDER]))


def _commonness(records: Sequence[TomogramRecord]) -> dict[int, int]:
    """Return for each record how many runs have its voxel spacing."""
    found: dict[int, int] = {}
    group: list[TomogramRecord] = []
    for record in sorted(records, key=lambda each: each.voxel_spacing):
        if group and round(record.voxel_spacing - group[0].voxel_spacing, 6) > SAME_SPACING:
            found |= dict.fromkeys((each.id for each in group), len({each.run_id for each in group}))
            group = []
        group.append(record)
    return found | dict.fromkeys((each.id for each in group), len({each.run_id for each in group}))


def newest(record: TomogramRecord) -> tuple[float, int]:
    """Return what decides a tie, the greatest first: the time of the last change, then the id."""
    try:
        moment = dt.datetime.fromisoformat(record.last_modified)
    except ValueError:
        return float("-inf"), record.id
    return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp(), record.id


def choose(records: Sequence[TomogramRecord], liking: Preference, *, halves: bool = False) -> Selection:
    """Return one tomogram of each run by a preference, the others with the reason, and what was tied.

    Tomograms are tied where the preference puts them level: then the newest is taken, of several the one
    with the highest id, and a note says so. Half data sets are left out unless `halves`.
    """
    taken, out, ties = [], [], []
    for _, group in groupby(sorted(records, key=by_place), key=_run_of):
        run = list(group)
        whole = [record for record in run if halves or record.processing not in HALVES]
        out += [
            LeftOut(record, f"{record.processing} holds half of the data")
            for record in run
            if record not in whole
        ]
        if not whole:
            continue
        ranks = {record.id: liking.rank(record) for record in whole}
        least = min(ranks.values())
        level = sorted((record for record in whole if ranks[record.id] == least), key=newest, reverse=True)
        best = level[0]
        taken.append(best)
        out += [
            LeftOut(record, f"{_why(record, best, level)} ({best.id} of the same run)")
            for record in whole
            if record is not best
        ]
        if len(level) > 1:
            ties.append(level)
    told = _tie_notes(ties)
    text = f"One tomogram of each run is taken, by this preference: {liking.text}; then the newest."
    return Selection(tuple(taken), tuple(out), (text, *told), tuple(told))


def _run_of(record: TomogramRecord) -> tuple[int, int]:
    """Return what the tomograms of one run have in common; those of no run have nothing."""
    return record.dataset_id, record.run_id or -record.id


def _why(record: TomogramRecord, best: TomogramRecord, level: Sequence[TomogramRecord]) -> str:
    """Return why another tomogram of the run was taken."""
    if record in level:
        newer = newest(best)[0] > newest(record)[0]
        return "level with one that is newer" if newer else "level with one of a higher id"
    differing = [
        f"{name} {value}"
        for name, value, other in (
            ("file", "MRC" if record.s3_zarr is None else "zarr", "MRC" if best.s3_zarr is None else "zarr"),
            ("voxel spacing", f"{record.voxel_spacing:g} Å", f"{best.voxel_spacing:g} Å"),
            ("processing", record.processing, best.processing),
        )
        if value != other
    ]
    return f"not the preferred one: {', '.join(differing) or 'a flag'}"


def _tie_notes(ties: Sequence[Sequence[TomogramRecord]]) -> list[str]:
    """Return a sentence for all ties together: their number, examples, and what the tied ones differ in."""
    if not ties:
        return []
    examples = "; ".join(
        f"run {level[0].run} (dataset {level[0].dataset_id}): {level[0].id} taken, the "
        + ("newest" if newest(level[0])[0] > newest(level[1])[0] else "highest id")
        + f", not {', '.join(str(record.id) for record in level[1:])}"
        for level in ties[:_SHOWN]
    )
    more = f"; and {len(ties) - _SHOWN} more" if len(ties) > _SHOWN else ""
    fields = {
        "reconstruction": "reconstruction",
        "ctf_corrected": "ctf_corrected",
        "processing_software": "software",
        "reconstruction_software": "software",
        "deposition_id": "deposition",
        "alignment_id": "the alignment",
        "size": "size",
    }
    differing = dict.fromkeys(
        name
        for field, name in fields.items()
        if any(len({getattr(record, field) for record in level}) > 1 for level in ties)
    )
    hint = (
        f" They differ in {', '.join(differing)}."
        if differing
        else " They differ in nothing that is known here."
    )
    return [
        f"In {plural(len(ties), 'run')} the preference does not settle which tomogram to take: "
        f"{examples}{more}.{hint}"
    ]


def plural(number: int, noun: str) -> str:
    """Return "1 run" or "2 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(items: Iterable[Any]) -> str:
    """Return the first few of some items as text, and how many there are besides."""
    every = list(map(str, items))
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
