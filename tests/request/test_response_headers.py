"""Request id, trace id and Server-Timing: on every response, once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from flask import Flask, redirect
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope
from tests.request.look import root
from tracemw.testing import capture_traces

OURS = ("x-request-id", "x-trace-id", "server-timing")


async def parts() -> Any:
    """A body of two parts."""
    yield "a"
    yield "b"


async def broken(request: Any) -> Any:
    """Fail."""
    raise ValueError("boom")


async def refused(request: Any) -> Any:
    """Refuse."""
    raise HTTPException(401)


def starlette_app(folder: Any) -> Any:
    """An application that answers in all ways."""
    app = Starlette(
        routes=[
            Route("/", lambda request: PlainTextResponse("hello")),
            Route("/stream", lambda request: StreamingResponse(parts())),
            Route("/moved", lambda request: RedirectResponse("/")),
            Route("/unchanged", lambda request: Response(status_code=304)),
            Route("/refused", refused),
            Route("/broken", broken),
            Mount("/static", StaticFiles(directory=folder)),
        ]
    )
    app.add_middleware(CORSMiddleware, allow_origins=["*"], expose_headers=["X-Request-ID", "X-Trace-ID"])
    return app


def responses(app: Any, headers: Any) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The headers of all kinds of responses, from an application that has been started."""
    asked = [("GET", path) for path in ("/", "/stream", "/moved", "/unchanged", "/refused", "/nowhere", "/broken")]
    asked += [("HEAD", "/"), ("POST", "/"), ("OPTIONS", "/"), ("GET", "/static/file.txt"), ("GET", "/static/x")]
    found = {}

    async def serve() -> None:
        start = Conversation([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        await app({"type": "lifespan"}, start.receive, start.send)
        for method, path in asked:
            conversation = Conversation()
            try:
                await app(http_scope(path, method, headers), conversation.receive, conversation.send)
            except ValueError:
                assert path == "/broken"
            sent = conversation.sent[0]["headers"]
            found[method, path] = [(name.decode().lower(), value.decode()) for name, value in sent]

    asyncio.run(serve())
    return found


@pytest.mark.parametrize("placed", ["inside", "outside", "instrument"])
def test_every_asgi_response_has_them(placed: str, tmp_path: Any) -> None:
    """Streams, redirects, preflights, files, 404, 405, and the 500 of the outermost handler: once, its own."""
    (tmp_path / "file.txt").write_text("content")
    app = starlette_app(tmp_path)
    if placed == "inside":
        app.add_middleware(tracemw.TraceMiddleware)
    elif placed == "outside":
        app = tracemw.TraceMiddleware(app)
    else:
        app = tracemw.instrument(app)
    headers = [(b"x-request-id", b"r-1"), (b"origin", b"http://a"), (b"access-control-request-method", b"GET")]
    with capture_traces() as traces:
        found = responses(app, headers)
    told = {trace.info.trace_id: trace for trace in traces}
    for (method, path), sent in found.items():
        assert [sum(name == ours for name, _ in sent) for ours in OURS] == [1, 1, 1], (method, path)
        values = dict(sent)
        assert values["x-request-id"] == "r-1"
        span = root(told.pop(values["x-trace-id"]))
        assert span.attributes["url.path"] == path
        assert values["server-timing"] == f'traceparent;desc="00-{values["x-trace-id"][3:]}-{span.span_id}-01"'
    assert told == {}
    assert dict(found["GET", "/"])["access-control-expose-headers"] == "X-Request-ID, X-Trace-ID"


@pytest.mark.parametrize("path", ["/", "/stream", "/moved", "/nowhere", "/broken"])
def test_every_wsgi_response_has_them(path: str) -> None:
    """Likewise with Flask, whose 500 is made inside of us."""
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "hello", endpoint="hello")
    app.add_url_rule("/stream", view_func=lambda: app.response_class(iter("ab")), endpoint="stream")
    app.add_url_rule("/moved", view_func=lambda: redirect("/"), endpoint="moved")
    app.add_url_rule("/broken", view_func=lambda: str(1 / 0), endpoint="broken")
    app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    with capture_traces() as traces:
        answer = ask_wsgi(app, environ(path, HTTP_X_REQUEST_ID="r-1"))
        answer.read()
    names = [name.lower() for name, _ in answer.headers]
    assert [names.count(ours) for ours in OURS] == [1, 1, 1]
    assert [trace.info.trace_id for trace in traces] == [dict(answer.headers)["X-Trace-Id"]]


OWN = [(b"X-Request-ID", b"own"), (b"x-trace-id", b"own"), (b"Server-Timing", b"traceparent;desc=own")]


def test_the_application_s_own_stay() -> None:
    """A header that the application has set is left as it is, and not sent a second time."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": OWN})
        await send({"type": "http.response.body"})

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [(name.decode(), value.decode()) for name, value in OWN])
        return []

    with capture_traces():
        answer = ask(tracemw.TraceMiddleware(tracemw.TraceMiddleware(app)))
        said = ask_wsgi(tracemw.WSGITraceMiddleware(tracemw.WSGITraceMiddleware(wsgi)))
    assert answer.sent[0]["headers"] == OWN
    assert [(name.encode(), value.encode()) for name, value in said.headers] == OWN
    assert len(OWN) == 3


def test_server_timing_of_the_application_and_ours() -> None:
    """`Server-Timing` is a list: the application's entries stay, and ours is a line of its own."""
    own = (b"Server-Timing", b"db;dur=1")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [own]})
        await send({"type": "http.response.body"})

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [(own[0].decode(), own[1].decode())])
        return []

    with capture_traces() as traces:
        answer = ask(tracemw.TraceMiddleware(tracemw.TraceMiddleware(app)))
        said = ask_wsgi(tracemw.WSGITraceMiddleware(tracemw.WSGITraceMiddleware(wsgi)))
        said.read()
    found = [answer.sent[0]["headers"], [(name.encode(), value.encode()) for name, value in said.headers]]
    for headers, trace in zip(found, traces, strict=True):
        ids = f"00-{trace.info.trace_id[3:]}-{root(trace).span_id}-01"
        timings = [value for name, value in headers if name.lower() == b"server-timing"]
        assert timings == [own[1], f'traceparent;desc="{ids}"'.encode()]


def test_the_list_of_the_application_is_not_changed() -> None:
    """Headers are added to a copy: many applications answer with the same list each time."""
    headers: list[Any] = [(b"a", b"b")]
    wsgi_headers = [("A", "b")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", wsgi_headers)
        return []

    with capture_traces():
        for _ in range(2):
            assert len(ask(tracemw.TraceMiddleware(app)).sent[0]["headers"]) == 4
            assert len(ask_wsgi(tracemw.WSGITraceMiddleware(wsgi)).headers) == 4
    assert (headers, wsgi_headers) == ([(b"a", b"b")], [("A", "b")])


def test_switched_off() -> None:
    """`response_headers=False` adds none."""
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware, response_headers=False)
    flask = Flask(__name__)
    flask.wsgi_app = tracemw.WSGITraceMiddleware(  # type: ignore[method-assign]
        flask.wsgi_app, response_headers=False
    )
    with capture_traces() as traces:
        names = {name.decode() for name, _ in ask(app, http_scope("/x")).sent[0]["headers"]}
        answer = ask_wsgi(flask, environ("/x"))
        answer.read()
        names |= {name.lower() for name, _ in answer.headers}
    assert names & set(OURS) == set()
    assert len(traces) == 2


def test_ids_of_requests() -> None:
    """An invalid id is answered with the one that was made; without one there is none where none is to be made."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/set":
            tracemw.update_current_trace(client_request_id="set")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    def told(path: str = "/", value: bytes | None = None, **options: Any) -> Any:
        headers = [] if value is None else [(b"x-request-id", value)]
        return ask(tracemw.TraceMiddleware(app, **options), http_scope(path, headers=headers)).headers.get(
            b"x-request-id"
        )

    with capture_traces() as traces:
        assert told(value=b"mine") == b"mine"
        assert told(value=b"mine", request_id_header=None) not in (b"mine", None)
        made = told(value=b"\xff" * 200)
        assert made is not None and len(made) == 32
        assert told(generate_request_id=False) is None
        assert told("/set", b"mine") == b"set"
    assert traces[2].info.client_request_id == made.decode()
    assert traces[3].info.client_request_id is None
