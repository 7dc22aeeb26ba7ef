"""What code inside a request is told of it, wherever it runs; and what it says, wherever it is said."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from flask import Flask, after_this_request, stream_with_context
from starlette.middleware.base import BaseHTTPMiddleware

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope, websocket_scope
from tests.request.look import named, root
from tracemw.logging import TraceContextFilter
from tracemw.testing import capture_traces

HEADERS = [(b"x-request-id", b"r-1"), (b"x-session-id", b"s-1"), (b"x-user-id", b"jane")]


class Places:
    """Where the request was asked for, and what came back; each place also sets a tag and logs a line."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.logger = logging.Logger("places")
        handler = logging.Handler()
        handler.addFilter(TraceContextFilter())
        handler.emit = self._emit  # type: ignore[method-assign]
        self.logger.addHandler(handler)

    def _emit(self, record: Any) -> None:
        self.logged[record.getMessage()] = (record.trace_id, record.client_request_id)

    def look(self, place: str) -> None:
        """Ask here."""
        known = tracemw.current_request
        self.seen[place] = (known.client_request_id, known.session_id, known.user_id, known.trace_id)
        tracemw.update_current_trace(tags={place: "seen"})
        self.logger.warning(place)

    def check(self, trace: tracemw.Trace, places: set[str]) -> None:
        """The same answer everywhere."""
        expected = ("r-1", "s-1", "jane", trace.info.trace_id)
        assert self.seen == dict.fromkeys(places, expected)
        assert self.logged == dict.fromkeys(places, (trace.info.trace_id, "r-1"))
        assert places <= trace.info.tags.keys()


def fastapi_app(places: Places) -> FastAPI:
    """An application that asks in all the places that FastAPI has."""

    class Around(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            places.look("middleware before")
            response = await call_next(request)
            places.look("middleware after")
            return response

    async def dependency() -> Any:
        places.look("dependency")
        yield
        places.look("dependency after")

    depends = Depends(dependency)
    app = FastAPI()
    app.add_middleware(Around)
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/x")
    def handler(tasks: BackgroundTasks, given: Any = depends) -> Any:
        places.look("handler")
        tasks.add_task(places.look, "task")
        threads = [threading.Thread(target=tracemw.propagation.propagate(places.look), args=("thread",))]
        with tracemw.ContextThreadPoolExecutor() as pool:
            pool.submit(places.look, "pool").result()
        for thread in threads:
            thread.start()
            thread.join()

        def parts() -> Any:
            places.look("body")
            yield "x"

        return StreamingResponse(parts(), background=tasks)

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError("boom")

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(418)

    @app.exception_handler(HTTPException)
    async def answer_refusal(request: Request, exc: Exception) -> Any:
        places.look("handler of refusals")
        return JSONResponse({}, 418)

    @app.exception_handler(Exception)
    async def answer(request: Request, exc: Exception) -> Any:
        places.look("handler of errors")
        return JSONResponse({"trace": tracemw.current_request.trace_id}, 500)

    return app


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("/x", {"dependency", "dependency after", "handler", "task", "thread", "pool", "body"}),
        ("/broken", {"handler of errors"}),
        ("/refused", {"handler of refusals"}),
    ],
)
def test_fastapi(path: str, places: set[str]) -> None:
    """Handlers, dependencies, middleware, bodies, tasks, threads, and what answers exceptions, the 500's too."""
    found = Places()
    app = fastapi_app(found)
    conversation = Conversation()
    with capture_traces() as traces:
        ask(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        try:
            asyncio.run(app(http_scope(path, headers=HEADERS), conversation.receive, conversation.send))
        except ValueError:
            assert path == "/broken"
            assert traces[0].info.trace_id.encode() in conversation.body
        (trace,) = traces
    places = places | {"middleware before"} | (set() if path == "/broken" else {"middleware after"})
    found.check(trace, places)


def test_flask() -> None:
    """Views, what runs before and after them and at the end, error handlers, bodies."""
    found = Places()
    app = Flask(__name__)
    app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    app.before_request(lambda: found.look("before"))
    app.teardown_request(lambda exc: found.look("teardown"))

    @app.after_request
    def after(response: Any) -> Any:
        found.look("after")
        response.call_on_close(lambda: found.look("close"))
        return response

    @app.errorhandler(500)
    def answer(exc: Any) -> Any:
        found.look("handler of errors")

        def parts() -> Any:
            found.look("body")
            yield "x"

        return app.response_class(stream_with_context(parts())), 500

    @app.get("/x")
    def view() -> Any:
        found.look("view")
        after_this_request(lambda response: found.look("after this") or response)  # type: ignore[func-returns-value]
        raise ValueError("boom")

    env = environ("/x", HTTP_X_REQUEST_ID="r-1", HTTP_X_SESSION_ID="s-1", HTTP_X_USER_ID="jane")
    with capture_traces() as traces:
        ask_wsgi(app, env).read()
        (trace,) = traces
    names = {"before", "view", "after", "after this", "handler of errors", "body", "teardown", "close"}
    found.check(trace, names)


def test_sockets() -> None:
    """A socket's endpoint, from the handshake on."""
    found = Places()
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.websocket("/ws")
    async def endpoint(socket: WebSocket) -> None:
        found.look("handshake")
        await socket.accept()
        found.look("accepted")
        await socket.close()
        found.look("closed")

    with capture_traces() as traces:
        ask(app, {**websocket_scope(), "headers": HEADERS}, [{"type": "websocket.connect"}])
        (trace,) = traces
    found.check(trace, {"handshake", "accepted", "closed"})


def test_nothing_outside_of_requests() -> None:
    """Before, between and after requests, and in threads of nobody's, there is none."""
    found = Places()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with ThreadPoolExecutor() as pool:
            pool.submit(found.look, "a thread of nobody's").result()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with capture_traces():
        ask(tracemw.TraceMiddleware(app), http_scope(headers=HEADERS))
        found.look("after")
        assert not tracemw.current_request
    assert found.seen == dict.fromkeys(("a thread of nobody's", "after"), (None, None, None, None))
    assert set(found.logged.values()) == {("-", "-")}


async def async_parts() -> Any:
    """A body with spans in it."""
    for i in range(2):
        with tracemw.start_span(f"part {i}"):
            await asyncio.sleep(0)
        yield b"x"


def sync_parts() -> Any:
    """Likewise, in a thread."""
    for i in range(2):
        with tracemw.start_span(f"part {i}"):
            pass
        yield b"x"


def sync_parts_in_a_span() -> Any:
    """A span that is open across a `yield`."""
    with tracemw.start_span("part 0"):
        yield b"x"
    with tracemw.start_span("part 1"):
        yield b"x"


@pytest.mark.parametrize("parts", [async_parts, sync_parts, sync_parts_in_a_span])
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "BaseHTTPMiddleware"])
def test_spans_in_streamed_bodies(parts: Any, wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    """They are children of the root, whichever thread makes the body; nothing is logged about contexts."""
    app = FastAPI()

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            return await call_next(request)

    if wrapped:
        app.add_middleware(Passing)
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_api_route("/x", lambda: StreamingResponse(parts()), response_class=StreamingResponse)
    with capture_traces() as traces:
        assert ask(app, http_scope("/x")).body == b"xx"
        (trace,) = traces
    assert [named(trace, f"part {i}").parent_id for i in range(2)] == [root(trace).span_id] * 2
    assert root(trace).attributes["tracemw.chunks"] == 3
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_worker_that_outlives_its_request() -> None:
    """`detached()` keeps a worker that is made on a request's way from staying in that request's trace."""
    workers = []

    async def work() -> None:
        with tracemw.start_span("later"):
            await asyncio.sleep(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.detached():
            workers.append(asyncio.create_task(work()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        await workers[0]

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    assert sorted(root(trace).name for trace in traces) == ["GET", "later"]
