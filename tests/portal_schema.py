"""The portal's schema as its client package carries it, and what follows from the names in it."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLObjectType,
    GraphQLSchema,
    build_schema,
    get_named_type,
    is_leaf_type,
    is_non_null_type,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

AGGREGATE = "Aggregate"


@dataclass(frozen=True)
class Relation:
    """A field that leads from a row to rows of another type: those whose `remote` equals its `local`."""

    name: str
    target: str
    many: bool
    local: str
    remote: str


@dataclass(frozen=True)
class Entity:
    """One type of row: its table (the name of the query), its columns and its relations."""

    name: str
    table: str
    columns: Mapping[str, Any]
    relations: Mapping[str, Relation]


def moment(value: Any) -> Any:
    """Return ISO text of a point in time in UTC, which sorts as time does; no zone is UTC already."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no ISO date")
    found = dt.datetime.fromisoformat(value)
    return (found.astimezone(dt.UTC) if found.tzinfo else found.replace(tzinfo=dt.UTC)).isoformat()


@lru_cache(maxsize=4)
def portal_schema(lacking: frozenset[str] = frozenset()) -> GraphQLSchema:
    """Return the schema of the installed client package without the fields ("Tomogram.name") in `lacking`."""
    # Found without an import of the package, which takes a second.
    spec = find_spec("cryoet_data_portal")
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).with_name("data").joinpath("schema.graphql").read_text()
    schema = build_schema(text, assume_valid=True)
    for one in lacking:
        name, _, column = one.partition(".")
        for suffix in (
            "",
            "WhereClause",
            "OrderByClause",
            "MinMaxColumns",
            "NumericalColumns",
            "GroupByOptions",
        ):
            holder = schema.type_map.get(name + suffix)
            if isinstance(holder, GraphQLObjectType | GraphQLInputObjectType):
                known = holder.fields.pop(column, None)
                if known is None and not suffix:
                    raise KeyError(f"the schema has no field {one}")
    return schema


def _object(schema: GraphQLSchema, name: str) -> GraphQLObjectType:
    found = schema.type_map[name]
    assert isinstance(found, GraphQLObjectType)
    return found


def _node_of(connection: GraphQLObjectType) -> str:
    edge = get_named_type(connection.fields["edges"].type)
    assert isinstance(edge, GraphQLObjectType)
    return str(get_named_type(edge.fields["node"].type).name)


def _entity(schema: GraphQLSchema, name: str, table: str, tables: Mapping[str, str]) -> Entity:
    columns: dict[str, Any] = {}
    relations: dict[str, Relation] = {}
    for field, definition in _object(schema, name).fields.items():
        kind = get_named_type(definition.type)
        if is_leaf_type(kind):
            columns[field] = definition.type
        elif kind.name in tables:
            relations[field] = Relation(field, kind.name, False, f"{field}Id", "id")
        elif kind.name.endswith("Connection"):
            assert isinstance(kind, GraphQLObjectType)
            target = _node_of(kind)
            (back,) = (
                other
                for other, its in _object(schema, target).fields.items()
                if get_named_type(its.type).name == name
            )
            relations[field] = Relation(field, target, True, "id", f"{back}Id")
    return Entity(name, table, columns, relations)


@lru_cache(maxsize=4)
def entities(schema: GraphQLSchema) -> Mapping[str, Entity]:
    """Return all types of rows by name: what the queries give lists of."""
    assert schema.query_type is not None
    lists = {field: get_named_type(its.type).name for field, its in schema.query_type.fields.items()}
    tables = {name: field for field, name in lists.items() if not field.endswith(AGGREGATE)}
    return {name: _entity(schema, name, table, tables) for name, table in tables.items()}


def default_value(entity: Entity, column: str, number: int) -> Any:
    """Return what a row has in a column that it does not name: null where that is allowed.

    Raises
    ------
    ValueError
        The column is the id, or leads to another row that it must have.
    """
    kind = entity.columns[column]
    if not is_non_null_type(kind):
        return None
    if column == "id" or any(
        relation.local == column and not relation.many for relation in entity.relations.values()
    ):
        raise ValueError(f"row {number} of {entity.table} must have {column}")
    leaf = get_named_type(kind)
    if isinstance(leaf, GraphQLEnumType):
        return next(iter(leaf.values))
    by_type = {
        "Int": 0,
        "Float": 0.0,
        "Boolean": False,
        "DateTime": "2024-06-01",
        "ID": f"{entity.name}:{number}",
    }
    return by_type.get(leaf.name, f"{column} {number}")


def stored_value(entity: Entity, column: str, value: Any) -> Any:
    """Return a value as the database keeps it: points in time in UTC, all else as it is, once checked.

    Raises
    ------
    ValueError
        The type has no such column, or the column does not take the value.
    """
    if column not in entity.columns:
        raise ValueError(f"{entity.table} has no field {column}")
    kind = get_named_type(entity.columns[column])
    if value is None:
        if is_non_null_type(entity.columns[column]):
            raise ValueError(f"{column} of {entity.table} may not be null")
        return None
    if column == "inPlaneRotation":
        return value
    try:
        return moment(value) if kind.name == "DateTime" else kind.parse_value(value)
    except Exception as error:
        raise ValueError(f"{column} of {entity.table}: {error}") from error
