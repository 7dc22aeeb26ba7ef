"""FastAPI: what it adds to Starlette's routes.

Not documented, but used here: `dependant.call` of a route, which FastAPI reads with each request to call the
handler; `effective_route_contexts` and `original_router` of an included router, whose routes are made when they
are needed (since version 0.137); the chosen one in the scope's `fastapi` entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.routing import APIRoute, APIWebSocketRoute

from tracemw import provider
from tracemw.adapters.starlette import Named, StarletteAdapter
from tracemw.adapting import layers
from tracemw.asgi import TraceMiddleware


class FastAPIAdapter(StarletteAdapter):
    """Adapts one application."""

    def place(self, middleware: Any, options: dict[str, Any]) -> bool:
        """Step inside where FastAPI's own telemetry has a provider that is not the global one, to adopt its root.

        Elsewhere, the middleware around the application opens the root, and FastAPI opens none; but for requests
        that we leave out. For their sake one stands inside of FastAPI's telemetry, which begins a new context.
        """
        app = self.app
        telemetry = getattr(app, "_telemetry", None) or {}
        wrapped = self._is_wrapped_by(middleware)
        if not telemetry.get("tracing") or not (wrapped or _stands(middleware, app.middleware_stack)):
            return super().place(middleware, options)
        if wrapped and telemetry.get("tracer_provider") is not None:
            return self.install(options)
        taken_over = super().place(middleware, options)
        if provider.is_joined() and not any(
            isinstance(one, TraceMiddleware) for one in layers(app.middleware_stack)
        ):
            app.middleware_stack = TraceMiddleware(app.middleware_stack, **{**options, "adapter": self})
        return taken_over

    def _selected(self, carrier: Mapping[str, Any]) -> tuple[Any, ...]:
        context = (carrier.get("fastapi") or {}).get("effective_route_context")
        if context is None:
            return super()._selected(carrier)
        return context, getattr(context, "starlette_route", None) or context, carrier.get("route")

    def _walk_route(self, route: Any, mount: str, tables: list[list[Any]], depth: int) -> Iterator[Named]:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield from super()._walk_route(route, mount, tables, depth)
            return
        self._trace_included(route.original_router, tables)
        for context in contexts():
            inner = getattr(context, "starlette_route", None)
            if inner is not None:
                yield from super()._walk_route(inner, mount, tables, depth)
            elif context.endpoint is not None:
                self._trace_endpoint(context)
                yield Named(context, context.endpoint, mount, context.path_format)

    def _trace_included(self, router: Any, tables: list[list[Any]]) -> None:
        """Trace the routes that an included router's own are made from: more may be made of them later."""
        if any(router.routes is table for table in tables):
            return
        tables.append(router.routes)
        for route in list(router.routes):
            if hasattr(route, "original_router"):
                self._trace_included(route.original_router, tables)
            elif getattr(route, "endpoint", None) is not None:
                self._trace_endpoint(route)

    def _call_instead(self, route: Any, traced: Any) -> bool:
        original = getattr(route, "original_route", route)
        if not isinstance(original, (APIRoute, APIWebSocketRoute)):  # one of Starlette's
            return super()._call_instead(route, traced)
        dependant = getattr(route, "dependant", None)
        if getattr(dependant, "call", None) is None:
            return False
        dependant.call = traced  # type: ignore[union-attr]
        return True


def _stands(middleware: Any, stack: Any) -> bool:
    """True where a middleware is a part of a stack."""
    return any(layer is middleware for layer in layers(stack))


def make(app: Any) -> FastAPIAdapter:
    """Return the adapter of an application."""
    return FastAPIAdapter(app)
