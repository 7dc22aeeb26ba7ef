"""Starlette: templates of its routes, its authenticated user, traced handlers in any order of decorators.

What is used of Starlette: the public `routes`, `path_format`, `endpoint`, `app`, `user_middleware`,
`middleware_stack`, and what its router puts into the scope (`endpoint`, `path_params`, `root_path`, in newer
versions `route`). Not documented: that a function's route calls it through a function made by `request_response`
or `websocket_session`, which stands at the end of the route's `.app` chain.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute, request_response, websocket_session

from tracemw import provider
from tracemw.adapters.bridged import Bridge, bridged
from tracemw.adapting import Adapter, Attached, layers, trace_values, within
from tracemw.asgi import TraceMiddleware
from tracemw.exchange import with_headers
from tracemw.guard import guarded, report
from tracemw.request import KEY
from tracemw.stamps import traced_form

TELEMETRY = "starlette.middleware.opentelemetry"
MAX_DEPTH = 20  # of applications mounted in one another


class Named(NamedTuple):
    """One way to an endpoint.

    Attributes:
        route: The route object that the framework chooses.
        endpoint: What the framework puts into the scope for it.
        mount: The template of what the route is mounted under, without parameters' values.
        path: The route's own template; None where it only leads to further routes.
    """

    route: Any
    endpoint: Any
    mount: str
    path: str | None


class StarletteAdapter(Adapter):
    """Adapts one application.

    Args:
        app: The Starlette application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._named: dict[int, list[Named]] = {}
        self._tables: list[list[Any]] = []
        self._size = 0

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the router chose: root path, mounts and the route's own path.

        OpenTelemetry wants the application's root in `http.route`; the root path of server and proxy is that.
        """
        endpoint = carrier.get("endpoint")
        if endpoint is None:
            return None
        chosen = self._chosen(endpoint, carrier)
        root_path: str = carrier.get("root_path", "").rstrip("/")
        if chosen is None:  # of a router that we have not seen
            route = carrier.get("route")
            known = getattr(route, "endpoint", None) is endpoint and carrier.get("app") in (None, self.app)
            return root_path + route.path_format if known else None  # type: ignore[union-attr]
        if chosen.path is None:
            return None
        if chosen.mount:
            mounted = _filled(chosen.mount, carrier)
            app_root = carrier.get("app_root_path", "").rstrip("/")
            root_path = root_path[: -len(mounted)] if root_path.endswith(mounted) else app_root
        return root_path + chosen.mount + chosen.path

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return whom the AuthenticationMiddleware has authenticated."""
        user = carrier.get("user")
        if user is None or not getattr(user, "is_authenticated", False):
            return None
        try:
            return str(user.identity)
        except (AttributeError, NotImplementedError):  # SimpleUser has a name only
            name = getattr(user, "display_name", None)
            return None if name is None else str(name)

    def changed(self) -> bool:
        """Say whether routes were added or removed."""
        return sum(map(len, self._tables)) != self._size

    def prepare(self) -> None:
        """Learn the routes, and have them call the traced form of their endpoints."""
        tables: list[list[Any]] = []
        named: dict[int, list[Named]] = {}
        for one in self._walk(self.app.routes, "", tables):
            named.setdefault(id(one.endpoint), []).append(one)
        self._size = sum(map(len, tables))
        self._tables, self._named = tables, named
        for layer in layers(getattr(self.app, "middleware_stack", None)):
            trace_around(layer)

    def install(self, options: dict[str, Any]) -> bool:
        """Add the middleware to the application's stack, once, also when it is serving already."""
        app = self.app
        if not hasattr(app, "user_middleware"):  # a Router
            return False
        if any(entry.cls is TraceMiddleware for entry in app.user_middleware):
            return True
        if app.middleware_stack is None:
            app.add_middleware(TraceMiddleware, **options)
        elif not any(isinstance(layer, TraceMiddleware) for layer in layers(app.middleware_stack)):
            app.middleware_stack = TraceMiddleware(app.middleware_stack, **options)
        return True

    def place(self, middleware: Any, options: dict[str, Any]) -> bool:
        """Stand around the framework's own error handler as well, or inside of Starlette's own telemetry.

        What the error handler answers then gets our headers, and is inside the root. Of a middleware that does not
        wrap the application itself, what is between them may hand on another scope: the one inside sees it.
        Starlette's telemetry opens a root whatever stands outside of it, so that one is adopted. What is answered
        outside of us then gets our headers from `Answers`.
        """
        taken_over = self._place(middleware, options)
        stack = getattr(self.app, "middleware_stack", None)
        found = layers(stack)
        stands = taken_over or any(one is middleware for one in found)
        if stands and not isinstance(stack, (TraceMiddleware, Answers)) and any(map(_is_telemetry, found)):
            self.app.middleware_stack = Answers(stack)
        return taken_over

    def _place(self, middleware: Any, options: dict[str, Any]) -> bool:
        app = self.app
        if not hasattr(app, "build_middleware_stack"):  # a Router
            return False
        if app.middleware_stack is None:  # as it does itself with the first request
            app.middleware_stack = app.build_middleware_stack()
        options = {**options, "adapter": self}
        stack = app.middleware_stack
        outside, inside = _around(layers(stack), middleware)
        if outside is None and not self._is_wrapped_by(middleware):
            return False
        if (telemetry := _first_telemetry(inside)) is not None:
            if not isinstance(telemetry.app, TraceMiddleware):
                telemetry.app = TraceMiddleware(telemetry.app, **options)
            return True
        if outside is None:
            needed = middleware.app is not app and not isinstance(stack, TraceMiddleware)
        else:
            needed = outside != [] and not any(
                isinstance(one, TraceMiddleware) or _opens_root(one) for one in outside
            )
        if needed:
            app.middleware_stack = TraceMiddleware(stack, **options)
        self._look_into(inside)
        return False

    def _look_into(self, stack: list[Any]) -> None:
        """See the scope that the router gets, where middleware that we do not know may make a new one."""
        router, unknown = self.app.router, False
        for layer in stack:
            unknown = unknown or type(layer).__module__.partition(".")[0] not in (
                "starlette",
                "fastapi",
                "tracemw",
            )
            if getattr(layer, "app", None) is router:
                if unknown:
                    layer.app = Seen(router, self)
                return

    def _is_wrapped_by(self, middleware: Any) -> bool:
        """True where a middleware stands around the application, False where it is a part of it."""
        return any(one is self.app for one in within(middleware.app))

    def _chosen(self, endpoint: Any, carrier: Mapping[str, Any]) -> Named | None:
        found = self._named.get(id(endpoint))
        if found is None or found[0].endpoint is not endpoint:
            return None
        return found[0] if len(found) == 1 else _narrowed(found, carrier, self._selected(carrier))

    def _selected(self, carrier: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the objects that may be the chosen route, as the router names it in the scope."""
        return (carrier.get("route"),)

    def _walk(self, routes: Any, mount: str, tables: list[list[Any]], depth: int = 0) -> Iterator[Named]:
        tables.append(routes)
        for route in list(routes):
            yield from self._walk_route(route, mount, tables, depth)

    def _walk_route(self, route: Any, mount: str, tables: list[list[Any]], depth: int) -> Iterator[Named]:
        path = getattr(route, "path_format", None)
        if getattr(route, "endpoint", None) is not None:
            self._trace_endpoint(route)
            yield Named(route, route.endpoint, mount, path)
            return
        inner = bridged(getattr(route, "app", None))
        if inner is None:
            return
        if inner is not route.app:
            route.app = inner
        trace_around_mounted(inner)
        below = _routes_of(inner)
        if path is not None:
            mount += path.removesuffix("/{path}")
        leads_on = path is None or below is not None or isinstance(inner, Bridge)
        yield Named(route, inner, mount, None if leads_on else "/{path}")
        if below is not None and depth < MAX_DEPTH:
            yield from self._walk(below, mount, tables, depth + 1)

    def _trace_endpoint(self, route: Any) -> None:
        """Have a route call the traced form of its endpoint."""
        traced = traced_form(route.endpoint)
        if traced is not None:
            if self._call_instead(route, traced):
                route.endpoint = traced
            else:
                why = RuntimeError(f"no handler span for {route!r}: its endpoint cannot be replaced")
                report(f"{type(self).__name__}.prepare", why)

    def _call_instead(self, route: Any, traced: Any) -> bool:
        """Put the traced endpoint at the end of the route's chain of middleware; False where that is hidden."""
        holder = route
        while getattr(holder, "app", None) is not None:
            if holder.app is route.endpoint:  # an ASGI application
                holder.app = traced
                return True
            if inspect.isfunction(holder.app):
                made = websocket_session if isinstance(route, WebSocketRoute) else request_response
                known = (made.__module__, f"{made.__name__}.<locals>.app")
                if (holder.app.__module__, holder.app.__qualname__) != known:
                    return False
                holder.app = made(traced)
                return True
            holder = holder.app
        return False


class Seen:
    """Stands before the router and tells a request's trace which scope that gets.

    Args:
        app: The router.
        adapter: Knows what the router puts into the scope.
    """

    def __init__(self, app: Any, adapter: Adapter) -> None:
        self.app = app
        self._attached = Attached(adapter)

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Return what the router returns, which is awaited then."""
        request = scope.get(KEY)
        if request is not None:
            request.also_known_to(self._attached, scope)
        return self.app(scope, receive, send)


class Answers:
    """Stands around the telemetry whose root is adopted further inside: what is answered out here is told to it.

    Args:
        app: The application's stack.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Return what the stack returns, which is awaited then."""
        if scope["type"] != "http":
            return self.app(scope, receive, send)

        async def telling_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = _answered(scope, message) or message
            await send(message)

        return self.app(scope, receive, telling_send)


@guarded()
def _answered(scope: Any, message: Any) -> Any:
    """Return the message with our headers, where it did not pass us before."""
    request = scope.get(KEY)
    if request is None or request.status is not None:
        return None
    request.answered_outside(int(message["status"]))
    return with_headers(request, message) if request.resolver.response_headers else None


def trace_around(layer: Any) -> None:
    """Replace the traced functions that middleware calls: error handlers, functions of `@app.middleware`."""
    attributes = getattr(layer, "__dict__", {})
    for table in (attributes, *(value for value in attributes.values() if isinstance(value, dict))):
        trace_values(table, handler=False)


def trace_around_mounted(app: Any) -> None:
    """Replace those of a mounted application, which has no stack yet before its first request."""
    for inner in within(app):
        if isinstance(inner, Starlette):
            trace_values(inner.exception_handlers, handler=False)
            for entry in inner.user_middleware:  # its older versions have `options`
                trace_values(vars(entry).get("kwargs") or vars(entry).get("options") or {}, handler=False)
            for layer in layers(inner.middleware_stack):
                trace_around(layer)


def make(app: Any) -> StarletteAdapter:
    """Return the adapter of an application."""
    return StarletteAdapter(app)


def _around(stack: list[Any], middleware: Any) -> tuple[list[Any] | None, list[Any]]:
    """Split a stack into what stands outside of a middleware and what stands inside; None if it is not in it."""
    for place, layer in enumerate(stack):
        if layer is middleware:
            return stack[:place], stack[place + 1 :]
    return None, stack


def _first_telemetry(stack: list[Any]) -> Any:
    """Return Starlette's own telemetry, if it is in the stack."""
    return next((one for one in stack if type(one).__module__ == TELEMETRY), None)


def _opens_root(layer: Any) -> bool:
    """True for telemetry that opens a root, which we adopt where we stand inside."""
    if type(layer).__module__.startswith("opentelemetry.instrumentation."):
        return provider.is_joined()
    return _is_telemetry(layer)


def _is_telemetry(layer: Any) -> bool:
    """True for middleware that opens roots, if a provider is there."""
    module = type(layer).__module__
    return module == TELEMETRY or module.startswith("opentelemetry.instrumentation.")


def _routes_of(app: Any) -> list[Any] | None:
    """Return the routes of a mounted application, which middleware may wrap; None where it has none."""
    for inner in within(app):
        routes = getattr(inner, "routes", None)
        if isinstance(routes, list):
            return routes
    return None


def _narrowed(found: list[Named], carrier: Mapping[str, Any], selected: tuple[Any, ...]) -> Named | None:
    """Choose among several ways to one endpoint: by the route, the mount, and at last the path."""
    by_route = [n for n in found if any(n.route is route for route in selected)] or found
    root_path = carrier.get("root_path", "").rstrip("/")
    by_mount = [n for n in by_route if root_path.endswith(_filled(n.mount, carrier))] or by_route
    if len(by_mount) > 1:
        path = carrier.get("path", "")
        by_mount.sort(key=lambda n: len(n.mount), reverse=True)
        for named in by_mount:
            if named.path is not None and path.endswith(_filled(named.mount + named.path, carrier)):
                return named
    return by_mount[0]


def _filled(template: str, carrier: Mapping[str, Any]) -> str:
    """Put the values of this request into a template."""
    for name, value in (carrier.get("path_params") or {}).items():
        template = template.replace(f"{{{name}}}", str(value))
    return template
