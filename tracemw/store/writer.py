"""Rows into the file: spans upserted, the facts of a trace merged from whatever came of it so far."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from . import bulk, reindex, tokens
from .codec import SPAN_COLUMNS, TRACE_COLUMNS, TRACE_FIELDS, clean, span_values, trace_row, trace_values
from .keys import free_keys
from .outbox import enqueue
from .rows import SpanRow, TraceRow
from .words import NONE, SPAN_FIELDS, outdated, with_spans

NEW = 0

_INSERT_COLUMNS = ("id", "start_key", "words", "other_error", "revision", *TRACE_COLUMNS)
_TRACE = f"INSERT INTO traces ({', '.join(_INSERT_COLUMNS)}) VALUES"
_TRACE_ROW = f"({', '.join('?' * len(_INSERT_COLUMNS))})"
_TRACE_KNOWN = "ON CONFLICT (id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _INSERT_COLUMNS[1:]
)
_SELECT_TRACES = (
    f"SELECT id, start_key, words, other_error, revision, {', '.join(TRACE_FIELDS)} FROM traces"
    " WHERE trace_id IN (SELECT value FROM json_each(?))"
)
_SPAN = f"INSERT INTO spans (trace, {', '.join(SPAN_COLUMNS)}) VALUES"
_SPAN_ROW = f"(?, {', '.join('?' * len(SPAN_COLUMNS))})"
_SPAN_KNOWN = "ON CONFLICT (trace, span_id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in SPAN_COLUMNS[1:]
)
_NEXT_REVISION = "UPDATE traces SET revision = revision + 1 WHERE id IN (SELECT value FROM json_each(?))"
_OPTIONAL = (
    "duration_ns", "outcome", "method", "route", "status_code", "client_request_id", "session_id", "user_id",
    "request_preview", "response_preview",
)  # fmt: skip
described = attrgetter(*SPAN_FIELDS)
_IDENTITY = ("client_request_id", "session_id", "user_id")
PATCHABLE = frozenset(_OPTIONAL) | {"name", "state"}


@dataclass(slots=True)
class Known:
    """What the store holds of a trace, and what it will hold.

    Attributes:
        id: Number of its row; `NEW` before it has one.
        other_error: A root other than the one whose facts these are has failed.
        words: Of its spans, for the token index.
        stored: Row, words and key as they are in the file; None where there are none.
        changed: The row is to be written, not only its revision.
    """

    row: TraceRow
    id: int = NEW
    start_key: int = 0
    words: str = NONE
    other_error: bool = False
    revision: int = 0
    stored: tuple[TraceRow, str, int] | None = None
    changed: bool = True


def write(
    connection: sqlite3.Connection, traces: Sequence[TraceRow], spans: Sequence[SpanRow], outbox: bool
) -> None:
    """Store rows inside the transaction of the caller."""
    by_trace = grouped(spans)
    known = load(connection, dict.fromkeys([*(row.trace_id for row in traces), *by_trace]))
    for trace_id in by_trace.keys() & known.keys():
        trace = known[trace_id]
        if outdated(trace.words):
            trace.words = reindex.words_of(connection, [trace.id])[trace.id]
            trace.changed = True
    add(known, traces, by_trace)
    _add_words(known, by_trace)
    save(connection, known.values())
    values = ((known[span.trace_id].id, *span_values(span)) for span in spans)
    bulk.insert(connection, _SPAN, _SPAN_ROW, values, _SPAN_KNOWN)
    if outbox:
        enqueue(connection, [(trace.id, trace.row.state) for trace in known.values()])


def patch(
    connection: sqlite3.Connection,
    trace_id: str,
    tags: Mapping[str, str | None],
    metadata: Mapping[str, str | None],
    columns: Mapping[str, Any],
    outbox: bool,
) -> bool:
    """Change facts of one trace inside the transaction of the caller; None removes."""
    trace = load(connection, [trace_id]).get(trace_id)
    if trace is None:
        return False
    row = replace(trace.row, **columns)
    trace.other_error = trace.other_error and "state" not in columns
    row.tags, row.metadata = _patched(row.tags, tags), _patched(row.metadata, metadata)
    trace.row, trace.changed = row, True
    save(connection, [trace])
    if outbox:
        enqueue(connection, [(trace.id, row.state)])
    return True


def grouped(spans: Sequence[SpanRow]) -> dict[str, list[SpanRow]]:
    """Return the spans of each trace."""
    by_trace: dict[str, list[SpanRow]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    return by_trace


def load(connection: sqlite3.Connection, trace_ids: Iterable[str]) -> dict[str, Known]:
    """Return what is stored of these traces."""
    found = {}
    for id, start_key, words, other_error, revision, *values in connection.execute(
        _SELECT_TRACES, (json.dumps(list(trace_ids)),)
    ):
        row = trace_row(values)
        stored = row, words, start_key
        found[row.trace_id] = Known(row, id, start_key, words, bool(other_error), revision, stored, False)
    return found


def add(known: dict[str, Known], traces: Sequence[TraceRow], by_trace: Mapping[str, list[SpanRow]]) -> None:
    """Add what rows say to what is known of their traces; spans without any make one that is in progress."""
    for row in traces:
        merge(known, row)
    for trace_id, spans in by_trace.items():
        if trace_id not in known:
            known[trace_id] = Known(_placeholder(spans))


def _add_words(known: dict[str, Known], by_trace: Mapping[str, list[SpanRow]]) -> None:
    for trace_id, spans in by_trace.items():
        trace = known[trace_id]
        words = with_spans(trace.words, map(described, spans))
        if words != trace.words:
            trace.words, trace.changed = words, True


def merge(known: dict[str, Known], new: TraceRow) -> None:
    """Add what a row says of a trace to what is known of it.

    Of one root the newest facts count, and what is not said again stays. Of two roots of one trace (a caller that
    shares the store) the parentless one's facts count, else the earliest's; what only the other one knows of the
    request, its metadata and its tags is kept, and its failure too.
    """
    trace = known.get(new.trace_id)
    if trace is None:
        known[new.trace_id] = Known(new)
        return
    old = trace.row
    trace.changed = True
    if old.root_span_id is None or new.root_span_id in (None, old.root_span_id):
        trace.row = _updated(old, new)
    elif _rank(new) < _rank(old):
        trace.other_error = trace.other_error or old.state == "ERROR"
        trace.row = _completed(new, old)
    else:
        trace.other_error = trace.other_error or new.state == "ERROR"
        trace.row = _completed(old, new)
    if trace.other_error and trace.row.state != "IN_PROGRESS":
        trace.row = replace(trace.row, state="ERROR")


def save(connection: sqlite3.Connection, known: Iterable[Known]) -> None:
    """Write the rows of traces, each with its next revision, and their documents."""
    known = list(known)
    fresh = [trace for trace in known if trace.id == NEW]
    changed = [trace for trace in known if trace.changed and trace.id != NEW]
    _number(connection, fresh, changed)
    for trace in known:
        trace.revision += 1
    written = fresh + changed
    bulk.insert(connection, _TRACE, _TRACE_ROW, map(_values, written), _TRACE_KNOWN)
    if len(written) < len(known):
        others = json.dumps([trace.id for trace in known if not trace.changed])
        connection.execute(_NEXT_REVISION, (others,))
    _index(connection, written)


def _number(connection: sqlite3.Connection, fresh: list[Known], changed: list[Known]) -> None:
    """Give new traces their numbers, and those whose start is new their keys."""
    if fresh:
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'traces'").fetchone()
        for number, trace in enumerate(fresh, 1 + (last[0] if last else 0)):
            trace.id = number
    moved = fresh + [trace for trace in changed if trace.stored and trace.stored[0].start_ns != trace.row.start_ns]
    if moved:
        keys = free_keys(connection, [trace.row.start_ns for trace in moved])
        for trace, key in zip(moved, keys, strict=True):
            trace.start_key = key


def _values(trace: Known) -> tuple[Any, ...]:
    return trace.id, trace.start_key, trace.words, trace.other_error, trace.revision, *trace_values(trace.row)


def _index(connection: sqlite3.Connection, known: list[Known]) -> None:
    """Bring the token index up to date."""
    if not tokens.supported():
        tokens.outdate(connection)
        return
    changes = []
    for trace in known:
        old = None
        if trace.stored is not None:
            row, words, key = trace.stored
            old = key, tokens.document(row, words)
        changes.append((old, (trace.start_key, tokens.document(trace.row, trace.words))))
    tokens.change(connection, changes)


def _placeholder(spans: list[SpanRow]) -> TraceRow:
    """Return the trace of spans that came before their root."""
    first = min(spans, key=lambda span: (span.parent_id is not None, span.start_ns))
    start = min(span.start_ns for span in spans)
    nothing: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    return TraceRow(
        trace_id=first.trace_id,
        root_span_id=None,
        has_parent=False,
        name=first.name,
        start_ns=start,
        state="IN_PROGRESS",
        metadata={},
        tags={},
        **nothing,
    )


def _updated(old: TraceRow, new: TraceRow) -> TraceRow:
    """Return newer facts of the same root."""
    kept = {name: getattr(old, name) for name in _OPTIONAL if getattr(new, name) is None}
    if new.state == "IN_PROGRESS" and old.state != "IN_PROGRESS":
        kept["state"] = old.state
    if new.root_span_id is None:
        kept["root_span_id"] = old.root_span_id
    return replace(new, metadata={**old.metadata, **new.metadata}, tags={**old.tags, **new.tags}, **kept)


def _completed(facts: TraceRow, other: TraceRow) -> TraceRow:
    """Return the facts of the root that counts, with what only the other one knows of the request."""
    added = {name: getattr(other, name) for name in _IDENTITY if getattr(facts, name) is None}
    return replace(
        facts, metadata={**other.metadata, **facts.metadata}, tags={**other.tags, **facts.tags}, **added
    )


def _rank(row: TraceRow) -> tuple[bool, int, str]:
    return row.has_parent, row.start_ns, row.root_span_id or ""


def _patched(old: dict[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    cleaned = {clean(key): value for key, value in changes.items()}
    kept = {key: value for key, value in old.items() if cleaned.get(key, "") is not None}
    return kept | {key: clean(value) for key, value in cleaned.items() if value is not None}
