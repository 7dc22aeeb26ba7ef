"""Only type-checked, never run: what the types of the public names promise to users."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from typing_extensions import assert_type

import tracemw
from tracemw import Client, Span, SpanStatusCode, SpanType, Trace
from tracemw.livespan import LiveSpan
from tracemw.reading import TraceList
from tracemw.testing import CapturedTraces, capture_traces


@tracemw.trace
def plain(a: int, b: str = "") -> float:
    return a * 1.0


@tracemw.trace(name="named", span_type=SpanType.TOOL, attributes={"k": [1]})
async def coroutine(a: int) -> str:
    return str(a)


@tracemw.trace(output_reducer=len)
def generator() -> Iterator[int]:
    yield 1


@tracemw.trace
async def async_generator() -> AsyncIterator[bytes]:
    yield b""


class Shop:
    @tracemw.trace
    def method(self, a: int) -> int:
        return a

    @classmethod
    @tracemw.trace
    def make(cls) -> Shop:
        return cls()

    @tracemw.trace
    @staticmethod
    def static(a: int) -> str:
        return str(a)


assert_type(plain(1, "b"), float)
plain("1")  # type: ignore[arg-type]
plain(1, c=2)  # type: ignore[call-arg]
assert_type(generator(), Iterator[int])
assert_type(async_generator(), AsyncIterator[bytes])
assert_type(Shop().method(1), int)
assert_type(Shop.make(), Shop)
assert_type(Shop.static(1), str)
assert_type(tracemw.trace(max), Callable[..., Any])  # type: ignore[assert-type]


async def main() -> None:
    started: Coroutine[Any, Any, str] = coroutine(1)
    await started
    assert_type(await coroutine(1), str)
    async with tracemw.start_span("block") as span:
        assert_type(span, LiveSpan)


with tracemw.start_span("block", span_type="CHAIN", attributes={"any": object()}) as span:
    assert_type(span, LiveSpan)
    as_value: Span = span
    span.set_status("OK")
    span.set_status(SpanStatusCode.ERROR)
    assert_type(span.to_immutable_span(), Span)

assert_type(tracemw.get_current_active_span(), LiveSpan | None)
assert_type(tracemw.start_span_no_context("x", parent_span=span), LiveSpan)
assert_type(tracemw.get_active_trace_id(), str | None)
assert_type(tracemw.get_trace("tr-1"), Trace | None)
assert_type(tracemw.search_traces("name = 'x'"), TraceList)
assert_type(tracemw.search_traces()[0], Trace)
assert_type(tracemw.search_traces().token, str | None)
assert_type(Client().start_trace("x"), LiveSpan)
assert_type(Client().get_trace("tr-1"), Trace)
assert_type(tracemw.current_request.session_id, str | None)
tracemw.update_current_trace(tags={"n": 1}, user="ada")
tracemw.update_current_trace(nonsense=1)  # type: ignore[call-arg]

with capture_traces(sample_rate=1.0) as traces:
    assert_type(traces, CapturedTraces)
    assert_type(traces[0], Trace)
    assert_type(traces[1:], list[Trace])
