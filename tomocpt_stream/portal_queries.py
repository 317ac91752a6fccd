"""Questions to the portal's tables: named fields only, in pages, in order of id, repeated and kept.

The portal's own client asks for every field of a table in one request without a limit or an order, which
ends in a 502 for thousands of tomograms, and for one relation a request. Here a table is read in pages
after the last id seen, related rows come by their ids in batches, and a question that is too much for
the server is halved.
"""

from __future__ import annotations

import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import getitem
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from tomocpt_stream.errors import PortalError
from tomocpt_stream.portal_cache import AnswerCache, key_of, usual_folder
from tomocpt_stream.portal_exchange import AT_ONCE, Conversation, Exchange, TooMuchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Row = dict[str, Any]

URL_VARIABLE = "CRYOET_PORTAL_GRAPHQL_URL"
"""The environment variable that names another endpoint."""

PAGE = 500
"""Rows of a page, and ids of a batch, at most."""

MAX_AGE = 24 * 3600.0
"""Seconds for which a kept answer is as good as a new one."""

# Rows of a page below which a failure is not for their number; pages after which more are tried again.
_SMALLEST_PAGE, _TRIALS = 25, 4
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Tables whose type is not their name without the last letter.
_SAME = ("tiltseries", "perSectionParameters", "perSectionAlignmentParameters", "datasetFunding")


class PortalAPI:
    """The portal's GraphQL endpoint: rows of its tables, by pages, with a cache on disk.

    Parameters
    ----------
    url
        The endpoint; otherwise the environment variable CRYOET_PORTAL_GRAPHQL_URL names it, or else
        the package cryoet-data-portal.
    cache
        Folder for answers, which several processes may share; False for none. Otherwise the environment
        variable TOMOCPT_STREAM_PORTAL_CACHE names it, or else it is the user's cache folder (none for an
        endpoint on this machine).
    max_age
        Seconds after which a kept answer is asked for again.
    refresh
        Ask again whatever is kept.
    offline
        Ask nothing: kept answers of any age, with a warning if they are older than `max_age`.
    timeout
        Seconds to wait for a connection, and for an answer.
    budget
        Seconds for which a question that fails is repeated.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        cache: str | Path | Literal[False] | None = None,
        max_age: float = MAX_AGE,
        refresh: bool = False,
        offline: bool = False,
        timeout: tuple[float, float] = (10.0, 90.0),
        budget: float = 120.0,
    ) -> None:
        if refresh and offline:
            raise PortalError(
                "refresh and offline together",
                expected="new answers (refresh) or kept ones (offline)",
                remedy="leave one of them out",
            )
        self._exchange = Exchange(url or os.environ.get(URL_VARIABLE) or default_url(), timeout, budget)
        kept_in = usual_folder(self._exchange.url) if cache is None else cache
        self._cache = AnswerCache(Path(kept_in) if kept_in else None)
        self._max_age, self._refresh, self._offline = max_age, refresh, offline
        self._warned = False

    @property
    def url(self) -> str:
        """The endpoint, without a password or a query."""
        return self._exchange.shown

    @property
    def requests(self) -> int:
        """How many requests were sent, repetitions included."""
        return self._exchange.requests

    def rows(
        self,
        table: str,
        fields: Iterable[str],
        where: Mapping[str, Any] | None = None,
        *,
        key: str = "id",
        ids: Iterable[int] | None = None,
    ) -> list[Row]:
        """Return the rows of a table that a condition admits, sorted by id, each with its id.

        `table` is a root field of the schema ("tomograms"), `fields` are scalar ones ("runId"), `where`
        is the condition in the schema's form ({"runId": {"_eq": 3}}). With `ids` only rows whose field
        `key` is one of them, which are asked for in batches, some at a time.

        Raises
        ------
        PortalError
            The portal does not answer, or not with what was asked for.
        """
        names = _checked(["id", *fields])
        condition = dict(where or {})
        batches: list[list[int] | None] = [None]
        if ids is not None:
            batches = list(_batches(sorted(set(ids)), PAGE))
        query = _rows_query(_checked([table])[0], names)

        def ask() -> list[Row]:
            parts = self._each(
                batches, lambda talk, batch: _Listing(talk, table, query, names).rows(condition, key, batch)
            )
            found = {row["id"]: row for part in parts for row in part}
            return [found[number] for number in sorted(found)]

        return list(self._kept(ask, query, condition, key, batches))

    def lookup(self, wanted: Mapping[str, tuple[Iterable[str], Iterable[int]]]) -> dict[str, dict[int, Row]]:
        """Return rows of several tables by their ids: {table: (fields, ids)} gives {table: {id: row}}.

        The tables share requests. Ids that a table does not have are left out.

        Raises
        ------
        PortalError
            As for `rows`.
        """
        fields = {_checked([table])[0]: _checked(["id", *names]) for table, (names, _) in wanted.items()}
        ids = {table: sorted(set(numbers)) for table, (_, numbers) in wanted.items()}
        rounds = -(-max(map(len, ids.values()), default=0) // PAGE)
        batches = [
            {table: part for table, each in ids.items() if (part := each[i * PAGE : (i + 1) * PAGE])}
            for i in range(rounds)
        ]

        def ask() -> dict[str, list[Row]]:
            parts = self._each(batches, lambda talk, batch: _look_up(talk, fields, batch))
            return {table: [row for part in parts for row in part.get(table, ())] for table in fields}

        found = self._kept(ask, fields, ids)
        return {table: {row["id"]: row for row in rows} for table, rows in found.items()}

    def totals(
        self,
        table: str,
        where: Mapping[str, Any] | None = None,
        *,
        sums: Iterable[str] = (),
        by: Iterable[str] = (),
    ) -> list[Row]:
        """Return, from one request, how many rows there are and the sums of some fields, by group.

        Each item holds "count", the `sums` and the fields `by` under their names; one of a related row is
        named with a dot ("run.name"), and rows without such a row are not counted.

        Raises
        ------
        PortalError
            As for `rows`.
        """
        summed, grouped = _checked(sums), {name: _checked(name.split(".")) for name in by}
        asked = "count"
        asked += f" sum {{ {' '.join(summed)} }}" if summed else ""
        asked += f" groupBy {{ {' '.join(map(_path, grouped.values()))} }}" if grouped else ""
        query = (
            f"query ($where: {_type_of(table)}WhereClause) "
            f"{{ found: {_checked([table])[0]}Aggregate(where: $where) {{ aggregate {{ {asked} }} }} }}"
        )
        condition = dict(where or {})

        def ask() -> list[Row]:
            with Conversation(self._exchange) as talk:
                data = talk.ask(query, {"where": condition}, divisible=False)
            try:
                return [
                    {
                        "count": int(each["count"]),
                        **{name: each["sum"][name] for name in summed},
                        **{name: reduce(getitem, path, each["groupBy"]) for name, path in grouped.items()},
                    }
                    for each in data["found"]["aggregate"] or ()
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise _misfit(self.url, f"{table}Aggregate") from error

        return list(self._kept(ask, query, condition))

    def _each(self, batches: Sequence[Any], ask: Callable[[Conversation, Any], Any]) -> list[Any]:
        """Return what is answered for each batch, in their order; a few are asked for at a time."""
        stop = Event()

        def one(batch: Any) -> Any:
            with Conversation(self._exchange, stop) as talk:
                return ask(talk, batch)

        if len(batches) <= 1:
            return [one(batch) for batch in batches]
        with ThreadPoolExecutor(AT_ONCE, "portal") as pool:
            under_way = [pool.submit(one, batch) for batch in batches]
            try:
                return [each.result() for each in under_way]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _kept(self, ask: Callable[[], Any], *asked: Any) -> Any:
        """Return a kept answer, or ask and keep what comes."""
        key = key_of(self._exchange.url, _client_version(), *asked)
        kept = None if self._refresh else self._cache.get(key)
        if kept is not None and (self._offline or kept.age <= self._max_age):
            if kept.age > self._max_age and not self._warned:
                self._warned = True
                warnings.warn(
                    f"offline: answers of {self.url} from {_ago(kept.age)} ago are used", stacklevel=2
                )
            return kept.content
        if self._offline:
            where = f"in {self._cache.folder}" if self._cache.folder else "as there is no cache folder"
            raise PortalError(
                f"offline, and no whole answer of {self.url} to this question is kept {where}",
                expected="an answer from an earlier run with the same selection",
                remedy="run once without offline=True (--offline), or name the folder of that run's cache",
            )
        content = ask()
        self._cache.put(key, content)
        return content


class _Listing:
    """The pages of a table, and the size that the server is able to give."""

    def __init__(self, talk: Conversation, table: str, query: str, fields: Sequence[str]) -> None:
        self._talk, self._table, self._query, self._fields = talk, table, query, fields
        self._size = PAGE
        self._good = 0

    def rows(self, where: Row, key: str, batch: list[int] | None) -> list[Row]:
        """Return all rows; a batch that is too much is halved, without a batch the page is."""
        if batch is None:
            return self._pages(where, divisible=False)
        try:
            condition = {**where, key: {**where.get(key, {}), "_in": batch}}
            return self._pages(condition, divisible=len(batch) > 1)
        except TooMuchError:
            half = len(batch) // 2
            return self.rows(where, key, batch[:half]) + self.rows(where, key, batch[half:])

    def _pages(self, where: Row, *, divisible: bool) -> list[Row]:
        found: dict[int, Row] = {}  # a condition on a to-many relation gives a row several times
        last, total = 0, None
        while total is None or len(found) < total:
            condition = {**where, "id": {**where.get("id", {}), "_gt": last}} if found else where
            data = self._page(condition, first=total is None, divisible=divisible)
            page = _rows_in(data, "found", self._fields, self._talk.shown)
            if total is None:
                total = _count_in(data, self._talk.shown)
            numbers = [row["id"] for row in page]
            if (
                (not page and len(found) < total)
                or numbers != sorted(numbers)
                or min(numbers, default=last + 1) <= last
            ):
                raise PortalError(
                    f"{self._talk.shown} counts {total} {self._table} and lists {len(found)}, then "
                    + ("some out of order" if page else "no more"),
                    expected="every row, in the order of its id",
                    remedy="the table may be changing at this moment: try again",
                )
            found |= dict(zip(numbers, page, strict=True))
            last = max(numbers, default=last)
        return list(found.values())

    def _page(self, where: Row, *, first: bool, divisible: bool) -> Row:
        """Return one page; its size is halved when that is too much, and doubled again after a while."""
        while True:
            variables = {
                "where": where,
                "page": {"limit": self._size, "offset": 0},
                "order": [{"id": "asc"}],
                "first": first,
            }
            try:
                data = self._talk.ask(
                    self._query, variables, divisible=divisible or self._size > _SMALLEST_PAGE
                )
            except TooMuchError:
                if divisible:
                    raise
                self._size, self._good = max(_SMALLEST_PAGE, self._size // 2), 0
                continue
            self._good += 1
            if self._good == _TRIALS:
                self._size, self._good = min(PAGE, 2 * self._size), 0
            return data


def _look_up(talk: Conversation, fields: Mapping[str, Sequence[str]], batch: Mapping[str, list[int]]) -> Any:
    """Return the rows of a batch of ids by table; one that is too much is halved."""
    largest = max(map(len, batch.values()))
    heads = ", ".join(f"${table}: {_type_of(table)}WhereClause" for table in batch)
    parts = (f"{table}(where: ${table}) {{ {' '.join(fields[table])} }}" for table in batch)
    query = f"query ({heads}) {{ {' '.join(parts)} }}"
    try:
        data = talk.ask(
            query, {table: {"id": {"_in": ids}} for table, ids in batch.items()}, divisible=largest > 1
        )
    except TooMuchError:
        halves: dict[str, list[Row]] = {table: [] for table in batch}
        for half in (slice(None, -(-largest // 2)), slice(-(-largest // 2), None)):
            smaller = {table: ids[half] for table, ids in batch.items() if ids[half]}
            for table, rows in _look_up(talk, fields, smaller).items():
                halves[table] += rows
        return halves
    return {
        table: sorted(_rows_in(data, table, fields[table], talk.shown), key=lambda row: int(row["id"]))
        for table in batch
    }


def _rows_query(table: str, fields: Sequence[str]) -> str:
    kind = _type_of(table)
    # The first page comes with the number of all rows, so that nothing is lost to a limit of the server.
    return (
        f"query ($where: {kind}WhereClause, $page: LimitOffsetClause, $order: [{kind}OrderByClause!], "
        "$first: Boolean!) "
        f"{{ found: {table}(where: $where, orderBy: $order, limitOffset: $page) {{ {' '.join(fields)} }} "
        f"total: {table}Aggregate(where: $where) @include(if: $first) "
        "{ aggregate { count(distinct: true, columns: id) } } }"
    )


def _rows_in(data: Row, name: str, fields: Sequence[str], shown: str) -> list[Row]:
    rows = data.get(name)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("id"), int) and row.keys() >= set(fields) for row in rows
    ):
        raise _misfit(shown, name)
    return rows


def _count_in(data: Row, shown: str) -> int:
    try:
        groups = data["total"]["aggregate"]
        return int(groups[0]["count"]) if groups else 0
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _misfit(shown, "total") from error


def _misfit(shown: str, name: str) -> PortalError:
    return PortalError(
        f"an answer of {shown} whose part {name!r} is not what was asked for",
        expected="rows with the fields that were named",
        remedy="check the endpoint, or upgrade tomocpt-stream and cryoet-data-portal",
    )


def _type_of(table: str) -> str:
    return table[0].upper() + (table[1:] if table in _SAME else table[1:-1])


def _checked(names: Iterable[str]) -> list[str]:
    """Return names without repetitions; nothing but a name may get into the text of a query."""
    unique = list(dict.fromkeys(names))
    if wrong := [name for name in unique if not _NAME.fullmatch(name)]:
        raise ValueError(f"{wrong} as names of GraphQL")
    return unique


def _path(names: Sequence[str]) -> str:
    return " { ".join(names) + " }" * (len(names) - 1)


def _batches(items: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(items[i : i + size]) for i in range(0, len(items), size))


def default_url() -> str:
    """Return the endpoint that the package cryoet-data-portal names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its dependencies complain about is not this program's doing
        return str(import_module("cryoet_data_portal._client").DEFAULT_URL)


def _client_version() -> str:
    try:
        return version("cryoet-data-portal")
    except PackageNotFoundError:
        return ""


def _ago(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if 2 * length <= seconds < float("inf"):
            return f"{seconds / length:.0f} {unit}"
    return "a while" if seconds == float("inf") else f"{seconds:.0f} seconds"
