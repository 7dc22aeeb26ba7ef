"""Traces and spans as plain values, with MLflow's names, fields, aliases and dictionaries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracemw._span_entities import (
    EntityError,
    Link,
    Span,
    SpanEvent,
    SpanLogLevel,
    SpanStatus,
    SpanStatusCode,
    SpanType,
)
from tracemw._trace_info import (
    MlflowExperimentLocation,
    TraceInfo,
    TraceLocation,
    TraceLocationType,
    TraceState,
    TraceStatus,
)

if TYPE_CHECKING:
    from tracemw.store.rows import StoredTrace

__all__ = [
    "EntityError",
    "Link",
    "MlflowExperimentLocation",
    "Span",
    "SpanEvent",
    "SpanLogLevel",
    "SpanStatus",
    "SpanStatusCode",
    "SpanType",
    "Trace",
    "TraceData",
    "TraceInfo",
    "TraceLocation",
    "TraceLocationType",
    "TraceState",
    "TraceStatus",
]


@dataclass(init=False)
class TraceData:
    """The spans of a trace: the root first, then in order of their start."""

    spans: list[Span] = field(default_factory=list)

    def __init__(self, spans: list[Span] | None = None) -> None:
        self.spans = [] if spans is None else spans

    @property
    def request(self) -> str | None:
        """The root's inputs as JSON text; None if none were recorded."""
        return self._root_json("mlflow.spanInputs")

    @property
    def response(self) -> str | None:
        """The root's outputs as JSON text; None if none were recorded."""
        return self._root_json("mlflow.spanOutputs")

    @property
    def intermediate_outputs(self) -> dict[str, Any] | None:
        """The outputs of all spans below the root, by name; None where the root is alone."""
        if len(self.spans) < 2:
            return None
        return {span.name: span.outputs for span in self.spans if span.parent_id and span.outputs is not None}

    def to_dict(self) -> dict[str, Any]:
        """The spans as MLflow's dictionary."""
        return {"spans": [span.to_dict() for span in self.spans]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TraceData:
        """The spans that `to_dict` wrote.

        Raises:
            EntityError: One of them describes no span.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"TraceData.from_dict() expects a dictionary. Got: {type(data).__name__}")
        return cls([Span.from_dict(span) for span in data.get("spans", [])])

    def _root_json(self, key: str) -> str | None:
        if not self.spans:
            return None
        root = next((span for span in self.spans if span.parent_id is None), self.spans[0])
        if key not in root.attributes:
            return None
        return json.dumps(root.attributes[key], ensure_ascii=False, default=str)


@dataclass(repr=False)
class Trace:
    """A trace: what is known about it as a whole, and its spans."""

    info: TraceInfo
    data: TraceData

    @property
    def trace_id(self) -> str:
        """`tr-` and 32 hexadecimal digits."""
        return self.info.trace_id

    def __repr__(self) -> str:
        return f"Trace(trace_id={self.info.trace_id!r})"

    @classmethod
    def from_stored(cls, stored: StoredTrace, suffixes: bool = True) -> Trace:
        """A trace as the store returns it.

        Args:
            stored: The rows.
            suffixes: Name spans `name_1`, `name_2` where several of the trace have one name.
        """
        from tracemw._stored import info_of, spans_of

        spans = spans_of(stored, suffixes)
        return cls(info_of(stored.row, spans), TraceData(spans))

    def search_spans(
        self, span_type: str | None = None, name: str | re.Pattern[str] | None = None, span_id: str | None = None
    ) -> list[Span]:
        """The spans that have all that is given.

        Args:
            span_type: Their type.
            name: Their name, with or without the suffix that tells spans of one name apart; or a regular
                expression that is found in it.
            span_id: Their id.

        Raises:
            EntityError: An argument is of another type.
        """
        if not isinstance(name, (str, re.Pattern, type(None))):
            raise EntityError(f"Invalid type for 'name'. Expected str or re.Pattern. Got: {type(name)}")
        if not isinstance(span_type, (str, type(None))):
            raise EntityError(f"Invalid type for 'span_type'. Expected str. Got: {type(span_type)}")
        return [
            span
            for span in self.data.spans
            if (span_type is None or span.span_type == span_type)
            and (span_id is None or span.span_id == span_id)
            and _is_named(span, name)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The trace as MLflow's dictionary (version 3)."""
        return {"info": self.info.to_dict(), "data": self.data.to_dict()}

    def to_json(self, pretty: bool = False) -> str:
        """The trace as MLflow's JSON text, indented if `pretty`."""
        return json.dumps(self.to_dict(), indent=2 if pretty else None, default=str)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """The trace that `to_dict` wrote, of this library or of MLflow.

        Raises:
            EntityError: It describes no trace.
        """
        if data.get("info") is None or data.get("data") is None:
            raise EntityError(
                "Unable to parse Trace from dictionary. Expected keys: 'info' and 'data'. "
                f"Received keys: {list(data)}"
            )
        return cls(TraceInfo.from_dict(data["info"]), TraceData.from_dict(data["data"]))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace that `to_json` wrote.

        Raises:
            EntityError: It is no JSON text, or describes no trace.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise EntityError(f"Unable to parse trace JSON: {error}") from error
        return cls.from_dict(data)

    def to_pandas_dataframe_row(self) -> dict[str, Any]:
        """The trace as a row of the table that `search_traces` returns: one value per column."""
        info, data = self.info, self.data
        return {
            "trace_id": info.trace_id,
            "trace": self.to_json(),
            "client_request_id": info.client_request_id,
            "state": info.state,
            "request_time": info.request_time,
            "execution_duration": info.execution_duration,
            "request": None if data.request is None else json.loads(data.request),
            "response": None if data.response is None else json.loads(data.response),
            "trace_metadata": info.trace_metadata,
            "tags": info.tags,
            "spans": [span.to_dict() for span in data.spans],
            "assessments": info.assessments,
        }

    @staticmethod
    def pandas_dataframe_columns() -> list[str]:
        """The columns of that table."""
        return (
            "trace_id trace client_request_id state request_time execution_duration request response"
            " trace_metadata tags spans assessments"
        ).split()


def _is_named(span: Span, name: str | re.Pattern[str] | None) -> bool:
    if name is None:
        return True
    names = (span.name, span.original_name)
    return name in names if isinstance(name, str) else any(map(name.search, names))
