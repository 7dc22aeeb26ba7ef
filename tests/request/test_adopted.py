"""A root that somebody else has opened: our facts are on it before its owner ends it, and win in our store."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import tracemw
from tests.request.drive import Conversation, ask_wsgi, environ, http_scope
from tests.request.look import ended, named, names, root
from tracemw.testing import capture_traces

pytest.importorskip("opentelemetry.instrumentation.asgi")
HEADERS = [(b"x-request-id", b"r-1"), (b"x-user-id", b"jane")]
Wrap = Callable[[Any, Any], Any]


class Owner:
    """A provider of the application's and what it exports."""

    def __init__(self, **options: Any) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def roots(self) -> list[ReadableSpan]:
        """The exported roots."""
        return [span for span in self._exporter.get_finished_spans() if span.parent is None]


def fastapi_native(app: Any, provider: Any) -> Any:
    """FastAPI's own telemetry around an ASGI application."""
    fastapi = pytest.importorskip("fastapi", minversion="0.142")
    made = fastapi.FastAPI(telemetry={"tracer_provider": provider})
    made.add_middleware(tracemw.TraceMiddleware)
    made.mount("/", app)
    return made


def starlette_native(app: Any, provider: Any) -> Any:
    """Starlette's own telemetry around one."""
    module = "starlette.middleware.opentelemetry"
    if importlib.util.find_spec(module) is None:
        pytest.skip("this Starlette has none")
    kind = importlib.import_module(module).OpenTelemetryMiddleware
    return kind(tracemw.TraceMiddleware(app), tracer_provider=provider)


def contrib(app: Any, provider: Any) -> Any:
    """OpenTelemetry's instrumentation around one."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(tracemw.TraceMiddleware(app), tracer_provider=provider)


OWNERS = [fastapi_native, starlette_native, contrib]


def send(app: Any) -> Conversation:
    """Send a request; what the application raises goes to the server."""
    conversation = Conversation()
    try:
        asyncio.run(app(http_scope("/x", headers=HEADERS), conversation.receive, conversation.send))
    except ValueError:
        pass
    return conversation


@pytest.mark.parametrize("wrap", OWNERS)
def test_facts_come_before_the_owner_s_end(wrap: Wrap) -> None:
    """Ids, user and previews are on the root that the owner exports, and the trace is one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("inside"):
            tracemw.update_current_trace(tags={"plan": "pro"}, response_preview="done", session_id="s-1")
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"x"})

    owner = Owner()
    with capture_traces() as traces:
        answer = send(wrap(app, owner.provider))
        (trace,) = traces
        (exported,) = owner.roots
    assert exported.context is not None and exported.attributes is not None
    assert trace.info.trace_id == f"tr-{exported.context.trace_id:032x}" == answer.headers[b"x-trace-id"].decode()
    assert exported.attributes["tracemw.client_request_id"] == "r-1"
    assert exported.attributes["user.id"] == "jane"
    assert exported.attributes["session.id"] == "s-1"
    assert exported.attributes["mlflow.traceTag.plan"] == "pro"
    assert exported.attributes["tracemw.response_preview"] == "done"
    assert exported.attributes["tracemw.outcome"] == "completed"
    assert root(trace).attributes["tracemw.chunks"] == 2
    assert root(trace).attributes["http.response.body.size"] == 2
    assert trace.info.tags["plan"] == "pro"
    assert trace.info.state == "OK"
    assert names(trace)[1:] == ["inside"]


@pytest.mark.parametrize("wrap", OWNERS)
def test_later_facts_patch_the_stored_trace(wrap: Wrap) -> None:
    """The owner has ended its root when a background task says more: our store has it all the same."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        await asyncio.sleep(0.1)
        with tracemw.start_span("late"):
            tracemw.update_current_trace(tags={"late": "yes"})
        raise ValueError("in the background")

    owner = Owner()
    with capture_traces() as traces:
        send(wrap(app, owner.provider))
        (trace,) = traces
    assert trace.info.tags["late"] == "yes"
    assert trace.info.state == "OK"
    assert named(trace, "late").start_time_ns > ended(root(trace))
    assert len(named(trace, "background work").events) == 1
    assert len(owner.roots) == 1


@pytest.mark.parametrize("wrap", OWNERS)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_exceptions(wrap: Wrap, after: int) -> None:
    """Before the response, in its middle, behind a complete 500: one event, ERROR, and the owner's status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if after:
            await send({"type": "http.response.start", "status": 200 if after == 1 else 500, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": after == 1})
        raise ValueError("boom")

    owner = Owner()
    with capture_traces() as traces:
        send(wrap(app, owner.provider))
        (trace,) = traces
        (exported,) = owner.roots
    assert trace.info.state == "ERROR"
    assert exported.status.status_code is otel.StatusCode.ERROR
    if after < 2:  # behind a 500 the owner's span has ended
        assert root(trace).attributes["error.type"] == "ValueError"
        assert len(root(trace).events) == 1


@pytest.mark.parametrize("wrap", OWNERS)
def test_a_client_that_leaves(wrap: Wrap) -> None:
    """What the owner calls an error, or a success, is `disconnected` with us."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass

    conversation = Conversation([{"type": "http.request"}, {"type": "http.disconnect"}])
    with capture_traces() as traces:
        asyncio.run(wrap(app, Owner().provider)(http_scope("/x"), conversation.receive, conversation.send))
    assert traces[0].info.state == "STATE_UNSPECIFIED"
    assert root(traces[0]).attributes["tracemw.outcome"] == "disconnected"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("wrap", [fastapi_native])
def test_what_the_owner_does_not_sample(wrap: Wrap) -> None:
    """A request that the owner's sampler has left out gets no root of ours in its stead."""
    owner = Owner(sampler=ALWAYS_OFF)
    with capture_traces() as traces:
        before = tracemw.stats()["sampled_out"]
        answer = send(wrap(hello, owner.provider))
        assert tracemw.stats()["sampled_out"] - before == 1
    assert (list(traces), owner.roots) == ([], [])
    assert answer.headers[b"x-request-id"] == b"r-1"


@pytest.mark.parametrize("wrap", OWNERS)
def test_the_root_s_time_is_the_owner_s(wrap: Wrap) -> None:
    """It began when the owner's did."""
    owner = Owner()
    with capture_traces() as traces:
        send(wrap(hello, owner.provider))
        (trace,) = traces
    assert root(trace).start_time_ns == owner.roots[0].start_time
    assert ended(root(trace)) >= root(trace).start_time_ns


def test_a_request_made_in_process_is_not_the_outer_one() -> None:
    """An application that calls another one in its handler, within an adopted root: two requests, two traces."""

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        conversation = Conversation()
        await inner(http_scope("/inner"), conversation.receive, conversation.send)
        await hello(scope, receive, send)

    inner = tracemw.TraceMiddleware(hello)
    owner = Owner()
    with capture_traces() as traces:
        send(contrib(outer, owner.provider))
    assert sorted(root(trace).attributes["url.path"] for trace in traces) == ["/inner", "/x"]
    assert len({trace.info.trace_id for trace in traces}) == 2


def test_an_ambient_span_of_the_application_is_not_a_root() -> None:
    """A span that happens to be current, also one of kind SERVER, is nobody's root unless its maker is known."""
    owner = Owner()
    tracer = owner.provider.get_tracer("the application")
    with capture_traces() as traces:
        with tracer.start_as_current_span("ambient", kind=otel.SpanKind.SERVER):
            send_in_context = otel_context.get_current()
        token = otel_context.attach(send_in_context)
        try:
            send(tracemw.TraceMiddleware(hello))
        finally:
            otel_context.detach(token)
        (trace,) = traces
    assert names(trace) == ["GET"]
    assert root(trace).attributes["http.request.method"] == "GET"


def test_wsgi() -> None:
    """OpenTelemetry's instrumentation of WSGI ends its root with the body, which is after ours."""
    module = pytest.importorskip("opentelemetry.instrumentation.wsgi")

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        with tracemw.start_span("inside"):
            yield b"x"

    owner = Owner()
    with capture_traces() as traces:
        wrapped = module.OpenTelemetryMiddleware(tracemw.WSGITraceMiddleware(app), tracer_provider=owner.provider)
        answer = ask_wsgi(wrapped, environ("/x", HTTP_X_REQUEST_ID="r-1"))
        assert answer.read() == b"x"
        (trace,) = traces
        (exported,) = owner.roots
    assert exported.attributes is not None and exported.attributes["tracemw.client_request_id"] == "r-1"
    assert trace.info.client_request_id == "r-1"
    assert names(trace)[1:] == ["inside"]
