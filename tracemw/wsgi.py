"""The WSGI middleware: the protocol only. What a request's trace is, `request` knows.

Specification: PEP 3333.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

from tracemw import config, provider
from tracemw.adapting import Attached
from tracemw.bodies import Tee, TeeInput, content_of
from tracemw.guard import guarded
from tracemw.isolation import Isolated, Parts, SizedParts
from tracemw.opening import METHODS, AnyRequest, RequestTracer, method_attributes
from tracemw.record import TraceRecord
from tracemw.request import KEY, RequestTrace
from tracemw.unrecorded import UnrecordedRequest

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
        config.settings().for_application(options)
        config.process_metadata()
        config.install_exit_hooks()
        config.import_parts()
        self.app = app
        self._options = options
        self._tracer: RequestTracer | None = None
        self._generation = -1
        self._attached = Attached(options.get("adapter"))

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        outer = environ.get(KEY)
        if outer is not None and not (outer.ended and outer.is_over()):
            return self._enrich(outer, environ, start_response)
        response = self._open(environ)
        if response is None:
            return self.app(environ, start_response)
        return response.run(self.app, environ, start_response)

    def _enrich(self, request: AnyRequest, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self._join(request, environ)
        try:
            return self.app(environ, start_response)
        except BaseException as exc:
            request.raised(exc)
            raise

    @guarded()
    def _join(self, request: AnyRequest, environ: Environ) -> None:
        self._prepare()
        if self._attached.adapter is not None or self._options.get("user") is not None:
            tracer = self._tracer_now()
            if tracer is not None:
                request.also_known_to(tracer, environ)

    @guarded()
    def _open(self, environ: Environ) -> _Response | _Unrecorded | None:
        tracer = self._tracer_now()
        if tracer is None:
            return None
        request = tracer.open(
            environ,
            tracer.identity.values_in_environ(environ),
            environ.get("REQUEST_METHOD", ""),
            _path(environ),
            _attributes,
            environ.get("REMOTE_ADDR"),
        )
        if isinstance(request, UnrecordedRequest):
            return _Unrecorded(request, environ)
        self._attached.keep_prepared()
        return _Response(request, tracer, environ)

    def _tracer_now(self) -> RequestTracer | None:
        if self._tracer is None or self._generation != config.generation():
            return self._compile()
        return self._tracer

    def _compile(self) -> RequestTracer | None:
        """Make the tracer of the settings that are in force now; None where nothing is to be traced."""
        generation = config.generation()
        if not config.enabled():
            return None
        self._prepare()
        settings = config.settings().for_application(self._options)
        provider.tracer()
        self._tracer = RequestTracer(settings, self._attached.if_found())
        self._generation = generation
        return self._tracer

    @guarded()
    def _prepare(self) -> None:
        self._attached.find(self.app)
        self._attached.keep_prepared()


class _Response(Isolated):
    """One response on its way."""

    __slots__ = ("request", "_tracer", "_promised")

    def __init__(self, request: RequestTrace, tracer: RequestTracer, environ: Environ) -> None:
        super().__init__(request.context, environ)
        self.request = request
        self._tracer = tracer
        self._promised = 0  # the response's Content-Length

    def run(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application and wrap what it answers."""
        request = self.request
        self._prepare(environ)
        try:
            body = self.inside(self._call, app, environ, start_response)
        except BaseException as exc:
            self.failed(exc)
            raise
        wrapped = self._wrap(body, environ)
        if wrapped is None:  # what becomes of it cannot be seen
            request.exhausted()
            return body  # type: ignore[no-any-return]
        return wrapped

    def _call(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.enter()

        # The third one is called `exc_info` by every server, though PEP 3333 leaves its name open.
        def traced_start_response(status: str, headers: Any, *exc_info: Any, **named: Any) -> Any:
            write = start_response(status, self._with_headers(headers) or headers, *exc_info, **named)
            self._started(status, headers, exc_info[0] if exc_info else named.get("exc_info") if named else None)
            return partial(self._write, write)

        return app(environ, traced_start_response)

    @guarded()
    def _prepare(self, environ: Environ) -> None:
        """Have the application use our copies of what the server gave it, where we have to know what it does."""
        request = self.request
        if self._tracer.keeps_request_body:
            tee = request.request_body = Tee(
                environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "")
            )
            environ["wsgi.input"] = TeeInput(environ["wsgi.input"], tee)
        self.note_files(environ)

    @guarded()
    def _with_headers(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
        """Return the headers with ours, where the application has not set them; None to leave them."""
        if not self._tracer.response_headers or not isinstance(headers, list):
            return None
        present = [name.lower() for name, _ in headers]
        ours = _our_headers(self.request.record)
        added = [header for header in ours if header[0].lower() not in present]
        if "server-timing" in present and not _has_timing(headers):
            added += [header for header in ours if header[0] == "Server-Timing"]
        return [*headers, *added]

    @guarded()
    def _started(self, status: str, headers: list[tuple[str, str]], exc_info: Any) -> None:
        request = self.request
        request.response_started(int(status[:3]))
        length = next((value for name, value in headers if name.lower() == "content-length"), "")
        self._promised = int(length) if length.isdecimal() else 0
        if exc_info:  # of the exception that the application is answering
            request.raised(exc_info[1])
        if self._tracer.keeps_response_body:
            request.response_body = Tee(*content_of(headers))

    def _write(self, write: Callable[[bytes], Any], data: bytes) -> Any:
        """What old applications get from `start_response`: sends a part at once."""
        self.sent(data)
        return write(data)

    @guarded()
    def sent(self, part: Any) -> None:
        """Take note of a part of the body."""
        request = self.request
        request.body_sent(len(part))
        if request.response_body is not None:
            request.response_body.add(part)
        if 0 < self._promised <= request.size:  # test clients do not ask for more, and may never close it
            request.exhausted()

    @guarded()
    def failed(self, exc: BaseException) -> None:
        """Take note of an exception that left the application, and end the root.

        A server keeps the headers until the first part of the body (PEP 3333), and answers by itself here.
        """
        request = self.request
        if isinstance(exc, Exception) and not (request.chunks or request.ended):
            request.status = None
        request.left(exc)
        request.end()

    @guarded()
    def _wrap(self, body: Any, environ: Environ) -> Iterable[bytes] | None:
        if self.is_file(body, environ):
            return self._wrap_file(body)
        return _SizedBody(self, body) if hasattr(body, "__len__") else _Body(self, body)

    def _wrap_file(self, body: Any) -> Iterable[bytes] | None:
        """Leave a file to the server as it is, which may hand it to the kernel; the root ends at `close()`.

        Where even that cannot be seen (uWSGI's own objects), it ends now.
        """
        close = getattr(body, "close", None)
        request = self.request
        request.body_sent(self._promised)
        file = getattr(body, "filelike", None) or getattr(body, "file", None)  # gunicorn, wsgiref; waitress
        start = _position(file)

        def closing() -> None:
            self._stopped_at(_position(file) - start)
            try:
                if close is not None:
                    self.inside(close)
            finally:
                request.exhausted()

        try:
            body.close = closing
        except AttributeError:
            return None
        return body  # type: ignore[no-any-return]

    @guarded()
    def _stopped_at(self, read: int) -> None:
        """Take note that the client left where a file was read, but not to its end.

        One that was not read at all may have been sent by its descriptor (older gunicorns).
        """
        if 0 < read < self._promised:
            self.request.size = read
            self.request.client_left()
            self.request.end()


def _position(file: Any) -> int:
    try:
        return int(file.tell())
    except Exception:  # none, no file, or a pipe
        return 0


class _Unrecorded(Isolated):
    """A request that is not recorded: its response gets one header."""

    __slots__ = ("request",)

    def __init__(self, request: UnrecordedRequest, environ: Environ) -> None:
        super().__init__(request.new_context(), environ)
        self.request = request

    def run(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application and wrap a body whose parts are made later."""
        self._prepare(environ)
        try:
            body = self.inside(self._call, app, environ, start_response)
        except BaseException:
            self.left()
            raise
        wrapped = self._wrap(body, environ)
        if wrapped is None:
            self.left()
            return body  # type: ignore[no-any-return]
        return wrapped

    @guarded()
    def left(self) -> None:
        """Let go of the request."""
        self.request.leave()

    def _call(self, app: WSGIApp, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.enter()

        def telling_start_response(status: str, headers: Any, *exc_info: Any, **named: Any) -> Any:
            changed = self._with_request_id(headers, environ)
            return start_response(status, changed or headers, *exc_info, **named)

        return app(environ, telling_start_response)

    @guarded()
    def _prepare(self, environ: Environ) -> None:
        self.note_files(environ)

    @guarded()
    def _with_request_id(self, headers: list[tuple[str, str]], environ: Environ) -> list[tuple[str, str]] | None:
        """Return the headers with the request's id, where the application has not set it; None to leave them."""
        request = self.request
        request.resolve_user(environ)
        if not request.resolver.response_headers or not isinstance(headers, list):
            return None
        request_id = request.client_request_id
        if request_id is None or any(name.lower() == "x-request-id" for name, _ in headers):
            return None
        return [*headers, ("X-Request-Id", request_id)]

    @guarded()
    def _wrap(self, body: Any, environ: Environ) -> Parts | None:
        """Return the body wrapped; None to leave it: it is there already, or a file."""
        if type(body) in (list, tuple) or self.is_file(body, environ):
            return None
        return SizedParts(self, body) if hasattr(body, "__len__") else Parts(self, body)


class _Body(Parts):
    """The body of a response; the request ends with its last part, or when the server closes or drops it."""

    __slots__ = ("_response",)

    def __init__(self, response: _Response, iterable: Iterable[bytes]) -> None:
        super().__init__(response, iterable)
        self._response = response

    def __next__(self) -> bytes:
        response = self._response
        try:  # as in `Parts`, but without calling that for each part
            if self._iterator is None:
                part: bytes = response.inside(self._begin)
            else:
                part = response.inside(next, self._iterator)
        except StopIteration:
            response.request.exhausted()
            raise
        except BaseException as exc:
            response.failed(exc)
            raise
        response.sent(part)
        return part

    def close(self) -> None:
        """Close the application's iterable, once, and end the request."""
        if self._closed:
            return
        self._closed = True
        try:
            self.close_iterable()
        except BaseException as exc:
            self._response.request.left(exc)
            raise
        finally:
            self._end()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):  # dropped by a server that does not close what it iterates
            self._closed = True
            self._response.request.known_again()
            self._end()

    @guarded()
    def _end(self) -> None:
        request = self._response.request
        if request.ended:
            return
        if request.may_be_empty:
            request.exhausted()
        else:
            request.client_left()
            request.end()


class _SizedBody(_Body, SizedParts):
    """One whose length the server may look at."""

    __slots__ = ()


def _has_timing(headers: list[tuple[str, str]]) -> bool:
    """True where the header, which is a list and may be repeated, has the entry `traceparent` already."""
    return any(name.lower() == "server-timing" and "traceparent" in value for name, value in headers)


def _our_headers(record: TraceRecord) -> list[tuple[str, str]]:
    """Return the headers that tell a response's ids."""
    trace_id = f"{record.trace_id:032x}"
    timing = f'traceparent;desc="00-{trace_id}-{record.root_span_id:016x}-01"'
    headers = [("X-Trace-Id", f"tr-{trace_id}"), ("Server-Timing", timing)]
    if (request_id := record.client_request_id) is not None:
        headers.insert(0, ("X-Request-Id", request_id))
    return headers


def _attributes(environ: Environ) -> dict[str, Any]:
    """Return the root's attributes, in the names of OpenTelemetry's semantic conventions."""
    method = environ.get("REQUEST_METHOD", "")
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "url.scheme": environ.get("wsgi.url_scheme", "http"),
        "url.path": _path(environ),
        "network.protocol.version": environ.get("SERVER_PROTOCOL", "HTTP/1.1").rpartition("/")[2],
    }
    if method not in METHODS:
        attributes.update(method_attributes(method))
    if peer := environ.get("REMOTE_ADDR"):
        attributes["client.address"] = peer
    if name := environ.get("SERVER_NAME"):
        attributes["server.address"] = name
    if (port := environ.get("SERVER_PORT", "")).isdecimal():
        attributes["server.port"] = int(port)
    if query := environ.get("QUERY_STRING"):
        attributes["url.query"] = query
    return attributes


def _path(environ: Environ) -> str:
    """Return the whole path: WSGI splits it, and its strings hold bytes as latin-1 (PEP 3333)."""
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return path if path.isascii() else path.encode("latin-1", "replace").decode("utf-8", "replace")
