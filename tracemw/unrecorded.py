"""A request of which nothing is recorded: it is excluded, or not sampled.

Little is done for it, and most of that only when somebody asks: then session and user are read from the headers,
and the trace's ids are made. It has a record and a current span nevertheless, so that nothing inside of it is
recorded, the code inside knows whose request it is, and a service that it calls hears that nothing is sampled.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext

from tracemw.guard import guarded
from tracemw.identity import NOBODY, Identity, IdentityReader, Values
from tracemw.logging import describe
from tracemw.pipeline import current as pipeline
from tracemw.record import TraceRecord, current_record
from tracemw.request import GONE
from tracemw.resolving import Resolver, Resolving

_random: Final = random.Random()  # not the application's, which may be seeded
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


class _Lazy:
    """An attribute that is made when it is first asked for; what is assigned to it wins.

    `functools.cached_property` takes a lock in Python 3.10 and 3.11.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._name = make.__name__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return instance.__dict__.setdefault(self._name, self._make(instance))


def _lazy(make: Callable[[Any], Any]) -> Any:
    return _Lazy(make)


class UnrecordedRequest(TraceRecord, Resolving):
    """A request that is not recorded, while it runs; it is its own record.

    Args:
        resolver: Knows the framework's users.
        carrier: The ASGI scope or WSGI environ.
        reader: Reads the identity.
        values: Those of the headers that tell it.

    Attributes:
        context: The OpenTelemetry context that the application runs in.
        token: What attaching that gave, if it is to be detached again.
        status: The status code of the response, None before it starts.
    """

    is_request = True
    recording = False
    has_parent = False
    mode = "suppressed"
    ended = False  # there is nothing that could be patched afterwards
    status: int | None = None
    context: Context
    token: Any = None
    _user: str | None = None

    def __init__(
        self, resolver: Resolver, carrier: MutableMapping[str, Any], reader: IdentityReader, values: Values
    ) -> None:
        self.resolver = resolver
        self._carrier = carrier
        self._reader = reader
        self._values = values
        request_id = reader.request_id_of(values)
        self.client_request_id = self._identity.client_request_id if request_id is None else request_id

    @property
    def record(self) -> TraceRecord:
        """The record of the request's trace."""
        return self

    def __str__(self) -> str:
        """Return the ids, as access logs show them: gunicorn's `%({tracemw.request}e)s`."""
        return describe(self)

    def is_over(self) -> bool:
        """True for one that has ended where its scope or environ comes again."""
        return current_record() is not self

    @guarded()
    def leave(self) -> None:
        """Let go of what holds this, and restore the context that was there before."""
        self.ended = True
        self._carrier = GONE
        if self._inner:
            self._inner = ()
        if self.token is not None:
            otel_context.detach(self.token)

    @guarded()
    def dropped(self) -> None:
        """Take note that nobody waits for the request any more: the garbage collector may close it anywhere."""
        if otel_context.get_current() is not self.context:
            self.token = None

    # Whose it is, if somebody asks.

    @_lazy
    @guarded(fallback=NOBODY)
    def _identity(self) -> Identity:
        found = self._reader.identity_of(self._values)
        count_discarded(found)
        return found

    @_lazy
    def session_id(self) -> str | None:
        """The session."""
        return self._identity.session_id  # type: ignore[no-any-return]

    @property
    def user_id(self) -> str | None:
        """The user: whom code has set; from the response on whom server code knows; else whom a header claims."""
        if self._user is None and self.status is not None and not self.ended:
            self.resolve_user()
        return self._identity.user_id if self._user is None else self._user

    @user_id.setter
    def user_id(self, user: str | None) -> None:
        self._user = user

    @guarded()
    def resolve_user(self) -> None:
        """Ask server code for the user, while it knows."""
        if self._user is None:
            self._user = self.known_user()

    # What code inside sets on its trace, and what a service that it calls gets to know.

    @_lazy
    def metadata(self) -> dict[str, str]:
        """Metadata: nobody will see them."""
        return {}

    @_lazy
    def tags(self) -> dict[str, str]:
        """Tags, likewise."""
        return {}

    @_lazy
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root, likewise."""
        return {}

    @_lazy
    def trace_id(self) -> int:
        """A trace id."""
        return _random.getrandbits(128) or 1

    @_lazy
    def root_span_id(self) -> int:
        """A span id."""
        return _random.getrandbits(64) or 1

    # What is of no interest.

    def find_route(self) -> None:
        """Do nothing."""

    def raised(self, exc: BaseException) -> None:
        """Do nothing: an exception holds its frames."""

    def answered_outside(self, status: int) -> None:
        """Do nothing."""


class UnrecordedSpan(NonRecordingSpan):
    """Current inside a request that is not recorded: what begins below it is not, either.

    Args:
        request: Has its ids.
    """

    def __init__(self, request: UnrecordedRequest) -> None:
        self._request = request

    @_lazy
    def _context(self) -> SpanContext:  # under this name the parent class has it
        return SpanContext(self._request.trace_id, self._request.root_span_id, is_remote=False)

    def get_span_context(self) -> SpanContext:
        """Return its ids; not sampled."""
        return self._context  # type: ignore[no-any-return]


def count_discarded(identity: Identity) -> None:
    """Count the values of headers that cannot be used."""
    for reason, number in identity.discarded.items():
        pipeline().count(f"discarded_{reason}", number)
