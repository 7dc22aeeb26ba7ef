"""Finished spans and trace records -> the rows of the store.

Runs in the writer thread; for plain requests under load in the thread of one that has ended (`roots.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from tracemw.bodies import REQUEST, RESPONSE
from tracemw.capture import Redactor, redact_json_text, redact_text
from tracemw.previews import request_preview, response_preview
from tracemw.record import TraceRecord
from tracemw.store.codec import json_encoder, within
from tracemw.store.rows import SpanRow, TraceRow

SPAN_TYPE: Final = "mlflow.spanType"
REQUEST_ID: Final = "mlflow.traceRequestId"  # told by the ids
MLFLOW_SCOPE: Final = "mlflow.tracing.provider"  # of spans of MLflow's API: each attribute is JSON text
MAX_URL: Final = 8192  # characters of a path and of a query string that are stored
NO_ERRORS: Final = frozenset({"disconnected", "cancelled", "interrupted"})

_dumps = json_encoder(allow_nan=False, default=str)


def is_slight(record: TraceRecord, span: ReadableSpan) -> bool:
    """True for a request that is little work to encode: a root on which nobody has set what may be long, alone."""
    if not record.is_request or record.queued or span.attributes or span.events or span.links:
        return False
    if record.inputs is not None or record.outputs is not None:
        return False
    return REQUEST not in record.attributes and RESPONSE not in record.attributes


def span_row(record: TraceRecord | None, span: ReadableSpan, redactor: Redactor) -> SpanRow:
    """Encode one span; the root's attributes are merged with those that the record kept for it.

    Args:
        record: What is known of the span's trace; None for a span of somebody else's.
        span: The span, ended.
        redactor: Masks secrets in the query string of a request.
    """
    context = span.context
    assert context is not None  # every ended span has one
    attributes: dict[str, Any] = dict(span.attributes or {})
    scope = span.instrumentation_scope.name if span.instrumentation_scope else None
    if attributes.pop(REQUEST_ID, None) is not None and scope == MLFLOW_SCOPE:
        attributes = _native(attributes)
    name, start, end = span.name, span.start_time, span.end_time
    parent, kind, status, events = span.parent, span.kind, span.status, span.events
    parent_id = None if parent is None else parent.span_id
    shown = status.status_code.name
    if record is not None:
        if context.span_id == record.root_span_id:
            attributes.update(record.attributes)
            _identify(attributes, record)
            _redact(attributes, redactor)
            name, start, end = record.name or name, record.start_ns or start, record.end_ns or end
            if record.error:  # of the request, whoever made the span
                shown = "ERROR"
            elif record.outcome in NO_ERRORS:
                shown = "UNSET"
        else:
            parent_id = record.parent_of_kept(parent_id)
    if events and kind is SpanKind.SERVER:
        events = _once(events)
    # By place and not by name, which takes Python three times as long; as in `trace_row`.
    return SpanRow(
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        None if parent_id is None else f"{parent_id:016x}",
        name,
        _span_type(attributes),
        kind.name,
        _ns(start),
        _ns(end),
        shown,
        status.description,
        _json(attributes),
        _events(events) if events else "[]",
        _links(links) if (links := span.links) else "[]",
        scope,
    )


def _native(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return attributes of a span of MLflow's API as our own spans have them: strings and numbers as such."""
    made: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, str) and not key.startswith("mlflow.") and value[:1] not in ("{", "["):
            try:
                value = json.loads(value)
            except ValueError:  # set with OpenTelemetry's API
                pass
        if value is not None:
            made[key] = value
    return made


def _redact(attributes: dict[str, Any], redactor: Redactor) -> None:
    """Cut path and query string, and mask what looks secret in the latter and in the copies of bodies."""
    for name in ("url.path", "url.query"):
        if isinstance(value := attributes.get(name), str) and len(value) > MAX_URL:
            attributes[name] = value[:MAX_URL]
    if "url.query" in attributes:
        attributes["url.query"] = redact_text(attributes["url.query"], redactor)
    for name in (REQUEST, RESPONSE):
        if name in attributes:
            attributes[name] = redact_json_text(attributes[name], redactor)


def trace_row(record: TraceRecord) -> TraceRow:
    """Encode what a record knows of its trace at this moment."""
    told = record.attributes.get
    start, end = record.start_ns, record.end_ns
    ended = record.ended
    return TraceRow(
        f"{record.trace_id:032x}",
        f"{record.root_span_id:016x}",
        record.has_parent,
        record.name,
        _ns(start),
        _ns(end - start) if ended and end is not None else None,
        state_of(record) if ended else "IN_PROGRESS",
        record.outcome,
        told("http.request.method"),
        told("http.route"),
        told("http.response.status_code"),
        record.client_request_id,
        record.session_id,
        record.user_id,
        _request_preview(record),
        _response_preview(record),
        {**record.process, **record.metadata},
        {**record.tags},
    )


def foreign_trace_row(span: ReadableSpan) -> TraceRow:
    """Encode the trace of a root span that somebody else made, outside of all our requests."""
    context = span.context
    assert context is not None
    attributes: Mapping[str, Any] = span.attributes or {}
    start, end = _ns(span.start_time), _ns(span.end_time)
    return TraceRow(
        trace_id=f"{context.trace_id:032x}",
        root_span_id=f"{context.span_id:016x}",
        has_parent=span.parent is not None,
        name=span.name,
        start_ns=start,
        duration_ns=end - start,
        state="ERROR" if span.status.status_code is StatusCode.ERROR else "OK",
        outcome=None,
        method=_text(attributes.get("http.request.method")),
        route=_text(attributes.get("http.route")),
        status_code=_number(attributes.get("http.response.status_code")),
        client_request_id=None,
        session_id=_text(attributes.get("session.id")),
        user_id=_text(attributes.get("user.id")),
        request_preview=None,
        response_preview=None,
        metadata={},
        tags={},
    )


def state_of(record: TraceRecord) -> str:
    """Return the state of an ended trace: what the user set, else what happened.

    A request that the client left or the server cancelled is neither a success nor an error.
    """
    if record.state is not None:
        return record.state
    if record.outcome in NO_ERRORS:
        return "STATE_UNSPECIFIED"
    return "ERROR" if record.error else "OK"


def mirrored(record: TraceRecord) -> dict[str, str]:
    """Return the facts of a record as attributes, for a root span that other exporters will see."""
    facts: dict[str, str] = {}
    _identify(facts, record)
    facts.update({f"tracemw.metadata.{key}": value for key, value in record.metadata.items()})
    facts.update({f"mlflow.traceTag.{key}": value for key, value in record.tags.items()})
    if preview := _request_preview(record):
        facts["tracemw.request_preview"] = preview
    if preview := _response_preview(record):
        facts["tracemw.response_preview"] = preview
    if record.outcome is not None:
        facts["tracemw.outcome"] = record.outcome
    return facts


def _identify(attributes: dict[str, Any], record: TraceRecord) -> None:
    """Add who asked, and how it went, in this order: `store/words.py` looks for the outcome at the end."""
    if (value := record.client_request_id) is not None:
        attributes["tracemw.client_request_id"] = value
    if (value := record.session_id) is not None:
        attributes["session.id"] = value
    if (value := record.user_id) is not None:
        attributes["user.id"] = value
    if (value := record.outcome) is not None:
        attributes["tracemw.outcome"] = value


def _request_preview(record: TraceRecord) -> str | None:
    if record.request_preview is not None:
        return record.request_preview
    if record.inputs is not None:
        return request_preview(record.inputs)
    if not record.is_request:
        return None
    attributes = record.attributes
    method, path = attributes.get("http.request.method", ""), attributes.get("url.path", "")
    return f"{method} {path}".strip()[:1000] or None


def _response_preview(record: TraceRecord) -> str | None:
    if record.response_preview is not None:
        return record.response_preview
    if record.outputs is not None:
        return response_preview(record.outputs)
    status = record.attributes.get("http.response.status_code")
    return None if status is None else str(status)


def _span_type(attributes: Mapping[str, Any]) -> str | None:
    value = attributes.get(SPAN_TYPE)
    return value.strip('"') if isinstance(value, str) else None


def _once(events: Sequence[Any]) -> list[Any]:
    """Return events without a second one of the same exception: who owns the span may have recorded it, too."""
    kept: list[Any] = []
    seen: set[tuple[Any, str]] = set()
    for event in events:
        if event.name == "exception":
            told = event.attributes or {}
            which = (told.get("exception.message"), str(told.get("exception.type")).rpartition(".")[2])
            if which in seen:
                continue
            seen.add(which)
        kept.append(event)
    return kept


def _events(events: Sequence[Any]) -> str:
    return _json(
        [
            {"name": event.name, "time_ns": _ns(event.timestamp), "attributes": dict(event.attributes or {})}
            for event in events
        ]
    )


def _links(links: Sequence[Any]) -> str:
    return _json(
        [
            {
                "trace_id": f"{link.context.trace_id:032x}",
                "span_id": f"{link.context.span_id:016x}",
                "attributes": dict(link.attributes or {}),
            }
            for link in links
        ]
    )


def _json(value: Any) -> str:
    """JSON text of attribute values, which OpenTelemetry has bounded to plain ones."""
    try:
        return _dumps(value)
    except ValueError:
        return _dumps(_finite(value))


def _finite(value: Any) -> Any:
    """Replace floats that JSON does not know by their names."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _ns(moment: Any) -> int:
    """Return a time as the whole number it should be: OpenTelemetry takes whatever its caller gives."""
    return moment if moment.__class__ is int else within(moment or 0)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None

