"""Requests that are excluded or not sampled: nothing of them is recorded, at any depth, and little is done."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracemw
from tests.request.drive import ask, ask_wsgi, environ, http_scope, websocket_scope
from tests.request.look import names, root
from tracemw.exclusion import Exclusion
from tracemw.testing import capture_traces

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
@pytest.mark.parametrize("kind", ["owned", "global", "joined", "adopted"])
def test_what_is_inside(kind: str, protocol: str) -> None:
    """Nothing of ours is stored or exported, also not from a body that streams; the request is known inside.

    A provider of the application's gets what it always got: its own spans, and the root of whoever traces.
    """
    command = [sys.executable, "-m", "tests.request.quiet", kind, protocol]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for path in ("/quiet", "/sampled out"):
        told = found[path]["told"]
        assert told == {"trace": None, "request": "r-1", "outgoing": "r-1", "headers": ["x-request-id"]}
        assert found[path]["stored"] == []
        ours = {"work", "inner"} & set(found[path]["exported"])
        assert ours == set()
        assert ("plain" in found[path]["exported"]) == (kind in ("joined", "adopted"))
        assert found[path]["roots"] == (1 if kind in ("joined", "adopted") else 0)
    assert found["/kept"]["told"]["headers"] == ["server-timing", "x-request-id", "x-trace-id"]
    plain = set() if kind == "owned" else {"plain"}
    assert [set(spans[1:]) for spans in found["/kept"]["stored"]] == [{"work", "inner"} | plain]
    assert found["stats"] == {"excluded": 1, "sampled_out": 1, "failures": {}}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    with tracemw.start_span("inside"):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})


def wsgi_hello(env: Any, start_response: Any) -> Any:
    """The same for WSGI."""
    with tracemw.start_span("inside"):
        start_response("200 OK", [])
        return [b"hello"]


@pytest.mark.parametrize(
    ("pattern", "path", "excluded"),
    [
        ("/health", "/health", True),
        ("/health", "/health/", False),
        ("/health", "/v1/health", False),
        ("/health", "/healthy", False),
        ("/static/*", "/static/a/b.js", True),
        ("/static/*", "/static", False),
        ("/static/*", "/v1/static/a", False),
        ("/a.b/*", "/axb/c", False),
        ("/a*a", "/a", False),
        ("/*/x/*/y", "/1/x/2/x/3/y", True),
        ("/*/x/*/y", "/1/x/y", False),
        ("*/health", "/v1/health", True),
        ("*/health", "/v1/healthy", False),
        ("/a/*/z", "/a/b/z", True),
        ("/a/*/z", "/a/b/z/", False),
        ("/a.c", "/abc", False),
        ("/[x]", "/[x]", True),
        ("/line*", "/line\nbreak", True),
        ("/ü*", "/über", True),
    ],
)
def test_patterns(pattern: str, path: str, excluded: bool) -> None:
    """A pattern matches the whole path; nothing but `*` is special; the query does not count."""
    with capture_traces() as traces:
        ask(
            tracemw.TraceMiddleware(hello, exclude=[pattern]),
            http_scope(path, query_string=b"x=" + pattern.encode()),
        )
        env = environ(path.encode().decode("latin-1"), QUERY_STRING="x=/health")
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_hello, exclude=[pattern]), env).read()
    assert len(traces) == (0 if excluded else 2)


@given(
    st.lists(st.text("ab/*", min_size=1, max_size=6), max_size=3),
    st.one_of(st.text("ab/", max_size=12), st.text(max_size=3)),
)
def test_wildcards_mean_what_a_regular_expression_would(patterns: list[str], path: str) -> None:
    """Each `*` stands for any text, none included; one pattern that matches the whole path is enough."""
    expressions = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    expected = any(re.fullmatch(expression, path, re.DOTALL) for expression in expressions)
    assert Exclusion(patterns).covers(path) == expected


def test_no_path_keeps_the_server_busy() -> None:
    """Where a pattern has several wildcards, a sender's path of many near misses is looked at in no time."""
    exclusion = Exclusion(["/*/*/*/health", "*/static/*/*.css", "*a*a*a*a*b"])
    began = time.perf_counter()
    for path in ("/" * 100_000, "/static/" * 20_000, "a" * 100_000, "/static/.cs" * 10_000):
        assert not exclusion.covers(path)
    assert time.perf_counter() - began < 2


def test_a_prefix_counts() -> None:
    """What a server has cut off the path of a WSGI application belongs to it."""
    with capture_traces() as traces:
        app = tracemw.WSGITraceMiddleware(wsgi_hello, exclude=["/api/health"])
        ask_wsgi(app, environ("/health", SCRIPT_NAME="/api")).read()
        ask_wsgi(app, environ("/health")).read()
    assert [root(trace).attributes["url.path"] for trace in traces] == ["/health"]


def test_health_probes_are_excluded_by_default() -> None:
    """The usual paths of probes, and those alone."""
    with capture_traces() as traces:
        for path in ("/health", "/healthz", "/livez", "/readyz", "/ping", "/metrics", "/"):
            ask(tracemw.TraceMiddleware(hello), http_scope(path))
    assert [root(trace).attributes["url.path"] for trace in traces] == ["/"]


def test_sockets_too() -> None:
    """An excluded socket works and is not recorded."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        with tracemw.start_span("inside"):
            await send({"type": "websocket.send", "text": "x"})

    with capture_traces() as traces:
        answer = ask(tracemw.TraceMiddleware(app, exclude=["/ws"]), websocket_scope())
    assert list(traces) == []
    assert [name for name, _ in answer.sent[0]["headers"]] == [b"x-request-id"]
    assert answer.sent[1]["text"] == "x"


def test_background_work_and_errors_of_an_unrecorded_request() -> None:
    """Neither work after the response nor an exception makes a trace of it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        await asyncio.sleep(0.02)
        raise ValueError("boom")

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"x"
        raise ValueError("boom")

    with capture_traces() as traces:
        with pytest.raises(ValueError):
            ask(tracemw.TraceMiddleware(app, sample_rate=0.0))
        with pytest.raises(ValueError):
            ask_wsgi(tracemw.WSGITraceMiddleware(wsgi, sample_rate=0.0)).read()
    assert list(traces) == []


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_rate(rate: float) -> None:
    """Of many requests that share is recorded, each one whole; the rest is counted."""
    with capture_traces(sample_rate=rate) as traces:
        app = tracemw.TraceMiddleware(hello)
        before = tracemw.stats()["sampled_out"]
        for _ in range(400):
            ask_many(app)
        found = list(traces)
        left_out = tracemw.stats()["sampled_out"] - before
    assert {tuple(names(trace)) for trace in found} <= {("GET", "inside")}
    assert len(found) + left_out == 400
    assert abs(len(found) / 400 - rate) < 0.12


def ask_many(app: Any) -> None:
    """Send a request without an event loop: the application waits for nothing."""

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        return None

    coroutine = app(http_scope(), receive, send)
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_errors_and_slow_requests_are_kept_whole_on_wsgi() -> None:
    """`keep_errors` and `keep_slower_than` work with both middlewares; what is kept is complete."""

    def app(env: Any, start_response: Any) -> Any:
        with tracemw.start_span("inside"):
            start_response("500 Oops" if env["PATH_INFO"] == "/broken" else "200 OK", [])
        return [b""]

    with capture_traces(sample_rate=0.0, keep_errors=True) as traces:
        wsgi = tracemw.WSGITraceMiddleware(app)
        for path in ("/", "/broken", "/"):
            ask_wsgi(wsgi, environ(path)).read()
    assert [names(trace) for trace in traces] == [["GET", "inside"]]


def test_many_spans_are_held_back_up_to_a_limit() -> None:
    """A request that may be kept holds a bounded number of spans; what was dropped is counted."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(1100):
            with tracemw.start_span("inside"):
                pass
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body"})

    with capture_traces(sample_rate=0.0, keep_errors=True) as traces:
        before = tracemw.stats().get("held_back_dropped", 0)
        ask(tracemw.TraceMiddleware(app))
        assert tracemw.stats()["held_back_dropped"] - before == 100
    assert len(traces[0].data.spans) == 1001


def test_switched_off() -> None:
    """`disable()` leaves requests alone, without headers; `enable()` traces them again."""
    with capture_traces() as traces:
        app, wsgi = tracemw.TraceMiddleware(hello), tracemw.WSGITraceMiddleware(wsgi_hello)
        tracemw.disable()
        answer, said = ask(app), ask_wsgi(wsgi)
        said.read()
        tracemw.enable()
        ask(app)
    assert [answer.sent[0]["headers"], said.headers] == [[], []]
    assert len(traces) == 1
