"""What is recorded of a request without being asked for: no headers, no bodies, no secrets in its query."""

from __future__ import annotations

import asyncio
import gzip
import io
from typing import Any

import pytest

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope
from tests.request.look import root
from tracemw.testing import capture_traces

SECRET = "s3cr3t-value"


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body to its end and answers with it."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"set-cookie", SECRET.encode()), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def wsgi_reading(env: Any, start_response: Any) -> Any:
    """The same on WSGI."""
    start_response("200 OK", [("Set-Cookie", SECRET), ("Content-Type", "text/plain")])
    return [env["wsgi.input"].read()]


def test_headers_and_bodies_are_not_recorded() -> None:
    """Neither a request's nor a response's, unless a setting asks for them."""
    headers = [(name, SECRET.encode()) for name in (b"authorization", b"cookie", b"x-api-key")]
    headers.append((b"content-type", b"text/plain"))
    body = {"type": "http.request", "body": SECRET.encode()}
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(reading), http_scope("/", "POST", headers), [body])
        env: dict[str, Any] = environ("/", "POST", HTTP_AUTHORIZATION=SECRET, HTTP_COOKIE=SECRET)
        env["CONTENT_TYPE"] = "text/plain"
        env["wsgi.input"] = io.BytesIO(SECRET.encode())
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_reading), env).read()
    assert len(traces) == 2
    assert not any(SECRET in trace.to_json() for trace in traces)


@pytest.mark.parametrize(
    "name",
    ["token", "access_token", "api_key", "password", "sig", "Signature", "X-Amz-Signature", "X-Goog-Signature"],
)
def test_secrets_in_the_query(name: str) -> None:
    """A parameter whose name says that it is a secret is stored masked; others as they are."""
    with capture_traces() as traces:
        query = f"page=2&{name}={SECRET}&max_tokens=3"
        ask(tracemw.TraceMiddleware(reading), http_scope("/", query_string=query.encode()))
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_reading), environ("/", QUERY_STRING=query)).read()
    for trace in traces:
        assert SECRET not in trace.to_json()
        assert "page=2" in root(trace).attributes["url.query"]
        assert "max_tokens=3" in root(trace).attributes["url.query"]


def test_a_forwarded_address_is_not_believed() -> None:
    """Anybody can send `X-Forwarded-For`: the client's address is the one that the server tells."""
    with capture_traces() as traces:
        headers = [(b"x-forwarded-for", b"6.6.6.6"), (b"forwarded", b"for=6.6.6.6")]
        ask(tracemw.TraceMiddleware(reading), http_scope(headers=headers, client=("10.0.0.9", 1)))
        env = environ(REMOTE_ADDR="10.0.0.9", HTTP_X_FORWARDED_FOR="6.6.6.6")
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_reading), env).read()
    assert [root(trace).attributes["client.address"] for trace in traces] == ["10.0.0.9"] * 2
    assert not any("6.6.6.6" in trace.to_json() for trace in traces)


def test_a_body_is_not_read_ahead() -> None:
    """With capture on, the application still gets each message when it asks for it, and none is taken from it."""
    asked: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert asked == []
        first = await receive()
        assert asked == ["http.request"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": first["body"], "more_body": True})
        assert [(await receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]

    conversation = Conversation(
        [
            {"type": "http.request", "body": b'{"a": ', "more_body": True},
            {"type": "http.request", "body": b"1}"},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Any:
        message = await conversation.receive()
        asked.append(message["type"])
        return message

    scope = http_scope("/", "POST", [(b"content-type", b"application/json")])
    with capture_traces() as traces:
        asyncio.run(tracemw.TraceMiddleware(app, capture_request_body=True)(scope, receive, conversation.send))
    assert root(traces[0]).attributes["tracemw.request.body"] == {"a": 1}
    assert root(traces[0]).attributes["tracemw.outcome"] == "disconnected"


def test_a_body_that_nobody_reads_is_not_recorded() -> None:
    """What the application leaves unread is left unread."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def receive() -> Any:
        raise AssertionError("nobody asked")

    scope = http_scope("/", "POST", [(b"content-type", b"text/plain")])
    conversation = Conversation()
    with capture_traces() as traces:
        asyncio.run(tracemw.TraceMiddleware(app, capture_request_body=True)(scope, receive, conversation.send))
        env: dict[str, Any] = environ("/", "POST", CONTENT_TYPE="text/plain")
        env["wsgi.input"] = stream = io.BytesIO(b"unread")

        def wsgi(env: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return []

        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi, capture_request_body=True), env).read()
    assert stream.tell() == 0
    assert not any("tracemw.request.body" in root(trace).attributes for trace in traces)


JSON_BODY = '{"user": "jane", "password": "hunter2"}'


@pytest.mark.parametrize(
    ("content_type", "encoding", "body", "kept"),
    [
        ("application/json", "", JSON_BODY.encode(), True),
        ("application/json; charset=utf-8", "identity", JSON_BODY.encode(), True),
        ('application/json; x=1; Charset="ISO-8859-1"', "", JSON_BODY.encode("latin-1"), True),
        ("application/json; charset=utf-16", "", JSON_BODY.encode("utf-16"), False),
        ("application/json; charset=cp037", "", JSON_BODY.encode("cp037"), False),
        ("application/json", "", JSON_BODY.encode("utf-16-le"), False),
        ("application/json", "", JSON_BODY.encode("utf-32"), False),
        ("application/json", "gzip", gzip.compress(JSON_BODY.encode(), mtime=0), False),
        ("text/plain", "br", b"compressed", False),
    ],
    ids=str,
)
def test_bodies_in_which_no_secret_is_found(content_type: str, encoding: str, body: bytes, kept: bool) -> None:
    """What is compressed, or in a charset without ASCII in it, is only counted: on ASGI and WSGI, both ways."""
    headers = [(b"content-type", content_type.encode()), (b"content-encoding", encoding.encode())]
    options = {"capture_request_body": True, "capture_response_body": True}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": read})

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [(name.decode(), value.decode()) for name, value in headers])
        return [env["wsgi.input"].read()]

    with capture_traces() as traces:
        scope = http_scope("/", "POST", headers)
        ask(tracemw.TraceMiddleware(app, **options), scope, [{"type": "http.request", "body": body}])
        env: dict[str, Any] = environ("/", "POST", CONTENT_TYPE=content_type, HTTP_CONTENT_ENCODING=encoding)
        env["wsgi.input"] = io.BytesIO(body)
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi, **options), env).read()
    assert len(traces) == 2
    for trace in traces:
        attributes = root(trace).attributes
        for name in ("tracemw.request.body", "tracemw.response.body"):
            assert attributes[f"{name}.size"] == len(body)
            assert attributes.get(name) == ({"user": "jane", "password": "[REDACTED]"} if kept else None)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 300_000])
def test_copies_have_a_limit(size: int) -> None:
    """Of a large body the beginning is kept and its size told; the application gets all of it."""
    body = b"x" * size
    messages = [
        {"type": "http.request", "body": body[i : i + 50_000], "more_body": True} for i in range(0, size, 50_000)
    ]
    scope = http_scope("/", "POST", [(b"content-type", b"text/plain")])
    with capture_traces() as traces:
        app = tracemw.TraceMiddleware(reading, capture_request_body=True)
        answer = ask(app, scope, [*messages, {"type": "http.request"}])
        (trace,) = traces
    attributes = root(trace).attributes
    assert answer.body == body
    assert attributes.get("tracemw.request.body.size", 0) == size
    assert len(attributes.get("tracemw.request.body", "")) == min(size, 65_536)
    assert attributes.get("tracemw.request.body.truncated", False) == (size > 65_536)


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MALFORMED = [
    "",
    "00",
    "00-0-0-01",
    f"ff{TRACEPARENT[2:]}",
    TRACEPARENT.upper(),
    f"{TRACEPARENT}-x",
    "\x00",
    "x" * 9000,
]


def seen_baggage() -> Any:
    """The baggage that code in the request would send on."""
    from opentelemetry import baggage

    return dict(baggage.get_all())


@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
@pytest.mark.parametrize("trusted", [False, True])
def test_baggage(protocol: str, trusted: bool) -> None:
    """A stranger's is not forwarded in our name; that of a caller whom we trust is."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(seen_baggage())
        await reading(scope, receive, send)

    def wsgi(env: Any, start_response: Any) -> Any:
        seen.append(seen_baggage())
        return wsgi_reading(env, start_response)

    with capture_traces() as traces:
        if protocol == "asgi":
            headers = [(b"traceparent", TRACEPARENT.encode()), (b"baggage", b"a=1,b=2")]
            ask(tracemw.TraceMiddleware(app, trust_traceparent=trusted), http_scope(headers=headers))
        else:
            env = environ(HTTP_TRACEPARENT=TRACEPARENT, HTTP_BAGGAGE="a=1,b=2")
            ask_wsgi(tracemw.WSGITraceMiddleware(wsgi, trust_traceparent=trusted), env).read()
        (trace,) = traces
    assert seen == [{"a": "1", "b": "2"} if trusted else {}]
    assert (trace.info.trace_id == f"tr-{TRACEPARENT[3:35]}") == trusted
    assert len(root_or_first(trace).links) == (0 if trusted else 1)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("a=1 , b = 2;p; q = 3", {"a": "1", "b": "2;p; q = 3"}),
        ("k%20x=v%2Cw+z,e=", {"k x": "v,w z", "e": ""}),
        ("=,;;,=x,a b=1,\"=1,c=\\,ok=1,\xff=1,d=\xff", {"ok": "1"}),
        (",".join(f"k{i}=1" for i in range(200)), {f"k{i}": "1" for i in range(180)}),
        (f"long={'x' * 4096},ok=1", {"ok": "1"}),
        (f"{'ok=1,' * 2000}", {}),
        (f"a=1;b{' ' * 8000}x", {}),
    ],
)
def test_baggage_of_any_form(header: str, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What is well-formed is taken over within W3C's bounds; the rest is left out without a line in the log."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(seen_baggage())
        await reading(scope, receive, send)

    with capture_traces():
        headers = [(b"traceparent", TRACEPARENT.encode()), (b"baggage", header.encode("latin-1"))]
        ask(tracemw.TraceMiddleware(app, trust_traceparent=True), http_scope(headers=headers))
    assert seen == [expected]
    assert caplog.records == []


def root_or_first(trace: tracemw.Trace) -> tracemw.Span:
    """The first span: that of a continued trace has a parent elsewhere."""
    return trace.data.spans[0]


@pytest.mark.parametrize("value", MALFORMED)
@pytest.mark.parametrize("trusted", [False, True])
def test_malformed_callers(value: str, trusted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What is no `traceparent` is as if it were not there: no link, no attribute, no line in the log."""
    with capture_traces() as traces:
        headers = [(b"traceparent", value.encode()), (b"tracestate", value.encode()), (b"baggage", b"=;=,,")]
        ask(tracemw.TraceMiddleware(reading, trust_traceparent=trusted), http_scope(headers=headers))
        env = environ(HTTP_TRACEPARENT=value, HTTP_BAGGAGE="=;=,,")
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_reading, trust_traceparent=trusted), env).read()
    assert len(traces) == 2
    assert [len(root(trace).links) for trace in traces] == [0, 0]
    assert not any("tracemw.remote.trace_id" in root(trace).attributes for trace in traces)
    assert caplog.records == []
