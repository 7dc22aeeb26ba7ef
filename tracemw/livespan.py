"""`LiveSpan`: MLflow's methods on an OpenTelemetry span that is still open, ours or the application's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from opentelemetry.trace import Link as OTelLink
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from tracemw._span_entities import (
    REQUEST_ID,
    EntityError,
    Link,
    Span,
    SpanEvent,
    SpanLogLevel,
    SpanStatus,
    SpanStatusCode,
    decoded,
)
from tracemw.failure import EVENT, MESSAGE, TYPE, record_exception
from tracemw.runtime import encoded, encoded_attribute
from tracemw.scope import DESCRIPTION, INPUTS, LOG_LEVEL, OUTPUTS, SPAN_TYPE, end_span

if TYPE_CHECKING:
    from tracemw.record import TraceRecord
    from tracemw.scope import Scope

logger = logging.getLogger("tracemw")

NO_OP_TRACE_ID: Final = "MLFLOW_NO_OP_SPAN_TRACE_ID"  # MLflow's: programs compare with it


class LiveSpan(Span):
    """A span that is open: what it does can still be told.

    A thin wrapper: all that is set goes to the OpenTelemetry span at once. Two wrappers of one span are equal.

    Args:
        otel_span: A recording OpenTelemetry span.
        record: The record of its trace, None for a trace that we do not record.
        scope: The scope that it was begun with, if that was ours.
    """

    __slots__ = ("_span", "_record", "_scope", "_marked_ok")

    __setattr__ = object.__setattr__  # the plain value is frozen, this one is not
    __delattr__ = object.__delattr__

    def __init__(self, otel_span: Any, record: TraceRecord | None = None, scope: Scope | None = None) -> None:
        self._span = otel_span
        self._record = record  # held here: a trace whose spans are in no context lives as long as one of them
        self._scope = scope
        self._marked_ok = False

    # What it is

    @property
    def otel_span(self) -> Any:
        """The OpenTelemetry span."""
        return self._span

    @property
    def trace_id(self) -> str:
        """The id of the trace: `tr-` and 32 hexadecimal digits."""
        return f"tr-{self._span.get_span_context().trace_id:032x}"

    @property
    def span_id(self) -> str:
        """The id of the span: 16 hexadecimal digits."""
        return f"{self._span.get_span_context().span_id:016x}"

    @property
    def name(self) -> str:
        """The span's name."""
        return str(getattr(self._span, "name", ""))

    @property
    def original_name(self) -> str:
        """The span's name."""
        return self.name

    @property
    def parent_id(self) -> str | None:
        """The id of the parent span, None for a root."""
        parent = getattr(self._span, "parent", None)
        return None if parent is None else f"{parent.span_id:016x}"

    @property
    def start_time_ns(self) -> int:
        """When it began, in nanoseconds since the epoch."""
        return int(getattr(self._span, "start_time", None) or 0)

    @property
    def end_time_ns(self) -> int | None:
        """When it ended; None while it is open."""
        return getattr(self._span, "end_time", None)

    @property
    def status(self) -> SpanStatus:
        """The status as it is now."""
        status = getattr(self._span, "status", None)
        if status is None or status.status_code is StatusCode.UNSET:
            return SpanStatus(SpanStatusCode.OK if self._marked_ok else SpanStatusCode.UNSET)
        return SpanStatus(status.status_code.name, status.description or "")

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes, decoded."""
        raw: Mapping[str, Any] = getattr(self._span, "attributes", None) or {}
        return {REQUEST_ID: self.trace_id, **decoded(raw, self.scope)}

    @property
    def events(self) -> list[SpanEvent]:
        """The events so far."""
        return [
            SpanEvent(event.name, event.timestamp, dict(event.attributes or {}))
            for event in getattr(self._span, "events", None) or ()
        ]

    @property
    def links(self) -> list[Link]:
        """The links."""
        return [
            Link(
                f"tr-{link.context.trace_id:032x}",
                f"{link.context.span_id:016x}",
                dict(link.attributes or {}) or None,
            )
            for link in getattr(self._span, "links", None) or ()
        ]

    @property
    def kind(self) -> str:
        """OpenTelemetry's kind."""
        return str(getattr(getattr(self._span, "kind", None), "name", "INTERNAL"))

    @property
    def scope(self) -> str | None:
        """The name of the instrumentation that made it."""
        return getattr(getattr(self._span, "instrumentation_scope", None), "name", None)

    # What can be told of it

    def set_span_type(self, span_type: str) -> None:
        """Set the type, one of `SpanType` or a word of your own."""
        self.set_attribute(SPAN_TYPE, span_type)

    def set_description(self, description: str) -> None:
        """Describe the span for people."""
        self.set_attribute(DESCRIPTION, description)

    def set_log_level(self, level: int | str) -> None:
        """Set the level, a number or a name such as INFO."""
        self.set_attribute(LOG_LEVEL, int(log_level(level)))

    def set_inputs(self, inputs: Any) -> None:
        """Record the inputs, as they are at this moment."""
        text = encoded(inputs)
        self._span.set_attribute(INPUTS, text)
        if self._is_root():
            self._record.inputs = text  # type: ignore[union-attr]

    def set_outputs(self, outputs: Any) -> None:
        """Record the outputs, as they are at this moment."""
        text = encoded(outputs)
        self._span.set_attribute(OUTPUTS, text)
        if self._is_root():
            self._record.outputs = text  # type: ignore[union-attr]

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute of any value; what OpenTelemetry does not take is kept as JSON text."""
        key = str(key)
        if value is not None:
            self._span.set_attribute(key, encoded_attribute(key, value))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes; those that are there already are replaced."""
        if not isinstance(attributes, Mapping):
            logger.warning("set_attributes takes a dictionary, not %s; ignored", type(attributes).__name__)
            return
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_status(self, status: SpanStatus | SpanStatusCode | str) -> None:
        """Set the status: OK, ERROR or UNSET, or a `SpanStatus` with a description.

        Raises:
            EntityError: It is none of these.
        """
        status = status if isinstance(status, SpanStatus) else SpanStatus(status)
        has_failed = self.status.status_code is SpanStatusCode.ERROR
        self._marked_ok = status.status_code is SpanStatusCode.OK
        if status.status_code is SpanStatusCode.ERROR:
            self._span.set_status(Status(StatusCode.ERROR, status.description or None))
        elif self._marked_ok and has_failed:
            # Only here is OpenTelemetry's OK of use: nothing can follow it, so a later exception would not show.
            self._span.set_status(Status(StatusCode.OK))

    def add_event(self, event: SpanEvent) -> None:
        """Add an event.

        Raises:
            EntityError: It is no `SpanEvent`.
        """
        if not isinstance(event, SpanEvent):
            raise EntityError(
                f"add_event takes a SpanEvent, not {type(event).__name__}: "
                "SpanEvent(name, attributes={...}) makes one"
            )
        attributes = {
            str(key): encoded_attribute(str(key), value) for key, value in (event.attributes or {}).items()
        }
        self._span.add_event(event.name, attributes, event.timestamp)

    def record_exception(self, exception: BaseException | str) -> None:
        """Record an exception (or an error's text) as an event, and set the status to ERROR."""
        if isinstance(exception, BaseException):
            record_exception(self._span, exception)
        else:
            self._span.add_event(EVENT, {MESSAGE: str(exception), TYPE: "Exception"})
            self._span.set_status(Status(StatusCode.ERROR, f"Exception: {exception}"))

    def add_link(self, link: Any) -> None:
        """Add a link: to a span, an OpenTelemetry link, or an object with `trace_id`, `span_id`, `attributes`."""
        made = otel_link(link)
        self._span.add_link(made.context, made.attributes)

    def end(
        self,
        outputs: Any | None = None,
        attributes: Mapping[str, Any] | None = None,
        status: SpanStatus | SpanStatusCode | str | None = None,
        end_time_ns: int | None = None,
    ) -> None:
        """End the span. The root of a request takes note of what is given here; the middleware ends it.

        Args:
            outputs: Set as with `set_outputs`.
            attributes: Set as with `set_attributes`.
            status: Set as with `set_status`.
            end_time_ns: When it ended, if not now.
        """
        if not self._span.is_recording():
            logger.warning("span %r has ended already", self.name)
            return
        if outputs is not None:
            self.set_outputs(outputs)
        if attributes:
            self.set_attributes(attributes)
        if status is not None:
            self.set_status(status)
        if self._is_root() and self._record.is_request:  # type: ignore[union-attr]
            logger.warning("span %r is the root of a request and ends with it", self.name)
            return
        if end_time_ns is None and self._scope is not None:
            end_time_ns = self._scope.now_ns()
        end_span(self._span, self._record, end_time_ns)

    def to_immutable_span(self) -> Span:
        """Return the span as it is now, as a plain value."""
        return Span.from_otel(self._span)

    def to_dict(self) -> dict[str, Any]:
        """Return the span as it is now, as MLflow's dictionary."""
        return self.to_immutable_span().to_dict()

    def _is_root(self) -> bool:
        record = self._record
        return record is not None and record.root_span_id == self._span.get_span_context().span_id

    # What it is not

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LiveSpan) and other._span is self._span

    def __hash__(self) -> int:
        return hash(self._span)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a span that is open cannot be copied or pickled: use span.to_immutable_span()")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(2)


class NoOpSpan(LiveSpan):
    """Stands where nothing is recorded: has the methods of a span, and they do nothing."""

    __slots__ = ()

    def __init__(self, scope: Scope | None = None) -> None:
        super().__init__(None, None, scope)

    trace_id = property(lambda self: NO_OP_TRACE_ID)
    span_id = name = original_name = parent_id = property(lambda self: None)
    status = start_time_ns = end_time_ns = property(lambda self: None)
    attributes = property(lambda self: {})
    events = links = property(lambda self: [])
    span_type = property(lambda self: None)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    set_span_type = set_description = set_log_level = set_inputs = set_outputs = _nothing
    set_attribute = set_attributes = set_status = add_event = record_exception = _nothing
    add_link = end = _nothing
    to_immutable_span = _nothing  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return an empty dictionary."""
        return {}

    def __repr__(self) -> str:
        return "NoOpSpan()"


def log_level(level: int | str) -> SpanLogLevel:
    """Return a level by its number or its name.

    Raises:
        EntityError: There is no such level.
    """
    try:
        return SpanLogLevel[level.upper()] if isinstance(level, str) else SpanLogLevel(level)
    except (KeyError, ValueError):
        names = ", ".join(known.name for known in SpanLogLevel)
        raise EntityError(f"log level {level!r} is none of {names}") from None


def otel_link(link: Any) -> OTelLink:
    """Return an OpenTelemetry link.

    Raises:
        EntityError: It has no ids of a span.
    """
    if isinstance(link, OTelLink):
        return link
    try:
        trace_id, span_id = int(str(link.trace_id).removeprefix("tr-"), 16), int(str(link.span_id), 16)
        attributes: Mapping[Any, Any] = {} if isinstance(link, Span) else getattr(link, "attributes", None) or {}
    except (AttributeError, ValueError):
        raise EntityError(f"{link!r} is no link: it needs trace_id and span_id in hexadecimal digits") from None
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return OTelLink(context, {str(key): encoded_attribute(str(key), value) for key, value in attributes.items()})
