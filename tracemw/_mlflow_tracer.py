"""Where MLflow's spans begin while it is bridged: with the provider in force, in the context of everybody else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TracerProvider

from tracemw import config, provider
from tracemw import scope as scopes
from tracemw._mlflow_internals import find, find_wanted
from tracemw._mlflow_spans import RECORD, BridgedSpan, NoOpSpan, live, record_on
from tracemw._mlflow_table import hand_over
from tracemw.guard import guarded, report
from tracemw.record import RECORD_KEY, TraceRecord, current_record, with_record
from tracemw.runtime import runtime

SCOPE: Final = "mlflow.tracing.provider"  # the name by which MLflow's API asks for a tracer
REQUEST_ID: Final = "mlflow.traceRequestId"
_HINTS: Final = ("mlflow.experimentId", "mlflow.spanStartTimeNs")  # attributes meant for MLflow's processor

_ratio_override: Any = find("mlflow.tracing.sampling", "_SAMPLING_RATIO_OVERRIDE")
_ratio: Any = find_wanted("mlflow.environment_variables", "MLFLOW_TRACE_SAMPLING_RATIO")
_context_metadata: Any = find_wanted("mlflow.tracing.context", "get_configured_trace_metadata")
_context_tags: Any = find_wanted("mlflow.tracing.context", "get_configured_trace_tags")
_active_run: Any = find_wanted("mlflow.tracking.fluent", "_get_latest_active_run")
_active_model: Any = find_wanted("mlflow.tracking.fluent", "_get_active_model_id_global")

# While a client begins a trace: MLflow refuses that below a current span, and ours are current in every request.
unseen: ContextVar[bool] = ContextVar("tracemw_mlflow_unseen", default=False)


class Unrecorded(NonRecordingSpan):
    """Stands for a span of a trace that is not recorded, and keeps the spans below it from being.

    Args:
        record: The record of its trace, if it has one.
    """

    def __init__(self, record: TraceRecord | None) -> None:
        ids = (record.trace_id, record.root_span_id) if record is not None else (0, 0)
        super().__init__(SpanContext(*ids, is_remote=False))
        self.record = record

    @property
    def context(self) -> SpanContext:
        """The ids; MLflow before 3.11 asks for them so."""
        return self.get_span_context()


class NotRecorded(NoOpSpan):  # type: ignore[misc]
    """MLflow's view of such a span, for versions before 3.12, which treat it like others.

    Args:
        span: The span.
    """

    def __init__(self, span: Unrecorded) -> None:
        super().__init__()
        self._span = span

    def set_span_type(self, span_type: str) -> None:
        """Do nothing."""


class SharedContext:
    """Stands for MLflow's runtime context: OpenTelemetry's, so that all spans have one another for parents."""

    def get_current(self) -> Context:
        """Return the context; where nothing is recorded, MLflow sees no span in it."""
        context = otel_context.get_current()
        record = current_record(context)
        if unseen.get() or (record is not None and not record.recording):
            return trace_api.set_span_in_context(trace_api.INVALID_SPAN, context)
        return context

    def attach(self, context: Context) -> Any:
        """Make a context current that MLflow has put a span into; the record of the span's trace goes with it."""
        span = trace_api.get_current_span(context)
        if span.is_recording():
            record = record_on(span)
        elif isinstance(span, Unrecorded):
            record = span.record
            if provider.is_joined_now():  # what the application's pipeline gets without us, it gets with us
                context = otel_context.get_current()
        elif span.get_span_context().is_remote and current_record() is None:
            return otel_context.attach(context)
        else:  # nothing begins here: MLflow is off, or takes up a caller's trace inside of a request of ours
            return None
        if record is not None and context.get(RECORD_KEY) is not record:
            context = with_record(context, record)
        return otel_context.attach(context)

    def detach(self, token: Any) -> None:
        """Make current what was before; elsewhere than where it was attached, there is nothing to be put back."""
        if token is None:
            return
        if sys.exc_info()[1] is not None:
            _note_left()
        try:
            token.var.reset(token)
        except (AttributeError, RuntimeError, ValueError):
            pass


@guarded()
def _note_left() -> None:
    span = live.get(f"{trace_api.get_current_span().get_span_context().span_id:016x}")
    if span is not None:
        span.note_left()


class BridgedTracer(trace_api.Tracer):
    """Begins spans for MLflow, and for what MLflow hands its tracer to.

    Args:
        name: The instrumentation scope of the spans.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._made_by: Any = None
        self._tracer: Any = None
        self.span_processor = _Registrar()

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[Any] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> Any:
        """Begin a span below what is current (or in `context`), or a trace; it is not made current."""
        if context is None or unseen.get():
            context = otel_context.get_current()
        try:
            return self._begin(name, _with_parents_record(context), attributes or {}, links or (), start_time)
        except Exception as exc:
            report("mlflow: start_span", exc)
            return Unrecorded(None)

    @contextmanager
    def _as_current(self, name: str, *args: Any, end_on_exit: bool = True, **options: Any) -> Iterator[Any]:
        with trace_api.use_span(self.start_span(name, *args, **options), end_on_exit) as span:
            yield span

    start_as_current_span: Any = _as_current

    def _begin(
        self,
        name: str,
        context: Context,
        attributes: Mapping[str, Any],
        links: Sequence[Any],
        start_ns: int | None,
    ) -> Any:
        if self._name == SCOPE and attributes:
            attributes = {key: value for key, value in attributes.items() if key not in _HINTS}
        rate = None if RECORD_KEY in context else _rate()
        scope = scopes.open_scope(
            name,
            attributes,
            context=context,
            links=links,
            rate=rate,
            start_ns=start_ns,
            tracer=self._of_provider(),
        )
        if scope is None or not scope.recording:
            left_out = Unrecorded(current_record(context) if scope is None else scope.record)
            if self._name == SCOPE:
                hand_over(left_out.context.span_id, NotRecorded(left_out))
            return left_out
        span, record = scope.span, scope.record
        setattr(span, RECORD, record)
        if self._name == SCOPE:
            is_top = _scope_of(trace_api.get_current_span(context)) != SCOPE
            if is_top:
                _take_facts(record, scope.is_root)
            hand_over(span.get_span_context().span_id, BridgedSpan(span, record, scope, is_top))
        return span

    def _of_provider(self) -> Any:
        made_by = source()
        if made_by is not self._made_by:
            self._made_by, self._tracer = made_by, made_by.get_tracer(self._name)
        return self._tracer


class BridgedProvider(TracerProvider):
    """Stands for MLflow's own provider: its tracers make their spans with the provider in force."""

    def __init__(self) -> None:
        self._tracers: dict[str, BridgedTracer] = {}
        self._active_span_processor = _Exporting()

    def get_tracer(self, instrumenting_module_name: str, *args: Any, **options: Any) -> BridgedTracer:
        """Return the tracer of a name."""
        found = self._tracers.get(instrumenting_module_name)
        if found is None:
            found = self._tracers[instrumenting_module_name] = BridgedTracer(instrumenting_module_name)
        return found

    def add_span_processor(self, processor: Any) -> None:
        """Add a processor to the provider in force."""
        source().add_span_processor(processor)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait until all is stored and delivered."""
        return config.flush(timeout_millis / 1000)

    def shutdown(self) -> None:
        """Do nothing: what is shut down is ours, or the application's."""


source: Any = provider.in_force  # another one while the bridge tries itself


class _Registrar:
    """What instrumentations that make their spans elsewhere tell MLflow about them."""

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        """Have MLflow find a span that its owner is going to register; a root begins a trace of ours."""
        if not span.is_recording():
            return
        record = record_on(span)
        if record is None and span.parent is None:
            record = scopes.record_for(span, span.name, span.start_time or 0)
        if record is not None and record.recording:
            setattr(span, RECORD, record)
            span.set_attribute(REQUEST_ID, f'"tr-{record.trace_id:032x}"')

    def on_end(self, span: Any) -> None:
        """Do nothing: our processor gets the end of the span from its provider."""


class _Queue:
    def flush(self, terminate: bool = False) -> None:
        config.flush()


class _Exporting:
    """What MLflow flushes, by names it uses for that: of the provider, its processors, their exporters."""

    def __init__(self) -> None:
        self._async_queue = _Queue()
        self._span_processors = (self,)

    @property
    def span_exporter(self) -> _Exporting:
        return self


def _with_parents_record(context: Context) -> Context:
    """Return a context with the record of the trace that its current span belongs to, which may be another's."""
    span = trace_api.get_current_span(context)
    if not span.is_recording():
        return context
    record: Any = context.get(RECORD_KEY)
    if record is not None and record.trace_id == span.get_span_context().trace_id:
        return context
    own = record_on(span)
    return context if own is None else with_record(context, own)


def _rate() -> float | None:
    """Return the share of MLflow's traces to record where it says so: for a function, or by its variable."""
    override: float | None = _ratio_override.get()
    if override is None and _ratio is not None and runtime().rate is None:
        override = _ratio.get()
    return override


def _take_facts(record: TraceRecord, is_root: bool) -> None:
    """Take what MLflow would begin a trace with: `mlflow.tracing.context`, and the active run and model."""
    metadata = dict(_context_metadata() or {}) if _context_metadata is not None else {}
    tags = _context_tags() if _context_tags is not None else None
    if is_root:
        if _active_run is not None and (run := _active_run()) is not None:
            metadata.setdefault("mlflow.sourceRun", run.info.run_id)
        if _active_model is not None and (model := _active_model()) is not None:
            metadata.setdefault("mlflow.modelId", model)
    if metadata or tags:
        record.update(metadata=metadata, tags=tags)


def is_ours(span: Any) -> bool:
    """True for a span of a trace that we record, unless MLflow's API has begun it."""
    record = record_on(span) if span.is_recording() else None
    return record is not None and record.recording and _scope_of(span) != SCOPE


def _scope_of(span: Any) -> str | None:
    return getattr(getattr(span, "instrumentation_scope", None), "name", None)


