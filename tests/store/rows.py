"""Rows for tests: a word or a number is enough to make one."""

from __future__ import annotations

from typing import Any

from tracemw.store import SpanRow, Store, TraceRow, tokens

START = 1_750_000_000_000_000_000
MS = 1_000_000


def trace_id(number: int) -> str:
    """Return the trace id of a number."""
    return f"{number:032x}"


def trace(number: int, **changes: Any) -> TraceRow:
    """Return a finished trace that started `number` milliseconds after `START`."""
    values: dict[str, Any] = {
        "trace_id": trace_id(number),
        "root_span_id": f"f{number:015x}",
        "has_parent": False,
        "name": "GET /items/{id}",
        "start_ns": START + number * MS,
        "duration_ns": 5 * MS,
        "state": "OK",
        "outcome": "completed",
        "method": "GET",
        "route": "/items/{id}",
        "status_code": 200,
        "client_request_id": f"req-{number}",
        "session_id": "s-1",
        "user_id": "jane",
        "request_preview": "question",
        "response_preview": "answer",
        "metadata": {"app_version": "1.0.0"},
        "tags": {},
    }
    return TraceRow(**{**values, **changes})


def span(of: int, number: int = 0, **changes: Any) -> SpanRow:
    """Return a span of a trace; number 0 is its root."""
    values: dict[str, Any] = {
        "trace_id": trace_id(of),
        "span_id": f"{number:016x}" if number else f"f{of:015x}",
        "parent_id": f"f{of:015x}" if number else None,
        "name": "step" if number else "GET /items/{id}",
        "span_type": "TOOL" if number else None,
        "kind": "INTERNAL" if number else "SERVER",
        "start_ns": START + of * MS + number,
        "end_ns": START + of * MS + number + 1000,
        "status": "UNSET",
        "status_message": None,
        "attributes": "{}",
        "events": "[]",
        "links": "[]",
        "scope": "tracemw",
    }
    return SpanRow(**{**values, **changes})


def words_are(store: Store, traces: int) -> bool:
    """True where the token index has so many traces of Jane's, or Python's SQLite has no FTS5 for one."""
    query = """SELECT count(*) FROM tokens WHERE tokens MATCH '"cuser_id=jane"'"""
    return not tokens.supported() or store.read(query) == [(traces,)]
