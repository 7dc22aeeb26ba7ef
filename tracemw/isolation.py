"""Every WSGI request runs in a `contextvars.Context` of its own, so that nothing leaks into the thread's next one.

It is entered again for each part of the body and for `close()`, on whichever thread that happens.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from tracemw.guard import guarded

# Under this key Flask's test client asks for the request's context to outlive the request (`with client:`).
PRESERVE: Final = "werkzeug.debug.preserve_context"


class Isolated:
    """Runs an application, and what makes its body later, in the context of one request.

    Args:
        traced: The OpenTelemetry context of the request.
        environ: The WSGI environ.
    """

    __slots__ = ("_traced", "_context", "_entered", "_files")

    def __init__(self, traced: Context, environ: MutableMapping[str, Any]) -> None:
        self._traced = traced
        self._context = None if PRESERVE in environ else contextvars.copy_context()
        self._entered = threading.Lock()
        self._files: list[Any] | None = None  # made by a server's `wsgi.file_wrapper` that is no class

    def inside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the request's context, on this thread.

        A context can be entered once at a time; a second thread (a `close()` while a part is being made)
        gets a copy.
        """
        context = self._context
        if context is None:
            return self._in_place(function, *args)
        entered = self._entered
        if not entered.acquire(False):
            return context.copy().run(function, *args)
        try:
            return context.run(function, *args)
        finally:
            entered.release()

    def _in_place(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the caller's context, where a test looks at what the application has left there."""
        token = otel_context.attach(self._traced)
        try:
            return function(*args)
        finally:
            otel_context.detach(token)

    @guarded()
    def enter(self) -> None:
        """Make the request's OpenTelemetry context current, once for all that runs inside."""
        if self._context is not None:
            otel_context.attach(self._traced)  # never detached: this context ends with the request

    def left(self) -> None:
        """Take note that nothing of the request runs any more."""

    def note_files(self, environ: MutableMapping[str, Any]) -> None:
        """Take note of the files that the application makes with the server's function, if that is no class."""
        file_wrapper = environ.get("wsgi.file_wrapper")
        if file_wrapper is None or isinstance(file_wrapper, type):
            return
        files = self._files = []

        def noted(*args: Any) -> Any:
            files.append(file_wrapper(*args))
            return files[-1]

        environ["wsgi.file_wrapper"] = noted

    def is_file(self, body: Any, environ: MutableMapping[str, Any]) -> bool:
        """True for a file which the server may hand to the kernel."""
        if self._files is not None:
            return any(body is file for file in self._files)
        file_wrapper = environ.get("wsgi.file_wrapper")
        return isinstance(file_wrapper, type) and isinstance(body, file_wrapper)


class Parts:
    """The body of a response, whose parts are made in the context of its request.

    Args:
        isolated: The request.
        iterable: The application's.
    """

    __slots__ = ("_isolated", "_iterable", "_iterator", "_closed")

    def __init__(self, isolated: Isolated, iterable: Iterable[bytes]) -> None:
        self._isolated = isolated
        self._iterable = iterable
        self._iterator: Iterator[bytes] | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            return self._isolated.inside(self._begin)  # type: ignore[no-any-return]
        return self._isolated.inside(next, self._iterator)  # type: ignore[no-any-return]

    def _begin(self) -> bytes:
        self._iterator = iter(self._iterable)
        return next(self._iterator)

    def close(self) -> None:
        """Close the application's iterable, once."""
        if self._closed:
            return
        self._closed = True
        try:
            self.close_iterable()
        finally:
            self._isolated.left()

    def close_iterable(self) -> None:
        """Call the application's `close`, if it has one."""
        close = getattr(self._iterable, "close", None)
        if close is not None:
            self._isolated.inside(close)


class SizedParts(Parts):
    """A body whose length the server may look at, to set Content-Length (wsgiref, mod_wsgi)."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]
