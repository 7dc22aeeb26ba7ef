"""One request's trace: enriched while the request runs, settled, ended once. Shared by both middlewares.

The middlewares know their protocol; `opening` knows how a trace begins; what a request does to its trace is here.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from time import perf_counter_ns
from typing import Any, Final, Protocol

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from tracemw.bodies import REQUEST, RESPONSE, Tee
from tracemw.failure import EVENT, MESSAGE, TYPE
from tracemw.guard import guarded
from tracemw.logging import describe
from tracemw.record import TraceRecord

# Under this key of the scope or environ stands the request's trace: whoever finds it there enriches it.
KEY: Final = "tracemw.request"

_REDACTED_LATER: Final = frozenset({"url.query", REQUEST, RESPONSE})


class Adapted(Protocol):
    """What a request's trace asks about the framework that handles it."""

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it."""


class Resolver(Adapted, Protocol):
    """The same, asked with the settings in mind."""

    knows_users: bool


class RequestTrace:
    """One request's trace while the request runs.

    Attributes:
        record: What is known about the trace.
        context: The OpenTelemetry context that the application runs in.
        status: The status code the client saw, None before the response starts.
        adopted: The root is somebody else's, who ends it.
        ended: The root has ended.
        disconnected: The client went away.
        failed: The protocol says that the server failed.
        claimed_user: The user as the header has it.
        request_body: Keeps a copy, where the settings ask for it.
        response_body: Likewise.
    """

    __slots__ = (
        "record",
        "context",
        "status",
        "_resolver",
        "_carrier",
        "_inner",
        "_route",
        "_span",
        "_mode",
        "adopted",
        "claimed_user",
        "_method",
        "_started",
        "_first_byte",
        "_chunks",
        "_size",
        "_exception",
        "_settled",
        "ended",
        "_end_ns",
        "disconnected",
        "failed",
        "request_body",
        "response_body",
    )

    def __init__(
        self,
        resolver: Resolver,
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
        self.failed = False
        self.request_body: Tee | None = None
        self.response_body: Tee | None = None
        self._end_ns = 0
        self._resolver = resolver
        self._carrier = carrier
        self._inner: tuple[Adapted, Mapping[str, Any]] | None = None
        self._route: str | None = None
        self._span = span
        self.adopted = mode == "adopted"
        self._mode = mode
        self._method = method
        self.claimed_user = record.user_id
        self._started = perf_counter_ns()
        self._first_byte = 0
        self._chunks = 0
        self._size = 0
        self._exception: BaseException | None = None
        self._settled = False
        self.ended = False

    def also_known_to(self, inner: Adapted, carrier: Mapping[str, Any]) -> None:
        """Ask somebody further inside where nobody here knows the route; they may see another carrier, too."""
        self._inner = (inner, carrier)

    def __str__(self) -> str:
        """Return the ids, as access logs show them: gunicorn's `%({tracemw.request}e)s`."""
        return describe(self.record)

    @property
    def may_be_empty(self) -> bool:
        """True where a server need not read the body: the answer to HEAD, 204, 304."""
        return self._method == "HEAD" or self.status in (204, 304)

    def response_started(self, status: int) -> None:
        """Take note of the status; the route and the authenticated user are known by now."""
        self.status = status
        if self._resolver.knows_users:
            self._resolve_user()
            self.find_route()
        elif self._inner is not None:
            self.find_route()

    def find_route(self) -> None:
        """Ask which route was chosen, while the framework still knows."""
        if self._route is None:
            self._route = self._resolver.route(self._carrier)
            if self._route is None and self._inner is not None:
                self._route = self._inner[0].route(self._inner[1])

    def body_sent(self, size: int) -> None:
        """Take note of a part of the body."""
        if not self._first_byte:
            self._first_byte = perf_counter_ns()
        self._chunks += 1
        self._size += size

    @guarded()
    def raised(self, exc: BaseException) -> None:
        """Take note of an exception that left the application (or a part of it); the first one counts."""
        if self._exception is not None or self.ended or not self.record.recording:
            return
        self._exception = exc
        if isinstance(exc, Exception) and not self._left_by_client(exc) and self._span.is_recording():
            self._span.record_exception(exc)

    @guarded()
    def settle(self) -> None:
        """Write what is known onto the record, and onto a root span that others will see.

        For an adopted root this has to come before its owner can end it.
        """
        self._settle()

    @guarded()
    def end(self) -> None:
        """End the root, once. Its duration is the one that was settled first."""
        if self.ended:
            return
        self.ended = True
        if not self.record.recording:
            return
        self._settle()
        record = self.record
        if self.adopted:  # its owner ends it
            return
        if record.error:
            self._span.set_status(Status(StatusCode.ERROR, self._error_text()))
        self._span.end(record.end_ns)

    def _settle(self) -> None:
        if self._settled or not self.record.recording:
            return
        self._settled = True
        record = self.record
        record.end_ns = self._end_ns or self._now()
        record.outcome = outcome = self._outcome()
        record.error = outcome == "error"
        if self.status is None and self._resolver.knows_users:
            self._resolve_user()
        self._describe(record)
        if self._mode != "owned":
            self._mirror(record)

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that the response gets, unless the application has set them itself."""
        record = self.record
        headers = []
        if (request_id := record.client_request_id) is not None:
            headers.append((b"x-request-id", request_id.encode("latin-1", "replace")))
        if record.recording:
            trace_id = b"%032x" % record.trace_id
            headers.append((b"x-trace-id", b"tr-" + trace_id))
            timing = b'traceparent;desc="00-%b-%016x-01"' % (trace_id, record.root_span_id)
            headers.append((b"server-timing", timing))
        return headers

    def note_end(self) -> None:
        """Take note that the response is complete; the root ends then, though it is closed later."""
        if not self._end_ns:
            self._end_ns = self._now()
        if self.adopted:
            self.settle()  # its owner ends it with the last part of the response

    def _now(self) -> int:
        return self.record.start_ns + perf_counter_ns() - self._started

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
        exc, answered = self._exception, self._answered()
        if exc is not None:
            return f"{type(exc).__name__}: {exc}"
        return None if answered is None else f"{answered[TYPE]}: {answered[MESSAGE]}"

    def _answered(self) -> Mapping[str, Any] | None:
        """Return the exception of the traced handler that was answered with a server error, if there was one."""
        failed = self._exception is None and self.status is not None and self.status >= 500
        return self.record.failure if failed else None

    # What it was.

    def _describe(self, record: TraceRecord) -> None:
        attributes = record.attributes
        self.find_route()
        route = self._route
        if route is not None:
            attributes["http.route"] = route
        record.name = self._method if route is None else f"{self._method} {route}"
        if self.status is not None:
            attributes["http.response.status_code"] = self.status
        if self._first_byte:
            attributes["tracemw.ttfb_ms"] = round((self._first_byte - self._started) / 1e6, 3)
            attributes["tracemw.chunks"] = self._chunks
            attributes["http.response.body.size"] = self._size
        if self.request_body is not None:
            attributes.update(self.request_body.attributes(REQUEST))
        if self.response_body is not None:
            attributes.update(self.response_body.attributes(RESPONSE))
        if record.error:
            exc, answered = self._exception, self._answered()
            if answered is not None and self._span.is_recording():
                self._span.add_event(EVENT, answered)
            attributes["error.type"] = (
                _type_name(exc)
                if exc is not None
                else answered[TYPE]
                if answered is not None
                else str(self.status or "no_response")
            )

    @guarded()
    def _mirror(self, record: TraceRecord) -> None:
        """Put the facts onto the root span, last, since the SDK evicts the oldest attributes."""
        from tracemw.pipeline.encode import mirrored

        span = self._span
        if not span.is_recording():
            return
        if self._mode == "joined":
            span.update_name(record.name)
            span.set_attributes(public(record.attributes))
        span.set_attributes(mirrored(record))

    @guarded()
    def _resolve_user(self) -> None:
        """Let what server code knows of the user win over what a header claimed."""
        record = self.record
        if record.user_id != self.claimed_user:  # set with `update_current_trace`
            return
        user = self._resolver.user(self._carrier)
        if user is not None:
            record.user_id = self.claimed_user = user


def public(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root's attributes without query string and bodies, which are redacted only when stored."""
    return {key: value for key, value in attributes.items() if key not in _REDACTED_LATER}


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
