"""Spans of our own provider: made without the SDK's detours, and the SDK's in all else."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from tracemw import record
from tracemw.lightspan import LightSpan, LightTracer, light

LIMITS = SpanLimits(max_span_attributes=4, max_events=3, max_links=2, max_attribute_length=10)
REMOTE = SpanContext(1, 2, True, TraceFlags(TraceFlags.SAMPLED))


@pytest.fixture(autouse=True)
def _one_root_per_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test before this one had a trace with several roots: the process remembers, and takes the SDK's spans."""
    monkeypatch.setattr(record, "several", False)


class Collected(SpanProcessor):
    """Keeps what has ended."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


def tracers(limits: SpanLimits = LIMITS) -> tuple[Any, Any, Collected, Collected]:
    """The SDK's tracer, ours, and what each one's spans end up in."""
    found = []
    for _ in range(2):
        provider, collected = TracerProvider(span_limits=limits, shutdown_on_exit=False), Collected()
        provider.add_span_processor(collected)
        found.append((provider.get_tracer("tracemw"), collected))
    (theirs, their_spans), (plain, our_spans) = found
    ours = light(plain, random.Random(1).getrandbits, our_spans)
    assert type(ours) is LightTracer
    return theirs, ours, their_spans, our_spans


def told(span: Any) -> dict[str, Any]:
    """All that a span says of itself, but its ids."""
    found: dict[str, Any] = json.loads(span.to_json())
    for ids in (found["context"], *(link["context"] for link in found["links"])):
        ids.pop("trace_id"), ids.pop("span_id")
    dropped = (span.dropped_attributes, span.dropped_events, span.dropped_links)
    return {**found, "parent_id": found["parent_id"] is not None, "dropped": dropped}


def same(one: Any, other: Any) -> None:
    """Both say the same; traces' flags are of the SDK that made them."""
    mine, theirs = told(one), told(other)
    assert mine == theirs
    assert one.get_span_context().trace_flags == other.get_span_context().trace_flags
    assert one.instrumentation_scope == other.instrumentation_scope
    assert one.resource.attributes == other.resource.attributes


KEYS = st.sampled_from(["a", "b", "c", "d", "e", ""])
VALUES = st.integers(-9, 9) | st.text(max_size=20) | st.booleans() | st.lists(st.integers(0, 9), max_size=3)
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set_attribute"), KEYS, VALUES),
        st.tuples(st.just("set_attributes"), ATTRIBUTES),
        st.tuples(st.just("add_event"), st.text(max_size=5), ATTRIBUTES, st.integers(1, 9)),
        st.tuples(st.just("add_link"), st.just(REMOTE), ATTRIBUTES),
        st.tuples(st.just("update_name"), st.text(max_size=5)),
        st.tuples(st.just("set_status"), st.sampled_from(StatusCode), st.text(max_size=5)),
        st.tuples(st.just("end"), st.integers(200, 300)),
        st.tuples(st.just("is_recording")),
    ),
    max_size=8,
)


@given(STEPS, st.none() | ATTRIBUTES, st.booleans(), st.sampled_from(SpanKind))
def test_whatever_is_done_to_it_it_says_what_the_sdks_span_says(
    steps: list[tuple[Any, ...]], attributes: dict[str, Any] | None, linked: bool, kind: SpanKind
) -> None:
    """After any calls, also after its end, a span has the name, attributes, events, links, status and times
    that one of the SDK has, within the same limits."""
    theirs, ours, their_spans, our_spans = tracers()
    links = [Link(REMOTE, {"why": "because"})] * (3 if linked else 0)
    spans = [
        tracer.start_span("span", Context(), kind, attributes, list(links), 100) for tracer in (ours, theirs)
    ]
    for method, *arguments in (*steps, ("end", 400)):
        results = [getattr(span, method)(*arguments) for span in spans]
        assert results[0] == results[1]
        same(*spans)
    assert len(our_spans.spans) == 1
    same(our_spans.spans[0], their_spans.spans[-1])


def test_children() -> None:
    """A child has its parent's trace, flags and state; a root begins where the context has no span."""
    _, ours, _, spans = tracers()
    root = ours.start_span("root")
    assert isinstance(root, Span) and root.parent is None
    child = ours.start_span("child", trace_api.set_span_in_context(root))
    assert isinstance(child, LightSpan)
    assert child.parent == root.get_span_context()
    assert child.get_span_context().trace_id == root.get_span_context().trace_id
    assert child.get_span_context().span_id != root.get_span_context().span_id
    assert child.get_span_context().trace_flags == root.get_span_context().trace_flags
    with ours.start_as_current_span("current") as current:
        assert trace_api.get_current_span() is current
    assert [span.context for span in spans.spans] == [current.get_span_context()]


def test_exceptions_are_recorded_by_the_context_manager() -> None:
    """`with` records what the caller has asked for, as the SDK does."""
    theirs, ours, their_spans, our_spans = tracers(SpanLimits())
    for tracer in (theirs, ours):
        with pytest.raises(ValueError), tracer.start_as_current_span("span"):
            raise ValueError("no")
    assert [event.name for event in our_spans.spans[0].events] == ["exception"]
    assert our_spans.spans[0].status.description == their_spans.spans[0].status.description == "ValueError: no"


def test_what_is_not_sampled_is_the_sdks_matter() -> None:
    """Below a parent that is not sampled, or that has other flags than ours, the SDK decides."""
    _, ours, _, spans = tracers()
    unsampled = trace_api.set_span_in_context(NonRecordingSpan(SpanContext(1, 2, False)))
    assert not ours.start_span("span", unsampled).is_recording()
    other = trace_api.set_span_in_context(NonRecordingSpan(SpanContext(1, 2, True, TraceFlags(0x81))))
    span = ours.start_span("span", other)
    assert span.is_recording() and not isinstance(span, LightSpan)
    span.end()
    assert len(spans.spans) == 1


def test_it_ends_once() -> None:
    """Of many threads that end a span at the same time, one does."""
    _, ours, _, spans = tracers()
    for _ in range(50):
        span = ours.start_span("span", Context())
        barrier = threading.Barrier(4)

        def end(span: Any = span, barrier: Any = barrier) -> None:
            barrier.wait()
            span.end(7)

        threads = [threading.Thread(target=end) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(spans.spans) == 50
    assert {span.end_time for span in spans.spans} == {7}


def test_a_part_is_made_once() -> None:
    """Threads that use a part at the same time use the same one: no attribute is lost."""
    _, ours, _, _ = tracers(SpanLimits(max_span_attributes=1000))
    for _ in range(20):
        span = ours.start_span("span", Context())
        barrier = threading.Barrier(4)

        def put(number: int, span: Any = span, barrier: Any = barrier) -> None:
            barrier.wait()
            span.set_attribute(f"key{number}", number)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert dict(span.attributes) == {f"key{number}": number for number in range(4)}


def test_another_processor_is_told() -> None:
    """A provider that gets a second processor makes the SDK's spans from then on: all processors see them."""
    provider, first, second = TracerProvider(shutdown_on_exit=False), Collected(), Collected()
    provider.add_span_processor(first)
    tracer = light(provider.get_tracer("tracemw"), random.Random(1).getrandbits, first)
    tracer.start_span("before", Context()).end()
    provider.add_span_processor(second)
    tracer.start_span("after", Context()).end()
    assert [span.name for span in first.spans] == ["before", "after"]
    assert [span.name for span in second.spans] == ["after"]


def test_an_sdk_that_we_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the SDK's spans have parts that ours have not, or there is no SDK's tracer, spans stay the SDK's."""
    provider, collected = TracerProvider(shutdown_on_exit=False), Collected()
    tracer = provider.get_tracer("tracemw")
    begin = Span.__init__

    def with_another_part(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._invented = 1

    monkeypatch.setattr(Span, "__init__", with_another_part)
    assert light(tracer, random.Random(1).getrandbits, collected) is tracer
    nothing = trace_api.NoOpTracer()
    assert light(nothing, random.Random(1).getrandbits, collected) is nothing


def test_what_a_span_does_not_have() -> None:
    """An attribute that no span has is an AttributeError that names it."""
    _, ours, _, _ = tracers()
    with pytest.raises(AttributeError, match="'LightSpan' object has no attribute 'colour'"):
        _ = ours.start_span("span", Context()).colour


def test_a_change_at_the_moment_of_the_end() -> None:
    """Who sets an attribute while another thread ends the span gets no error, whether it was in time or not."""
    _, ours, _, spans = tracers(SpanLimits())
    errors: list[BaseException] = []

    def put(span: Any, started: threading.Event) -> None:
        try:
            while span.is_recording():
                span.set_attribute("key", 1)
                started.set()
        except BaseException as exc:
            errors.append(exc)

    for _ in range(50):
        span, started = ours.start_span("span", Context()), threading.Event()
        thread = threading.Thread(target=put, args=(span, started))
        thread.start()
        assert started.wait(10)
        span.end()
        thread.join(10)
    assert errors == []
    assert all(dict(span.attributes or {}) == {"key": 1} for span in spans.spans)
