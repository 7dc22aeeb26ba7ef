"""`Client`: traces and spans begun and ended by their ids; and the tags of any trace.

Nothing here makes a span current: parents are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from tracemw import opened, reading
from tracemw.entities import Trace
from tracemw.errors import NotFoundError, TracemwError
from tracemw.livespan import NO_OP_TRACE_ID, LiveSpan, NoOpSpan
from tracemw.reading import TraceList, aliased, hex_id, not_found
from tracemw.record import TraceRecord, record_of
from tracemw.spans import get_current_active_span, start_span_no_context

# Tags that MLflow keeps to itself.
IMMUTABLE_TAGS: Final = frozenset({"mlflow.user", "mlflow.artifactLocation"})


class Client:
    """MLflow's low-level calls. All clients of a process share what is open.

    Args:
        tracking_uri: Accepted for MLflow's sake; where traces go is a setting.
    """

    def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri

    def start_trace(
        self,
        name: str,
        span_type: str = "UNKNOWN",
        inputs: Any = None,
        attributes: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        experiment_id: str | None = None,
        start_time_ns: int | None = None,
        run_id: str | None = None,
        links: Sequence[Any] | None = None,
    ) -> LiveSpan:
        """Begin a trace; `end_trace` ends it.

        Args:
            name: The name of the root span, and so of the trace.
            span_type: One of `SpanType`, or a word of your own.
            inputs: Recorded as the root's inputs.
            attributes: The root's attributes.
            tags: The trace's tags.
            experiment_id: Accepted for MLflow's sake.
            start_time_ns: When it began, if not now, in nanoseconds since the epoch.
            run_id: The MLflow run; stored as metadata.
            links: Links to other spans.

        Returns:
            The root span.

        Raises:
            TracemwError: Another trace is current here: spans of that one are begun with `start_span`.
        """
        active = get_current_active_span()
        if active is not None:
            raise TracemwError(
                f"Another trace is already set in the global context with ID {active.trace_id}. Begin a span "
                "of it with tracemw.start_span or Client.start_span, or the new trace inside tracemw.detached()."
            )
        span = start_span_no_context(
            name,
            span_type,
            inputs=inputs,
            attributes=attributes,
            tags={key: value for key, value in (tags or {}).items() if key not in IMMUTABLE_TAGS},
            metadata=None if run_id is None else {"mlflow.sourceRun": run_id},
            start_time_ns=start_time_ns,
            links=links,
        )
        return _kept(span)

    def start_span(
        self,
        name: str,
        trace_id: str | None = None,
        parent_id: str | None = None,
        span_type: str = "UNKNOWN",
        inputs: Any = None,
        attributes: Mapping[str, Any] | None = None,
        start_time_ns: int | None = None,
        links: Sequence[Any] | None = None,
        **alias: Any,
    ) -> LiveSpan:
        """Begin a span below another one; `end_span` ends it.

        Args:
            name: The span's name.
            trace_id: The trace; `request_id` is MLflow's older name for it.
            parent_id: The span to be below: begun here, with `start_span` or `@trace`, or by OpenTelemetry.
            span_type: One of `SpanType`, or a word of your own.
            inputs: Recorded as the span's inputs.
            attributes: The span's attributes.
            start_time_ns: When it began, if not now, in nanoseconds since the epoch.
            links: Links to other spans.

        Raises:
            TracemwError: No parent was named.
            NotFoundError: There is no such open trace, or no such span in it.
        """
        trace_id = aliased(trace_id, alias, "start_span()")
        if trace_id == NO_OP_TRACE_ID:
            return NoOpSpan()
        if not parent_id:
            raise TracemwError("start_span() needs the parent_id; to begin a trace, call start_trace()")
        span = start_span_no_context(
            name,
            span_type,
            parent_span=_parent(trace_id, parent_id),
            inputs=inputs,
            attributes=attributes,
            start_time_ns=start_time_ns,
            links=links,
        )
        return _kept(span)

    def end_span(
        self,
        trace_id: str | None = None,
        span_id: str | None = None,
        outputs: Any = None,
        attributes: Mapping[str, Any] | None = None,
        status: Any = "OK",
        end_time_ns: int | None = None,
        **alias: Any,
    ) -> None:
        """End a span that `start_span` (or `start_trace`) began. Spans may end in any order.

        Args:
            trace_id: The trace; `request_id` is MLflow's older name for it.
            span_id: The span.
            outputs: Recorded as the span's outputs.
            attributes: Added to the span's attributes.
            status: OK, ERROR, or a `SpanStatus` with a description.
            end_time_ns: When it ended, if not now, in nanoseconds since the epoch.

        Raises:
            NotFoundError: There is no such open span.
            TracemwError: It has ended already, or the status is none.
        """
        trace_id = aliased(trace_id, alias, "end_span()")
        if trace_id == NO_OP_TRACE_ID or span_id is None:
            return
        span = opened.TABLE.span(trace_id, span_id) or _current_span(trace_id, span_id)
        if span is None:
            raise NotFoundError(
                f"Span with ID {span_id} not found in trace {trace_id}, or it has ended with its trace."
            )
        _end(span, f"Span with ID {span_id}", outputs, attributes, status, end_time_ns)

    def end_trace(
        self,
        trace_id: str | None = None,
        outputs: Any = None,
        attributes: Mapping[str, Any] | None = None,
        status: Any = "OK",
        end_time_ns: int | None = None,
        **alias: Any,
    ) -> None:
        """End the root span of a trace that `start_trace` began; spans below it may still be open and end later.

        Args:
            trace_id: The trace; `request_id` is MLflow's older name for it.
            outputs: Recorded as the root's outputs.
            attributes: Added to the root's attributes.
            status: OK, ERROR, or a `SpanStatus` with a description.
            end_time_ns: When it ended, if not now, in nanoseconds since the epoch.

        Raises:
            NotFoundError: There is no trace of this id.
            TracemwError: It has ended already, or the status is none.
        """
        trace_id = aliased(trace_id, alias, "end_trace()")
        if trace_id == NO_OP_TRACE_ID:
            return
        trace = opened.TABLE.trace(trace_id)
        if trace is None:
            _refuse_end(trace_id)
        else:
            _end(trace.root, f"Trace with ID {trace_id}", outputs, attributes, status, end_time_ns)

    def get_trace(
        self, trace_id: str | None = None, display: bool = True, flush: bool = True, **alias: Any
    ) -> Trace:
        """Return a trace of the store.

        Args:
            trace_id: The trace; `request_id` is MLflow's older name for it.
            display: Accepted for MLflow's sake.
            flush: Accepted for MLflow's sake; what ended before in this process is always found.

        Raises:
            NotFoundError: There is none of this id.
        """
        trace_id = aliased(trace_id, alias, "get_trace()")
        found = reading.find(trace_id)
        if found is None:
            raise not_found(trace_id)
        return found

    def search_traces(
        self,
        experiment_ids: Sequence[str] | None = None,
        filter_string: str | None = None,
        max_results: int | None = 100,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
        run_id: str | None = None,
        include_spans: bool = True,
        model_id: str | None = None,
        locations: Sequence[str] | None = None,
        flush: bool = True,
    ) -> TraceList:
        """Search the store, with MLflow's order of arguments; see `tracemw.search_traces`."""
        return reading.search_traces(
            filter_string,
            order_by,
            max_results,
            page_token,
            include_spans=include_spans,
            run_id=run_id,
            model_id=model_id,
        )

    def set_trace_tag(self, trace_id: str | None = None, key: str = "", value: Any = "", **alias: Any) -> None:
        """Set a tag of a trace; see `tracemw.set_trace_tag`."""
        set_trace_tag(trace_id, key, value, **alias)

    def delete_trace_tag(self, trace_id: str | None = None, key: str = "", **alias: Any) -> None:
        """Delete a tag of a trace; see `tracemw.delete_trace_tag`."""
        delete_trace_tag(trace_id, key, **alias)

    def delete_traces(
        self,
        experiment_id: str | None = None,
        max_timestamp_millis: int | None = None,
        max_traces: int | None = None,
        trace_ids: Sequence[str] | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> int:
        """Delete traces of the store, and return how many there were.

        Args:
            experiment_id: Accepted for MLflow's sake.
            max_timestamp_millis: Those that began at this time or before, in milliseconds since the epoch.
            max_traces: At most so many, the oldest first.
            trace_ids: These; `request_ids` is MLflow's older name for them.

        Raises:
            TracemwError: Neither a time nor ids were given.
        """
        named = trace_ids if trace_ids is not None else request_ids
        if (named is None) == (max_timestamp_millis is None):
            raise TracemwError("delete_traces needs either max_timestamp_millis or trace_ids")
        if named is not None and max_traces is not None:
            raise TracemwError("max_traces goes with max_timestamp_millis, not with trace_ids")
        older_than_ns = None if max_timestamp_millis is None else (max_timestamp_millis + 1) * 1_000_000
        ids = None if named is None else [digits for digits in map(hex_id, named) if digits is not None]
        return reading.store_to_read().delete(trace_ids=ids, older_than_ns=older_than_ns, max_traces=max_traces)


def set_trace_tag(trace_id: str | None = None, key: str = "", value: Any = "", **alias: Any) -> None:
    """Set a tag of a trace, whether it is still open or in the store.

    Args:
        trace_id: The trace; `request_id` is MLflow's older name for it.
        key: The tag's name.
        value: The tag's text; other values are stored as their `str`.

    Raises:
        NotFoundError: There is no trace of this id.
    """
    trace_id = aliased(trace_id, alias, "set_trace_tag()")
    record = _living(trace_id)
    if record is not None:
        record.update(tags={key: value})
    if record is None or record.ended:
        _patch(trace_id, str(key), value if isinstance(value, str) else str(value))


def delete_trace_tag(trace_id: str | None = None, key: str = "", **alias: Any) -> None:
    """Delete a tag of a trace, whether it is still open or in the store.

    Args:
        trace_id: The trace; `request_id` is MLflow's older name for it.
        key: The tag's name.

    Raises:
        NotFoundError: There is no trace of this id, or it has no such tag.
    """
    trace_id = aliased(trace_id, alias, "delete_trace_tag()")
    record = _living(trace_id)
    if record is not None and not record.ended:
        if not record.remove_tag(key):
            raise NotFoundError(f"Tag with key {key} not found in trace with ID {trace_id}.")
        return
    if record is not None:
        record.remove_tag(key)  # or a later change of the trace would bring it back
    digits = hex_id(trace_id)
    stored = None if digits is None else reading.store_to_read().get(digits, spans=False)
    if stored is None:
        raise not_found(trace_id)
    if key not in stored.row.tags:
        raise NotFoundError(f"Tag with key {key} not found in trace with ID {trace_id}.")
    _patch(trace_id, key, None)


def _patch(trace_id: str, key: str, value: str | None) -> None:
    digits = hex_id(trace_id)
    if digits is None or not reading.store_to_read().patch(
        digits, tags={key: value}, outbox=reading.is_delivered()
    ):
        raise not_found(trace_id)


def _living(trace_id: str) -> TraceRecord | None:
    digits = hex_id(trace_id)
    return None if digits is None else record_of(int(digits, 16))


def _kept(span: LiveSpan) -> LiveSpan:
    if not isinstance(span, NoOpSpan):
        opened.TABLE.add(span)
    return span


def _parent(trace_id: str, parent_id: str) -> LiveSpan:
    """Return a parent by its ids: a span that is open here, else any span of a trace that is alive."""
    span = opened.TABLE.span(trace_id, parent_id) or _current_span(trace_id, parent_id)
    if span is not None:
        return span
    record = _living(trace_id)
    try:
        number = int(parent_id, 16)
    except ValueError:
        number = 0
    if record is None or not 0 < number < 2**64:
        raise NotFoundError(f"Parent span with ID '{parent_id}' not found in an open trace with ID {trace_id}.")
    if opened.TABLE.trace(trace_id) is not None and number != record.root_span_id and _begun_here(trace_id):
        raise NotFoundError(f"Parent span with ID '{parent_id}' not found in trace with ID {trace_id}.")
    flags = TraceFlags(TraceFlags.SAMPLED)
    return LiveSpan(NonRecordingSpan(SpanContext(record.trace_id, number, False, flags)), record)


def _begun_here(trace_id: str) -> bool:
    """True where the whole trace was begun with a client, so that all of its spans are known."""
    trace = opened.TABLE.trace(trace_id)
    return trace is not None and trace.root.parent_id is None


def _current_span(trace_id: str, span_id: str) -> LiveSpan | None:
    span = get_current_active_span()
    return span if span is not None and (span.trace_id, span.span_id) == (trace_id, span_id) else None


def _end(
    span: LiveSpan,
    what: str,
    outputs: Any,
    attributes: Mapping[str, Any] | None,
    status: Any,
    end_time_ns: int | None,
) -> None:
    if not span.otel_span.is_recording():
        raise TracemwError(f"{what} already finished.")
    span.end(outputs, attributes, status, end_time_ns)
    opened.TABLE.ended(span.trace_id)


def _refuse_end(trace_id: str) -> None:
    """Say why a trace that is not in the table cannot be ended."""
    if _living(trace_id) is None and reading.find(trace_id) is None:
        raise NotFoundError(f"Trace with ID {trace_id} not found.")
    active = get_current_active_span()
    if active is not None and active.trace_id == trace_id:
        raise TracemwError(f"Trace with ID {trace_id} was not begun with start_trace; it ends by itself.")
    raise TracemwError(f"Trace with ID {trace_id} already finished.")
