"""How the stand-in of the portal finds rows: each habit of the real server is there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.portal_rows import FINE, many, small_world
from tests.portal_server import PortalServer

MASKED = "Unexpected error."
ALL = {one["id"] for one in small_world()["tomograms"]}


@pytest.fixture(scope="module")
def server() -> PortalServer:
    return PortalServer(small_world())


@pytest.fixture(scope="module")
def crowd() -> PortalServer:
    """One deposition with 130 tomograms: more than a connection gives at once."""
    return PortalServer(many(130))


def ask(server: PortalServer, query: str, **variables: Any) -> Any:
    """Return the data of an answer without errors."""
    found = server.execute({"query": query, "variables": variables})
    assert "errors" not in found, found
    return found["data"]


def refusal(server: PortalServer, query: str, **variables: Any) -> str:
    """Return the message of an answer that is an error."""
    found = server.execute({"query": query, "variables": variables})
    (error,) = found["errors"]
    assert not found["data"]
    return str(error["message"])


def find(server: PortalServer, where: str, table: str = "tomograms") -> list[int]:
    """Return the ids of the rows that pass a filter."""
    return [row["id"] for row in ask(server, f"{{ {table}(where: {{ {where} }}) {{ id }} }}")[table]]


class TestNulls:
    def test_unequal_drops_them(self, server: PortalServer) -> None:
        known = {one["id"]: one.get("isPortalStandard") for one in small_world()["tomograms"]}
        assert sorted(known.values(), key=str)[0] is False
        assert None in known.values()
        assert find(server, "isPortalStandard: {_eq: true}") == [8003]
        assert sorted(find(server, "isPortalStandard: {_neq: true}")) == [8001, 8004]

    @pytest.mark.parametrize(
        ("test", "expected"),
        [
            ("{_neq: 701}", {8005, 8006, 8007, 8008, 8009, 8010}),
            ("{_nin: [701]}", {8005, 8006, 8007, 8008, 8009, 8010}),
            ("{_in: [702, 703]}", {8005, 8006, 8007}),
            ("{_is_null: true}", {8011}),
            ("{_is_null: false}", ALL - {8011}),
            ("{_eq: null}", {8011}),
            ("{_neq: null}", ALL - {8011}),
            ("{_gt: 0}", ALL - {8011}),
            ("{_gt: null}", set()),
            ("{}", ALL),
        ],
    )
    def test_comparators(self, server: PortalServer, test: str, expected: set[int]) -> None:
        assert set(find(server, f"alignmentId: {test}")) == expected

    @pytest.mark.parametrize("column", ["id", "alignmentId", "sizeX"])
    @given(value=st.one_of(st.sampled_from([8003, 1260, 701]), st.integers(-(2**31), 2**31 - 1)))
    def test_a_value_and_its_opposite(self, server: PortalServer, column: str, value: int) -> None:
        """Of two opposite tests each row that is not null passes one."""
        query = (
            f"query($a: TomogramWhereClause, $b: TomogramWhereClause)"
            f" {{ a: tomograms(where: $a) {{ {column} }} b: tomograms(where: $b) {{ {column} }} }}"
        )
        known = sorted(one[column] for one in small_world()["tomograms"] if one[column] is not None)
        for test, opposite in (("_eq", "_neq"), ("_in", "_nin"), ("_gt", "_lte"), ("_lt", "_gte")):
            asked = [value] if "in" in test else value
            data = ask(server, query, a={column: {test: asked}}, b={column: {opposite: asked}})
            a, b = ([row[column] for row in data[one]] for one in "ab")
            assert sorted(a + b) == known
            assert all(one == value for one in a if test in ("_eq", "_in"))
            assert all(one > value for one in a if test == "_gt")
            assert all(one < value for one in a if test == "_lt")


class TestComparators:
    @pytest.mark.parametrize(
        ("test", "expected"),
        [
            ('{_like: "TS_1"}', [501, 505]),
            ('{_like: "TS%1_"}', [503]),
            ('{_like: "ts%"}', []),
            ('{_ilike: "ts%"}', [501, 502, 503, 505]),
            ('{_nlike: "TS%"}', [504]),
            ('{_nilike: "%tion%"}', [501, 502, 503, 505]),
            ('{_regex: "^TS_[12]$"}', [501, 502, 505]),
            ('{_iregex: "^ts_.0"}', [503]),
            ('{_nregex: "[12]"}', [504]),
            ('{_niregex: "POSI"}', [501, 502, 503, 505]),
            ('{_gt: "TS_1", _lte: "TS_2"}', [502, 503]),
            ('{_gte: "TS_10", _lt: "TS_2"}', [503]),
        ],
    )
    def test_text(self, server: PortalServer, test: str, expected: list[int]) -> None:
        assert sorted(find(server, f"name: {test}", "runs")) == expected

    def test_enums_are_ordered_as_declared(self, server: PortalServer) -> None:
        found = ask(server, "{ tomograms(where: {processing: {_lt: raw}}) { processing } }")["tomograms"]
        assert {one["processing"] for one in found} == {"denoised", "filtered"}

    def test_dates(self, server: PortalServer) -> None:
        assert find(server, 'lastModifiedDate: {_eq: "2025-02-17T01:00:00+01:00"}') == [8010]

    @pytest.mark.parametrize("number", [32_767, 32_768])
    def test_too_many_values(self, server: PortalServer, number: int) -> None:
        query = "query($ids: [Int!]) { tomograms(where: {id: {_in: $ids}}) { id } }"
        values = list(range(8011 - number, 8011))
        if number <= 32_767:
            assert len(ask(server, query, ids=values)["tomograms"]) == 10
        else:
            assert refusal(server, query, ids=values) == MASKED

    def test_too_many_in_an_aggregate(self, server: PortalServer) -> None:
        query = "query($ids: [Int!]) { tomogramsAggregate(where: {id: {_in: $ids}}) { aggregate { count } } }"
        assert refusal(server, query, ids=list(range(40_000))) == MASKED


class TestJoins:
    def test_one_row_must_pass_all(self, server: PortalServer) -> None:
        both = 'authors: {name: {_eq: "Bo Li"}, authorListOrder: {_eq: 1}}'
        assert find(server, both) == []
        assert find(server, both.replace("1}", "2}")) == [8001]

    def test_a_row_comes_once_however_many_match(self, server: PortalServer) -> None:
        found = find(server, "tomograms: {processing: {_in: [denoised, raw]}}", "runs")
        assert sorted(found) == [501, 503, 504, 505]

    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            ("predicate: {_gte: 2}", [501, 502, 503]),
            ("predicate: {_eq: 0}, filter: {processing: {_eq: raw}}", [502]),
            ("predicate: {_gt: 1}, filter: {run: {datasetId: {_eq: 10440}}}", [501, 502, 503]),
            ("predicate: {_eq: 2}, distinct: true, arguments: alignmentId", MASKED),
            ("predicate: {_eq: 2}, distinct: true, arguments: voxelSpacing", [501]),
            ("predicate: {_eq: 2}, arguments: voxelSpacing", [502, 503]),
            ("distinct: false", [501, 502, 503, 504, 505]),
            ("predicate: {_gt: 4}, filter: {run: {dataset: {id: {_gt: 0}}}}", [501]),
            (
                "predicate: {_gt: 4}, filter: {run: {dataset: {deposition: {id: {_gt: 0}}}}}",
                "Max filter depth exceeded",
            ),
        ],
    )
    def test_counts_of_related_rows(
        self, server: PortalServer, count: str, expected: list[int] | str
    ) -> None:
        where = f"tomogramsAggregate: {{count: {{{count}}}}}"
        if isinstance(expected, str):
            assert refusal(server, f"{{ runs(where: {{{where}}}) {{ id }} }}") == expected
        else:
            assert sorted(find(server, where, "runs")) == expected

    def test_null_relations_drop_out(self, server: PortalServer) -> None:
        assert set(find(server, "alignment: {}")) == ALL - {8011}

    @pytest.mark.parametrize(
        ("start", "path", "allowed"),
        [
            ("annotationFiles", "annotationShape annotation run dataset", True),
            ("annotationFiles", "annotationShape annotation run dataset deposition", False),
            ("annotationFilesAggregate", "annotationShape annotation run", True),
            ("annotationFilesAggregate", "annotationShape annotation run dataset", False),
        ],
    )
    def test_depth(self, server: PortalServer, start: str, path: str, allowed: bool) -> None:
        """A list reaches four relations far, an aggregate three."""
        where = "{id: {_gt: 0}}"
        for name in reversed(path.split()):
            where = f"{{{name}: {where}}}"
        fields = "aggregate { count }" if start.endswith("Aggregate") else "id"
        query = f"{{ {start}(where: {where}) {{ {fields} }} }}"
        if allowed:
            assert ask(server, query)[start]
        else:
            assert refusal(server, query) == "Max filter depth exceeded"


class TestOrder:
    def test_none_by_itself(self, server: PortalServer) -> None:
        orders = {tuple(find(server, "")) for _ in range(5)}
        assert len(orders) > 1
        nested = "{ runs(where: {id: {_eq: 501}}) { tomograms { edges { node { id } } } } }"
        answers = [ask(server, nested)["runs"][0]["tomograms"]["edges"] for _ in range(8)]
        assert len({tuple(edge["node"]["id"] for edge in edges) for edges in answers}) > 1

    @pytest.mark.parametrize(
        ("order", "expected"),
        [
            ("{id: asc}", sorted(ALL)),
            ("{id: desc}", sorted(ALL, reverse=True)),
            ("[{voxelSpacing: desc}, {id: asc}]", [8011, *range(8003, 8010), 8010, 8001, 8002]),
            (
                "[{run: {name: asc}}, {id: desc}]",
                [8010, 8011, 8005, 8004, 8003, 8002, 8001, 8009, 8008, 8007, 8006],
            ),
            ("[{id: asc}, {run: {name: asc}}]", sorted(ALL)),
            (
                "[{processing: desc}, {id: asc}]",
                [8007, 8006, 8004, 8005, 8008, 8009, 8010, 8011, 8002, 8001, 8003],
            ),
            # An inner join: the tomogram without an alignment is gone.
            (
                "[{alignment: {id: desc}}, {id: asc}]",
                [8010, 8008, 8009, 8006, 8007, 8005, 8001, 8002, 8003, 8004],
            ),
        ],
    )
    def test_as_asked(self, server: PortalServer, order: str, expected: list[int]) -> None:
        found = ask(server, f"{{ tomograms(orderBy: {order}) {{ id }} }}")["tomograms"]
        assert [row["id"] for row in found] == expected

    @pytest.mark.parametrize(
        ("how", "place"),
        [
            ("asc", -1),
            ("asc_nulls_first", 0),
            ("asc_nulls_last", -1),
            ("desc", 0),
            ("desc_nulls_first", 0),
            ("desc_nulls_last", -1),
        ],
    )
    def test_nulls(self, server: PortalServer, how: str, place: int) -> None:
        found = ask(server, f"{{ tomograms(orderBy: [{{fileSizeOmezarr: {how}}}]) {{ fileSizeOmezarr }} }}")[
            "tomograms"
        ]
        sizes = [row["fileSizeOmezarr"] for row in found]
        assert sizes.pop(place) is None
        assert sizes == sorted(sizes, reverse=how.startswith("desc"))

    def test_ties_are_nobodys(self, server: PortalServer) -> None:
        query = "{ tomograms(orderBy: [{voxelSpacing: asc}]) { id voxelSpacing } }"
        answers = [ask(server, query)["tomograms"] for _ in range(5)]
        assert len({tuple(row["id"] for row in found) for found in answers}) > 1
        assert len({tuple(row["voxelSpacing"] for row in found) for found in answers}) == 1


class TestPages:
    QUERY = (
        "query($n: Int, $o: Int)"
        " { tomograms(orderBy: [{id: asc}], limitOffset: {limit: $n, offset: $o}) { id } }"
    )

    @pytest.mark.parametrize(
        ("limit", "offset", "expected"),
        [
            (4, 0, [8001, 8002, 8003, 8004]),
            (4, 8, [8009, 8010, 8011]),
            (4, 11, []),
            (0, None, sorted(ALL)),
            (None, None, sorted(ALL)),
            (None, 0, sorted(ALL)),
        ],
    )
    def test_limits(
        self, server: PortalServer, limit: int | None, offset: int | None, expected: list[int]
    ) -> None:
        assert [row["id"] for row in ask(server, self.QUERY, n=limit, o=offset)["tomograms"]] == expected

    @pytest.mark.parametrize("limit", [None, 0])
    def test_offset_needs_a_limit(self, server: PortalServer, limit: int | None) -> None:
        assert refusal(server, self.QUERY, n=limit, o=2) == "Cannot use offset without limit"

    def test_lists_have_no_cap(self, crowd: PortalServer) -> None:
        assert len(find(crowd, "")) == 130


class TestConnections:
    QUERY = (
        "query($first: Int, $after: String, $last: Int, $before: String) {"
        " depositions { tomograms(orderBy: [{id: asc}],"
        " first: $first, after: $after, last: $last, before: $before) {"
        " edges { cursor node { id } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } } }"
    )

    def edges(self, server: PortalServer, **asked: Any) -> tuple[list[int], dict[str, Any]]:
        found = ask(server, self.QUERY, **asked)["depositions"][0]["tomograms"]
        assert [found["pageInfo"][one] for one in ("startCursor", "endCursor")] == (
            [found["edges"][place]["cursor"] for place in (0, -1)] if found["edges"] else [None, None]
        )
        return [edge["node"]["id"] - 100_000 for edge in found["edges"]], found["pageInfo"]

    def test_cap(self, crowd: PortalServer) -> None:
        first, info = self.edges(crowd)
        assert first == list(range(100))
        assert info["hasNextPage"]
        assert not info["hasPreviousPage"]
        rest, info = self.edges(crowd, after=info["endCursor"])
        assert rest == list(range(100, 130))
        assert not info["hasNextPage"]
        assert info["hasPreviousPage"]

    @pytest.mark.parametrize("asked", [{"first": 101}, {"last": 101}, {"first": -1}, {"after": "nonsense"}])
    def test_refused(self, crowd: PortalServer, asked: dict[str, Any]) -> None:
        assert refusal(crowd, self.QUERY, **asked) == MASKED

    def test_slices(self, crowd: PortalServer) -> None:
        found, info = self.edges(crowd, first=3)
        assert found == [0, 1, 2]
        found, info = self.edges(crowd, first=2, after=info["endCursor"])
        assert found == [3, 4]
        assert self.edges(crowd, last=2, before=info["endCursor"])[0] == [2, 3]
        assert self.edges(crowd, last=2)[0] == [128, 129]
        assert self.edges(crowd, first=0)[0] == []

    def test_filters_in_them(self, server: PortalServer) -> None:
        query = (
            "{ runs(where: {id: {_eq: 501}}) { tomograms(where: {processing: {_eq: denoised}})"
            " { edges { node { id run(where: {id: {_eq: 1}}) { id } alignment { id } } } } } }"
        )
        edges = ask(server, query)["runs"][0]["tomograms"]["edges"]
        assert {edge["node"]["id"] for edge in edges} == {8001, 8003}
        assert all(edge["node"]["run"] is None and edge["node"]["alignment"]["id"] == 701 for edge in edges)


class TestAggregates:
    def groups(self, server: PortalServer, fields: str, where: str = "") -> list[dict[str, Any]]:
        found = ask(server, f"{{ tomogramsAggregate(where: {{ {where} }}) {{ aggregate {{ {fields} }} }} }}")
        groups: list[dict[str, Any]] = found["tomogramsAggregate"]["aggregate"]
        return groups

    def test_totals(self, server: PortalServer) -> None:
        rows = small_world()["tomograms"]
        (found,) = self.groups(server, "count sum { fileSizeMrc sizeX } min { name voxelSpacing } max { id }")
        assert found["count"] == 11
        assert found["sum"]["fileSizeMrc"] == sum(row["fileSizeMrc"] for row in rows)
        assert found["sum"]["sizeX"] == sum(row["sizeX"] for row in rows)
        assert found["min"] == {"name": "Position_7", "voxelSpacing": FINE}
        assert found["max"] == {"id": 8011}

    def test_spread(self, server: PortalServer) -> None:
        (found,) = self.groups(
            server, "avg { id } variance { id } stddev { id }", "id: {_in: [8001, 8003, 8005]}"
        )
        assert found["avg"]["id"] == 8003
        assert found["variance"]["id"] == 4
        assert found["stddev"]["id"] == 2

    def test_groups(self, server: PortalServer) -> None:
        found = self.groups(
            server, "count sum { fileSizeOmezarr } groupBy { processing run { name dataset { id } } }"
        )
        table = {
            (
                one["groupBy"]["processing"],
                one["groupBy"]["run"]["name"],
                one["groupBy"]["run"]["dataset"]["id"],
            ): one
            for one in found
        }
        assert len(table) == len(found) == 8
        assert table["denoised", "TS_1", 10440]["count"] == 2
        assert table["raw", "TS_10", 10440]["count"] == 2
        assert table["raw", "TS_1", 10450]["sum"]["fileSizeOmezarr"] is None

    @pytest.mark.parametrize(
        "fields",
        [
            "... on TomogramAggregateFunctions { count }",
            "count groupBy { ... on TomogramGroupByOptions { id } }",
        ],
    )
    def test_no_fragments(self, server: PortalServer, fields: str) -> None:
        assert refusal(server, f"{{ tomogramsAggregate {{ aggregate {{ {fields} }} }} }}") == MASKED

    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            ("count(columns: fileSizeOmezarr)", 11),
            ("count(distinct: true)", 11),
            ("count(distinct: true, columns: voxelSpacing)", 4),
            ("count(distinct: true, columns: fileSizeOmezarr)", 3),
        ],
    )
    def test_counts(self, server: PortalServer, count: str, expected: int) -> None:
        assert self.groups(server, count) == [{"count": expected}]

    def test_there_is_one_count(self, server: PortalServer) -> None:
        (found,) = self.groups(server, "rows: count spacings: count(distinct: true, columns: voxelSpacing)")
        assert found == {"rows": 4, "spacings": 4}

    def test_nothing(self, server: PortalServer) -> None:
        (found,) = self.groups(server, "count sum { sizeX } max { name }", "id: {_eq: 1}")
        assert found == {"count": 0, "sum": {"sizeX": None}, "max": {"name": None}}
        assert self.groups(server, "count groupBy { processing }", "id: {_eq: 1}") == []

    def test_filters_do_not_multiply_and_groups_do(self, server: PortalServer) -> None:
        assert self.groups(server, "count", "authors: {id: {_gt: 0}}") == [{"count": 1}]
        found = self.groups(server, "count groupBy { authors { name } }")
        assert {one["groupBy"]["authors"]["name"]: one["count"] for one in found} == {
            "Ada Sánchez": 1,
            "Bo Li": 1,
        }

    def test_of_a_relation(self, server: PortalServer) -> None:
        query = "{ runs(orderBy: [{id: asc}]) { tomogramsAggregate { aggregate { count } } } }"
        found = [run["tomogramsAggregate"]["aggregate"][0]["count"] for run in ask(server, query)["runs"]]
        assert found == [5, 2, 2, 1, 1]

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [("annotationShape annotation run", True), ("annotationShape annotation run dataset", False)],
    )
    def test_groups_reach_three_relations_far(self, server: PortalServer, path: str, allowed: bool) -> None:
        fields = "{ id }"
        for name in reversed(path.split()):
            fields = f"{{ {name} {fields} }}"
        query = f"{{ annotationFilesAggregate {{ aggregate {{ count groupBy {fields} }} }} }}"
        if allowed:
            assert len(ask(server, query)["annotationFilesAggregate"]["aggregate"]) == 2
        else:
            assert refusal(server, query) == "Max filter depth exceeded"

    def test_only_groups(self, server: PortalServer) -> None:
        query = "{ tomogramsAggregate { aggregate { groupBy { processing } } } }"
        assert refusal(server, query) == "No aggregate functions selected"


@pytest.mark.parametrize(
    "query",
    [
        "{ tomograms { id nonsense } }",
        "{ tomograms { id ",
        "{ tomograms(where: {processing: {_eq: Denoised}}) { id } }",
        "{ tomograms(where: {id: {_like: 8}}) { id } }",
        "{ tomograms(where: {id: null}) { id } }",
        '{ runs(where: {name: {_regex: "("}}) { id } }',
    ],
)
def test_errors_are_masked(server: PortalServer, query: str) -> None:
    assert refusal(server, query) == MASKED
