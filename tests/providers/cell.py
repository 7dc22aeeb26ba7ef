"""One cell of the provider matrix, run as a process of its own: the global provider can be set only once.

    python cell.py KIND PROTOCOL STORE     prints {"stored": [...], "exported": [...]} as JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tracemw

HEADERS = {"X-Request-ID": "req-1", "X-Session-ID": "s-1", "X-User-ID": "jane"}
exporter = InMemorySpanExporter()


@tracemw.trace(span_type="TOOL")
def work(number: int) -> int:
    """A traced function with a plain OpenTelemetry span inside, and one of ours inside that."""
    with otel.get_tracer("the application").start_as_current_span("plain"):
        with tracemw.start_span("inner") as span:
            span.set_outputs(number + 1)
    return number + 1


def set_provider() -> None:
    """Do what an application does that has OpenTelemetry of its own."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    otel.set_tracer_provider(provider)


def fastapi_app() -> Any:
    """A FastAPI application; with a global provider, newer FastAPI opens the SERVER span itself."""
    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/items/{number}")
    def item(number: int) -> dict[str, int]:
        tracemw.update_current_trace(tags={"set-in": "handler"})
        return {"answer": work(number)}

    return app


def starlette_app() -> Any:
    """A Starlette application with our middleware around it."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def item(request: Any) -> Any:
        tracemw.update_current_trace(tags={"set-in": "handler"})
        return JSONResponse({"answer": work(request.path_params["number"])})

    return tracemw.TraceMiddleware(Starlette(routes=[Route("/items/{number:int}", item)]))


def flask_app() -> Any:
    """A Flask application."""
    from flask import Flask

    app = Flask("cell")
    app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)  # type: ignore[method-assign]

    @app.get("/items/<int:number>")
    def item(number: int) -> dict[str, int]:
        tracemw.update_current_trace(tags={"set-in": "handler"})
        return {"answer": work(number)}

    return app


def call(app: Any, protocol: str) -> None:
    """Send one request, in process."""
    if protocol == "asgi":
        import asyncio

        import httpx

        async def send() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://cell") as client:
                response = await client.get("/items/1", headers=HEADERS)
                assert response.json() == {"answer": 2}, response.text

        asyncio.run(send())
    else:
        from werkzeug.test import Client

        response = Client(app).get("/items/1", headers=HEADERS)
        assert response.json == {"answer": 2}, response.text
        response.close()


def described(span: ReadableSpan) -> dict[str, Any]:
    """What the application's exporter got of one span."""
    assert span.context is not None
    return {
        "name": span.name,
        "id": f"{span.context.span_id:016x}",
        "trace": f"{span.context.trace_id:032x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent else None,
        "kind": span.kind.name,
        "attributes": dict(span.attributes or {}),
    }


def main(kind: str, protocol: str, store: str) -> None:
    """Run one cell."""
    tracemw.configure(destination=store)
    if kind in ("joined before", "adopted"):
        set_provider()
    if protocol == "wsgi":
        app = flask_app()
        if kind == "adopted":
            from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

            app = OpenTelemetryMiddleware(app)
    else:
        app = fastapi_app() if kind == "adopted" else starlette_app()
    if kind == "joined after":
        set_provider()
    call(app, protocol)
    assert tracemw.flush()
    traces = [json.loads(trace.to_json()) for trace in tracemw.search_traces()]
    json.dump({"stored": traces, "exported": [described(s) for s in exporter.get_finished_spans()]}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
