"""What passes on one ASGI connection: an HTTP request and its response, or a WebSocket.

Specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from time import perf_counter_ns
from typing import Any, Final

from opentelemetry import context as otel_context

from tracemw.afterwards import QUICK
from tracemw.bodies import Tee, content_of
from tracemw.failure import ABNORMAL_CLOSE, FAILED_CLOSES
from tracemw.guard import guarded
from tracemw.opening import RequestTracer
from tracemw.record import TraceRecord
from tracemw.request import RequestTrace
from tracemw.unrecorded import UnrecordedRequest

Message = MutableMapping[str, Any]

NO_CODE: Final = 1005
MAX_REASON: Final = 250  # characters; the protocol allows 123 bytes

_REQUEST_ID: Final = b"x-request-id"
_BEGIN: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class Connection:
    """What passes between one application and its server.

    Attributes:
        request: The trace of the request.
        is_last: The message that was looked at last completes the response.
    """

    __slots__ = ("request", "is_last", "_adds_headers", "_token")

    def __init__(self, request: RequestTrace, tracer: RequestTracer) -> None:
        self.request = request
        self.is_last = False
        self._adds_headers = tracer.response_headers
        self._token: Any = None

    @guarded()
    def enter(self) -> None:
        """Have what is called from here on run in the request's context."""
        self._token = otel_context.attach(self.request.context)

    @guarded()
    def leave(self) -> None:
        """End the request, now that the application has returned, and restore the context of the server."""
        request = self.request
        try:
            if not request.ended:
                self._end()
            if perf_counter_ns() - request.gone_at > QUICK:
                request.returned()
            if request.noted is not None:
                request.noted = None  # an exception holds its frames, which hold this
        finally:
            if self._token is not None:
                otel_context.detach(self._token)

    @guarded()
    def sending(self, message: Message) -> Message | None:
        """Look at a message before it is sent; return the one to be sent instead, if there is one."""
        return None

    @guarded()
    def received(self, message: Message) -> None:
        """Look at a message that the application receives."""

    @guarded()
    def left(self, exc: BaseException) -> None:
        """Take note of an exception that left the application."""
        if isinstance(exc, GeneratorExit) and otel_context.get_current() is not self.request.context:
            self._token = None  # dropped, and closed by the garbage collector wherever that runs
        self.request.left(exc)

    def _end(self) -> None:
        self.request.end()


class Exchange(Connection):
    """One HTTP request and its response."""

    __slots__ = ("_keeps_body", "_trailers")

    def __init__(self, request: RequestTrace, tracer: RequestTracer, scope: MutableMapping[str, Any]) -> None:
        self.request = request  # and not through `super`: this is on every request's way
        self.is_last = False
        self._adds_headers = tracer.response_headers
        self._token = None
        self._keeps_body = tracer.keeps_response_body
        self._trailers = False
        if tracer.keeps_request_body:
            request.request_body = Tee(*content_of(scope.get("headers") or ()))

    @guarded()
    def sending(self, message: Message) -> Message | None:
        """Look at a message before it is sent; return the one to be sent instead, if there is one."""
        kind = message["type"]
        request = self.request
        if kind == "http.response.body":
            body = message.get("body") or b""
            request.body_sent(len(body))
            if request.response_body is not None:
                request.response_body.add(body)
            is_last = not message.get("more_body", False) and not self._trailers
        elif kind == "http.response.start":
            return self._started(message)
        elif kind == "http.response.trailers":
            is_last = not message.get("more_trailers", False)
        elif kind == "http.response.zerocopysend":
            is_last = not message.get("more_body", False) and not self._trailers
        else:
            is_last = kind == "http.response.pathsend"
        if is_last:
            self.is_last = True
            if request.mode == "adopted":  # its owner ends it with this message: what we know has to be on it
                request.completing()
        return None

    def _started(self, message: Message) -> Message | None:
        request = self.request
        self._trailers = bool(message.get("trailers", False))
        request.response_started(int(message["status"]))
        if self._keeps_body:
            request.response_body = Tee(*content_of(headers_of(message)))
        return with_headers(request, message) if self._adds_headers else None

    @guarded()
    def received(self, message: Message) -> None:
        """Look at a message that the application receives."""
        if message["type"] == "http.disconnect":
            self.request.client_left()
        elif self.request.request_body is not None:
            self.request.request_body.add(message.get("body"))


class Socket(Connection):
    """One WebSocket connection: its handshake, how much passed, and how it was closed."""

    __slots__ = ("_received", "_sent", "_accepted", "_opened", "_code")

    def __init__(self, request: RequestTrace, tracer: RequestTracer) -> None:
        super().__init__(request, tracer)
        self._received = 0
        self._sent = 0
        self._accepted = False
        self._opened = perf_counter_ns()
        self._code: int | None = None

    @guarded()
    def received(self, message: Message) -> None:
        """Look at a message that the application receives."""
        kind = message["type"]
        if kind == "websocket.receive":
            self._received += 1
        elif kind == "websocket.disconnect":
            self._close(message.get("code", NO_CODE), message.get("reason"))

    @guarded()
    def sending(self, message: Message) -> Message | None:
        """Look at a message before it is sent; return the one to be sent instead, if there is one."""
        kind = message["type"]
        request = self.request
        if kind == "websocket.send":
            self._sent += 1
        elif kind == "websocket.accept":
            self._accepted = True
            request.response_started(101)
            elapsed = (perf_counter_ns() - self._opened) / 1e6
            request.record.attributes["tracemw.websocket.accept_ms"] = round(elapsed, 3)
            return with_headers(request, message) if self._adds_headers else None
        elif kind == "websocket.http.response.start":
            request.response_started(int(message["status"]))
            return with_headers(request, message) if self._adds_headers else None
        elif kind == "websocket.http.response.body":
            self._denied(message)
        elif kind == "websocket.close":
            if not self._accepted and request.status is None:
                request.response_started(403)  # as the specification has it
            self._close(message.get("code", 1000) if self._accepted else None, message.get("reason"))
        return None

    def _denied(self, message: Message) -> None:
        self.request.body_sent(len(message.get("body") or b""))
        if not message.get("more_body", False):
            self._close(None, None)

    def _close(self, code: Any, reason: Any) -> None:
        """Take note of the end of the connection; the first one counts."""
        request = self.request
        if request.gone_at:
            return
        attributes = request.record.attributes
        if self._accepted or code is not None:
            self._code = NO_CODE if code is None else int(code)
            attributes["tracemw.websocket.close_code"] = self._code
            if reason:
                attributes["tracemw.websocket.close_reason"] = str(reason)[:MAX_REASON]
            if self._code == ABNORMAL_CLOSE:
                request.client_left()
            elif self._code in FAILED_CLOSES:
                request.failure = f"websocket_close_{self._code}"
        self._tell_messages()
        request.closed()

    def _tell_messages(self) -> None:
        attributes = self.request.record.attributes
        attributes["tracemw.websocket.messages_received"] = self._received
        attributes["tracemw.websocket.messages_sent"] = self._sent

    @guarded()
    def left(self, exc: BaseException) -> None:
        """Take note of an exception that left the application.

        `WebSocketDisconnect` is how Starlette tells the application of the end, whatever its code.
        """
        if self._code is None or type(exc).__name__ != "WebSocketDisconnect":
            self.request.left(exc)

    def _end(self) -> None:
        self._tell_messages()
        if self._accepted and not self.request.gone_at:  # the server closes the connection then
            self.request.closed()
        self.request.end()


def with_headers(request: RequestTrace | UnrecordedRequest, message: Message) -> Message:
    """Return the message with our headers, where the application has not set them."""
    present = headers_of(message)
    names = [name.lower() for name, _ in present]
    ours = _our_headers(request.record)
    added = [header for header in ours if header[0] not in names]
    if b"server-timing" in names and not _has_timing(present):
        added += [header for header in ours if header[0] == b"server-timing"]
    return {**message, "headers": [*present, *added]}


@guarded()
def sending_unrecorded(request: UnrecordedRequest, message: Message, scope: Mapping[str, Any]) -> Message | None:
    """Look at a message of a request that is not recorded: its response gets the request's id, and no more."""
    if message["type"] not in _BEGIN:
        return None
    request.status = message.get("status", 101)
    request.resolve_user(scope)
    if not request.resolver.response_headers or (request_id := request.client_request_id) is None:
        return None
    present = headers_of(message)
    for name, _ in present:
        if name.lower() == _REQUEST_ID:
            return None
    return {**message, "headers": [*present, (_REQUEST_ID, request_id.encode("latin-1", "replace"))]}


def _has_timing(headers: Any) -> bool:
    """True where the header, which is a list and may be repeated, has the entry `traceparent` already."""
    return any(name.lower() == b"server-timing" and b"traceparent" in value for name, value in headers)


def _our_headers(record: TraceRecord) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell a response's ids."""
    headers = []
    if (request_id := record.client_request_id) is not None:
        headers.append((_REQUEST_ID, request_id.encode("latin-1", "replace")))
    if record.recording:
        trace_id = b"%032x" % record.trace_id
        headers.append((b"x-trace-id", b"tr-" + trace_id))
        headers.append((b"server-timing", b'traceparent;desc="00-%b-%016x-01"' % (trace_id, record.root_span_id)))
    return headers


def headers_of(message: Message) -> Any:
    """Return the headers of a message; an iterator in their place becomes a list, so that it is not used up."""
    headers = message.get("headers") or ()
    if not isinstance(headers, (list, tuple)):
        message["headers"] = headers = list(headers)
    return headers
