"""One handler in each framework, made of decorators in a given order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tracemw
from tests.adapters.decorators import OTHERS
from tests.request.drive import http_scope

ATTRIBUTES = {"team": "search"}
trace = tracemw.trace(name="handler", span_type="AGENT", attributes=ATTRIBUTES)


def handler(kind: str) -> Callable[..., Any]:
    """Make a handler, a closure; each one has one span inside."""
    factor = 10

    def work(number: int) -> str:
        with tracemw.start_span("inside"):
            return str(number * factor)

    def function(number: int) -> Any:
        return {"answer": work(number)}

    async def coroutine(number: int) -> Any:
        return {"answer": work(number)}

    def generator(number: int) -> Any:
        yield work(number)
        yield "end"

    async def async_generator(number: int) -> Any:
        yield work(number)
        yield "end"

    async def stream(number: int) -> Any:
        return generator(number)

    return {
        "sync": function,
        "async": coroutine,
        "generator": generator,
        "async generator": async_generator,
        "async stream": stream,
    }[kind]


def decorated(kind: str, route: Callable[..., Any], order: Sequence[str]) -> Any:
    """Put decorators on a handler, the last one named first."""
    made: Any = handler(kind)
    for name in reversed(order):
        made = _decorators(route)[name](made)
    return made


def _decorators(route: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"route": route, "trace": trace, **OTHERS}


class Site:
    """An application with a handler that answers `GET /items/{number}`.

    Attributes:
        app: What a server would call.
        root: The name that the root of a request to the handler has.
    """

    def __init__(self, app: Any, root: str, protocol: str = "asgi") -> None:
        self.app = app
        self.root = root
        self.protocol = protocol

    def get(self, path: str = "/items/7") -> tuple[int, bytes]:
        """Send one request and return status and body."""
        if self.protocol == "asgi":
            from tests.request.drive import ask

            answer = ask(self.app, http_scope(path))
            return answer.status, answer.body
        from werkzeug.test import Client

        response = Client(self.app).get(path)
        try:
            return response.status_code, response.get_data()
        finally:
            response.close()


def fastapi_site(kind: str, order: Sequence[str], place: str = "app") -> Site:
    """FastAPI, the route on the application or on a router included in another one."""
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)
    options: dict[str, Any] = {"response_class": StreamingResponse} if "generator" in kind else {}
    if place == "app":
        decorated(kind, app.get("/items/{number}", **options), order)
        return Site(app, "GET /items/{number}")
    inner, outer = APIRouter(prefix="/items"), APIRouter()
    outer.include_router(inner)
    decorated(kind, inner.get("/{number}", **options), order)
    outer.include_router(inner, prefix="/v1")
    app.include_router(outer, prefix="/api")
    return Site(app, "GET /api/v1/items/{number}")


def starlette_site(kind: str, order: Sequence[str]) -> Site:
    """Starlette, whose handlers get a request and give a response."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse

    app = Starlette()

    def route(fn: Callable[..., Any]) -> Callable[..., Any]:
        app.add_route("/items/{number}", fn)
        return fn

    def responding(fn: Callable[..., Any]) -> Callable[..., Any]:
        """Adapt our handlers to Starlette's, below all other decorators."""
        if kind == "async":

            async def coroutine(request: Any) -> Any:
                return JSONResponse(await fn(int(request.path_params["number"])))

            return coroutine

        def function(request: Any) -> Any:
            return JSONResponse(fn(int(request.path_params["number"])))

        return function

    made: Any = responding(handler(kind))
    for name in reversed(order):
        made = _decorators(route)[name](made)
    return Site(tracemw.TraceMiddleware(app), "GET /items/{number}")


def flask_site(kind: str, order: Sequence[str], place: str = "app") -> Site:
    """Flask, the view on the application or on a blueprint in another one."""
    from flask import Blueprint, Flask

    app = Flask("site")
    inner, outer = Blueprint("inner", "inner"), Blueprint("outer", "outer")
    target: Any = app if place == "app" else inner
    decorated(kind, target.get("/items/<int:number>"), order)
    if place != "app":
        outer.register_blueprint(inner, url_prefix="/v1")
        app.register_blueprint(outer, url_prefix="/api")
    tracemw.instrument(app)
    prefix = "" if place == "app" else "/api/v1"
    return Site(app, f"GET {prefix}/items/<int:number>", "wsgi")


def werkzeug_site(kind: str, order: Sequence[str], place: str = "name") -> Site:
    """Werkzeug, endpoints being names in a dictionary or the handlers themselves."""
    from werkzeug.routing import Map, Rule
    from werkzeug.wrappers import Request, Response

    url_map, views = Map(), {}

    def expose(fn: Callable[..., Any]) -> Callable[..., Any]:
        views["item"] = fn
        url_map.add(Rule("/items/<int:number>", endpoint="item" if place == "name" else fn))
        return fn

    decorated(kind, expose, order)

    @Request.application
    def application(request: Request) -> Response:
        endpoint, values = url_map.bind_to_environ(request.environ).match()
        view = endpoint if callable(endpoint) else views[endpoint]
        answer = view(**values)
        return Response(answer if kind == "generator" else str(answer))

    return Site(tracemw.WSGITraceMiddleware(application), "GET /items/<int:number>", "wsgi")
