"""Spans as plain values, and what they are made of. Published by `tracemw.entities`."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Final, NoReturn

from tracemw.errors import TracemwError
from tracemw.failure import EVENT, exception_attributes

REQUEST_ID: Final = "mlflow.traceRequestId"
SPAN_TYPE: Final = "mlflow.spanType"
INPUTS: Final = "mlflow.spanInputs"
OUTPUTS: Final = "mlflow.spanOutputs"
OUR_SCOPE: Final = "tracemw"

# Neither success nor failure: such spans keep the status UNSET.
_ENDED_EARLY: Final = frozenset({"cancelled", "interrupted", "disconnected"})
_STATUS_PREFIX: Final = "STATUS_CODE_"


class EntityError(TracemwError, ValueError):
    """A value that an entity cannot have, or a dictionary or text that describes none."""


class SpanType:
    """The types of spans that MLflow knows; any other string is a type, too."""

    LLM = "LLM"
    CHAIN = "CHAIN"
    AGENT = "AGENT"
    TOOL = "TOOL"
    CHAT_MODEL = "CHAT_MODEL"
    RETRIEVER = "RETRIEVER"
    PARSER = "PARSER"
    EMBEDDING = "EMBEDDING"
    RERANKER = "RERANKER"
    MEMORY = "MEMORY"
    UNKNOWN = "UNKNOWN"
    WORKFLOW = "WORKFLOW"
    TASK = "TASK"
    GUARDRAIL = "GUARDRAIL"
    EVALUATOR = "EVALUATOR"


class SpanLogLevel(IntEnum):
    """How much a span matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40
    CRITICAL = 50


class SpanStatusCode(str, Enum):
    """How a span went; OpenTelemetry's codes."""

    UNSET = "UNSET"
    OK = "OK"
    ERROR = "ERROR"


@dataclass
class SpanStatus:
    """How a span went, and what went wrong.

    Args:
        status_code: A `SpanStatusCode` or its name.
        description: What went wrong.

    Raises:
        EntityError: There is no such code.
    """

    status_code: SpanStatusCode
    description: str = ""

    def __init__(self, status_code: SpanStatusCode | str, description: str = "") -> None:
        try:
            self.status_code = SpanStatusCode(status_code)
        except ValueError:
            raise EntityError(
                f"{status_code} is not a valid SpanStatusCode value: use UNSET, OK or ERROR."
            ) from None
        self.description = description


@dataclass
class SpanEvent:
    """Something that happened at one moment of a span.

    Args:
        name: What happened.
        timestamp: Nanoseconds since the epoch; now, if not given.
        attributes: Strings, numbers, booleans, or lists of one of them.
    """

    name: str
    timestamp: int = field(default_factory=time.time_ns)
    attributes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_exception(cls, exception: BaseException) -> SpanEvent:
        """The event that records an exception: its message, type and stack trace."""
        return cls(EVENT, attributes=dict(exception_attributes(exception)))

    def json(self) -> dict[str, Any]:
        """The event as a dictionary with its attributes as JSON text, None if it has none."""
        attributes = json.dumps(self.attributes, default=str) if self.attributes else None
        return {"name": self.name, "timestamp": self.timestamp, "attributes": attributes}


@dataclass
class Link:
    """A relation to a span of another trace.

    Args:
        trace_id: `tr-` and 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        attributes: What kind of relation it is.
    """

    trace_id: str
    span_id: str
    attributes: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The link as a dictionary."""
        return {"trace_id": self.trace_id, "span_id": self.span_id, "attributes": self.attributes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Link:
        """The link that `to_dict` wrote."""
        return cls(data["trace_id"], data["span_id"], data.get("attributes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span as it was recorded.

    Attributes:
        trace_id: `tr-` and 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        parent_id: The id of the parent span; None for a root.
        name: The name; `name_1`, `name_2` where several spans of the trace have the same one.
        original_name: The name without such a suffix, as the store and the search know it.
        start_time_ns: Nanoseconds since the epoch.
        end_time_ns: None while the span is open.
        status: OK where the span ended without an error; UNSET while it is open or if it was cancelled.
        attributes: All attributes, decoded from JSON where they were encoded.
        kind: OpenTelemetry's kind: INTERNAL, SERVER, CLIENT, PRODUCER or CONSUMER.
        scope: The name of the instrumentation that made the span.
    """

    trace_id: str
    span_id: str
    name: str
    start_time_ns: int
    parent_id: str | None = None
    original_name: str = ""
    end_time_ns: int | None = None
    status: SpanStatus = field(default_factory=lambda: SpanStatus(SpanStatusCode.UNSET))
    attributes: dict[str, Any] = field(default_factory=dict)
    events: list[SpanEvent] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    kind: str = field(default="INTERNAL", compare=False)
    scope: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "original_name", self.original_name or self.name)

    @property
    def request_id(self) -> str:
        """MLflow's older name of `trace_id`."""
        return self.trace_id

    @property
    def inputs(self) -> Any:
        """The inputs, decoded; None if none were recorded."""
        return self.attributes.get(INPUTS)

    @property
    def outputs(self) -> Any:
        """The outputs, decoded; None if none were recorded."""
        return self.attributes.get(OUTPUTS)

    @property
    def span_type(self) -> str:
        """One of `SpanType`, or a word of your own; UNKNOWN where nobody said."""
        return self.attributes.get(SPAN_TYPE) or SpanType.UNKNOWN

    @property
    def log_level(self) -> SpanLogLevel | None:
        """How much the span matters, if it was said."""
        level = self.attributes.get("mlflow.spanLogLevel")
        return SpanLogLevel(level) if level in list(SpanLogLevel) else None

    @property
    def description(self) -> str | None:
        """What the span is about, if it was said."""
        return self.attributes.get("mlflow.spanDescription")

    @property
    def model_name(self) -> str | None:
        """The language model that was called."""
        return self.attributes.get("mlflow.llm.model")

    @property
    def llm_cost(self) -> dict[str, float] | None:
        """What the call of a language model cost: `input_cost`, `output_cost`, `total_cost` in USD."""
        return self.attributes.get("mlflow.llm.cost")

    def get_attribute(self, key: str) -> Any:
        """An attribute, decoded; None if there is none."""
        return self.attributes.get(key)

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
    return base64.b64encode(bytes.fromhex(digits)).decode("ascii")


def _to_hex(text: str, length: int) -> str:
    """An id in hexadecimal digits, given so (perhaps with a prefix), or in base64."""
    digits = _PREFIX.sub("", text)
    if len(digits) != length:  # no id has as many digits in base64
        digits = base64.b64decode(text, validate=True).hex()
    if len(digits) != length:
        raise ValueError(f"{text!r} is no id of {length // 2} bytes")
    return f"{int(digits, 16):0{length}x}"


_PREFIX: Final = re.compile(r"(?:trace:/.*/|tr-|0x)")
