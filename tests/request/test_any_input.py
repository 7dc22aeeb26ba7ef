"""Whatever a client or a server sends: no request fails, no log line breaks, no stored value exceeds its limit."""

from __future__ import annotations

import json
import logging
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

import tracemw
from tests.request.drive import WSGIAnswer, environ, http_scope
from tests.request.look import root
from tracemw.logging import TraceContextFilter
from tracemw.testing import capture_traces

NAMES = st.sampled_from(
    [b"x-request-id", b"x-session-id", b"x-user-id", b"traceparent", b"tracestate", b"baggage", b"X-User-ID"]
)
NASTY = [b"", b" ", b"\x00", b"a\r\nX-Evil: 1", b"\xff\xfe", b"\xed\xa0\x80", b"x" * 300, b"\xc3\xa9" * 249]
VALUES = st.one_of(st.binary(max_size=400), st.sampled_from(NASTY), st.text(max_size=60).map(str.encode))
HEADERS = st.lists(st.tuples(st.one_of(NAMES, st.binary(max_size=20)), VALUES), max_size=8)
METHODS = st.one_of(st.sampled_from(["GET", "POST", "get", "", "\r\n", "BREW"]), st.text(max_size=100))
PATHS = st.one_of(st.sampled_from(["", "/", "//", "/\n", "/%00", "/\ud800"]), st.text(max_size=300))
STATUSES = st.one_of(st.integers(100, 599), st.integers(), st.none(), st.text(max_size=3))
LIMITS = {"mlflow.trace.session": 250, "mlflow.trace.user": 250}
formatter = logging.Formatter(
    "%(levelname)s %(trace_id)s %(client_request_id)s %(session_id)s %(user_id)s %(message)s"
)


class Lines(logging.Handler):
    """Keeps what it would have written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.addFilter(TraceContextFilter())
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def check(traces: Any, lines: list[str], said: dict[str, str]) -> None:
    """The rules that hold for every input."""
    assert [line.splitlines() for line in lines] == [[line] for line in lines]
    assert all(value.isprintable() and value.isascii() and len(value) <= 200 for value in said.values())
    (trace,) = traces
    info = trace.info
    assert info.client_request_id is None or (
        info.client_request_id.isascii() and len(info.client_request_id) <= 128
    )
    for key, limit in LIMITS.items():
        value = info.trace_metadata.get(key, "")
        assert len(value) <= limit
        assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value)
    span = root(trace)
    assert span.name.split()[0] in ("GET", "POST", "_OTHER")
    assert len(span.attributes.get("http.request.method_original", "")) <= 64
    json.loads(trace.to_json())


@given(
    method=METHODS,
    path=PATHS,
    headers=HEADERS,
    query=st.binary(max_size=100),
    status=STATUSES,
    trusted=st.booleans(),
)
@example(method="GET", path="/", headers=[(b"x-user-id", b"a\xc2\x85b")], query=b"\xff", status=200, trusted=True)
@example(method="X" * 100, path="/", headers=[], query=b"", status=200, trusted=False)
def test_asgi(method: str, path: str, headers: Any, query: bytes, status: Any, trusted: bool) -> None:
    """Any bytes in headers and query, any method, path and status."""
    log = Lines()
    logger = logging.getLogger(f"{__name__}.asgi")
    logger.addHandler(log)
    logger.propagate = False
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        logger.warning("handled")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        logger.warning("%s", scope["tracemw.request"])

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = http_scope(path, method, headers, query_string=query)
    try:
        with capture_traces() as traces:
            try:
                app_ = tracemw.TraceMiddleware(app, trust_traceparent=trusted, exclude=[])
                app_(scope, receive, send).send(None)
            except StopIteration:
                pass
            check(traces, log.lines, {n.decode(): v.decode("latin-1") for n, v in sent[0]["headers"]})
    finally:
        logger.removeHandler(log)
    assert sent[0]["status"] is status
    assert sent[1] == {"type": "http.response.body", "body": b"x"}


@given(
    method=METHODS,
    path=PATHS,
    prefix=PATHS,
    headers=st.dictionaries(
        st.sampled_from(["X_REQUEST_ID", "X_SESSION_ID", "X_USER_ID", "TRACEPARENT", "BAGGAGE"]),
        st.one_of(VALUES.map(lambda value: value.decode("latin-1")), st.text(max_size=300)),
    ),
    query=st.text(max_size=100),
    status=st.one_of(st.integers(100, 599).map(lambda code: f"{code} Reason"), st.text(max_size=20)),
    trusted=st.booleans(),
)
def test_wsgi(
    method: str, path: str, prefix: str, headers: dict[str, str], query: str, status: str, trusted: bool
) -> None:
    """The same for WSGI, also from servers that put into the environ what PEP 3333 does not allow."""
    log = Lines()
    logger = logging.getLogger(f"{__name__}.wsgi")
    logger.addHandler(log)
    logger.propagate = False

    def app(env: Any, start_response: Any) -> Any:
        logger.warning("handled")
        start_response(status, [])
        yield b"x"
        logger.warning("%s", env["tracemw.request"])

    env = environ(path, method, SCRIPT_NAME=prefix, QUERY_STRING=query)
    env.update({f"HTTP_{name}": value for name, value in headers.items()})
    answer = WSGIAnswer()
    try:
        with capture_traces() as traces:
            wsgi = tracemw.WSGITraceMiddleware(app, trust_traceparent=trusted, exclude=[])
            answer.body = wsgi(env, answer.start_response)
            assert answer.read() == b"x"
            check(traces, log.lines, dict(answer.headers))
    finally:
        logger.removeHandler(log)
    assert answer.status is status


ODD = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.lists(st.none(), max_size=2), st.binary(max_size=5)
)


@given(
    odd=st.dictionaries(
        st.sampled_from(["headers", "path", "method", "client", "server", "query_string", "scheme"]), ODD
    )
)
def test_scopes_that_break_the_rules(odd: dict[str, Any]) -> None:
    """A server or a middleware that puts anything into the scope: the application gets the request."""
    called = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append({key: scope[key] for key in odd})

    with capture_traces():
        try:
            tracemw.TraceMiddleware(app)({**http_scope(), **odd}, None, None).send(None)  # type: ignore[arg-type]
        except StopIteration:
            pass
    assert called == [odd]


@given(
    odd=st.dictionaries(
        st.sampled_from(
            ["PATH_INFO", "SCRIPT_NAME", "REQUEST_METHOD", "SERVER_PORT", "QUERY_STRING", "HTTP_X_USER_ID"]
        ),
        ODD,
    )
)
def test_environs_that_break_the_rules(odd: dict[str, Any]) -> None:
    """Likewise on WSGI."""
    called = []

    def app(env: Any, start_response: Any) -> Any:
        called.append({key: env[key] for key in odd})
        return []

    with capture_traces():
        list(tracemw.WSGITraceMiddleware(app)({**environ(), **odd}, lambda *given: None))
    assert called == [odd]


@given(parts=st.lists(st.binary(max_size=200), max_size=20), declared=st.one_of(st.none(), st.integers(0, 4000)))
def test_bodies_are_what_they_were(parts: list[bytes], declared: int | None) -> None:
    """Any body, in any parts, of any declared length, arrives as it is; the root knows its size."""
    headers = [] if declared is None else [("Content-Length", str(declared))]

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", headers)
        return iter(parts)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        got.append(message.get("body", b""))

    got: list[bytes] = []
    with capture_traces() as traces:
        body = tracemw.WSGITraceMiddleware(wsgi, capture_response_body=True)(environ(), lambda *given: None)
        assert list(body) == parts
        body.close()  # type: ignore[attr-defined]
        try:
            tracemw.TraceMiddleware(asgi)(http_scope(), None, send).send(None)  # type: ignore[arg-type]
        except StopIteration:
            pass
        assert len(traces) == 2
        assert {trace.info.state for trace in traces} == {"OK"}
        assert root(traces[1]).attributes["http.response.body.size"] == sum(map(len, parts))
    assert got == [b"", *parts, b""]
