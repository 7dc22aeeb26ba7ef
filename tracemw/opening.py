"""How a request's trace begins: opened with a provider, adopted from a framework, or suppressed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, MutableMapping
from time import time_ns
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.identity import Identity, IdentityReader, clean_id
from tracemw.pipeline import current as pipeline
from tracemw.propagation import TrustPolicy, parse_traceparent
from tracemw.record import TraceRecord, current_record, with_record
from tracemw.request import KEY, RequestTrace, public
from tracemw.settings import Settings

# RFC 9110 and RFC 5789; other methods share one name, since anybody can invent more.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD: Final = "_OTHER"

_random = random.Random()  # not the application's, which may be seeded
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)

_NO_LINKS: Final[tuple[Link, ...]] = ()
_CLEAN: Final = Context()  # a request's root never becomes a child of what happens to be current


class RequestTracer:
    """Opens the traces of one middleware's requests; made from its settings, anew when those change.

    Args:
        settings: Those of the middleware.
        adapter: Knows the framework's routes and users; None for a plain application.
    """

    def __init__(self, settings: Settings, adapter: Attached | None = None) -> None:
        self.adapter = adapter
        self.response_headers = settings.response_headers
        self.keeps_request_body = settings.capture_request_body
        self.keeps_response_body = settings.capture_response_body
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
        self.knows_users = adapter is not None or settings.user is not None
        self._process = config.process_metadata()

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""
        return None if self.adapter is None else self.adapter.route(carrier)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it: the `user` option's answer, else the framework's."""
        user = self._user(carrier) if self._user is not None else None
        if user is None and self.adapter is not None:
            user = self.adapter.user(carrier)
        return None if user is None else clean_id("user_id", str(user))

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
        if path in self._excluded or (self._excluded_pattern is not None and self._excluded_pattern.match(path)):
            pipeline().count("excluded")
            request = self._suppressed(carrier, name)
        elif (span := adopted_span(carrier)) is not None:
            request = self._adopt(carrier, span, name)
        else:
            request = self._open_own(carrier, identity, name, attributes, peer)
        self._enrich(request, identity, attributes)
        carrier[KEY] = request
        return request

    def _enrich(self, request: RequestTrace, identity: Identity, attributes: dict[str, Any]) -> None:
        record = request.record
        record.is_request = True
        record.client_request_id = identity.client_request_id
        record.session_id = identity.session_id
        record.user_id = request.claimed_user = identity.user_id
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
        attributes: dict[str, Any],
        peer: str | None,
    ) -> RequestTrace:
        if not (sampled := self._is_sampled()) and not self._keeps:
            pipeline().count("sampled_out")
            return self._suppressed(carrier, name)
        tracer, joined = provider.tracer(), provider.is_joined_now()
        parent, links = _CLEAN, _NO_LINKS
        if identity.traceparent is not None:
            parent, links = self._remote(identity, carrier, peer, attributes)
        start_ns = time_ns()
        span = tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER,
            attributes=public(attributes) if joined else None,
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
        context = with_record(trace_api.set_span_in_context(span, _CLEAN), record)
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
            return _CLEAN, _NO_LINKS
        if self._trust.is_trusted(peer, carrier):
            return trace_api.set_span_in_context(NonRecordingSpan(remote), _CLEAN), _NO_LINKS
        attributes["tracemw.remote.trace_id"] = f"{remote.trace_id:032x}"
        attributes["tracemw.remote.span_id"] = f"{remote.span_id:016x}"
        return _CLEAN, (Link(remote),)

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
