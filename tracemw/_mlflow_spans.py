"""MLflow's live spans while MLflow is bridged: its class, with our bounds, redaction and clock.

One is made for each span of MLflow's API, and for a span of somebody else's when MLflow asks what is current. The
former are held by whoever uses them and by nobody else, so that a generator which is closed early, and never
reaches its end, ends its span when its frame goes.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from importlib import import_module
from typing import Any, Final

from opentelemetry.trace import Status, StatusCode

from tracemw import scope as scopes
from tracemw._mlflow_internals import find
from tracemw.capture import dumps
from tracemw.failure import MESSAGE, TYPE, last_recorded, outcome_of, record_exception
from tracemw.guard import due, guarded, logger, report
from tracemw.record import TraceRecord, kept, record_of
from tracemw.runtime import encoded, encoded_attribute, runtime
from tracemw.scope import INPUTS, OUTCOME, OUTPUTS, SPAN_TYPE, Scope
from tracemw.streams import CHUNK_EVENT, CHUNK_VALUE, EVENT_LIMIT, EVENT_VALUE, tell

LiveSpan: Any = find("mlflow.entities.span", "LiveSpan")
NoOpSpan: Any = find("mlflow.entities.span", "NoOpSpan")
_apply_processors: Any = find("mlflow.tracing.utils.processor", "apply_span_processors")
_fluent: Any = import_module("mlflow.tracing.fluent")

RECORD: Final = "_tracemw_record"  # on an OpenTelemetry span: the record lives as long as somebody has the span

# By the span's id: those that are in use.
live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


# By the trace's id: those that a client has begun, who may keep nothing but their ids.
held: dict[str, list[Any]] = {}
HELD_TRACES: Final = 10_000  # of clients, in progress in one process


class _Process:
    forks = 0  # how often this process is a fork: what is open before that is the parent's to end


def _forked() -> None:
    _Process.forks += 1
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class BridgedSpan(LiveSpan):  # type: ignore[misc]
    """A span that MLflow's API has begun, or that it was asked for.

    Args:
        span: The OpenTelemetry span.
        record: The record of its trace; None for a trace of which we record nothing.
        scope: Of a span that MLflow has begun.
        is_top: Whether it is one that MLflow alone would have begun a trace with.
    """

    def __init__(
        self, span: Any, record: TraceRecord | None, scope: Scope | None = None, is_top: bool = False
    ) -> None:
        self._tracemw_scope = scope
        self._record = record
        self._is_top = is_top
        self._forks = _Process.forks
        self._handled = id(sys.exc_info()[1])
        self._marked_ok = False
        self._previewed: str | None = None
        self._chunks = 0
        self._kept: list[str] = []
        self._left: tuple[str, int] | None = None
        ids = span.get_span_context()
        super().__init__(span, f"tr-{ids.trace_id:032x}", _type_of(span))
        self._tells = _tells_previews(span, record)
        live[f"{ids.span_id:016x}"] = self

    # What is told of it

    @guarded()
    def set_inputs(self, inputs: Any) -> None:
        """Record the inputs, within our bounds and redacted."""
        text = encoded(inputs)
        self._span.set_attribute(INPUTS, text)
        record = self._record
        if self._is_request_root():
            record.inputs = text  # type: ignore[union-attr]
        elif record is not None and self._tells and record.inputs is None and not runtime().processors:
            record.inputs = self._previewed = text

    @guarded()
    def set_outputs(self, outputs: Any) -> None:
        """Record the outputs, within our bounds and redacted."""
        text = encoded(outputs)
        self._span.set_attribute(OUTPUTS, text)
        if self._is_request_root():
            self._record.outputs = text  # type: ignore[union-attr]

    @guarded()
    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute: on a span of MLflow's as JSON text, as it does; on others as plain values."""
        if not isinstance(key, str):
            super().set_attribute(key, value)  # warns
        elif self._tracemw_scope is None:
            if value is not None:
                self._span.set_attribute(key, encoded_attribute(key, value))
        elif key == SPAN_TYPE and type(value) is str:
            self._span.set_attribute(key, _quoted_type(value))
        else:
            masked = value if key.startswith("mlflow.") else runtime().redactor.value(key, value)
            self._span.set_attribute(key, encoded(masked))

    def set_status(self, status: Any) -> None:
        """Set the status. OK waits for the end: OpenTelemetry lets nothing follow it, not even an error."""
        code = str(getattr(getattr(status, "status_code", status), "value", status))
        self._marked_ok = code == "OK" and self._span.status.status_code is not StatusCode.ERROR
        if not self._marked_ok:
            super().set_status(status)

    @property
    def status(self) -> Any:
        """The status as it was set."""
        told = super().status
        return type(told)("OK") if self._marked_ok and self._span.status.is_unset else told

    def add_event(self, event: Any) -> None:
        """Add an event; of a stream's chunks the first ones, since OpenTelemetry keeps 128 events, the last."""
        if str(getattr(event, "name", "")).startswith(CHUNK_EVENT):
            self._add_chunk(event)
        else:
            super().add_event(event)

    @guarded()
    def _add_chunk(self, event: Any) -> None:
        self._chunks += 1
        if self._chunks <= EVENT_LIMIT:
            text = _bounded(event.attributes.get(CHUNK_VALUE, "null"))
            self._kept.append(text)
            self._span.add_event(event.name, {CHUNK_VALUE: text}, event.timestamp)

    def record_exception(self, exception: Any) -> None:
        """Record an exception, once."""
        if isinstance(exception, BaseException):
            self._record_exception(exception)
        else:
            super().record_exception(exception)

    @guarded()
    def _record_exception(self, exc: BaseException) -> None:
        record_exception(self._span, exc)

    # Its end

    def end(
        self,
        outputs: Any | None = None,
        attributes: dict[str, Any] | None = None,
        status: Any | None = None,
        end_time_ns: int | None = None,
    ) -> None:
        """End the span; the root of a request takes note of what is given here, and ends with the request."""
        if not self._span.is_recording():
            return
        try:
            self.set_attributes(attributes or {})
            if outputs is not None:
                self.set_outputs(outputs)
            if status is not None:
                self.set_status(status)
            if self._is_request_root():
                if due("the end of a request's root", float("inf")):
                    logger.warning("span %r is the root of a request and ends with it", self.name)
                return
            outcome = self._outcome()
            if outcome is not None:
                self._interrupt(outcome)
            elif self._span.status.status_code is StatusCode.ERROR:
                self._describe_error()
            else:
                self._span.set_status(StatusCode.OK)
            self._finish(end_time_ns)
        except Exception as failure:
            report("mlflow: end", failure)
            self._span.end()

    def note_left(self) -> None:
        """Take note that code which the span was current for was left, perhaps by what is no error.

        Of a generator MLflow takes no note of that itself. It counts where nobody ends the span.
        """
        scope = self._tracemw_scope
        if scope is not None and self._left is None and (outcome := self._outcome()) is not None:
            self._left = outcome, scope.now_ns()

    def _outcome(self) -> str | None:
        """Return how the span's code ended, where an exception is on its way out of it that is no error."""
        exc = sys.exc_info()[1]
        return None if exc is None or id(exc) == self._handled else outcome_of(exc)

    def _is_request_root(self) -> bool:
        record = self._record
        return record is not None and record.is_request and _span_id(self._span) == record.root_span_id

    def _interrupt(self, outcome: str) -> None:
        self._span.set_attribute(OUTCOME, outcome)
        scope = self._tracemw_scope
        if scope is not None and scope.is_root:
            scope.record.outcome = outcome

    def _describe_error(self) -> None:
        """Say in the status what the exception says, where MLflow only says that there was one."""
        told = last_recorded(self._span)
        if told is not None and not self._span.status.description:
            self._span.set_status(Status(StatusCode.ERROR, f"{told.get(TYPE)}: {told.get(MESSAGE)}"))

    def _finish(self, end_ns: int | None) -> None:
        _apply_processors(self)
        if self._chunks:
            tell(self._span, self._chunks, self._chunks)
        scope = self._tracemw_scope
        if end_ns is None and scope is not None:
            end_ns = scope.now_ns()
        scopes.end_span(self._span, self._record, end_ns)
        self._tell_previews()
        if self._is_top:
            _fluent._set_last_active_trace_id(self.trace_id)
        release(self)

    @guarded()
    def _tell_previews(self) -> None:
        record, attributes = self._record, self._span.attributes
        if record is None or not self._tells:
            return
        if record.inputs is None or record.inputs is self._previewed:
            record.inputs, record.outputs = attributes.get(INPUTS), attributes.get(OUTPUTS)
            record.changed()
        if self._span.status.status_code is StatusCode.ERROR:
            record.failure = last_recorded(self._span) or record.failure

    def _abandon(self) -> None:
        """End a span that nobody can end any more: its generator was closed, or it was dropped."""
        if self._record is not None and self._record.recording:
            self._record.register()  # the garbage collector takes weak references away before it comes here
        outcome, end_ns = self._left or ("cancelled", None)
        if self._kept and self._span.attributes.get(OUTPUTS) is None:
            self._span.set_attribute(OUTPUTS, f"[{','.join(self._kept)}]")
            tell(self._span, self._chunks, len(self._kept))
            self._chunks = 0
        self._interrupt(outcome)
        self._finish(end_ns)

    def __del__(self) -> None:
        try:
            scope = self._tracemw_scope
            if scope is not None and self._forks == _Process.forks and self._span.is_recording():
                self._abandon()
        except Exception as failure:  # perhaps the interpreter is about to end
            report("mlflow: dropped span", failure)


class EndedSpan(NoOpSpan):  # type: ignore[misc]
    """MLflow's view of a span that is still current after its end: it takes nothing any more, its trace does.

    Args:
        span: The span.
    """

    def __init__(self, span: Any) -> None:
        super().__init__()
        self._span = span

    @property
    def trace_id(self) -> str:
        """The id of its trace, by which MLflow finds what is to be changed."""
        return f"tr-{self._span.get_span_context().trace_id:032x}"

    @property
    def span_id(self) -> str:
        """Its id."""
        return f"{_span_id(self._span):016x}"

    @property
    def name(self) -> str:
        """Its name."""
        return self._span.name  # type: ignore[no-any-return]


def hold(span: BridgedSpan) -> None:
    """Hold a span that a client has begun until it has ended; with too many traces, the oldest one is given up."""
    held.setdefault(span.trace_id, []).append(span)
    while len(held) > HELD_TRACES:
        held.pop(next(iter(held)), None)


def release(span: BridgedSpan) -> None:
    """Hold a span no longer."""
    spans = held.get(span.trace_id)
    if spans is not None:
        spans[:] = [one for one in spans if one is not span]
        if not spans:
            held.pop(span.trace_id, None)


def record_on(span: Any) -> TraceRecord | None:
    """Return the record of the trace that an OpenTelemetry span belongs to."""
    record: TraceRecord | None = getattr(span, RECORD, None)
    ids = span.get_span_context()
    return record if record is not None else record_of(ids.trace_id, ids.span_id)


def bridged(span: Any, trace_id: Any = None, span_type: str | None = None) -> Any:
    """Return MLflow's view of an OpenTelemetry span; stands for MLflow's `create_mlflow_span`."""
    span = kept(span)
    if not getattr(span, "is_recording", bool)():
        return EndedSpan(span) if getattr(span, "end_time", None) else NoOpSpan()
    found = live.get(f"{_span_id(span):016x}")
    return BridgedSpan(span, record_on(span)) if found is None else found


def _span_id(span: Any) -> int:
    return span.get_span_context().span_id  # type: ignore[no-any-return]


def _type_of(span: Any) -> str:
    text = (span.attributes or {}).get(SPAN_TYPE)
    return text.strip('"') if isinstance(text, str) else "UNKNOWN"


def _quoted_type(span_type: str) -> str:
    return f'"{span_type}"' if span_type.isalnum() else json.dumps(span_type, ensure_ascii=False)


def _tells_previews(span: Any, record: TraceRecord | None) -> bool:
    """True for what the previews of a request are made of: a child of its root."""
    if record is None or not record.is_request or span.parent is None:
        return False
    return record.parent_of_kept(span.parent.span_id) == record.root_span_id


def _bounded(text: str) -> str:
    """Return a chunk's JSON text, within bounds and redacted."""
    if len(text) <= EVENT_VALUE.chars and text[:1] not in ("{", "["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return dumps(value, EVENT_VALUE, runtime().redactor)
