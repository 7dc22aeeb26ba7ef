"""A span as a plain value. Published by `tracemw.entities`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from tracemw._span_parts import (
    EntityError,
    Link,
    SpanEvent,
    SpanLogLevel,
    SpanStatus,
    SpanStatusCode,
    SpanType,
)

__all__ = [
    "EntityError",
    "Link",
    "Span",
    "SpanEvent",
    "SpanLogLevel",
    "SpanStatus",
    "SpanStatusCode",
    "SpanType",
]

REQUEST_ID: Final = "mlflow.traceRequestId"
SPAN_TYPE: Final = "mlflow.spanType"
INPUTS: Final = "mlflow.spanInputs"
OUTPUTS: Final = "mlflow.spanOutputs"
OUR_SCOPE: Final = "tracemw"

# Neither success nor failure: such spans keep the status UNSET.
_ENDED_EARLY: Final = frozenset({"cancelled", "interrupted", "disconnected"})
_STATUS_PREFIX: Final = "STATUS_CODE_"


class Span:
    """A span as it was recorded: it does not change, can be copied and compared, and is no dictionary.

    `LiveSpan` is a span, too: what is said here of attributes and dictionaries holds for it by the same code.
    """

    __slots__ = ("_facts", "__weakref__")

    def __init__(
        self,
        *,
        trace_id: str,
        span_id: str,
        name: str,
        start_time_ns: int,
        parent_id: str | None = None,
        original_name: str = "",
        end_time_ns: int | None = None,
        status: SpanStatus | None = None,
        attributes: dict[str, Any] | None = None,
        events: list[SpanEvent] | None = None,
        links: list[Link] | None = None,
        kind: str = "INTERNAL",
        scope: str | None = None,
    ) -> None:
        self._facts: dict[str, Any] = {
            "trace_id": trace_id,
            "span_id": span_id,
            "parent_id": parent_id,
            "name": name,
            "original_name": original_name or name,
            "start_time_ns": start_time_ns,
            "end_time_ns": end_time_ns,
            "status": SpanStatus(SpanStatusCode.UNSET) if status is None else status,
            "attributes": attributes or {},
            "events": events or [],
            "links": links or [],
            "kind": kind,
            "scope": scope,
        }

    @property
    def trace_id(self) -> str:
        """`tr-` and 32 hexadecimal digits."""
        return self._facts["trace_id"]  # type: ignore[no-any-return]

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        return self._facts["span_id"]  # type: ignore[no-any-return]

    @property
    def parent_id(self) -> str | None:
        """The id of the parent span; None for a root."""
        return self._facts["parent_id"]  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """The name; `name_1`, `name_2` where several spans of the trace have the same one."""
        return self._facts["name"]  # type: ignore[no-any-return]

    @property
    def original_name(self) -> str:
        """The name without such a suffix, as the store and the search know it."""
        return self._facts["original_name"]  # type: ignore[no-any-return]

    @property
    def start_time_ns(self) -> int:
        """When it began, in nanoseconds since the epoch."""
        return self._facts["start_time_ns"]  # type: ignore[no-any-return]

    @property
    def end_time_ns(self) -> int | None:
        """When it ended; None while it is open."""
        return self._facts["end_time_ns"]  # type: ignore[no-any-return]

    @property
    def status(self) -> SpanStatus:
        """OK where it ended without an error; UNSET while it is open or if it was cancelled."""
        return self._facts["status"]  # type: ignore[no-any-return]

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes, decoded from JSON where they were encoded."""
        return dict(self._facts["attributes"])

    @property
    def events(self) -> list[SpanEvent]:
        """What happened at one moment each."""
        return list(self._facts["events"])

    @property
    def links(self) -> list[Link]:
        """Relations to spans of other traces."""
        return list(self._facts["links"])

    @property
    def kind(self) -> str:
        """OpenTelemetry's kind: INTERNAL, SERVER, CLIENT, PRODUCER or CONSUMER."""
        return self._facts["kind"]  # type: ignore[no-any-return]

    @property
    def scope(self) -> str | None:
        """The name of the instrumentation that made it."""
        return self._facts["scope"]  # type: ignore[no-any-return]

    @property
    def request_id(self) -> str:
        """MLflow's older name of `trace_id`."""
        return self.trace_id

    @property
    def inputs(self) -> Any:
        """The inputs, decoded; None if none were recorded."""
        return self.get_attribute(INPUTS)

    @property
    def outputs(self) -> Any:
        """The outputs, decoded; None if none were recorded."""
        return self.get_attribute(OUTPUTS)

    @property
    def span_type(self) -> str:
        """One of `SpanType`, or a word of your own; UNKNOWN where nobody said."""
        return self.get_attribute(SPAN_TYPE) or SpanType.UNKNOWN

    @property
    def log_level(self) -> SpanLogLevel | None:
        """How much the span matters, if it was said."""
        level = self.get_attribute("mlflow.spanLogLevel")
        return SpanLogLevel(level) if level in list(SpanLogLevel) else None

    @property
    def description(self) -> str | None:
        """What the span is about, if it was said."""
        return self.get_attribute("mlflow.spanDescription")  # type: ignore[no-any-return]

    @property
    def model_name(self) -> str | None:
        """The language model that was called."""
        return self.get_attribute("mlflow.llm.model")  # type: ignore[no-any-return]

    @property
    def llm_cost(self) -> dict[str, float] | None:
        """What the call of a language model cost: `input_cost`, `output_cost`, `total_cost` in USD."""
        return self.get_attribute("mlflow.llm.cost")  # type: ignore[no-any-return]

    def get_attribute(self, key: str) -> Any:
        """An attribute, decoded; None if there is none."""
        return self.attributes.get(key)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Span) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        return Span.from_dict, (self.to_dict(),)

    def __hash__(self) -> int:
        return hash((self.trace_id, self.span_id))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, trace_id={self.trace_id!r}, "
            f"span_id={self.span_id!r}, parent_id={self.parent_id!r})"
        )

    def __getitem__(self, key: object) -> NoReturn:
        hint = ""
        if isinstance(key, str) and key in self.attributes:
            hint = f" To access span attributes, use `span.get_attribute({key!r})`."
        elif isinstance(key, str) and key.isidentifier() and hasattr(type(self), key):
            hint = f" Use attribute access instead, e.g. `span.{key}`."
        raise TypeError(f"{type(self).__name__!r} object is not subscriptable.{hint or _HINT}")

    def __iter__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__!r} object is not iterable.{_HINT}")

    def to_dict(self) -> dict[str, Any]:
        """The span as MLflow's dictionary (version 3): ids in base64, every attribute as JSON text.

        The keys `original_name`, `kind` and `scope` are added where they say something more.
        """
        attributes = {REQUEST_ID: self.trace_id, **self.attributes}
        known: dict[str, Any] = {
            "trace_id": _to_base64(self.trace_id.removeprefix("tr-")),
            "span_id": _to_base64(self.span_id),
            "parent_span_id": _to_base64(self.parent_id) if self.parent_id else None,
            "name": self.name,
            "start_time_unix_nano": self.start_time_ns,
            "end_time_unix_nano": self.end_time_ns,
            "events": [
                {"name": event.name, "time_unix_nano": event.timestamp, "attributes": event.attributes}
                for event in self.events
            ],
            "status": {
                "code": f"{_STATUS_PREFIX}{self.status.status_code.value}",
                "message": self.status.description,
            },
            "attributes": {key: _encoded(value) for key, value in attributes.items()},
            "links": [link.to_dict() for link in self.links],
        }
        if self.original_name != self.name:
            known["original_name"] = self.original_name
        if self.kind != "INTERNAL":
            known["kind"] = self.kind
        if self.scope not in (None, OUR_SCOPE):
            known["scope"] = self.scope
        return known

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Span:
        """The span that `to_dict` wrote, of this library or of any MLflow 3 or 2.

        Raises:
            EntityError: It describes no span.
        """
        try:
            return cls.from_dict_v2(data) if "context" in data else cls._from_dict_v3(data)
        except Exception as error:
            raise EntityError(
                f"Failed to create a Span object from the given dictionary: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _from_dict_v3(cls, data: Mapping[str, Any]) -> Span:
        end, status = data.get("end_time_unix_nano"), data["status"]
        return cls(
            trace_id=f"tr-{_to_hex(data['trace_id'], 32)}",
            span_id=_to_hex(data["span_id"], 16),
            parent_id=_to_hex(data["parent_span_id"], 16) if data.get("parent_span_id") else None,
            name=data["name"],
            original_name=data.get("original_name", ""),
            start_time_ns=int(data["start_time_unix_nano"]),
            end_time_ns=int(end) if end else None,
            status=SpanStatus(status["code"].removeprefix(_STATUS_PREFIX), status.get("message") or ""),
            attributes={key: loaded(value) for key, value in data["attributes"].items()},
            events=[
                SpanEvent(event["name"], int(event["time_unix_nano"]), dict(event.get("attributes") or {}))
                for event in data.get("events") or ()
            ],
            links=[Link.from_dict(link) for link in data.get("links") or ()],
            kind=data.get("kind", "INTERNAL"),
            scope=data.get("scope"),
        )

    @classmethod
    def from_dict_v2(cls, data: Mapping[str, Any]) -> Span:
        """The span of the dictionary that MLflow 2 wrote."""
        parent = data.get("parent_id")
        return cls(
            trace_id=f"tr-{_to_hex(data['context']['trace_id'], 32)}",
            span_id=_to_hex(data["context"]["span_id"], 16),
            parent_id=_to_hex(parent, 16) if parent else None,
            name=data["name"],
            start_time_ns=data["start_time"],
            end_time_ns=data["end_time"],
            status=SpanStatus(data["status_code"], data.get("status_message") or ""),
            attributes={key: loaded(value) for key, value in data["attributes"].items()},
            events=[
                SpanEvent(event["name"], event["timestamp"], dict(event.get("attributes") or {}))
                for event in data.get("events") or ()
            ],
            links=[Link.from_dict(link) for link in data.get("links") or ()],
        )

    @classmethod
    def from_otel(cls, span: Any) -> Span:
        """An OpenTelemetry SDK span, open or ended, as it is now."""
        context, parent, scope = span.get_span_context(), span.parent, span.instrumentation_scope
        trace_id, attributes = f"tr-{context.trace_id:032x}", span.attributes or {}
        scope_name = scope.name if scope else None
        return cls(
            trace_id=trace_id,
            span_id=f"{context.span_id:016x}",
            parent_id=f"{parent.span_id:016x}" if parent else None,
            name=span.name,
            start_time_ns=span.start_time or 0,
            end_time_ns=span.end_time,
            status=shown_status(
                span.status.status_code.name,
                span.status.description,
                span.end_time,
                attributes.get("tracemw.outcome"),
            ),
            attributes={REQUEST_ID: trace_id, **decoded(attributes, scope_name)},
            events=[SpanEvent(event.name, event.timestamp, dict(event.attributes or {})) for event in span.events],
            links=[
                Link(f"tr-{to.trace_id:032x}", f"{to.span_id:016x}", dict(link.attributes or {}) or None)
                for link in span.links
                for to in (link.context,)
            ],
            kind=span.kind.name,
            scope=scope_name,
        )


_HINT: Final = " Use attribute access instead, e.g. `span.inputs`, `span.outputs` or `span.attributes`."


def shown_status(code: str, message: str | None, end: int | None, outcome: object) -> SpanStatus:
    """The status as entities show it: a span that ended without an error is OK, unless it was cut short."""
    if code == "UNSET" and end and outcome not in _ENDED_EARLY:
        code = "OK"
    return SpanStatus(code, message or "")


def decoded(attributes: Mapping[str, Any], scope: str | None) -> dict[str, Any]:
    """OpenTelemetry attributes as values: MLflow's keys hold JSON text, and in our own spans so do objects."""
    ours = scope == OUR_SCOPE or SPAN_TYPE in attributes
    values: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, str):
            if key.startswith("mlflow.") or (ours and value[:1] in ("{", "[")):
                value = loaded(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[key] = value
    return values


def loaded(value: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _encoded(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _to_base64(digits: str) -> str:
    import base64

    return base64.b64encode(bytes.fromhex(digits)).decode("ascii")


def _to_hex(text: str, length: int) -> str:
    """An id in hexadecimal digits, given so (perhaps with a prefix), or in base64."""
    import base64

    digits = re.sub(_PREFIX, "", text)
    if len(digits) != length:  # no id has as many digits in base64
        digits = base64.b64decode(text, validate=True).hex()
    if len(digits) != length:
        raise ValueError(f"{text!r} is no id of {length // 2} bytes")
    return f"{int(digits, 16):0{length}x}"


_PREFIX: Final = r"\A(?:trace:/.*/|tr-|0x)"
