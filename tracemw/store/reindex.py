"""Traces with the words of layout 2 get those of layout 3, few at a time, beside the writers.

Until the last one has them, `tokens.expression` leaves the short words out of searches.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

from . import layout, retention, tokens
from .codec import TRACE_FIELDS, trace_row
from .patience import leave_free
from .words import NONE, SPAN_FIELDS, with_spans

TRACES = 100
MOMENT = 0.5  # seconds that opening a file may take for it: small ones are done then

_AMONG = "IN (SELECT value FROM json_each(?))"
_SPANS = f"SELECT trace, {', '.join(SPAN_FIELDS)} FROM spans WHERE trace {_AMONG} ORDER BY trace"
_FIELDS = ", ".join(TRACE_FIELDS)


def words_of(connection: sqlite3.Connection, ids: Sequence[int]) -> dict[int, str]:
    """Return the words of traces, made from the spans that are stored of them."""
    found = dict.fromkeys(ids, NONE)
    rows = connection.execute(_SPANS, (json.dumps(ids),))
    for trace, spans in groupby(rows, key=lambda row: row[0]):
        found[trace] = with_spans(NONE, (span[1:] for span in spans))
    return found


def step(connection: sqlite3.Connection) -> bool:
    """Give the newest of them their words, in the transaction of the caller; False where there are none."""
    rows = connection.execute(
        f"SELECT id FROM traces WHERE {layout.OLD_WORDS} ORDER BY start_key DESC LIMIT {TRACES}"
    ).fetchall()
    if not rows:
        return False
    ids = retention.bounded(connection, [id for (id,) in rows])
    words, chosen = words_of(connection, ids), json.dumps(ids)
    if tokens.supported():
        changes = []
        for id, key, old, *values in connection.execute(
            f"SELECT id, start_key, words, {_FIELDS} FROM traces WHERE id {_AMONG}", (chosen,)
        ):
            row = trace_row(values)
            changes.append(((key, tokens.document(row, old)), (key, tokens.document(row, words[id]))))
        tokens.change(connection, changes)
        retention.count_removed(connection, len(ids))
    else:
        tokens.outdate(connection)
    connection.execute(
        f"UPDATE traces SET words = json_extract(?, '$.\"' || id || '\"') WHERE id {_AMONG}",
        (json.dumps(words), chosen),
    )
    return True


def finish(writing: Callable[[], AbstractContextManager[sqlite3.Connection]]) -> None:
    """Give all of them their words.

    Args:
        writing: Begins a transaction, which ends with the block.
    """
    more = True
    while more:
        began = time.perf_counter()
        with writing() as connection:
            more = step(connection)
        if more:
            leave_free(began)


def begin(connection: sqlite3.Connection) -> None:
    """Do as much as goes in a moment, in transactions of its own; somebody else's lock ends it."""
    deadline = time.monotonic() + MOMENT
    more = True
    while more and time.monotonic() < deadline:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return
        try:
            more = step(connection)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
