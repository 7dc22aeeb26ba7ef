"""The span processor: sees every span of a provider and queues those that belong to our traces.

One instance serves all providers of the process, ours and the application's. It runs inside requests, so it does
a look-up and an append; everything else is the writer thread's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

from tracemw import record as records
from tracemw.guard import guarded
from tracemw.pipeline import current, installed
from tracemw.record import KEPT, LATE, LATE_FAILED, TraceRecord, current_record, kept, record_of

if TYPE_CHECKING:
    from opentelemetry.context import Context

# Instrumentation scopes whose inner spans tell of the framework's own steps, not of the application's work.
FRAMEWORK_SCOPES: Final = frozenset(
    {
        "fastapi",
        "starlette",
        "opentelemetry.instrumentation.asgi",
        "opentelemetry.instrumentation.fastapi",
        "opentelemetry.instrumentation.flask",
        "opentelemetry.instrumentation.starlette",
        "opentelemetry.instrumentation.wsgi",
    }
)

STATUS: Final = "http.response.status_code"
OUTCOME: Final = "tracemw.outcome"
HELD_BACK_LIMIT: Final = 1000  # spans kept on a record until its trace is known to be worth keeping


class TraceProcessor(SpanProcessor):
    """Queues finished spans of recorded traces for the writer."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        scope = span.instrumentation_scope
        if scope is not None and scope.name in FRAMEWORK_SCOPES and span.kind is SpanKind.INTERNAL:
            self._drop(span, parent_context)
        if records.several:
            self._note(span, parent_context)

    @guarded()
    def on_end(self, span: ReadableSpan) -> None:
        context = span.context
        if context is None:
            return
        span_id = context.span_id
        record = record_of(context.trace_id, span_id)
        if record is None:
            current().put(None, span)
            return
        if record.first is not None:
            records.forget_span(record, span_id)
        if span_id == record.root_span_id:
            self._end_root(record, span)
        elif record.dropped_spans is None or span_id not in record.dropped_spans:
            self._keep(record, span)

    def shutdown(self) -> None:
        """The provider that calls this is the application's, or ends with the process: store what there is."""
        pipeline = installed()  # not one made at the end of a process that has traced nothing
        if pipeline is not None:
            pipeline.flush(5.0)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        pipeline = installed()
        return pipeline is None or pipeline.flush(timeout_millis / 1000)

    @guarded()
    def _drop(self, span: Span, parent_context: Context | None) -> None:
        if span.context is None:
            return
        record = _record_above(span, parent_context)
        if record is None or (record.runtime or current()).operation_spans:
            return
        if record.dropped_spans is None:
            record.dropped_spans = {}
        record.dropped_spans[span.context.span_id] = span.parent.span_id if span.parent else None
        above = trace_api.get_current_span(parent_context)
        if span.parent is not None and above.is_recording():
            setattr(span, KEPT, kept(above))  # what code says of the current span, it says of that one

    @guarded()
    def _note(self, span: Span, parent_context: Context | None) -> None:
        record = _record_above(span, parent_context)
        if record is not None and record.first is not None and span.context is not None:
            if record.trace_id == span.context.trace_id:
                records.note_span(record, span.context.span_id)

    def _keep(self, record: TraceRecord, span: ReadableSpan) -> None:
        if record.ended:
            _note_late(record, span)
        held_back = record.held_back
        if held_back is None:
            if record.recording:
                current().put(record, span)
        elif len(held_back) < HELD_BACK_LIMIT:
            held_back.append(span)
        else:
            current().count("held_back_dropped")

    def _end_root(self, record: TraceRecord, span: ReadableSpan) -> None:
        pipeline = current()
        record.on_change = pipeline_changed
        if STATUS not in record.attributes:
            _take_status(record, span)
        if record.end_ns is None and not record.is_request:
            _settle(record, span)
        if record.held_back is not None and not self._decide(record, span):
            record.recording = False
            pipeline.count("sampled_out")
        if record.recording:
            pipeline.put_root(record, span)

    def _decide(self, record: TraceRecord, span: ReadableSpan) -> bool:
        """Keep a trace that was not sampled if it failed or was slow; then all of its spans are queued."""
        pipeline = current()
        held_back, record.held_back = record.held_back or [], None
        end = record.end_ns or span.end_time or 0
        rules = record.runtime or pipeline
        slow = rules.keep_slower_than
        seconds = (end - (record.start_ns or span.start_time or 0)) / 1e9
        if not (rules.keep_errors and record.failed) and not (slow is not None and seconds > slow):
            return False
        for child in held_back:
            pipeline.put(record, child)
        return True


def _record_above(span: Span, parent_context: Context | None) -> TraceRecord | None:
    """Return the record that a span which begins belongs to.

    Outside of us, where an adopted root's owner sends the response, the context has none.
    """
    record = current_record(parent_context)
    if record is not None or span.context is None:
        return record
    return record_of(span.context.trace_id, span.parent.span_id if span.parent else 0)


def _settle(record: TraceRecord, span: ReadableSpan) -> None:
    """Write onto the record how a root went that was ended past our API, with OpenTelemetry's."""
    attributes: Mapping[str, Any] = span.attributes or {}
    record.end_ns = span.end_time
    record.inputs = record.inputs or attributes.get("mlflow.spanInputs")
    record.outputs = record.outputs or attributes.get("mlflow.spanOutputs")
    record.error = span.status.status_code is StatusCode.ERROR
    record.outcome = "error" if record.error else record.outcome or attributes.get(OUTCOME) or "completed"


def _take_status(record: TraceRecord, span: ReadableSpan) -> None:
    """Take the status from the owner of an adopted root, who may stand outside of what answers errors."""
    attributes = span.attributes or {}
    status = attributes.get(STATUS, attributes.get("http.status_code"))  # the latter before semconv 1.21
    if status is not None:
        record.attributes[STATUS] = status


def _note_late(record: TraceRecord, span: ReadableSpan) -> None:
    """Take note of work after the root's end that a span of its own tells of."""
    if record.end_ns is not None and (span.end_time or 0) >= record.end_ns:
        failed = span.status.status_code is StatusCode.ERROR
        record.late = LATE_FAILED if failed else record.late or LATE


def pipeline_changed(record: TraceRecord) -> None:
    """Queue a record whose facts changed after its root had ended."""
    if record.recording:
        current().put(record, None)


PROCESSOR: Final = TraceProcessor()
