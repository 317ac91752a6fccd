"""Whom to thank for data of the CZ CryoET Data Portal: a table, BibTeX and JSON of what was used.

The table is the one that the portal asks for, one line for each deposition and kind of thing taken from
it. Every reference ends with the portal's own paper.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tomocpt_stream.portal_queries import PortalAPI

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tomocpt_stream.annotation_files import AnnotationRecord
    from tomocpt_stream.portal_records import TomogramRecord

    Row = dict[str, Any]

PORTAL = "https://cryoetdataportal.czscience.com"

COLUMNS = ("Deposition ID", "Entity Type", "Entity IDs", "Primary Authors", "Publication DOIs")

_AUTHOR = ("name", "orcid", "authorListOrder", "primaryAuthorStatus")
_DOI = re.compile(r"10\.\d{4,9}/\S+")
# BibTeX counts braces whatever stands before them, so that those of a text must not be braces.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\textbraceleft{}",
    "}": r"\textbraceright{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "$&%#_"},
}


@dataclass(frozen=True)
class Author:
    """A person or a group; `orcid` is None where the portal has none."""

    name: str
    orcid: str | None = None


@dataclass(frozen=True)
class Reference:
    """A deposition, a dataset or the portal's paper, as a list of references has it.

    `key` is its id, such as DS-10440. `authors` are in the order of the portal, `year` is that of the
    release, and `dois` are those of papers about it (of the paper itself for the portal's).
    """

    key: str
    title: str
    authors: tuple[Author, ...]
    year: int | None
    dois: tuple[str, ...]
    url: str


@dataclass(frozen=True)
class Citation:
    """What was taken of one kind from one deposition.

    `entity_type` is "Dataset", "Tomogram" or "Annotation". `primary_authors` are those of the entities,
    or else of the deposition. `dois` are those of the entities, then those of the deposition.
    """

    deposition: str
    entity_type: str
    entities: tuple[str, ...]
    primary_authors: tuple[Author, ...]
    dois: tuple[str, ...]
    references: tuple[Reference, ...]


PAPER = Reference(
    key="ermel2024",
    title="A data portal for providing standardized annotations for cryo-electron tomography",
    authors=tuple(
        Author(name)
        for name in (
            *("Ermel, U.", "Cheng, A.", "Ni, J. X.", "Gadling, J.", "Venkatakrishnan, M.", "Evans, K."),
            *("Asuncion, J.", "Sweet, A.", "Pourroy, J.", "Wang, Z. S.", "Khandwala, K.", "Nelson, B."),
            *("McCarthy, D.", "Wang, E. M.", "Agarwal, R.", "Carragher, B."),
        )
    ),
    year=2024,
    dois=("10.1038/s41592-024-02477-2",),
    url="https://doi.org/10.1038/s41592-024-02477-2",
)
"""The paper about the portal (Nature Methods 21, 2200 to 2202)."""


def citations(
    records: Iterable[TomogramRecord],
    annotations: Iterable[AnnotationRecord] = (),
    *,
    api: PortalAPI | None = None,
) -> list[Citation]:
    """Return what to cite for tomograms and annotations, by deposition: datasets, tomograms, annotations.

    Raises
    ------
    PortalError
        The portal does not answer.
    """
    asked = _Asked(
        api or PortalAPI(),
        {record.id: record for record in records},
        {annotation.id: annotation for annotation in annotations},
    )
    found = asked.datasets() + asked.tomograms() + asked.annotations()
    order = {kind: place for place, kind in enumerate(("Dataset", "Tomogram", "Annotation"))}
    found.sort(key=lambda group: (group.deposition, order[group.kind]))
    depositions = asked.references("deposition", {group.deposition for group in found})
    return [group.citation(depositions[group.deposition]) for group in found]


def as_table(found: Sequence[Citation]) -> str:
    """Return the portal's table as Markdown, and below it where the data come from."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [
        (
            each.deposition,
            each.entity_type,
            ", ".join(_ranges(each.entities)),
            ", ".join(author.name for author in each.primary_authors) or "None",
            ", ".join(each.dois) or "None",
        )
        for each in found
    ]
    table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    return (
        f"{table}\n\nThese data are available through the CZ CryoET Data Portal: Ermel, U. et al. "
        f"{PAPER.title}. Nat Methods 21, 2200–2202 (2024). {PAPER.url}\n"
    )


def as_bibtex(found: Sequence[Citation]) -> str:
    """Return one BibTeX entry for each deposition and dataset, and one for the portal's paper."""
    unique = {reference.key: reference for each in found for reference in each.references}
    return "\n".join([*(_entry(unique[key]) for key in sorted(unique)), _paper()])


def as_json(found: Sequence[Citation]) -> str:
    """Return everything as JSON: {"citations": [...], "portal": {...}}."""
    data = {"citations": [asdict(each) for each in found], "portal": asdict(PAPER)}
    return json.dumps(data, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class _Group:
    """Entities of one kind and one deposition."""

    deposition: int
    kind: str
    entities: tuple[str, ...]
    primary: tuple[Author, ...]
    publications: tuple[str | None, ...]
    references: tuple[Reference, ...] = ()

    def citation(self, deposition: tuple[Reference, tuple[Author, ...]]) -> Citation:
        reference, first = deposition
        dois = dict.fromkeys([*_dois(self.publications), *reference.dois])
        return Citation(
            reference.key,
            self.kind,
            self.entities,
            self.primary or first or reference.authors,
            tuple(dois),
            (reference, *self.references),
        )


@dataclass(frozen=True)
class _Asked:
    """What is asked of the portal about some tomograms and annotations, each table once."""

    api: PortalAPI
    records: Mapping[int, TomogramRecord]
    annotated: Mapping[int, AnnotationRecord]

    def datasets(self) -> list[_Group]:
        """Return the datasets of the tomograms, by their own depositions."""
        numbers = {record.dataset_id for record in self.records.values()}
        found = self.references("dataset", numbers)
        rows = self.api.rows("datasets", ["depositionId"], ids=numbers)
        groups = []
        for deposition, members in _grouped((int(row["depositionId"]), int(row["id"])) for row in rows):
            described = [found[number] for number in members]
            groups.append(
                _Group(
                    deposition,
                    "Dataset",
                    tuple(f"DS-{number}" for number in members),
                    _once(author for _, first in described for author in first),
                    tuple(doi for reference, _ in described for doi in reference.dois),
                    tuple(reference for reference, _ in described),
                )
            )
        return groups

    def tomograms(self) -> list[_Group]:
        """Return the tomograms by their depositions."""
        rows = self.api.rows(
            "tomograms", ["publications"], {"publications": {"_is_null": False}}, ids=self.records
        )
        papers = {int(row["id"]): row["publications"] for row in rows}
        pairs = ((record.deposition_id, record.id) for record in self.records.values())
        return self._groups("tomogram", "TM", pairs, papers)

    def annotations(self) -> list[_Group]:
        """Return the annotations by their depositions."""
        every = self.annotated.values()
        pairs = ((each.deposition_id, each.id) for each in every if each.deposition_id is not None)
        return self._groups("annotation", "AN", pairs, {each.id: each.publication for each in every})

    def references(
        self, kind: str, numbers: Iterable[int]
    ) -> dict[int, tuple[Reference, tuple[Author, ...]]]:
        """Return depositions or datasets by number, each with its primary authors."""
        numbers = set(numbers)
        papers = f"{kind}Publications"
        rows = {
            int(row["id"]): row
            for row in self.api.rows(
                f"{kind}s", ["title", papers, "depositionDate", "releaseDate"], ids=numbers
            )
        }
        people: dict[int, list[Row]] = defaultdict(list)
        for row in self.api.rows(f"{kind}Authors", [*_AUTHOR, f"{kind}Id"], key=f"{kind}Id", ids=numbers):
            people[int(row[f"{kind}Id"])].append(row)
        prefix = {"deposition": "CZCDP", "dataset": "DS"}[kind]
        found = {}
        for number in numbers:
            row = rows.get(number, {})  # one that was withdrawn still has a number
            reference = Reference(
                f"{prefix}-{number}",
                str(row.get("title") or f"{kind.capitalize()} {number}"),
                _authors(people[number]),
                _year(row.get("releaseDate") or row.get("depositionDate")),
                tuple(_dois([row.get(papers)])),
                f"{PORTAL}/{kind}s/{number}",
            )
            found[number] = reference, _authors(one for one in people[number] if one["primaryAuthorStatus"])
        return found

    def _groups(
        self, kind: str, prefix: str, pairs: Iterable[tuple[int, int]], papers: Mapping[int, str | None]
    ) -> list[_Group]:
        grouped = _grouped(pairs)
        every = [number for _, members in grouped for number in members]
        # Thousands of tomograms have the same few primary authors, and tens of others.
        rows = self.api.rows(
            f"{kind}Authors",
            [*_AUTHOR, f"{kind}Id"],
            {"primaryAuthorStatus": {"_eq": True}},
            key=f"{kind}Id",
            ids=every,
        )
        people: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            people[int(row[f"{kind}Id"])].append(row)
        return [
            _Group(
                deposition,
                kind.capitalize(),
                tuple(f"{prefix}-{number}" for number in members),
                _authors(row for number in members for row in people[number]),
                tuple(papers.get(number) for number in members),
            )
            for deposition, members in grouped
        ]


def _grouped(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Return numbers by what they belong to, both in order."""
    groups: dict[int, list[int]] = defaultdict(list)
    for owner, number in sorted(set(pairs)):
        groups[owner].append(number)
    return list(groups.items())


def _authors(rows: Iterable[Row]) -> tuple[Author, ...]:
    """Return people in the order of their lists, each once."""
    ordered = sorted(rows, key=lambda row: (row["authorListOrder"], row["id"]))
    return _once(Author(_plain(row["name"]), row["orcid"] or None) for row in ordered)


def _once(authors: Iterable[Author]) -> tuple[Author, ...]:
    """Return each person once: an ORCID or a name is one person."""
    found: dict[str, Author] = {}
    known: set[str | None] = set()
    for author in authors:
        if author.name and author.name.casefold() not in found and author.orcid not in known - {None}:
            found[author.name.casefold()] = author
            known.add(author.orcid)
    return tuple(found.values())


def _dois(texts: Iterable[str | None]) -> list[str]:
    """Return DOIs without what people write before them, each once; other references as they are."""
    found: dict[str, str] = {}
    for text in texts:
        for item in re.split(r",|;\s", text or ""):
            for name in _DOI.findall(item) or [" ".join(item.split())]:
                if plain := name.rstrip(".;"):
                    found.setdefault(plain.casefold(), plain)
    return list(found.values())


def _year(date: Any) -> int | None:
    match = re.match(r"\d{4}", str(date or ""))
    return int(match.group()) if match else None


def _ranges(entities: Sequence[str]) -> list[str]:
    """Return ids in order, four or more that follow one another as a range."""
    parts: list[list[str]] = []
    for entity in entities:
        last = _id_number(parts[-1][-1]) if parts else None
        if last is not None and _id_number(entity) == last + 1:
            parts[-1].append(entity)
        else:
            parts.append([entity])
    return [item for part in parts for item in ([f"{part[0]} to {part[-1]}"] if len(part) > 3 else part)]


def _id_number(entity: str) -> int:
    return int(entity.rpartition("-")[2])


def _cell(text: str) -> str:
    return _plain(text).replace("\\", "\\\\").replace("|", "\\|")


def _entry(reference: Reference) -> str:
    key = reference.key.replace("-", "").lower()
    note = "; ".join(f"doi:{doi}" if doi.startswith("10.") else doi for doi in reference.dois)
    return _fields(
        f"@misc{{{key}",
        author=" and ".join(filter(None, map(_person, reference.authors))),
        title=f"{{{_latex(reference.title)}}}",
        year=str(reference.year or ""),
        howpublished=f"CZ CryoET Data Portal, {reference.key}",
        url=reference.url,
        note=_latex(f"Described in {note}") if note else "",
    )


def _paper() -> str:
    return _fields(
        f"@article{{{PAPER.key}",
        author=" and ".join(map(_person, PAPER.authors)),
        title=f"{{{PAPER.title}}}",
        journal="Nature Methods",
        volume="21",
        number="12",
        pages="2200--2202",
        year=str(PAPER.year),
        doi=PAPER.dois[0],
    )


def _fields(start: str, **fields: str) -> str:
    lines = [start, *(f"  {name} = {{{value}}}" for name, value in fields.items() if value)]
    return ",\n".join(lines) + "\n}\n"


def _person(author: Author) -> str:
    """Return a name that BibTeX takes for one."""
    name = _plain(author.name).strip(", ")
    words = name.casefold().split()
    whole = "and" in words or words == ["others"] or name.count(",") > 2
    return f"{{{_latex(name)}}}" if whole else _latex(name)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _plain(text))


def _plain(text: str) -> str:
    """Return a text on one line, without what cannot be seen."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
