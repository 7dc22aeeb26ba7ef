"""How a request went: what counts as an error, and what only looks like one."""

from __future__ import annotations

import asyncio
import builtins
import sys
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from flask import Flask, abort
from opentelemetry import trace as trace_api
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope
from tests.request.look import duration, names, root
from tracemw.testing import CapturedTraces, capture_traces

Messages = list[dict[str, Any]]
START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}


def outcome(traces: CapturedTraces) -> tuple[Any, ...]:
    """Status, state, outcome, error type and the exceptions recorded on the one root."""
    (trace,) = traces
    span = root(trace)
    return (
        span.attributes.get("http.response.status_code"),
        trace.info.state,
        span.attributes["tracemw.outcome"],
        span.attributes.get("error.type"),
        [event.attributes["exception.message"] for event in span.events if event.name == "exception"],
    )


class Refusing:
    """Somebody's middleware that answers exceptions."""

    def __init__(self, app: Any, status: int) -> None:
        self.app = app
        self.status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Turn an exception into an answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except ValueError:
            await JSONResponse({}, self.status)(scope, receive, send)


async def fails(scope: Any, receive: Any, send: Any) -> None:
    """An application that raises."""
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, (400, "OK", "completed", None, [])),
        (200, (200, "OK", "completed", None, [])),
        (503, (503, "ERROR", "error", "ValueError", ["boom"])),
    ],
)
def test_an_exception_that_becomes_an_answer(status: int, expected: Any) -> None:
    """An exception seen on its way out counts only if the answer is a server error."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(Refusing(tracemw.TraceMiddleware(fails), status)))
    assert outcome(traces) == expected


def framework_app() -> Any:
    """A Starlette application with our middleware in its stack."""

    async def handler(request: Any) -> Any:
        raise ValueError("boom")

    app = Starlette(routes=[Route("/x", handler)])
    app.add_middleware(tracemw.TraceMiddleware)
    return app


@pytest.mark.parametrize("lifespan", [True, False])
@pytest.mark.parametrize("status", [400, 500])
def test_a_middleware_of_the_application_answers(status: int, lifespan: bool) -> None:
    """Between our place in a framework's stack and its error handler somebody may answer with a 400."""
    app = framework_app()
    app.add_middleware(Refusing, status=status)
    with capture_traces() as traces:
        if lifespan:
            ask(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        answer = ask(app, http_scope("/x"))
    assert answer.status == status
    if status == 400 and lifespan:
        assert outcome(traces) == (400, "OK", "completed", None, [])
    elif status == 500:
        assert outcome(traces)[1:] == ("ERROR", "error", "ValueError", ["boom"])


def test_an_unhandled_exception_in_a_framework() -> None:
    """One root, ERROR, the 500 that the client got, one exception event; the exception goes on to the server."""
    app = framework_app()
    conversation = Conversation()
    with capture_traces() as traces:
        ask(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        with pytest.raises(ValueError):
            asyncio.run(app(http_scope("/x"), conversation.receive, conversation.send))
    assert conversation.status == 500
    assert outcome(traces) == (500, "ERROR", "error", "ValueError", ["boom"])
    assert b"x-trace-id" in conversation.headers


def test_a_handler_of_all_exceptions_that_answers_otherwise() -> None:
    """Starlette raises on behind a handler for `Exception`, whatever it answered: the server sees a failure."""
    seen = []

    async def answer(request: Any, exc: Exception) -> Any:
        seen.append(tracemw.current_request.trace_id)
        return JSONResponse({"trace": tracemw.current_request.trace_id}, 418)

    async def handler(request: Any) -> Any:
        raise ValueError("boom")

    app = Starlette(routes=[Route("/x", handler)], exception_handlers={Exception: answer})
    app.add_middleware(tracemw.TraceMiddleware)
    conversation = Conversation()
    with capture_traces() as traces:
        ask(app, {"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        with pytest.raises(ValueError):
            asyncio.run(app(http_scope("/x"), conversation.receive, conversation.send))
    assert outcome(traces) == (418, "ERROR", "error", "ValueError", ["boom"])
    assert seen == [traces[0].info.trace_id]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 422, 429])
def test_refusals_are_no_errors(status: int) -> None:
    """A 4xx is an answer, on ASGI and on WSGI, also when it was raised."""
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/x")
    async def handler() -> None:
        raise HTTPException(status)

    flask = Flask(__name__)
    flask.wsgi_app = tracemw.WSGITraceMiddleware(flask.wsgi_app)  # type: ignore[method-assign]
    flask.add_url_rule("/x", view_func=lambda: abort(status))
    with capture_traces() as traces:
        ask(app, http_scope("/x"))
    assert outcome(traces) == (status, "OK", "completed", None, [])
    with capture_traces() as traces:
        ask_wsgi(flask, environ("/x")).read()
    assert outcome(traces) == (status, "OK", "completed", None, [])


def test_an_unhandled_exception_in_flask() -> None:
    """Flask answers it with a 500 before it leaves the application: it is on the root all the same."""
    flask = Flask(__name__)
    flask.wsgi_app = tracemw.WSGITraceMiddleware(flask.wsgi_app)  # type: ignore[method-assign]

    @flask.get("/x")
    def handler() -> str:
        raise ValueError("boom")

    with capture_traces() as traces:
        answer = ask_wsgi(flask, environ("/x"))
        answer.read()
    assert answer.status.startswith("500")
    assert outcome(traces) == (500, "ERROR", "error", "ValueError", ["boom"])


def test_a_flask_handler_of_all_exceptions() -> None:
    """An exception that Flask's handler for 500 answers otherwise is no error."""
    flask = Flask(__name__)
    flask.wsgi_app = tracemw.WSGITraceMiddleware(flask.wsgi_app)  # type: ignore[method-assign]

    @flask.get("/x")
    def handler() -> str:
        raise ValueError("boom")

    @flask.errorhandler(500)
    def answer(exc: Exception) -> Any:
        return {"trace": tracemw.current_request.trace_id}, 202

    with capture_traces() as traces:
        said = ask_wsgi(flask, environ("/x"))
        body = said.read()
    assert outcome(traces) == (202, "OK", "completed", None, [])
    assert traces[0].info.trace_id.encode() in body


def test_exc_info_tells_the_exception() -> None:
    """A WSGI application that answers an exception hands it to `start_response`."""

    def app(env: Any, start_response: Any) -> Any:
        try:
            raise ValueError("boom")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())
        return [b""]

    with capture_traces() as traces:
        ask_wsgi(tracemw.WSGITraceMiddleware(app)).read()
    assert outcome(traces) == (500, "ERROR", "error", "ValueError", ["boom"])


def test_a_refused_second_answer_does_not_change_the_status() -> None:
    """When the headers are out, `start_response` with `exc_info` raises: the client has seen the first status."""

    class Sent(Exception):
        pass

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"x"
        start_response("500 Oops", [], (ValueError, ValueError("boom"), None))

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info:
            raise Sent("too late")

    with capture_traces() as traces:
        body = tracemw.WSGITraceMiddleware(app)(environ(), start_response)
        with pytest.raises(Sent):
            list(body)
        body.close()  # type: ignore[attr-defined]
    assert outcome(traces)[:3] == (200, "ERROR", "error")
    assert outcome(traces)[4] == ["too late"]


class TimeIsUp(BaseException):
    """What has to get past `except Exception`, as gevent's Timeout."""


class Cancelled(BaseException):
    """As trio names it."""


def stream(then: BaseException | None, **more: Any) -> Any:
    """An ASGI application that sends half a response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        if then is not None:
            raise then

    return app


def test_half_a_response_is_an_error() -> None:
    """An application that returns in the middle of its response has failed, whatever the status was."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(stream(None)))
    assert outcome(traces) == (200, "ERROR", "error", "incomplete_response", [])


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (KeyboardInterrupt(), (200, "STATE_UNSPECIFIED", "cancelled", None, [])),
        (GeneratorExit(), (200, "STATE_UNSPECIFIED", "cancelled", None, [])),
        (Cancelled(), (200, "STATE_UNSPECIFIED", "cancelled", None, [])),
        (SystemExit(1), (200, "ERROR", "error", "SystemExit", ["1"])),
        (TimeIsUp("3 s"), (200, "ERROR", "error", f"{__name__}.TimeIsUp", ["3 s"])),
        (asyncio.CancelledError(), (200, "STATE_UNSPECIFIED", "cancelled", None, [])),
        (ConnectionRefusedError("refused"), (200, "ERROR", "error", "ConnectionRefusedError", ["refused"])),
        (BrokenPipeError("mail server"), (200, "ERROR", "error", "BrokenPipeError", ["mail server"])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_leaves_the_application(exc: BaseException, expected: Any) -> None:
    """Cancellations and interrupts are no errors, other exceptions are, also those that are no `Exception`.

    A connection that the application has lost is an error: no client left.
    """

    async def serve() -> None:
        conversation = Conversation()
        await tracemw.TraceMiddleware(stream(exc))(http_scope(), conversation.receive, conversation.send)

    with capture_traces() as traces, pytest.raises(type(exc)) as caught:
        coroutine = serve()
        try:
            while True:
                coroutine.send(None)
        finally:
            coroutine.close()
    assert caught.value is exc
    assert outcome(traces) == expected
    assert root(traces[0]).status.status_code == ("ERROR" if expected[1] == "ERROR" else "UNSET")


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (KeyboardInterrupt(), "cancelled"),
        (Cancelled(), "cancelled"),
        (SystemExit(1), "error"),
        (TimeIsUp(), "error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_interrupts_pass_through_wsgi(exc: BaseException, expected: str) -> None:
    """Likewise on WSGI: before the response, and in its body."""

    def at_once(env: Any, start_response: Any) -> Any:
        raise exc

    def in_the_body(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"x"
        raise exc

    with capture_traces() as traces:
        with pytest.raises(type(exc)) as caught:
            ask_wsgi(tracemw.WSGITraceMiddleware(at_once))
        assert caught.value is exc
        with pytest.raises(type(exc)) as caught:
            ask_wsgi(tracemw.WSGITraceMiddleware(in_the_body)).read()
        assert caught.value is exc
    assert [root(trace).attributes["tracemw.outcome"] for trace in traces] == [expected, expected]
    assert [len(root(trace).events) for trace in traces] == [expected == "error"] * 2


@pytest.mark.parametrize("exc", [SystemExit(1), TimeIsUp(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_the_route_of_a_request_that_dies(exc: BaseException) -> None:
    """The route is known though the framework handles no `BaseException` and tells nobody of it."""
    flask_app, fast = Flask("app"), FastAPI()
    flask_app.wsgi_app = tracemw.WSGITraceMiddleware(flask_app.wsgi_app)  # type: ignore[method-assign]
    fast.add_middleware(tracemw.TraceMiddleware)

    @flask_app.get("/items/<int:number>")
    @fast.get("/items/{number}")
    def dies(number: int) -> Any:
        raise exc

    with capture_traces() as traces:
        with pytest.raises(type(exc)):
            ask_wsgi(flask_app.wsgi_app, environ("/items/3"))
        with pytest.raises(type(exc)):
            ask(fast, http_scope("/items/3"))
    assert {root(trace).name for trace in traces} == {"GET /items/<int:number>", "GET /items/{number}"}


def client_gone(spec_version: str) -> Any:
    """Send a request to a stream of Starlette's whose client leaves after three parts."""

    async def parts() -> Any:
        for _ in range(50):
            yield b"x"
            await asyncio.sleep(0.01)

    async def handler(request: Any) -> Any:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/x", handler)])
    app.add_middleware(tracemw.TraceMiddleware)

    async def serve() -> None:
        gone = asyncio.Event()
        number = 0

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal number
            number += 1
            if number == 4:
                gone.set()
            if gone.is_set() and spec_version == "2.4":
                raise OSError("nobody there")

        scope = http_scope("/x", asgi={"version": "3.0", "spec_version": spec_version})
        try:
            await app(scope, receive, send)
        except Exception:  # `ClientDisconnect`, or in older versions the server's own exception in a group
            assert spec_version == "2.4"

    asyncio.run(serve())


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_leaves_in_mid_stream(spec_version: str) -> None:
    """Neither a success nor an error, whether the server says so by a message or by an exception in `send`."""
    with capture_traces() as traces:
        client_gone(spec_version)
    assert outcome(traces) == (200, "STATE_UNSPECIFIED", "disconnected", None, [])
    assert 2 <= root(traces[0]).attributes["tracemw.chunks"] <= 5


def test_an_error_after_the_client_left_is_one() -> None:
    """What the application does wrong when it learns that nobody is there is its own error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await receive()
        raise KeyError("in the clean-up")

    with capture_traces() as traces, pytest.raises(KeyError):
        ask(tracemw.TraceMiddleware(app), messages=[{"type": "http.disconnect"}])
    assert outcome(traces)[1:4] == ("ERROR", "error", "KeyError")


def test_a_disconnect_after_the_response_is_none() -> None:
    """Servers say `http.disconnect` also when the response has gone; a server error then stays one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 502})
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.disconnect"

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app), messages=[{"type": "http.disconnect"}])
    assert outcome(traces) == (502, "ERROR", "error", "502", [])


@pytest.mark.parametrize(
    "then", [None, asyncio.CancelledError(), ConnectionResetError("gone"), ValueError("boom")]
)
def test_the_client_left_and_the_application_goes_on(then: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root ends when the client has gone; what goes on does not keep it open, nor become an error by that."""
    monkeypatch.setattr("tracemw.request.GRACE", 0.02)
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await receive()
        await asyncio.sleep(0.3)
        seen.append(len(traces))
        if then is not None:
            raise then

    with capture_traces() as traces:
        try:
            ask(tracemw.TraceMiddleware(app), messages=[{"type": "http.disconnect"}])
        except BaseException as exc:
            assert exc is then or isinstance(exc, asyncio.CancelledError)
    assert seen == [1]
    assert outcome(traces) == (200, "STATE_UNSPECIFIED", "disconnected", None, [])
    assert duration(traces[0]) < 250
    assert names(traces[0]) == ["GET"] + ["background work"] * isinstance(then, ValueError)


def test_an_exception_without_text() -> None:
    """An exception that cannot even tell what it is, is recorded; and passes as it is."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Odd

    with capture_traces() as traces, pytest.raises(Odd):
        ask(tracemw.TraceMiddleware(app))
    assert outcome(traces)[1:3] == ("ERROR", "error")
    assert len(root(traces[0]).events) == 1


def test_an_exception_that_the_application_has_recorded() -> None:
    """One that the application has put onto the root itself, before it lets it go, is not told twice."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise ValueError("boom")
        except ValueError as exc:
            trace_api.get_current_span().record_exception(exc)
            raise

    with capture_traces() as traces, pytest.raises(ValueError):
        ask(tracemw.TraceMiddleware(app))
    assert outcome(traces) == (500, "ERROR", "error", "ValueError", ["boom"])


class Mute(Exception):
    """An exception whose text cannot be had."""

    def __init__(self, instead: BaseException) -> None:
        self.instead = instead

    def __str__(self) -> str:
        raise self.instead


@pytest.mark.parametrize("instead", [ValueError(), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_exception_whose_text_raises(instead: BaseException) -> None:
    """Whatever an exception's own `__str__` raises, the server gets the exception that the application raised."""
    exc = Mute(instead)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("work"):
            raise exc

    def wsgi(env: Any, start_response: Any) -> Any:
        raise exc

    with capture_traces() as traces:
        with pytest.raises(Mute) as caught:
            ask(tracemw.TraceMiddleware(app))
        assert caught.value is exc
        with pytest.raises(Mute) as caught:
            ask_wsgi(tracemw.WSGITraceMiddleware(wsgi))
        assert caught.value is exc
    for trace in traces:
        assert root(trace).attributes["error.type"] == f"{__name__}.Mute"
        assert [event.attributes["exception.type"] for event in root(trace).events] == ["Mute"]


def test_exception_groups() -> None:
    """A group counts by what is in it."""
    kind = getattr(builtins, "BaseExceptionGroup", None)
    if kind is None:
        pytest.skip("Python 3.10 has none")
    group = kind("both", [asyncio.CancelledError(), ValueError("boom")])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise group

    with capture_traces() as traces, pytest.raises(kind):
        ask(tracemw.TraceMiddleware(app))
    assert outcome(traces)[1:3] == ("ERROR", "error")
