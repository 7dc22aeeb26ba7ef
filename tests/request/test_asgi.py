"""The ASGI middleware, driven by hand: one root from first byte to last, whatever the application does."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from typing import Any

import pytest

import tracemw
from tests.request.drive import Conversation, ask, http_scope
from tests.request.look import duration, root
from tracemw import asgi
from tracemw.testing import capture_traces


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


def test_a_request_is_one_trace_with_the_ids_of_its_headers() -> None:
    """Ids come from the headers; the response tells request id and trace id."""
    headers = [(b"x-request-id", b"req-abc-123"), (b"x-session-id", b"s-1"), (b"x-user-id", b"jane")]
    with capture_traces() as traces:
        answer = ask(tracemw.TraceMiddleware(hello), http_scope("/a/b", "POST", headers))
    (trace,) = traces
    assert answer.body == b"hello"
    assert trace.info.client_request_id == "req-abc-123"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert trace.info.trace_metadata["mlflow.trace.user"] == "jane"
    assert trace.info.state == "OK"
    assert root(trace).name == "POST"
    assert root(trace).attributes["url.path"] == "/a/b"
    assert root(trace).attributes["http.response.body.size"] == 5
    assert root(trace).attributes["tracemw.outcome"] == "completed"
    named = ("tracemw.client_request_id", "session.id", "user.id")
    assert [root(trace).attributes[name] for name in named] == ["req-abc-123", "s-1", "jane"]
    assert answer.headers[b"x-request-id"] == b"req-abc-123"
    assert answer.headers[b"x-trace-id"].decode() == trace.info.trace_id
    assert trace.info.trace_id.removeprefix("tr-").encode() in answer.headers[b"server-timing"]


def test_an_ambient_span_is_not_the_parent() -> None:
    """The root starts from a clean context: what happens to be current belongs to somebody else."""
    with capture_traces() as traces:
        with tracemw.start_span("leaked by the server"):
            ask_in_context = contextvars.copy_context()
        ask_in_context.run(ask, tracemw.TraceMiddleware(hello))
    names = {root(trace).name for trace in traces}
    assert names == {"leaked by the server", "GET"}


def test_the_context_of_the_server_is_left_as_it_was() -> None:
    """After the request nothing of it is current."""

    async def serve() -> None:
        conversation = Conversation()
        await tracemw.TraceMiddleware(hello)(http_scope(), conversation.receive, conversation.send)
        assert tracemw.get_current_active_span() is None
        assert tracemw.current_request.trace_id is None

    with capture_traces():
        asyncio.run(serve())


def test_streams() -> None:
    """The root covers the body; time to first byte, chunks and bytes are on it; spans in the body nest."""

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(5):
            with tracemw.start_span(f"part {i}"):
                await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"xx", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with capture_traces(span_name_suffixes=False) as traces:
        ask(tracemw.TraceMiddleware(stream))
    (trace,) = traces
    attributes = root(trace).attributes
    assert attributes["tracemw.chunks"] == 6
    assert attributes["http.response.body.size"] == 10
    assert 10 <= attributes["tracemw.ttfb_ms"] < duration(trace)
    assert duration(trace) >= 50
    assert {s.parent_id for s in trace.data.spans if s.name.startswith("part")} == {root(trace).span_id}


ENDS: dict[str, list[dict[str, Any]]] = {
    "trailers": [
        {"type": "http.response.body", "body": b"x"},
        {"type": "http.response.trailers", "headers": [], "more_trailers": True},
        {"type": "http.response.trailers", "headers": []},
    ],
    "pathsend": [{"type": "http.response.pathsend", "path": "/tmp/x"}],
    "zerocopysend": [
        {"type": "http.response.zerocopysend", "file": 3, "more_body": True},
        {"type": "http.response.zerocopysend", "file": 3},
    ],
    "body": [{"type": "http.response.body", "body": b"x", "more_body": True}, {"type": "http.response.body"}],
}


@pytest.mark.parametrize("kind", ENDS)
def test_other_ends_of_a_response(kind: str) -> None:
    """Last part, trailers, `pathsend`, zero-copy: the root ends once, with the message that ends the response."""
    during = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": kind == "trailers"})
        for message in ENDS[kind]:
            during.append(scope["tracemw.request"].ended)
            await send(message)
        during.append(scope["tracemw.request"].ended)

    with capture_traces() as traces:
        answer = ask(tracemw.TraceMiddleware(app))
    assert [trace.info.state for trace in traces] == ["OK"]
    assert during == [False] * len(ENDS[kind]) + [True]
    assert answer.sent[1:] == ENDS[kind]


def test_exceptions_pass_untouched_and_are_recorded_once() -> None:
    """An unhandled exception reaches the server as it was raised; the root has one event, ERROR, `error.type`."""
    error = ValueError("boom")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    inner = tracemw.TraceMiddleware(tracemw.TraceMiddleware(app))
    with capture_traces() as traces, pytest.raises(ValueError) as caught:
        ask(inner)
    assert caught.value is error
    (trace,) = traces
    span = root(trace)
    assert trace.info.state == "ERROR"
    assert span.attributes["error.type"] == "ValueError"
    assert [event.name for event in span.events] == ["exception"]
    assert span.events[0].attributes["exception.message"] == "boom"


def test_an_exception_in_mid_stream_keeps_the_status_that_the_client_saw() -> None:
    """After the headers the status is what was sent; the trace is an ERROR all the same."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("in mid-stream")

    with capture_traces() as traces, pytest.raises(RuntimeError):
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    assert trace.info.state == "ERROR"
    assert root(trace).attributes["http.response.status_code"] == 200
    assert len(root(trace).events) == 1


def test_an_exception_behind_a_complete_500() -> None:
    """Frameworks answer 500 and raise on: answer and exception are one root, which ends with the answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        await asyncio.sleep(0.3)
        raise RuntimeError("boom")

    with capture_traces() as traces, pytest.raises(RuntimeError):
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    assert root(trace).attributes["error.type"] == "RuntimeError"
    assert len(root(trace).events) == 1
    assert duration(trace) < 250


def test_no_response_is_an_error() -> None:
    """An application that returns without a response has failed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        return None

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    assert trace.info.state == "ERROR"
    assert root(trace).attributes["error.type"] == "no_response"


def test_a_client_that_leaves() -> None:
    """A disconnect is an outcome of its own: neither a success nor an error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app), messages=[{"type": "http.request"}, {"type": "http.disconnect"}])
    (trace,) = traces
    assert trace.info.state == "STATE_UNSPECIFIED"
    assert root(trace).attributes["tracemw.outcome"] == "disconnected"


def test_cancellation() -> None:
    """A cancelled request ends its root, is marked so, and the cancellation goes on."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(30)

    async def serve() -> None:
        conversation = Conversation()
        middleware = tracemw.TraceMiddleware(app)
        task = asyncio.create_task(middleware(http_scope(), conversation.receive, conversation.send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with capture_traces() as traces:
        asyncio.run(serve())
    (trace,) = traces
    assert trace.info.state == "STATE_UNSPECIFIED"
    assert root(trace).attributes["tracemw.outcome"] == "cancelled"
    assert root(trace).status.status_code == "UNSET"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_of_starting_up(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is collected once, before the first request comes; not where the application has switched that off."""
    collected = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            collected.append(info)

    monkeypatch.setattr(asgi, "_collected", False)
    was_enabled = gc.isenabled()
    with capture_traces():
        gc.disable()
        gc.callbacks.append(note)
        try:
            if enabled:
                gc.enable()
            for _ in range(2):
                ask(tracemw.TraceMiddleware(app), {"type": "lifespan"}, [{"type": "lifespan.startup"}])
        finally:
            gc.callbacks.remove(note)
            (gc.enable if was_enabled else gc.disable)()
    assert len(collected) == enabled


def test_other_scopes_pass_untouched() -> None:
    """Lifespan, with its state, and scope types unknown to us reach the application as they came."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    state: dict[str, Any] = {}
    lifespan = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}
    other = {"type": "unheard of"}
    with capture_traces() as traces:
        middleware = tracemw.TraceMiddleware(app)
        answer = ask(middleware, lifespan, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        ask(middleware, other)
    kinds = [message["type"] for message in answer.sent]
    assert kinds == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert seen[0] is lifespan
    assert seen[0]["state"] is state
    assert seen[1] is other
    assert list(traces) == []


def test_a_second_middleware_makes_no_second_root() -> None:
    """Two instances, one around the other: one trace."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(tracemw.TraceMiddleware(hello)))
    assert len(traces) == 1


def test_a_request_made_in_process_has_a_trace_of_its_own() -> None:
    """An application that calls itself (in tests, in gateways) with a new scope makes a new request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/outer":
            conversation = Conversation()
            await traced(http_scope("/inner"), conversation.receive, conversation.send)
        await hello(scope, receive, send)

    traced = tracemw.TraceMiddleware(app)
    with capture_traces() as traces:
        ask(traced, http_scope("/outer"))
    assert sorted(root(trace).attributes["url.path"] for trace in traces) == ["/inner", "/outer"]


@pytest.mark.parametrize(
    ("path", "kept"),
    [("/health", False), ("/static/a/b.js", False), ("/healthy", True), ("/pay", True), ("/a/health", True)],
)
def test_exclusion_looks_at_the_whole_path_only(path: str, kept: bool) -> None:
    """Patterns match the whole path, never the query; what is excluded records nothing inside either."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("inside"):
            await hello(scope, receive, send)

    with capture_traces() as traces:
        middleware = tracemw.TraceMiddleware(app, exclude=["/health", "/static/*"])
        answer = ask(middleware, http_scope(path, query_string=b"x=/health"))
    assert len(traces) == (1 if kept else 0)
    assert b"x-request-id" in answer.headers
    assert (b"x-trace-id" in answer.headers) is kept


def test_unsampled_requests_suppress_what_is_inside() -> None:
    """At rate 0 nothing is recorded, at any depth; the request still has its id."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("inside"):
            assert tracemw.current_request.client_request_id == "r"
            await hello(scope, receive, send)

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app, sample_rate=0.0), http_scope(headers=[(b"x-request-id", b"r")]))
    assert list(traces) == []


@pytest.mark.parametrize(("status", "kept"), [(500, True), (200, False)])
def test_failed_requests_are_kept_whole_at_any_rate(status: int, kept: bool) -> None:
    """`keep_errors` stores a failed request with all its spans, though its rate would have left it out."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("inside"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})

    with capture_traces(sample_rate=0.0, keep_errors=True) as traces:
        ask(tracemw.TraceMiddleware(app))
    assert [len(trace.data.spans) for trace in traces] == ([2] if kept else [])


def test_slow_requests_are_kept_at_any_rate() -> None:
    """`keep_slower_than` seconds keeps slow requests."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.05 if scope["path"] == "/slow" else 0)
        await hello(scope, receive, send)

    with capture_traces(sample_rate=0.0, keep_slower_than=0.04) as traces:
        middleware = tracemw.TraceMiddleware(app)
        ask(middleware, http_scope("/slow"))
        ask(middleware, http_scope("/fast"))
    assert [root(trace).attributes["url.path"] for trace in traces] == ["/slow"]


def test_bodies_are_kept_on_request_and_redacted() -> None:
    """Copies of bodies have a cap, are redacted, and the application gets every message as it came."""
    big = b"x" * 100_000
    got = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"])
        got.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": big})

    parts: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"question": "hi", ', "more_body": True},
        {"type": "http.request", "body": b'"password": "hunter2"}'},
    ]
    scope = http_scope("/", "POST", [(b"content-type", b"application/json")])
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app, capture_request_body=True, capture_response_body=True), scope, parts)
    (trace,) = traces
    attributes = root(trace).attributes
    assert b"".join(got) == b'{"question": "hi", "password": "hunter2"}'
    assert "hunter2" not in trace.to_json()
    assert "question" in str(attributes["tracemw.request.body"])
    assert attributes["tracemw.response.body.size"] == 100_000
    assert attributes["tracemw.response.body.truncated"] is True
    assert len(attributes["tracemw.response.body"]) < 70_000


def test_binary_bodies_are_only_counted() -> None:
    """What is neither text nor JSON is not kept."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"image/png")]})
        await send({"type": "http.response.body", "body": b"\x89PNG"})

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app, capture_response_body=True))
    attributes = root(traces[0]).attributes
    assert attributes["tracemw.response.body.size"] == 4
    assert "tracemw.response.body" not in attributes


TRACEPARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_an_untrusted_traceparent_is_only_a_link() -> None:
    """By default a stranger's trace id is not taken over: a new root, with a link to the caller's span."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(hello), http_scope(headers=[(b"traceparent", TRACEPARENT)]))
    span = root(traces[0])
    assert traces[0].info.trace_id != "tr-4bf92f3577b34da6a3ce929d0e0e4736"
    assert span.attributes["tracemw.remote.trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert len(span.links) == 1


@pytest.mark.parametrize("policy", [True, ["127.0.0.0/8"], lambda scope: True])
def test_a_trusted_traceparent_is_continued(policy: Any) -> None:
    """A caller whom the settings trust has its trace continued."""
    with capture_traces() as traces:
        middleware = tracemw.TraceMiddleware(hello, trust_traceparent=policy)
        ask(middleware, http_scope(headers=[(b"traceparent", TRACEPARENT)]))
    assert traces[0].info.trace_id == "tr-4bf92f3577b34da6a3ce929d0e0e4736"
    assert traces[0].data.spans[0].parent_id == "00f067aa0ba902b7"


def test_server_code_wins_over_the_user_header() -> None:
    """The `user` option sees the scope after authentication; a value set in code wins over both."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["authenticated"] = "from-the-session"
        if scope["path"] == "/explicit":
            tracemw.update_current_trace(user="explicit")
        await hello(scope, receive, send)

    headers = [(b"x-user-id", b"claimed")]
    with capture_traces() as traces:
        middleware = tracemw.TraceMiddleware(app, user=lambda scope: scope.get("authenticated"))
        ask(middleware, http_scope("/", headers=headers))
        ask(middleware, http_scope("/explicit", headers=headers))
    users = [trace.info.trace_metadata["mlflow.trace.user"] for trace in traces]
    assert users == ["from-the-session", "explicit"]


def test_many_requests_at_once_do_not_mix() -> None:
    """Concurrent requests keep their ids and their spans apart."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span(scope["path"]):
            await asyncio.sleep(0)
            assert tracemw.current_request.client_request_id == scope["path"].strip("/")
            await hello(scope, receive, send)

    async def serve() -> None:
        middleware = tracemw.TraceMiddleware(app)

        async def one(i: int) -> None:
            conversation = Conversation()
            scope = http_scope(f"/{i}", headers=[(b"x-request-id", str(i).encode())])
            await middleware(scope, conversation.receive, conversation.send)
            assert conversation.headers[b"x-request-id"] == str(i).encode()
            told[conversation.headers[b"x-trace-id"].decode()] = str(i)

        await asyncio.gather(*(one(i) for i in range(200)))

    told: dict[str, str] = {}
    with capture_traces() as traces:
        asyncio.run(serve())
    assert {trace.info.trace_id: trace.info.client_request_id for trace in traces} == told
    assert len(told) == 200
    for trace in traces:
        assert [span.name for span in trace.data.spans] == ["GET", f"/{trace.info.client_request_id}"]
        facts = root(trace).attributes
        assert facts["url.path"] == f"/{trace.info.client_request_id}"
        assert (facts["http.response.status_code"], facts["tracemw.chunks"]) == (200, 1)
