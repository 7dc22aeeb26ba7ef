"""Starlette: handlers of every kind, names, users; the tree is the same wherever `@trace` stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette")
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    BaseUser,
    SimpleUser,
    UnauthenticatedUser,
)
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

import tracemw
from tests.adapters.trees import exceptions, get, root, trees
from tests.request.drive import Conversation, websocket_scope
from tracemw.testing import CapturedTraces

traced = tracemw.trace(name="handler")


class Passing:
    """ASGI middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on."""
        await self.app(scope, receive, send)


class Hiding:
    """ASGI middleware that does not tell what it wraps."""

    __slots__ = ("_call",)

    def __init__(self, app: Any) -> None:
        self._call = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on."""
        await self._call(scope, receive, send)


def hello(request: Request) -> Response:
    """The smallest handler."""
    return PlainTextResponse("hello")


def serve(*routes: Any, **options: Any) -> Any:
    """An application with our middleware."""
    return tracemw.instrument(Starlette(routes=list(routes), **options))


@pytest.fixture(params=["trace above", "trace below"])
def trace_route(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Make a route of a handler that is traced before or after that."""

    def make(kind: Callable[..., Any], path: str, handler: Any, **options: Any) -> Any:
        if request.param == "trace below":
            return kind(path, traced(handler), **options)
        route = kind(path, handler, **options)
        traced(handler)
        return route

    return make


def connect(app: Any, path: str) -> Conversation:
    """Open a WebSocket and leave after one message."""
    messages: list[Any] = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "1"},
        {"type": "websocket.disconnect", "code": 1000},
    ]
    conversation = Conversation(messages)
    asyncio.run(app(websocket_scope(path), conversation.receive, conversation.send))
    return conversation


def test_routes_with_middleware(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """Middleware of a route stands between the route and its handler, that of a mount around its routes."""

    async def handler(request: Request) -> Response:
        return PlainTextResponse("hello")

    wrapped = [Middleware(Passing), Middleware(Passing)]
    app = serve(
        trace_route(Route, "/a", handler, middleware=wrapped),
        Mount("/m", routes=[trace_route(Route, "/b", handler)], middleware=wrapped),
    )
    for path in ("/a", "/m/b"):
        assert get(app, path).body == b"hello"
    assert trees(captured_traces) == [{"GET /a": {"handler": {}}}, {"GET /m/b": {"handler": {}}}]


def test_a_route_that_hides_its_handler(captured_traces: CapturedTraces) -> None:
    """Where the handler cannot be reached the request is traced without it, and that is said."""

    def handler(request: Request) -> Response:
        return PlainTextResponse("hello")

    app = serve(Route("/", handler, middleware=[Middleware(Hiding)]))
    traced(handler)
    before = tracemw.stats()["failures"].get("StarletteAdapter.prepare", 0)
    assert get(app, "/").body == get(app, "/").body == b"hello"
    assert trees(captured_traces) == [{"GET /": {}}] * 2
    assert tracemw.stats()["failures"]["StarletteAdapter.prepare"] > before


def test_class_based_views(captured_traces: CapturedTraces) -> None:
    """Methods of endpoints are traced where they are defined."""

    class Item(HTTPEndpoint):
        @tracemw.trace
        async def get(self, request: Request) -> Response:
            return JSONResponse(request.path_params)

        @tracemw.trace
        def post(self, request: Request) -> Response:
            return JSONResponse({})

    class Echo(WebSocketEndpoint):
        encoding = "text"

        @tracemw.trace
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await websocket.send_text(data)

    app = serve(Route("/items/{number:int}", Item), WebSocketRoute("/echo", Echo))
    get(app, "/items/1")
    get(app, "/items/1", "POST")
    connect(app, "/echo")
    assert trees(captured_traces) == [
        {"GET /items/{number}": {"get": {}}},
        {"POST /items/{number}": {"post": {}}},
        {"WS /echo": {"on_receive": {}}},
    ]


def test_websockets(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """A WebSocket's handler has a span for the whole connection."""

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        with tracemw.start_span("message"):
            await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    connect(serve(trace_route(WebSocketRoute, "/echo/{room}", echo)), "/echo/1")
    assert trees(captured_traces) == [{"WS /echo/{room}": {"handler": {"message": {}}}}]


def test_what_is_added_while_serving(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """A new route is known with its first request."""

    def handler(request: Request) -> Response:
        return PlainTextResponse("hello")

    app = serve()
    get(app, "/late")
    app.router.routes.append(trace_route(Route, "/late", handler))
    get(app, "/late")
    assert trees(captured_traces) == [{"GET": {}}, {"GET /late": {"handler": {}}}]


def test_a_stream(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """A traced generator that makes the body is a child of the root, and the output that is shown."""

    @tracemw.trace
    async def parts() -> Any:
        yield "a"
        yield "b"

    async def handler(request: Request) -> Response:
        return StreamingResponse(parts())

    app = serve(trace_route(Route, "/", handler))
    assert get(app, "/").body == b"ab"
    (trace,) = captured_traces
    assert trees([trace]) == [{"GET /": {"handler": {}, "parts": {}}}]
    assert trace.info.response_preview == '["a", "b"]'


@pytest.mark.parametrize(
    ("path", "root_path", "host", "name"),
    [
        ("/", "", "", "GET /"),
        ("/items/1", "", "", "GET /items/{id}"),
        ("/items/1", "/api/", "", "GET /api/items/{id}"),
        ("/api/items/1", "/api", "", "GET /api/items/{id}"),
        ("/sub/x/1", "", "", "GET /sub/x/{id}"),
        ("/api/sub/x/1", "/api", "", "GET /api/sub/x/{id}"),
        ("/acme/t/x/1", "", "", "GET /{tenant}/t/x/{id}"),
        ("/acme/t/same/1", "", "", "GET /{tenant}/t/same/{id}"),
        ("/acme/t/alike/1", "", "", "GET /{tenant}/t/alike/{number}"),
        ("/sub/alike/1", "", "", "GET /sub/alike/{number}"),
        ("/a/b/deep/1", "", "", "GET /a/b/deep/{number}"),
        ("/deep/1", "", "api.example.com", "GET /deep/{number}"),
        ("/static/style.css", "", "", "GET /static/{path}"),
        ("/nothing", "", "", "GET"),
        ("/sub/nothing", "", "", "GET"),
        ("/a/b/nothing", "", "", "GET"),
    ],
)
def test_names(
    captured_traces: CapturedTraces, tmp_path: Any, path: str, root_path: str, host: str, name: str
) -> None:
    """The name is what the router has chosen, also where one handler or application is there twice."""
    (tmp_path / "style.css").write_text("")

    def same(request: Request) -> Response:
        return PlainTextResponse("same")

    sub = Starlette(
        routes=[Route("/x/{id}", hello), Route("/same/{id}", same), Route("/alike/{number:int}", same)]
    )
    deep = Router([Route("/deep/{number:int}", hello)])
    app = serve(
        Host("api.example.com", app=deep),
        Route("/", same),
        Route("/items/{id}", hello),
        Mount("/static", StaticFiles(directory=tmp_path)),
        Mount("/sub", sub),
        Mount("/a", routes=[Mount("/b", deep)]),
        Mount("/{tenant}/t", Passing(sub)),
    )
    get(app, path, root_path=root_path, headers=[(b"host", host.encode() or b"example.com")])
    assert list(trees(captured_traces)[0]) == [name]


def test_a_router_is_an_application_too(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """A router without application around it."""
    app = tracemw.instrument(Router([trace_route(Route, "/x/{id}", lambda request: PlainTextResponse("x"))]))
    assert get(app, "/x/1").body == b"x"
    assert trees(captured_traces) == [{"GET /x/{id}": {"handler": {}}}]


def test_applications_behind_a_function(captured_traces: CapturedTraces, trace_route: Callable[..., Any]) -> None:
    """A dispatcher of the user's own, traced from outside, gives each application a scope of its own."""

    def handler(request: Request) -> Response:
        return PlainTextResponse("hello")

    apps = {"a": Starlette(routes=[trace_route(Route, "/x/{id}", handler)]), "b": Starlette()}

    async def dispatch(scope: Any, receive: Any, send: Any) -> None:
        name = scope["path"].split("/")[1]
        await apps[name]({**scope, "root_path": f"/{name}"}, receive, send)

    get(tracemw.TraceMiddleware(Passing(dispatch)), "/a/x/1")
    assert trees(captured_traces) == [{"GET /a/x/{id}": {"handler": {}}}]


def test_exceptions_that_become_responses(
    captured_traces: CapturedTraces, trace_route: Callable[..., Any]
) -> None:
    """They are recorded on the handler's span, and on the root only where the answer is a 5xx."""

    async def handler(request: Request) -> Response:
        raise {"lookup": LookupError, "value": ValueError, "bug": TypeError}[request.path_params["name"]]("no")

    async def refuse(request: Request, exc: Exception) -> Response:
        return PlainTextResponse("", 409)

    def break_down(request: Request, exc: Exception) -> Response:
        return PlainTextResponse("", 500)

    handlers = {LookupError: refuse, ValueError: break_down}
    app = serve(trace_route(Route, "/{name}", handler), exception_handlers=handlers)
    for name in ("lookup", "value", "bug"):
        get(app, f"/{name}")
    lookup, value, bug = captured_traces
    assert [trace.info.state for trace in captured_traces] == ["OK", "ERROR", "ERROR"]
    assert exceptions(lookup) == {"handler": 1}
    assert exceptions(value) == exceptions(bug) == {"handler": 1, "GET /{name}": 1}
    assert root(value).attributes["error.type"] == "ValueError"


class Named(BaseUser):
    """A user with an id."""

    is_authenticated = True
    display_name = "Jane"
    identity = "user-7"


@pytest.mark.parametrize(
    ("user", "known"),
    [(Named(), "user-7"), (SimpleUser("jane"), "jane"), (UnauthenticatedUser(), "claimed"), (None, "claimed")],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_authenticated_user_wins_over_the_header(
    captured_traces: CapturedTraces, user: Any, known: str, first: bool
) -> None:
    """Whom Starlette has authenticated is the trace's user, wherever our middleware stands; else the header's."""

    class Backend(AuthenticationBackend):
        async def authenticate(self, conn: Any) -> Any:
            return None if user is None else (AuthCredentials(), user)

    app: Any = Starlette(routes=[Route("/", hello)])
    authentication = (AuthenticationMiddleware, {"backend": Backend()})
    ours: Any = (tracemw.TraceMiddleware, {})
    for middleware, options in (ours, authentication) if first else (authentication, ours):
        app.add_middleware(middleware, **options)
    get(app, "/", headers=[(b"x-user-id", b"claimed")])
    (trace,) = captured_traces
    assert trace.info.trace_metadata["mlflow.trace.user"] == known


def test_installing_twice_or_late(captured_traces: CapturedTraces) -> None:
    """`instrument` does it once, and can do it when the application is serving already."""
    app = Starlette(routes=[Route("/x/{id}", hello)])
    get(app, "/x/1")
    assert tracemw.instrument(tracemw.instrument(app)) is app
    get(app, "/x/1")
    assert trees(captured_traces) == [{"GET /x/{id}": {}}]


@pytest.mark.parametrize("place", ["application", "mount", "route"])
def test_a_part_that_is_traced_alone(captured_traces: CapturedTraces, place: str) -> None:
    """Middleware around a mounted application, or of a mount or a route, traces that part, with the whole name."""
    ours = [Middleware(tracemw.TraceMiddleware)]
    if place == "application":
        part: Any = Mount("/{tenant}", tracemw.TraceMiddleware(Starlette(routes=[Route("/x/{id}", hello)])))
    elif place == "mount":
        part = Mount("/{tenant}", routes=[Route("/x/{id}", hello)], middleware=ours)
    else:
        part = Mount("/{tenant}", routes=[Route("/x/{id}", hello, middleware=ours)])
    app = Starlette(routes=[Route("/other", hello), part])
    for path in ("/other", "/acme/x/1", "/other", "/acme/x/1"):
        assert get(app, path).body == b"hello"
    assert trees(captured_traces) == [{"GET /{tenant}/x/{id}": {}}] * 2


def test_a_stack_with_middleware_that_has_no_attributes(captured_traces: CapturedTraces) -> None:
    """What our adapter cannot look into is left as it is."""
    app = serve(Route("/x/{id}", hello), middleware=[Middleware(Hiding)])
    before = tracemw.stats()["failures"]
    get(app, "/x/1")
    assert trees(captured_traces) == [{"GET /x/{id}": {}}]
    assert tracemw.stats()["failures"] == before


@pytest.mark.parametrize("order", ["inside", "outside", "around"])
def test_middleware_that_hands_on_another_scope(
    captured_traces: CapturedTraces, trace_route: Callable[..., Any], order: str
) -> None:
    """As the specification recommends it. The route is known all the same, wherever our middleware stands."""

    class Copying:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope, "copied": True}, receive, send)

    def handler(request: Request) -> Response:
        return PlainTextResponse(str(request.scope["copied"]))

    app: Any = Starlette(routes=[Mount("/{tenant}", routes=[trace_route(Route, "/x/{id}", handler)])])
    ours: Any = tracemw.TraceMiddleware
    for middleware in {"inside": [Copying, ours], "outside": [ours, Copying], "around": [Copying]}[order]:
        app.add_middleware(middleware)
    site = ours(app) if order == "around" else app
    for _ in range(2):
        assert get(site, "/acme/x/1").body == b"True"
    assert trees(captured_traces) == [{"GET /{tenant}/x/{id}": {"handler": {}}}] * 2


@pytest.mark.usefixtures("captured_traces")
def test_known_middleware_costs_nothing_more() -> None:
    """Only where somebody else's middleware may make a new scope, the router's is looked at."""
    from starlette.middleware.gzip import GZipMiddleware

    from tracemw.adapters.starlette import Seen
    from tracemw.adapting import layers

    def seen(*middleware: Any) -> int:
        app: Any = tracemw.instrument(Starlette(routes=[Route("/", hello)]))
        for one in middleware:
            app.add_middleware(one)
        get(app, "/")
        get(app, "/")
        return sum(isinstance(layer, Seen) for layer in layers(app.middleware_stack))

    assert (seen(), seen(GZipMiddleware), seen(Passing)) == (0, 0, 1)
