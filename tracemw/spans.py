"""Spans made by hand: a block of code, or a beginning and an end in different places."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context

from tracemw import scope as scopes
from tracemw.decorator import trace
from tracemw.guard import guarded, report
from tracemw.livespan import LiveSpan, NoOpSpan, log_level, otel_link
from tracemw.record import TraceRecord, current_record, kept, record_of, with_record
from tracemw.runtime import encoded, encoded_attribute
from tracemw.scope import DESCRIPTION, INPUTS, LOG_LEVEL, SPAN_TYPE, Scope, begin_trace

__all__ = [
    "LiveSpan",
    "NoOpSpan",
    "begin_trace",
    "get_current_active_span",
    "start_span",
    "start_span_no_context",
    "trace",
]

logger = logging.getLogger("tracemw")


class start_span:
    """Record a block of code as a span, below the current one; where there is none, as a trace of its own.

        with tracemw.start_span("retrieve", span_type="RETRIEVER") as span:
            span.set_inputs({"question": question})
            span.set_outputs({"documents": documents})

    An exception that leaves the block is recorded, makes the span's status ERROR and is raised on. What is no
    `Exception` (a cancelled task, a closed generator, KeyboardInterrupt) leaves the status UNSET and sets the
    attribute `tracemw.outcome`.

    Args:
        name: The span's name.
        span_type: One of `SpanType`, or a word of your own.
        attributes: The span's attributes, of any values.
        trace_destination: Accepted for MLflow's sake; where traces go is a setting.
        log_level: The span's level, as in MLflow.
        run_id: The MLflow run; stored as metadata of a trace that begins here.
        links: Links to other spans.
        description: What the span is about, for people.

    Returns:
        A context manager that gives a `LiveSpan`; a `NoOpSpan` where nothing is recorded.
    """

    __slots__ = ("_name", "_options", "_scope")

    def __init__(
        self,
        name: str = "span",
        span_type: str | None = "UNKNOWN",
        attributes: Mapping[str, Any] | None = None,
        trace_destination: Any = None,
        log_level: int | str | None = None,
        run_id: str | None = None,
        links: Sequence[Any] | None = None,
        description: str | None = None,
    ) -> None:
        self._name = name
        self._options = (span_type, attributes, log_level, run_id, links, description)
        self._scope: Scope | None = None

    def __enter__(self) -> LiveSpan:
        span_type, attributes, level, run_id, links, description = self._options
        scope = _open(
            self._name, _attributes(span_type, attributes, None, level, description), None, links, None, run_id
        )
        if scope is None:
            return NoOpSpan()
        self._scope = scope
        scope.enter()
        return LiveSpan(scope.span, scope.record, scope) if scope.recording else NoOpSpan(scope)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = self._scope
        if scope is not None:
            self._scope = None
            close_scope(scope, exc)

    async def __aenter__(self) -> LiveSpan:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, exc, traceback)


def close_scope(scope: Scope, exc: BaseException | None) -> None:
    """Leave a scope and end its span; `exc` is what left the span's code."""
    try:
        scope.leave()
        if scope.recording and scope.span.is_recording():
            if exc is not None:
                scope.fail(exc)
            scope.end()
    except Exception as failure:
        report("start_span", failure)


def start_span_no_context(
    name: str,
    span_type: str | None = "UNKNOWN",
    parent_span: LiveSpan | None = None,
    inputs: Any = None,
    attributes: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    experiment_id: str | None = None,
    start_time_ns: int | None = None,
    log_level: int | str | None = None,
    links: Sequence[Any] | None = None,
    description: str | None = None,
) -> LiveSpan:
    """Begin a span without making it current; its end has to be told with `span.end()`.

    Args:
        name: The span's name.
        span_type: One of `SpanType`, or a word of your own.
        parent_span: The span to be below. Without it that is the current span, as in MLflow; where there is
            none, a trace begins.
        inputs: Recorded as the span's inputs.
        attributes: The span's attributes, of any values.
        tags: Added to the tags of the trace.
        metadata: Added to the metadata of the trace.
        experiment_id: Accepted for MLflow's sake; where traces go is a setting.
        start_time_ns: When it began, if not now, in nanoseconds since the epoch.
        log_level: The span's level, as in MLflow.
        links: Links to other spans.
        description: What the span is about, for people.

    Returns:
        The span; a `NoOpSpan` where nothing is recorded.
    """
    if isinstance(parent_span, NoOpSpan):
        return NoOpSpan()
    scope = _open(
        name,
        _attributes(span_type, attributes, inputs, log_level, description),
        None if parent_span is None else context_of(parent_span),
        links,
        start_time_ns,
    )
    if scope is None or not scope.recording:
        return NoOpSpan(scope)
    if tags or metadata:
        scope.record.update(tags=tags, metadata=metadata)
    return LiveSpan(scope.span, scope.record, scope)


def context_of(span: LiveSpan) -> Context:
    """Return an OpenTelemetry context in which the span is current, and nothing else is known."""
    context = trace_api.set_span_in_context(span._span, Context())
    return context if span._record is None else with_record(context, span._record)


def get_current_active_span() -> LiveSpan | None:
    """Return the span that is current here, whoever made it; None where there is none that is recorded.

    Below a framework's inner span, which is not kept (FastAPI's `fastapi.endpoint`), it is the one above that.
    """
    context = otel_context.get_current()
    span = kept(trace_api.get_current_span(context))
    if not span.is_recording():
        return None
    record = record_in(context, span)
    return None if record is not None and not record.recording else LiveSpan(span, record)


def record_in(context: Context, span: Any = None) -> TraceRecord | None:
    """Return the record of the trace that a context belongs to, if need be by the current span's trace id."""
    record = current_record(context)
    if record is None:
        ids = (trace_api.get_current_span(context) if span is None else span).get_span_context()
        record = record_of(ids.trace_id, ids.span_id)
    return record


@guarded()
def _open(
    name: str,
    attributes: dict[str, Any],
    context: Context | None,
    links: Sequence[Any] | None,
    start_ns: int | None,
    run_id: str | None = None,
) -> Scope | None:
    scope = scopes.open_scope(
        name if isinstance(name, str) else str(name),
        attributes,
        context=context,
        links=valid_links(links),
        start_ns=start_ns,
    )
    if run_id is not None and scope is not None and scope.is_root:
        scope.record.update(metadata={"mlflow.sourceRun": run_id})
    return scope


@guarded({})
def _attributes(
    span_type: str | None,
    attributes: Mapping[str, Any] | None,
    inputs: Any,
    level: int | str | None,
    description: str | None,
) -> dict[str, Any]:
    made: dict[str, Any] = {SPAN_TYPE: encoded("UNKNOWN" if span_type is None else span_type)}
    if inputs is not None:
        made[INPUTS] = encoded(inputs)
    if level is not None:
        made[LOG_LEVEL] = encoded(int(log_level(level)))
    if description is not None:
        made[DESCRIPTION] = encoded(description)
    for key, value in (attributes or {}).items():
        if value is not None:
            made[str(key)] = encoded_attribute(str(key), value)
    return made


def valid_links(links: Sequence[Any] | None) -> list[Any]:
    """Return the links that are some; the others are reported."""
    made = []
    for link in links or ():
        try:
            made.append(otel_link(link))
        except Exception as exc:
            logger.warning("a link is left out: %s", exc)
    return made
