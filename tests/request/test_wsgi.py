"""The WSGI middleware, driven by hand: lazy bodies stay lazy, `close()` ends the root, nothing leaks."""

from __future__ import annotations

import contextvars
import gc
import io
import sys
import threading
from typing import Any
from wsgiref.util import FileWrapper

import pytest

import tracemw
from tests.request.drive import WSGIAnswer, ask_wsgi, environ
from tests.request.look import root
from tracemw.testing import capture_traces


def hello(env: Any, start_response: Any) -> Any:
    """The smallest application."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def test_a_request_is_one_trace_with_the_ids_of_its_headers() -> None:
    """Ids come from the headers; the response tells request id and trace id."""
    env = environ("/a", HTTP_X_REQUEST_ID="req-1", HTTP_X_SESSION_ID="s-1", HTTP_X_USER_ID="jane")
    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(hello), env)
        assert answer.read() == b"hello"
    (trace,) = traces
    assert trace.info.client_request_id == "req-1"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert trace.info.trace_metadata["mlflow.trace.user"] == "jane"
    assert root(trace).attributes["http.response.body.size"] == 5
    headers = dict(answer.headers)
    assert headers["X-Request-Id"] == "req-1"
    assert headers["X-Trace-Id"] == trace.info.trace_id


def test_a_lazy_body_stays_lazy_and_its_spans_nest() -> None:
    """No part is made before the server asks for it; spans in the generator are children of the root."""
    made = []

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        for i in range(3):
            with tracemw.start_span(f"part {i}"):
                made.append(i)
            yield b"x"

    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(app))
        assert made == []
        next(iter(answer.body))
        assert made == [0]
        assert tracemw.get_current_active_span() is None
        assert len(traces) == 0
        answer.read()
    (trace,) = traces
    assert {s.parent_id for s in trace.data.spans if s.name.startswith("part")} == {root(trace).span_id}
    assert root(trace).attributes["tracemw.chunks"] == 3


def test_what_servers_look_at_survives() -> None:
    """The length of a list, and the server's own file wrapper, come through; a generator has no length."""
    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(hello))
        assert len(answer.body) == 1
        answer.read()

        file = io.BytesIO(b"content")

        def sends_a_file(env: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return env["wsgi.file_wrapper"](file)

        env = {**environ(), "wsgi.file_wrapper": FileWrapper}
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(sends_a_file), env)
        assert isinstance(answer.body, FileWrapper)
        assert len(traces) == 1
        assert answer.read() == b"content"
        assert file.closed

        def generator(env: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            yield b"x"

        answer = ask_wsgi(tracemw.WSGITraceMiddleware(generator))
        assert not hasattr(answer.body, "__len__")
        answer.read()
    assert len(traces) == 3


def test_close_is_called_once() -> None:
    """The application's `close()` is called once, in the request's context."""
    closed = []

    class Body:
        def __iter__(self) -> Any:
            yield b"x"

        def close(self) -> None:
            closed.append(tracemw.get_active_trace_id())

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(app))
        answer.read()
        answer.body.close()
    assert closed == [traces[0].info.trace_id]


def test_write_and_exc_info() -> None:
    """The `write` callable works and counts; a second `start_response` with `exc_info` sets the status."""

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        try:
            raise ValueError("before the first byte")
        except ValueError:
            write = start_response("500 Oops", [], sys.exc_info())
        write(b"written")
        return []

    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(app))
        answer.read()
    assert answer.written == [b"written"]
    assert root(traces[0]).attributes["http.response.status_code"] == 500
    assert root(traces[0]).attributes["http.response.body.size"] == 7
    assert traces[0].info.state == "ERROR"


@pytest.mark.parametrize("named", [True, False])
def test_exc_info_reaches_the_server_in_the_way_it_was_given(named: bool) -> None:
    """By position or by the name that all servers have for it; and not at all where it was not given."""
    got: list[Any] = []

    def app(env: Any, start_response: Any) -> Any:
        try:
            raise ValueError("before the first byte")
        except ValueError:
            more = {"exc_info": sys.exc_info()} if named else {}
            start_response("503 Sorry", [], *([] if named else [sys.exc_info()]), **more)
        return [b"sorry"]

    def of_the_server(status: str, headers: Any, *exc_info: Any, **more: Any) -> Any:
        got.append((status, [info[0] for info in exc_info], {name: info[0] for name, info in more.items()}))

    with capture_traces() as traces:
        assert list(tracemw.WSGITraceMiddleware(app)(environ(), of_the_server)) == [b"sorry"]
        list(tracemw.WSGITraceMiddleware(hello)(environ(), of_the_server))
    assert got[0] == ("503 Sorry", [] if named else [ValueError], {"exc_info": ValueError} if named else {})
    assert got[1] == ("200 OK", [], {})
    assert root(traces[0]).attributes["error.type"] == "ValueError"


def test_exceptions_pass_untouched() -> None:
    """An exception from the application, or from its body, reaches the server as it was raised."""
    error = ValueError("boom")

    def fails(env: Any, start_response: Any) -> Any:
        raise error

    def fails_in_mid_stream(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"x"
        raise error

    with capture_traces() as traces:
        with pytest.raises(ValueError) as caught:
            ask_wsgi(tracemw.WSGITraceMiddleware(fails))
        assert caught.value is error
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(fails_in_mid_stream))
        with pytest.raises(ValueError):
            answer.read()
    assert [trace.info.state for trace in traces] == ["ERROR", "ERROR"]
    assert [len(root(trace).events) for trace in traces] == [1, 1]
    assert root(traces[1]).attributes["http.response.status_code"] == 200


def stream(env: Any, start_response: Any) -> Any:
    """A body of ten parts."""
    start_response("200 OK", [])
    for _ in range(10):
        yield b"x"


def test_a_body_closed_early_is_a_disconnect() -> None:
    """A server that closes a body it has not read to the end has lost its client."""
    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(stream))
        next(answer.body)
        answer.body.close()
    assert root(traces[0]).attributes["tracemw.outcome"] == "disconnected"
    assert traces[0].info.state == "STATE_UNSPECIFIED"


def test_a_body_that_is_dropped_is_recorded() -> None:
    """A server that drops a body without closing it loses no trace."""
    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(stream))
        next(answer.body)
        answer.body = None
        gc.collect()
    assert len(traces) == 1


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content")])
def test_bodies_that_need_not_be_read(method: str, status: str) -> None:
    """The answer to HEAD, and 204, are complete without their body having been read."""

    def app(env: Any, start_response: Any) -> Any:
        start_response(status, [])
        return [b""]

    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(app), environ(method=method))
        answer.body.close()
    assert root(traces[0]).attributes["tracemw.outcome"] == "completed"


def test_body_and_close_on_other_threads(caplog: pytest.LogCaptureFixture) -> None:
    """A body read on one thread and closed on another nests, ends once, and logs nothing."""

    class Body:
        def __init__(self) -> None:
            self.parts = iter(range(3))

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> bytes:
            with tracemw.start_span(f"part {next(self.parts)}"):
                return b"x"

        def close(self) -> None:
            with tracemw.start_span("closing"):
                closed.append(tracemw.current_request.trace_id)

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    closed: list[str | None] = []
    with capture_traces() as traces:
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(app))
        for step in (lambda: list(answer.body), lambda: answer.body.close()):
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
    (trace,) = traces
    assert closed == [trace.info.trace_id]
    below = [span.name for span in trace.data.spans if span.parent_id == root(trace).span_id]
    assert sorted(below) == ["closing", "part 0", "part 1", "part 2"]
    assert not caplog.records


def test_nothing_leaks_into_the_next_request_of_the_thread() -> None:
    """Each request has a context of its own: what one sets, the next does not see; what the server set, all do."""
    variable = contextvars.ContextVar("variable", default="nothing")
    seen = []

    def app(env: Any, start_response: Any) -> Any:
        seen.append(variable.get())
        variable.set("of the request")
        start_response("200 OK", [])
        yield b"a"
        seen.append(variable.get())

    def serve() -> None:
        variable.set("the server's")
        with capture_traces():
            for _ in range(2):
                ask_wsgi(tracemw.WSGITraceMiddleware(app)).read()
        assert variable.get() == "the server's"

    contextvars.copy_context().run(serve)
    assert seen == ["the server's", "of the request"] * 2


def test_a_second_middleware_makes_no_second_root() -> None:
    """Two instances, one around the other: one trace."""
    with capture_traces() as traces:
        ask_wsgi(tracemw.WSGITraceMiddleware(tracemw.WSGITraceMiddleware(hello))).read()
    assert len(traces) == 1


def test_bodies_are_kept_on_request() -> None:
    """Copies of the bodies; the application reads its input as it came."""
    got = []

    def app(env: Any, start_response: Any) -> Any:
        got.append(env["wsgi.input"].read())
        start_response("200 OK", [("Content-Type", "application/json")])
        return [b'{"api_key": "s3cr3t-value", "answer": 42}']

    body = b'{"question": "hi", "password": "hunter2"}'
    env = environ(
        "/", "POST", **{"wsgi.input": io.BytesIO(body), "CONTENT_TYPE": "application/json", "CONTENT_LENGTH": "41"}
    )
    with capture_traces() as traces:
        ask_wsgi(
            tracemw.WSGITraceMiddleware(app, capture_request_body=True, capture_response_body=True), env
        ).read()
    assert got == [body]
    text = traces[0].to_json()
    assert "hunter2" not in text
    assert "s3cr3t-value" not in text
    assert "42" in str(root(traces[0]).attributes["tracemw.response.body"])


def test_an_option_that_is_not_allowed_raises_at_once() -> None:
    """Direct wrapping fails where it stands, not with the first request."""
    with pytest.raises(tracemw.errors.SettingError, match="sample_rate"):
        tracemw.WSGITraceMiddleware(hello, sample_rate=7)
    with pytest.raises(tracemw.errors.SettingError, match="did you mean"):
        tracemw.TraceMiddleware(hello, sampel_rate=1)  # type: ignore[arg-type]


def test_wsgi_answers_are_what_they_were() -> None:
    """Status line, the application's headers and the body are handed on as they are."""

    def app(env: Any, start_response: Any) -> Any:
        start_response("299 Very Own", [("X-A", "1"), ("X-A", "2")])
        return [b"a", b"", b"b"]

    with capture_traces():
        answer: WSGIAnswer = ask_wsgi(tracemw.WSGITraceMiddleware(app))
    assert answer.status == "299 Very Own"
    assert answer.headers[:2] == [("X-A", "1"), ("X-A", "2")]
    assert list(answer.body) == [b"a", b"", b"b"]
