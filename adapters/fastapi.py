"""FastAPI: what it adds to Starlette's routes.

What is used of FastAPI besides Starlette's: the scope's `fastapi` entry and the routes of included routers
(`effective_route_contexts`), which since version 0.137 are made from the router when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tracemw.adapters.starlette import Named, StarletteAdapter


class FastAPIAdapter(StarletteAdapter):
    """Adapts one application."""

    def _selected(self, carrier: Mapping[str, Any]) -> tuple[Any, ...]:
        context = (carrier.get("fastapi") or {}).get("effective_route_context")
        if context is None:
            return super()._selected(carrier)
        return context, getattr(context, "starlette_route", None) or context, carrier.get("route")

    def _walk_route(self, route: Any, mount: str, depth: int) -> Iterator[Named]:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield from super()._walk_route(route, mount, depth)
            return
        self._tables.append(route.original_router.routes)
        for context in contexts():
            inner = getattr(context, "starlette_route", None)
            if inner is not None:
                yield from super()._walk_route(inner, mount, depth)
            elif context.endpoint is not None:
                yield Named(context, context.endpoint, mount, context.path_format)


def make(app: Any) -> FastAPIAdapter:
    """Return the adapter of an application."""
    return FastAPIAdapter(app)
