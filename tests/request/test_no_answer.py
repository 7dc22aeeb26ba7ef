"""Requests to which the application itself gave no answer: what the client saw is what the server made of it."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope
from tests.request.look import root
from tracemw.testing import capture_traces


def facts(trace: tracemw.Trace) -> tuple[Any, ...]:
    """Status, state and type of the error."""
    attributes = root(trace).attributes
    return attributes.get("http.response.status_code"), trace.info.state, attributes.get("error.type")


def fails_at_once(env: Any, start_response: Any) -> Any:
    """Raise before the response."""
    raise ValueError("boom")


def fails_before_the_body(env: Any, start_response: Any) -> Any:
    """Raise when the headers are said, but not sent yet."""
    start_response("200 OK", [])
    raise ValueError("boom")


def fails_before_a_part(env: Any, start_response: Any) -> Any:
    """Raise in the body, before its first part."""
    start_response("200 OK", [])
    if env:
        raise ValueError("boom")
    yield b""


def fails_after_a_part(env: Any, start_response: Any) -> Any:
    """Raise when the headers have been sent."""
    start_response("200 OK", [])
    yield b"x"
    raise ValueError("boom")


@pytest.mark.parametrize("app", [fails_at_once, fails_before_the_body, fails_before_a_part, fails_after_a_part])
def test_the_status_of_a_failed_request_is_the_one_that_the_client_saw(app: Any, monkeypatch: Any) -> None:
    """Under wsgiref's server: its own 500 where nothing was sent, else what was sent."""

    class Quiet(WSGIRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setattr(SimpleHandler, "log_exception", lambda *args: None)
    with capture_traces() as traces:
        server = make_server("127.0.0.1", 0, tracemw.WSGITraceMiddleware(app), handler_class=Quiet)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=20) as answer:
                seen = answer.status
        except urllib.error.HTTPError as exc:
            seen = exc.code
            exc.close()
        thread.join()
        server.server_close()
    assert facts(traces[0]) == (seen, "ERROR", "ValueError")
    assert seen == (200 if app is fails_after_a_part else 500)


def test_an_asgi_application_that_fails_before_its_response() -> None:
    """The same for ASGI, where servers send the head of a response at once; an interrupt gets no answer."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise (SystemExit if scope["path"] == "/exit" else ValueError)("boom")

    with capture_traces() as traces:
        for path in ("/", "/late"):
            with pytest.raises(ValueError):
                ask(tracemw.TraceMiddleware(fails), http_scope(path))
        call = tracemw.TraceMiddleware(fails)(http_scope("/exit"), Conversation().receive, Conversation().send)
        with pytest.raises(SystemExit):
            call.send(None)
    assert [facts(trace) for trace in traces] == [
        (500, "ERROR", "ValueError"), (200, "ERROR", "ValueError"), (None, "ERROR", "SystemExit"),
    ]  # fmt: skip


def test_a_wsgi_application_that_never_starts_a_response() -> None:
    """A body alone is no response, as on ASGI."""
    with capture_traces() as traces:
        for body in ([b""], [], [b"x"], iter([b"x"])):
            ask_wsgi(tracemw.WSGITraceMiddleware(lambda env, start_response, body=body: body)).read()
    assert [facts(trace) for trace in traces] == [(None, "ERROR", "no_response")] * 4


def empty(env: Any, start_response: Any) -> Any:
    """Answer without a body."""
    start_response("200 OK", [])
    return []


def test_a_path_and_a_query_string_have_a_bound() -> None:
    """Of a megabyte 8 KiB are stored, and what is secret in them is masked as ever."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert len(scope["path"]) > 1_000_000
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    query = "token=" + "s3cr3t" * 200_000
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app), http_scope("/" + "p" * 1_000_000, query_string=query.encode()))
        env = environ("/" + "p" * 9000, QUERY_STRING="q=" + "z" * 9000)
        ask_wsgi(tracemw.WSGITraceMiddleware(empty), env).read()
    attributes = root(traces[0]).attributes
    assert attributes["url.path"] == "/" + "p" * 8191
    assert attributes["url.query"] == "token=[REDACTED]"
    assert len(root(traces[1]).attributes["url.query"]) == 8192
