"""Werkzeug without Flask: a WSGI callable that asks a `Map` which endpoint to call.

The `Map` is found among the variables and attributes of the application, or given to `make`. What is used of
Werkzeug: `Map.bind`, `Map.bind_to_environ` and `MapAdapter.match`, all public, are replaced on that one `Map` and
the `MapAdapter`s that it makes, so that the rule which the application's own call of `match` has found is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from werkzeug.routing import Map, MapAdapter, Rule

from tracemw.adapting import Adapter, held_by, within
from tracemw.guard import guarded
from tracemw.record import TraceRecord, current_record
from tracemw.request import KEY
from tracemw.stamps import traced_form

_chosen: weakref.WeakKeyDictionary[TraceRecord, Rule] = weakref.WeakKeyDictionary()


class WerkzeugAdapter(Adapter):
    """Adapts one application.

    Args:
        maps: Those that it asks.
        registries: Dictionaries in which it looks up handlers by the endpoints of its maps.
    """

    def __init__(self, maps: list[Map], registries: list[dict[Any, Any]]) -> None:
        self._maps = maps
        self._registries = registries
        self._size = 0
        for url_map in maps:
            _watch(url_map)

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the rule that was chosen, as it was written, below what the application is mounted under."""
        trace = carrier.get(KEY)
        rule = None if trace is None else _chosen.get(trace.record)
        if rule is None:
            return None
        mount: str = carrier.get("SCRIPT_NAME", "").encode("latin-1").decode("utf-8", "replace")
        return mount.rstrip("/") + rule.rule

    def changed(self) -> bool:
        """Say whether handlers were added to a dictionary of them."""
        return sum(map(len, self._registries)) != self._size

    def prepare(self) -> None:
        """Replace traced handlers in the dictionaries of them by their traced form."""
        self._size = sum(map(len, self._registries))
        endpoints = {rule.endpoint for url_map in self._maps for rule in url_map.iter_rules()}
        for registry in self._registries:
            for name in endpoints & registry.keys():
                traced = traced_form(registry[name])
                if traced is not None:
                    registry[name] = traced


def make(app: Any = None, url_map: Map | None = None) -> WerkzeugAdapter:
    """Return the adapter of an application: `WSGITraceMiddleware(app, adapter=make(app))`.

    Args:
        app: The application, in which a `Map` is looked for.
        url_map: Its `Map`, where it cannot be found by itself.
    """
    values = list(_values_of(app))
    maps = [url_map] if url_map is not None else [value for value in values if isinstance(value, Map)]
    return WerkzeugAdapter(maps, [value for value in values if isinstance(value, dict)])


def find(app: Any) -> WerkzeugAdapter | None:
    """Return the adapter of an application that has a `Map`; None for others."""
    return make(app) if any(isinstance(value, Map) for value in _values_of(app)) else None


def _values_of(app: Any) -> Iterator[Any]:
    """Give what an application has at hand: its attributes, its class's, and the variables that its code names."""
    for part in within(app):
        yield from held_by(part)
        for kind in type(part).__mro__:
            if kind.__module__ != "builtins":
                for value in list(vars(kind).values()):
                    yield value
                    yield from held_by(value) if callable(value) and not isinstance(value, type) else ()


def _watch(url_map: Map) -> None:
    """Have a map tell which rule was chosen."""
    own: Any = url_map
    if "bind" in vars(own):
        return
    own.bind = _watching(url_map.bind)
    own.bind_to_environ = _watching(url_map.bind_to_environ)


def _watching(bind: Callable[..., MapAdapter]) -> Callable[..., MapAdapter]:
    def bound(*args: Any, **kwargs: Any) -> MapAdapter:
        adapter: Any = bind(*args, **kwargs)
        if "match" not in vars(adapter):
            adapter.match = _telling(adapter.match)
        return adapter  # type: ignore[no-any-return]

    return bound


def _telling(match: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `match`, which gives an endpoint or the rule, so that the rule is known either way."""

    def matched(*args: Any, **kwargs: Any) -> Any:
        wants_rule = args[2] if len(args) > 2 else kwargs.get("return_rule", False)
        if len(args) > 2:
            args = (*args[:2], True, *args[3:])
        else:
            kwargs["return_rule"] = True
        rule, values = match(*args, **kwargs)
        _note(rule)
        return (rule if wants_rule else _traced(rule.endpoint) or rule.endpoint), values

    return matched


@guarded()
def _note(rule: Rule) -> None:
    record = current_record()
    if record is not None:
        _chosen[record] = rule


@guarded()
def _traced(endpoint: Any) -> Any:
    """Return the traced form of an endpoint that is a function; others are names for the application."""
    return traced_form(endpoint) if callable(endpoint) else None
