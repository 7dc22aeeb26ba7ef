"""Never break the application: whichever function of ours fails, the response is what it is without us."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import io
import logging
from collections.abc import Iterator
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from opentelemetry.sdk.trace import Span as SDKSpan
from opentelemetry.sdk.trace import Tracer as SDKTracer

import tracemw
from tests.request.drive import Conversation, environ, http_scope, websocket_scope
from tracemw import guard
from tracemw.adapting import Adapter
from tracemw.pipeline.processor import TraceProcessor
from tracemw.pipeline.writer import Pipeline
from tracemw.testing import capture_traces

# All functions of these modules run inside requests.
MODULES = (
    "asgi", "wsgi", "exchange", "exclusion", "request", "opening", "bodies", "afterwards", "identity",
    "propagation", "isolation", "unrecorded",
)  # fmt: skip
# What stands between server and application and passes calls on: it consists of guarded calls and the passing.
PASSING = {
    "asgi.TraceMiddleware.__init__",
    "asgi.TraceMiddleware.__call__",
    "asgi.TraceMiddleware._serve",
    "asgi.TraceMiddleware._pass_on",
    "asgi.TraceMiddleware._enrich",
    "asgi.TraceMiddleware._lifespan",
    "asgi._built_by_framework",
    "wsgi.WSGITraceMiddleware.__init__",
    "wsgi.WSGITraceMiddleware.__call__",
    "wsgi.WSGITraceMiddleware._enrich",
    "wsgi._Response.run",
    "wsgi._Response._call",
    "wsgi._Response._write",
    "wsgi._Unrecorded.run",
    "wsgi._Unrecorded._call",
    "wsgi._Body.__next__",
    "wsgi._Body.__del__",
    "wsgi._Body.close",
    "isolation.Isolated.inside",
    "isolation.Isolated._in_place",
    "isolation.Parts.__iter__",
    "isolation.Parts.__next__",
    "isolation.Parts._begin",
    "isolation.Parts.close",
    "isolation.Parts.close_iterable",
    "isolation.SizedParts.__len__",
    "bodies.TeeInput.__iter__",
    "bodies.TeeInput.__next__",
    "bodies.TeeInput.__getattr__",
    "request.RequestTrace.__str__",  # for the server's log, not for the response
    "unrecorded.UnrecordedRequest.__str__",
}
# Public functions that an application calls by itself.
CALLED = {
    "propagation.propagate",
    "executor.ContextThreadPoolExecutor.submit",
    "propagation.outgoing_headers",
    "identity.check_id",
}
OURS = {"x-request-id", "x-trace-id", "server-timing"}
OPTIONS: dict[str, Any] = {
    "capture_request_body": True,
    "capture_response_body": True,
    "trust_traceparent": ["10.0.0.0/8"],
    "exclude": ["/nothing/*"],
    "user": lambda carrier: "jane",
}
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Injected(Exception):
    """What the function raises."""


def fail(*args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a function of ours."""
    raise Injected


def functions() -> Iterator[str]:
    """Names of all functions and methods that run inside requests."""
    for short in MODULES:
        module = importlib.import_module(f"tracemw.{short}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                yield f"{short}.{name}"
            elif inspect.isclass(value) and not issubclass(value, Exception):
                for method, function in vars(value).items():
                    if inspect.isfunction(function):
                        yield f"{short}.{name}.{method}"


def outside(name: str) -> bool:
    """True for what does not run on a request's way."""
    detached = name.startswith(("propagation.detached", "propagation._", "propagation.pending"))
    return name in PASSING or name in CALLED or (detached and "networks" not in name)


POINTS = sorted(name for name in functions() if not outside(name))
OTHER_POINTS: dict[str, tuple[Any, str]] = {
    "span start": (SDKTracer, "start_span"),
    "span attribute": (SDKSpan, "set_attributes"),
    "span event": (SDKSpan, "add_event"),
    "span status": (SDKSpan, "set_status"),
    "span end": (SDKSpan, "end"),
    "processor, start": (TraceProcessor, "_drop"),
    "processor, end": (TraceProcessor, "_keep"),
    "processor, root": (TraceProcessor, "_end_root"),
    "queue": (Pipeline, "put"),
    "counter": (Pipeline, "count"),
    "writer": (Pipeline, "_encode"),
    "adapter, route": (Adapter, "route"),
    "adapter, user": (Adapter, "user"),
    "adapter, changed": (Adapter, "changed"),
    "adapter, prepare": (Adapter, "prepare"),
    "adapter, place": (Adapter, "place"),
}


# The applications: everything that a response can be.


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the request and answers as the path says."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept", "headers": [(b"x-app", b"1")]})
        await send({"type": "websocket.send", "text": (await receive())["text"]})
        await receive()
        return
    body = b"" if scope["path"] == "/unread" else (await receive()).get("body", b"")
    status = {"/broken": 500, "/refused": 404}.get(scope["path"], 200)
    headers = [(b"content-type", b"text/plain"), (b"x-app", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": iter(headers)})
    await send({"type": "http.response.body", "body": b"got " + body, "more_body": True})
    if scope["path"] == "/raises":
        raise ValueError("boom")
    if scope["path"] == "/left":
        await receive()
    await send({"type": "http.response.body", "body": b"."})
    if scope["path"] == "/late":
        raise ValueError("boom")


def asgi_conversation(app: Any, path: str) -> Any:
    """What the server gets to see for one request."""
    headers = [(b"traceparent", TRACEPARENT.encode()), (b"x-user-id", b"\xff" * 300)]
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    scope = http_scope(path, "BREW", headers, client=("10.0.0.1", 1), query_string=b"a=1")
    if path == "/socket":
        scope = {**websocket_scope(), "headers": headers}
        messages = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}]
        messages.append({"type": "websocket.disconnect", "code": 1011})
    conversation = Conversation(messages)
    raised = None
    try:
        asyncio.run(app(scope, conversation.receive, conversation.send))
    except ValueError as exc:
        raised = str(exc)
    return [without_ours(message) for message in conversation.sent], raised


def without_ours(message: dict[str, Any]) -> dict[str, Any]:
    """A message without our headers."""
    if "headers" in message:
        kept = [header for header in message["headers"] if header[0].decode().lower() not in OURS]
        message["headers"] = kept
    return message


ASGI_PATHS = ("/", "/broken", "/refused", "/raises", "/left", "/late", "/unread", "/socket", "/nothing/x")


def wsgi_app(env: Any, start_response: Any) -> Any:
    """Reads the request and answers as the path says."""
    path, stream = env["PATH_INFO"], env["wsgi.input"]
    read = stream.readline() + b"".join(stream.readlines()) + stream.read()
    headers = [("Content-Type", "text/plain"), ("X-App", "1")]
    if path == "/exc_info":
        write = start_response("500 Oops", headers, (ValueError, ValueError("boom"), None))
        write(b"written ")
        return [read]
    start_response("200 OK", headers)
    if path == "/raises":
        raise ValueError("boom")
    if path == "/file":
        return env["wsgi.file_wrapper"](io.BytesIO(read))
    return [b"got ", read] if path == "/list" else generator(path, read)


def generator(path: str, read: bytes) -> Iterator[bytes]:
    """A lazy body."""
    yield b"got "
    if path == "/raises late":
        raise ValueError("boom")
    yield read


def function_wrapper(file: Any, size: int = 8192) -> Any:
    """A server's file wrapper that is no class."""
    return FileWrapper(file, size)


def wsgi_conversation(app: Any, path: str) -> Any:
    """What the server gets to see for one request; left after the first part where the path says so."""
    env = environ(path, "BREW", HTTP_TRACEPARENT=TRACEPARENT, HTTP_X_USER_ID="\xff" * 300, REMOTE_ADDR="10.0.0.1")
    env["wsgi.input"] = io.BytesIO(b"a\nb\nc")
    env["wsgi.file_wrapper"] = function_wrapper if path == "/file" else FileWrapper
    seen: list[Any] = []

    def start_response(status: str, headers: Any, *exc_info: Any) -> Any:
        seen.append((status, [header for header in headers if header[0].lower() not in OURS], len(exc_info)))
        return seen.append

    try:
        body = app(env, start_response)
        try:
            seen.append(len(body) if path == "/list" else hasattr(body, "__len__"))
            parts = iter(body)
            seen.append(next(parts))
            if path != "/left":
                seen.extend(parts)
        finally:
            if hasattr(body, "close"):
                body.close()
    except ValueError as exc:
        seen.append(repr(exc))
    return seen


WSGI_PATHS = ("/list", "/lazy", "/left", "/raises", "/raises late", "/file", "/exc_info", "/nothing/x")


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Make one function fail."""
    caplog.set_level(logging.CRITICAL, logger="tracemw")  # the failures are reported, which is not the point here

    def inject(point: str) -> None:
        if point in OTHER_POINTS:
            owner, name = OTHER_POINTS[point]
        else:
            module, *path, name = point.split(".")
            owner = importlib.import_module(f"tracemw.{module}")
            for part in path:
                owner = getattr(owner, part)
        original = inspect.getattr_static(owner, name)
        replaced: Any = fail
        if hasattr(original, "__wrapped__"):  # a guarded function: what it guards fails
            replaced = guard.guarded()(fail)
        elif isinstance(original, staticmethod):
            replaced = staticmethod(fail)
        elif isinstance(original, property):
            replaced = property(fail)
        monkeypatch.setattr(owner, name, replaced)

    return inject


class Nothing(Adapter):
    """An adapter that knows nothing."""


@pytest.mark.parametrize("keeps", [False, True], ids=["", "keeps"])
@pytest.mark.parametrize("point", [*POINTS, *OTHER_POINTS])
def test_a_failure_of_ours_changes_no_response(point: str, keeps: bool, injected: Any) -> None:
    """Status, headers, body, exceptions and what a server looks at are the same, whatever fails."""
    options = {**OPTIONS, "adapter": Nothing()}
    if keeps:
        options.update(sample_rate=0.5, keep_errors=True, response_headers=False, capture_request_body=False)
    bare = [asgi_conversation(asgi_app, path) for path in ASGI_PATHS]
    bare += [wsgi_conversation(wsgi_app, path) for path in WSGI_PATHS]
    with capture_traces():
        asgi: Any = tracemw.TraceMiddleware(asgi_app, **options)
        wsgi: Any = tracemw.WSGITraceMiddleware(wsgi_app, **options)
        if keeps:  # and a second one inside
            asgi = tracemw.TraceMiddleware(asgi, adapter=Nothing())
            wsgi = tracemw.WSGITraceMiddleware(wsgi, adapter=Nothing())
        injected(point)
        traced = [asgi_conversation(asgi, path) for path in ASGI_PATHS]
        traced += [wsgi_conversation(wsgi, path) for path in WSGI_PATHS]
    assert traced == bare


def test_a_failure_is_counted(injected: Any) -> None:
    """What was swallowed stands in `stats()`, by the place that failed."""
    before = tracemw.stats()["failures"].get("TraceMiddleware._open", 0)
    with capture_traces() as traces:
        app = tracemw.TraceMiddleware(asgi_app)
        injected("identity.IdentityReader.values_in_asgi")
        asgi_conversation(app, "/")
        after = tracemw.stats()["failures"]["TraceMiddleware._open"]
    assert after == before + 1
    assert list(traces) == []


@pytest.mark.parametrize("failing", ["route", "user"])
def test_the_root_is_there_without_what_failed(failing: str, injected: Any) -> None:
    """A part that cannot be had is missing; the trace is there."""
    with capture_traces() as traces:
        injected(f"adapter, {failing}")
        asgi_conversation(tracemw.TraceMiddleware(asgi_app, adapter=Nothing()), "/")
    assert [trace.info.state for trace in traces] == ["OK"]


def test_an_application_that_is_no_good_is_as_bad_as_without_us() -> None:
    """Messages and answers that no server understands reach it as they are."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": "two hundred", "headers": [("a",), None]})
        await send({"no": "type"})
        await send({"type": "http.response.body", "body": "text"})

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("fine", (("a", "b"),))
        return iter([1, None, "text"])

    with capture_traces() as traces:
        conversation = Conversation()
        asyncio.run(tracemw.TraceMiddleware(asgi)(http_scope(), conversation.receive, conversation.send))
        assert [message.get("status") for message in conversation.sent] == ["two hundred", None, None]
        body: list[Any] = list(tracemw.WSGITraceMiddleware(wsgi)(environ(), lambda *a: None))
        assert body == [1, None, "text"]
    assert len(traces) == 2
