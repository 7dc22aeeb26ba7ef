"""Several middlewares of ours on one request, and one scope or environ for several requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import tracemw
from tests.request.drive import Conversation, WSGIAnswer, ask, environ, http_scope
from tests.request.look import names, root
from tracemw.testing import capture_traces

CLAIM = [(b"x-user-id", b"claimed")]
TREE = {"GET", "work"}


class Flaky:
    """Fails at its first request, answers the next ones."""

    def __init__(self) -> None:
        self.asked = 0

    def work(self) -> None:
        """Raise at the first time."""
        self.asked += 1
        if self.asked == 1:
            raise ConnectionError("the database is away")
        with tracemw.start_span("work"):
            pass

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, as ASGI has it."""
        self.work()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def wsgi(self, env: Any, start_response: Any) -> Any:
        """The application, as WSGI has it."""
        self.work()
        start_response("200 OK", [])
        return [b"ok"]


@pytest.mark.parametrize("sample_rate", [1.0, 0.0])
def test_an_asgi_scope_that_comes_again(sample_rate: float) -> None:
    """Each attempt of a middleware outside of us has a trace and headers of its own; so has a scope used twice."""
    traced = tracemw.TraceMiddleware(Flaky().asgi, sample_rate=sample_rate)
    scope, conversation = http_scope(), Conversation()

    async def thrice() -> None:
        for _ in range(3):
            try:
                await traced(scope, conversation.receive, conversation.send)
            except ConnectionError:
                continue

    with capture_traces() as traces:
        asyncio.run(thrice())
    starts = [dict(m["headers"]) for m in conversation.sent if m["type"] == "http.response.start"]
    assert len({headers[b"x-request-id"] for headers in starts}) == 2
    if sample_rate:
        assert [trace.info.state for trace in traces] == ["ERROR", "OK", "OK"]
        assert [set(names(trace)) for trace in traces] == [{"GET"}, TREE, TREE]
        assert [h[b"x-trace-id"].decode() for h in starts] == [trace.info.trace_id for trace in traces[1:]]
    else:
        assert len(traces) == 0


def test_a_wsgi_environ_that_comes_again() -> None:
    """The same for WSGI: no span of the second attempt is a root."""
    traced, env = tracemw.WSGITraceMiddleware(Flaky().wsgi), environ()
    answers = []
    with capture_traces() as traces:
        for _ in range(3):
            answer = WSGIAnswer()
            try:
                answer.body = traced(env, answer.start_response)
            except ConnectionError:
                continue
            answer.read()
            answers.append(dict(answer.headers)["X-Trace-Id"])
    assert [trace.info.state for trace in traces] == ["ERROR", "OK", "OK"]
    assert [set(names(trace)) for trace in traces] == [{"GET"}, TREE, TREE]
    assert answers == [trace.info.trace_id for trace in traces[1:]]


def test_what_goes_on_after_the_answer_is_no_other_request() -> None:
    """A middleware that answers first and calls the application: the inner one of ours joins the ended trace."""
    inner = tracemw.TraceMiddleware(Flaky().asgi)

    async def answers_first(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b"accepted"})

        async def nowhere(message: Any) -> None:
            pass

        inner.app.__self__.asked = 1  # type: ignore[attr-defined]  # does not fail
        await inner(scope, receive, nowhere)

    conversation = Conversation()
    with capture_traces() as traces:
        outer = tracemw.TraceMiddleware(answers_first)
        asyncio.run(outer(http_scope(), conversation.receive, conversation.send))
    (trace,) = traces
    assert set(names(trace)) == TREE
    assert root(trace).attributes["http.response.status_code"] == 202


def user_of(traces: Any) -> Any:
    """The user of the only trace."""
    (trace,) = traces
    return trace.info.trace_metadata.get("mlflow.trace.user")


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [(None, "sub", "sub"), ("outer", "sub", "outer"), ("outer", None, "outer"), (None, None, "claimed")],
)
def test_the_user_option_of_a_mounted_application(outer: Any, inner: Any, expected: str) -> None:
    """The second of ours adds the user that it knows, before the header's claim; the outer option comes first."""

    def option(name: Any) -> Any:
        return {} if name is None else {"user": lambda carrier: name}

    sub, app = FastAPI(), FastAPI()
    sub.add_middleware(tracemw.TraceMiddleware, **option(inner))
    sub.add_api_route("/a", lambda: 1)
    app.add_middleware(tracemw.TraceMiddleware, **option(outer))
    app.mount("/sub", sub)
    for _ in range(2):
        with capture_traces() as traces:
            ask(app, http_scope("/sub/a", headers=CLAIM))
        assert user_of(traces) == expected

    def hello(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return [b""]

    mounted = tracemw.WSGITraceMiddleware(hello, **option(inner))
    both = DispatcherMiddleware(Flask("outer").wsgi_app, {"/sub": mounted})
    answer = WSGIAnswer()
    with capture_traces() as traces:
        answer.body = tracemw.WSGITraceMiddleware(both, **option(outer))(
            environ("/sub/a", HTTP_X_USER_ID="claimed"), answer.start_response
        )
        answer.read()
    assert user_of(traces) == expected


def test_the_user_that_one_of_several_layers_knows() -> None:
    """A layer further inside that knows none does not hide the one in between; its option beats a framework."""
    apps = [FastAPI() for _ in range(3)]

    @apps[0].middleware("http")
    async def authenticate(request: Any, call_next: Any) -> Any:
        request.scope["user"] = "of the framework"
        return await call_next(request)

    for number, app in enumerate(apps):
        option: Any = {"user": lambda scope: "in between"} if number == 1 else {}
        app.add_middleware(tracemw.TraceMiddleware, **option)
    apps[2].add_api_route("/a", lambda: 1)
    apps[0].mount("/b", apps[1])
    apps[1].mount("/c", apps[2])
    with capture_traces() as traces:
        ask(apps[0], http_scope("/b/c/a", headers=CLAIM))
    assert user_of(traces) == "in between"
    assert root(traces[0]).attributes["http.route"] == "/b/c/a"
