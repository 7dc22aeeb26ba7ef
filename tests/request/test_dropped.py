"""What is dropped in a cycle of references ends when the garbage collector finds it, after its weak references."""

from __future__ import annotations

import contextvars
import gc
import logging
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

import tracemw
from tests.request.drive import ask_wsgi, environ, http_scope
from tracemw.testing import capture_traces

CALLER = [(b"traceparent", b"00-1af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-01")]


@types.coroutine
def forever() -> Generator[None, None, None]:
    """Wait for what nobody sends any more."""
    yield


async def silence() -> Any:
    """A client that says nothing."""
    await forever()


async def nowhere(message: Any) -> None:
    """A client that is not there."""


async def half(scope: Any, receive: Any, send: Any) -> None:
    """Send half a response, and wait."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x", "more_body": True})
    with tracemw.start_span("waiting"):
        await receive()


def asgi_request(**options: Any) -> Any:
    """A request that has begun, whose server forgets it."""
    task: Any = tracemw.TraceMiddleware(half, **options)(http_scope("/", headers=CALLER), silence, nowhere)
    task.send(None)
    return task


def wsgi_request() -> Any:
    """A body that has begun, whose server forgets it."""

    def app(env: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"a"
        yield b"b"

    answer = ask_wsgi(tracemw.WSGITraceMiddleware(app), environ("/"))
    next(answer.body)
    return answer


def generator() -> Any:
    """A traced generator, after its first step."""

    @tracemw.trace
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    made = numbers()
    next(made)
    return made


def async_generator() -> Any:
    """Likewise, without an event loop that could close it."""

    @tracemw.trace
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    made: Any = numbers()
    with pytest.raises(StopIteration):
        made.__anext__().send(None)
    return made


def coroutine() -> Any:
    """A traced coroutine that waits."""

    @tracemw.trace
    async def waits() -> None:
        await forever()

    made = waits()
    made.send(None)
    return made


def block() -> Any:
    """A block in a generator that is not traced."""

    def steps() -> Iterator[int]:
        with tracemw.start_span("block"):
            yield 1
            yield 2

    made = steps()
    next(made)
    return made


def in_a_cycle(make: Callable[[], Any]) -> None:
    """Make something in a context that goes with it, and leave nothing but a cycle of references to it."""
    box = [contextvars.copy_context().run(make)]
    box.append(box)


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (asgi_request, "cancelled"),
        (lambda: asgi_request(trust_traceparent=True), "cancelled"),
        (wsgi_request, "disconnected"),
        (generator, "cancelled"),
        (async_generator, "cancelled"),
        (coroutine, "cancelled"),
        (block, "cancelled"),
    ],
    ids=["ASGI", "ASGI, continued", "WSGI", "generator", "async generator", "coroutine", "block"],
)
def test_what_is_dropped_in_a_cycle(
    make: Callable[[], Any], outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stored with its outcome, and nobody complains of a context that is not the one it was begun in."""
    with capture_traces() as traces, caplog.at_level(logging.WARNING):
        in_a_cycle(make)
        gc.collect()
        (trace,) = traces
    assert trace.info.state == "STATE_UNSPECIFIED"
    spans = {span.name: span.attributes.get("tracemw.outcome") for span in trace.data.spans}
    assert set(spans.values()) == {outcome}
    assert ("waiting" in spans) == ("GET" in spans and outcome == "cancelled")
    assert caplog.records == []


def test_two_requests_of_one_trace_are_dropped() -> None:
    """Each root of a trace still gets the facts and the spans that are its own."""

    def both() -> list[Any]:
        return [asgi_request(trust_traceparent=True), asgi_request(trust_traceparent=True)]

    with capture_traces() as traces:
        in_a_cycle(both)
        gc.collect()
        (trace,) = traces
    roots = [span for span in trace.data.spans if span.attributes.get("http.response.status_code") == 200]
    waiting = [span for span in trace.data.spans if span.name.startswith("waiting")]
    assert len(roots) == 2
    assert {span.parent_id for span in waiting} == {span.span_id for span in roots}
    assert len(trace.data.spans) == 4
