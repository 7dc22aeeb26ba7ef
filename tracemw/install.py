"""`instrument(app)`: the one line for an application of any kind."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from tracemw import config
from tracemw.adapting import adapter_for
from tracemw.asgi import TraceMiddleware
from tracemw.errors import TracemwError
from tracemw.wsgi import WSGITraceMiddleware

App = TypeVar("App")


def instrument(app: App, **options: Any) -> App:
    """Trace every request of an application.

    A FastAPI, Starlette or Flask application is changed in place; any other ASGI or WSGI callable is wrapped.
    Doing it twice changes nothing.

    Args:
        app: The application.
        **options: Settings that hold for this application only; see the settings page.

    Returns:
        What to serve: the application itself, or the middleware around it.

    Raises:
        SettingError: An option is unknown or not allowed.
        TracemwError: `app` is neither an ASGI nor a WSGI application.
    """
    if isinstance(app, (TraceMiddleware, WSGITraceMiddleware)):
        return app
    config.settings().override(options)
    adapter = options.get("adapter") or adapter_for(app)
    install = getattr(adapter, "install", None)
    if install is not None and install(options):
        return app
    if not callable(app):
        raise TracemwError(f"instrument() takes an ASGI or WSGI application, not {type(app).__name__}")
    wrapped: Any = TraceMiddleware(app, **options) if _is_asgi(app) else WSGITraceMiddleware(app, **options)
    return wrapped  # type: ignore[no-any-return]


def _is_asgi(app: Any) -> bool:
    call = app if inspect.isroutine(app) else type(app).__call__
    if inspect.iscoroutinefunction(call):
        return True
    try:
        parameters = inspect.signature(app).parameters
    except (TypeError, ValueError):
        return False
    return len([p for p in parameters.values() if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]) == 3
