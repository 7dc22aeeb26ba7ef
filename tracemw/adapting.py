"""What the core wants from a framework's adapter, and how it finds one without importing a framework."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tracemw import stamps
from tracemw.guard import guarded, report

# The framework's top-level package -> the module that adapts it, and its applications' class names.
FRAMEWORKS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "fastapi": ("tracemw.adapters.fastapi", ("FastAPI",)),
    "starlette": ("tracemw.adapters.starlette", ("Starlette", "Router")),
    "flask": ("tracemw.adapters.flask", ("Flask",)),
}
MAX_LAYERS: Final = 50  # of middleware around an application
MAX_OBJECTS: Final = 200  # looked at on the way to an application


class Adapter:
    """Knows where one framework keeps its routes, handlers and users.

    One instance serves one application. Each method is optional; what it raises is reported, and the request
    goes on. `docs/adapters.md` has a complete one.
    """

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose for this request.

        Asked once, when the response is complete.

        Args:
            carrier: The ASGI scope or WSGI environ.

        Returns:
            The template with all prefixes, None where no route was found.
        """
        return None

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user whom the framework has authenticated, or None.

        Args:
            carrier: The ASGI scope or WSGI environ.
        """
        return None

    def changed(self) -> bool:
        """Say whether the application has other routes than when `prepare` was called; asked with each request."""
        return False

    def prepare(self) -> None:
        """See to it that the application calls the traced form of its traced handlers.

        Called before the first request, and again when `changed()` or when `@trace` saw a new function.
        """

    def install(self, options: dict[str, Any]) -> bool:
        """Put the middleware into the application, once; False where it has to be put around it.

        Args:
            options: Those of the middleware.
        """
        return False

    def place(self, middleware: Any, options: dict[str, Any]) -> bool:
        """Put another instance of the middleware where the application's stack needs one.

        Called once, before the first request. Around the framework's own error handler, so that what it answers
        is seen; or inside of telemetry that opens its own root, so that this one is adopted.

        Args:
            middleware: The one that is there.
            options: Its options.

        Returns:
            True where that one has nothing left to do.
        """
        return False


class Attached:
    """A middleware's adapter: found when it is first needed, kept prepared, its failures reported.

    Args:
        given: The `adapter` option; it need not be an `Adapter`, nor have all of its methods.
    """

    __slots__ = ("adapter", "_looked", "_generation", "_route", "_user", "_changed")

    def __init__(self, given: Any = None) -> None:
        self._looked = False
        self._generation = -1
        self._use(given)

    def _use(self, adapter: Any) -> None:
        self.adapter = adapter
        self._route: Any = getattr(adapter, "route", _nothing)
        self._user: Any = getattr(adapter, "user", _nothing)
        self._changed: Any = getattr(adapter, "changed", _nothing)

    def find(self, app: Any) -> bool:
        """Look for the adapter of an application; True the first time, if there is one."""
        if self._looked:
            return False
        self._looked = True
        if self.adapter is None:
            self._use(adapter_for(app))
        return self.adapter is not None

    def if_found(self) -> Attached | None:
        """Return this, or None where there is no adapter to ask."""
        return None if self.adapter is None else self

    def knows_more_than(self, outer: Attached | None) -> bool:
        """Say whether this one has an adapter of another application than the one further out has."""
        if self.adapter is None:
            return False
        app = getattr(self.adapter, "app", None)
        return outer is None or app is None or app is not getattr(outer.adapter, "app", None)

    def keep_prepared(self) -> None:
        """Have the adapter prepare the application where there is something new."""
        try:
            if self._generation == stamps.generation and not self._changed():
                return
            self._generation = stamps.generation
            getattr(self.adapter, "prepare", _nothing)()
        except Exception as exc:
            report(self._place("prepare"), exc)

    def place(self, middleware: Any, options: dict[str, Any]) -> bool:
        """Have the adapter put the middleware where it is needed; True where this one has nothing left to do."""
        try:
            return bool(getattr(self.adapter, "place", _nothing)(middleware, options))
        except Exception as exc:
            report(self._place("place"), exc)
            return False

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return what the adapter says of the route; None if it fails."""
        try:
            return self._route(carrier)  # type: ignore[no-any-return]
        except Exception as exc:
            report(self._place("route"), exc)
            return None

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return what the adapter says of the user; None if it fails."""
        try:
            return self._user(carrier)  # type: ignore[no-any-return]
        except Exception as exc:
            report(self._place("user"), exc)
            return None

    def chosen_user(self, carrier: Mapping[str, Any]) -> None:
        """Return None: the `user` option is not an adapter's."""

    def _place(self, method: str) -> str:
        return f"{type(self.adapter).__name__}.{method}"


def _nothing(*_: Any) -> None:
    """Stand for a method that an adapter does not have."""


class Several(Adapter):
    """The adapters of several applications behind one middleware.

    Args:
        adapters: One for each application.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the route from whichever application it is of."""
        return next((r for a in self.adapters if (r := a.route(carrier)) is not None), None)

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user from whichever application knows one."""
        return next((u for a in self.adapters if (u := a.user(carrier)) is not None), None)

    def changed(self) -> bool:
        """Say whether one of them has."""
        return any(adapter.changed() for adapter in self.adapters)

    def prepare(self) -> None:
        """Prepare them all."""
        for adapter in self.adapters:
            adapter.prepare()

    def place(self, middleware: Any, options: dict[str, Any]) -> bool:
        """Place it in all of them."""
        placed = [adapter.place(middleware, options) for adapter in self.adapters]
        return all(placed)


@guarded()
def adapter_for(app: Any) -> Adapter | None:
    """Return the adapter for an application or for what is wrapped in it; None where none is known.

    Args:
        app: A framework's application, or middleware around one or several.
    """
    adapters = []
    for candidate in within(app):
        module = _module_for(candidate)
        if module is not None:
            made: Adapter = importlib.import_module(module).make(candidate)
            adapters.append(made)
    if adapters:
        return adapters[0] if len(adapters) == 1 else Several(adapters)
    if "werkzeug.routing" in sys.modules:
        from tracemw.adapters import werkzeug

        return werkzeug.find(app)
    return None


def _module_for(app: Any) -> str | None:
    for kind in type(app).__mro__:
        module, classes = FRAMEWORKS.get(kind.__module__.partition(".")[0], ("", ()))
        if kind.__name__ in classes:
            return module
    return None


def within(app: Any) -> Iterator[Any]:
    """Give an application and all that it may hand a request to, as far as it is not in a framework's hands.

    Middleware keeps what it wraps in an attribute, whatever its name, or in a variable that it closes over; a
    dispatcher keeps several in a dictionary or list.
    """
    found, waiting = [app], [app]
    while waiting and len(found) < MAX_OBJECTS:
        current = waiting.pop(0)
        yield current
        if _module_for(current) is None:
            for inner in held_by(current):
                if callable(inner) and not isinstance(inner, type) and not any(inner is one for one in found):
                    found.append(inner)
                    waiting.append(inner)


def held_by(app: Any) -> Iterator[Any]:
    """Give what a callable has at hand: attributes, closed-over variables, global variables that it names."""
    yield getattr(app, "__self__", None)  # Flask's `app.wsgi_app` is a bound method of the application
    if inspect.isfunction(app):
        values = list(_used_by(app))
    elif inspect.isroutine(app) or inspect.ismodule(app):
        return
    else:
        values = [getattr(app, "app", None), *getattr(app, "__dict__", {}).values()]
    for value in values:
        yield value
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value


def _used_by(function: Any) -> Iterator[Any]:
    """Give what a function closes over, and the global variables that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)


def trace_values(table: Any, *, handler: bool = True) -> None:
    """Replace the traced functions in a list or dictionary by their traced form.

    Args:
        table: Changed in place.
        handler: Whether they answer requests; see `traced_form`.
    """
    for key, function in list(enumerate(table) if isinstance(table, list) else table.items()):
        if callable(function) and (traced := stamps.traced_form(function, handler=handler)) is not None:
            table[key] = traced


def layers(app: Any) -> list[Any]:
    """Return a stack of middleware, outermost first, down to the application."""
    found: list[Any] = []
    while app is not None and len(found) < MAX_LAYERS and not any(app is one for one in found):
        found.append(app)
        owner = getattr(app, "__self__", None)
        app = owner if owner is not None else getattr(app, "app", None)
    return found
