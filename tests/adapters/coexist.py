"""Applications that are traced by others as well, run as a process of its own: the global provider is set once.

    python -m tests.adapters.coexist WHEN     prints {"name of the case": [traces]} as JSON

WHEN is `before` or `after`: when the application sets up OpenTelemetry, as seen from our middleware.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tracemw
from tests.adapters.versions import FASTAPI, STARLETTE
from tracemw.testing import capture_traces

HEADERS = {"X-Request-ID": "req-1", "X-Session-ID": "s-1", "X-User-ID": "jane"}
PATHS = ("/items/7", "/broken/7", "/refused/7", "/nowhere")
exporter = InMemorySpanExporter()

Put = Callable[[Any], Any]
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a case: a function that returns an application."""
    CASES[function.__name__] = function
    return function


def needs(met: bool) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a case where a condition is met."""
    return case if met else lambda function: function


def provider() -> TracerProvider:
    """A provider of the application's, with an exporter."""
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


def fastapi_app(**options: Any) -> Any:
    """A FastAPI application."""
    from fastapi import FastAPI, HTTPException, WebSocket

    app = FastAPI(**options)

    @tracemw.trace(name="handler")
    @app.get("/items/{number}")
    def item(number: int) -> dict[str, int]:
        with tracemw.start_span("inside"):
            return {"number": number}

    @app.get("/broken/{number}")
    @tracemw.trace(name="handler")
    async def broken(number: int) -> None:
        raise ValueError("boom")

    @tracemw.trace(name="handler")
    @app.get("/refused/{number}")
    async def refused(number: int) -> None:
        raise HTTPException(418)

    async def live(websocket: Any, number: int) -> None:
        await websocket.accept()
        await websocket.close()

    live.__annotations__["websocket"] = WebSocket
    tracemw.trace(app.websocket("/live/{number}")(live), name="handler")
    return app


def starlette_app(prefix: str = "") -> Any:
    """A Starlette application."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def item(request: Any) -> Any:
        with tracemw.start_span("inside"):
            return JSONResponse({})

    async def broken(request: Any) -> Any:
        raise ValueError("boom")

    async def refused(request: Any) -> Any:
        raise HTTPException(418)

    handlers = {"items": item, "broken": broken, "refused": refused}
    app = Starlette(routes=[Route(f"{prefix}/{name}/{{number:int}}", fn) for name, fn in handlers.items()])
    for fn in handlers.values():
        tracemw.trace(fn, name="handler")
    return app


def flask_app() -> Any:
    """A Flask application."""
    from flask import Flask, abort

    app = Flask("coexist")

    @tracemw.trace(name="handler")
    @app.get("/items/<int:number>")
    def item(number: int) -> dict[str, int]:
        with tracemw.start_span("inside"):
            return {"number": number}

    @app.get("/broken/<int:number>")
    @tracemw.trace(name="handler")
    def broken(number: int) -> str:
        raise ValueError("boom")

    @tracemw.trace(name="handler")
    @app.get("/refused/<int:number>")
    def refused(number: int) -> str:
        abort(418)

    return app


class Passing:
    """Somebody else's ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on."""
        await self.app(scope, receive, send)


@needs(bool(FASTAPI))
def fastapi_first() -> Any:
    """Ours is added first, so it is the innermost."""
    app = fastapi_app()
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_middleware(Passing)
    return app


@needs(bool(FASTAPI))
def fastapi_last() -> Any:
    """Ours is added last, so it is the outermost of those added."""
    app = fastapi_app()
    app.add_middleware(Passing)
    app.add_middleware(tracemw.TraceMiddleware)
    return app


@needs(bool(FASTAPI))
def fastapi_instrument() -> Any:
    """Ours is put there by `instrument`."""
    return tracemw.instrument(fastapi_app())


@needs(bool(FASTAPI))
def fastapi_outside() -> Any:
    """Ours stands around the application."""
    return tracemw.TraceMiddleware(Passing(fastapi_app()))


@needs(bool(FASTAPI))
def fastapi_twice() -> Any:
    """Two of ours."""
    app = fastapi_app()
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_middleware(Passing)
    app.add_middleware(tracemw.TraceMiddleware)
    return tracemw.TraceMiddleware(app)


@needs(FASTAPI >= (0, 142))
def fastapi_own_provider() -> Any:
    """FastAPI is given a provider that is not the global one."""
    return tracemw.instrument(fastapi_app(telemetry={"tracer_provider": provider()}))


@needs(FASTAPI >= (0, 142))
def fastapi_own_provider_outside() -> Any:
    """The same, and ours stands around the application."""
    return tracemw.TraceMiddleware(fastapi_app(telemetry={"tracer_provider": provider()}))


@needs(bool(FASTAPI))
def fastapi_mounted() -> Any:
    """A mounted application that has its own middleware, below one that has it, too."""
    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)
    app.mount("/{tenant}", tracemw.instrument(fastapi_app()))
    return _below("/acme", app)


@needs(bool(FASTAPI))
def fastapi_mounted_only() -> Any:
    """Only the mounted application has our middleware."""
    from fastapi import FastAPI

    app = FastAPI()
    app.mount("/sub", tracemw.instrument(fastapi_app()))
    return _below("/sub", app)


@needs(bool(FASTAPI))
def fastapi_mounted_around() -> Any:
    """Our middleware is around the mounted application only."""
    from fastapi import FastAPI

    app = FastAPI()
    app.mount("/sub", tracemw.TraceMiddleware(fastapi_app()))
    return _below("/sub", app)


@case
def starlette_inside() -> Any:
    """Starlette with ours in its stack."""
    app = starlette_app()
    app.add_middleware(tracemw.TraceMiddleware)
    return app


@needs(STARLETTE >= (1, 10))
def starlette_telemetry_outer() -> Any:
    """Starlette's own middleware outside of ours."""
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    app: Any = starlette_app()
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_middleware(OpenTelemetryMiddleware)
    return app


@needs(STARLETTE >= (1, 10))
def starlette_telemetry_inner() -> Any:
    """Starlette's own middleware inside of ours."""
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    app = starlette_app()
    app.add_middleware(OpenTelemetryMiddleware)
    app.add_middleware(tracemw.TraceMiddleware)
    return app


@needs(STARLETTE >= (1, 10))
def starlette_telemetry_around() -> Any:
    """Starlette's own middleware around everything."""
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(tracemw.instrument(starlette_app()))


def _contrib(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"opentelemetry.instrumentation.{name}")
    except ImportError:
        return None


@needs(bool(FASTAPI) and _contrib("fastapi") is not None)
def contrib_fastapi() -> Any:
    """OpenTelemetry's instrumentor of FastAPI; ours added before it."""
    app = tracemw.instrument(fastapi_app())
    _contrib("fastapi").FastAPIInstrumentor.instrument_app(app)
    return app


@needs(bool(FASTAPI) and _contrib("fastapi") is not None)
def contrib_fastapi_first() -> Any:
    """OpenTelemetry's instrumentor of FastAPI; ours added after it."""
    app = fastapi_app()
    _contrib("fastapi").FastAPIInstrumentor.instrument_app(app)
    return tracemw.instrument(app)


@needs(bool(FASTAPI) and _contrib("fastapi") is not None)
def contrib_fastapi_outside() -> Any:
    """OpenTelemetry's instrumentor of FastAPI, and ours around the application."""
    app = fastapi_app()
    _contrib("fastapi").FastAPIInstrumentor.instrument_app(app)
    return tracemw.TraceMiddleware(app)


@needs(_contrib("asgi") is not None)
def contrib_asgi_added() -> Any:
    """OpenTelemetry's ASGI middleware in the stack, around ours."""
    app = starlette_app()
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_middleware(_contrib("asgi").OpenTelemetryMiddleware)
    return app


@needs(_contrib("asgi") is not None)
def contrib_asgi_around() -> Any:
    """OpenTelemetry's ASGI middleware around a traced application."""
    return _contrib("asgi").OpenTelemetryMiddleware(tracemw.instrument(starlette_app()))


@needs(_contrib("asgi") is not None)
def contrib_asgi_inside() -> Any:
    """OpenTelemetry's ASGI middleware inside of ours."""
    return tracemw.TraceMiddleware(_contrib("asgi").OpenTelemetryMiddleware(starlette_app()))


@case
def flask_plain() -> Any:
    """Flask with ours."""
    return tracemw.instrument(flask_app())


@case
def flask_twice() -> Any:
    """Flask with two of ours."""
    return tracemw.WSGITraceMiddleware(tracemw.instrument(flask_app()))


@needs(_contrib("flask") is not None)
def contrib_flask() -> Any:
    """OpenTelemetry's instrumentor of Flask after ours."""
    app = tracemw.instrument(flask_app())
    _contrib("flask").FlaskInstrumentor().instrument_app(app)
    return app


@needs(_contrib("flask") is not None)
def contrib_flask_first() -> Any:
    """OpenTelemetry's instrumentor of Flask before ours."""
    app = flask_app()
    _contrib("flask").FlaskInstrumentor().instrument_app(app)
    return tracemw.instrument(app)


@needs(_contrib("wsgi") is not None)
def contrib_wsgi_around() -> Any:
    """OpenTelemetry's WSGI middleware around a traced application."""
    app = tracemw.instrument(flask_app())
    app.wsgi_app = _contrib("wsgi").OpenTelemetryMiddleware(app.wsgi_app)
    return app


@needs(_contrib("wsgi") is not None)
def contrib_wsgi_inside() -> Any:
    """OpenTelemetry's WSGI middleware inside of ours."""
    app = flask_app()
    app.wsgi_app = _contrib("wsgi").OpenTelemetryMiddleware(app.wsgi_app)
    return tracemw.instrument(app)


@case
def flask_dispatched() -> Any:
    """Applications behind a dispatcher, which is traced, as one of them is."""
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app: Any = DispatcherMiddleware(Flask("front"), {"/acme": tracemw.instrument(flask_app())})
    return _wsgi_below("/acme", tracemw.WSGITraceMiddleware(app))


def _below(prefix: str, app: Any) -> Any:
    async def below(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "path": prefix + scope["path"]}, receive, send)

    return below


def _wsgi_below(prefix: str, app: Any) -> Any:
    def below(environ: Any, start_response: Any) -> Any:
        environ["PATH_INFO"] = prefix + environ["PATH_INFO"]
        return app(environ, start_response)

    return below


def is_wsgi(name: str) -> bool:
    """Say whether a case is a WSGI application."""
    return "flask" in name or "wsgi" in name


def send(name: str, app: Any, path: str) -> list[tuple[str, str]]:
    """Send one request, in process, and return the response's headers.

    An exception that a server would log is nothing here.
    """
    if is_wsgi(name):
        from werkzeug.test import Client

        response = Client(app).get(path, headers=HEADERS)
        response.get_data()
        response.close()
        return [(key.lower(), value) for key, value in response.headers]
    from tests.request.drive import ask, http_scope

    headers = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
    found: list[tuple[str, str]] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def looking_send(message: Any) -> None:
            found.extend((key.decode(), value.decode()) for key, value in message.get("headers", ()))
            await send(message)

        await app(scope, receive, looking_send)

    try:
        ask(watched, http_scope(path, headers=headers))
    except ValueError:
        pass
    return found


def connect(app: Any) -> None:
    """Open a WebSocket, which the application closes."""
    import asyncio

    from tests.request.drive import Conversation, websocket_scope

    conversation = Conversation([{"type": "websocket.connect"}])
    asyncio.run(app(websocket_scope("/live/7"), conversation.receive, conversation.send))


def described(trace: Any) -> dict[str, Any]:
    """A trace as the test looks at it."""
    # A busy machine may make a span of what is done after the response.
    spans = [span for span in trace.data.spans if span.name != "background work"]
    ids = {span.span_id for span in spans}
    (root,) = [span for span in spans if span.parent_id not in ids]

    def below(parent: str) -> list[Any]:
        return [[span.name, below(span.span_id)] for span in spans if span.parent_id == parent]

    return {
        "root": root.name,
        "state": trace.info.state,
        "request": trace.info.client_request_id,
        "session": trace.info.trace_metadata.get("mlflow.trace.session"),
        "route": root.attributes.get("http.route"),
        "preview": trace.info.request_preview,
        "status": root.attributes.get("http.response.status_code"),
        "exceptions": sum(event.name == "exception" for event in root.events),
        "handler_exceptions": sum(
            event.name == "exception" for span in spans if span.name == "handler" for event in span.events
        ),
        "tree": below(root.span_id),
        "spans": len(spans),
    }


def main(when: str) -> None:
    """Run all cases."""
    results: dict[str, Any] = {}
    tracemw.configure(destination="none:")
    if when == "before":
        otel.set_tracer_provider(provider())
    made = {name: make() for name, make in CASES.items()}
    if when == "after":
        with capture_traces():
            for name, app in made.items():
                send(name, app, "/items/7")
        otel.set_tracer_provider(provider())
    for name, app in made.items():
        exporter.clear()
        results[name] = {}
        for path in PATHS:
            with capture_traces(span_name_suffixes=False) as traces:
                headers = send(name, app, path)
            results[name][path] = [described(trace) for trace in traces]
            for trace, told in zip(traces, results[name][path], strict=True):
                told["headers"] = [
                    [value for key, value in headers if key == "x-request-id"] == ["req-1"],
                    [value for key, value in headers if key == "x-trace-id"] == [trace.info.trace_id],
                    [key for key, _ in headers].count("server-timing"),
                ]
        results[name]["exported traces"] = len({span.context.trace_id for span in exporter.get_finished_spans()})
    if when == "before" and FASTAPI >= (0, 142):
        with capture_traces(operation_spans=True) as traces:
            send("fastapi", made["fastapi_last"], "/items/7")
        results["operation spans"] = [described(trace) for trace in traces]
        with capture_traces() as traces:
            connect(made["fastapi_last"])
        results["websocket"] = [described(trace) for trace in traces]
    results["failures"] = tracemw.stats()["failures"]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
