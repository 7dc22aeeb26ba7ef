"""Flask: the rule that its router chose, and the user of Flask-Login.

What is used of Flask: `Request.url_rule`, reached through the `werkzeug.request` that Werkzeug puts into the
environ, `Flask.wsgi_app`, `flask.g`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracemw.adapting import layers
from tracemw.wsgi import WSGITraceMiddleware


class FlaskAdapter:
    """Adapts one application.

    Args:
        app: The Flask application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the rule that was chosen, as it was written, below what the application is mounted under."""
        rule = getattr(carrier.get("werkzeug.request"), "url_rule", None)
        if rule is None:
            return None
        mount: str = carrier.get("SCRIPT_NAME", "").rstrip("/")
        return mount + str(rule.rule)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return whom Flask-Login has authenticated; it keeps its user in `flask.g`."""
        from flask import g, has_app_context

        user = g.get("_login_user") if has_app_context() else None
        if user is None or not getattr(user, "is_authenticated", False):
            return None
        known = user.get_id()
        return None if known is None else str(known)

    def prepare(self) -> None:
        """Nothing to prepare."""

    def install(self, options: dict[str, Any]) -> None:
        """Wrap `wsgi_app`, once."""
        if not any(isinstance(layer, WSGITraceMiddleware) for layer in layers(self.app.wsgi_app)):
            self.app.wsgi_app = WSGITraceMiddleware(self.app.wsgi_app, **options)


def make(app: Any) -> FlaskAdapter:
    """Return the adapter of an application."""
    return FlaskAdapter(app)
