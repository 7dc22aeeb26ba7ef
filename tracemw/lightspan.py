"""Spans of our own provider: the SDK's class, made and ended without the SDK's detours.

`Tracer.start_span` asks a sampler, counts for metrics, makes two locks, bounded attributes, events and links for
every span, and `Span.end` makes a copy of it all, for processors that may be many. Our own provider has one, ours,
and samples what begins with it. So a span's parts are made when they are first used, and it is handed to the
processor itself. In all else it is an `opentelemetry.sdk.trace.Span`, with the same limits.

What is used of the SDK and not documented: the names of a span's parts. `light` compares them with those of a span
that the SDK has made; where they differ, spans are the SDK's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import time_ns
from types import MappingProxyType
from typing import Any, Final

from opentelemetry import trace as trace_api
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanProcessor, Tracer
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes

from tracemw import record as records

# Newer SDKs say of an id that it is random, which ours are.
_FLAGS: Final = TraceFlags(TraceFlags.SAMPLED | getattr(TraceFlags, "RANDOM_TRACE_ID", 0))

_NO_ATTRIBUTES: Final[Attributes] = MappingProxyType({})

_new: Any = object.__new__  # and not `LightSpan()`: the SDK's constructor makes what we leave out


class LightSpan(Span):
    """A span whose parts are made when they are first used; each tracer's subclass has what its spans share."""

    # What a span begins with; an instance has its own value only where that differs.
    _kind = SpanKind.INTERNAL
    _parent: SpanContext | None = None
    _end_time: int | None = None
    _status = Status(StatusCode.UNSET)
    _sampler = None
    _trace_config = None
    _record_exception = False
    _set_status_on_exception = False
    _record_end_metrics = None
    _begun_with: Attributes = None
    _linked: Sequence[Link] = ()
    _used = False  # a part was made
    _on_end: Callable[[ReadableSpan], None]
    _open: bool  # there until it ends

    def __getattr__(self, name: str) -> Any:
        """Make a part, once, whichever thread comes first."""
        make = _PARTS.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._used = True
        return self.__dict__.setdefault(name, make(self))

    def get_span_context(self) -> SpanContext:
        """Return the ids."""
        return self._context  # type: ignore[return-value]

    # Most spans end with some part never used: who looks at it then need not have it made. Nor does anything here
    # ask for `__dict__`, which Python makes when it is asked for: what waits for the writer is what the garbage
    # collector counts, and each of its rounds keeps a request waiting.

    @property
    def attributes(self) -> Attributes:
        """The attributes, as they are now."""
        if not self._begun_with and not (self._used and "_attributes" in self.__dict__):
            return _NO_ATTRIBUTES
        return super().attributes

    @property
    def events(self) -> Sequence[Event]:
        """The events, in their order."""
        return super().events if self._used and "_events" in self.__dict__ else ()

    @property
    def links(self) -> Sequence[Link]:
        """The links, in their order."""
        return super().links if self._linked or (self._used and "_links" in self.__dict__) else ()

    def end(self, end_time: int | None = None) -> None:
        """End the span, once, and hand it to our processor."""
        try:
            del self._open  # only one thread can
        except AttributeError:
            super().end(end_time)  # warns
            return
        # Neither locked nor frozen: whatever changes a span looks at its end first, and who
        # does that at this very moment gets no error.
        self._end_time = time_ns() if end_time is None else end_time
        self._on_end(self)


def _bounded_attributes(span: Any) -> BoundedAttributes:
    limits, given = span._limits, span._begun_with
    most, longest = limits.max_span_attributes, limits.max_span_attribute_length
    plain = given and longest is None and (most is None or len(given) <= most) and _are_texts(given)
    made = BoundedAttributes(most, None if plain else given, immutable=False, max_value_len=longest)
    if plain:  # there is nothing to clean
        made._dict.update(given)
    return made


def _are_texts(given: Any) -> bool:
    return all(type(value) is str and key and type(key) is str for key, value in given.items())


_PARTS: Final[dict[str, Callable[[Any], Any]]] = {
    "_lock": lambda span: threading.Lock(),
    "_attributes": _bounded_attributes,
    "_events": lambda span: span._new_events(),
    "_links": lambda span: span._new_links(span._linked),
}
_SHARED: Final = {"_resource", "_limits", "_span_processor", "_instrumentation_info", "_instrumentation_scope"}
_OWN: Final = {"_name", "_context", "_start_time"}


class LightTracer(Tracer):
    """Makes light spans; what is not sampled, or has a parent from elsewhere, the SDK makes.

    Args:
        tracer: The SDK's tracer of our own provider.
        random_bits: Gives as many random bits as it is asked for.
        processor: Gets every span that has ended; and that has begun, where a trace has several roots here.
    """

    def __init__(self, tracer: Tracer, random_bits: Callable[[int], int], processor: SpanProcessor) -> None:
        vars(self).update(vars(tracer))
        self._bits = random_bits
        self._on_start = processor.on_start
        self._alone = tracer.span_processor._span_processors
        ends = {"_on_end": staticmethod(processor.on_end)}
        self._class = type("LightSpan", (LightSpan,), {**ends, **_shared(tracer)})

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = (),
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace_api.Span:
        """Begin a span."""
        ids = self._ids(context)
        if ids is None or self.span_processor._span_processors is not self._alone:
            return super().start_span(
                name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
            )
        span = _new(self._class)
        span._context, parent = ids
        span._name = name
        span._kind = kind
        span._start_time = time_ns() if start_time is None else start_time
        span._open = True
        if parent is not None:
            span._parent = parent
        if attributes:
            span._begun_with = attributes
        if links:
            span._linked = links
        if record_exception:
            span._record_exception = True
        if set_status_on_exception:
            span._set_status_on_exception = True
        if records.several:
            self._on_start(span, context)
        return span  # type: ignore[no-any-return]

    def _ids(self, context: Context | None) -> tuple[SpanContext, SpanContext | None] | None:
        """Return the ids of a new span and its parent's; None where the SDK has to decide."""
        bits = self._bits
        if context or context is None:
            parent = trace_api.get_current_span(context).get_span_context()
            if parent.is_valid:
                if parent.trace_flags != _FLAGS:
                    return None
                return SpanContext(parent.trace_id, bits(64) or 1, False, _FLAGS, parent.trace_state), parent
        return SpanContext(bits(128) or 1, bits(64) or 1, False, _FLAGS), None


def light(tracer: Any, random_bits: Callable[[int], int], processor: SpanProcessor) -> Any:
    """Return a tracer that makes light spans, or the one given where its SDK is not as we know it.

    Args:
        tracer: Of a provider that samples all roots, and has one processor.
        random_bits: Gives as many random bits as it is asked for.
        processor: That one.
    """
    try:
        made = LightTracer(tracer, random_bits, processor)
        theirs = vars(tracer.start_span("a span to compare with", Context()))
        ours = made.start_span("a span to compare with", Context())
        known = _PARTS.keys() | _SHARED | _OWN | vars(LightSpan).keys()
        return made if theirs.keys() <= known and all(hasattr(ours, name) for name in theirs) else tracer
    except Exception:  # no SDK's tracer (OTEL_SDK_DISABLED), or another SDK
        return tracer


def _shared(tracer: Tracer) -> dict[str, Any]:
    """Return what all spans of a tracer have in common, taken from a span that the SDK has made."""
    span = vars(tracer.start_span("a span to take from", Context()))
    return {name: span[name] for name in _SHARED}
