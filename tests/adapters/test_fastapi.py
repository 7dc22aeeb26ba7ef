"""FastAPI: handlers of every kind, names, exceptions; the tree is the same wherever `@trace` stands."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute

import tracemw
from tests.adapters.trees import exceptions, get, root, tree, trees
from tests.adapters.versions import FASTAPI, streams_generators
from tests.request.drive import Conversation, http_scope, websocket_scope
from tracemw.testing import CapturedTraces

Decorator = Callable[[Any], Any]
traced = tracemw.trace(name="handler")


def both(route: Decorator, order: str) -> Decorator:
    """A route decorator and `@trace`, in either order."""
    return (lambda fn: traced(route(fn))) if order == "trace above" else (lambda fn: route(traced(fn)))


@pytest.fixture(params=["trace above", "trace below"])
def order(request: pytest.FixtureRequest) -> str:
    """Both orders of the two decorators."""
    return str(request.param)


@pytest.fixture
def app() -> FastAPI:
    """An application with our middleware."""
    return tracemw.instrument(FastAPI())


def test_the_guide(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """The example of MLflow's guide, a closure here, with the two decorators in either order."""

    @both(app.get("/chat"), order)
    def chat(request: Request, message: str = "hi") -> dict[str, str]:
        tracemw.update_current_trace(metadata={"mlflow.trace.session": request.headers["x-session-id"]})
        return {"response": message}

    get(app, "/chat", headers=[(b"x-session-id", b"s-9")])
    (trace,) = captured_traces
    assert tree(trace) == {"GET /chat": {"handler": {}}}
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s-9"
    assert trace.data.spans[1].outputs == {"response": "hi"}


def test_methods_and_objects(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Bound methods, traced before or after they were registered, and objects that can be called."""

    class Views:
        def item(self, number: int) -> int:
            return number

        def __call__(self, number: int) -> int:
            return number

    views = Views()
    both(app.get("/method/{number}"), order)(views.item)
    both(app.get("/object/{number}"), order)(views)
    for path in ("/method/1", "/object/1"):
        assert get(app, path).body == b"1"
    assert trees(captured_traces) == [
        {"GET /method/{number}": {"handler": {}}},
        {"GET /object/{number}": {"handler": {}}},
    ]


def test_a_handler_that_closes_over_a_traced_helper(app: FastAPI, captured_traces: CapturedTraces) -> None:
    """What a handler calls is no decorated function of its: both have a span, the helper's is below."""

    @tracemw.trace
    def helper() -> int:
        return 1

    @app.get("/plain")
    def plain() -> int:
        return helper()

    @tracemw.trace
    @app.get("/traced")
    def handler() -> int:
        return helper() + plain()

    get(app, "/traced")
    get(app, "/plain")
    assert trees(captured_traces) == [
        {"GET /traced": {"handler": {"helper_1": {}, "helper_2": {}}}},
        {"GET /plain": {"helper": {}}},
    ]


def test_one_function_on_several_routes(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Each route has its own name and one handler span."""
    both(lambda fn: app.get("/a/{number}")(app.get("/b/{number}")(app.post("/a/{number}")(fn))), order)(
        lambda number: number
    )
    for method, path in (("GET", "/a/1"), ("GET", "/b/1"), ("POST", "/a/1")):
        get(app, path, method)
    assert [list(t.items())[0] for t in trees(captured_traces)] == [
        ("GET /a/{number}", {"handler": {}}),
        ("GET /b/{number}", {"handler": {}}),
        ("POST /a/{number}", {"handler": {}}),
    ]


def test_calling_a_handler_directly_makes_one_span(
    app: FastAPI, captured_traces: CapturedTraces, order: str
) -> None:
    """From Python, as from a request."""

    @both(app.get("/"), order)
    def handler() -> int:
        return 1

    get(app, "/")
    assert handler() == 1
    assert trees(captured_traces) == [{"GET /": {"handler": {}}}, {"handler": {}}]


def test_routers_in_routers(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """All prefixes are in the name, for HTTP and WebSocket, also where a router is included twice."""
    inner, outer = APIRouter(prefix="/items"), APIRouter(prefix="/shop")
    both(inner.get("/{number}"), order)(lambda number: number)

    @both(inner.websocket("/{number}/live"), order)
    async def live(websocket: WebSocket, number: int) -> None:
        await websocket.accept()
        await websocket.close()

    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")
    app.include_router(outer, prefix="/v2")
    get(app, "/v1/shop/items/1")
    get(app, "/v2/shop/items/1")
    connect(app, "/v2/shop/items/1/live")
    assert trees(captured_traces) == [
        {"GET /v1/shop/items/{number}": {"handler": {}}},
        {"GET /v2/shop/items/{number}": {"handler": {}}},
        {"WS /v2/shop/items/{number}/live": {"handler": {}}},
    ]


def connect(app: Any, path: str) -> Conversation:
    """Open a WebSocket, which the application closes."""
    conversation = Conversation([{"type": "websocket.connect"}])
    asyncio.run(app(websocket_scope(path), conversation.receive, conversation.send))
    return conversation


def test_what_is_added_while_serving(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Handlers, routers and routers in routers that come after the first request."""
    inner, outer = APIRouter(), APIRouter()
    app.include_router(outer, prefix="/outer")
    get(app, "/nothing")
    both(app.get("/late"), order)(lambda: 1)
    get(app, "/late")
    both(inner.get("/later"), order)(lambda: 1)
    outer.include_router(inner, prefix="/inner")
    app.include_router(inner, prefix="/again")
    get(app, "/again/later")
    expected = [{"GET": {}}, {"GET /late": {"handler": {}}}, {"GET /again/later": {"handler": {}}}]
    if FASTAPI >= (0, 137):  # older ones copy the routes when a router is included
        get(app, "/outer/inner/later")
        expected.append({"GET /outer/inner/later": {"handler": {}}})
    assert trees(captured_traces) == expected


def test_a_factory_that_runs_again(captured_traces: CapturedTraces, order: str) -> None:
    """Each application that a factory makes has its own handlers, all of the same code."""

    def create() -> FastAPI:
        made = tracemw.instrument(FastAPI())
        both(made.get("/"), order)(lambda: 1)
        return made

    first = create()
    get(first, "/")
    get(create(), "/")
    get(first, "/")
    assert trees(captured_traces) == [{"GET /": {"handler": {}}}] * 3


def test_dependencies(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Traced dependencies, those with `yield`, and overridden ones have spans beside the handler's."""

    @tracemw.trace
    def user() -> str:
        return "nobody"

    @tracemw.trace
    def other() -> str:
        return "jane"

    async def session() -> AsyncIterator[str]:
        with tracemw.start_span("session"):
            yield "s"

    @both(app.get("/"), order)
    def handler(name: str = Depends(user), session: str = Depends(session)) -> str:
        return name

    app.dependency_overrides[user] = other
    assert get(app, "/").body == b'"jane"'
    (trace,) = captured_traces
    spans = {span.name: span for span in trace.data.spans}
    assert set(spans) == {"GET /", "other", "session", "handler"}
    assert spans["handler"].inputs == {"name": "jane", "session": "s"}
    assert trace.info.request_preview == '{"name": "jane", "session": "s"}'


def test_openapi_is_the_same_in_both_orders() -> None:
    """The document does not tell where `@trace` stands, nor whether the application was called."""

    def document(order: str | None) -> Any:
        app = tracemw.instrument(FastAPI())
        decorate = app.post("/items/{number}") if order is None else both(app.post("/items/{number}"), order)

        @decorate
        def create(number: int, names: list[str], limit: int | None = None) -> dict[str, int]:
            """Create something."""
            return {}

        get(app, "/nothing")
        return app.openapi()

    plain = document(None)
    assert document("trace above") == plain
    assert document("trace below") == plain


def test_custom_route_class(captured_traces: CapturedTraces, order: str) -> None:
    """A route class that wraps its handler."""

    class Timed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def timed(request: Request) -> Any:
                response = await handle(request)
                response.headers["x-timed"] = "yes"
                return response

            return timed

    router = APIRouter(route_class=Timed)
    both(router.get("/"), order)(lambda: 1)
    app = tracemw.instrument(FastAPI())
    app.include_router(router, prefix="/v1")
    assert (b"x-timed", b"yes") in get(app, "/v1/").sent[0]["headers"]
    assert trees(captured_traces) == [{"GET /v1/": {"handler": {}}}]


def test_a_stream_that_a_handler_returns(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """The handler has returned when the body is made: its spans are the root's children."""

    async def body() -> AsyncIterator[bytes]:
        for part in (b"a", b"b"):
            with tracemw.start_span("part"):
                yield part

    @both(app.get("/"), order)
    async def handler() -> StreamingResponse:
        return StreamingResponse(body())

    assert get(app, "/").body == b"ab"
    assert trees(captured_traces) == [{"GET /": {"handler": {}, "part_1": {}, "part_2": {}}}]


@pytest.mark.skipif(not streams_generators(FASTAPI), reason="handlers are no generators in this version")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_handler_that_is_a_stream(
    app: FastAPI, captured_traces: CapturedTraces, order: str, asynchronous: bool
) -> None:
    """The handler's span covers the stream, and is the parent of what its code does; chunks are its output."""

    def parts() -> Iterator[dict[str, int]]:
        for number in (1, 2):
            with tracemw.start_span("part"):
                yield {"number": number}

    async def async_parts() -> AsyncIterator[dict[str, int]]:
        for part in parts():
            yield part

    both(app.get("/"), order)(async_parts if asynchronous else parts)
    assert get(app, "/").status == 200
    (trace,) = captured_traces
    assert tree(trace) == {"GET /": {"handler": {"part_1": {}, "part_2": {}}}}
    assert trace.data.spans[1].outputs == [{"number": 1}, {"number": 2}]


def test_exceptions_that_become_responses(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """They are recorded on the handler's span, and on the root only where the answer is a 5xx."""

    class Refused(Exception):
        pass

    class Broken(Exception):
        pass

    @app.exception_handler(Refused)
    def refused(request: Request, exc: Refused) -> JSONResponse:
        return JSONResponse({}, 409)

    @app.exception_handler(Broken)
    async def broken(request: Request, exc: Broken) -> JSONResponse:
        return JSONResponse({}, 503)

    raised = {"refused": Refused(), "broken": Broken("no"), "http": HTTPException(404), "bug": ValueError("bug")}

    @both(app.get("/{name}"), order)
    def handler(name: str) -> None:
        raise raised[name]

    answers = {name: get(app, f"/{name}").status for name in ("refused", "broken", "http")}
    get(app, "/bug")
    assert answers == {"refused": 409, "broken": 503, "http": 404}
    refused_, broken_, http, bug = captured_traces
    for trace, status, state in ((refused_, 409, "OK"), (http, 404, "OK"), (broken_, 503, "ERROR")):
        assert root(trace).attributes["http.response.status_code"] == status
        assert trace.info.state == state
    assert exceptions(refused_) == exceptions(http) == {"handler": 1}
    assert exceptions(broken_) == exceptions(bug) == {"handler": 1, "GET /{name}": 1}
    assert root(broken_).attributes["error.type"] == "Broken"
    assert root(bug).attributes["error.type"] == "ValueError"


def test_http_exception_of_an_untraced_handler(app: FastAPI, captured_traces: CapturedTraces) -> None:
    """Without a span for the handler the status tells."""

    @app.get("/")
    def handler() -> None:
        raise HTTPException(503)

    get(app, "/")
    (trace,) = captured_traces
    assert (trace.info.state, root(trace).attributes["error.type"]) == ("ERROR", "503")


def test_background_tasks_are_in_the_trace(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """A traced background task is a span of the trace, after the root has ended."""

    @tracemw.trace
    def task() -> None:
        pass

    @both(app.get("/"), order)
    def handler(tasks: BackgroundTasks) -> int:
        tasks.add_task(task)
        return 1

    get(app, "/")
    assert trees(captured_traces) == [{"GET /": {"handler": {}, "task": {}}}]


@pytest.mark.parametrize(
    ("path", "root_path", "name"),
    [
        ("/items/1", "", "GET /items/{number}"),
        ("/items/1", "/api", "GET /api/items/{number}"),
        ("/api/items/1", "/api", "GET /api/items/{number}"),
        ("/acme/sub/things/1", "", "GET /{tenant}/sub/things/{number}"),
        ("/files/a/b.txt", "", "GET /files/{name}"),
        ("/openapi.json", "", "GET /openapi.json"),
        ("/acme/sub/nothing", "", "GET"),
        ("/nothing", "", "GET"),
    ],
)
def test_names(captured_traces: CapturedTraces, path: str, root_path: str, name: str) -> None:
    """Templates with the root path and all mounts, once; a request without route has none."""
    app, sub = tracemw.instrument(FastAPI()), FastAPI()
    app.get("/items/{number}")(lambda number: number)
    app.get("/files/{name:path}")(lambda name: name)
    sub.get("/things/{number}")(lambda number: number)
    app.mount("/{tenant}/sub", sub)
    get(app, path, root_path=root_path)
    assert list(trees(captured_traces)[0]) == [name]


def test_other_methods(app: FastAPI, captured_traces: CapturedTraces) -> None:
    """A method that the route does not have is the route's all the same; unknown ones share a name."""
    app.get("/items/{number}")(lambda number: number)
    assert get(app, "/items/1", "DELETE").status == 405
    get(app, "/items/1", "FOO")
    assert [root(trace).name for trace in captured_traces] == ["DELETE /items/{number}", "_OTHER /items/{number}"]


def test_the_framework_s_own_answer_to_an_error_has_our_headers(app: FastAPI) -> None:
    """The middleware has put itself around what answers unhandled exceptions, once the application has started."""

    @app.get("/")
    def handler() -> None:
        raise ValueError

    start(app)
    answer = Conversation()
    with pytest.raises(ValueError):
        asyncio.run(app(http_scope("/"), answer.receive, answer.send))
    assert answer.status == 500
    assert {b"x-request-id", b"x-trace-id"} <= answer.headers.keys()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # older Starlette leaves a stream of its own open
def test_functions_around_handlers(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Exception handlers and functions of `@app.middleware` have spans; the handler's previews stay."""

    async def around(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    def refused(request: Request, exc: LookupError) -> JSONResponse:
        return JSONResponse({}, 409)

    async def broken(request: Request, exc: Exception) -> JSONResponse:
        return JSONResponse({}, 500)

    @both(app.get("/{name}"), order)
    async def handler(name: str) -> None:
        raise {"lookup": LookupError, "bug": ValueError}[name]

    for route, function in (
        (app.middleware("http"), around),
        (app.exception_handler(LookupError), refused),
        (app.exception_handler(Exception), broken),
    ):
        tracemw.trace(route(function)) if order == "trace above" else route(tracemw.trace(function))
    start(app)
    assert get(app, "/lookup").status == 409
    get(app, "/bug")
    assert trees(captured_traces) == [
        {"GET /{name}": {"around": {"handler": {}, "refused": {}}}},
        {"GET /{name}": {"around": {"handler": {}}, "broken": {}}},
    ]
    assert captured_traces[0].info.request_preview == '{"name": "lookup"}'
    gc.collect()


def start(app: Any) -> None:
    """Send the lifespan events, as a server does."""
    conversation = Conversation([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    asyncio.run(app({"type": "lifespan", "asgi": {}}, conversation.receive, conversation.send))


@pytest.mark.parametrize("instrumented", [True, False])
@pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the bridge leaves a stream of its own open
def test_flask_below_fastapi(app: FastAPI, captured_traces: CapturedTraces, instrumented: bool) -> None:
    """A WSGI application mounted below: one trace, whether it has our middleware, too; its rule is the name."""
    flask = pytest.importorskip("flask")
    from fastapi.middleware.wsgi import WSGIMiddleware

    old = flask.Flask("old")

    def handler(number: int) -> str:
        return str(number)

    tracemw.trace(old.get("/items/<int:number>")(handler))
    app.mount("/old", WSGIMiddleware(tracemw.instrument(old) if instrumented else old))
    assert get(app, "/api/old/items/7", root_path="/api").body == b"7"
    get(app, "/old/nothing")
    gc.collect()
    assert trees(captured_traces) == [{"GET /api/old/items/<int:number>": {"handler": {}}}, {"GET": {}}]


def test_a_request_inside_a_request(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """A handler that calls an application in process makes another request, with a trace of its own."""

    @both(app.get("/inner/{number}"), order)
    async def inner(number: int) -> int:
        return number

    @both(app.get("/outer"), order)
    async def outer() -> int:
        conversation = Conversation([{"type": "http.request"}])
        await app(http_scope("/inner/7"), conversation.receive, conversation.send)
        return int(conversation.body)

    assert get(app, "/outer").body == b"7"
    assert trees(captured_traces) == [{"GET /inner/{number}": {"handler": {}}}, {"GET /outer": {"handler": {}}}]


def test_unusual_callables(app: FastAPI, captured_traces: CapturedTraces, order: str) -> None:
    """Partial functions, functions with a cache, class and static methods, and coroutines in partials."""

    def add(number: int, more: int = 0) -> int:
        return number + more

    async def add_later(number: int, more: int = 0) -> int:
        return number + more

    class Views:
        @classmethod
        def of_class(cls, number: int) -> int:
            return number

        @staticmethod
        def static(number: int) -> int:
            return number

    views = {
        "partial": functools.partial(add, more=1),
        "coroutine": functools.partial(add_later, more=1),
        "cached": functools.lru_cache(add),
        "class": Views.of_class,
        "static": Views.static,
    }
    for name, view in views.items():
        both(app.get(f"/{name}/{{number}}", name=name, operation_id=name), order)(view)
        assert get(app, f"/{name}/1").status == 200
    assert trees(captured_traces) == [{f"GET /{name}/{{number}}": {"handler": {}}} for name in views]


def test_functions_around_a_mounted_application(captured_traces: CapturedTraces) -> None:
    """`@trace` above its error handlers and middleware, though our middleware is in the outer application only."""
    inner, app = FastAPI(), FastAPI()
    tracemw.instrument(app).mount("/sub", inner)

    @tracemw.trace
    @inner.exception_handler(KeyError)
    def missing(request: Request, exc: KeyError) -> Response:
        return Response("missing", status_code=404)

    @tracemw.trace
    @inner.middleware("http")
    async def around(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    @inner.get("/items")
    def items() -> None:
        raise KeyError("items")

    assert get(app, "/sub/items").status == 404
    assert trees(captured_traces) == [{"GET /sub/items": {"around": {"missing": {}}}}]
