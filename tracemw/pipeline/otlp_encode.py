"""Rows of the store -> OTLP protobuf.

Each trace becomes an `ExportTraceServiceRequest` of its own, as bytes. Protobuf messages of one kind may simply be
put one after the other, so a batch of traces is the concatenation of theirs: what a trace weighs is known before
it is sent, and a batch that was refused is split without encoding anything again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from tracemw.errors import TracemwError
from tracemw.pipeline.transport import Answer, Unavailable, printable
from tracemw.store.rows import SpanRow

Attributes = Mapping[str, Any]

MAX_DEPTH: Final = 16  # of nested values; protobuf's readers stop at 100 messages
_INT64: Final = 2**63
_UNWANTED: Final = re.compile("[\0\ud800-\udfff]")
_ESCAPED: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F]{2})")
_KINDS: Final = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}
_STATUS: Final = {"OK": 1, "ERROR": 2}


def clean(text: str) -> str:
    """Return the text with U+FFFD for NUL characters and lone surrogates: databases and UTF-8 do not take them."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNWANTED.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_json(text: str) -> str:
    """Return JSON text that has none of them as escapes either: the receiver may decode it."""
    if _ESCAPED.search(text) is None:
        return clean(text)
    try:
        return json.dumps(_clean_value(json.loads(text)), ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):  # no JSON after all
        return clean(text)


def _clean_value(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_value(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): _clean_value(item) for key, item in value.items()}
    return value


class Encoder:
    """Makes protobuf of spans.

    Raises:
        TracemwError: The package that has OTLP's messages is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
            from opentelemetry.proto.common.v1 import common_pb2
        except ImportError:
            raise TracemwError(
                "delivery needs OTLP's protobuf messages: pip install 'tracemw[otlp]' or 'tracemw[mlflow]'"
            ) from None
        self._request: Any = trace_service_pb2.ExportTraceServiceRequest
        self._response: Any = trace_service_pb2.ExportTraceServiceResponse
        self._value: Any = common_pb2.AnyValue

    def trace(
        self,
        spans: Iterable[SpanRow],
        resource: Attributes,
        attributes_of: Callable[[SpanRow], Attributes],
        status_of: Callable[[SpanRow], str] = lambda span: span.status,
    ) -> bytes:
        """Encode the spans of one trace.

        Args:
            spans: The spans.
            resource: Attributes of what made them.
            attributes_of: Gives a span's attributes as they are to be sent.
            status_of: Gives a span's status.

        Raises:
            ValueError: A span has no valid ids.
        """
        request = self._request()
        message = request.resource_spans.add()
        self._attributes(message.resource.attributes, resource)
        scopes: dict[str, Any] = {}
        for span in spans:
            scope = scopes.get(span.scope or "")
            if scope is None:
                scope = scopes[span.scope or ""] = message.scope_spans.add()
                scope.scope.name = clean(span.scope or "")
            self._span(scope.spans.add(), span, attributes_of(span), status_of(span))
        encoded: bytes = request.SerializeToString()
        return encoded

    def rejected(self, answer: Answer) -> tuple[int, str]:
        """Return how many spans a receiver says it did not keep, and why.

        Raises:
            Unavailable: No receiver of OTLP says this, but somebody between us and it: a page to log in at has
                status 200, too.
        """
        response = self._response()
        body = answer.body.strip()
        try:
            if body.startswith(b"{"):  # as JSON, which MLflow 3.4 calls protobuf
                return _rejected_of(json.loads(body))
            if "html" not in answer.header("Content-Type").lower():
                response.ParseFromString(answer.body)
                return response.partial_success.rejected_spans, printable(response.partial_success.error_message)
        except Exception:  # protobuf's own, or that of whoever made its parser
            pass
        raise Unavailable(f"spans: no receiver of OTLP answers so, HTTP {answer.status} {answer.text[:100]}")

    def _span(self, message: Any, span: SpanRow, attributes: Attributes, status: str) -> None:
        message.trace_id = _id(span.trace_id, 16)
        message.span_id = _id(span.span_id, 8)
        if span.parent_id:
            message.parent_span_id = _id(span.parent_id, 8)
        message.name = clean(span.name)
        message.kind = _KINDS.get(span.kind, 0)
        message.start_time_unix_nano = max(0, span.start_ns)
        message.end_time_unix_nano = max(0, span.start_ns, span.end_ns)
        code = _STATUS.get(status, 0)
        message.status.code = code
        if code == 2 and span.status_message:
            message.status.message = clean(span.status_message)
        self._attributes(message.attributes, attributes)
        for event in json.loads(span.events):
            added = message.events.add(name=clean(event["name"]), time_unix_nano=max(0, event["time_ns"]))
            self._attributes(added.attributes, event.get("attributes") or {})
        for link in json.loads(span.links):
            added = message.links.add(trace_id=_id(link["trace_id"], 16), span_id=_id(link["span_id"], 8))
            self._attributes(added.attributes, link.get("attributes") or {})

    def _attributes(self, messages: Any, attributes: Attributes) -> None:
        for key, value in attributes.items():
            if key:
                self._set(messages.add(key=clean(key)).value, value, 0)

    def _set(self, message: Any, value: Any, depth: int) -> None:
        if isinstance(value, str):
            message.string_value = clean(value)
        elif isinstance(value, bool):
            message.bool_value = value
        elif isinstance(value, int):
            if -_INT64 <= value < _INT64:
                message.int_value = value
            else:
                message.string_value = str(value)
        elif isinstance(value, float):
            message.double_value = value
        elif isinstance(value, (list, dict)) and depth >= MAX_DEPTH:
            message.string_value = clean(json.dumps(value))
        elif isinstance(value, list):
            message.array_value.SetInParent()
            for item in value:
                self._set(message.array_value.values.add(), item, depth + 1)
        elif isinstance(value, dict):
            message.kvlist_value.SetInParent()
            for key, item in value.items():
                self._set(message.kvlist_value.values.add(key=clean(key)).value, item, depth + 1)


def _rejected_of(answer: dict[str, Any]) -> tuple[int, str]:
    found = answer.get("partialSuccess") or {}
    return int(found.get("rejectedSpans") or 0), printable(str(found.get("errorMessage") or ""))


def _id(text: str, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size or not any(value):
        raise ValueError(f"{text!r} is no id of {size} bytes")
    return value
