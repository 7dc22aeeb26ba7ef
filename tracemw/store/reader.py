"""Traces out of the file: one by its id, pages of a search, what is new."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracemw.errors import FilterError

from . import tokens
from .codec import SPAN_COLUMNS, TRACE_FIELDS, clean, span_row, trace_row, within
from .rows import StoredTrace

if TYPE_CHECKING:
    from .filter import Order, Where

KEY = "t.start_key"
PENDING_LIMIT = 10_000

_FIELDS = ", ".join(f"t.{name}" for name in TRACE_FIELDS)
_SPAN_FIELDS = ", ".join(SPAN_COLUMNS)
_AMONG = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream of finished traces.

    Attributes:
        after_id: Rows up to this number were looked at.
        pending: Those of them that had not finished.
    """

    after_id: int = 0
    pending: frozenset[int] = frozenset()


def by_trace_id(connection: sqlite3.Connection, trace_id: str, spans: bool) -> StoredTrace | None:
    """Return one trace, None where there is none of this id."""
    row = connection.execute("SELECT id FROM traces WHERE trace_id = ?", (trace_id,)).fetchone()
    return by_ids(connection, [row[0]], spans)[0] if row else None


def by_ids(connection: sqlite3.Connection, ids: Sequence[int], spans: bool) -> list[StoredTrace]:
    """Return traces by the numbers of their rows, in that order."""
    chosen = json.dumps(ids)
    found = {
        id: StoredTrace(trace_row(values), [], id, revision)
        for id, revision, *values in connection.execute(
            f"SELECT t.id, t.revision, {_FIELDS} FROM traces AS t WHERE t.id {_AMONG}", (chosen,)
        )
    }
    if spans:
        for trace, *values in connection.execute(
            f"SELECT trace, {_SPAN_FIELDS} FROM spans WHERE trace {_AMONG} ORDER BY trace, start_ns, id", (chosen,)
        ):
            stored = found[trace]
            stored.spans.append(span_row(stored.row.trace_id, values))
    return [found[id] for id in ids if id in found]


def source(connection: sqlite3.Connection, where: Where | None) -> tuple[str, str, list[Any]]:
    """Return FROM, WHERE and parameters for the traces (`t`) of a filter, through the token index where it helps.

    With the index, `tokens.rowid` is `t.start_key`, and walking it in order needs no sorting.
    """
    if where is None:
        return "traces AS t", "1", []
    match = tokens.expression(lambda sql: connection.execute(sql).fetchall(), where)
    if match is not None:
        tables = "tokens CROSS JOIN traces AS t ON t.start_key = tokens.rowid"
        sql = where.sql.replace(KEY, "tokens.rowid")  # the same number; FTS5 then skips words outside of a time
        return tables, f"tokens MATCH ? AND ({sql})", [match, *where.params]
    return "traces AS t", f"({where.sql})", list(where.params)


def order_texts(order_by: Any) -> list[Any]:
    """Return the texts of an order, which may be one text.

    Raises:
        FilterError: It is neither a list nor a text.
    """
    if order_by is None or isinstance(order_by, str):
        return [order_by] if order_by else []
    try:
        return list(order_by)
    except TypeError:
        given = type(order_by).__name__
        raise FilterError(f"order_by is a list such as ['timestamp DESC', 'name'], not {given}") from None


def length(order: Order | None) -> int:
    """Return how many values the place of a page has in this order."""
    return len(_terms(order, KEY))


def page(
    connection: sqlite3.Connection, where: Where | None, order: Order | None, limit: int, after: list[Any] | None
) -> tuple[list[int], list[Any] | None]:
    """Return the numbers of one page of traces, and the place after its last one if there are more.

    Args:
        after: The place to begin after: values of the order's terms, `start_key` last.
    """
    tables, condition, params = source(connection, where)
    key = "tokens.rowid" if tables.startswith("tokens") else KEY
    terms = _terms(order, key)
    if after is not None:
        follows, values = _follows(terms, after)
        condition, params = f"{condition} AND ({follows})", params + values
    columns = ", ".join(sql for sql, _ in terms)
    sorting = ", ".join(f"{sql} DESC" if descending else sql for sql, descending in terms)
    rows = connection.execute(
        f"SELECT t.id, {columns} FROM {tables} WHERE {condition} ORDER BY {sorting} LIMIT ?", [*params, limit + 1]
    ).fetchall()
    more = len(rows) > limit
    return [row[0] for row in rows[:limit]], list(rows[limit - 1][1:]) if more else None


def _terms(order: Order | None, key: str) -> list[tuple[str, bool]]:
    """Return the terms of an order up to the unique one, which it ends with."""
    terms: list[tuple[str, bool]] = []
    for sql, descending in order.terms if order else ():
        if sql == KEY:
            return [*terms, (key, descending)]
        terms.append((sql, descending))
    return [*terms, (key, True)]


def _follows(terms: Sequence[tuple[str, bool]], after: list[Any]) -> tuple[str, list[Any]]:
    """Return the condition that a row comes after a place, in an order in which NULL is the smallest value."""
    options, params, before, equal = [], [], "", list[Any]()
    last = len(terms) - 1
    for number, ((sql, descending), value) in enumerate(zip(terms, after, strict=True)):
        if value is None:
            beyond, given = (None if descending else f"{sql} IS NOT NULL"), []
        elif descending:
            beyond, given = (f"({sql} < ? OR {sql} IS NULL)" if number < last else f"{sql} < ?"), [value]
        else:
            beyond, given = f"{sql} > ?", [value]
        if beyond is not None:
            options.append(before + beyond)
            params += [*equal, *given]
        before += f"{sql} IS ? AND "
        equal.append(value)
    return " OR ".join(f"({option})" for option in options), params


def token_of(place: list[Any], query: Sequence[Any]) -> str:
    """Return the page token for a place in the result of a query."""
    text = json.dumps([_fingerprint(query), *place])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def place_of(token: str, query: Sequence[Any], terms: int) -> list[Any]:
    """Return the place of a page token.

    Raises:
        FilterError: It is not the token of a page of this query.
    """
    try:
        place: list[Any]
        fingerprint, *place = json.loads(base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4)))
        known = (
            fingerprint == _fingerprint(query)
            and len(place) == terms
            and all(map(_is_stored, place))
        )
    except (ValueError, TypeError, AttributeError, RecursionError):  # whatever was given as a token
        known = False
    if not known:
        raise FilterError(
            "page_token is not from a page of this search: give the same filter_string and order_by with it, "
            "or leave it out to begin at the first page"
        )
    return place


def _is_stored(value: Any) -> bool:
    """True for what a column may hold."""
    if isinstance(value, str):
        return clean(value) == value
    return value is None or isinstance(value, float) or (isinstance(value, int) and within(value) == value)


def _fingerprint(query: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(query).encode(), digest_size=9).hexdigest()


def finished_after(connection: sqlite3.Connection, cursor: Cursor, limit: int) -> tuple[list[int], Cursor]:
    """Return the numbers of traces that finished since a place, and the new place."""
    rows = connection.execute(
        "SELECT id, state = 'IN_PROGRESS' FROM traces WHERE id > ? ORDER BY id LIMIT ?", (cursor.after_id, limit)
    ).fetchall()
    waiting = dict(
        connection.execute(
            f"SELECT id, state = 'IN_PROGRESS' FROM traces WHERE id {_AMONG}",
            (json.dumps(sorted(cursor.pending)),),
        )
    )
    finished = [id for id, unfinished in sorted(waiting.items()) if not unfinished]
    finished += [id for id, unfinished in rows if not unfinished]
    pending = [id for id, unfinished in [*sorted(waiting.items()), *rows] if unfinished]
    last = rows[-1][0] if rows else cursor.after_id
    return finished, Cursor(last, frozenset(pending[-PENDING_LIMIT:]))


def end(connection: sqlite3.Connection) -> Cursor:
    """Return the place after everything that has finished."""
    last = connection.execute("SELECT max(id) FROM traces").fetchone()[0] or 0
    unfinished = connection.execute(
        "SELECT id FROM traces WHERE id > ? AND state = 'IN_PROGRESS'", (last - PENDING_LIMIT,)
    )
    return Cursor(last, frozenset(id for (id,) in unfinished))


def counts(connection: sqlite3.Connection) -> dict[str, Any]:
    """Return how much the file holds."""
    traces, oldest, newest = connection.execute(
        "SELECT count(*), min(start_key), max(start_key) FROM traces"
    ).fetchone()
    spans = connection.execute("SELECT count(*) FROM spans").fetchone()[0]
    return {"traces": traces, "spans": spans, "oldest_ns": oldest, "newest_ns": newest}


def matching(
    connection: sqlite3.Connection,
    where: Where | None,
    older_than_ns: int | None,
    trace_ids: list[str] | None,
    limit: int,
) -> list[int]:
    """Return the numbers of the oldest traces that meet all conditions given."""
    tables, condition, params = source(connection, where)
    if older_than_ns is not None:
        condition, params = f"{condition} AND t.start_key < ?", [*params, older_than_ns]
    if trace_ids is not None:
        condition, params = f"{condition} AND t.trace_id {_AMONG}", [*params, json.dumps(trace_ids)]
    rows = connection.execute(
        f"SELECT t.id FROM {tables} WHERE {condition} ORDER BY t.start_key LIMIT ?", [*params, limit]
    )
    return [id for (id,) in rows]
