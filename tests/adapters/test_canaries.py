"""Internals of the frameworks: these tests fail loudly with a version that has moved one that we use.

What each of them stands for is said at the top of the adapter. Where one has moved, a user's requests are still
traced, and the log, `stats()` and `doctor` tell what is missing.
"""

from __future__ import annotations

import inspect
import logging
from contextvars import ContextVar
from typing import Any

import pytest

import tracemw
from tests.adapters.trees import get, trees, wsgi_get
from tests.adapters.versions import FASTAPI, FLASK, STARLETTE, WERKZEUG
from tracemw import guard
from tracemw.adapters import check
from tracemw.doctor import examine
from tracemw.testing import CapturedTraces

INSTALLED = {"fastapi": FASTAPI, "starlette": STARLETTE, "flask": FLASK, "werkzeug": WERKZEUG}
installed = pytest.mark.parametrize("name", sorted(name for name, version in INSTALLED.items() if version))


@installed
def test_the_installed_version_is_as_we_know_it(name: str) -> None:
    """One request to a tiny application: the route's template is found, the handler can be replaced."""
    assert check.check()[name] == []


def test_starlette_s_functions_around_handlers() -> None:
    """A function's route calls it through a function made by one of these, which close over it."""
    from starlette import routing

    for make in (routing.request_response, routing.websocket_session):
        made: Any = make(lambda request: None)  # type: ignore[arg-type,return-value]
        assert made.__module__ == "starlette.routing"
        assert made.__qualname__ == f"{make.__name__}.<locals>.app"


def test_starlette_s_stack() -> None:
    """Middleware keeps what it wraps in `app`; the stack is built by a method, and kept in an attribute."""
    from starlette.applications import Starlette

    from tracemw.adapting import layers

    app = Starlette()
    app.add_middleware(tracemw.TraceMiddleware)
    app.middleware_stack = app.build_middleware_stack()
    assert [type(layer).__name__ for layer in layers(app.middleware_stack)][:2] == [
        "ServerErrorMiddleware",
        "TraceMiddleware",
    ]
    assert any(layer is app.router for layer in layers(app.middleware_stack))


@pytest.mark.skipif(FASTAPI < (0, 142), reason="telemetry of its own came with 0.142")
def test_fastapi_s_telemetry() -> None:
    """Its settings tell whether it has a provider of its own; its scope key names the span."""
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    app: Any = FastAPI(telemetry={"tracer_provider": provider})
    assert app._telemetry["tracing"] is True
    assert app._telemetry["tracer_provider"] is provider
    seen: dict[str, Any] = {}

    async def handler() -> None:
        from opentelemetry import trace

        seen["current"] = trace.get_current_span()

    app.get("/")(handler)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async def telling(message: Any) -> None:
            seen["span"] = scope["fastapi.telemetry"].span
            await send(message)

        await app(scope, receive, telling)

    get(outer, "/")
    names = [seen["span"].name, seen["current"].name]
    assert names == ["GET /", "fastapi.endpoint"]
    assert seen["span"].instrumentation_scope.name == "fastapi"


@pytest.mark.skipif(STARLETTE < (1, 10), reason="telemetry of its own came later")
def test_starlette_s_telemetry() -> None:
    """It is in this module, wraps `app`, and marks the scope while it has a span open."""
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("starlette.opentelemetry"))

    middleware = OpenTelemetryMiddleware(app)
    assert type(middleware).__module__ == "starlette.middleware.opentelemetry"
    assert middleware.app is app
    get(middleware, "/")
    assert seen == [True]


def test_flask_s_tables() -> None:
    """Functions around views are in dictionaries of lists, error handlers in dictionaries of dictionaries."""
    flask = pytest.importorskip("flask")
    app = flask.Flask("app")

    def function() -> None:
        pass

    app.before_request(function)
    app.after_request(function)
    app.teardown_request(function)
    app.errorhandler(LookupError)(function)
    app.get("/", endpoint="view")(function)
    tables = (app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs)
    assert all(table == {None: [function]} for table in tables)
    assert app.error_handler_spec[None][None] == {LookupError: function}
    assert app.view_functions["view"] is function


def test_werkzeug_s_match() -> None:
    """The third positional argument of `match` asks for the rule."""
    routing = pytest.importorskip("werkzeug.routing")
    names = list(inspect.signature(routing.MapAdapter.match).parameters)
    assert names[:4] == ["self", "path_info", "method", "return_rule"]


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was logged before: messages are logged once a minute."""
    monkeypatch.setattr(guard, "_last_logged", {})


@pytest.mark.usefixtures("silence")
@pytest.mark.skipif(not FASTAPI, reason="not installed")
def test_fastapi_without_what_we_replace(
    captured_traces: CapturedTraces, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is traced by its name; what is missing is logged, counted, and shown by the check."""
    from fastapi import FastAPI
    from fastapi.routing import APIRoute

    app = FastAPI()

    @tracemw.trace
    @app.get("/items/{number}")
    async def handler(number: int) -> int:
        return number

    (route,) = [route for route in app.routes if isinstance(route, APIRoute)]
    monkeypatch.setattr(route, "dependant", None)
    before = tracemw.stats()["failures"].get("FastAPIAdapter.prepare", 0)
    with caplog.at_level(logging.ERROR, "tracemw"):
        for _ in range(2):
            assert get(tracemw.TraceMiddleware(app), "/items/1").body == b"1"
    assert trees(captured_traces) == [{"GET /items/{number}": {}}] * 2
    assert tracemw.stats()["failures"]["FastAPIAdapter.prepare"] > before
    assert len([record for record in caplog.records if "FastAPIAdapter.prepare" in record.getMessage()]) == 1


@pytest.mark.usefixtures("silence")
def test_starlette_without_what_we_replace(
    captured_traces: CapturedTraces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers made in another way than we know are left alone, and the check says so."""
    from starlette import routing
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse

    import tracemw.adapters.starlette

    known = routing.request_response

    def request_response(function: Any) -> Any:
        inner = known(function)

        async def moved(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)

        return moved

    monkeypatch.setattr(routing, "request_response", request_response)
    assert check.check()["starlette"] == [check.NO_HANDLER]
    assert f"starlette: {check.NO_HANDLER}" in examine("memory:").problems

    def handler(request: Any) -> Any:
        return PlainTextResponse("hello")

    app = tracemw.instrument(Starlette(routes=[routing.Route("/{name}", handler)]))
    tracemw.trace(handler)
    assert get(app, "/x").body == b"hello"
    assert trees(captured_traces) == [{"GET /{name}": {}}]


@pytest.mark.usefixtures("silence")
@pytest.mark.skipif(not FLASK, reason="not installed")
def test_flask_without_what_we_read(captured_traces: CapturedTraces, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is neither current nor in the environ has no name; the check says so, and of tables, too."""
    from flask import Flask, Request
    from werkzeug.local import LocalProxy

    class Shallow(Request):
        def __init__(self, environ: Any) -> None:
            super().__init__(environ, populate_request=False)

    class Moved(Flask):
        request_class = Shallow
        view_functions = property(lambda self: self.moved, lambda self, value: setattr(self, "moved", value))

    monkeypatch.setattr("flask.Flask", Moved)
    monkeypatch.setattr("tracemw.adapters.flask.request", LocalProxy(ContextVar("moved")))
    assert check.check()["flask"] == [check.NO_NAME]
    monkeypatch.setattr("tracemw.adapters.flask.trace_values", None)
    assert check.check()["flask"][0].startswith("its adapter fails")
    app = Moved("app")
    app.get("/")(lambda: "hello")
    tracemw.instrument(app)
    assert wsgi_get(app, "/") == (200, b"hello")
    assert trees(captured_traces) == [{"GET": {}}]
    assert tracemw.stats()["failures"]["FlaskAdapter.prepare"] >= 1
