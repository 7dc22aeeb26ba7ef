"""The WSGI middleware: the protocol only. What a request's trace is, `request` knows.

Every request runs in a `contextvars.Context` of its own, which is entered again for each part of the body and
for `close()`, on whichever thread that happens; nothing leaks into the next request of the thread.
Specification: PEP 3333.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from opentelemetry import context as otel_context

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.bodies import Tee, TeeInput, content_type
from tracemw.guard import guarded
from tracemw.opening import RequestTracer
from tracemw.request import KEY, RequestTrace

Environ = MutableMapping[str, Any]
StartResponse = Callable[..., Any]
WSGIApp = Callable[..., Iterable[bytes]]  # environ and start_response, which everybody types in another way


class WSGITraceMiddleware:
    """Traces every request of a WSGI application.

    A request that is traced already, by another instance or by an instrumentation outside, gets our facts on
    that trace.

    Args:
        app: The application: `app.wsgi_app = WSGITraceMiddleware(app.wsgi_app)`, or any WSGI callable.
        **options: Settings that hold for this application only; see the settings page.

    Raises:
        SettingError: An option is unknown or not allowed.
    """

    def __init__(self, app: WSGIApp, **options: Any) -> None:
        config.settings().override(options)
        config.process_metadata()
        config.install_exit_hooks()
        self.app = app
        self._options = options
        self._tracer: RequestTracer | None = None
        self._generation = -1
        self._attached = Attached(options.get("adapter"))

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        outer = environ.get(KEY)
        if outer is not None:
            return self._enrich(outer, environ, start_response)
        request = self._open(environ)
        if request is None:
            return self.app(environ, start_response)
        assert self._tracer is not None  # it opened the request
        response = _Response(request, contextvars.copy_context(), self._tracer)
        return response.run(self.app, environ, start_response)

    def _enrich(
        self, request: RequestTrace, environ: Environ, start_response: StartResponse
    ) -> Iterable[bytes]:
        self._prepare()
        if self._attached.adapter is not None:
            request.also_known_to(self._attached, environ)
        try:
            return self.app(environ, start_response)
        except BaseException as exc:
            request.raised(exc)
            raise

    @guarded()
    def _open(self, environ: Environ) -> RequestTrace | None:
        if not config.enabled():
            return None
        tracer = self._tracer
        if tracer is None or self._generation != config.generation():
            tracer = self._compile()
        self._attached.keep_prepared()
        identity = tracer.identity.from_environ(environ)
        path = _wsgi_text(environ.get("SCRIPT_NAME", "")) + _wsgi_text(environ.get("PATH_INFO", ""))
        protocol = environ.get("SERVER_PROTOCOL", "HTTP/1.1")
        attributes: dict[str, Any] = {
            "url.scheme": environ.get("wsgi.url_scheme", "http"),
            "url.path": path,
            "network.protocol.version": protocol.rpartition("/")[2],
        }
        peer = environ.get("REMOTE_ADDR")
        if peer:
            attributes["client.address"] = peer
        if name := environ.get("SERVER_NAME"):
            attributes["server.address"] = name
        if (port := environ.get("SERVER_PORT", "")).isdigit():
            attributes["server.port"] = int(port)
        if query := environ.get("QUERY_STRING"):
            attributes["url.query"] = query
        return tracer.open(environ, identity, environ.get("REQUEST_METHOD", ""), path, attributes, peer)

    def _compile(self) -> RequestTracer:
        """Make the tracer of the settings that are in force now."""
        generation = config.generation()
        self._prepare()
        settings = config.settings().override(self._options)
        provider.tracer()
        self._tracer = RequestTracer(settings, self._attached.if_found())
        self._generation = generation
        return self._tracer

    @guarded()
    def _prepare(self) -> None:
        self._attached.find(self.app)
        self._attached.keep_prepared()


class _Response:
    """One response on its way: runs the application and its body in the request's context."""

    __slots__ = ("request", "_context", "_headers", "_keeps_request_body", "_keeps_response_body", "_entered")

    def __init__(self, request: RequestTrace, context: contextvars.Context, tracer: RequestTracer) -> None:
        self.request = request
        self._context = context
        self._headers = tracer.response_headers
        self._keeps_request_body = tracer.keeps_request_body and request.record.recording
        self._keeps_response_body = tracer.keeps_response_body and request.record.recording
        self._entered = False

    def run(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application and wrap what it answers."""
        request = self.request
        if self._keeps_request_body:
            self._tee_input(environ)
        try:
            body = self.inside(self._call, app, environ, start_response)
        except BaseException as exc:
            request.raised(exc)
            request.end()
            raise
        wrapped: Iterable[bytes] | None = self._wrap(body, environ)
        return body if wrapped is None else wrapped

    def inside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the request's context, on this thread.

        A context can be entered once at a time; a second thread (a `close()` while a part is being made)
        gets a copy.
        """
        if self._entered:
            return self._context.copy().run(function, *args)
        self._entered = True
        try:
            return self._context.run(function, *args)
        finally:
            self._entered = False

    def _call(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        otel_context.attach(self.request.context)  # never detached: this context ends with the request

        def traced_start_response(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            ours = self._started(status, headers)
            write = start_response(status, headers if ours is None else ours, *exc_info)
            return self._counting(write)

        return app(environ, traced_start_response)

    @guarded()
    def _started(self, status: str, headers: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
        self.request.response_started(int(status[:3]))
        if self._keeps_response_body:
            self.request.response_body = Tee(content_type(headers))
        if not self._headers:
            return None
        present = {name.lower() for name, _ in headers}
        ours = [(n.decode().title(), v.decode("latin-1")) for n, v in self.request.response_headers()]
        return [*headers, *(header for header in ours if header[0].lower() not in present)]

    def _counting(self, write: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """Wrap the `write` callable of old applications, so that what it sends counts."""

        def counting_write(data: bytes) -> Any:
            self.sent(data)
            return write(data)

        return counting_write

    @guarded()
    def sent(self, part: Any) -> None:
        """Take note of a part of the body."""
        self.request.body_sent(len(part))
        if self.request.response_body is not None:
            self.request.response_body.add(part)

    @guarded()
    def _tee_input(self, environ: Environ) -> None:
        tee = self.request.request_body = Tee(environ.get("CONTENT_TYPE", ""))
        environ["wsgi.input"] = TeeInput(environ["wsgi.input"], tee)

    @guarded()
    def _wrap(self, body: Any, environ: Environ) -> Iterable[bytes] | None:
        file_wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(file_wrapper, type) and isinstance(body, file_wrapper):
            return self._wrap_file(body)
        return _SizedBody(self, body) if hasattr(body, "__len__") else _Body(self, body)

    def _wrap_file(self, body: Any) -> Iterable[bytes]:
        """Leave a file to the server as it is, which may hand it to the kernel; the root ends at `close()`."""
        close = getattr(body, "close", None)

        def closing() -> None:
            try:
                if close is not None:
                    self.inside(close)
            finally:
                self.request.end()

        try:
            body.close = closing
        except AttributeError:
            self.request.end()
        return body  # type: ignore[no-any-return]


class _Body:
    """The body of a response; the request ends when the server closes it, or drops it."""

    __slots__ = ("_response", "_iterable", "_iterator", "_exhausted", "_closed")

    def __init__(self, response: _Response, iterable: Iterable[bytes]) -> None:
        self._response = response
        self._iterable = iterable
        self._iterator: Iterator[bytes] | None = None
        self._exhausted = False
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        response = self._response
        try:
            if self._iterator is None:
                self._iterator = response.inside(iter, self._iterable)
            part: bytes = response.inside(next, self._iterator)
        except StopIteration:
            self._exhausted = True
            response.request.note_end()
            raise
        except BaseException as exc:
            self._exhausted = True
            response.request.raised(exc)
            raise
        response.sent(part)
        return part

    def close(self) -> None:
        """Close the application's iterable, once, and end the request."""
        if self._closed:
            return
        self._closed = True
        close = getattr(self._iterable, "close", None)
        try:
            if close is not None:
                self._response.inside(close)
        except BaseException as exc:
            self._response.request.raised(exc)
            raise
        finally:
            self._end()

    def __del__(self) -> None:
        if not self._closed:  # dropped by a server that does not close what it iterates
            self._closed = True
            self._end()

    @guarded()
    def _end(self) -> None:
        request = self._response.request
        if not self._exhausted and not request.may_be_empty:
            request.disconnected = True
        request.end()


class _SizedBody(_Body):
    """A body whose length the server may look at, to set Content-Length (wsgiref, mod_wsgi)."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


def _wsgi_text(value: str) -> str:
    """Return the text behind a WSGI string, which holds bytes as latin-1 (PEP 3333)."""
    if value.isascii():
        return value
    return value.encode("latin-1", "replace").decode("utf-8", "replace")
