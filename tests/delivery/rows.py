"""Rows as the writer makes them, for tests that need no application."""

from __future__ import annotations

import json
import time
from typing import Any

from tracemw.store import SpanRow, Store, TraceRow

START: int = (int(time.time()) - 600) * 10**9  # ten minutes ago: retention leaves it alone


def trace_row(number: int, **changes: Any) -> TraceRow:
    """The row of an ended request; `number` makes its ids."""
    values: dict[str, Any] = {
        "trace_id": f"{number + 1:032x}",
        "root_span_id": f"{number + 1:08x}{1:08x}",
        "has_parent": False,
        "name": "GET /items/{id}",
        "start_ns": START + number * 1_000_000,
        "duration_ns": 12_500_000,
        "state": "OK",
        "outcome": "completed",
        "method": "GET",
        "route": "/items/{id}",
        "status_code": 200,
        "client_request_id": f"request-{number}",
        "session_id": None,
        "user_id": None,
        "request_preview": f"GET /items/{number}",
        "response_preview": "200",
        "metadata": {"app_version": "1.4.0", "environment": "test"},
        "tags": {},
    }
    return TraceRow(**{**values, **changes})


def span_row(trace: TraceRow, number: int, **changes: Any) -> SpanRow:
    """A span of the trace: number 1 is its root, the others are the root's children."""
    is_root = number == 1
    attributes = changes.pop("attributes", {"http.request.method": "GET"} if is_root else {})
    prefix = (trace.root_span_id or "0" * 8)[:8]
    values: dict[str, Any] = {
        "trace_id": trace.trace_id,
        "span_id": f"{prefix}{number:08x}",
        "parent_id": None if is_root else trace.root_span_id,
        "name": trace.name if is_root else f"step {number}",
        "span_type": None,
        "kind": "SERVER" if is_root else "INTERNAL",
        "start_ns": trace.start_ns,
        "end_ns": trace.start_ns + (trace.duration_ns or 1_000_000),
        "status": "UNSET",
        "status_message": None,
        "attributes": json.dumps(attributes),
        "events": json.dumps(changes.pop("events", [])),
        "links": "[]",
        "scope": "tracemw",
    }
    return SpanRow(**{**values, **changes})



def fill(store: Store, count: int, start: int = 0) -> list[TraceRow]:
    """Write traces of two spans each into a store and queue them for delivery; return their rows."""
    rows = [trace_row(number) for number in range(start, start + count)]
    store.write(rows, [span_row(row, number) for row in rows for number in (1, 2)], outbox=True)
    return rows
