"""Requests that are not recorded, run as a process of its own: the global provider can be set only once.

    python -m tests.request.quiet KIND PROTOCOL     prints what was stored and what was exported, as JSON

KIND is `owned`, `global` (our provider is the global one), `joined` (the application's is) or `adopted` (and
somebody has opened the root of each request).
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tracemw
import tracemw.logging
from tests.request.drive import ask, ask_wsgi, environ, http_scope
from tracemw.propagation import outgoing_headers

exporter = InMemorySpanExporter()
PATHS = ("/quiet", "/sampled out", "/kept")
OPTIONS: dict[str, Any] = {"exclude": ["/quiet"]}


@tracemw.trace
def work() -> dict[str, Any]:
    """Spans of all kinds."""
    with otel.get_tracer("the application").start_as_current_span("plain"):
        with tracemw.start_span("inner"):
            tracemw.update_current_trace(tags={"a": "b"})
            return {
                "trace": tracemw.get_active_trace_id(),
                "request": tracemw.current_request.client_request_id,
                "outgoing": outgoing_headers().get("X-Request-ID"),
            }


def asgi_app() -> Any:
    """A FastAPI application, ours inside or around."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    def parts() -> Any:
        yield json.dumps(work())

    @app.get("/{rest:path}")
    def handler() -> StreamingResponse:
        return StreamingResponse(parts())

    return app


def wsgi_app() -> Any:
    """A Flask application."""
    from flask import Flask

    app = Flask("quiet")

    @app.get("/<path:rest>")
    def handler(rest: str) -> Any:
        def parts() -> Any:
            yield json.dumps(work())

        return app.response_class(parts())

    return app


def build(kind: str, protocol: str, sampled: bool) -> Any:
    """The application with our middleware, and in the adopted case with somebody else's around it."""
    options = {**OPTIONS, "sample_rate": 1.0 if sampled else 0.0}
    if protocol == "wsgi":
        wsgi: Any = tracemw.WSGITraceMiddleware(wsgi_app(), **options)
        if kind == "adopted":
            from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

            wsgi = OpenTelemetryMiddleware(wsgi)
        return wsgi
    app = asgi_app()
    if kind == "adopted":
        app.add_middleware(tracemw.TraceMiddleware, **options)
        return app
    return tracemw.TraceMiddleware(app, **options)


def send(app: Any, protocol: str, path: str) -> dict[str, Any]:
    """Send one request; returns what `work` was told, and the names of our headers."""
    if protocol == "wsgi":
        wsgi = ask_wsgi(app, environ(path, HTTP_X_REQUEST_ID="r-1"))
        told, headers = json.loads(wsgi.read()), [name.lower() for name, _ in wsgi.headers]
    else:
        asgi = ask(app, http_scope(path, headers=[(b"x-request-id", b"r-1")]))
        told, headers = json.loads(asgi.body), [name.decode().lower() for name in asgi.headers]
    return {**told, "headers": sorted(name for name in headers if name.startswith(("x-", "server-t")))}


def main(kind: str, protocol: str) -> None:
    """Run one cell."""
    logging.disable(logging.WARNING)
    tracemw.configure(destination="memory:", set_global=kind == "global")
    if kind in ("joined", "adopted"):
        provider = TracerProvider()
        otel.set_tracer_provider(provider)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    found = {}
    for path in PATHS:
        exporter.clear()
        app = build(kind, protocol, sampled=path != "/sampled out")
        told = send(app, protocol, path)
        tracemw.flush()
        stored = [[s.name for s in trace.data.spans] for trace in tracemw.search_traces()]
        roots = [span for span in exporter.get_finished_spans() if span.parent is None]
        found[path] = {
            "told": told,
            "stored": stored,
            "exported": sorted(span.name for span in exporter.get_finished_spans()),
            "roots": len(roots),
        }
    stats = tracemw.stats()
    found["stats"] = {key: stats.get(key, 0) for key in ("excluded", "sampled_out", "failures")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
