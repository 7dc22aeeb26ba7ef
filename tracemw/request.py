"""One request's trace: enriched while the request runs, settled, ended once. Shared by both middlewares.

The middlewares know their protocol; `opening` knows how a trace begins; what a request does to its trace is here.

An exception on its way out of the application is not yet the request's: a middleware may still answer it with a
400. It counts when it has left the application, or when the answer is a 5xx. So the root of a request whose
response and exceptions do not agree (a 500 that nobody has raised anything for, a 400 with an exception behind it)
waits until the application returns: a moment, or `GRACE` where a background task keeps the application busy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from time import perf_counter_ns
from types import MappingProxyType
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from tracemw import afterwards, scope
from tracemw.bodies import REQUEST, RESPONSE, Tee
from tracemw.failure import EVENT, MESSAGE, TYPE, outcome_of, outcome_of_request, record_exception
from tracemw.guard import guarded
from tracemw.logging import describe
from tracemw.record import LATE_FAILED, TraceRecord, current_record
from tracemw.resolving import Resolver, Resolving
from tracemw.runtime import runtime_of

# Under this key of the scope or environ stands the request's trace: whoever finds it there enriches it.
KEY: Final = "tracemw.request"

GRACE: Final = 1.0  # seconds that a root waits for the application to return

_GONE: Final[Mapping[str, Any]] = MappingProxyType({})
_REDACTED_LATER: Final = frozenset({"url.query", REQUEST, RESPONSE})


class RequestTrace(Resolving):
    """One request's trace while the request runs.

    Attributes:
        record: What is known about the trace.
        resolver: Knows the framework's routes and users.
        context: The OpenTelemetry context that the application runs in.
        status: The status code the client saw, None before the response starts.
        mode: Whose root it is: "owned", "joined" or "adopted".
        ended: The root has ended.
        gone_at: When the whole response had been sent (by `perf_counter_ns`), 0 before.
        size: Bytes of the body that were sent.
        chunks: In how many parts.
        noted: An exception that left a part of the application.
        failure: Why the request counts as failed, though there was no exception and no status that says so.
        claimed_user: The user as the header has it.
        request_body: Keeps a copy, where the settings ask for it.
        response_body: Likewise.
    """

    # What every request begins with; an instance has its own value only where that differs.
    status: int | None = None
    ended = False
    gone_at = 0
    noted: Exception | None = None
    failure: str | None = None
    request_body: Tee | None = None
    response_body: Tee | None = None
    _route: str | None = None
    _exception: BaseException | None = None  # has left the application
    _left_ns = 0  # when the client had gone
    _end_ns = 0
    _settled = False
    _timer: Any = None
    _turn = 0  # of the event loop, when the response had been sent
    _first_byte = 0
    chunks = size = 0

    def __init__(
        self,
        resolver: Resolver,
        carrier: MutableMapping[str, Any],
        record: TraceRecord,
        span: Span,
        context: Context,
        mode: str,
        method: str,
        started: int,
    ) -> None:
        self.record = record
        self.context = context
        self.claimed_user: str | None = None
        self.resolver = resolver
        self._carrier: Mapping[str, Any] = carrier
        self._span = span
        self.mode = mode
        self._method = method
        self._started = started  # by `perf_counter_ns`, when it was `record.start_ns`

    def __str__(self) -> str:
        """Return the ids, as access logs show them: gunicorn's `%({tracemw.request}e)s`."""
        return describe(self.record)

    @property
    def disconnected(self) -> bool:
        """True where the client went away before it had the response."""
        return self._left_ns != 0

    def is_over(self) -> bool:
        """True for one that has ended where its scope or environ comes again; what goes on after it is within."""
        return current_record() is not self.record

    @property
    def may_be_empty(self) -> bool:
        """True where a server need not read the body: the answer to HEAD, 204, 304."""
        return self._method == "HEAD" or self.status in (204, 304)

    # What happens to it.

    def response_started(self, status: int) -> None:
        """Take note of the status; the framework still knows the route and the authenticated user."""
        self.status = status
        resolver = self.resolver
        if resolver.knows_users or self._inner:
            self.resolve_user()
        if self.record.recording and (resolver.adapter is not None or self._inner):
            self.find_route()

    @guarded()
    def answered_outside(self, status: int) -> None:
        """Take note of an answer that was given outside of us, after an exception had left what is inside."""
        self.status = status
        if self.record.recording:
            self.record.attributes["http.response.status_code"] = status
            self.record.changed()

    def body_sent(self, size: int) -> None:
        """Take note of a part of the body."""
        if not self._first_byte:
            self._first_byte = perf_counter_ns()
        self.chunks += 1
        self.size += size

    @guarded()
    def completing(self) -> None:
        """Take note that the last part of the response is about to be sent."""
        self._complete()
        self._settle()

    @guarded()
    def completed(self) -> None:
        """Take note that the response has been sent; that ends the root, unless an exception may still come."""
        self._complete()
        self._turn = afterwards.turn()
        status = self.status
        if (self.noted is None) == (status is not None and status < 500):
            self._end()
        else:
            self._end_soon()

    @guarded()
    def closed(self) -> None:
        """Take note that a connection has been closed; its root ends when the application returns, or soon."""
        self._complete()
        self._turn = afterwards.turn()
        self._end_soon()

    @guarded()
    def exhausted(self) -> None:
        """Take note that there is no more of the response to come, and end the root."""
        if self.status is not None:  # else there was none
            self._complete()
        self._end()

    def _complete(self) -> None:
        if not self.gone_at:
            self.gone_at = now = perf_counter_ns()
            self._end_ns = self.record.start_ns + now - self._started

    @guarded()
    def client_left(self) -> None:
        """Take note that the client went away; the request is over, though the application may not know yet."""
        if not self.gone_at and not self._left_ns:
            self._left_ns = self._now()
            self._end_soon()

    @guarded()
    def raised(self, exc: BaseException) -> None:
        """Take note of an exception that left a part of the application; somebody may still handle it."""
        if isinstance(exc, Exception) and not self.ended:
            self.noted = exc

    @guarded()
    def left(self, exc: BaseException) -> None:
        """Take note of an exception that left the application."""
        if self.ended:
            if not (exc is self._told() or self.record.late == LATE_FAILED or self._follows_leaving(exc)):
                self._did_afterwards(exc)
            self.gone_at = 0
            return
        self._exception = exc
        self.known_again()
        if self._settled:  # an adopted root, which its owner has ended
            self.record.outcome, self.record.error = "error", True
            self.record.changed()

    def known_again(self) -> None:
        """Have the processor find the record, though the garbage collector may be dropping the request."""
        if self.record.recording:
            self.record.register()

    @guarded()
    def returned(self) -> None:
        """Take note that the application has returned, later than it had sent the response."""
        if not self.gone_at or self.record.late:
            return
        took = perf_counter_ns() - self.gone_at
        if took > afterwards.BLOCKING or (took > afterwards.QUICK and afterwards.turn() != self._turn):
            self._did_afterwards(None)

    def _did_afterwards(self, exc: BaseException | None) -> None:
        if self.record.recording:
            start_ns = self._end_ns or self._left_ns or self.record.end_ns or 0
            afterwards.record_work(self.context, start_ns, self._now(), exc)

    # Its end.

    @guarded()
    def end(self) -> None:
        """End the root, once. Its duration is the one that was settled first."""
        self._end()

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self.record.recording:
            try:
                self._settle()
            finally:
                if self.mode != "adopted":  # else its owner ends it
                    self._span.end(self.record.end_ns)
        self.release()

    def release(self) -> None:
        """Let go of what holds this, scope or environ and the frames of an exception: no cycle shall keep it."""
        self._carrier = _GONE
        self._inner = ()
        self._exception = None

    def _settle(self) -> None:
        """Write what is known onto the record, and onto a root span that others will see.

        For an adopted root this has to come before its owner can end it.
        """
        record = self.record
        if self._settled or not record.recording:
            return
        self._settled = True
        record.end_ns = self._end_ns or self._left_ns or self._now()
        record.outcome = outcome = self._outcome()
        record.error = outcome == "error"
        if self.status is None:
            self.resolve_user()
        self._describe(record)
        if record.error:
            self._tell_failure(record)
        if runtime_of(record).processors and self._span.is_recording():
            scope.run_processors(self._span, record)
        if self.mode != "owned":
            self._mirror(record)
        scope.note_trace_ended(record)

    def _end_soon(self) -> None:
        """End the root after a while, whatever the application does; without asyncio, when it returns."""
        asyncio = sys.modules.get("asyncio")
        if asyncio is None or self._timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._timer = loop.call_later(GRACE, self.end)

    def _now(self) -> int:
        return self.record.start_ns + perf_counter_ns() - self._started

    # How it went.

    def _told(self) -> BaseException | None:
        """Return the exception that the request failed with."""
        if self._exception is not None:
            return self._exception
        return self.noted if self.status is None or self.status >= 500 else None

    def _outcome(self) -> str:
        exc = self._exception if self.noted is None else self._told()
        if exc is not None:
            if self._follows_leaving(exc):
                return "disconnected"
            return outcome_of_request(exc)
        if self.failure is not None or (self.status is not None and self.status >= 500):
            return "error"
        if self._left_ns:
            return "disconnected"
        return "completed" if self.gone_at else "error"

    def _follows_leaving(self, exc: BaseException) -> bool:
        return self._left_ns != 0 and (outcome_of(exc) is not None or _tells_of_leaving(exc))

    def _error_type(self) -> str:
        exc = self._told()
        if exc is not None:
            return _type_name(exc)
        if self.failure is not None:
            return self.failure
        if self.status is None:
            return "no_response"
        return str(self.status) if self.status >= 500 else "incomplete_response"

    # What it was.

    def _describe(self, record: TraceRecord) -> None:
        attributes = record.attributes
        if self._route is None and (self.resolver.adapter is not None or self._inner):
            self.find_route()
        route = self._route
        if route is not None:
            attributes["http.route"] = route
        record.name = self._method if route is None else f"{self._method} {route}"
        if self.status is not None:
            attributes["http.response.status_code"] = self.status
        elif record.error and isinstance(self._exception, Exception) and self._method != "WS":
            if self.mode != "adopted":  # servers answer so; whoever answers further in tells it afterwards
                attributes["http.response.status_code"] = 500
        if self._first_byte:
            attributes["tracemw.ttfb_ms"] = round((self._first_byte - self._started) / 1e6, 3)
            attributes["tracemw.chunks"] = self.chunks
            attributes["http.response.body.size"] = self.size
        if self.request_body is not None:
            attributes.update(self.request_body.attributes(REQUEST))
        if self.response_body is not None:
            attributes.update(self.response_body.attributes(RESPONSE))

    def find_route(self) -> None:
        """Ask which route was chosen, while the framework still knows."""
        if self._route is None:
            self._route = self.resolver.route(self._carrier)
            if self._route is None and self._inner:  # the one next to the handler knows all prefixes
                routes = (inner.route(carrier) for inner, carrier in reversed(self._inner))
                self._route = next((route for route in routes if route is not None), None)

    @guarded()
    def _tell_failure(self, record: TraceRecord) -> None:
        """Put the error onto the root: its type, and one event for its exception."""
        exc, span, answered = self._told(), self._span, None
        if exc is None and self.failure is None:
            answered = record.failure  # of the handler: it did not pass us, the framework has answered it
        record.attributes["error.type"] = self._error_type() if answered is None else answered[TYPE]
        if not span.is_recording():
            return
        if exc is not None:
            record_exception(span, exc)
        elif answered is not None:
            span.add_event(EVENT, answered)
            span.set_status(Status(StatusCode.ERROR, f"{answered[TYPE]}: {answered[MESSAGE]}"))
        elif self.mode != "adopted":
            span.set_status(Status(StatusCode.ERROR))

    @guarded()
    def _mirror(self, record: TraceRecord) -> None:
        """Put the facts onto the root span, last, since the SDK evicts the oldest attributes."""
        from tracemw.pipeline.encode import mirrored

        span = self._span
        if not span.is_recording():
            return
        if self.mode == "joined":
            span.update_name(record.name)
            span.set_attributes(public(record.attributes))
        span.set_attributes(mirrored(record))

    @guarded()
    def resolve_user(self) -> None:
        """Let what server code knows of the user win over what a header claimed."""
        if not (self.resolver.knows_users or self._inner):
            return
        user, record = self.known_user(self._carrier), self.record
        if user is not None and record.user_id == self.claimed_user:  # else set with `update_current_trace`
            record.user_id = self.claimed_user = user


def public(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root's attributes without query string and bodies, which are redacted only when stored."""
    return {key: value for key, value in attributes.items() if key not in _REDACTED_LATER}


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _tells_of_leaving(exc: BaseException) -> bool:
    """True for what follows from a client's having left; another exception is the application's own."""
    children = getattr(exc, "exceptions", None)  # an exception group
    if isinstance(children, tuple) and children:
        return all(_tells_of_leaving(child) for child in children)
    kind = type(exc)
    return (
        isinstance(exc, ConnectionError)
        or kind is OSError
        or "Disconnect" in kind.__name__
        or kind.__module__.startswith("anyio")
    )
