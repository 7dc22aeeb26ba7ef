"""Spans made by hand, and their place among those of OpenTelemetry."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tracemw
from tracemw import SpanEvent, SpanStatus, SpanStatusCode, SpanType, provider
from tracemw.errors import TracemwError
from tracemw.livespan import LiveSpan, NoOpSpan
from tracemw.testing import CapturedTraces, capture_traces


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[trace_api.Tracer, InMemorySpanExporter]]:
    """An application that has a tracer provider and an exporter of its own."""
    exporter = InMemorySpanExporter()
    sdk = TracerProvider(shutdown_on_exit=False)
    sdk.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace_api, "_TRACER_PROVIDER", sdk)
    yield sdk.get_tracer("application"), exporter
    monkeypatch.undo()
    provider.reset()


def tree(traces: CapturedTraces) -> dict[str, str | None]:
    """Names of the spans of the one trace, each with its parent's name."""
    (trace,) = traces
    names = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: names.get(span.parent_id or "") for span in trace.data.spans}


def test_blocks_nest(captured_traces: CapturedTraces) -> None:
    """A block below another one is its child; the current span is put back after each."""
    with tracemw.start_span("root", span_type=SpanType.CHAIN, attributes={"k": 1}) as root:
        assert tracemw.get_current_active_span() == root
        with tracemw.start_span("child") as child:
            assert tracemw.get_current_active_span() == child
            assert child.trace_id == root.trace_id
            assert child.parent_id == root.span_id
        with tracemw.start_span("second"):
            pass
        assert tracemw.get_current_active_span() == root
    assert tracemw.get_current_active_span() is None
    assert tree(captured_traces) == {"root": None, "child": "root", "second": "root"}
    (trace,) = captured_traces
    assert trace.trace_id == root.trace_id
    assert trace.data.spans[0].span_type == "CHAIN"
    assert trace.data.spans[0].attributes["k"] == 1


def test_inputs_and_outputs_of_the_root_make_the_previews(captured_traces: CapturedTraces) -> None:
    """What the root got and gave is what the trace shows."""
    with tracemw.start_span("root") as span:
        span.set_inputs({"question": "why?"})
        span.set_outputs("because")
    info = captured_traces[0].info
    assert (info.request_preview, info.response_preview) == ('{"question": "why?"}', '"because"')
    assert captured_traces[0].data.request == '{"question": "why?"}'


def test_an_exception_ends_the_block_as_failed(captured_traces: CapturedTraces) -> None:
    """It is recorded and raised on; an inner block that is left unharmed has not failed."""
    with pytest.raises(ValueError, match="boom"):
        with tracemw.start_span("root"):
            with tracemw.start_span("fine"):
                pass
            raise ValueError("boom")
    root, fine = captured_traces[0].data.spans
    assert (root.status.status_code, fine.status.status_code) == (SpanStatusCode.ERROR, SpanStatusCode.OK)
    assert [event.name for event in root.events] == ["exception"]
    assert captured_traces[0].info.state == "ERROR"


def test_async_code_nests_by_itself(captured_traces: CapturedTraces) -> None:
    """Tasks that a block starts are its children, also those that run side by side."""

    async def work(name: str) -> None:
        async with tracemw.start_span(name):
            await asyncio.sleep(0)
            with tracemw.start_span(f"{name}-child"):
                await asyncio.sleep(0)

    async def main() -> None:
        with tracemw.start_span("root"):
            await asyncio.gather(work("a"), work("b"))

    asyncio.run(main())
    assert tree(captured_traces) == {"root": None, "a": "root", "b": "root", "a-child": "a", "b-child": "b"}


def test_a_thread_nests_where_the_context_is_carried(captured_traces: CapturedTraces) -> None:
    """`copy_context().run`, as MLflow's guide has it, makes a thread's spans children; without it they are not."""

    def work(name: str) -> None:
        with tracemw.start_span(name):
            pass

    with tracemw.start_span("root"):
        carried = threading.Thread(target=contextvars.copy_context().run, args=(work, "carried"))
        plain = threading.Thread(target=work, args=("plain",))
        for thread in (carried, plain):
            thread.start()
            thread.join()
    plain_trace, trace = captured_traces
    assert [span.name for span in trace.data.spans] == ["root", "carried"]
    assert [span.name for span in plain_trace.data.spans] == ["plain"]


# The live span


def test_everything_that_can_be_told_of_a_span(captured_traces: CapturedTraces) -> None:
    """Type, inputs, outputs, attributes, events, status and links are told to the live span and read back."""
    with tracemw.start_span("other") as other:
        pass
    with tracemw.start_span("span", description="what for", log_level="INFO") as span:
        span.set_span_type("TOOL")
        span.set_inputs([1, {"a": 2}])
        span.set_outputs({"x": None})
        span.set_attribute("text", "{not json")
        span.set_attributes({"number": 1.5, "flag": True, "list": [1, 2], "mixed": [1, "a", {"b": None}]})
        span.add_event(SpanEvent("happened", attributes={"n": 1}))
        span.add_link(other)
        assert (span.span_type, span.inputs, span.outputs) == ("TOOL", [1, {"a": 2}], {"x": None})
        assert span.get_attribute("mixed") == [1, "a", {"b": None}]
        assert span.get_attribute("missing") is None
        assert (span.description, span.log_level) == ("what for", 20)
        assert span.end_time_ns is None
        assert isinstance(span, tracemw.Span)
        snapshot = span.to_immutable_span()
    stored = captured_traces[1].data.spans[0]
    for seen in (snapshot, stored):
        assert seen.attributes["text"] == "{not json"
        assert seen.attributes["list"] == [1, 2]
        assert seen.attributes["mixed"] == [1, "a", {"b": None}]
        assert [(event.name, event.attributes) for event in seen.events] == [("happened", {"n": 1})]
        assert [(link.trace_id, link.span_id) for link in seen.links] == [(other.trace_id, other.span_id)]
    assert snapshot.span_id == span.span_id == stored.span_id
    assert span.to_dict()["name"] == "span"


@pytest.mark.parametrize("status", ["ERROR", SpanStatusCode.ERROR, SpanStatus("ERROR", "why")])
def test_a_status_is_set_in_each_of_its_forms(captured_traces: CapturedTraces, status: Any) -> None:
    """A name, a code or a `SpanStatus`; a failed root makes the trace failed."""
    with tracemw.start_span("root") as span:
        span.set_status(status)
    assert captured_traces[0].data.spans[0].status.status_code == SpanStatusCode.ERROR
    assert captured_traces[0].info.state == "ERROR"
    with tracemw.start_span("other") as span, pytest.raises(TracemwError, match="not a valid SpanStatusCode"):
        span.set_status("FINE")


def test_an_error_can_be_recorded_by_hand(captured_traces: CapturedTraces) -> None:
    """An exception or an error's text becomes an event, and the span has failed."""
    for error, description in ((KeyError("k"), "KeyError: 'k'"), ("no answer", "Exception: no answer")):
        with tracemw.start_span("span") as span:
            span.record_exception(error)
        stored = captured_traces[-1].data.spans[0]
        assert (stored.status.status_code, stored.status.description) == (SpanStatusCode.ERROR, description)
        assert [event.name for event in stored.events] == ["exception"]


def test_links_and_levels(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """Links are OpenTelemetry's or have its ids; what is none is left out with a warning; a level has a name."""
    with tracemw.start_span("first") as first:
        first.set_log_level("warning")
        with pytest.raises(TracemwError, match="log level 'LOUD' is none of DEBUG, INFO"):
            first.set_log_level("LOUD")
    theirs = trace_api.Link(first.otel_span.get_span_context(), {"kind": "follows"})

    @tracemw.trace(links=[theirs, "no link"], log_level=20, description="second")
    def second() -> None: ...

    second()
    tracemw.start_span_no_context("third", links=[first]).end()
    spans = [trace.data.spans[0] for trace in captured_traces]
    assert [span.log_level for span in spans] == [30, 20, None]
    assert spans[1].description == "second"
    assert [[(link.span_id, link.attributes) for link in span.links] for span in spans] == [
        [], [(first.span_id, {"kind": "follows"})], [(first.span_id, None)]
    ]  # fmt: skip
    assert "a link is left out: 'no link' is no link" in caplog.text


def test_ok_is_not_final(captured_traces: CapturedTraces) -> None:
    """An exception after `set_status("OK")` is an error all the same; OK takes back an error."""
    with pytest.raises(ValueError), tracemw.start_span("first") as span:
        span.set_status("OK")
        assert span.status.status_code == SpanStatusCode.OK
        raise ValueError
    with tracemw.start_span("second") as span:
        span.set_status("ERROR")
        span.set_status("OK")
    states = [trace.data.spans[0].status.status_code for trace in captured_traces]
    assert states == [SpanStatusCode.ERROR, SpanStatusCode.OK]


def test_a_live_span_cannot_be_copied() -> None:
    """Pickling and copying say what to do instead."""
    with capture_traces(), tracemw.start_span("span") as span:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="to_immutable_span"):
                attempt(span)
        with pytest.raises(TypeError, match="not subscriptable"):
            span["inputs"]
        with pytest.raises(TypeError, match="not iterable"):
            iter(span)


def test_misuse_of_a_live_span(captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture) -> None:
    """What is no event is refused; what are no attributes is left out with a warning; a second end, too."""
    with tracemw.start_span("span") as span:
        with pytest.raises(TracemwError, match="takes a SpanEvent, not str"):
            span.add_event("event")  # type: ignore[arg-type]
        span.set_attributes(["no", "dictionary"])  # type: ignore[arg-type]
        span.set_attribute("nothing", None)
        span.end()
        span.end()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "set_attributes takes a dictionary, not list; ignored",
        "span 'span' has ended already",
    ]
    assert len(captured_traces[0].data.spans) == 1


def test_where_nothing_is_recorded_the_span_does_nothing() -> None:
    """While tracing is off, a block gives a span with all methods and no effects."""
    with capture_traces(sample_rate=0.0) as traces, tracemw.start_span("span") as span:
        assert isinstance(span, NoOpSpan)
        span.set_inputs({})
        span.set_attributes({"a": 1})
        span.add_event(SpanEvent("e"))
        span.record_exception(ValueError())
        span.set_status("ERROR")
        span.end()
        assert (span.inputs, span.attributes, span.status, span.span_id) == (None, {}, None, None)
        assert span.trace_id == "MLFLOW_NO_OP_SPAN_TRACE_ID"
        assert tracemw.get_current_active_span() is None
        assert tracemw.get_active_trace_id() is None
    assert len(traces) == 0


# Without context


def test_spans_without_context(captured_traces: CapturedTraces) -> None:
    """They are never current; they end in any order; the trace is complete when the root has ended."""
    root = tracemw.start_span_no_context("root", inputs={"a": 1}, tags={"t": "1"}, metadata={"m": "2"})
    assert tracemw.get_current_active_span() is None
    child = tracemw.start_span_no_context("child", parent_span=root, span_type="TOOL")
    late = tracemw.start_span_no_context("late", parent_span=child)
    child.end(outputs=[1], attributes={"k": "v"})
    root.end(outputs={"b": 2})
    late.end(status="ERROR")
    assert tree(captured_traces) == {"root": None, "child": "root", "late": "child"}
    (trace,) = captured_traces
    assert (trace.info.tags["t"], trace.info.trace_metadata["m"]) == ("1", "2")
    assert (trace.info.request_preview, trace.info.response_preview) == ('{"a": 1}', '{"b": 2}')
    assert trace.info.state == "OK"


def test_a_span_without_context_is_below_what_is_current(captured_traces: CapturedTraces) -> None:
    """Without a parent it is a child of the current span, as in MLflow."""
    with tracemw.start_span("root"):
        tracemw.start_span_no_context("child").end()
    assert tree(captured_traces) == {"root": None, "child": "root"}


def test_times_can_be_given(captured_traces: CapturedTraces) -> None:
    """Begin and end are as told, where they are told."""
    span = tracemw.start_span_no_context("root", start_time_ns=1_000_000_000)
    span.end(end_time_ns=3_500_000_000)
    (trace,) = captured_traces
    assert (trace.info.request_time, trace.info.execution_duration) == (1_000, 2_500)
    assert trace.data.spans[0].end_time_ns == 3_500_000_000


# Badly nested, or ended elsewhere


def test_blocks_left_in_the_wrong_order(captured_traces: CapturedTraces) -> None:
    """Two blocks that overlap (in generators that take turns) leave nothing current behind them."""
    first, second = tracemw.start_span("first"), tracemw.start_span("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tracemw.get_current_active_span() is not None
    second.__exit__(None, None, None)
    assert tracemw.get_current_active_span() is None
    assert tree(captured_traces) == {"first": None, "second": "first"}


def test_a_block_left_in_another_context(
    captured_traces: CapturedTraces, caplog: pytest.LogCaptureFixture
) -> None:
    """A block entered in one copy of the context and left in another (as thread pools do) logs nothing."""
    block = tracemw.start_span("dependency")
    contextvars.copy_context().run(block.__enter__)
    with caplog.at_level(logging.DEBUG):
        contextvars.copy_context().run(block.__exit__, None, None, None)
    assert caplog.records == []
    assert tree(captured_traces) == {"dependency": None}


def test_a_child_that_comes_after_its_root(captured_traces: CapturedTraces) -> None:
    """A task that outlives the trace's root still records into the trace, whose duration stays."""

    async def main() -> None:
        gate = asyncio.Event()

        async def background() -> None:
            await gate.wait()
            with tracemw.start_span("late"):
                pass

        with tracemw.start_span("root"):
            task = asyncio.create_task(background())
        gate.set()
        await task

    asyncio.run(main())
    assert tree(captured_traces) == {"root": None, "late": "root"}
    (trace,) = captured_traces
    root = trace.data.spans[0]
    assert root.end_time_ns is not None
    assert trace.info.execution_duration == (root.end_time_ns - root.start_time_ns) // 1_000_000


# Among OpenTelemetry's spans


def test_ours_and_theirs_nest_both_ways(
    application: tuple[trace_api.Tracer, InMemorySpanExporter], captured_traces: CapturedTraces
) -> None:
    """Spans of the application's own tracer and ours are one tree, in our store and in their exporter."""
    tracer, exporter = application
    with tracemw.start_span("ours"):
        with tracer.start_as_current_span("theirs") as theirs:
            live = tracemw.get_current_active_span()
            assert isinstance(live, LiveSpan) and live.otel_span is theirs
            live.set_attribute("seen", True)
            with tracemw.start_span("inner"):
                pass
    assert tree(captured_traces) == {"ours": None, "theirs": "ours", "inner": "theirs"}
    exported = {span.name: span for span in exporter.get_finished_spans()}
    assert set(exported) == {"ours", "theirs", "inner"}
    assert exported["theirs"].attributes == {"seen": True}


def test_a_trace_of_ours_inside_a_span_of_theirs(
    application: tuple[trace_api.Tracer, InMemorySpanExporter], captured_traces: CapturedTraces
) -> None:
    """Under a span that the application made, ours begins our part of the same trace, with facts of its own."""
    tracer, exporter = application
    with tracer.start_as_current_span("job") as job:
        with tracemw.start_span("step"):
            tracemw.update_current_trace(tags={"t": "1"}, user="ada")
    (trace,) = captured_traces
    assert trace.trace_id == f"tr-{job.get_span_context().trace_id:032x}"
    assert tree(captured_traces) == {"step": "job", "job": None}  # theirs ends after ours, and completes the trace
    assert trace.info.tags["mlflow.traceName"] == "step"
    assert trace.data.spans[0].parent_id == f"{job.get_span_context().span_id:016x}"
    assert (trace.info.tags["t"], trace.info.trace_metadata["mlflow.trace.user"]) == ("1", "ada")
    step = next(span for span in exporter.get_finished_spans() if span.name == "step")
    assert step.attributes is not None and step.attributes["user.id"] == "ada"


def test_several_parts_of_one_trace_of_theirs(
    application: tuple[trace_api.Tracer, InMemorySpanExporter], captured_traces: CapturedTraces
) -> None:
    """Two calls under one span of the application are stored in one trace; a failure of either is the trace's."""
    tracer, _ = application
    with tracer.start_as_current_span("job"):
        with tracemw.start_span("first"):
            tracemw.update_current_trace(tags={"a": "1"})
        with pytest.raises(ValueError), tracemw.start_span("second"):
            tracemw.update_current_trace(tags={"b": "2"})
            raise ValueError
    (trace,) = captured_traces
    assert tree(captured_traces) == {"first": "job", "second": "job", "job": None}
    assert trace.info.tags.items() >= {"a": "1", "b": "2"}.items()
    assert trace.info.state == "ERROR"


def test_a_context_with_nothing_but_the_span(captured_traces: CapturedTraces) -> None:
    """Code that carries only the OpenTelemetry span to another place stays in the trace and reaches its facts."""
    with tracemw.start_span("root") as root:
        bare = trace_api.set_span_in_context(root.otel_span, otel_context.Context())

        def elsewhere() -> None:
            otel_context.attach(bare)
            with tracemw.start_span("child"):
                tracemw.update_current_trace(tags={"t": "1"})

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert tree(captured_traces) == {"root": None, "child": "root"}
    assert captured_traces[0].info.tags["t"] == "1"


def test_a_remote_caller_is_continued(captured_traces: CapturedTraces) -> None:
    """Below a remote span that the application has extracted, our root continues the caller's trace."""
    remote = trace_api.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace_api.TraceFlags(1))
    token = otel_context.attach(trace_api.set_span_in_context(trace_api.NonRecordingSpan(remote)))
    try:
        with tracemw.start_span("served"):
            pass
    finally:
        otel_context.detach(token)
    (trace,) = captured_traces
    assert trace.trace_id == f"tr-{0xABC:032x}"
    assert trace.data.spans[0].parent_id == f"{0xDEF:016x}"


def test_what_the_callers_sampling_leaves_out(captured_traces: CapturedTraces) -> None:
    """Below a remote span that is not sampled nothing is recorded, children included."""
    remote = trace_api.SpanContext(0xABC, 0xDEF, is_remote=True)
    token = otel_context.attach(trace_api.set_span_in_context(trace_api.NonRecordingSpan(remote)))
    try:
        with tracemw.start_span("served") as span, tracemw.start_span("child") as child:
            assert isinstance(span, NoOpSpan) and isinstance(child, NoOpSpan)
            assert trace_api.get_current_span().get_span_context().trace_id == 0xABC
    finally:
        otel_context.detach(token)
    assert len(captured_traces) == 0


def test_records_are_freed(captured_traces: CapturedTraces) -> None:
    """What is known of a trace is gone from memory once the trace is written and nobody holds it."""
    import gc

    from tracemw import record

    before = set(record._alive)
    for _ in range(50):
        with tracemw.start_span("root"), tracemw.start_span("child"):
            pass
    assert len(captured_traces) == 50
    gc.collect()
    assert not set(record._alive) - before
