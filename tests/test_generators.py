"""Traced generators: when the span begins and ends, what is current meanwhile, what is recorded."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from opentelemetry import context as otel_context

import tracemw
from tracemw import SpanStatusCode
from tracemw.streams import EVENT_LIMIT, KEPT_ITEMS
from tracemw.testing import CapturedTraces


@tracemw.trace
def count(n: int) -> Iterator[int]:
    yield from range(n)


@tracemw.trace
async def acount(n: int) -> AsyncIterator[int]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number


def spans(traces: CapturedTraces) -> dict[str, Any]:
    """The spans of the one trace by name."""
    (trace,) = traces
    return {span.name: span for span in trace.data.spans}


async def collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


# What is recorded


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_chunks_are_events_and_their_list_is_the_output(captured_traces: CapturedTraces, kind: str) -> None:
    """Inputs by name, one event for each chunk, the list as output; the number of chunks is said."""
    got = list(count(3)) if kind == "sync" else asyncio.run(collected(acount(n=3)))
    assert got == [0, 1, 2]
    (span,) = spans(captured_traces).values()
    assert (span.inputs, span.outputs) == ({"n": 3}, [0, 1, 2])
    assert span.status.status_code == SpanStatusCode.OK
    assert [(event.name, event.attributes) for event in span.events] == [
        (f"mlflow.chunk.item.{i}", {"mlflow.chunk.value": str(i)}) for i in range(3)
    ]
    assert span.attributes["tracemw.chunks"] == 3
    assert captured_traces[0].info.response_preview == "[0, 1, 2]"


def test_an_output_reducer_makes_the_output(captured_traces: CapturedTraces) -> None:
    """It gets the list of chunks; what the body sets itself wins over it."""

    @tracemw.trace(output_reducer="".join)
    def words() -> Iterator[str]:
        yield from ("a", "b")

    @tracemw.trace(output_reducer=len)
    def telling() -> Iterator[str]:
        span = tracemw.get_current_active_span()
        assert span is not None
        yield "x"
        span.set_outputs("told")

    list(words())
    list(telling())
    assert [trace.data.spans[0].outputs for trace in captured_traces] == ["ab", "told"]


def test_a_reducer_that_fails_does_not_lose_the_span(
    captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture
) -> None:
    """The list is kept, and the failure is logged."""

    @tracemw.trace(output_reducer="".join)
    def numbers() -> Iterator[int]:
        yield 1

    with caplog.at_level(logging.WARNING, "tracemw"):
        assert list(numbers()) == [1]
    assert captured_traces[0].data.spans[0].outputs == [1]
    assert "output_reducer failed (TypeError" in caplog.text


def test_a_long_stream_is_bounded(captured_traces: CapturedTraces) -> None:
    """The first chunks are events, few enough for the SDK to keep all; the total is said."""
    total = KEPT_ITEMS + 5
    assert sum(1 for _ in count(total)) == total
    (span,) = spans(captured_traces).values()
    assert [event.name for event in span.events] == [f"mlflow.chunk.item.{i}" for i in range(EVENT_LIMIT)]
    assert (span.attributes["tracemw.chunks"], span.attributes["tracemw.chunks_kept"]) == (total, KEPT_ITEMS)


def test_large_chunks_are_bounded(captured_traces: CapturedTraces) -> None:
    """Neither the events nor what is kept for the output grows with the chunks' size."""

    @tracemw.trace
    def download() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    assert sum(map(len, download())) == 50_000_000
    (span,) = spans(captured_traces).values()
    assert span.attributes["tracemw.chunks_kept"] <= 4
    assert len(captured_traces[0].to_json()) < 1_000_000


# When it begins and ends


def test_the_span_begins_with_the_first_step(captured_traces: CapturedTraces) -> None:
    """A generator that is made and never iterated has no span; its parent is what is current at the first step."""
    never = count(1)
    with tracemw.start_span("maker"):
        later = count(1)
    with tracemw.start_span("consumer"):
        list(later)
    del never
    gc.collect()
    maker, consumer = captured_traces
    assert [span.name for span in maker.data.spans] == ["maker"]
    assert [span.name for span in consumer.data.spans] == ["consumer", "count"]


@pytest.mark.parametrize("ending", ["close", "drop", "break"])
def test_a_generator_that_is_not_exhausted(captured_traces: CapturedTraces, ending: str) -> None:
    """Closed, dropped or left by `break`: the span ends as cancelled with what was yielded."""
    items = count(10)
    if ending == "break":
        for _ in items:
            break
    else:
        next(items)
    if ending == "close":
        items.close()  # type: ignore[attr-defined]
    del items
    gc.collect()
    (span,) = spans(captured_traces).values()
    assert span.status.status_code == SpanStatusCode.UNSET
    assert (span.outputs, span.attributes["tracemw.outcome"]) == ([0], "cancelled")
    assert span.end_time_ns is not None


@pytest.mark.parametrize("ending", ["aclose", "drop", "break", "cancel"])
def test_an_async_generator_that_is_not_exhausted(captured_traces: CapturedTraces, ending: str) -> None:
    """Closed, dropped, left by `break` or cancelled while it waits: the span ends as cancelled."""

    async def consume() -> None:
        items: Any = acount(1_000_000)
        if ending == "break":
            async for _ in items:
                break
        elif ending == "cancel":
            async for _ in items:
                pass
        else:
            await anext(items)
        if ending == "aclose":
            await items.aclose()
        del items
        gc.collect()
        await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(consume())
        if ending == "cancel":
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    (span,) = spans(captured_traces).values()
    assert span.attributes["tracemw.outcome"] == "cancelled"
    assert span.status.status_code == SpanStatusCode.UNSET


def test_dropped_where_no_loop_can_close_it(captured_traces: CapturedTraces) -> None:
    """An async generator that nobody can close any more still ends its span."""

    @tracemw.trace
    async def immediate() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    items: Any = immediate()
    with pytest.raises(StopIteration):
        items.__anext__().send(None)
    del items
    gc.collect()
    assert spans(captured_traces)["immediate"].attributes["tracemw.outcome"] == "cancelled"


def test_dropped_in_another_thread(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """A generator may be finished by another thread, or collected there: nothing is logged, nothing is lost."""
    items = [count(3), count(3)]
    for item in items:
        next(item)

    def elsewhere() -> None:
        assert list(items.pop()) == [1, 2]
        del items[:]
        gc.collect()

    thread = threading.Thread(target=elsewhere)
    with caplog.at_level(logging.DEBUG):
        thread.start()
        thread.join()
    assert caplog.records == []
    assert [trace.data.spans[0].outputs for trace in captured_traces] == [[0, 1, 2], [0]]


def test_a_generator_that_fails(captured_traces: CapturedTraces) -> None:
    """The exception passes untouched and is recorded once, with a description; chunks so far are the output."""

    @tracemw.trace
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        list(fails())
    (span,) = spans(captured_traces).values()
    assert (span.status.status_code, span.status.description) == (SpanStatusCode.ERROR, "ValueError: boom")
    assert [event.name for event in span.events] == ["mlflow.chunk.item.0", "exception"]
    assert span.outputs == [1]


# The generator's protocol


def test_send_throw_and_return_pass_through(captured_traces: CapturedTraces) -> None:
    """What is sent and thrown reaches the generator, what it returns reaches `yield from`."""

    def talk() -> Generator[Any, Any, str]:
        got = yield "ready"
        try:
            yield got * 2
        except KeyError as exc:
            yield f"caught {exc.args[0]}"
        return "done"

    def outer(inner: Any) -> Generator[Any, Any, None]:
        results.append((yield from inner))

    for fn in (talk, tracemw.trace(talk)):
        results: list[str] = []
        conversation = outer(fn())
        assert next(conversation) == "ready"
        assert conversation.send(21) == 42
        assert conversation.throw(KeyError("k")) == "caught k"
        assert list(conversation) == []
        assert results == ["done"]
    assert spans(captured_traces)["talk"].outputs == ["ready", 42, "caught k"]


def test_asend_and_athrow_pass_through(captured_traces: CapturedTraces) -> None:
    """The same for async generators."""

    @tracemw.trace
    async def talk() -> AsyncGenerator[Any, Any]:
        got = yield "ready"
        try:
            yield got * 2
        except KeyError as exc:
            yield f"caught {exc.args[0]}"

    async def main() -> list[Any]:
        items: Any = talk()
        return [
            await anext(items),
            await items.asend(21),
            await items.athrow(KeyError("k")),
            await collected(items),
        ]

    assert asyncio.run(main()) == ["ready", 42, "caught k", []]
    assert spans(captured_traces)["talk"].outputs == ["ready", 42, "caught k"]


def test_closing_runs_the_generators_own_cleanup(captured_traces: CapturedTraces) -> None:
    """`close` reaches the inner generator at once; its cleanup runs inside its span, and may fail."""
    seen = []

    @tracemw.trace
    def resource(fail: bool) -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            span = tracemw.get_current_active_span()
            seen.append(span.name if span else None)
            if fail:
                raise OSError("cleanup")

    for fail in (False, True):
        items: Any = resource(fail)
        next(items)
        if fail:
            with pytest.raises(OSError, match="cleanup"):
                items.close()
        else:
            items.close()
    assert seen == ["resource", "resource"]
    first, second = (trace.data.spans[0] for trace in captured_traces)
    assert first.attributes["tracemw.outcome"] == "cancelled"
    assert second.status.description == "OSError: cleanup"


def test_an_exception_thrown_in_and_not_caught(captured_traces: CapturedTraces) -> None:
    """It comes out as the same object, without a context that it did not have."""
    items: Any = count(3)
    next(items)
    error = KeyError("k")
    with pytest.raises(KeyError) as caught:
        items.throw(error)
    assert caught.value is error and error.__context__ is None
    assert spans(captured_traces)["count"].status.status_code == SpanStatusCode.ERROR


def test_kind_and_signature_stay() -> None:
    """Frameworks see a generator function with the original's parameters."""
    assert inspect.isgeneratorfunction(count)
    assert inspect.isasyncgenfunction(acount)
    assert list(inspect.signature(count).parameters) == ["n"]
    assert inspect.isgenerator(count(1))


def test_untraced_while_off(captured_traces: CapturedTraces) -> None:
    """With tracing off the generators work as they are."""
    with tracemw.context(enabled=False):
        assert list(count(2)) == [0, 1]
        assert asyncio.run(collected(acount(2))) == [0, 1]
    assert len(captured_traces) == 0


# What is current


def names_current() -> str | None:
    span = tracemw.get_current_active_span()
    return None if span is None else span.name


def test_each_step_leaves_its_own_consumer_s_context(captured_traces: CapturedTraces) -> None:
    """Steps may be taken below different spans: after each of them, that one is current again."""
    numbers, current = count(3), []
    with tracemw.start_span("all"):
        for name in ("first", "second", "third"):
            with tracemw.start_span(name):
                next(numbers)
                current.append(names_current())
    assert list(numbers) == []
    assert current == ["first", "second", "third"]
    assert spans(captured_traces)["count"].outputs == [0, 1, 2]


def test_it_is_current_only_while_its_own_code_runs(captured_traces: CapturedTraces) -> None:
    """The consumer never sees the generator's span as current, nor the spans that the generator has open."""
    inside = []

    @tracemw.trace
    def generate() -> Iterator[int]:
        inside.append(names_current())
        with tracemw.start_span("step"):
            yield 1
            inside.append(names_current())
            with tracemw.start_span("within"):
                yield 2
        inside.append(names_current())
        yield 3

    with tracemw.start_span("consumer"):
        before = otel_context.get_current()
        for number in generate():
            assert otel_context.get_current() is before
            with tracemw.start_span(f"use-{number}"):
                pass
    assert inside == ["generate", "step", "generate"]
    found = spans(captured_traces)
    parent = {span.span_id: name for name, span in found.items()}
    tree = {name: parent.get(span.parent_id) for name, span in found.items()}
    assert tree == {
        "consumer": None,
        "generate": "consumer",
        "step": "generate",
        "within": "step",
        "use-1": "consumer",
        "use-2": "consumer",
        "use-3": "consumer",
    }


def test_steps_in_different_contexts(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """Each step may run in another copy of the context: a span that the generator holds open stays its own."""

    @tracemw.trace
    def generate() -> Iterator[int]:
        with tracemw.start_span("held"):
            yield 1
            with tracemw.start_span("second"):
                yield 2
        with tracemw.start_span("third"):
            yield 3

    items = generate()
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            contextvars.copy_context().run(next, items)
        assert list(items) == []
    assert caplog.records == []
    found = spans(captured_traces)
    parent = {span.span_id: name for name, span in found.items()}
    assert {name: parent.get(span.parent_id) for name, span in found.items()} == {
        "generate": None,
        "held": "generate",
        "second": "held",
        "third": "generate",
    }


def test_async_steps_in_different_tasks(captured_traces: CapturedTraces) -> None:
    """Each step of an async generator may be taken by another task."""

    @tracemw.trace
    async def generate() -> AsyncGenerator[str | None, None]:
        with tracemw.start_span("held"):
            for _ in range(3):
                await asyncio.sleep(0)
                yield names_current()

    async def main() -> list[Any]:
        items = generate()
        with tracemw.start_span("consumer"):
            got = [await asyncio.create_task(anext(items)) for _ in range(3)]
            assert names_current() == "consumer"
            await items.aclose()
        return got

    assert asyncio.run(main()) == ["held"] * 3
    assert set(spans(captured_traces)) == {"consumer", "generate", "held"}


def test_two_generators_take_turns(captured_traces: CapturedTraces) -> None:
    """Interleaved generators each keep what they have open."""

    @tracemw.trace
    def generate(name: str) -> Iterator[int]:
        for number in range(3):
            with tracemw.start_span(f"{name}{number}"):
                yield number

    with tracemw.start_span("root"):
        assert list(zip(generate("a"), generate("b"), strict=True)) == [(0, 0), (1, 1), (2, 2)]
    (trace,) = captured_traces
    generators = {span.inputs["name"]: span.span_id for span in trace.search_spans(name="generate")}
    for span in trace.data.spans:
        if span.name[0] in "ab":
            assert span.parent_id == generators[span.name[0]]


@pytest.mark.parametrize("form", [list, tuple, set, sorted])
def test_consumed_by_anything(captured_traces: CapturedTraces, form: Callable[..., Any]) -> None:
    """Whatever consumes it gets the chunks as from the plain generator."""
    assert form(count(3)) == form(range(3))
    assert len(captured_traces) == 1
