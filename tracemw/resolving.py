"""Who is asked about a request what only server code knows: its route and its user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Adapted(Protocol):
    """What a request's trace asks about the framework that handles it."""

    def route(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the template of the route that the framework chose."""

    def user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as server code knows it."""

    def chosen_user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user as the application's own option tells it, whatever the framework knows."""


class Resolver(Adapted, Protocol):
    """The same, asked with the settings in mind."""

    adapter: Any
    knows_users: bool
    response_headers: bool


class Resolving:
    """A request, as far as it is about whom to ask for its user.

    Attributes:
        resolver: Asked first.
    """

    resolver: Resolver
    _inner: tuple[tuple[Adapted, Mapping[str, Any]], ...] = ()

    def also_known_to(self, inner: Adapted, carrier: Mapping[str, Any]) -> None:
        """Ask somebody further inside where nobody here knows route or user; they may see another carrier, too."""
        self._inner = (*(known for known in self._inner if known[0] is not inner), (inner, carrier))

    def known_user(self, carrier: Mapping[str, Any]) -> str | None:
        """Return the user; all options are asked before all frameworks, and whoever is further out first.

        Args:
            carrier: The scope or environ that the first one sees.
        """
        if not self._inner:
            return self.resolver.user(carrier)
        asked: tuple[tuple[Adapted, Mapping[str, Any]], ...] = ((self.resolver, carrier), *self._inner)
        users = (who.chosen_user(carrier) for who, carrier in asked)
        chosen = next((user for user in users if user is not None), None)
        if chosen is not None:
            return chosen
        users = (who.user(carrier) for who, carrier in asked)
        return next((user for user in users if user is not None), None)
