"""One span of ours while it is open: begun, current, ended. What `@trace` and `start_span` have in common.

A scope remembers the OpenTelemetry context that it found and the one it made. It is left by putting the former
back, not by a token: a token cannot be used in another `contextvars.Context`, where a generator or a dependency
may well be finished, and OpenTelemetry would log an error there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from tracemw import config, pipeline, provider
from tracemw.chance import chance
from tracemw.failure import outcome_of_span, record_exception
from tracemw.guard import report
from tracemw.record import RECORD_KEY, TraceRecord, record_of, with_record
from tracemw.runtime import runtime, runtime_of

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, Tracer

INPUTS: Final = "mlflow.spanInputs"
OUTPUTS: Final = "mlflow.spanOutputs"
SPAN_TYPE: Final = "mlflow.spanType"
FUNCTION_NAME: Final = "mlflow.spanFunctionName"
DESCRIPTION: Final = "mlflow.spanDescription"
LOG_LEVEL: Final = "mlflow.spanLogLevel"
OUTCOME: Final = "tracemw.outcome"

DEFAULTS_KEY: Final = otel_context.create_key("tracemw-defaults")


class Defaults:
    """What `tracemw.context(...)` says about the traces that begin inside it.

    Attributes:
        enabled: False suppresses, True allows although `disable()` was called, None leaves it as it is.
        suppressed: The record that `enabled=False` has taken out of the context.
    """

    __slots__ = ("metadata", "tags", "session_id", "user", "enabled", "suppressed")

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tags: Mapping[str, Any],
        session_id: str | None,
        user: str | None,
        enabled: bool | None,
        suppressed: TraceRecord | None = None,
    ) -> None:
        self.metadata = metadata
        self.tags = tags
        self.session_id = session_id
        self.user = user
        self.enabled = enabled
        self.suppressed = suppressed

    def apply(self, record: TraceRecord) -> None:
        """Write them onto a new record."""
        record.update(tags=self.tags, metadata=self.metadata, session_id=self.session_id, user=self.user)


class Scope:
    """One open span of ours and the context it is current in.

    Attributes:
        span: The OpenTelemetry span; not recording where the trace is not sampled.
        record: The record of the trace that it belongs to.
        context: The context with the span in it.
        previous: The context that was current before.
        recording: False where nothing is recorded of the span, which only keeps others from being.
        is_root: True where the trace began with the span.
    """

    __slots__ = ("span", "record", "context", "previous", "recording", "is_root", "_wall_ns", "_started")

    def __init__(
        self,
        span: Span,
        record: TraceRecord,
        context: Context,
        previous: Context,
        is_root: bool,
        wall_ns: int,
        started: int,
    ) -> None:
        self.span = span
        self.record = record
        self.context = context
        self.previous = previous
        self.recording = record.recording and span.is_recording()
        self.is_root = is_root
        self._wall_ns = wall_ns
        self._started = started

    def now_ns(self) -> int:
        """Return the present, counted from the start by a clock that nobody sets."""
        return self._wall_ns + perf_counter_ns() - self._started

    def enter(self) -> None:
        """Make the span current."""
        otel_context.attach(self.context)

    def reenter(self) -> None:
        """Make the span current once more, perhaps elsewhere: what is current there is put back after it."""
        self.previous = otel_context.get_current()
        otel_context.attach(self.context)

    def leave(self) -> None:
        """Make current what was before; does nothing where another context has taken over."""
        if otel_context.get_current() is self.context:
            otel_context.attach(self.previous if not _strays else _past_strays(self.previous))
        else:
            _stray(self.context, self.previous)

    def fail(self, exc: BaseException) -> None:
        """Take note of an exception that left the span's code."""
        span, outcome = self.span, outcome_of_span(exc)
        self.record.register(span.get_span_context().span_id)  # a generator may have been dropped
        if outcome is None:
            record_exception(span, exc)
        elif outcome != "completed":
            span.set_attribute(OUTCOME, outcome)
            if self.is_root:
                self.record.outcome = outcome

    def end(self) -> None:
        """End the span, unless its code has done that."""
        span = self.span
        if not span.is_recording():
            return
        end_ns = self._wall_ns + perf_counter_ns() - self._started
        if runtime_of(self.record).processors:
            run_processors(span, self.record)
        if self.is_root:
            settle_root(span, self.record, end_ns)
        span.end(end_ns)


# Contexts that were left while another, entered later, was still current: by their identity, with the context to
# go on to. Whoever leaves the later one steps over them. Only badly nested spans come here; a bound is enough.
_strays: dict[int, tuple[Context, Context]] = {}
_STRAYS: Final = 200


def _stray(context: Context, previous: Context) -> None:
    _strays[id(context)] = (context, previous)
    while len(_strays) > _STRAYS:
        _strays.pop(next(iter(_strays)), None)


def _past_strays(context: Context) -> Context:
    while (found := _strays.get(id(context))) is not None and found[0] is context:
        context = found[1]
    return context


# Begin


def defaults_in(context: Context) -> Defaults | None:
    """Return what `tracemw.context(...)` says in a context."""
    return context.get(DEFAULTS_KEY)  # type: ignore[return-value]


def tracing_is_on(context: Context) -> bool:
    """True unless tracing is off: for the process, and not switched on for this context."""
    if config.enabled():
        return True
    defaults = defaults_in(context)
    return defaults is not None and defaults.enabled is True


def open_scope(
    name: str,
    attributes: Mapping[str, Any],
    *,
    context: Context | None = None,
    links: Sequence[Link] = (),
    rate: float | None = None,
    start_ns: int | None = None,
    tracer: Tracer | None = None,
) -> Scope | None:
    """Begin a span below what is current, or a trace where nothing is; it is not made current yet.

    Args:
        name: The span's name.
        attributes: As OpenTelemetry takes them.
        context: Below this context, instead of the current one.
        links: The span's links.
        rate: The share of traces to sample where one begins here, instead of the settings' rate.
        start_ns: When the span began, if not now.
        tracer: Makes the span instead of our own: it goes by the name of another instrumentation.

    Returns:
        The scope, or None where nothing is to be recorded.
    """
    previous = otel_context.get_current() if context is None else context
    if not tracing_is_on(previous):
        return None
    record: TraceRecord | None = previous.get(RECORD_KEY)  # type: ignore[assignment]
    if record is None:
        return begin_trace(name, attributes, previous, links=links, rate=rate, start_ns=start_ns, tracer=tracer)
    if not record.recording:
        return None
    return _start(name, attributes, previous, record, links, start_ns, tracer)


def begin_trace(
    name: str,
    attributes: Mapping[str, Any],
    context: Context,
    *,
    links: Sequence[Link] = (),
    rate: float | None = None,
    start_ns: int | None = None,
    tracer: Tracer | None = None,
) -> Scope:
    """Begin a trace (or our part of one) in a context that carries no record.

    The current span may be the application's own, or a remote caller's: then ours is its child, and has a record
    of its own unless we know that trace already.
    """
    parent = trace_api.get_current_span(context).get_span_context()
    if parent.is_valid and (known := _known(parent)) is not None:
        return _start(name, attributes, context, known, links, start_ns, tracer)
    now = runtime()
    sampled = _is_sampled(now.rate if rate is None else rate, parent.trace_id)
    if not sampled and not now.keeps:
        return _suppressed(context)
    links = (*links, *_pending_links(context))
    scope = _start(name, attributes, context, None, links, start_ns, tracer)
    record = scope.record
    if record.recording:
        if not sampled:
            record.held_back = []
        defaults = defaults_in(context)
        if defaults is not None:
            defaults.apply(record)
    return scope


def _start(
    name: str,
    attributes: Mapping[str, Any],
    context: Context,
    record: TraceRecord | None,
    links: Sequence[Link],
    start_ns: int | None,
    tracer: Tracer | None,
) -> Scope:
    start = (provider.chosen()[0] if tracer is None else tracer).start_span
    started, wall_ns = perf_counter_ns(), time_ns()
    begin_ns = wall_ns if start_ns is None else start_ns
    span = start(name, context, SpanKind.INTERNAL, attributes, links, begin_ns, False, False)
    if record is not None and record.recording and getattr(span, "parent", context) is None:
        below = _below_root(record, context)
        span = start(name, below, SpanKind.INTERNAL, attributes, links, begin_ns, False, False)
    inner = trace_api.set_span_in_context(span, context)
    is_root = False
    if record is None or record.trace_id != span.get_span_context().trace_id:
        record = record_for(span, name, begin_ns)
        inner = with_record(inner, record)
        is_root = record.root_span_id == span.get_span_context().span_id
    return Scope(span, record, inner, context, is_root, wall_ns, started)


def _below_root(record: TraceRecord, context: Context) -> Context:
    """Return the context with the trace's root as its span.

    OpenTelemetry before 1.40 or so makes an invalid span current where an instrumentation finds no provider:
    what begins below it would be a trace of its own.
    """
    root = SpanContext(record.trace_id, record.root_span_id, False, TraceFlags(TraceFlags.SAMPLED))
    return trace_api.set_span_in_context(NonRecordingSpan(root), context)


def record_for(span: Any, name: str, start_ns: int) -> TraceRecord:
    """Return the record of a span that is the first of ours in its trace, as far as the context tells."""
    ids: SpanContext = span.get_span_context()
    if not span.is_recording():
        return TraceRecord(ids.trace_id, ids.span_id, recording=False)
    parent: SpanContext | None = span.parent
    known = None if parent is None else _known(parent)
    if known is not None:
        return known
    record = TraceRecord(ids.trace_id, ids.span_id, has_parent=parent is not None)
    record.name = name
    record.start_ns = start_ns
    record.process = config.process_metadata()
    return record


def _known(ids: SpanContext) -> TraceRecord | None:
    """Return the living record of a trace which a context without record belongs to.

    Of a foreign trace, our part may have ended: what comes then begins another part.
    """
    record = record_of(ids.trace_id, ids.span_id)
    return None if record is None or (record.ended and record.has_parent) else record


def _suppressed(context: Context) -> Scope:
    """Return a scope in which nothing of ours is recorded.

    On the application's own provider only our spans are left out: what its pipeline gets without us, it gets with
    us.
    """
    pipeline.current().count("sampled_out")
    ids = SpanContext(chance.getrandbits(128) or 1, chance.getrandbits(64) or 1, is_remote=False)
    span = NonRecordingSpan(ids)
    record = TraceRecord(ids.trace_id, ids.span_id, recording=False)
    inner = context if provider.is_joined_now() else trace_api.set_span_in_context(span, context)
    return Scope(span, record, with_record(inner, record), context, False, 0, 0)


def _is_sampled(rate: float | None, trace_id: int) -> bool:
    """Decide for a trace; the parts of a foreign one (its id is known) are kept or left together."""
    if rate is None or rate >= 1.0:
        return True
    if trace_id:
        return (trace_id & 0xFFFFFFFFFFFFFFFF) < rate * 2**64
    return chance.random() < rate


def _pending_links(context: Context) -> Sequence[Link]:
    from tracemw.propagation import pending_links

    return pending_links(context)


# End


class _LastActive:
    trace_id: int | None = None


_last = _LastActive()
_last_of_thread = threading.local()


def note_trace_ended(record: TraceRecord) -> None:
    """Remember the trace for `get_last_active_trace_id`."""
    _last.trace_id = _last_of_thread.trace_id = record.trace_id


def last_trace_id(thread_local: bool) -> str | None:
    """Return the trace whose root ended last, in this process or in this thread."""
    trace_id = getattr(_last_of_thread, "trace_id", None) if thread_local else _last.trace_id
    return None if trace_id is None else f"tr-{trace_id:032x}"


def end_span(span: Any, record: TraceRecord | None, end_ns: int | None) -> None:
    """End a span; of a root of the API, first write onto the record how it went.

    Args:
        span: The OpenTelemetry span.
        record: The record of its trace, if we record that.
        end_ns: When it ended, if not now.
    """
    if runtime_of(record).processors:
        run_processors(span, record)
    if record is not None and not record.is_request and record.root_span_id == span.get_span_context().span_id:
        end_ns = time_ns() if end_ns is None else end_ns
        settle_root(span, record, end_ns)
    span.end(end_ns)


def settle_root(span: Any, record: TraceRecord, end_ns: int) -> None:
    """Write onto the record how a root of the API went; its end then makes the processor queue the record."""
    attributes = getattr(span, "attributes", None) or {}
    record.inputs = attributes.get(INPUTS)
    record.outputs = attributes.get(OUTPUTS)
    record.end_ns = end_ns
    status = getattr(span, "status", None)
    record.error = status is not None and status.status_code is StatusCode.ERROR
    if record.error:
        record.outcome = "error"
    elif record.outcome is None:
        record.outcome = "completed"
    if provider.is_joined_now():  # other exporters will see the root: as its last attributes, since the SDK evicts
        from tracemw.pipeline.encode import mirrored

        span.set_attributes(mirrored(record))
    note_trace_ended(record)


def run_processors(span: Any, record: TraceRecord | None) -> None:
    """Call the `span_processors` of the settings on a span that is about to end; they may change it.

    Args:
        span: The OpenTelemetry span, still recording.
        record: The record of its trace.
    """
    from tracemw.livespan import LiveSpan

    live = LiveSpan(span, record)
    for processor in runtime_of(record).processors:
        try:
            processor(live)
        except Exception as exc:
            report(f"span_processors: {getattr(processor, '__qualname__', processor)!r}", exc)
