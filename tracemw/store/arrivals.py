"""New traces, a few at a time, by one statement that is a transaction of its own.

Python gives the interpreter away for every statement. Beside a thread that computes it takes 5 ms to get it back,
and costs that thread more than the statement itself: a request that meets the writer waits for both of them to be
woken, each time. So all parts of a trace go through a view, whose triggers put them where they belong.

It is for traces that the file has nothing of, as those of most requests. One that is there already has the
statement fail as a whole, and so has a `start_key` that is taken: `writer.py` can write those.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from . import bulk, outbox, tokens
from .codec import SPAN_COLUMNS, TRACE_COLUMNS, span_values, trace_values
from .keys import distinct_keys
from .rows import SpanRow, TraceRow
from .words import kept, of_spans
from .writer import Known, add, described, grouped

MOST = 128  # rows of one statement; more are written faster table by table
STEP = 8  # their number is a multiple of it, filled up with rows of nothing: few statements to prepare
REMEMBERED = 5000  # traces, or twice as many

# What a row is of.
_NOTHING, _TRACE_AND_SPAN, _TRACE, _SPAN = range(4)

_FACTS = ("start_key", "words", "other_error", *TRACE_COLUMNS)
_COLUMNS = (
    "part", *(f"trace_{name}" for name in _FACTS), "document", "due", *(f"span_{name}" for name in SPAN_COLUMNS)
)  # fmt: skip
_HEAD = f"INSERT INTO arrivals ({', '.join(_COLUMNS)}) VALUES"
_ROW = f"({', '.join('?' * len(_COLUMNS))})"
_VIEW = f"CREATE TEMP VIEW arrivals AS SELECT {', '.join(f'NULL AS {name}' for name in _COLUMNS)}"

# Python's driver takes longest to bind None. A number with a fraction, which no column has, stands for it; what no
# trigger reads is 0.
_ABSENT = 0.5


def _given(columns: Sequence[str]) -> str:
    return ", ".join(f"NULLIF(NEW.{name}, {_ABSENT})" for name in columns)


_KEEP_TRACE = f"""
    SELECT RAISE(ABORT, 'the key is taken') FROM traces WHERE start_key = NEW.trace_start_key;
    INSERT INTO traces (revision, {', '.join(_FACTS)})
        VALUES (1, {_given([f'trace_{name}' for name in _FACTS])});
    INSERT INTO tokens (rowid, words) VALUES (NEW.trace_start_key, NEW.document);
    INSERT INTO outbox (trace, attempts, due_ns, reason, dead)
        SELECT id, 0, NEW.due, NULL, 0 FROM traces WHERE NEW.due >= 0 AND trace_id = NEW.trace_trace_id;
"""
_KEEP_SPAN = f"""
    INSERT INTO spans (trace, {', '.join(SPAN_COLUMNS)}) VALUES (
        (SELECT id FROM traces WHERE trace_id = NEW.trace_trace_id),
        {_given([f'span_{name}' for name in SPAN_COLUMNS])}
    );
"""
_TRIGGERS = {_TRACE_AND_SPAN: _KEEP_TRACE + _KEEP_SPAN, _TRACE: _KEEP_TRACE, _SPAN: _KEEP_SPAN}

_EMPTY = (_NOTHING,) + (0,) * (len(_COLUMNS) - 1)
_NO_SPAN = (0,) * len(SPAN_COLUMNS)
_BEFORE_ID = (0,) * _FACTS.index("trace_id")
_AFTER_ID = (0,) * (len(_FACTS) - len(_BEFORE_ID) - 1 + len(("document", "due")))
_start_key = attrgetter("start_key")


def prepare(connection: sqlite3.Connection) -> None:
    """Make the view and its triggers, which are the connection's own."""
    if not tokens.supported():
        return
    connection.execute(_VIEW)
    for part, statements in _TRIGGERS.items():
        connection.execute(
            f"CREATE TEMP TRIGGER arrive_{part} INSTEAD OF INSERT ON arrivals WHEN NEW.part = {part}"
            f" BEGIN {statements} END"
        )


def rows_of(traces: Sequence[TraceRow], spans: Sequence[SpanRow], queue: bool) -> list[tuple[Any, ...]]:
    """Return the rows of the view for traces that are new; for a span beyond a trace's first, one of its own.

    Raises what `Store.write` cleans rows for.

    Args:
        queue: Also queue the traces for delivery.
    """
    by_trace = grouped(spans)
    known: dict[str, Known] = {}
    add(known, traces, by_trace)
    keys = distinct_keys([trace.row.start_ns for trace in known.values()])
    for trace, key in zip(known.values(), keys, strict=True):
        trace.start_key = key
    found = []
    for trace in sorted(known.values(), key=_start_key):  # the order in which the token index likes them best
        trace_id = trace.row.trace_id
        own = by_trace.get(trace_id, ())
        facts = _facts(trace, own, queue)
        if own:
            found.append((_TRACE_AND_SPAN, *facts, *span_values(own[0])))
        else:
            found.append((_TRACE, *facts, *_NO_SPAN))
        for span in own[1:]:
            found.append((_SPAN, *_BEFORE_ID, trace_id, *_AFTER_ID, *span_values(span)))
    return found


def _facts(trace: Known, spans: Sequence[SpanRow], queue: bool) -> tuple[Any, ...]:
    row, words = trace.row, of_spans(map(described, spans))
    document = tokens.document_with(row, *words)
    due = outbox.due_at(row.state) if queue else -1
    return trace.start_key, kept(*words), 1 if trace.other_error else 0, *trace_values(row), document, due


def insert(connection: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    """Insert rows, outside of a transaction: all of them, or none if there is an error.

    Raises:
        sqlite3.IntegrityError: A trace, one of its spans or a key is there already.
        sqlite3.Error, ValueError, OverflowError: It cannot be done, or not with such values.
    """
    empty = -len(rows) % STEP
    values = [_ABSENT if value is None else value for row in rows + [_EMPTY] * empty for value in row]
    bulk.insert_at_once(connection, _HEAD, _ROW, len(rows) + empty, values)


def fit(rows: int) -> bool:
    """True if so many rows can go into one statement."""
    return rows <= min(MOST, bulk.most(_ROW) // STEP * STEP) and tokens.supported()


class Recent:
    """Which traces were written a moment ago: to those more may come, so they are not taken for new ones.

    It only saves attempts that fail. Half of what it knows goes whenever `REMEMBERED` have come.
    """

    def __init__(self) -> None:
        self._newer: set[str] = set()
        self._older: set[str] = set()

    def has_any(self, trace_ids: set[str]) -> bool:
        """True if one of the traces is among them."""
        return not (self._newer.isdisjoint(trace_ids) and self._older.isdisjoint(trace_ids))

    def add(self, trace_ids: set[str]) -> None:
        """Remember traces."""
        self._newer |= trace_ids
        if len(self._newer) > REMEMBERED:
            self._older, self._newer = self._newer, set()
