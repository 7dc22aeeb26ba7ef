"""MLflow's traced generators, and code that is left before its end: each span ends, at the right time, once."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import pytest

import tracemw
from tests.adapters.trees import root, tree
from tests.mlflow.test_bridge_tree import asgi
from tests.mlflow.types import MLflow
from tests.request.drive import ask, http_scope
from tracemw.testing import capture_traces


def numbers(mlflow: MLflow, **options: Any) -> Any:
    """A traced generator with a span inside."""

    @mlflow.trace(**options)
    def stream(count: int) -> Iterator[int]:
        for number in range(count):
            with mlflow.start_span(f"step {number}"):
                pass
            yield number

    return stream


def test_a_generator_read_to_its_end(mlflow: MLflow) -> None:
    """One span, current while the generator's own code runs; chunks are events; the output is their list."""
    from opentelemetry import trace as otel

    with capture_traces() as traces:
        for _ in numbers(mlflow)(2):
            assert not otel.get_current_span().is_recording()
        list(numbers(mlflow, name="sum", output_reducer=sum)(4))
    plain, reduced = traces
    assert tree(plain) == {"stream": {"step 0": {}, "step 1": {}}}
    assert (root(plain).inputs, root(plain).outputs) == ({"count": 2}, [0, 1])
    assert [event.name for event in root(plain).events] == ["mlflow.chunk.item.0", "mlflow.chunk.item.1"]
    assert root(plain).get_attribute("tracemw.chunks") == 2
    assert root(reduced).outputs == 6


@pytest.mark.parametrize("how", ["closed", "dropped", "left by a loop"])
def test_a_generator_closed_early(mlflow: MLflow, how: str) -> None:
    """It is stored when it is closed, with what it has yielded; MLflow alone would lose the whole trace."""
    with capture_traces() as traces:
        stream = numbers(mlflow)(5)
        next(stream)
        if how == "closed":
            next(stream)
            stream.close()
        elif how == "dropped":
            next(stream)
            del stream
        else:
            for _ in stream:
                break
            del stream
        gc.collect()
        (trace,) = traces
    span = root(trace)
    assert tree(trace) == {"stream": {"step 0": {}, "step 1": {}}}
    assert span.outputs == [0, 1]
    assert span.get_attribute("tracemw.outcome") == "cancelled"
    assert span.status.status_code == "UNSET"
    assert trace.info.state == "STATE_UNSPECIFIED"


def test_a_generator_that_fails(mlflow: MLflow) -> None:
    """The exception is recorded once, raised on, and makes the trace's state."""

    @mlflow.trace
    def stream() -> Iterator[int]:
        yield 1
        raise ValueError("boom")

    with capture_traces() as traces:
        with pytest.raises(ValueError, match="boom"):
            list(stream())
    (trace,) = traces
    span = root(trace)
    assert [event.name for event in span.events] == ["mlflow.chunk.item.0", "exception"]
    assert (span.status.status_code, span.status.description) == ("ERROR", "ValueError: boom")
    assert trace.info.state == "ERROR"


def test_more_chunks_than_opentelemetry_keeps_events(mlflow: MLflow) -> None:
    """The first hundred are events, their number is said, the output has all; what comes after has room."""

    @mlflow.trace
    def stream() -> Iterator[Any]:
        yield {"password": "secret", "text": "x" * 10_000}
        yield from range(299)
        raise ValueError("at the end")

    with capture_traces() as traces:
        with pytest.raises(ValueError):
            list(stream())
        list(numbers(mlflow)(300))
    failed, read = traces
    names = [event.name for event in root(failed).events]
    assert names == [f"mlflow.chunk.item.{n}" for n in range(100)] + ["exception"]
    assert "secret" not in failed.to_json()
    assert root(failed).get_attribute("tracemw.chunks") == 300
    assert root(read).outputs == list(range(300))


def test_asynchronous_generators(mlflow: MLflow) -> None:
    """Read to the end, closed, left by a cancelled task, and left behind by the loop."""

    @mlflow.trace
    async def stream(name: str) -> AsyncGenerator[int, None]:
        for number in range(3):
            yield number
            await asyncio.sleep(0)
        if name == "waits":
            await asyncio.sleep(60)

    async def main() -> None:
        assert [number async for number in stream("whole")] == [0, 1, 2]
        closed = stream("closed")
        await closed.__anext__()
        await closed.aclose()

        async def read() -> None:
            async for _ in stream("waits"):
                pass

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = stream("left")
        await left.__anext__()

    with capture_traces() as traces:
        asyncio.run(main())
        gc.collect()
        found = {root(trace).inputs["name"]: (trace.info.state, root(trace).outputs) for trace in traces}
    assert found == {
        "whole": ("OK", [0, 1, 2]),
        "closed": ("STATE_UNSPECIFIED", [0]),
        "waits": ("STATE_UNSPECIFIED", [0, 1, 2]),
        "left": ("STATE_UNSPECIFIED", [0]),
    }


def test_a_stream_as_the_body_of_a_response(mlflow: MLflow) -> None:
    """The generator's span is the root's child; what it streams is the preview of the response."""
    responses = pytest.importorskip("starlette.responses")

    @mlflow.trace(output_reducer="".join)
    def body(count: int) -> Iterator[str]:
        for number in range(count):
            yield str(number)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await responses.StreamingResponse(body(3))(scope, receive, send)

    with capture_traces() as traces:
        assert ask(tracemw.TraceMiddleware(app), http_scope()).body == b"012"
    (trace,) = traces
    assert tree(trace) == {"GET": {"body": {}}}
    assert (trace.info.request_preview, trace.info.response_preview) == ('{"count": 3}', '"012"')


def test_a_client_that_goes_away(mlflow: MLflow) -> None:
    """The stream's span is stored with what was sent, and the request is no error."""
    responses = pytest.importorskip("starlette.responses")

    @mlflow.trace
    async def body() -> AsyncIterator[str]:
        for number in range(1000):
            yield str(number)
            await asyncio.sleep(0.001)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await responses.StreamingResponse(body())(scope, receive, send)

    async def main() -> None:
        sent: list[Any] = []
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        await tracemw.TraceMiddleware(app)(http_scope(), receive, send)

    with capture_traces() as traces:
        asyncio.run(main())
        gc.collect()
        (trace,) = traces
    assert tree(trace) == {"GET": {"body": {}}}
    (span,) = trace.search_spans(name="body")
    assert span.outputs[:3] == ["0", "1", "2"] and len(span.outputs) < 900
    assert span.get_attribute("tracemw.outcome") == "cancelled"
    assert trace.info.state == "STATE_UNSPECIFIED"


@pytest.mark.parametrize("where", ["function", "block"])
def test_a_cancelled_task(mlflow: MLflow, where: str) -> None:
    """No error, and not OK either; the span ends when the task does."""

    @mlflow.trace
    async def work() -> None:
        await asyncio.sleep(60)

    async def block() -> None:
        with mlflow.start_span("work"):
            await asyncio.sleep(60)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(work() if where == "function" else block(), 0.05)

    with capture_traces() as traces:
        asyncio.run(main())
    (trace,) = traces
    assert (root(trace).status.status_code, root(trace).get_attribute("tracemw.outcome")) == ("UNSET", "cancelled")
    assert trace.info.state == "STATE_UNSPECIFIED"
    assert trace.info.execution_duration is not None and trace.info.execution_duration < 5_000


def test_spans_in_code_that_handles_a_cancellation(mlflow: MLflow) -> None:
    """What is begun and ended while something else is being cancelled is not cancelled itself."""

    @mlflow.trace
    def clean_up() -> int:
        return 1

    async def main() -> None:
        try:
            raise asyncio.CancelledError
        except asyncio.CancelledError:
            clean_up()

    with capture_traces() as traces:
        asyncio.run(main())
    assert traces[0].info.state == "OK"


def test_spans_that_nobody_ends(mlflow: MLflow) -> None:
    """When nobody can end it any more a span is stored as it is; in a request it keeps nothing waiting."""

    def handle() -> str:
        mlflow.start_span_no_context("forgotten", inputs={"a": 1})
        return "x"

    with capture_traces() as traces:
        ask(asgi(handle))
        gc.collect()
        (trace,) = traces
    assert tree(trace) == {"GET": {"forgotten": {}}}
    assert trace.search_spans(name="forgotten")[0].inputs == {"a": 1}


def test_nothing_is_left_behind(mlflow: MLflow) -> None:
    """Neither in MLflow's table nor in ours, whatever has happened; with thousands of traces at once, too."""
    from tracemw import record
    from tracemw._mlflow_spans import held, live
    from tracemw._mlflow_table import Manager

    with capture_traces() as traces:
        spans = [mlflow.start_span_no_context(f"root {n}") for n in range(1500)]
        for span in spans:
            span.set_attribute("n", 1)
        for span in spans:
            span.end()
        del spans, span
        next(numbers(mlflow)(2))
        gc.collect()
        assert len(traces) == 1501
    assert len(Manager.get_instance()._traces) == 0
    assert not held and not [s for s in live.values() if s._span.is_recording()]
    gc.collect()
    assert len(record._alive) < 1500


def test_the_clock_may_be_set(mlflow: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span's duration is counted by a clock that nobody sets; a time that is given counts."""
    with capture_traces() as traces:
        with mlflow.start_span("set back"):
            monkeypatch.setattr(time, "time_ns", lambda: 5)
            time.sleep(0.02)
        monkeypatch.undo()
        mlflow.start_span_no_context("given", start_time_ns=10**18).end(end_time_ns=10**18 + 3_000_000)
    durations = {t.info.tags["mlflow.traceName"]: t.info.execution_duration for t in traces}
    assert durations["set back"] is not None and durations["set back"] >= 20
    assert durations["given"] == 3
