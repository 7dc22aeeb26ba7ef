"""The copy of a WSGI request's body, whichever of the stream's methods it is read with."""

from __future__ import annotations

import array
import io
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import ANY
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import make_server as wsgiref_server

import pytest
from flask import Flask, request
from werkzeug.serving import make_server as werkzeug_server

import tracemw
from tests.request.drive import ask_wsgi, environ
from tests.request.look import root
from tracemw.bodies import Tee, TeeInput
from tracemw.testing import capture_traces

FORM = "application/x-www-form-urlencoded"
# What is asked for: content type, body, what is recorded of it.
ASKED: dict[str, tuple[str, bytes, Any]] = {
    "/json": ("application/json", b'{"a": 1, "password": "p"}', {"a": 1, "password": "[REDACTED]"}),
    "/form": (FORM, b"a=1&password=p", "a=1&password=[REDACTED]"),
    "/data": ("text/plain", b"hello", "hello"),
    "/stream": ("text/plain", b"hello", "hello"),
}
LINES = b"one\ntwo\nthree"


def flask_app() -> Flask:
    """Reads its requests in all the ways that Flask has."""
    app = Flask("reader")
    app.add_url_rule("/json", "json", lambda: request.get_json(), methods=["POST"])
    app.add_url_rule("/form", "form", lambda: request.form.to_dict(), methods=["POST"])
    app.add_url_rule("/data", "data", lambda: request.get_data(), methods=["POST"])
    app.add_url_rule("/stream", "stream", lambda: request.stream.read(), methods=["POST"])
    app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app, capture_request_body=True)  # type: ignore[method-assign]
    return app


class Quiet(WSGIRequestHandler):
    """Writes no log."""

    def log_message(self, *args: Any) -> None:
        """Leave the line out."""


@contextmanager
def client(kind: str, app: Flask) -> Iterator[Callable[[str, bytes, str], bytes]]:
    """A function that sends a request through Flask's test client or a server."""
    if kind == "test client":
        yield lambda path, body, type_: app.test_client().post(path, data=body, content_type=type_).data
        return
    server: Any
    if kind == "wsgiref":
        server = wsgiref_server("127.0.0.1", 0, app, handler_class=Quiet)
    else:
        server = werkzeug_server("127.0.0.1", 0, app)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def send(path: str, body: bytes, type_: str) -> bytes:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        asked = urllib.request.Request(url, body, {"Content-Type": type_})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.read()  # type: ignore[no-any-return]

    try:
        yield send
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("kind", ["test client", "wsgiref", "werkzeug"])
def test_what_flask_reads_is_recorded(kind: str) -> None:
    """JSON, a form, the bytes and the stream, with each server and with the test client."""
    recorded = {}
    with capture_traces() as traces, client(kind, flask_app()) as send:
        for path, (type_, body, _) in ASKED.items():
            answer = send(path, body, type_)
            assert answer == body if type_ == "text/plain" else json.loads(answer) == {"a": ANY, "password": "p"}
        for trace in traces:
            recorded[root(trace).attributes["url.path"]] = root(trace).attributes
    for path, (_, body, expected) in ASKED.items():
        assert recorded[path]["tracemw.request.body.size"] == len(body)
        assert recorded[path]["tracemw.request.body"] == expected


def into(method: str) -> Callable[[Any], bytes]:
    """Reads with a method that fills a buffer, which is larger than what is left."""

    def reading(stream: Any) -> bytes:
        buffer = bytearray(5)
        got = b""
        while number := getattr(stream, method)(buffer):
            got += buffer[:number]
        return got

    return reading


def into_numbers(stream: Any) -> bytes:
    """Read into a buffer whose items are wider than a byte."""
    buffer = array.array("H", [0] * 20)
    number = stream.readinto(buffer)
    return buffer.tobytes()[:number]


@pytest.mark.parametrize(
    "reading",
    [
        pytest.param(lambda s: s.read(), id="read"),
        pytest.param(lambda s: s.read(3) + s.read(-1), id="read in parts"),
        pytest.param(lambda s: b"".join(iter(lambda: s.read1(4), b"")), id="read1"),
        pytest.param(lambda s: b"".join(iter(s.readline, b"")), id="readline"),
        pytest.param(lambda s: b"".join(s.readlines()), id="readlines"),
        pytest.param(lambda s: b"".join(s), id="iteration"),
        pytest.param(lambda s: next(s) + next(iter(s)) + s.read(), id="next"),
        pytest.param(lambda s: s.peek(4) and s.read(), id="peek"),
        pytest.param(into("readinto"), id="readinto"),
        pytest.param(into("readinto1"), id="readinto1"),
        pytest.param(into_numbers, id="readinto with wide items"),
        pytest.param(lambda s: io.BufferedReader(s).read(), id="a buffer around it"),
        pytest.param(lambda s: io.TextIOWrapper(s).read().encode(), id="text around it"),
    ],
)
def test_every_way_to_read_is_seen_once(reading: Callable[[Any], bytes]) -> None:
    """The application reads what the server's stream gives, and all of that is recorded, nothing twice."""
    got = []

    def app(env: Any, start_response: Any) -> Any:
        got.append(reading(env["wsgi.input"]))
        start_response("200 OK", [])
        return [b""]

    # As wsgiref has it; a `BytesIO` has no `peek`.
    stream = io.BufferedReader(io.BytesIO(LINES))
    env = environ("/", "POST", **{"wsgi.input": stream, "CONTENT_TYPE": "text/plain"})
    with capture_traces() as traces:
        ask_wsgi(tracemw.WSGITraceMiddleware(app, capture_request_body=True), env).read()
    assert got == [LINES]
    assert root(traces[0]).attributes["tracemw.request.body"] == LINES.decode()
    assert root(traces[0]).attributes["tracemw.request.body.size"] == len(LINES)


def test_the_copy_has_the_methods_of_the_stream_and_no_others() -> None:
    """PEP 3333 asks for four; a framework that finds another one would call it."""

    class Least:
        def read(self, size: int = -1) -> bytes:
            return b"x"

        def __iter__(self) -> Any:
            yield b"line"

    tee = Tee("text/plain")
    stream = TeeInput(Least(), tee)
    assert hasattr(stream, "read")
    assert not [name for name in ("read1", "readline", "readinto", "readinto1", "peek") if hasattr(stream, name)]
    assert [*stream, stream.read(size=1)] == [b"line", b"x"]
    assert tee.attributes("body") == {"body.size": 5, "body": b"linex"}
