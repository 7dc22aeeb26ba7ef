"""How a request's trace begins: opened with a provider, adopted from a framework, or suppressed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from time import perf_counter_ns, time_ns
from typing import Any, Final, TypeAlias

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.chance import chance
from tracemw.environment import process_metadata
from tracemw.exclusion import Exclusion
from tracemw.guard import due
from tracemw.identity import Identity, IdentityReader, Values, check_id
from tracemw.pipeline import current as pipeline
from tracemw.propagation import TrustPolicy, parse_traceparent, with_baggage
from tracemw.record import RECORD_KEY, SPAN_KEY, TraceRecord, current_record, with_record
from tracemw.request import KEY, RequestTrace, public
from tracemw.runtime import runtime_for
from tracemw.settings import Settings
from tracemw.unrecorded import UnrecordedRequest, count_discarded

# RFC 9110 and RFC 5789; other methods share one name, since anybody can invent more.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
OTHER_METHOD: Final = "_OTHER"

AnyRequest: TypeAlias = RequestTrace | UnrecordedRequest

logger = logging.getLogger("tracemw")


# While MLflow is bridged, what it begins is looked for below a root of this process: a caller is linked.
local_roots = False

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
        self._rate = 1.0 if settings.sample_rate is None else settings.sample_rate
        self._keeps = settings.keep_errors or settings.keep_slower_than is not None
        self._exclusion = Exclusion(settings.exclude)
        self._trust = TrustPolicy(settings.trust_traceparent)
        # Nobody else has a say: that a request is not sampled is known at once.
        self._decides_alone = not (self._keeps or settings.trust_traceparent)
        self._user = settings.user
        self.knows_users = adapter is not None or settings.user is not None
        self._process = _process_metadata(settings)
        self._runtime = runtime_for(settings)
        self.is_global = settings.set_global  # our own provider makes the spans of a framework that traces itself

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""
        return None if self.adapter is None else self.adapter.route(carrier)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it: the `user` option's answer, else the framework's."""
        user = self._user(carrier) if self._user is not None else None
        if user is None and self.adapter is not None:
            user = self.adapter.user(carrier)
        return None if user is None else _checked(user)

    def chosen_user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the `user` option's answer alone."""
        user = self._user(carrier) if self._user is not None else None
        return None if user is None else _checked(user)

    def open(
        self,
        carrier: MutableMapping[str, Any],
        values: Values,
        method: str,
        path: str,
        described: Callable[[Any], dict[str, Any]],
        peer: str | None = None,
    ) -> AnyRequest:
        """Open the trace of a request, or adopt the one that a framework opened for it.

        Args:
            carrier: The ASGI scope or WSGI environ.
            values: Those of the headers that tell the identity.
            method: The request's method, or WS.
            path: The whole path, for exclusion.
            described: Returns a carrier's attributes, in OpenTelemetry's names; asked where they are recorded.
            peer: The address that the request came from.

        Returns:
            The request; an `UnrecordedRequest` where it is excluded or not sampled.
        """
        if self._exclusion.covers(path):
            return self._unrecorded(carrier, values, "excluded")
        sampled = self._rate >= 1.0 or chance.random() < self._rate
        if not sampled and self._decides_alone:
            return self._unrecorded(carrier, values, "sampled_out")
        identity = self.identity.identity_of(values)
        name = method if method in METHODS or method == "WS" else OTHER_METHOD
        ambient: Any = otel_context.get_current().get(SPAN_KEY)
        request: AnyRequest | None = None
        if ambient is not None and is_root_of(carrier, ambient):
            request = self._adopt(carrier, ambient, name, described, sampled)
        elif ambient is None or not is_left_out(carrier, ambient):
            request = self._open_own(carrier, values, identity, name, described, peer, sampled)
        if request is None:
            return self._unrecorded(carrier, values, "sampled_out")
        if isinstance(request, UnrecordedRequest):
            return request
        record = request.record
        record.is_request = True
        if self._runtime is not None:
            record.runtime = self._runtime
        record.client_request_id = identity.client_request_id
        record.session_id = identity.session_id
        record.user_id = request.claimed_user = identity.user_id
        record.process = self._process
        if identity.discarded:
            count_discarded(identity)
        carrier[KEY] = request
        return request

    def _open_own(
        self,
        carrier: MutableMapping[str, Any],
        values: Values,
        identity: Identity,
        name: str,
        described: Callable[[Any], dict[str, Any]],
        peer: str | None,
        sampled: bool,
    ) -> AnyRequest | None:
        caller = None if identity.traceparent is None else _caller(identity)
        trusted = caller is not None and self._trust.is_trusted(peer, carrier) and not _keeps_local()
        sampled = trusted or sampled  # whom we trust has decided already
        if not sampled and not self._keeps:
            return None
        attributes = described(carrier)
        parent, links = _CLEAN, None
        if caller is not None:
            parent, links = _continued(caller, identity) if trusted else _linked(caller, attributes)
        tracer, joined = provider.chosen()
        start_ns, started = time_ns(), perf_counter_ns()
        # A provider of our own gets the attributes when they are written, which is cheaper.
        told = public(attributes) if joined else None
        span = tracer.start_span(name, parent, SpanKind.SERVER, told, links, start_ns)
        if not span.is_recording():  # the provider's sampler has decided so, also for what it makes inside
            request = self._unrecorded(carrier, values, "sampled_out", Context({**parent, SPAN_KEY: span}))
            request.mode = "joined" if joined else "owned"
            return request
        ids = span.get_span_context()
        record = TraceRecord(ids.trace_id, ids.span_id, has_parent=trusted)
        record.start_ns = start_ns
        record.name = name
        record.attributes = attributes
        if not sampled:
            record.held_back = []
        context = Context({**parent, SPAN_KEY: span, RECORD_KEY: record})
        mode = "joined" if joined else "owned"
        return RequestTrace(self, carrier, record, span, context, mode, name, started)

    def _adopt(
        self,
        carrier: MutableMapping[str, Any],
        span: Any,
        name: str,
        described: Callable[[Any], dict[str, Any]],
        sampled: bool,
    ) -> RequestTrace | None:
        provider.follow_span(span)
        if not sampled and not self._keeps:
            return None
        ids = span.get_span_context()
        record = TraceRecord(ids.trace_id, ids.span_id, has_parent=span.parent is not None)
        now_ns = time_ns()
        record.start_ns = min(span.start_time or now_ns, now_ns)
        started = perf_counter_ns() - (now_ns - record.start_ns)
        record.name = name
        record.attributes = described(carrier)
        if not sampled:
            record.held_back = []
        context = with_record(otel_context.get_current(), record)
        return RequestTrace(self, carrier, record, span, context, "adopted", name, started)

    def _unrecorded(
        self, carrier: MutableMapping[str, Any], values: Values, why: str, around: Context | None = None
    ) -> UnrecordedRequest:
        """Open a request whose trace is not recorded, nor are the spans made inside it.

        Where the application has a provider, only ours are left out: what its pipeline gets without us, it gets
        with us.
        """
        pipeline().count(why)
        if around is None and provider.chosen()[1]:  # joined
            around = otel_context.get_current()
        carrier[KEY] = request = UnrecordedRequest(self, self.identity, values, around)
        if self._runtime is not None:
            request.runtime = self._runtime
        return request


def _checked(user: Any) -> str | None:
    try:
        return check_id("user_id", user)
    except ValueError as exc:
        if due("the user of a request"):
            logger.warning("what the `user` option or the framework gives as the user is left out: %s", exc)
        return None


def _process_metadata(settings: Settings) -> Mapping[str, str]:
    """Return the process metadata, with what an application has set for itself."""
    usual = config.settings()
    if (settings.metadata, settings.metadata_env) == (usual.metadata, usual.metadata_env):
        return config.process_metadata()
    return process_metadata(metadata=settings.metadata, metadata_env=settings.metadata_env)


def _keeps_local() -> bool:
    """Say whether not even a trusted caller's trace is continued."""
    if local_roots and due("local roots", float("inf")):
        logger.warning(
            "while MLflow is bridged, the traces of callers whom trust_traceparent names are not continued: each "
            "request gets a trace of its own with a link to the caller's. (Said once.)"
        )
    return local_roots


def method_attributes(method: str) -> dict[str, Any]:
    """Return the attributes of a method that nobody knows."""
    return {"http.request.method": OTHER_METHOD, "http.request.method_original": str(method)[:64]}


def is_root_of(carrier: Mapping[str, Any], span: Any) -> bool:
    """True for the span that a framework or another middleware opened for this very request.

    FastAPI names it in the scope, Starlette marks the scope, OpenTelemetry's own instrumentations are known by
    their scope's name. One that already is the root of a request of ours belongs to another request, whose
    handler calls this application in process.

    Args:
        carrier: The request's scope or environ.
        span: The current span.
    """
    if not span.is_recording() or getattr(span, "kind", None) is not SpanKind.SERVER:
        return False
    outer = current_record()
    if outer is not None and outer.root_span_id == span.get_span_context().span_id:
        return False
    telemetry = carrier.get("fastapi.telemetry")
    if telemetry is not None:
        return getattr(telemetry, "span", None) is span
    if carrier.get("starlette.opentelemetry"):
        return True
    scope = getattr(span, "instrumentation_scope", None)
    return scope is not None and scope.name.startswith("opentelemetry.instrumentation.")


def is_left_out(carrier: Mapping[str, Any], span: Any) -> bool:
    """True where a framework or another middleware has opened this request's root, and its sampler left it out.

    Such a span says nothing of who has made it: unless the framework names it, it counts where nothing of ours
    is around it and it was made in this process.

    Args:
        carrier: The request's scope or environ.
        span: The current span.
    """
    if span.is_recording():
        return False
    telemetry = carrier.get("fastapi.telemetry")
    if telemetry is not None:
        return getattr(telemetry, "span", None) is span
    ids = span.get_span_context()
    left_out = ids.is_valid and not ids.is_remote and not ids.trace_flags.sampled
    return left_out and current_record() is None and provider.is_joined_now()


def _caller(identity: Identity) -> SpanContext | None:
    """Return the caller's span, if the headers name one."""
    return parse_traceparent(identity.traceparent, identity.tracestate)


def _continued(caller: SpanContext, identity: Identity) -> tuple[Context, None]:
    """Return the context of a caller whom we trust: its span, and its baggage; a stranger's does not travel on."""
    context = _CLEAN if identity.baggage is None else with_baggage(identity.baggage, _CLEAN)
    return trace_api.set_span_in_context(NonRecordingSpan(caller), context), None


def _linked(caller: SpanContext, attributes: dict[str, Any]) -> tuple[Context, tuple[Link, ...]]:
    """Point to the span of a caller whose trace is not continued."""
    attributes["tracemw.remote.trace_id"] = f"{caller.trace_id:032x}"
    attributes["tracemw.remote.span_id"] = f"{caller.span_id:016x}"
    return _CLEAN, (Link(caller),)


def _names(header: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if header is None else (header,) if isinstance(header, str) else header
