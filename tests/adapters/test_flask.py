"""Flask: views of every kind, names, users, exceptions; the tree is the same wherever `@trace` stands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("flask")
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    copy_current_request_context,
    g,
    request,
    session,
    stream_with_context,
)
from flask.views import MethodView, View
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import tracemw
from tests.adapters.trees import exceptions, root, tree, trees, wsgi_get
from tracemw.testing import CapturedTraces

Decorator = Callable[[Any], Any]
traced = tracemw.trace(name="handler")


@pytest.fixture(params=["trace above", "trace below"])
def both(request: pytest.FixtureRequest) -> Callable[[Decorator], Decorator]:
    """Combine a route decorator with `@trace`, in either order."""
    if request.param == "trace above":
        return lambda route: lambda view: traced(route(view))
    return lambda route: lambda view: route(traced(view))


Both = Callable[[Decorator], Decorator]


@pytest.fixture
def app() -> Flask:
    """An application with our middleware."""
    return tracemw.instrument(Flask("app"))


def test_views_of_classes(app: Flask, captured_traces: CapturedTraces) -> None:
    """Methods are traced where they are defined, a class's view by its `decorators` or what `as_view` returns."""

    class Item(MethodView):
        @tracemw.trace
        def get(self, number: int) -> str:
            return str(number)

        def delete(self, number: int) -> str:
            return ""

    class Page(View):
        decorators = [traced]

        def dispatch_request(self) -> str:
            return "page"

    class Late(View):
        def dispatch_request(self) -> str:
            return "late"

    app.add_url_rule("/items/<int:number>", view_func=Item.as_view("item"))
    app.add_url_rule("/page", view_func=Page.as_view("page"))
    late = Late.as_view("late")
    app.add_url_rule("/late", view_func=late)
    traced(late)
    for method, path in (("GET", "/items/1"), ("DELETE", "/items/1"), ("GET", "/page"), ("GET", "/late")):
        assert wsgi_get(app, path, method)[0] == 200
    assert trees(captured_traces) == [
        {"GET /items/<int:number>": {"get": {}}},
        {"DELETE /items/<int:number>": {}},
        {"GET /page": {"handler": {}}},
        {"GET /late": {"handler": {}}},
    ]


def test_one_view_on_several_rules(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """Each rule has its own name."""
    both(lambda view: app.get("/a")(app.get("/b", endpoint="b")(view)))(lambda: "x")
    wsgi_get(app, "/a")
    wsgi_get(app, "/b")
    assert trees(captured_traces) == [{"GET /a": {"handler": {}}}, {"GET /b": {"handler": {}}}]


def test_nested_blueprints_and_late_ones(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """All prefixes are in the name; views of a blueprint are an application's when it is registered."""
    inner, outer = Blueprint("inner", __name__), Blueprint("outer", __name__)
    both(inner.get("/<int:number>"))(lambda number: str(number))
    outer.register_blueprint(inner, url_prefix="/items")
    app.register_blueprint(outer, url_prefix="/v1")
    app.register_blueprint(outer, url_prefix="/v2", name="again")
    wsgi_get(app, "/v1/items/1")
    wsgi_get(app, "/v2/items/1")
    assert trees(captured_traces) == [
        {"GET /v1/items/<int:number>": {"handler": {}}},
        {"GET /v2/items/<int:number>": {"handler": {}}},
    ]


def test_what_is_added_while_serving(captured_traces: CapturedTraces, both: Both) -> None:
    """A view that an extension adds without asking Flask, which refuses late views."""
    app = tracemw.instrument(Flask("app"))
    wsgi_get(app, "/late")
    app._got_first_request = False
    both(app.get("/late"))(lambda: "x")
    wsgi_get(app, "/late")
    assert trees(captured_traces) == [{"GET": {}}, {"GET /late": {"handler": {}}}]


def test_functions_around_a_view(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """What runs before and after a view, or answers its exception, has a span beside the view's."""

    @tracemw.trace
    @app.before_request
    def before() -> None:
        g.start = 1

    @tracemw.trace
    @app.after_request
    def after(response: Response) -> Response:
        return response

    @tracemw.trace
    @app.errorhandler(LookupError)
    def failed(exc: LookupError) -> tuple[str, int]:
        return "", 404

    @both(app.get("/"))
    def handler() -> str:
        raise LookupError

    assert wsgi_get(app, "/")[0] == 404
    (trace,) = captured_traces
    assert tree(trace) == {"GET /": {"before": {}, "handler": {}, "failed": {}, "after": {}}}
    assert trace.info.request_preview == "{}"
    assert exceptions(trace) == {"handler": 1}


def test_an_answer_before_the_view(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """A request that `before_request` answers has a route and no handler."""
    app.before_request(lambda: ("stop", 401))
    both(app.get("/items/<name>"))(lambda name: name)
    assert wsgi_get(app, "/items/x") == (401, b"stop")
    assert trees(captured_traces) == [{"GET /items/<name>": {}}]


def test_streams(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """A view that is a generator, and one that returns one; their spans are where their code runs."""

    def parts() -> Iterator[str]:
        for part in ("a", "b"):
            with tracemw.start_span("part"):
                yield part

    both(app.get("/itself"))(parts)

    @both(app.get("/returned"))
    def handler() -> Response:
        return Response(stream_with_context(parts()))

    assert wsgi_get(app, "/itself") == wsgi_get(app, "/returned") == (200, b"ab")
    itself, returned = captured_traces
    assert tree(itself) == {"GET /itself": {"handler": {"part_1": {}, "part_2": {}}}}
    assert itself.data.spans[1].outputs == ["a", "b"]
    assert tree(returned) == {"GET /returned": {"handler": {}, "part_1": {}, "part_2": {}}}


def test_coroutines(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """Views, methods of class-based views and functions around them, each run by Flask in a loop of its own."""

    class Item(MethodView):
        @tracemw.trace
        async def get(self, number: int) -> str:
            return str(number)

    @tracemw.trace
    @app.before_request
    async def before() -> None:
        g.start = 1

    @tracemw.trace
    @app.errorhandler(LookupError)
    async def failed(exc: LookupError) -> tuple[str, int]:
        return "", 404

    @both(app.get("/view"))
    async def handler() -> str:
        await asyncio.sleep(0)
        raise LookupError

    app.add_url_rule("/items/<int:number>", view_func=Item.as_view("item"))
    assert [wsgi_get(app, path)[0] for path in ("/view", "/items/7")] == [404, 200]
    view, item = captured_traces
    assert tree(view) == {"GET /view": {"before": {}, "handler": {}, "failed": {}}}
    assert exceptions(view) == {"handler": 1}
    assert tree(item) == {"GET /items/<int:number>": {"before": {}, "get": {}}}


def test_a_coroutine_whose_response_is_streamed(
    app: Flask, captured_traces: CapturedTraces, both: Both
) -> None:
    """The root lasts as long as the stream; the coroutine was over before it began."""

    def parts() -> Iterator[str]:
        for part in ("a", "b"):
            with tracemw.start_span("part"):
                yield part

    @both(app.get("/"))
    async def handler() -> Response:
        return Response(parts())

    assert wsgi_get(app, "/") == (200, b"ab")
    (trace,) = captured_traces
    assert tree(trace) == {"GET /": {"handler": {}, "part_1": {}, "part_2": {}}}
    assert root(trace).end_time_ns == max(span.end_time_ns or 0 for span in trace.data.spans)


def test_calling_a_view_directly_makes_one_span(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """From Python, as from a request."""
    handler = both(app.get("/"))(lambda: "x")
    wsgi_get(app, "/")
    assert handler() == "x"
    assert trees(captured_traces) == [{"GET /": {"handler": {}}}, {"handler": {}}]


def test_exceptions(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """Recorded on the view's span; on the root only where the answer is a 5xx, once."""

    @app.errorhandler(LookupError)
    def refused(exc: LookupError) -> tuple[str, int]:
        return "", 409

    @app.errorhandler(ArithmeticError)
    def broken(exc: ArithmeticError) -> tuple[str, int]:
        return "", 503

    @both(app.get("/<name>"))
    def handler(name: str) -> str:
        if name.isdigit():
            abort(int(name))
        raise {"lookup": LookupError, "arithmetic": ArithmeticError, "bug": ValueError}[name]("no")

    statuses = [wsgi_get(app, f"/{name}")[0] for name in ("404", "502", "lookup", "arithmetic", "bug")]
    assert statuses == [404, 502, 409, 503, 500]
    assert [trace.info.state for trace in captured_traces] == ["OK", "ERROR", "OK", "ERROR", "ERROR"]
    on_root = [exceptions(trace).get("GET /<name>", 0) for trace in captured_traces]
    assert on_root == [0, 1, 0, 1, 1]
    assert all(exceptions(trace)["handler"] == 1 for trace in captured_traces)


def test_an_unhandled_exception_of_an_untraced_view(app: Flask, captured_traces: CapturedTraces) -> None:
    """Flask answers 500 itself; the exception is on the root all the same, also in an application under test."""

    @app.get("/items/<name>")
    def handler(name: str) -> str:
        raise ValueError("no")

    assert wsgi_get(app, "/items/x")[0] == 500
    app.config["TESTING"] = True
    with pytest.raises(ValueError):
        wsgi_get(app, "/items/x")
    for trace in captured_traces:
        assert exceptions(trace) == {"GET /items/<name>": 1}
        assert (trace.info.state, root(trace).attributes["error.type"]) == ("ERROR", "ValueError")


@pytest.mark.parametrize(
    ("path", "script_name", "name"),
    [
        ("/items/1", "", "GET /items/<int:number>"),
        ("/items/1", "/api", "GET /api/items/<int:number>"),
        ("/mounted/items/1", "", "GET /mounted/items/<int:number>"),
        ("/mounted/items/1", "/api", "GET /api/mounted/items/<int:number>"),
        ("/mounted/items/1", "/größe", "GET /größe/mounted/items/<int:number>"),
        ("/static/nothing.css", "", "GET /static/<path:filename>"),
        ("/nothing", "", "GET"),
        ("/mounted/nothing", "", "GET"),
    ],
)
@pytest.mark.parametrize("outside", [True, False])
def test_names(
    captured_traces: CapturedTraces, both: Both, path: str, script_name: str, name: str, outside: bool
) -> None:
    """The rule that was chosen, below what the application is mounted under, by dispatcher or server."""
    apps = [Flask("front"), Flask("mounted")]
    for app in apps:
        both(app.get("/items/<int:number>"))(lambda number: str(number))
        if not outside:
            tracemw.instrument(app)
    site: Any = DispatcherMiddleware(apps[0], {"/mounted": apps[1]})
    if outside:
        site = tracemw.WSGITraceMiddleware(site)
    script = script_name.encode().decode("latin-1")
    status, _ = wsgi_get(site, path, environ_overrides={"SCRIPT_NAME": script})
    handler: dict[str, Any] = {"handler": {}} if status == 200 else {}
    assert trees(captured_traces) == [{name: handler}]


def test_methods(app: Flask, captured_traces: CapturedTraces) -> None:
    """A method that no rule has is an unmatched request, as Flask has it; unknown ones share a name."""
    app.get("/items")(lambda: "x")
    wsgi_get(app, "/items", "HEAD")
    wsgi_get(app, "/items", "OPTIONS")
    wsgi_get(app, "/items", "DELETE")
    wsgi_get(app, "/items", "FOO")
    assert [root(t).name for t in captured_traces] == ["HEAD /items", "OPTIONS /items", "DELETE", "_OTHER"]


@pytest.mark.parametrize("authenticated", [True, False])
def test_the_user_of_flask_login(app: Flask, captured_traces: CapturedTraces, authenticated: bool) -> None:
    """Flask-Login keeps its user in `flask.g`; that one wins over the header if it is authenticated."""

    class User:
        is_authenticated = authenticated

        def get_id(self) -> int:
            return 7

    @app.before_request
    def load() -> None:
        g._login_user = User()

    app.get("/")(lambda: request.headers["X-User-ID"])
    wsgi_get(app, "/", headers={"X-User-ID": "claimed"})
    (trace,) = captured_traces
    assert trace.info.trace_metadata["mlflow.trace.user"] == ("7" if authenticated else "claimed")


def test_http_exceptions_that_are_responses(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """An `HTTPException` returned is no exception."""
    from werkzeug.exceptions import Gone

    both(app.get("/"))(lambda: Gone())

    @app.errorhandler(HTTPException)
    def any_error(exc: HTTPException) -> HTTPException:
        return exc

    assert wsgi_get(app, "/")[0] == 410
    (trace,) = captured_traces
    assert exceptions(trace) == {}


def test_installing_twice(captured_traces: CapturedTraces) -> None:
    """`instrument` does it once, also where the documented line was there before."""
    app = Flask("app")
    app.get("/")(lambda: "x")
    app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    first = app.wsgi_app
    assert tracemw.instrument(tracemw.instrument(app)) is app
    assert app.wsgi_app is first
    wsgi_get(app, "/")
    assert trees(captured_traces) == [{"GET /": {}}]


def test_the_test_client_keeps_the_context(app: Flask, captured_traces: CapturedTraces, both: Both) -> None:
    """In `with client:`, what the view has left in the request's context is there for the test to look at."""
    app.secret_key = "secret"

    @both(app.get("/"))
    def handler() -> Response:
        session["seen"] = g.seen = 1
        return Response(stream_with_context(iter(("a", "b"))))

    with app.test_client() as client:
        for _ in range(2):
            assert client.get("/").text == "ab"
            assert session["seen"] == g.seen == 1
            assert request.path == "/"
    assert tracemw.get_active_trace_id() is None
    assert trees(captured_traces) == [{"GET /": {"handler": {}}}] * 2


def test_what_takes_the_request_out_of_the_environ(app: Flask, captured_traces: CapturedTraces) -> None:
    """The route is known after a copied context was left, and where the view has asked another application."""
    other = Flask("other")
    other.add_url_rule("/from/<name>", "other", lambda name: "other")

    @app.get("/copied/<name>")
    def copied(name: str) -> str:
        thread = threading.Thread(target=copy_current_request_context(lambda: None))
        thread.start()
        thread.join()
        return name

    @app.get("/from/<what>")
    def from_other(what: str) -> Any:
        return Response.from_app(other, request.environ)

    for path in ("/copied/1", "/from/1"):
        assert wsgi_get(app, path)[0] == 200
    assert trees(captured_traces) == [{"GET /copied/<name>": {}}, {"GET /from/<what>": {}}]
    routes = [root(trace).attributes["http.route"] for trace in captured_traces]
    assert routes == ["/copied/<name>", "/from/<what>"]


def named_alike(handler: Any) -> Any:
    """A decorator without `functools.wraps` whose argument has the name of the function."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    return inner


def by_default(function: Any) -> Any:
    """One that keeps the function as a default argument."""

    def inner(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
        return _function(*args, **kwargs)

    return inner


class Slotted:
    """One that makes an object without a dictionary."""

    __slots__ = ("__name__", "function", "unset")

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("decorator", [named_alike, by_default, Slotted])
def test_decorators_that_tell_nothing(app: Flask, captured_traces: CapturedTraces, decorator: Decorator) -> None:
    """The view is found below `@trace` and a decorator that does not say what it wraps."""

    @tracemw.trace
    @decorator
    @app.get("/found")
    def handler() -> str:
        return "found"

    assert wsgi_get(app, "/found") == (200, b"found")
    assert trees(captured_traces) == [{"GET /found": {"handler": {}}}]


def test_a_helper_of_the_same_factory_is_not_traced(app: Flask, captured_traces: CapturedTraces) -> None:
    """What a traced view merely calls is no view that it wraps."""

    @app.get("/helper")
    def helper() -> str:
        return "helped"

    @tracemw.trace
    @app.get("/view")
    def view() -> str:
        return helper()

    for path in ("/helper", "/view"):
        assert wsgi_get(app, path) == (200, b"helped")
    assert trees(captured_traces) == [{"GET /helper": {}}, {"GET /view": {"view": {}}}]
