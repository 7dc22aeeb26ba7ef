"""Rows as OTLP: what is encoded is what was stored, cleaned of what no receiver takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.delivery.rows import span_row, trace_row
from tracemw.pipeline.otlp_encode import MAX_DEPTH, Encoder, clean, clean_json
from tracemw.store import SpanRow

TEXT = st.text(st.characters() | st.sampled_from("\0\ud800\udfff\\u0"), max_size=30)
PLAIN = TEXT | st.booleans() | st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def encoded(span: SpanRow, attributes: dict[str, Any], resource: dict[str, Any] | None = None) -> Any:
    """The protobuf of one span, decoded by OpenTelemetry's own messages."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(Encoder().trace([span], resource or {}, lambda _: attributes))
    return request.resource_spans[0]


def decoded(value: Any) -> Any:
    """What an `AnyValue` holds."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [decoded(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {item.key: decoded(item.value) for item in value.kvlist_value.values}
    return getattr(value, kind) if kind else None


def cleaned(value: Any) -> Any:
    """What is expected of a value."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return {clean(key): cleaned(item) for key, item in value.items()} if isinstance(value, dict) else value


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_attributes_of_any_kind_arrive(attributes: dict[str, Any]) -> None:
    """Types are kept; text loses NULs and surrogates, integers beyond 64 bits become text."""
    found = encoded(span_row(trace_row(1), 1), attributes).scope_spans[0].spans[0].attributes
    expected = [(clean(key), cleaned(value)) for key, value in attributes.items() if key]
    assert [(item.key, decoded(item.value)) for item in found] == expected


def test_values_nested_too_deep_become_text() -> None:
    """Receivers stop at a depth of their own."""
    value: Any = "leaf"
    for _ in range(200):
        value = [value]
    found: Any = encoded(span_row(trace_row(1), 1), {"deep": value})
    found = decoded(found.scope_spans[0].spans[0].attributes[0].value)
    for _ in range(MAX_DEPTH):
        found = found[0]
    assert isinstance(found, str) and "leaf" in found


def test_a_span_is_encoded_whole() -> None:
    """Ids, times, kind, status, events, links, scope and resource."""
    trace = trace_row(7)
    span = span_row(
        trace, 2,
        kind="CLIENT", status="ERROR", status_message="boom", scope="lib",
        events=[{"name": "exception", "time_ns": 5, "attributes": {"exception.type": "ValueError"}}],
        links=json.dumps([{"trace_id": "a" * 32, "span_id": "b" * 16, "attributes": {"why": "x"}}]),
    )  # fmt: skip
    found = encoded(span, {"a": 1}, {"service.name": "shop"})
    assert [(item.key, decoded(item.value)) for item in found.resource.attributes] == [("service.name", "shop")]
    assert found.scope_spans[0].scope.name == "lib"
    message = found.scope_spans[0].spans[0]
    assert message.trace_id.hex() == trace.trace_id
    assert (message.span_id.hex(), message.parent_span_id.hex()) == (span.span_id, span.parent_id)
    assert (message.start_time_unix_nano, message.end_time_unix_nano) == (span.start_ns, span.end_ns)
    assert (message.kind, message.status.code, message.status.message) == (3, 2, "boom")
    assert (message.events[0].name, message.events[0].time_unix_nano) == ("exception", 5)
    assert decoded(message.events[0].attributes[0].value) == "ValueError"
    assert (message.links[0].trace_id.hex(), message.links[0].span_id.hex()) == ("a" * 32, "b" * 16)


def test_requests_may_be_concatenated() -> None:
    """The bytes of several traces, one after the other, are one request with all of them."""
    rows = [trace_row(number) for number in range(3)]
    encoder = Encoder()
    body = b"".join(encoder.trace([span_row(row, 1)], {}, lambda span: {}) for row in rows)
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    found = [resource.scope_spans[0].spans[0].trace_id.hex() for resource in request.resource_spans]
    assert found == [row.trace_id for row in rows]


@pytest.mark.parametrize("trace_id", ["", "0" * 32, "abc", "z" * 32])
def test_ids_that_are_none_are_refused_here(trace_id: str) -> None:
    """One such span would have the whole batch refused."""
    with pytest.raises(ValueError):
        encoded(span_row(trace_row(1), 1, trace_id=trace_id), {})


def test_times_that_protobuf_cannot_hold() -> None:
    """A negative start becomes 0, and no span ends before it begins."""
    message = encoded(span_row(trace_row(1), 1, start_ns=-5, end_ns=-9), {}).scope_spans[0].spans[0]
    assert (message.start_time_unix_nano, message.end_time_unix_nano) == (0, 0)


@given(VALUES)
def test_json_text_is_cleaned_inside(value: Any) -> None:
    """What JSON text stands for has no NUL or lone surrogate; the rest is untouched."""
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        found = json.loads(clean_json(text))
        assert json.dumps(found, sort_keys=True) == json.dumps(cleaned_json(value), sort_keys=True)


def cleaned_json(value: Any) -> Any:
    """Like `cleaned`, with integers of any size."""
    return value if isinstance(value, int) else cleaned(value) if not isinstance(value, (list, dict)) else (
        [cleaned_json(item) for item in value]
        if isinstance(value, list)
        else {clean(key): cleaned_json(item) for key, item in value.items()}
    )  # fmt: skip


@pytest.mark.parametrize("text", ['{"a": "\\u0000', '"C:\\\\u0000"', "[1, 2]", "plain \\u0000 text"])
def test_other_text_stays_as_it_is(text: str) -> None:
    """Escaped backslashes are no escapes of NUL, and what is no JSON is no business of ours."""
    assert clean_json(text) == text
