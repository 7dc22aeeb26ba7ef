"""Whether the installed frameworks still are as the adapters know them: one request to a tiny application each.

`tracemw doctor` shows the result; the tests run it with every version that is claimed.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from typing import Any, Final

from tracemw import stamps
from tracemw.record import TraceRecord, with_record

NO_NAME: Final = "the route's template is not found: traces are named by their method alone"
NO_HANDLER: Final = "@tracemw.trace above a route decorator makes no span: put it below"


def check() -> dict[str, list[str]]:
    """Return what no longer works, by framework; only frameworks that are installed are in it."""
    found = {}
    for name, look in CHECKS.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        try:
            found[name] = look()
        except Exception as exc:
            found[name] = [f"its adapter fails: {type(exc).__name__}: {exc}"]
    return found


class Probe:
    """A handler, and what is to be called in its stead if decorators may stand in any order."""

    def __init__(self, handler: Callable[..., Any], traced: Callable[..., Any]) -> None:
        self.handler = handler
        self.traced = traced

    def lookup(self, fn: Any) -> Any:
        """Give the traced form of the handler, as `@trace` would."""
        return self.traced if fn is self.handler else None

    def problems(self, adapter: Any, carrier: Any, expected: str, request: Callable[[], str]) -> list[str]:
        """Prepare an application, send a request, and look at its name and at who answered."""
        stamps.lookups.append(self.lookup)
        try:
            adapter.prepare()
        finally:
            stamps.lookups.remove(self.lookup)
        answer = request()
        problems = [] if adapter.route(carrier) == expected else [NO_NAME]
        return problems if answer == "traced" else [*problems, NO_HANDLER]


def check_starlette() -> list[str]:
    """Check a route with middleware below a mount."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route

    from tracemw.adapters.starlette import make

    async def plain(request: Any) -> Any:
        return PlainTextResponse("plain")

    async def traced(request: Any) -> Any:
        return PlainTextResponse("traced")

    route = Route("/b/{c}", plain, middleware=[Middleware(_Passing)])
    app = Starlette(routes=[Mount("/a", routes=[route])])
    scope = _scope("/a/b/1")
    return Probe(plain, traced).problems(make(app), scope, "/a/b/{c}", lambda: _ask(app, scope))


def check_fastapi() -> list[str]:
    """Check a route of a router in a router, which is included twice."""
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import PlainTextResponse

    from tracemw.adapters.fastapi import make

    async def plain(c: str) -> str:
        return "plain"

    async def traced(c: str) -> str:
        return "traced"

    inner, outer, app = APIRouter(), APIRouter(), FastAPI()
    inner.get("/{c}", response_class=PlainTextResponse)(plain)
    outer.include_router(inner, prefix="/b")
    app.include_router(outer, prefix="/z")
    app.include_router(outer, prefix="/a")
    scope = _scope("/a/b/1")
    return Probe(plain, traced).problems(make(app), scope, "/a/b/{c}", lambda: _ask(app, scope))


def check_flask() -> list[str]:
    """Check a view of a blueprint."""
    from flask import Blueprint, Flask

    from tracemw.adapters.flask import make

    app, blueprint = Flask("tracemw-check"), Blueprint("a", "a")
    known: dict[str, Any] = {}
    adapter = make(app)

    def plain(c: str) -> str:
        known["route"] = adapter.route(environ)
        return "plain"

    def traced(c: str) -> str:
        plain(c)
        return "traced"

    blueprint.get("/b/<c>")(plain)
    app.register_blueprint(blueprint, url_prefix="/a")
    environ = _environ("/a/b/1")
    problems = Probe(plain, traced).problems(adapter, environ, "", lambda: _ask_wsgi(app, environ))
    without_name = [problem for problem in problems if problem != NO_NAME]
    return without_name if known.get("route") == "/a/b/<c>" else [NO_NAME, *without_name]


def check_werkzeug() -> list[str]:
    """Check an endpoint that is a function."""
    from opentelemetry import context as otel_context
    from opentelemetry.context import Context
    from werkzeug.routing import Map, Rule
    from werkzeug.wrappers import Response

    from tracemw.adapters.werkzeug import make
    from tracemw.request import KEY

    def plain(c: str) -> str:
        return "plain"

    def traced(c: str) -> str:
        return "traced"

    url_map = Map([Rule("/a/<c>", endpoint=plain)])

    def app(environ: Any, start_response: Any) -> Any:
        endpoint, values = url_map.bind_to_environ(environ).match()
        return Response(endpoint(**values))(environ, start_response)

    probe, environ, record = Probe(plain, traced), _environ("/a/1"), TraceRecord(1, 1, recording=False)
    environ[KEY] = _Request(record)

    def ask() -> str:
        stamps.lookups.append(probe.lookup)  # such endpoints are looked up when they are called
        token = otel_context.attach(with_record(Context(), record))
        try:
            return _ask_wsgi(app, environ)
        finally:
            otel_context.detach(token)
            stamps.lookups.remove(probe.lookup)

    return probe.problems(make(app), environ, "/a/<c>", ask)


CHECKS: Final[dict[str, Callable[[], list[str]]]] = {
    "fastapi": check_fastapi,
    "starlette": check_starlette,
    "flask": check_flask,
    "werkzeug": check_werkzeug,
}


class _Request:
    """As much of a request's trace as an adapter looks at."""

    def __init__(self, record: TraceRecord) -> None:
        self.record = record


class _Passing:
    """ASGI middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        "client": None,
        "server": None,
        "fastapi.telemetry": None,
    }


def _ask(app: Any, scope: dict[str, Any]) -> str:
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        parts.append(message.get("body", b""))

    asyncio.run(app(scope, receive, send))
    return b"".join(parts).decode()


def _environ(path: str) -> dict[str, Any]:
    from wsgiref.util import setup_testing_defaults

    environ: dict[str, Any] = {"PATH_INFO": path, "SCRIPT_NAME": ""}
    setup_testing_defaults(environ)
    return environ


def _ask_wsgi(app: Any, environ: dict[str, Any]) -> str:
    body = app(environ, lambda status, headers, exc_info=None: None)
    return b"".join(body).decode()
