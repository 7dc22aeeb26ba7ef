"""The ASGI middleware: the protocol only. What a request's trace is, `request` knows.

One trace per request, from the call to the last part of the response; background tasks run on after that.
Specification: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, overload

from opentelemetry import context as otel_context

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.errors import SettingError
from tracemw.exchange import Connection, Exchange, Message, Socket, sending_unrecorded
from tracemw.guard import guarded, tracing_is_off
from tracemw.opening import METHODS, AnyRequest, RequestTracer, method_attributes
from tracemw.pipeline import current as pipeline
from tracemw.record import current_record, with_record
from tracemw.request import KEY
from tracemw.unrecorded import UnrecordedRequest

_collected = False  # the garbage of starting up

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


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
        self._covered_by: Any = None  # whoever opens the traces of our requests and needs nothing from us
        try:
            config.settings().for_application(options)
            config.process_metadata()
            config.install_exit_hooks()
            config.import_parts()
        except SettingError as exc:
            if not _built_by_framework():
                raise
            tracing_is_off(exc)
            self._active = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope.get("type")
        if not self._active or kind not in ("http", "websocket", "lifespan"):
            await self.app(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif (outer := scope.get(KEY)) is not None and not (outer.ended and outer.is_over()):
            await self._enrich(outer, scope, receive, send)
        elif (opened := self._open(scope)) is None:
            await self.app(scope, receive, send)
        elif isinstance(opened, Connection):
            await self._serve(opened, scope, receive, send)
        else:
            await self._pass_on(opened, scope, receive, send)

    async def _serve(self, connection: Connection, scope: Scope, receive: Receive, send: Send) -> None:
        request = connection.request

        async def traced_send(message: Message) -> None:
            message = connection.sending(message) or message
            try:
                await send(message)
            except OSError:  # how a server says that nobody is there any more (ASGI, version 2.4)
                request.client_left()
                raise
            if connection.is_last:
                connection.is_last = False
                request.completed()

        async def traced_receive() -> Message:
            message = await receive()
            connection.received(message)
            return message

        connection.enter()
        try:
            await self.app(scope, traced_receive, traced_send)
        except BaseException as exc:
            connection.left(exc)
            raise
        finally:
            connection.leave()

    async def _pass_on(self, request: UnrecordedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection that is not recorded: nothing but the beginning of its response is looked at.

        Its context is attached already.
        """

        def telling_send(message: Message) -> Awaitable[None]:
            if request.status is None:
                message = sending_unrecorded(request, message, scope) or message
            return send(message)

        try:
            await self.app(scope, receive, telling_send)
        except GeneratorExit:
            request.dropped()
            raise
        finally:
            request.leave()

    async def _enrich(self, request: AnyRequest, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose trace is open already; exceptions are seen here before they are handled."""
        if request.resolver is not self._covered_by:
            self._join(request, scope)
        token = self._restore(request)
        try:
            await self.app(scope, receive, send)
        except BaseException as exc:
            request.raised(exc)
            raise
        finally:
            if token is not None:
                otel_context.detach(token)

    @guarded()
    def _restore(self, request: AnyRequest) -> Any:
        """Put the trace's record back into a context that a framework has begun anew for its own span."""
        if current_record() is request.record:
            return None
        return otel_context.attach(with_record(otel_context.get_current(), request.record))

    @guarded()
    def _join(self, request: AnyRequest, scope: Scope) -> None:
        self._prepare(scope)
        if self._options.get("user") is None and not self._attached.knows_more_than(request.resolver.adapter):
            self._covered_by = request.resolver
            return
        tracer = self._tracer_now(scope)
        if tracer is not None:
            request.also_known_to(tracer, scope)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._prepare(scope)

        async def looking_send(message: Message) -> None:
            kind = message["type"]
            if kind == "lifespan.startup.complete":
                self._make_ready(scope)
            elif kind in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                _flush()
            await send(message)

        await self.app(scope, receive, looking_send)

    @guarded()
    def _make_ready(self, scope: Scope) -> None:
        """Make what the first request needs: this process serves, and the application has set itself up."""
        if self._active and self._compile(scope) is not None:
            pipeline()
            _collect_garbage()

    @guarded()
    def _open(self, scope: Scope) -> Connection | UnrecordedRequest | None:
        tracer = self._tracer_now(scope)
        if tracer is None:
            return None
        values = tracer.identity.values_in_asgi(scope.get("headers") or ())
        method = "WS" if scope["type"] == "websocket" else scope.get("method", "")
        client = scope.get("client")
        request = tracer.open(
            scope, values, method, scope.get("path", ""), _attributes, client[0] if client else None
        )
        if request.mode == "joined" or (tracer.is_global and request.mode != "adopted"):
            # A framework inside of us that traces itself would open a second root with the same provider.
            scope.setdefault("fastapi.telemetry", None)
        if isinstance(request, UnrecordedRequest):
            request.token = otel_context.attach(request.new_context())
            return request
        self._attached.keep_prepared()
        return Exchange(request, tracer, scope) if method != "WS" else Socket(request, tracer)

    def _tracer_now(self, scope: Scope) -> RequestTracer | None:
        if self._tracer is None or self._generation != config.generation():
            return self._compile(scope)
        return self._tracer

    def _compile(self, scope: Scope) -> RequestTracer | None:
        """Make the tracer of the settings that are in force now; None where nothing is to be traced here."""
        generation = config.generation()
        if not config.enabled():
            return None
        self._prepare(scope)
        if not self._active:  # another instance has taken over
            return None
        settings = config.settings().for_application(self._options)
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


def _attributes(scope: Scope) -> dict[str, Any]:
    """Return the root's attributes, in the names of OpenTelemetry's semantic conventions."""
    method = scope.get("method", "GET")  # a WebSocket has none and begins with a GET
    attributes = {
        "http.request.method": method,
        "url.scheme": scope.get("scheme", "http"),
        "url.path": scope.get("path", ""),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if method not in METHODS:
        attributes.update(method_attributes(method))
    if client := scope.get("client"):
        attributes["client.address"] = client[0]
    if server := scope.get("server"):
        attributes["server.address"] = server[0]
        if server[1] is not None:
            attributes["server.port"] = server[1]
    if query := scope.get("query_string"):
        attributes["url.query"] = query.decode("latin-1")
    return attributes


def _collect_garbage() -> None:
    """Collect what starting up has left, once: else Python does so within the first few thousand requests.

    A trace lives as long as its context, which asyncio's cancelled timers keep for a while. Of what lives longer
    than a moment Python expects that it stays, and looks through everything there is when that is a quarter of it,
    counted from the last time: a pause of 20 to 60 ms for a small application.
    """
    global _collected
    if not _collected and gc.isenabled():
        _collected = True
        gc.collect()


@guarded()
def _flush() -> None:
    config.flush(config.EXIT_FLUSH, delivered=False)


def _built_by_framework() -> bool:
    """True where a framework is building its stack of middleware, which it does with the first request."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "build_middleware_stack":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
