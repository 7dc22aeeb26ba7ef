"""Werkzeug without Flask: a WSGI callable, a `Map`, and handlers that the application looks up itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("werkzeug")
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.routing import Map, Rule, Submount
from werkzeug.wrappers import Request, Response

import tracemw
from tests.adapters.trees import exceptions, tree, trees, wsgi_get
from tracemw.adapters import werkzeug as adapter
from tracemw.testing import CapturedTraces

traced = tracemw.trace(name="handler")


class Shop:
    """An application as Werkzeug's tutorial has it: endpoints are names of methods."""

    def __init__(self) -> None:
        self.url_map = Map(
            [
                Rule("/", endpoint="front"),
                Submount(
                    "/items", [Rule("/<int:number>", endpoint="item"), Rule("/<path:name>", endpoint="lost")]
                ),
            ]
        )

    @tracemw.trace
    def on_front(self, request: Request) -> Response:
        """A method that is traced."""
        return Response("front")

    @tracemw.trace
    def on_item(self, request: Request, number: int) -> Response:
        """A method that is traced and may fail."""
        if number == 0:
            raise ServiceUnavailable
        return Response(str(number))

    @tracemw.trace
    def on_lost(self, request: Request, name: str) -> Response:
        """A method that fails."""
        raise NotFound

    def dispatch(self, request: Request) -> Any:
        """Find the method and call it."""
        try:
            endpoint, values = self.url_map.bind_to_environ(request.environ).match()
            return getattr(self, f"on_{endpoint}")(request, **values)
        except HTTPException as exc:
            return exc

    def wsgi_app(self, environ: Any, start_response: Any) -> Any:
        """What a server calls, and where middleware is put."""
        return self.dispatch(Request(environ))(environ, start_response)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Serve one request."""
        return self.wsgi_app(environ, start_response)


@pytest.mark.parametrize("place", ["around", "inside", "instrument"])
def test_the_tutorial_s_application(captured_traces: CapturedTraces, place: str) -> None:
    """Route names come from the application's own `match`; exceptions are where they happened."""
    app: Any = Shop()
    if place == "inside":
        app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)
    else:
        app = tracemw.WSGITraceMiddleware(app) if place == "around" else tracemw.instrument(app)
    statuses = [wsgi_get(app, path)[0] for path in ("/", "/items/7", "/items/0", "/items/x/y", "/nothing")]
    assert statuses == [200, 200, 503, 404, 404]
    assert trees(captured_traces) == [
        {"GET /": {"on_front": {}}},
        {"GET /items/<int:number>": {"on_item": {}}},
        {"GET /items/<int:number>": {"on_item": {}}},
        {"GET /items/<path:name>": {"on_lost": {}}},
        {"GET": {}},
    ]
    assert [trace.info.state for trace in captured_traces] == ["OK", "OK", "ERROR", "OK", "OK"]
    assert exceptions(captured_traces[2]) == {"on_item": 1, "GET /items/<int:number>": 1}
    assert exceptions(captured_traces[3]) == {"on_lost": 1}


def function_app(url_map: Map, views: dict[str, Callable[..., Any]], how: str) -> Any:
    """An application that is a function, which asks its map in one of the ways there are."""

    def application(environ: Any, start_response: Any) -> Any:
        if how == "bind":
            urls = url_map.bind(environ["HTTP_HOST"], path_info=environ["PATH_INFO"])
        else:
            urls = url_map.bind_to_environ(Request(environ))

        def call(endpoint: Any, values: Any) -> Any:
            view = endpoint if callable(endpoint) else views[endpoint]
            return Response(view(**values))

        if how == "dispatch":
            response: Any = urls.dispatch(call, catch_http_exceptions=True)
        elif how == "rule":
            rule, values = urls.match(return_rule=True)
            response = call(rule.endpoint, values)
        else:
            response = call(*urls.match())
        return response(environ, start_response)

    return application


@pytest.mark.parametrize("how", ["match", "dispatch", "bind", "rule"])
@pytest.mark.parametrize("order", ["trace above", "trace below"])
@pytest.mark.parametrize("by_name", [True, False])
def test_applications_that_are_functions(
    captured_traces: CapturedTraces, how: str, order: str, by_name: bool
) -> None:
    """Names and handler spans for endpoints that are names in a dictionary, and for those that are functions."""
    url_map, views = Map(), {}

    def expose(view: Any) -> Any:
        views["item"] = view
        url_map.add(Rule("/items/<int:number>", endpoint="item" if by_name else view))
        return view

    def handler(number: int) -> str:
        return str(number)

    if order == "trace above":
        traced(expose(handler))
    else:
        expose(traced(handler))
    app = tracemw.WSGITraceMiddleware(function_app(url_map, views, how))
    assert wsgi_get(app, "/items/7") == (200, b"7")
    # The rule itself was asked for, and with it the function as it was registered.
    missed = how == "rule" and not by_name and order == "trace above"
    assert trees(captured_traces) == [{"GET /items/<int:number>": {} if missed else {"handler": {}}}]


def test_behind_a_dispatcher(captured_traces: CapturedTraces) -> None:
    """What the application is mounted under is part of the name."""
    app = tracemw.WSGITraceMiddleware(DispatcherMiddleware(NotFound(), {"/shop": Shop()}))
    wsgi_get(app, "/shop/items/7")
    assert trees(captured_traces) == [{"GET /shop/items/<int:number>": {"on_item": {}}}]


def test_a_map_that_is_given(captured_traces: CapturedTraces) -> None:
    """An adapter for a map that cannot be found."""

    class Hidden:
        __slots__ = ("_maps",)

        def __init__(self, url_map: Map) -> None:
            self._maps = {"one": url_map}

        def __call__(self, environ: Any, start_response: Any) -> Any:
            endpoint, _ = self._maps["one"].bind_to_environ(environ).match()
            return Response(endpoint)(environ, start_response)

    url_map = Map([Rule("/x/<name>", endpoint="x")])
    app = tracemw.WSGITraceMiddleware(Hidden(url_map), adapter=adapter.make(url_map=url_map))
    wsgi_get(app, "/x/1")
    (trace,) = captured_traces
    assert tree(trace) == {"GET /x/<name>": {}}


def test_the_application_s_map_behaves_as_before() -> None:
    """Watching a map changes neither its results nor its exceptions, nor what one builds with it."""
    watched, plain = Shop(), Shop()
    adapter.make(watched)
    for path in ("/", "/items/7", "/nothing"):
        results: list[Any] = []
        for shop in (watched, plain):
            urls = shop.url_map.bind("example.com", path_info=path)
            try:
                results.append((urls.match(), urls.match(path, "GET")[0], urls.test(path), urls.build("front")))
            except HTTPException as exc:
                results.append((type(exc), urls.allowed_methods(path), urls.test(path)))
        assert results[0] == results[1]
