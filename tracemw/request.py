"""One request's trace: enriched while the request runs, settled, ended once. Shared by both middlewares.

The middlewares know their protocol; `opening` knows how a trace begins; what a request does to its trace is here.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from time import perf_counter_ns
from typing import Any, Final, Protocol

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from tracemw.guard import guarded
from tracemw.pipeline.encode import mirrored
from tracemw.record import TraceRecord

# Under this key of the scope or environ stands the request's trace: whoever finds it there enriches it.
KEY: Final = "tracemw.request"


class Resolver(Protocol):
    """What a request's trace asks about the framework that handles it."""

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it."""


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
        "_resolver",
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
        self.failed = False  # the protocol says that the server failed
        self._end_ns = 0
        self._resolver = resolver
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
        route = self._resolver.route(self._carrier)
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
        user = self._resolver.user(self._carrier)
        if user is not None:
            record.user_id = self._claimed_user = user


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
