"""How the portal's API finds rows: filters, orders and pages, with the database's habits."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from graphql import GraphQLEnumType, get_named_type

from tests.portal_schema import AGGREGATE, Entity, Relation, default_value, entities, moment, stored_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from random import Random

    from graphql import GraphQLSchema

Row = dict[str, Any]
MOST_PARAMETERS = 32767
MOST_JOINS = 5


class PlainError(Exception):
    """An error whose text the server lets through; all others it masks."""


def _pattern(like: str) -> str:
    """Return the regular expression of an SQL pattern: % any text, _ any character."""
    parts = re.split(r"(\\.|%|_)", like, flags=re.DOTALL)
    meaning = {"%": ".*", "_": "."}
    return "".join(meaning.get(one) or re.escape(one[1:] if one[:1] == "\\" else one) for one in parts)


def _like(flags: re.RegexFlag) -> Callable[[str], Callable[[str], bool]]:
    return lambda like: lambda value: bool(re.fullmatch(_pattern(like), value, flags | re.DOTALL))


def _search(flags: re.RegexFlag) -> Callable[[str], Callable[[str], bool]]:
    return lambda pattern: lambda value: bool(re.search(pattern, value, flags))


def _member(values: Iterable[Any]) -> Callable[[Any], bool]:
    known = frozenset(values)
    return lambda value: value in known


def _not(make: Callable[[Any], Callable[[Any], bool]]) -> Callable[[Any], Callable[[Any], bool]]:
    def negated(asked: Any) -> Callable[[Any], bool]:
        test = make(asked)
        return lambda value: not test(value)

    return negated


def _compare(how: Callable[[Any, Any], bool]) -> Callable[[Any], Callable[[Any], bool]]:
    return lambda asked: lambda value: how(value, asked)


# Each takes what is asked for and gives the test of a value that is not null: null passes none of them.
COMPARATORS: Mapping[str, Callable[[Any], Callable[[Any], bool]]] = {
    "_eq": _compare(operator.eq),
    "_neq": _compare(operator.ne),
    "_gt": _compare(operator.gt),
    "_gte": _compare(operator.ge),
    "_lt": _compare(operator.lt),
    "_lte": _compare(operator.le),
    "_in": _member,
    "_nin": _not(_member),
    "_like": _like(re.NOFLAG),
    "_nlike": _not(_like(re.NOFLAG)),
    "_ilike": _like(re.IGNORECASE),
    "_nilike": _not(_like(re.IGNORECASE)),
    "_regex": _search(re.NOFLAG),
    "_nregex": _not(_search(re.NOFLAG)),
    "_iregex": _search(re.IGNORECASE),
    "_niregex": _not(_search(re.IGNORECASE)),
}


def _test(column: str, name: str, asked: Any, kind: Any = None) -> Callable[[Row], bool]:
    """Return the test of rows that a comparator stands for; enums compare by their order in the schema."""
    if name == "_is_null" or (asked is None and name in ("_eq", "_neq")):
        null = bool(asked) if name == "_is_null" else name == "_eq"
        return lambda row: (row[column] is None) == null
    if asked is None and name not in ("_in", "_nin"):
        return lambda _: False
    if kind is not None and kind.name == "DateTime":
        asked = [moment(one) for one in asked] if isinstance(asked, list) else moment(asked)
    rank = _rank(kind)
    if rank and name in ("_gt", "_gte", "_lt", "_lte"):
        ranked = COMPARATORS[name](rank[asked])
        return lambda row: row[column] is not None and ranked(rank[row[column]])
    test = COMPARATORS[name](asked)
    return lambda row: row[column] is not None and test(row[column])


def _rank(kind: Any) -> Mapping[str, int] | None:
    return {one: i for i, one in enumerate(kind.values)} if isinstance(kind, GraphQLEnumType) else None


def parameters(clause: Any) -> int:
    """Return how many values a clause holds: each is a parameter of the database's statement."""
    if isinstance(clause, dict):
        return sum(parameters(one) for one in clause.values())
    return sum(parameters(one) for one in clause) if isinstance(clause, list) else 1


def check_parameters(where: Mapping[str, Any] | None) -> None:
    """Refuse a filter as the database's driver does.

    Raises
    ------
    ValueError
        The filter holds more values than a statement takes.
    """
    if parameters(dict(where or {})) > MOST_PARAMETERS:
        raise ValueError("too many parameters")


class World:
    """All rows, by type of row.

    Raises
    ------
    ValueError
        A row has an unknown field, lacks one that it must have, or leads to a row that does not exist.
    """

    def __init__(
        self,
        schema: GraphQLSchema,
        rows: Mapping[str, Sequence[Row]],
        random: Random,
        lacking: frozenset[str] = frozenset(),
    ) -> None:
        self.entities, self.random, self.lacking = entities(schema), random, lacking
        tables = {entity.table: entity for entity in self.entities.values()}
        if unknown := set(rows) - set(tables):
            raise ValueError(f"no such tables: {sorted(unknown)}; there are {sorted(tables)}")
        self._rows = {
            entity.name: [self._complete(entity, row) for row in rows.get(entity.table, ())]
            for entity in tables.values()
        }
        self._index: dict[tuple[str, str], dict[Any, list[Row]]] = {}
        for entity in tables.values():
            self._check(entity)

    def _complete(self, entity: Entity, given: Row) -> Row:
        number = given.get("id", -1)
        kept = [one for one in given if f"{entity.name}.{one}" not in self.lacking]
        row = {one: stored_value(entity, one, given[one]) for one in kept}
        for one in entity.columns.keys() - row.keys():
            row[one] = stored_value(entity, one, default_value(entity, one, number))
        return row

    def _check(self, entity: Entity) -> None:
        numbers = [row["id"] for row in self._rows[entity.name]]
        if len(numbers) != len(set(numbers)):
            raise ValueError(f"{entity.table}: an id occurs twice")
        for relation in entity.relations.values():
            if not relation.many:
                for row in self._rows[entity.name]:
                    if row[relation.local] is not None and not self.related(relation, row):
                        where = f"{entity.table} {row['id']}"
                        raise ValueError(f"{where}: {relation.local} {row[relation.local]} does not exist")

    def all(self, name: str) -> list[Row]:
        """Return all rows of a type, in an order that nobody can rely on."""
        return self.random.sample(self._rows[name], len(self._rows[name]))

    def related(self, relation: Relation, row: Row) -> list[Row]:
        """Return the rows that a row is related to."""
        key = (relation.target, relation.remote)
        if key not in self._index:
            index = self._index[key] = {}
            for one in self._rows[relation.target]:
                index.setdefault(one[relation.remote], []).append(one)
        value = row[relation.local]
        return [] if value is None else self._index[key].get(value, [])


class Filter:
    """The test that a filter puts rows to: through a relation, whether some related row passes.

    Raises
    ------
    PlainError
        Too many relations lie one behind the other.
    """

    def __init__(self, world: World, entity: Entity, where: Mapping[str, Any] | None, depth: int = 0) -> None:
        if depth >= MOST_JOINS:
            raise PlainError("Max filter depth exceeded")
        self.tests: list[Callable[[Row], bool]] = []
        for name, clause in (where or {}).items():
            counted = name.removesuffix(AGGREGATE)
            if name in entity.relations:
                self.tests.append(_some(world, entity.relations[name], clause, depth + 1))
            elif counted in entity.relations:
                # A count is a query of its own, which is counted as a step too.
                self.tests.append(_count(world, entity.relations[counted], clause["count"], depth + 2))
            else:
                kind = get_named_type(entity.columns[name])
                self.tests += [_test(name, how, asked, kind) for how, asked in clause.items()]

    def passes(self, row: Row) -> bool:
        """Whether a row passes all tests."""
        return all(test(row) for test in self.tests)


def _some(world: World, relation: Relation, where: Any, depth: int) -> Callable[[Row], bool]:
    inner = Filter(world, world.entities[relation.target], where, depth)
    return lambda row: any(inner.passes(other) for other in world.related(relation, row))


def _count(world: World, relation: Relation, clause: Mapping[str, Any], depth: int) -> Callable[[Row], bool]:
    inner = Filter(world, world.entities[relation.target], clause.get("filter"), depth)
    predicate = [_test("count", how, asked) for how, asked in (clause.get("predicate") or {}).items()]
    column = clause.get("arguments") if clause.get("distinct") else None

    def test(row: Row) -> bool:
        others = [other for other in world.related(relation, row) if inner.passes(other)]
        number = len({other[column] for other in others} - {None}) if column else len(others)
        return all(one({"count": number}) for one in predicate)

    return test


class Line(NamedTuple):
    """One line of the database's answer: values to order by and to group by."""

    orders: tuple[Any, ...]
    groups: tuple[Any, ...]


@dataclass
class Join:
    """Inner joins with what an order or a group goes through.

    As in SQL, a row comes once for each combination of the rows that it is joined with, and not at all
    where there is none: an order through an empty relation drops rows.

    Raises
    ------
    PlainError
        Too many relations lie one behind the other.
    """

    world: World
    entity: Entity
    orders: Sequence[tuple[int, Mapping[str, Any]]] = ()
    groups: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0

    def __post_init__(self) -> None:
        if self.depth >= MOST_JOINS:
            raise PlainError("Max filter depth exceeded")
        relations = self.entity.relations
        pairs = [(index, column, how) for index, clause in self.orders for column, how in clause.items()]
        self.sorting = [(index, how) for index, column, how in pairs if column not in relations]
        self.order_columns = [
            (column, _rank(get_named_type(self.entity.columns[column])))
            for _, column, _ in pairs
            if column not in relations
        ]
        self.group_columns = [column for column, inner in self.groups.items() if inner is None]
        self.grouping: list[tuple[str, ...]] = [(column,) for column in self.group_columns]
        through = [column for _, column, _ in pairs if column in relations]
        through += [column for column, inner in self.groups.items() if inner is not None]
        self.joins = []
        for name in dict.fromkeys(through):
            inner = Join(
                self.world,
                self.world.entities[relations[name].target],
                [(index, clause) for index, column, clause in pairs if column == name],
                self.groups.get(name) or {},
                self.depth + 1,
            )
            self.joins.append((relations[name], inner))
            self.sorting += inner.sorting
            self.grouping += [(name, *path) for path in inner.grouping]

    def lines(self, row: Row) -> list[Line]:
        """Return one line for each way to join a row."""
        found = [
            Line(
                tuple(row[one] if rank is None else rank.get(row[one]) for one, rank in self.order_columns),
                tuple(row[one] for one in self.group_columns),
            )
        ]
        for relation, inner in self.joins:
            others = [line for other in self.world.related(relation, row) for line in inner.lines(other)]
            found = [Line(a.orders + b.orders, a.groups + b.groups) for a in found for b in others]
        return found

    def ordered(self, rows: Iterable[Row]) -> list[Row]:
        """Return rows in the order that was asked for."""
        lines = [(row, line) for row in rows for line in self.lines(row)]
        by_index = sorted(range(len(self.sorting)), key=lambda place: self.sorting[place][0])
        # From the last key to the first: each sort keeps the order of the one before among equals.
        for place in reversed(by_index):
            lines = _ordered(lines, place, self.sorting[place][1])
        return [row for row, _ in lines]


def _ordered(lines: list[tuple[Row, Line]], place: int, how: str) -> list[tuple[Row, Line]]:
    """Sort by one key; nulls are the largest values unless it is said where they go."""
    down = how.startswith("desc")
    nulls = [line for line in lines if line[1].orders[place] is None]
    others = [line for line in lines if line[1].orders[place] is not None]
    others.sort(key=lambda line: line[1].orders[place], reverse=down)
    first = how.endswith("nulls_first") or (down and not how.endswith("nulls_last"))
    return nulls + others if first else others + nulls


def find(
    world: World,
    entity: Entity,
    rows: Iterable[Row],
    where: Mapping[str, Any] | None,
    order: Sequence[Mapping[str, Any]] | None,
) -> list[Row]:
    """Return the rows that pass a filter, in an order.

    Raises
    ------
    ValueError
        The filter holds more values than a statement takes.
    """
    check_parameters(where)
    kept = Filter(world, entity, where)
    return Join(world, entity, list(enumerate(order or []))).ordered(row for row in rows if kept.passes(row))


def page(rows: list[Row], limits: Mapping[str, int | None] | None) -> list[Row]:
    """Return the rows of a page: a limit of 0 is none.

    Raises
    ------
    PlainError
        An offset without a limit.
    """
    limit, offset = (limits or {}).get("limit"), (limits or {}).get("offset")
    if offset and not limit:
        raise PlainError("Cannot use offset without limit")
    return rows[offset or 0 :][:limit] if limit else rows
