"""The ASGI middleware: the protocol only. What a request's trace is, `request` knows.

One trace per request, from the call to the last part of the response; background tasks run on after that.
Specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, overload

from opentelemetry import context as otel_context

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.bodies import Tee, content_type
from tracemw.errors import SettingError
from tracemw.guard import guarded
from tracemw.opening import RequestTracer
from tracemw.request import KEY, RequestTrace

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("tracemw")


class TraceMiddleware:
    """Traces every request of an ASGI application.

    It stands anywhere: around the application, or in its middleware stack (`app.add_middleware`). A request
    that is traced already, by another instance or by the framework itself, gets our facts on that trace.

    Args:
        app: The application.
        **options: Settings that hold for this application only; see the settings page.

    Raises:
        SettingError: An option is unknown or not allowed. Inside a stack that the framework builds when the
            first request comes, it is logged instead, and nothing is traced.
    """

    # Starlette's type of middleware wants `app` without a name, its older versions pass it by name.
    @overload
    def __init__(self, app: ASGIApp, /, **options: Any) -> None: ...
    @overload
    def __init__(self, *, app: ASGIApp, **options: Any) -> None: ...
    def __init__(self, app: ASGIApp, **options: Any) -> None:  # type: ignore[misc]  # no option is called app
        self.app = app
        self._options = options
        self._tracer: RequestTracer | None = None
        self._generation = -1
        self._attached = Attached(options.get("adapter"))
        self._active = True
        try:
            config.settings().override(options)
            config.process_metadata()
            config.install_exit_hooks()
        except SettingError as exc:
            if not _built_by_framework(app):
                raise
            logger.error("tracing is off: %s", exc)
            self._active = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if not self._active or kind not in ("http", "websocket", "lifespan"):
            await self.app(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif KEY in scope:
            await self._enrich(scope[KEY], scope, receive, send)
        else:
            request = self._open(scope)
            if request is None:
                await self.app(scope, receive, send)
            elif kind == "http":
                await self._http(request, scope, receive, send)
            else:
                await self._websocket(request, scope, receive, send)

    async def _http(self, request: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        trailers = False
        tracer = self._tracer
        assert tracer is not None  # it opened the request
        headers, keep_body = tracer.response_headers, tracer.keeps_response_body
        if tracer.keeps_request_body and request.record.recording:
            request.request_body = Tee(content_type(scope.get("headers") or ()))

        async def traced_send(message: Message) -> None:
            nonlocal trailers
            kind = message["type"]
            if kind == "http.response.start":
                trailers = bool(message.get("trailers", False))
                await send(_response_started(request, message, headers, keep_body) or message)
                return
            if kind == "http.response.body":
                _body_sent(request, message)
            if not _is_last(message, kind, trailers):
                await send(message)
            elif request.status is not None and request.status < 500:
                if request.adopted:  # its owner ends it inside `send`; what we know has to be on it by then
                    request.settle()
                await send(message)
                request.end()
            else:  # the exception behind a server error comes when its response has gone: the root waits for it
                request.note_end()
                await send(message)

        async def traced_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                request.disconnected = True
            elif request.request_body is not None:
                request.request_body.add(message.get("body"))
            return message

        token = otel_context.attach(request.context)
        try:
            await self.app(scope, traced_receive, traced_send)
        except BaseException as exc:
            request.raised(exc)
            raise
        finally:
            if not request.ended:
                request.end()
            otel_context.detach(token)

    async def _websocket(self, request: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        socket = _Socket(request)

        async def traced_receive() -> Message:
            message = await receive()
            socket.received(message)
            return message

        async def traced_send(message: Message) -> None:
            message = socket.sending(message) or message
            await send(message)

        token = otel_context.attach(request.context)
        try:
            await self.app(scope, traced_receive, traced_send)
        except BaseException as exc:
            request.raised(exc)
            raise
        finally:
            socket.close()
            request.end()
            otel_context.detach(token)

    async def _enrich(self, request: RequestTrace, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose trace is open already; exceptions are seen here before they are handled."""
        self._prepare(scope)
        if self._attached.adapter is not None:
            request.also_known_to(self._attached, scope)
        try:
            await self.app(scope, receive, send)
        except BaseException as exc:
            request.raised(exc)
            raise

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._prepare(scope)

        async def flushing_send(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                _flush_at_shutdown()
            await send(message)

        await self.app(scope, receive, flushing_send)

    @guarded()
    def _open(self, scope: Scope) -> RequestTrace | None:
        if not config.enabled():
            return None
        tracer = self._tracer
        if tracer is None or self._generation != config.generation():
            tracer = self._compile(scope)
            if not self._active:  # another instance has taken over
                return None
        self._attached.keep_prepared()
        if "fastapi.telemetry" not in scope and provider.is_joined_now():
            # We stand outside of a framework that would open a second root: one trace per request.
            scope["fastapi.telemetry"] = None
        identity = tracer.identity.from_asgi(scope.get("headers") or ())
        attributes: dict[str, Any] = {
            "url.scheme": scope.get("scheme", "http"),
            "url.path": scope.get("path", ""),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        client, server = scope.get("client"), scope.get("server")
        if client:
            attributes["client.address"] = client[0]
        if server:
            attributes["server.address"] = server[0]
            if server[1] is not None:
                attributes["server.port"] = server[1]
        if query := scope.get("query_string"):
            attributes["url.query"] = query.decode("latin-1")
        method = "WS" if scope["type"] == "websocket" else scope.get("method", "")
        return tracer.open(
            scope, identity, method, scope.get("path", ""), attributes, client[0] if client else None
        )

    def _compile(self, scope: Scope) -> RequestTracer:
        """Make the tracer of the settings that are in force now."""
        generation = config.generation()
        self._prepare(scope)
        settings = config.settings().override(self._options)
        provider.tracer()
        self._tracer = RequestTracer(settings, self._attached.if_found())
        self._generation = generation
        return self._tracer

    @guarded()
    def _prepare(self, scope: Scope) -> None:
        """Find the adapter; the framework names its application in the scope when we are a part of its stack."""
        app = scope.get("app")
        if self._attached.find(app if app is not None else self.app):
            self._active = not self._attached.place(self, self._options)
        self._attached.keep_prepared()


class _Socket:
    """What happened on one WebSocket connection."""

    __slots__ = ("_request", "_received", "_sent", "_accepted", "_opened", "_code", "_reason")

    def __init__(self, request: RequestTrace) -> None:
        self._request = request
        self._received = 0
        self._sent = 0
        self._accepted = False
        self._opened = perf_counter_ns()
        self._code: int | None = None
        self._reason: str | None = None

    @guarded()
    def received(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.receive":
            self._received += 1
        elif kind == "websocket.disconnect" and self._code is None:
            self._closed(message.get("code", 1005), message.get("reason"))

    @guarded()
    def sending(self, message: Message) -> Message | None:
        kind = message["type"]
        request = self._request
        if kind == "websocket.send":
            self._sent += 1
        elif kind == "websocket.accept":
            self._accepted = True
            request.response_started(101)
            elapsed = (perf_counter_ns() - self._opened) / 1e6
            request.record.attributes["tracemw.websocket.accept_ms"] = round(elapsed, 3)
            return _with_headers(request, message)
        elif kind == "websocket.http.response.start":
            request.response_started(int(message["status"]))
            return _with_headers(request, message)
        elif kind == "websocket.close":
            if not self._accepted:
                request.response_started(403)
            elif self._code is None:
                self._closed(message.get("code", 1000), message.get("reason"))
        return None

    def _closed(self, code: Any, reason: Any) -> None:
        self._code = int(code) if code is not None else 1005
        self._reason = str(reason) if reason else None
        if self._code == 1006:
            self._request.disconnected = True

    @guarded()
    def close(self) -> None:
        """Put what happened onto the trace."""
        attributes = self._request.record.attributes
        attributes["tracemw.websocket.messages_received"] = self._received
        attributes["tracemw.websocket.messages_sent"] = self._sent
        if self._code is not None:
            attributes["tracemw.websocket.close_code"] = self._code
            if self._reason:
                attributes["tracemw.websocket.close_reason"] = self._reason[:250]
            if self._code in _FAILED_CLOSES:
                self._request.failed = True


# RFC 6455 §7.4.1: protocol errors and a failed server; 1000 and 1001 are how connections end.
_FAILED_CLOSES = frozenset({1002, 1003, 1007, 1009, 1010, 1011, 1012, 1013, 1014, 1015})


@guarded()
def _response_started(
    request: RequestTrace, message: Message, headers: bool, keep_body: bool
) -> Message | None:
    request.response_started(int(message["status"]))
    if keep_body and request.record.recording:
        request.response_body = Tee(content_type(message.get("headers") or ()))
    return _with_headers(request, message) if headers else None


def _with_headers(request: RequestTrace, message: Message) -> Message:
    """Return the message with our headers, where the application has not set them."""
    present = list(message.get("headers") or ())
    ours = request.response_headers()
    names = [bytes(name).lower() for name, _ in present]
    present += [header for header in ours if header[0] not in names]
    return {**message, "headers": present}


@guarded()
def _body_sent(request: RequestTrace, message: Message) -> None:
    body = message.get("body") or b""
    request.body_sent(len(body))
    if request.response_body is not None:
        request.response_body.add(body)


def _is_last(message: Message, kind: str, trailers: bool) -> bool:
    if kind == "http.response.body":
        return not message.get("more_body", False) and not trailers
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    return kind == "http.response.pathsend" or (
        kind == "http.response.zerocopysend" and not message.get("more_body", False)
    )


@guarded()
def _flush_at_shutdown() -> None:
    config.flush(config.EXIT_FLUSH, delivered=False)


def _built_by_framework(app: Any) -> bool:
    """True where the application wrapped is a part of a framework's stack, which is built while serving."""
    return type(app).__module__.partition(".")[0] in ("starlette", "fastapi") and type(app).__name__ not in (
        "FastAPI",
        "Starlette",
    )
