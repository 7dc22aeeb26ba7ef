"""New traces, a few at a time, by one statement that is a transaction of its own.

Python gives the interpreter away for every statement. Beside a thread that computes it takes 5 ms to get it back,
and costs that thread more than the statement itself: a request that meets the writer waits for both of them to be
woken, each time. So all parts of a trace go through a view, whose triggers put them where they belong; and all
rows of the view are one JSON text, which SQLite takes apart while others have the interpreter. To bind their
values one by one keeps it for a third of a millisecond.

It is for traces that the file has nothing of, as those of most requests. One that is there already has the
statement fail as a whole, and so has a `start_key` that is taken: `writer.py` can write those.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import outbox, tokens
from .codec import (
    SPAN_COLUMNS,
    TRACE_COLUMNS,
    TRACE_FIELDS,
    json_encoder,
    span_row,
    span_values,
    trace_row,
    trace_values,
)
from .keys import distinct_keys
from .rows import SpanRow, TraceRow
from .words import kept, of_spans
from .writer import Known, add, described, grouped

MOST = 128  # rows of one statement; more are written faster table by table
REMEMBERED = 5000  # traces, or twice as many

_TRACE_AND_SPAN, _TRACE, _SPAN = range(1, 4)  # what a row of the view is of
_FACTS = ("words", "other_error", *TRACE_COLUMNS[1:])
_COLUMNS = (
    "start_key", "part", "trace_id", *(f"span_{name}" for name in SPAN_COLUMNS),
    *(f"trace_{name}" for name in _FACTS), "document", "due",
)  # fmt: skip
_NO_SPAN = (None,) * len(SPAN_COLUMNS)
_SPANS_AT = _COLUMNS.index(f"span_{SPAN_COLUMNS[0]}")
_TRACE_AT = _COLUMNS.index(f"trace_{TRACE_COLUMNS[1]}")

_VIEW = f"CREATE TEMP VIEW arrivals AS SELECT {', '.join(f'NULL AS {name}' for name in _COLUMNS)}"
_KEEP_TRACE = f"""
    SELECT RAISE(ABORT, 'the key is taken') FROM traces WHERE start_key = NEW.start_key;
    INSERT INTO traces (revision, start_key, trace_id, {', '.join(_FACTS)})
        VALUES (1, NEW.start_key, NEW.trace_id, {', '.join(f'NEW.trace_{name}' for name in _FACTS)});
    INSERT INTO tokens (rowid, words) VALUES (NEW.start_key, NEW.document);
    INSERT INTO outbox (trace, attempts, due_ns, reason, dead)
        SELECT id, 0, NEW.due, NULL, 0 FROM traces WHERE NEW.due IS NOT NULL AND trace_id = NEW.trace_id;
"""
_KEEP_SPAN = f"""
    INSERT INTO spans (trace, {', '.join(SPAN_COLUMNS)}) VALUES (
        (SELECT id FROM traces WHERE trace_id = NEW.trace_id),
        {', '.join(f'NEW.span_{name}' for name in SPAN_COLUMNS)}
    );
"""
_TRIGGERS = {_TRACE_AND_SPAN: _KEEP_TRACE + _KEEP_SPAN, _TRACE: _KEEP_TRACE, _SPAN: _KEEP_SPAN}

# A row would otherwise be made of the whole text anew for each of its values; before 3.35 it is.
_ONCE = "MATERIALIZED" if sqlite3.sqlite_version_info >= (3, 35) else ""
_INSERT = f"""
INSERT INTO arrivals ({', '.join(_COLUMNS)})
    WITH arrived (trace) AS {_ONCE} (SELECT value FROM json_each(?))
    SELECT {', '.join(f"json_extract(trace, '$[{place}]')" for place in range(len(_COLUMNS)))} FROM arrived
"""

_text = json_encoder(allow_nan=False)


class Arrival(NamedTuple):
    """A new trace with its spans, ready for the statement.

    Attributes:
        start_ns: Of the trace; its key is made of it when it is written.
        rows: How many rows of the view it takes.
        text: Those rows as JSON, without what comes before the first one's second value.
    """

    trace_id: str
    start_ns: int
    rows: int
    text: str


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


def of_rows(traces: Sequence[TraceRow], spans: Sequence[SpanRow], queue: bool) -> list[Arrival]:
    """Make traces ready that the file has nothing of.

    Raises what `Store.write` cleans rows for.

    Args:
        queue: Also queue the traces for delivery.
    """
    by_trace = grouped(spans)
    known: dict[str, Known] = {}
    add(known, traces, by_trace)
    return [_arrival(trace, by_trace.get(trace_id, ()), queue) for trace_id, trace in known.items()]


def of_root(trace: TraceRow, span: SpanRow, queue: bool) -> Arrival:
    """Make one trace ready that has one span, as `of_rows` does."""
    return _arrival(Known(trace), (span,), queue)


def _arrival(trace: Known, spans: Sequence[SpanRow], queue: bool) -> Arrival:
    row, words = trace.row, of_spans(map(described, spans))
    trace_id, *values = trace_values(row)
    facts = kept(*words), 1 if trace.other_error else 0, *values, tokens.document_with(row, *words)
    due = outbox.due_at(row.state) if queue else None
    first = span_values(spans[0]) if spans else _NO_SPAN
    text = _text((_TRACE_AND_SPAN if spans else _TRACE, trace_id, *first, *facts, due))[1:]
    for span in spans[1:]:
        text += f",[0,{_text((_SPAN, trace_id, *span_values(span)))[1:]}"
    return Arrival(trace_id, row.start_ns, max(1, len(spans)), text)


def rows_of(arrivals: Iterable[Arrival]) -> tuple[list[TraceRow], list[SpanRow]]:
    """Return the rows that were made ready."""
    traces, spans = [], []
    for trace_id, _, _, text in arrivals:
        for values in json.loads(f"[[0,{text}]"):
            if values[1] != _SPAN:
                facts = values[_TRACE_AT : _TRACE_AT + len(TRACE_FIELDS) - 1]
                traces.append(trace_row((trace_id, *facts)))
            if values[1] != _TRACE:
                spans.append(span_row(trace_id, values[_SPANS_AT : _SPANS_AT + len(SPAN_COLUMNS)]))
    return traces, spans


def insert(connection: sqlite3.Connection, arrivals: Sequence[Arrival]) -> None:
    """Insert traces, outside of a transaction: all of them, or none if there is an error.

    Raises:
        sqlite3.IntegrityError: A trace, one of its spans or a key is there already.
        sqlite3.Error, ValueError, OverflowError: It cannot be done, or not with such values.
    """
    keys = distinct_keys([arrival.start_ns for arrival in arrivals])
    # By key: the order in which the token index likes them best.
    rows = ",".join([f"[{key},{arrival.text}" for key, arrival in sorted(zip(keys, arrivals, strict=True))])
    # It gives the interpreter away once less than `execute`, which asks for the number of the last row.
    connection.executemany(_INSERT, ((f"[{rows}]",),))


def fit(rows: int) -> bool:
    """True if so many rows can go into one statement."""
    return rows <= MOST and tokens.supported()


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
