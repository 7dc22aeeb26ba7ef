"""The plain values that go into the store and come out of it.

Ids are lowercase hex without a prefix: 32 digits for a trace, 16 for a span. Times are nanoseconds since the
epoch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TraceRow:
    """What is known about one trace.

    Attributes:
        root_span_id: The span whose timing and state these facts are; None while no root is known.
        has_parent: True for a local root that continues a trace begun by a remote caller.
        duration_ns: None while the trace is in progress.
        state: `OK`, `ERROR`, `IN_PROGRESS` or `STATE_UNSPECIFIED`.
        outcome: `completed`, `error`, `disconnected`, `cancelled` or None.
        metadata: Includes the process's metadata (`app_version`, `region`, `mlflow.source.name` ...).
    """

    trace_id: str
    root_span_id: str | None
    has_parent: bool
    name: str
    start_ns: int
    duration_ns: int | None
    state: str
    outcome: str | None
    method: str | None
    route: str | None
    status_code: int | None
    client_request_id: str | None
    session_id: str | None
    user_id: str | None
    request_preview: str | None
    response_preview: str | None
    metadata: dict[str, str]
    tags: dict[str, str]


@dataclass(slots=True)
class SpanRow:
    """One finished span.

    Attributes:
        kind: `INTERNAL`, `SERVER`, `CLIENT`, `PRODUCER` or `CONSUMER`.
        status: `UNSET`, `OK` or `ERROR`.
        attributes: JSON text of an object.
        events: JSON text of an array of `{"name", "time_ns", "attributes"}`.
        links: JSON text of an array of `{"trace_id", "span_id", "attributes"}`.
        scope: Name of the instrumentation scope that made the span.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    span_type: str | None
    kind: str
    start_ns: int
    end_ns: int
    status: str
    status_message: str | None
    attributes: str
    events: str
    links: str
    scope: str | None


@dataclass(slots=True)
class StoredTrace:
    """One trace as the store holds it.

    Attributes:
        spans: In order of their start; empty where spans were not asked for.
        id: Number of the row, rising in the order in which traces first reached the store.
        revision: Rises with every change of the trace or of one of its spans.
    """

    row: TraceRow
    spans: list[SpanRow]
    id: int
    revision: int


@dataclass(slots=True)
class StoredPage:
    """One page of a search.

    Attributes:
        token: Give it to the next call of the same search; None on the last page.
    """

    traces: list[StoredTrace]
    token: str | None
