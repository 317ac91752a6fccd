from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.portal_rows import many, small_world
from tests.portal_server import portal_server
from tests.portal_tomograms import records
from tomocpt_stream.annotation_files import MASK, POINTS, Wanted, place_annotations
from tomocpt_stream.citations import (
    COLUMNS,
    PAPER,
    Author,
    Citation,
    Reference,
    as_bibtex,
    as_json,
    as_table,
    citations,
)
from tomocpt_stream.portal_queries import PortalAPI

if TYPE_CHECKING:
    from tests.portal_rows import Rows

DOIS = ("10.1038/s41592-023-01878-z", "10.1101/2023.03.28.534667")


def cited(rows: Rows, *ids: int, annotated: bool = False) -> list[Citation]:
    """Return what to cite for tomograms of a world, and for all annotations on them."""
    with portal_server(rows) as portal:
        api = PortalAPI(portal.url, cache=False)
        chosen = records(rows, ids)
        placed = place_annotations(chosen, Wanted(), (*POINTS, MASK), api).on if annotated else {}
        return citations(chosen, [file for files in placed.values() for file in files], api=api)


def entries(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the type and the fields of BibTeX entries by key, with braces read as BibTeX does."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        head = re.compile(r"@(\w+)\{([^\s,{}\"#%~\\]+),").match(text, at)
        assert head, text[at : at + 60]
        at, fields = head.end(), {}
        while not (end := re.compile(r"\s*\}").match(text, at)):
            name = re.compile(r"\s*(\w+)\s*=\s*\{").match(text, at)
            assert name, text[at : at + 60]
            start = at = name.end()
            depth = 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[at], 0)  # whatever stands before the brace
                at += 1
            assert name[1] not in fields
            fields[name[1]] = text[start : at - 1]
            at += text[at : at + 1] == ","
        at = end.end()
        assert head[2] not in found
        found[head[2]] = (head[1], fields)
    return found


def people(field: str) -> list[str]:
    """Return the names of an author field: BibTeX parts them at an "and" outside of braces."""
    names, depth = [""], 0
    for word in field.split(" "):
        if word.lower() == "and" and depth == 0:
            names.append("")
        else:
            names[-1] += f" {word}"
        depth += word.count("{") - word.count("}")
    return [name.strip() for name in names]


def test_what_was_used_is_cited_by_deposition_and_kind() -> None:
    found = cited(small_world(), 8003, 8001, 8010, 8003, annotated=True)
    assert [(each.deposition, each.entity_type, each.entities) for each in found] == [
        ("CZCDP-10310", "Dataset", ("DS-10440", "DS-10445")),
        ("CZCDP-10310", "Tomogram", ("TM-8001", "TM-8003")),
        ("CZCDP-10310", "Annotation", ("AN-901", "AN-905")),
        ("CZCDP-10320", "Tomogram", ("TM-8010",)),
        ("CZCDP-10358", "Annotation", ("AN-903", "AN-904")),
    ]
    assert [[author.name for author in each.primary_authors] for each in found] == [
        ["Ada Sánchez", "Bo Li"],  # first of both datasets
        ["Ada Sánchez"],
        ["Ada Sánchez"],
        ["Eve O'Neil"],  # its own has no authors: those of the deposition
        ["Dana Ångström"],
    ]
    assert found[0].primary_authors[0].orcid == "0000-0002-1825-0040"
    assert [each.dois for each in found] == [
        DOIS,
        DOIS,
        DOIS,
        ("10.1101/2024.05.01.592000",),
        ("10.1101/2025.01.01.000001",),
    ]
    assert [reference.key for reference in found[0].references] == ["CZCDP-10310", "DS-10440", "DS-10445"]
    assert [reference.key for reference in found[1].references] == ["CZCDP-10310"]


def test_authors_come_in_their_order() -> None:
    deposition = cited(small_world(), 8003)[0].references[0]
    assert [author.name for author in deposition.authors] == ["Ada Sánchez", "Bo Li", "Chris van der Meer"]
    assert deposition.title == "Ribosomes in lysed cells"
    assert deposition.url == "https://cryoetdataportal.czscience.com/depositions/10310"
    assert deposition.dois == DOIS


def test_one_person_is_named_once() -> None:
    rows = small_world()
    rows["tomogramAuthors"] = [
        {"id": 1, "tomogramId": 8001, "name": "Ada Sánchez", "orcid": "1", "authorListOrder": 2},
        {"id": 2, "tomogramId": 8003, "name": "A.  Sánchez", "orcid": "1", "authorListOrder": 1},
        {"id": 3, "tomogramId": 8003, "name": "bo li", "authorListOrder": 3},
        {"id": 4, "tomogramId": 8001, "name": "Bo Li", "authorListOrder": 4},
        {"id": 5, "tomogramId": 8001, "name": " ", "authorListOrder": 5},
        {
            "id": 6,
            "tomogramId": 8001,
            "name": "Not Primary",
            "authorListOrder": 6,
            "primaryAuthorStatus": False,
        },
    ]
    for row in rows["tomogramAuthors"]:
        row.setdefault("primaryAuthorStatus", True)
    found = cited(rows, 8001, 8003)[1]
    assert found.primary_authors == (Author("A. Sánchez", "1"), Author("bo li"))


def test_without_a_primary_author_all_of_the_deposition_are() -> None:
    rows = small_world()
    for table in ("depositionAuthors", "tomogramAuthors", "datasetAuthors"):
        for row in rows[table]:
            row["primaryAuthorStatus"] = None
    for each in cited(rows, 8003):
        assert [author.name for author in each.primary_authors] == [
            "Ada Sánchez",
            "Bo Li",
            "Chris van der Meer",
        ]


@pytest.mark.parametrize(
    ("text", "dois"),
    [
        (None, ()),
        ("", ()),
        (
            "https://doi.org/10.1101/1, doi: 10.1101/2.; DOI:10.1101/3",
            ("10.1101/1", "10.1101/2", "10.1101/3"),
        ),
        ("10.1101/AB, 10.1101/ab,,", ("10.1101/AB",)),
        ("10.1101/1 10.1101/2; 10.1101/3", ("10.1101/1", "10.1101/2", "10.1101/3")),
        ("10.1002/(SICI)1097;34:1<1::AID-1>3.0.CO;2-X", ("10.1002/(SICI)1097;34:1<1::AID-1>3.0.CO;2-X",)),
        ("EMPIAR-10499, Doe et al. (in preparation)", ("EMPIAR-10499", "Doe et al. (in preparation)")),
    ],
)
def test_dois_are_taken_out_of_what_people_write(text: str | None, dois: tuple[str, ...]) -> None:
    rows = small_world()
    rows["depositions"][0]["depositionPublications"] = text
    assert cited(rows, 8003)[1].dois == dois


def test_papers_about_the_entities_come_before_those_about_the_deposition() -> None:
    rows = small_world()
    rows["datasets"][0]["datasetPublications"] = "10.1101/d"
    rows["tomograms"][2]["publications"] = "10.1101/t"
    rows["annotations"][0]["annotationPublication"] = "10.1101/a"
    found = cited(rows, 8003, annotated=True)
    assert [each.dois for each in found[:3]] == [
        ("10.1101/d", *DOIS),
        ("10.1101/t", *DOIS),
        ("10.1101/a", *DOIS),
    ]


def test_a_deposition_that_was_withdrawn_keeps_its_number() -> None:
    rows = small_world()
    rows["tomograms"][2]["depositionId"] = 10399
    rows["depositions"].append(
        {"id": 10399, "title": "", "depositionDate": "2021-02-03", "releaseDate": "2022-02-03"}
    )
    found = next(each for each in cited(rows, 8003) if each.deposition == "CZCDP-10399")
    assert (found.primary_authors, found.dois) == ((), ())
    assert found.references[0].title == "Deposition 10399"
    assert found.references[0].year == 2022
    assert "| CZCDP-10399 | Tomogram | TM-8003 | None | None |" in as_table([found])
    fields = entries(as_bibtex([found]))["czcdp10399"][1]
    assert fields["year"] == "2022"
    assert not {"author", "note"} & set(fields)


def test_nothing_used_is_nothing_to_cite_but_the_portal() -> None:
    assert cited(small_world()) == []
    assert list(entries(as_bibtex([]))) == ["ermel2024"]
    assert json.loads(as_json([]))["citations"] == []


def test_thousands_of_tomograms_take_few_requests() -> None:
    rows = many(1200, config=1)
    with portal_server(rows) as portal:
        api = PortalAPI(portal.url, cache=False)
        found = citations(records(rows, [row["id"] for row in rows["tomograms"]]), api=api)
        assert api.requests <= 12
    assert "TM-100000 to TM-101199 |" in as_table(found)


def test_the_table_is_the_portals() -> None:
    lines = as_table(cited(small_world(), 8001, 8002, 8003, 8004, 8006, 8007)).splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert lines[0] == "| Deposition ID | Entity Type | Entity IDs | Primary Authors | Publication DOIs |"
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert lines[2] == f"| CZCDP-10310 | Dataset | DS-10440 | Ada Sánchez | {', '.join(DOIS)} |"
    assert lines[3].split(" | ")[2] == "TM-8001 to TM-8004, TM-8006, TM-8007"
    assert "Nat Methods 21, 2200–2202 (2024). https://doi.org/10.1038/s41592-024-02477-2" in lines[-1]


def test_a_cell_cannot_break_the_table() -> None:
    reference = Reference("CZCDP-1", "t", (), None, (), "")
    author = Author("a|b\n\\ c")
    table = as_table([Citation("CZCDP-1", "Dataset", ("DS-1",), (author,), (), (reference,))])
    assert table.splitlines()[2] == "| CZCDP-1 | Dataset | DS-1 | a\\|b \\\\ c | None |"


def test_bibtex_has_depositions_datasets_and_the_paper() -> None:
    found = cited(small_world(), 8003, 8010, annotated=True)
    every = entries(as_bibtex([*found, *found]))
    assert list(every) == ["czcdp10310", "czcdp10320", "czcdp10358", "ds10440", "ds10445", "ermel2024"]
    kind, fields = every["czcdp10310"]
    assert kind == "misc"
    assert people(fields["author"]) == ["Ada Sánchez", "Bo Li", "Chris van der Meer"]
    assert fields["title"] == "{Ribosomes in lysed cells}"
    assert fields["url"] == "https://cryoetdataportal.czscience.com/depositions/10310"
    assert fields["note"] == f"Described in doi:{DOIS[0]}; doi:{DOIS[1]}"
    assert every["czcdp10320"][1]["title"] == r"{Better alignments \& others}"
    assert every["ds10440"][1]["url"].endswith("/datasets/10440")
    kind, fields = every["ermel2024"]
    assert kind == "article"
    assert fields["doi"] == "10.1038/s41592-024-02477-2"
    assert len(people(fields["author"])) == len(PAPER.authors) == 16
    assert (fields["journal"], fields["volume"], fields["pages"]) == ("Nature Methods", "21", "2200--2202")


@settings(max_examples=150, deadline=None)
@given(
    title=st.text(),
    names=st.lists(
        st.text(min_size=1) | st.sampled_from(["A and B", "others", "a, b, c, d", "AND", "{", "\\"])
    ),
    dois=st.lists(st.text(min_size=1), max_size=2),
)
def test_bibtex_is_valid_whatever_people_are_called(title: str, names: list[str], dois: list[str]) -> None:
    authors = tuple(map(Author, names))
    reference = Reference("CZCDP-1", title, authors, 2024, tuple(dois), "https://x")
    one = Citation("CZCDP-1", "Dataset", ("DS-1",), authors, tuple(dois), (reference,))
    every = entries(as_bibtex([one]))
    assert set(every) == {"czcdp1", "ermel2024"}
    _, fields = every["czcdp1"]
    for value in fields.values():
        bare = re.sub(r"\\[a-z]+\{\}|\\[$&%#_]", "", value) if value != fields["url"] else ""
        assert not set(bare) & set("\\$&%#_~^"), value
        assert value.isprintable()
    named = people(fields["author"]) if "author" in fields else []
    assert len(named) <= len(names)
    assert "others" not in named
    assert all(name and re.sub(r"\{.*\}", "", name).count(",") <= 2 for name in named)


def test_names_and_signs_are_kept_as_they_are_read() -> None:
    names = ["The Lab and Co", "One\x00and\u3000two", "Others", "Li, Bo,", "A_1 {x}"]
    reference = Reference("DS-1", "50 % of ~1_000\n{a}", tuple(map(Author, names)), None, (), "https://x")
    fields = entries(as_bibtex([Citation("CZCDP-1", "Dataset", (), (), (), (reference,))]))["ds1"][1]
    assert people(fields["author"]) == [
        "{The Lab and Co}",
        "{One and two}",
        "{Others}",
        "Li, Bo",
        r"A\_1 \textbraceleft{}x\textbraceright{}",
    ]
    assert fields["title"] == r"{50 \% of \textasciitilde{}1\_000 \textbraceleft{}a\textbraceright{}}"


def test_json_holds_everything() -> None:
    found = cited(small_world(), 8003)
    data = json.loads(as_json(found))
    assert data["citations"][0]["references"][0]["authors"][0] == {
        "name": "Ada Sánchez",
        "orcid": "0000-0002-1825-0010",
    }
    assert data["citations"][0]["entities"] == ["DS-10440"]
    assert data["portal"]["dois"] == ["10.1038/s41592-024-02477-2"]
