"""Which tomograms of the portal are learnt from, and what on them is the truth: as data, and as one text.

A text is of words KEY=VALUE, quoted as in a shell: `dataset=10003 object="*ribosome*" diameter=250`.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from tomocpt_stream.annotation_files import PointShape, Wanted
from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_annotations import Missing, number_of
from tomocpt_stream.portal_scope import MEANINGS, read_scope
from tomocpt_stream.portal_selection import filters, preference
from tomocpt_stream.remote import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tomocpt_stream.portal_scope import Meaning, Scope
    from tomocpt_stream.portal_selection import Flag

_WHERE = ("deposition", "dataset", "run", "tomogram")
# What says which annotation is the truth, and so has no meaning beside a file of it.
_ANNOTATED = ("object", "ground_truth", "method", "shape", "annotation", "annotation_deposition")

_ADDRESS = re.compile(r"\w+://\S*")


@dataclass(frozen=True, kw_only=True)
class LabelQuery:
    """Tomograms of the portal to learn from, and the truth on them: annotations of an object, or files.

    `diameter` (longest axis, Å) is asked for because the portal keeps no sizes of particles. `contrast` is
    that of `LabelledTomogram`. `deposition` to `ctf_corrected` are those of `portal.select_tomograms`;
    `selection` is a file that `Selection.write` wrote, in place of all of them. `object` to
    `annotation_deposition` choose annotations as `portal.find_picks` does; `annotation` may be several,
    one for each run. `truth` are coordinate files whose tomograms are called as the runs are, in place of
    annotations, `particle` their kind where they have several. `near` (Å, diameter over twice the
    picker's radius where it is None) and `prefer` choose among the tomograms of a run on which the truth
    lies, `all` takes every one. `exclude` are names or globs of runs to leave out; `test` runs, drawn by
    `test_seed`, are kept aside. `missing` "skip" leaves out what cannot be read.

    Raises PortalError where something is asked for that nothing can have.
    """

    diameter: float
    contrast: str = "dark"
    deposition: tuple[str, ...] = ()
    dataset: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    tomogram: tuple[str, ...] = ()
    meaning: Meaning | None = None
    voxel_spacing: float | None = None
    processing: tuple[str, ...] = ()
    reconstruction: tuple[str, ...] = ()
    organism: str | None = None
    software: str | None = None
    standard: Flag | None = None
    ctf_corrected: Flag | None = None
    selection: str | None = None
    object: str | None = None
    ground_truth: bool | None = None
    method: str | None = None
    shape: PointShape | None = None
    annotation: tuple[str, ...] = ()
    annotation_deposition: str | None = None
    truth: tuple[str, ...] = ()
    particle: str | None = None
    near: float | None = None
    prefer: tuple[str, ...] = ()
    all: bool = False
    exclude: tuple[str, ...] = ()
    test: int = 0
    test_seed: int = 0
    missing: Missing = "error"

    def __post_init__(self) -> None:
        """Refuse what nothing can have, before anybody is asked."""
        for field in fields(self):  # one word is as good as a tuple of one
            value = getattr(self, field.name)
            if field.type == "tuple[str, ...]" and not isinstance(value, tuple):
                several = [value] if isinstance(value, str | int) else value
                object.__setattr__(self, field.name, tuple(map(str, several)))
        if not (math.isfinite(self.diameter) and self.diameter > 0):
            raise _refused(f"a diameter of {self.diameter} Å", "a positive number", "give the longest axis")
        for name, known in (
            ("contrast", ("dark", "bright")),
            ("shape", (None, *get_args(PointShape))),
            ("missing", get_args(Missing)),
            ("meaning", (None, *MEANINGS)),
        ):
            value = getattr(self, name)
            if value not in known:
                words = ", ".join(word for word in known if word)
                raise _refused(f"{name}={value}", f"one of {words}", "choose one of them")
        if self.test < 0 or self.test_seed < 0:
            raise _refused(f"test={self.test} test_seed={self.test_seed}", "whole numbers from 0", "correct")
        self._refuse_contradictions()
        if self.selection is None:
            self.scope()
            filters(**self.conditions())
        preference((), near=self.near, prefer=self.prefer or None)
        self.wanted()
        self.annotations()

    def scope(self) -> Scope:
        """Return where tomograms are looked for."""
        asked = {name: getattr(self, name) or None for name in _WHERE}
        return read_scope(**asked, meaning=self.meaning)

    def conditions(self) -> dict[str, Any]:
        """Return the conditions on tomograms, by the names that `select_tomograms` has for them."""
        return {
            "voxel_spacing": self.voxel_spacing,
            "processing": self.processing or None,
            "reconstruction": self.reconstruction or None,
            "software": self.software,
            "standard": self.standard,
            "ctf_corrected": self.ctf_corrected,
        }

    def wanted(self) -> Wanted:
        """Return which annotations are asked for, their numbers apart."""
        return Wanted(
            object=self.object,
            ground_truth=self.ground_truth,
            method=self.method,
            deposition=number_of(self.annotation_deposition, "CZCDP"),
        )

    def annotations(self) -> set[int]:
        """Return the numbers of the annotations that are asked for; none where any will do."""
        return {number for text in self.annotation if (number := number_of(text, "AN")) is not None}

    def __str__(self) -> str:
        said = [f"{name} {', '.join(getattr(self, name))}" for name in _WHERE if getattr(self, name)]
        return ", ".join(said) or f"selection {self.selection}"

    def _refuse_contradictions(self) -> None:
        chosen = [name for name in _ANNOTATED if getattr(self, name) not in (None, ())]
        if self.truth and chosen:
            raise _refused(
                f"truth= together with {', '.join(chosen)}",
                "coordinate files (truth), or annotations of the portal",
                "leave one of them out",
            )
        if self.particle is not None and not self.truth:
            raise _refused(f"particle={self.particle} without truth=", "a file of kinds", "pass object=")
        if not self.truth and self.object is None and not self.annotation:
            raise _refused(
                f"{self} without a truth",
                "object= or annotation= of the portal, or truth= (--truth): coordinate files",
                "say what the particles are; `tomocpt-stream portal annotations` lists what is there",
            )
        others = [name for name in _WHERE if getattr(self, name)]
        others += [name for name, value in self.conditions().items() if value is not None]
        others += [name for name in ("meaning", "organism") if getattr(self, name) is not None]
        if self.selection is not None and others:
            raise _refused(
                f"selection= together with {', '.join(others)}",
                "a file that says which tomograms are meant, or conditions",
                "leave one of them out",
            )
        if self.all and (self.near is not None or self.prefer):
            raise _refused("all=yes with near or prefer", "every tomogram, or a preference", "choose one")


def read_query(text: str, *, truth: Sequence[str] = ()) -> LabelQuery:
    """Return the query of a text of words KEY=VALUE, whose keys are the fields of `LabelQuery`.

    Dashes count as underscores; lists are comma-separated, or keys are repeated. `truth` are files for a
    text that chooses neither annotations nor files.

    Raises
    ------
    PortalError
        A key is unknown, given twice or has a value that it cannot have; or something is left out.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _refused(f"{text!r} ({error})", "words KEY=VALUE, quoted as in a shell", "close it") from error
    kinds = {field.name: str(field.type) for field in fields(LabelQuery)}
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in kinds:
            near = get_close_matches(key, kinds, 1)
            hint = f"did you mean {near[0]}=? " if near else ""
            raise _refused(f"{word!r}", f"KEY=VALUE, the keys being {', '.join(kinds)}", f"{hint}correct it")
        if not value.strip():
            raise _refused(f"{key}= of nothing", "a value", "give one, or leave the key out")
        several = kinds[key].startswith("tuple")
        if key in found and not several:
            raise _refused(f"{key}= twice", "one of them", "leave one out")
        read = _value(key, kinds[key].removesuffix(" | None"), value.strip())
        found[key] = (*found.get(key, ()), *read) if several else read
    if "diameter" not in found:
        raise _refused(
            f"{text!r} without a diameter",
            "diameter=Å, the longest axis: the portal keeps no sizes of particles",
            "add it",
        )
    if found.keys().isdisjoint(("truth", *_ANNOTATED)):
        found["truth"] = tuple(truth)
    return LabelQuery(**found)


def _value(key: str, kind: str, text: str) -> Any:
    if kind.startswith("tuple"):
        parts = tuple(part.strip() for part in text.split(","))
        if not all(parts):
            raise _refused(f"{key}={text}", "a list without gaps", "take out the commas too many")
        return parts
    readers: dict[str, tuple[Callable[[str], Any], str]] = {
        "float": (float, "a number"),
        "int": (int, "a whole number"),
        "bool": ({"yes": True, "no": False}.__getitem__, "yes or no"),
        "Flag": ({"yes": True, "no": False, "unknown": "unknown"}.__getitem__, "yes, no or unknown"),
    }
    if kind not in readers:
        return text
    read, expected = readers[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise _refused(f"{key}={text}", expected, "correct it") from error


def _refused(found: str, expected: str, remedy: str) -> PortalError:
    """Return the error for a text; a text has addresses, and these have secrets."""
    plain = _ADDRESS.sub(lambda address: shown(address[0]), found)
    return PortalError(plain, expected=expected, remedy=remedy)
