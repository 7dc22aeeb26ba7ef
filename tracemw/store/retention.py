"""Removal of traces: few at a time, so that no writer waits for long, and the file gets smaller."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from . import tokens
from .codec import TRACE_FIELDS, trace_row

CHUNK_TRACES = 500
CHUNK_SPANS = 5000
VACUUM_PAGES = 1000
MERGE_PAGES = 200
LITTER = 4  # the token index is rewritten when one trace was removed for so many that are left
RESERVE = 20  # one part in so many of the file may be free pages, for the next traces

_COUNT_REMOVED = """
INSERT INTO facts (name, value) VALUES ('removed', ?)
ON CONFLICT (name) DO UPDATE SET value = CAST(value AS INTEGER) + excluded.value
"""
_DELIVERED = "NOT EXISTS (SELECT 1 FROM outbox AS o WHERE o.trace = t.id)"


def remove(connection: sqlite3.Connection, ids: list[int]) -> int:
    """Remove traces by the numbers of their rows, inside the transaction of the caller; return how many."""
    chosen = json.dumps(ids)
    among = "IN (SELECT value FROM json_each(?))"
    if tokens.supported():
        fields = ", ".join(TRACE_FIELDS)
        rows = connection.execute(f"SELECT start_key, words, {fields} FROM traces WHERE id {among}", (chosen,))
        documents = sorted((key, tokens.document(trace_row(values), words)) for key, words, *values in rows)
        tokens.remove(connection, documents)
        count_removed(connection, len(ids))
    else:
        tokens.outdate(connection)
    connection.execute(f"DELETE FROM spans WHERE trace {among}", (chosen,))
    connection.execute(f"DELETE FROM outbox WHERE trace {among}", (chosen,))
    return connection.execute(f"DELETE FROM traces WHERE id {among}", (chosen,)).rowcount


def count_removed(connection: sqlite3.Connection, traces: int) -> None:
    """Note that words of so many traces were taken out of the token index."""
    connection.execute(_COUNT_REMOVED, (traces,))


def bounded(connection: sqlite3.Connection, ids: list[int]) -> list[int]:
    """Return as many of the traces, from the first, as are removed in one short transaction; one at least."""
    counts = dict(
        connection.execute(
            "SELECT trace, count(*) FROM spans WHERE trace IN (SELECT value FROM json_each(?)) GROUP BY trace",
            (json.dumps(ids),),
        )
    )
    total = 0
    for number, trace in enumerate(ids):
        total += counts.get(trace, 0)
        if number and total > CHUNK_SPANS:
            return ids[:number]
    return ids


@dataclass(slots=True)
class Excess:
    """Which traces are over a limit, oldest first.

    Attributes:
        older_than_ns: Traces that started before are too old.
        max_bytes: The size that the rows may take.
    """

    older_than_ns: int | None
    max_bytes: int | None

    def next_chunk(self, connection: sqlite3.Connection, undelivered: bool) -> list[int]:
        """Return the next traces to remove, inside the transaction of the caller; none when within the limits.

        Args:
            undelivered: Choose among those that wait for delivery, instead of the others.
        """
        condition = _DELIVERED.removeprefix("NOT ") if undelivered else _DELIVERED
        ids = self._oldest(connection, condition, self.older_than_ns) if self.older_than_ns is not None else []
        if not ids and self.max_bytes is not None:
            excess = used(connection) - self.max_bytes
            if excess > 0:
                ids = self._oldest(connection, condition, None)
                ids = ids[: _share(connection, excess)]
        return bounded(connection, ids)

    def _oldest(self, connection: sqlite3.Connection, condition: str, before_ns: int | None) -> list[int]:
        time = "" if before_ns is None else f"t.start_key < {before_ns:d} AND "
        rows = connection.execute(
            f"SELECT t.id FROM traces AS t WHERE {time}{condition} ORDER BY t.start_key LIMIT {CHUNK_TRACES}"
        )
        return [id for (id,) in rows]


def _share(connection: sqlite3.Connection, excess: int) -> int:
    """Return about how many traces take so many bytes, if all are of a size."""
    count = int(connection.execute("SELECT count(*) FROM traces").fetchone()[0])
    return max(1, min(CHUNK_TRACES, excess * count // max(1, used(connection))))


def used(connection: sqlite3.Connection) -> int:
    """Return the bytes that rows and indexes take, without pages that are free again."""
    pages, free, size = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def vacuum(connection: sqlite3.Connection) -> bool:
    """Give some free pages back to the disk, but for a reserve; False when there are no more."""
    pages, free = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count")
    )
    surplus = free - pages // RESERVE
    if surplus <= 0:
        return False
    # It does one page at each step, and CPython 3.11 takes but one step of a statement without columns.
    connection.executescript(f"PRAGMA incremental_vacuum({min(surplus, VACUUM_PAGES)})")
    return surplus > VACUUM_PAGES


def littered(connection: sqlite3.Connection) -> bool:
    """True where removed traces take much of the token index: FTS5 notes their removal beside their words."""
    if not tokens.current(connection):
        return False
    removed = connection.execute("SELECT value FROM facts WHERE name = 'removed'").fetchone()
    traces = connection.execute("SELECT count(*) FROM traces").fetchone()[0]
    return removed is not None and int(removed[0]) * LITTER > int(traces)


def merge(connection: sqlite3.Connection, first: bool) -> bool:
    """Do a part of rewriting the token index without what was removed; False when it is done.

    Args:
        first: This is the first part (FTS5's `merge` command says so by the sign, and by the rows that it changed
            whether there was something to do).
    """
    before = connection.total_changes
    pages = -MERGE_PAGES if first else MERGE_PAGES
    connection.execute("INSERT INTO tokens (tokens, rank) VALUES ('merge', ?)", (pages,))
    if connection.total_changes - before >= 2:
        return True
    connection.execute("UPDATE facts SET value = 0 WHERE name = 'removed'")
    return False
