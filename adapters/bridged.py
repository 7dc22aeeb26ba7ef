"""A WSGI application below an ASGI one: the bridge between them does not hand on whose request it is.

Known bridges: Starlette's `WSGIMiddleware` (FastAPI's is the same) and a2wsgi's. Both keep the WSGI application in
`app` and call it on another thread, in a copy of the context.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final

from tracemw.adapting import adapter_for
from tracemw.opening import AnyRequest
from tracemw.request import KEY
from tracemw.wsgi import WSGITraceMiddleware

MODULES: Final = ("starlette.middleware.wsgi", "fastapi.middleware.wsgi", "a2wsgi.wsgi")

_request: ContextVar[AnyRequest | None] = ContextVar("tracemw_bridged_request", default=None)


def bridged(bridge: Any) -> Any:
    """Return what to mount instead of a bridge, so that a request is one trace on both sides of it.

    Returns:
        The bridge itself where it is none that we know, or there is nothing to be known of what is behind it.
    """
    if type(bridge).__module__ not in MODULES or adapter_for(bridge.app) is None:
        return bridge
    if not isinstance(bridge.app, _Behind):
        bridge.app = _Behind(bridge.app)
    return Bridge(bridge)


class Bridge:
    """Stands before the bridge and takes note of the request. The next one on this context takes its own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        token = _request.set(scope.get(KEY))
        try:
            await self.app(scope, receive, send)
        finally:
            _request.reset(token)


class _Behind:
    """Stands behind the bridge and puts the request into the environ, where our middleware looks for it."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._traced = app if isinstance(app, WSGITraceMiddleware) else WSGITraceMiddleware(app)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = _request.get()
        if request is None:  # nothing is traced on the other side
            return self.app(environ, start_response)
        environ[KEY] = request

        def start(*args: Any) -> Any:
            request.find_route()  # Flask forgets it before the response has passed the bridge
            return start_response(*args)

        return self._traced(environ, start)
