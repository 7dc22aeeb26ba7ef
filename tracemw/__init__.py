"""Tracing of ASGI and WSGI applications, on OpenTelemetry, with MLflow's tracing API.

A name is imported from its module when it is first used: an application pays for what it uses only.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from tracemw.executor import ContextThreadPoolExecutor
    from tracemw.install import instrument
    from tracemw.propagation import detached, propagate
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

_HOME = {
    "asgi": "TraceMiddleware",
    "client": "Client delete_trace_tag set_trace_tag",
    "config": "configure disable enable flush shutdown stats",
    "current": "context current_request get_active_trace_id get_last_active_trace_id update_current_trace",
    "decorator": "trace",
    "entities": "Span SpanEvent SpanStatus SpanStatusCode SpanType Trace TraceData TraceInfo TraceState",
    "executor": "ContextThreadPoolExecutor",
    "install": "instrument",
    "propagation": "detached propagate",
    "reading": "compare get_trace search_traces",
    "spans": "get_current_active_span start_span start_span_no_context",
    "wsgi": "WSGITraceMiddleware",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
