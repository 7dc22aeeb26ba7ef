"""What spans are made of, as plain values. Published by `tracemw.entities`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from tracemw.errors import TracemwError
from tracemw.failure import EVENT, exception_attributes


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


@dataclass(init=False)
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
