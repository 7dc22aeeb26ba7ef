"""Tracing of ASGI and WSGI applications, on OpenTelemetry, with MLflow's tracing API."""

from tracemw.asgi import TraceMiddleware
from tracemw.client import Client, delete_trace_tag, set_trace_tag
from tracemw.config import configure, disable, enable, flush, shutdown, stats
from tracemw.current import (
    context,
    current_request,
    get_active_trace_id,
    get_last_active_trace_id,
    update_current_trace,
)
from tracemw.decorator import trace
from tracemw.entities import (
    Span,
    SpanEvent,
    SpanStatus,
    SpanStatusCode,
    SpanType,
    Trace,
    TraceData,
    TraceInfo,
    TraceState,
)
from tracemw.instrument import instrument
from tracemw.propagation import ContextThreadPoolExecutor, detached, propagate
from tracemw.reading import compare, get_trace, search_traces
from tracemw.spans import get_current_active_span, start_span, start_span_no_context
from tracemw.wsgi import WSGITraceMiddleware

__all__ = [
    "Client",
    "ContextThreadPoolExecutor",
    "Span",
    "SpanEvent",
    "SpanStatus",
    "SpanStatusCode",
    "SpanType",
    "Trace",
    "TraceData",
    "TraceInfo",
    "TraceMiddleware",
    "TraceState",
    "WSGITraceMiddleware",
    "compare",
    "configure",
    "context",
    "current_request",
    "delete_trace_tag",
    "detached",
    "disable",
    "enable",
    "flush",
    "get_active_trace_id",
    "get_current_active_span",
    "get_last_active_trace_id",
    "get_trace",
    "instrument",
    "propagate",
    "search_traces",
    "set_trace_tag",
    "shutdown",
    "start_span",
    "start_span_no_context",
    "stats",
    "trace",
    "update_current_trace",
]
