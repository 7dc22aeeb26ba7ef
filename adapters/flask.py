"""Flask: the rule that its router chose, and the user of Flask-Login.

What is used of Flask: `Request.url_rule` of `flask.request`, or of the `werkzeug.request` that Werkzeug puts into
the environ, `Flask.view_functions`, `Flask.wsgi_app`, `flask.g`, the signal `got_request_exception`. Documented as
internal: the dictionaries of functions that run before and after requests and on errors. Not documented: the
variable `ctx` of `Flask.wsgi_app`, for the route of a request that dies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flask import Flask, g, got_request_exception, has_app_context, request

from tracemw.adapting import Adapter, layers, trace_values
from tracemw.guard import guarded
from tracemw.request import KEY
from tracemw.wsgi import WSGITraceMiddleware


class FlaskAdapter(Adapter):
    """Adapts one application.

    Args:
        app: The Flask application.
    """

    def __init__(self, app: Flask) -> None:
        self.app = app
        self._size = 0
        got_request_exception.connect(_note_exception, app)

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the rule that was chosen, as it was written, below what the application is mounted under."""
        served = _current_request(carrier) or carrier.get("werkzeug.request") or _left_request()
        rule = getattr(served, "url_rule", None)
        if served is None or rule is None:
            return None
        return str(served.root_path).rstrip("/") + str(rule.rule)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return whom Flask-Login has authenticated; it keeps its user in `flask.g`."""
        user = g.get("_login_user") if has_app_context() else None
        if user is None or not getattr(user, "is_authenticated", False):
            return None
        known = user.get_id()
        return None if known is None else str(known)

    def changed(self) -> bool:
        """Say whether views were added."""
        return len(self.app.view_functions) != self._size

    def prepare(self) -> None:
        """Replace traced views, and traced functions around them, by their traced form."""
        app = self.app
        self._size = len(app.view_functions)
        trace_values(app.view_functions)
        for table in (app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs):
            for functions in table.values():
                trace_values(functions, handler=False)
        for by_code in app.error_handler_spec.values():
            for by_class in by_code.values():
                trace_values(by_class, handler=False)

    def install(self, options: dict[str, Any]) -> bool:
        """Wrap `wsgi_app`, once."""
        if not any(isinstance(layer, WSGITraceMiddleware) for layer in layers(self.app.wsgi_app)):
            app: Any = self.app
            app.wsgi_app = WSGITraceMiddleware(app.wsgi_app, **options)
        return True


def _current_request(carrier: Mapping[str, Any]) -> Any:
    """Return Flask's current request, if it is this one.

    The environ's may be gone: whoever leaves a copied context (`copy_current_request_context`) takes it away.
    """
    try:
        served: Any = request._get_current_object()  # type: ignore[attr-defined]
    except RuntimeError:  # none
        return None
    return served if served.environ is carrier or served.environ.get(KEY) is carrier.get(KEY) else None


def _left_request() -> Any:
    """Return the request that an exception has just left which Flask tells nobody of: a `BaseException`.

    By then Flask has taken the request out of the environ; its own frame in the traceback still knows it.
    """
    traceback = sys.exc_info()[2]
    while traceback is not None:
        if traceback.tb_frame.f_code is Flask.wsgi_app.__code__:
            return getattr(traceback.tb_frame.f_locals.get("ctx"), "request", None)
        traceback = traceback.tb_next
    return None


@guarded()
def _note_exception(app: Any, exception: BaseException, **_: Any) -> None:
    """Take note of an exception that Flask is about to turn into its answer 500."""
    trace = request.environ.get(KEY)
    if trace is not None:
        trace.raised(exception)
        trace.find_route()  # the request context may be gone when it is asked for


def make(app: Flask) -> FlaskAdapter:
    """Return the adapter of an application."""
    return FlaskAdapter(app)
