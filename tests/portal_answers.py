"""What the portal's API makes of rows: connections, aggregates, and errors that it masks."""

from __future__ import annotations

import base64
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphql import (
    FieldNode,
    GraphQLError,
    GraphQLObjectType,
    GraphQLSchema,
    get_argument_values,
    get_named_type,
)

from tests.portal_joins import Filter, Join, PlainError, Row, World, check_parameters, find, page
from tests.portal_schema import AGGREGATE, Entity, Relation, entities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from graphql import GraphQLResolveInfo

    Info = GraphQLResolveInfo[World]

MOST_EDGES = 100


def _cursor(place: int) -> str:
    return base64.b64encode(f"arrayconnection:{place}".encode()).decode()


def _place(cursor: str) -> int:
    return int(base64.b64decode(cursor).decode().removeprefix("arrayconnection:"))


def _checked(name: str, number: int) -> int:
    if not 0 <= number <= MOST_EDGES:
        raise ValueError(f"Argument '{name}' must be from 0 to {MOST_EDGES}")
    return number


def connection(rows: list[Row], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the edges that the arguments ask for, never more than 100, and whether there are others.

    Raises
    ------
    ValueError
        More than 100 edges are asked for, or a cursor is not one of ours.
    """
    start = _place(asked["after"]) + 1 if asked.get("after") else 0
    end = _place(asked["before"]) if asked.get("before") else None
    if asked.get("first") is not None:
        wanted = start + _checked("first", asked["first"])
        end = wanted if end is None else min(end, wanted)
    if asked.get("last") is not None:
        end = len(rows) if end is None else min(end, len(rows))
        start = max(start, end - _checked("last", asked["last"]))
    end = min(start + MOST_EDGES, len(rows) if end is None else end)
    edges = [{"cursor": _cursor(start + i), "node": row} for i, row in enumerate(rows[start:end])]
    info = {
        "hasNextPage": end < len(rows),
        "hasPreviousPage": start > 0,
        "startCursor": edges[0]["cursor"] if edges else None,
        "endCursor": edges[-1]["cursor"] if edges else None,
    }
    return {"edges": edges, "pageInfo": info}


def _fields(node: FieldNode) -> list[FieldNode]:
    """Return the fields under a field of an aggregate.

    Raises
    ------
    ValueError
        There is a fragment: the server looks for names and finds none.
    """
    found = node.selection_set.selections if node.selection_set else ()
    if not all(isinstance(one, FieldNode) for one in found):
        raise ValueError("a fragment in an aggregate")
    return [one for one in found if isinstance(one, FieldNode) and one.name.value != "__typename"]


def _group_tree(node: FieldNode) -> dict[str, Any]:
    """Return the columns under a groupBy: None for one of the row's own, a dict for a relation."""
    return {one.name.value: _group_tree(one) if one.selection_set else None for one in _fields(node)}


STATISTICS: Mapping[str, Callable[[list[Any]], Any]] = {
    "sum": sum,
    "avg": statistics.fmean,
    "min": min,
    "max": max,
    "stddev": lambda values: statistics.stdev(values) if len(values) > 1 else None,
    "variance": lambda values: statistics.variance(values) if len(values) > 1 else None,
}


@dataclass
class Group:
    """The rows of one group: what an aggregate is computed of."""

    rows: list[Row]
    by: dict[str, Any]
    count: int

    def column(self, name: str) -> list[Any]:
        """Return the values in a column that are not null."""
        return [row[name] for row in self.rows if row[name] is not None]


def _counter(info: Info, nodes: Sequence[FieldNode]) -> Callable[[list[Row]], int]:
    """Return how groups are counted: as the last count asks, since the server has room for one."""
    asked: Mapping[str, Any] = {}
    for one in nodes:
        if one.name.value == "count":
            functions = info.schema.type_map[get_named_type(info.return_type).name + "Functions"]
            assert isinstance(functions, GraphQLObjectType)
            asked = get_argument_values(functions.fields["count"], one, info.variable_values)
    column = asked.get("columns")
    # Without a column there is nothing to be distinct in, and without `distinct` the server counts rows.
    if not (asked.get("distinct") and column):
        return len
    return lambda rows: len({row[column] for row in rows} - {None})


def aggregate(
    world: World,
    entity: Entity,
    rows: Iterable[Row],
    where: Mapping[str, Any] | None,
    info: Info,
) -> dict[str, Any]:
    """Return the groups that an aggregate asks for: a single one of all rows without groupBy.

    Raises
    ------
    PlainError
        Nothing but groups is asked for.
    ValueError
        The filter holds more values than a statement takes.
    """
    # The first field of the first is all that the server looks at.
    nodes = _fields(_fields(info.field_nodes[0])[0])
    if all(one.name.value == "groupBy" for one in nodes):
        raise PlainError("No aggregate functions selected")
    check_parameters(where)
    trees = [_group_tree(one) for one in nodes if one.name.value == "groupBy"]
    # An aggregate reaches one relation less far than a list.
    kept = Filter(world, entity, where, depth=1)
    join = Join(world, entity, groups=trees[0] if trees else {}, depth=1)
    groups: dict[tuple[Any, ...], list[Row]] = {} if trees else {(): []}
    for row in rows:
        for line in join.lines(row) if kept.passes(row) else ():
            groups.setdefault(line.groups, []).append(row)
    count = _counter(info, nodes)
    found = [Group(its, _nested(join.grouping, by), count(its)) for by, its in groups.items()]
    return {"aggregate": found}


def _nested(paths: Sequence[tuple[str, ...]], values: tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in zip(paths, values, strict=True):
        place = found
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return found


def _resolve_list(entity: Entity) -> Callable[..., Any]:
    def resolve(_: Any, info: Info, where: Any = None, orderBy: Any = None, limitOffset: Any = None) -> Any:
        world: World = info.context
        return page(find(world, entity, world.all(entity.name), where, orderBy), limitOffset)

    return resolve


def _resolve_relation(relation: Relation, target: Entity) -> Callable[..., Any]:
    def resolve(row: Row, info: Info, where: Any = None, orderBy: Any = None, **asked: Any) -> Any:
        world: World = info.context
        related = world.related(relation, row)
        rows = find(world, target, world.random.sample(related, len(related)), where, orderBy)
        return connection(rows, asked) if relation.many else next(iter(rows), None)

    return resolve


def _resolve_aggregate(entity: Entity, relation: Relation | None = None) -> Callable[..., Any]:
    def resolve(row: Any, info: Info, where: Any = None) -> Any:
        world: World = info.context
        rows = world.related(relation, row) if relation else world.all(entity.name)
        return aggregate(world, entity, rows, where, info)

    return resolve


def _resolve_statistic(name: str, columns: Sequence[str]) -> Callable[..., Any]:
    def resolve(group: Group, _: Info) -> dict[str, Callable[..., Any]]:
        def lazily(column: str) -> Callable[..., Any]:
            def compute(_: Info) -> Any:
                values = group.column(column)
                return STATISTICS[name](values) if values else None

            return compute

        return {column: lazily(column) for column in columns}

    return resolve


def attach(schema: GraphQLSchema) -> GraphQLSchema:
    """Give all fields of a schema their resolvers; the context of a query is the `World`."""
    known = entities(schema)
    assert schema.query_type is not None
    for name, entity in known.items():
        schema.query_type.fields[entity.table].resolve = _resolve_list(entity)
        schema.query_type.fields[entity.table + AGGREGATE].resolve = _resolve_aggregate(entity)
        here = schema.type_map[name]
        assert isinstance(here, GraphQLObjectType)
        for relation in entity.relations.values():
            target = known[relation.target]
            here.fields[relation.name].resolve = _resolve_relation(relation, target)
            if relation.many:
                here.fields[relation.name + AGGREGATE].resolve = _resolve_aggregate(target, relation)
        functions = schema.type_map[f"{name}AggregateFunctions"]
        assert isinstance(functions, GraphQLObjectType)
        for function, definition in functions.fields.items():
            if function in STATISTICS:
                columns = get_named_type(definition.type)
                assert isinstance(columns, GraphQLObjectType)
                definition.resolve = _resolve_statistic(function, list(columns.fields))
        functions.fields["count"].resolve = lambda group, _, **__: group.count
        functions.fields["groupBy"].resolve = lambda group, _: group.by or None
    return schema


def masked(error: GraphQLError) -> dict[str, Any]:
    """Return an error as the server shows it: its reason only where it is one of the plain ones."""
    shown = str(error.original_error) if isinstance(error.original_error, PlainError) else "Unexpected error."
    locations = [{"line": one.line, "column": one.column} for one in error.locations or []]
    return {"message": shown, "locations": locations, "path": error.path}
