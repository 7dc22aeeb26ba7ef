"""Options of the middlewares: wrong ones are told at once, and never answer a request."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import tracemw
from tests.request.drive import ask, ask_wsgi, environ, http_scope
from tests.request.look import root
from tracemw import guard
from tracemw.errors import SettingError
from tracemw.testing import capture_traces

WRONG: list[dict[str, Any]] = [
    {"sample_rate": 7},
    {"sampel_rate": 1.0},
    {"exclude": 3},
    {"request_id_header": "not a name"},
    {"trust_traceparent": ["not a network"]},
]


class Passing:
    """A middleware of the application's."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on."""
        await self.app(scope, receive, send)


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def wsgi(env: Any, start_response: Any) -> Any:
    """The smallest application."""
    start_response("200 OK", [])
    return []


@pytest.mark.parametrize("options", WRONG, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("wrap", [tracemw.TraceMiddleware, tracemw.WSGITraceMiddleware, tracemw.instrument])
def test_direct_wrapping_raises(wrap: Any, options: dict[str, Any]) -> None:
    """Where the application is wrapped, the error names the setting."""
    app = wsgi if wrap is tracemw.WSGITraceMiddleware else asgi
    with pytest.raises(SettingError, match=next(iter(options))):
        wrap(app, **options)


def in_the_stack(kind: str, options: dict[str, Any]) -> Any:
    """An application of a framework that builds its stack with the first request."""
    if kind == "fastapi":
        app: Any = FastAPI()
        app.add_api_route("/", lambda: "ok")
        app.add_middleware(tracemw.TraceMiddleware, **options)
        return app
    routes = [Route("/", lambda request: PlainTextResponse("ok"))]
    if kind == "starlette, in its list":
        return Starlette(routes=routes, middleware=[Middleware(tracemw.TraceMiddleware, **options)])
    app = Starlette(routes=routes)
    app.add_middleware(Passing)
    app.add_middleware(tracemw.TraceMiddleware, **options)
    app.add_middleware(Passing)
    return app


@pytest.mark.parametrize("options", WRONG, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("kind", ["fastapi", "starlette, in its list", "starlette, between others"])
def test_a_framework_s_stack_goes_without(
    kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There an exception would be a 500 for every request: tracing is off, and the log says why."""
    monkeypatch.setattr(guard, "_last_logged", {})  # the same line is not logged twice in a minute
    failed_before = guard.failures()
    app = in_the_stack(kind, options)
    with capture_traces() as traces, caplog.at_level(logging.ERROR, logger="tracemw"):
        answers = [ask(app, http_scope("/")) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert list(traces) == []
    (said,) = [record.message for record in caplog.records if "tracing is off" in record.message]
    assert next(iter(options)) in said
    assert guard.failures() == failed_before  # it is not tried again with every request


def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A variable that a framework's stack meets first is as little a reason for a 500."""
    from tracemw import config

    monkeypatch.setenv("TRACEMW_SAMPLE_RATE", "often")
    monkeypatch.setattr(config._state, "settings", None)
    app = in_the_stack("fastapi", {})
    with caplog.at_level(logging.ERROR, logger="tracemw"):
        assert ask(app, http_scope("/")).status == 200
    assert any("TRACEMW_SAMPLE_RATE" in record.message for record in caplog.records)


def test_settings_are_read_once() -> None:
    """Options hold for their middleware; what is changed in the process reaches all from the next request on."""
    with capture_traces() as traces:
        first = tracemw.TraceMiddleware(asgi, exclude=["/a"])
        second = tracemw.TraceMiddleware(asgi)
        for app in (first, second):
            for path in ("/a", "/b"):
                ask(app, http_scope(path))
        tracer = first._tracer
        ask(first, http_scope("/c"))
        assert first._tracer is tracer
    assert [root(trace).attributes["url.path"] for trace in traces] == ["/b", "/a", "/b", "/c"]


def test_a_user_option_that_fails() -> None:
    """The claim of the header stays, the request goes on."""

    def nobody(carrier: Any) -> str:
        raise LookupError

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(asgi, user=nobody), http_scope(headers=[(b"x-user-id", b"jane")]))
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi, user=nobody), environ(HTTP_X_USER_ID="jane")).read()
    assert [trace.info.trace_metadata["mlflow.trace.user"] for trace in traces] == ["jane", "jane"]
