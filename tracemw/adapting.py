"""What the core wants from a framework's adapter, and how it finds one without importing a framework."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

from tracemw.guard import guarded

# The framework's top-level package -> the module that adapts it; each has `make(app) -> Adapter`.
MODULES: Final = {
    "fastapi": "tracemw.adapters.fastapi",
    "starlette": "tracemw.adapters.starlette",
    "flask": "tracemw.adapters.flask",
}


class Adapter(Protocol):
    """Knows where one framework keeps its routes, handlers and users. One instance serves one application."""

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose for this request, prefixes included."""

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user whom the framework has authenticated, or None."""

    def prepare(self) -> None:
        """Make sure that traced handlers are traced; called before a request when `@trace` saw a new function."""


@guarded()
def adapter_for(app: Any) -> Adapter | None:
    """Return the adapter for an application or for what is wrapped in it; None where none is known.

    Args:
        app: A framework's application, or middleware around one (found through `.app`, `.wsgi_app`).
    """
    for candidate in layers(app):
        for kind in type(candidate).__mro__:
            module = MODULES.get(kind.__module__.partition(".")[0])
            if module is not None and _is_application(kind):
                made: Adapter = importlib.import_module(module).make(candidate)
                return made
    return None


def _is_application(kind: type) -> bool:
    return kind.__name__ in ("FastAPI", "Starlette", "Flask")


def layers(app: Any) -> list[Any]:
    """Return the application and what it wraps, outermost first."""
    found: list[Any] = []
    while app is not None and len(found) < 50 and not any(app is one for one in found):
        found.append(app)
        owner = getattr(app, "__self__", None)  # Flask's `app.wsgi_app` is a bound method of the application
        app = owner if owner is not None else getattr(app, "app", None)
    return found
