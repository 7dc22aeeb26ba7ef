"""One request's trace: opened or adopted, enriched while it runs, ended once. Shared by both middlewares.

The middlewares know their protocol; everything that a request and its trace have to do with each other is here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, MutableMapping
from time import perf_counter_ns, time_ns
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode

from tracemw import config, provider
from tracemw.adapting import Adapter
from tracemw.guard import guarded
from tracemw.identity import Identity, IdentityReader
from tracemw.pipeline import current as pipeline
from tracemw.pipeline.encode import mirrored
from tracemw.propagation import TrustPolicy, parse_traceparent
from tracemw.record import TraceRecord, current_record, with_record
from tracemw.settings import Settings

# Under this key of the scope or environ stands the request's trace: whoever finds it there enriches it.
KEY: Final = "tracemw.request"

# RFC 9110 and RFC 5789; other methods share one name, since anybody can invent more.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD: Final = "_OTHER"

_random = random.Random()


class RequestTrace:
    """One request's trace while the request runs.

    Attributes:
        record: What is known about the trace.
        context: The OpenTelemetry context that the application runs in.
        status: The status code the client saw, None before the response starts.
    """

    __slots__ = (
        "record",
        "context",
        "status",
        "_tracer",
        "_carrier",
        "_span",
        "_mode",
        "_claimed_user",
        "_method",
        "_started",
        "_first_byte",
        "_chunks",
        "_size",
        "_exception",
        "_settled",
        "_ended",
        "_end_ns",
        "disconnected",
        "failed",
    )

    def __init__(
        self,
        tracer: RequestTracer,
        carrier: MutableMapping[str, Any],
        record: TraceRecord,
        span: Span,
        context: Context,
        mode: str,
        method: str,
    ) -> None:
        self.record = record
        self.context = context
        self.status: int | None = None
        self.disconnected = False
        self.failed = False  # the protocol says that the server failed
        self._end_ns = 0
        self._tracer = tracer
        self._carrier = carrier
        self._span = span
        self._mode = mode
        self._method = method
        self._claimed_user = record.user_id
        self._started = perf_counter_ns()
        self._first_byte = 0
        self._chunks = 0
        self._size = 0
        self._exception: BaseException | None = None
        self._settled = False
        self._ended = False

    @property
    def recording(self) -> bool:
        """True where this request's trace is recorded."""
        return self.record.recording

    @property
    def ended(self) -> bool:
        """True once the root has ended."""
        return self._ended

    @property
    def may_be_empty(self) -> bool:
        """True where a server need not read the body: the answer to HEAD, 204, 304."""
        return self._method == "HEAD" or self.status in (204, 304)

    def response_started(self, status: int) -> None:
        """Take note of the status; the route and the authenticated user are known by now."""
        self.status = status
        self._resolve_user()

    def body_sent(self, size: int) -> None:
        """Take note of a part of the body."""
        if not self._first_byte:
            self._first_byte = perf_counter_ns()
        self._chunks += 1
        self._size += size

    @guarded()
    def raised(self, exc: BaseException) -> None:
        """Take note of an exception that left the application (or a part of it); the first one counts."""
        if self._exception is not None or self._ended or not self.recording:
            return
        self._exception = exc
        if isinstance(exc, Exception) and not self._left_by_client(exc) and self._span.is_recording():
            self._span.record_exception(exc)

    @guarded()
    def settle(self, outcome: str | None = None) -> None:
        """Write what is known onto the record, and onto a root span that others will see.

        For an adopted root this has to come before its owner can end it.

        Args:
            outcome: How the request ended, or None to conclude it.
        """
        if self._settled or not self.recording:
            return
        self._settled = True
        record = self.record
        record.end_ns = self._end_ns or self._now()
        record.outcome = outcome or self._outcome()
        record.error = record.outcome == "error"
        self._resolve_user()
        self._describe(record)
        if self._mode != "owned":
            self._mirror(record)

    @guarded()
    def end(self, outcome: str | None = None) -> None:
        """End the root, once. Its duration is the one that was settled first.

        Args:
            outcome: How the request ended, or None to conclude it.
        """
        if self._ended:
            return
        self._ended = True
        if not self.recording:
            return
        self.settle(outcome)
        record = self.record
        if self._mode == "adopted":  # its owner ends it
            return
        if record.error:
            self._span.set_status(Status(StatusCode.ERROR, self._error_text()))
        self._span.end(record.end_ns)

    def note_end(self) -> None:
        """Take note that the response is complete; the root ends then, though it is closed later."""
        if not self._end_ns:
            self._end_ns = self._now()
        if self._mode == "adopted":
            self.settle()  # its owner ends it with the last part of the response

    def _now(self) -> int:
        return self.record.start_ns + perf_counter_ns() - self._started

    def response_headers(self) -> list[tuple[str, str]]:
        """Return the headers that the response gets, unless the application has set them itself."""
        record, headers = self.record, []
        if record.client_request_id is not None:
            headers.append(("x-request-id", record.client_request_id))
        if record.recording:
            trace_id = f"{record.trace_id:032x}"
            headers.append(("x-trace-id", f"tr-{trace_id}"))
            headers.append(
                ("server-timing", f'traceparent;desc="00-{trace_id}-{record.root_span_id:016x}-01"')
            )
        return headers

    # How it went.

    def _outcome(self) -> str:
        exc = self._exception
        if exc is not None and (self.disconnected or self._left_by_client(exc)):
            return "disconnected"
        if exc is not None and not isinstance(exc, Exception):
            return "cancelled"
        if exc is not None or self.failed or (self.status is not None and self.status >= 500):
            return "error"
        if self.disconnected:
            return "disconnected"
        return "completed" if self.status is not None else "error"

    @staticmethod
    def _left_by_client(exc: BaseException) -> bool:
        """True for what servers raise when there is nobody left to send to (ASGI spec 2.4: an OSError)."""
        return isinstance(exc, ConnectionError) or type(exc).__name__ in ("ClientDisconnect", "ClientDisconnected")

    def _error_text(self) -> str | None:
        exc = self._exception
        return None if exc is None else f"{type(exc).__name__}: {exc}"

    # What it was.

    def _describe(self, record: TraceRecord) -> None:
        attributes = record.attributes
        route = self._tracer.route(self._carrier)
        if route is not None:
            attributes["http.route"] = route
        record.name = self._method if route is None else f"{self._method} {route}"
        if self.status is not None:
            attributes["http.response.status_code"] = self.status
        if self._first_byte:
            attributes["tracemw.ttfb_ms"] = round((self._first_byte - self._started) / 1e6, 3)
            attributes["tracemw.chunks"] = self._chunks
            attributes["http.response.body.size"] = self._size
        if record.error:
            exc = self._exception
            attributes["error.type"] = _type_name(exc) if exc is not None else str(self.status or "no_response")

    @guarded()
    def _mirror(self, record: TraceRecord) -> None:
        """Put the facts onto the root span, last, since the SDK evicts the oldest attributes."""
        span = self._span
        if not span.is_recording():
            return
        if self._mode == "joined":
            span.update_name(record.name)
            span.set_attributes({k: v for k, v in record.attributes.items() if k != "url.query"})
        span.set_attributes(mirrored(record))

    @guarded()
    def _resolve_user(self) -> None:
        """Let what server code knows of the user win over what a header claimed."""
        record = self.record
        if not record.recording or record.user_id != self._claimed_user:
            return
        user = self._tracer.user(self._carrier)
        if user is not None:
            record.user_id = self._claimed_user = user


class RequestTracer:
    """Opens the traces of one middleware's requests; made from its settings, anew when those change.

    Args:
        settings: Those of the middleware.
        adapter: Knows the framework's routes and users; None for a plain application.
    """

    def __init__(self, settings: Settings, adapter: Adapter | None = None) -> None:
        self.adapter = adapter
        self.response_headers = settings.response_headers
        self.identity = IdentityReader(
            _names(settings.request_id_header),
            _names(settings.session_id_header),
            _names(settings.user_id_header),
            settings.generate_request_id,
        )
        self._rate = settings.sample_rate
        self._keeps = settings.keep_errors or settings.keep_slower_than is not None
        self._excluded = frozenset(p for p in settings.exclude if "*" not in p)
        self._excluded_pattern = _pattern([p for p in settings.exclude if "*" in p])
        self._trust = TrustPolicy(settings.trust_traceparent)
        self._user = settings.user
        self._process = config.process_metadata()

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""
        return None if self.adapter is None else self.adapter.route(carrier)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it: the `user` option's answer, else the framework's."""
        user = self._user(carrier) if self._user is not None else None
        if user is None and self.adapter is not None:
            user = self.adapter.user(carrier)
        return None if user is None or user == "" else str(user)[:250]

    def open(
        self,
        carrier: MutableMapping[str, Any],
        identity: Identity,
        method: str,
        path: str,
        attributes: dict[str, Any],
        peer: str | None = None,
    ) -> RequestTrace:
        """Open the trace of a request, or adopt the one that a framework opened for it.

        Args:
            carrier: The ASGI scope or WSGI environ.
            identity: What the headers say.
            method: The request's method, or WS.
            path: The whole path, for exclusion.
            attributes: Those of the root, in OpenTelemetry's names.
            peer: The address that the request came from.
        """
        name = method if method in METHODS or method == "WS" else OTHER_METHOD
        attributes["http.request.method"] = "GET" if method == "WS" else name
        if name is OTHER_METHOD:
            attributes["http.request.method_original"] = method[:64]
        span = None if self._is_excluded(path) else adopted_span(carrier)
        if span is not None:
            request = self._adopt(carrier, span, name)
        else:
            request = self._open_own(carrier, identity, name, path, attributes, peer)
        self._enrich(request.record, identity, attributes)
        request._claimed_user = identity.user_id
        carrier[KEY] = request
        return request

    def _enrich(self, record: TraceRecord, identity: Identity, attributes: dict[str, Any]) -> None:
        record.is_request = True
        record.client_request_id = identity.client_request_id
        record.session_id = identity.session_id
        record.user_id = identity.user_id
        record.attributes = attributes
        record.process = self._process
        if identity.discarded:
            for reason, number in identity.discarded.items():
                pipeline().count(f"discarded_{reason}", number)

    def _adopt(self, carrier: MutableMapping[str, Any], span: Any, name: str) -> RequestTrace:
        provider.follow_span(span)
        ids = span.get_span_context()
        recording = self._is_sampled()
        record = TraceRecord(ids.trace_id, ids.span_id, recording=recording)
        if not recording:
            self._not_sampled(record)
        record.has_parent = span.parent is not None
        record.start_ns = span.start_time or time_ns()
        record.name = name
        context = with_record(otel_context.get_current(), record)
        return RequestTrace(self, carrier, record, span, context, "adopted", name)

    def _open_own(
        self,
        carrier: MutableMapping[str, Any],
        identity: Identity,
        name: str,
        path: str,
        attributes: dict[str, Any],
        peer: str | None,
    ) -> RequestTrace:
        if self._is_excluded(path):
            pipeline().count("excluded")
            return self._suppressed(carrier, name)
        if not (sampled := self._is_sampled()) and not self._keeps:
            pipeline().count("sampled_out")
            return self._suppressed(carrier, name)
        tracer, joined = provider.tracer(), provider.is_joined_now()
        parent, links = Context(), ()
        if identity.traceparent is not None:
            parent, links = self._remote(identity, carrier, peer, attributes)
        start_ns = time_ns()
        span = tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={k: v for k, v in attributes.items() if k != "url.query"} if joined else None,
            links=links,
            start_time=start_ns,
        )
        if not span.is_recording():
            pipeline().count("sampled_out")
            return self._suppressed(carrier, name, span)
        ids = span.get_span_context()
        record = TraceRecord(ids.trace_id, ids.span_id)
        record.has_parent = bool(parent)
        record.start_ns = start_ns
        record.name = name
        if not sampled:
            record.held_back = []
        context = with_record(trace_api.set_span_in_context(span, Context()), record)
        return RequestTrace(self, carrier, record, span, context, "joined" if joined else "owned", name)

    def _suppressed(
        self, carrier: MutableMapping[str, Any], name: str, span: Span | None = None
    ) -> RequestTrace:
        """Open a request whose trace is not recorded, nor are the spans made inside it.

        On the application's own provider only ours are: what its pipeline gets without us, it gets with us.
        """
        context = Context()
        if span is None:
            ids = SpanContext(_random.getrandbits(128) or 1, _random.getrandbits(64) or 1, is_remote=False)
            span = NonRecordingSpan(ids)
            if not provider.is_joined_now():
                context = trace_api.set_span_in_context(span, context)
        else:
            context = trace_api.set_span_in_context(span, context)
            ids = span.get_span_context()
        record = TraceRecord(ids.trace_id, ids.span_id, recording=False)
        return RequestTrace(self, carrier, record, span, with_record(context, record), "owned", name)

    def _not_sampled(self, record: TraceRecord) -> None:
        if self._keeps:
            record.recording = True
            record.held_back = []
            record.register()
        else:
            pipeline().count("sampled_out")

    def _remote(
        self, identity: Identity, carrier: Mapping[str, Any], peer: str | None, attributes: dict[str, Any]
    ) -> tuple[Context, tuple[Link, ...]]:
        """Continue the caller's trace where it is trusted, else only point to it."""
        remote = parse_traceparent(identity.traceparent, identity.tracestate)
        if remote is None:
            return Context(), ()
        if self._trust.is_trusted(peer, carrier):
            return trace_api.set_span_in_context(NonRecordingSpan(remote), Context()), ()
        attributes["tracemw.remote.trace_id"] = f"{remote.trace_id:032x}"
        attributes["tracemw.remote.span_id"] = f"{remote.span_id:016x}"
        return Context(), (Link(remote),)

    def _is_excluded(self, path: str) -> bool:
        if path in self._excluded:
            return True
        return self._excluded_pattern is not None and self._excluded_pattern.match(path) is not None

    def _is_sampled(self) -> bool:
        return self._rate is None or self._rate >= 1.0 or _random.random() < self._rate


def adopted_span(carrier: Mapping[str, Any]) -> Any | None:
    """Return the span that a framework or another middleware opened for this very request, or None.

    FastAPI names it in the scope, Starlette marks the scope, OpenTelemetry's own instrumentations are known by
    their scope's name. One that already is the root of a request of ours belongs to another request, whose
    handler calls this application in process.
    """
    span: Any = trace_api.get_current_span()
    if span is trace_api.INVALID_SPAN or not span.is_recording():
        return None
    if getattr(span, "kind", None) is not SpanKind.SERVER:
        return None
    outer = current_record()
    if outer is not None and outer.root_span_id == span.get_span_context().span_id:
        return None
    telemetry = carrier.get("fastapi.telemetry")
    if telemetry is not None:
        return span if getattr(telemetry, "span", None) is span else None
    if carrier.get("starlette.opentelemetry"):
        return span
    scope = getattr(span, "instrumentation_scope", None)
    return span if scope is not None and scope.name.startswith("opentelemetry.instrumentation.") else None


def _names(header: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if header is None else (header,) if isinstance(header, str) else header


def _pattern(globs: list[str]) -> re.Pattern[str] | None:
    """Compile path patterns with `*`; each has to match the whole path."""
    if not globs:
        return None
    return re.compile("|".join(f"(?:{re.escape(g).replace(re.escape('*'), '.*')})\\Z" for g in globs), re.DOTALL)


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
