"""The patterns of MLflow's tracing guides work with only the import changed."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel

import tracemw as mlflow
from tracemw import Client as MlflowClient
from tracemw import SpanStatusCode, SpanType, Trace
from tracemw.testing import CapturedTraces


def outline(trace: Trace) -> dict[str, str | None]:
    """Names of the spans, each with its parent's."""
    names = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: names.get(span.parent_id or "") for span in trace.data.spans}


# Function decorators


def test_functions_that_call_each_other(captured_traces: CapturedTraces) -> None:
    """Decorated functions nest as they call; names, types and attributes are as given."""

    @mlflow.trace(span_type="func", attributes={"unit": "euro"})
    def net(price: float) -> float:
        return price / 2

    @mlflow.trace(span_type="func", attributes={"rounding": "up"})
    def rounded(price: float) -> int:
        return math.ceil(price)

    @mlflow.trace(name="Price Test")
    def price_test(price: float) -> int:
        return rounded(net(price))

    assert price_test(5) == 3
    (trace,) = captured_traces
    assert outline(trace) == {"Price Test": None, "net": "Price Test", "rounded": "Price Test"}
    net_span = trace.search_spans(name="net")[0]
    assert (net_span.span_type, net_span.get_attribute("unit")) == ("func", "euro")
    assert (trace.data.spans[0].inputs, trace.data.spans[0].outputs) == ({"price": 5}, 3)


def test_spans_of_one_name_get_a_suffix(captured_traces: CapturedTraces) -> None:
    """Several calls of one function read `name_1`, `name_2`."""

    @mlflow.trace
    def step(number: int) -> int:
        return number

    @mlflow.trace
    def pipeline() -> None:
        step(1)
        step(2)

    pipeline()
    assert [span.name for span in captured_traces[0].data.spans] == ["pipeline", "step_1", "step_2"]


def test_the_span_is_changed_from_inside(captured_traces: CapturedTraces) -> None:
    """`get_current_active_span` in the function gives the span that the decorator made."""

    @mlflow.trace(span_type=SpanType.LLM)
    def invoke(prompt: str) -> str:
        span = mlflow.get_current_active_span()
        assert span is not None
        span.set_attributes({"model": "small", "temperature": 0.5})
        return prompt[::-1]

    invoke("abc")
    span = captured_traces[0].data.spans[0]
    assert span.span_type == SpanType.LLM
    assert (span.attributes["model"], span.attributes["temperature"]) == ("small", 0.5)


def test_with_another_decorator(captured_traces: CapturedTraces) -> None:
    """Above or below a decorator that uses `functools.wraps`, the function is traced once under its name."""

    def timed(func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

        return wrapper

    @mlflow.trace(name="outermost")
    @timed
    def first(x: int, y: int) -> int:
        return x + y

    @timed
    @mlflow.trace
    def second(x: int, y: int) -> int:
        return x * y

    assert (first(5, 3), second(5, y=3)) == (8, 15)
    spans = [trace.data.spans for trace in captured_traces]
    assert [[(span.name, span.inputs) for span in one] for one in spans] == [
        [("outermost", {"x": 5, "y": 3})],
        [("second", {"x": 5, "y": 3})],
    ]


def test_an_exception_is_an_event(captured_traces: CapturedTraces) -> None:
    """A function that raises leaves a partial trace with the exception's details."""

    @mlflow.trace
    def divide(a: int, b: int) -> float:
        return a / b

    with pytest.raises(ZeroDivisionError):
        divide(1, 0)
    (trace,) = captured_traces
    (event,) = trace.data.spans[0].events
    assert trace.info.state == "ERROR"
    assert event.name == "exception"
    assert event.attributes["exception.message"] == "division by zero"
    assert event.attributes["exception.type"] == "ZeroDivisionError"
    assert "a / b" in event.attributes["exception.stacktrace"]


def test_streams(captured_traces: CapturedTraces) -> None:
    """A generator's output is the list, or what the reducer makes of it; its chunks are events."""

    @mlflow.trace
    def numbers() -> Iterator[int]:
        yield from range(5)

    @mlflow.trace(output_reducer=lambda chunks: ",".join(chunks))
    def letters() -> Iterator[str]:
        yield from "hello"

    @mlflow.trace
    async def later() -> AsyncIterator[int]:
        for number in range(2):
            yield number

    async def consume() -> list[int]:
        return [number async for number in later()]

    assert (list(numbers()), list(letters()), asyncio.run(consume())) == ([0, 1, 2, 3, 4], list("hello"), [0, 1])
    outputs = [trace.data.spans[0].outputs for trace in captured_traces]
    assert outputs == [[0, 1, 2, 3, 4], "h,e,l,l,o", [0, 1]]
    assert len(captured_traces[1].data.spans[0].events) == 5


def test_functions_of_others_are_wrapped(captured_traces: CapturedTraces) -> None:
    """Library functions, also those written in C, are traced where they are used."""

    def invocation(x: float, exponent: int = 2) -> int:
        raised = mlflow.trace(math.pow)(x, exponent)
        return mlflow.trace(math.factorial)(int(raised))

    with mlflow.start_span(name="root"):
        assert invocation(2) == 24
    root, power, factorial = captured_traces[0].data.spans
    assert (power.name, power.inputs, power.outputs) == ("pow", {"x": 2, "y": 2}, 4.0)
    assert (factorial.name, factorial.parent_id, factorial.outputs) == ("factorial", root.span_id, 24)


# Context managers, previews, tags


def test_a_block_of_code(captured_traces: CapturedTraces) -> None:
    """A block is a span; its inputs, outputs and attributes are told by hand."""
    with mlflow.start_span(name="my_span") as span:
        span.set_inputs({"x": 1, "y": 2})
        span.set_outputs(1 + 2)
        span.set_attribute("key", "value")
    (trace,) = captured_traces
    stored = trace.data.spans[0]
    assert (stored.name, stored.inputs, stored.outputs) == ("my_span", {"x": 1, "y": 2}, 3)
    assert stored.status.status_code == SpanStatusCode.OK


def test_tags_and_previews(captured_traces: CapturedTraces) -> None:
    """Tags, a request preview and a response preview that the function makes itself."""

    @mlflow.trace(name="Summary")
    def summarize(document: str, wish: str) -> str:
        mlflow.update_current_trace(tags={"kind": "summary"}, request_preview=f"Doc: {document[:9]}... {wish}")
        summary = document[:5]
        mlflow.update_current_trace(response_preview=f"Summary: {summary}")
        return summary

    summarize("a long document " * 100, "be brief")
    info = captured_traces[0].info
    assert info.request_preview == "Doc: a long do... be brief"
    assert info.response_preview == "Summary: a lon"
    assert info.tags["kind"] == "summary"


def test_tags_after_the_trace(captured_traces: CapturedTraces) -> None:
    """A trace that has ended is tagged by its id."""
    with mlflow.start_span(name="work"):
        pass
    trace_id = mlflow.get_last_active_trace_id()
    assert trace_id is not None
    mlflow.set_trace_tag(trace_id=trace_id, key="reviewed", value="yes")
    found = mlflow.get_trace(trace_id)
    assert found is not None and found.info.tags["reviewed"] == "yes"
    mlflow.delete_trace_tag(trace_id=trace_id, key="reviewed")
    assert "reviewed" not in captured_traces[0].info.tags


# Threads and asyncio


def test_worker_threads(captured_traces: CapturedTraces) -> None:
    """One copy of the context per task, run in the pool, makes the workers children of the caller."""

    @mlflow.trace
    def worker(question: str) -> str:
        return question.upper()

    @mlflow.trace
    def main(questions: list[str]) -> list[str]:
        with ThreadPoolExecutor(max_workers=2) as executor:
            futures = []
            for question in questions:
                ctx = contextvars.copy_context()
                futures.append(executor.submit(ctx.run, worker, question))
            return [future.result() for future in as_completed(futures)]

    assert sorted(main(["a", "b", "c"])) == ["A", "B", "C"]
    (trace,) = captured_traces
    root = trace.data.spans[0]
    assert root.name == "main"
    assert [span.parent_id for span in trace.search_spans(name="worker")] == [root.span_id] * 3


def test_async_functions(captured_traces: CapturedTraces) -> None:
    """Coroutines nest as they are awaited, also when they run side by side."""

    @mlflow.trace
    async def operation(data: str) -> str:
        await asyncio.sleep(0)
        return f"done {data}"

    @mlflow.trace
    async def pipeline(items: list[str]) -> list[str]:
        first = await operation(items[0])
        return [first, *await asyncio.gather(*(operation(item) for item in items[1:]))]

    assert asyncio.run(pipeline(["a", "b", "c"])) == ["done a", "done b", "done c"]
    (trace,) = captured_traces
    assert {span.parent_id for span in trace.search_spans(name="operation")} == {trace.data.spans[0].span_id}


# The low-level client


def test_the_clients_life_of_a_trace(captured_traces: CapturedTraces) -> None:
    """Traces and spans are begun and ended by `request_id`, `span_id` and `parent_id`."""
    client = MlflowClient(tracking_uri="http://localhost:5000")
    root = client.start_trace(name="flow", inputs={"user": "1"}, attributes={"version": "1.0.0"})
    fetch = client.start_span(
        name="fetch",
        request_id=root.request_id,
        parent_id=root.span_id,
        inputs={"id": 1},
        attributes={"db": "users"},
    )
    process = client.start_span(name="process", request_id=root.request_id, parent_id=root.span_id)
    client.end_span(
        request_id=fetch.request_id, span_id=fetch.span_id, outputs={"rows": 2}, attributes={"ms": 150}
    )
    client.end_span(request_id=process.request_id, span_id=process.span_id, status="OK")
    client.end_trace(request_id=root.request_id, outputs={"url": "/1"}, attributes={"total": 1250})
    (trace,) = captured_traces
    assert outline(trace) == {"flow": None, "fetch": "flow", "process": "flow"}
    assert trace.data.spans[1].attributes.items() >= {"db": "users", "ms": 150}.items()
    assert trace.data.spans[0].attributes.items() >= {"version": "1.0.0", "total": 1250}.items()


def test_the_clients_spans_as_a_context_manager(captured_traces: CapturedTraces) -> None:
    """A context manager around `start_span` and `end_span` closes spans, failed ones too."""
    client = MlflowClient()

    @contextmanager
    def traced_span(name: str, request_id: str, parent_id: str) -> Iterator[Any]:
        span = client.start_span(name=name, request_id=request_id, parent_id=parent_id)
        try:
            yield span
        except Exception as exc:
            client.end_span(
                request_id=span.request_id, span_id=span.span_id, status="ERROR", attributes={"error": str(exc)}
            )
            raise
        else:
            client.end_span(request_id=span.request_id, span_id=span.span_id, status="OK")

    root = client.start_trace("root")
    with traced_span("good", root.request_id, root.span_id) as good:
        assert good.name == "good"
    with pytest.raises(ValueError), traced_span("bad", root.request_id, root.span_id):
        raise ValueError("no")
    client.end_trace(root.request_id, status="ERROR")
    (trace,) = captured_traces
    assert [span.status.status_code.value for span in trace.data.spans] == ["ERROR", "OK", "ERROR"]
    assert trace.data.spans[2].attributes["error"] == "no"


def test_the_client_below_a_block(captured_traces: CapturedTraces) -> None:
    """Spans of the client can be put below one that a block made."""
    client = MlflowClient()
    with mlflow.start_span("parent_span") as parent:
        child = client.start_span(name="child", trace_id=parent.trace_id, parent_id=parent.span_id)
        client.end_span(trace_id=parent.trace_id, span_id=child.span_id)
    assert outline(captured_traces[0]) == {"parent_span": None, "child": "parent_span"}


# Versions, environments, users and sessions


class ChatRequest(BaseModel):
    message: str


def chat_application() -> FastAPI:
    """The guide's application: it reads the headers and the environment by hand, `@trace` outermost."""
    app = FastAPI()

    @mlflow.trace
    @app.post("/chat")
    def handle_chat(request: Request, chat_request: ChatRequest) -> dict[str, str]:
        mlflow.update_current_trace(
            client_request_id=request.headers.get("X-Request-ID"),
            metadata={
                "mlflow.trace.session": request.headers.get("X-Session-ID"),
                "mlflow.trace.user": request.headers.get("X-User-ID"),
                "mlflow.source.type": os.getenv("APP_ENVIRONMENT", "development"),
                "environment": "production",
                "app_version": os.getenv("APP_VERSION", "1.0.0"),
            },
        )
        return {"response": f"Processed: {chat_request.message}"}

    return app


@pytest.mark.parametrize("with_headers", [True, False])
def test_the_context_of_a_request(captured_traces: CapturedTraces, with_headers: bool) -> None:
    """Request, session and user ids and the environment, and a search by them; headers may be missing."""
    headers = {"X-Request-ID": "req-1", "X-Session-ID": "session-1", "X-User-ID": "jane"} if with_headers else {}

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(mlflow.instrument(chat_application()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/chat", json={"message": "hi"}, headers=headers)

    assert asyncio.run(post()).json() == {"response": "Processed: hi"}
    (trace,) = mlflow.search_traces("metadata.environment = 'production' AND metadata.app_version = '1.0.0'")
    assert trace.info.trace_metadata["mlflow.source.type"] == "development"
    assert outline(trace) == {"POST /chat": None, "handle_chat": "POST /chat"}
    if with_headers:
        assert trace.info.client_request_id == "req-1"
        found = mlflow.search_traces(
            "metadata.`mlflow.trace.session` = 'session-1' AND metadata.`mlflow.trace.user` = 'jane'"
        )
        assert found == [trace]
    else:
        assert not {"mlflow.trace.session", "mlflow.trace.user"} & set(trace.info.trace_metadata)
