"""A request of which nothing is recorded: it is excluded, or not sampled.

Little is done for it, and part of that only when somebody asks: then session and user are read from the headers,
and the trace's ids are made. It has a record and a current span nevertheless, so that nothing inside of it is
recorded, the code inside knows whose request it is, and a service that it calls hears that nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext

from tracemw.chance import chance
from tracemw.guard import guarded
from tracemw.identity import NOBODY, Identity, IdentityReader, Values
from tracemw.logging import describe
from tracemw.pipeline import current as pipeline
from tracemw.record import RECORD_KEY, SPAN_KEY, TraceRecord, current_record, with_record
from tracemw.resolving import Resolver, Resolving


class _Lazy:
    """An attribute that is made when it is first asked for; what is assigned to it wins.

    `functools.cached_property` takes a lock in Python 3.10 and 3.11.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._name = make.__name__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self._make(instance))


def _lazy(make: Callable[[Any], Any]) -> Any:
    return _Lazy(make)


class UnrecordedRequest(TraceRecord, Resolving):
    """A request that is not recorded, while it runs; it is its own record.

    Args:
        resolver: Knows the framework's users.
        reader: Reads the identity.
        values: Those of the headers that tell it.
        around: Its context is to be within this one; None for a new one that has nothing but the request.

    Attributes:
        token: What attaching its context gave, if it is to be detached again.
        status: The status code of the response, None before it starts.
    """

    is_request = True
    recording = False
    has_parent = False
    mode = "suppressed"
    ended = False  # there is nothing that could be patched afterwards
    status: int | None = None
    token: Any = None

    def __init__(
        self, resolver: Resolver, reader: IdentityReader, values: Values, around: Context | None = None
    ) -> None:
        self.resolver = resolver
        self._around = around
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

    def new_context(self) -> Context:
        """Return the context for the application. It holds the request, which therefore does not keep it."""
        if self._around is None:
            return Context({SPAN_KEY: UnrecordedSpan(self), RECORD_KEY: self})
        return with_record(self._around, self)

    @guarded()
    def leave(self) -> None:
        """Let go of what holds this, and restore the context that was there before."""
        self.ended = True
        if self._inner:
            self._inner = ()
        if self.token is not None:
            otel_context.detach(self.token)

    @guarded()
    def dropped(self) -> None:
        """Take note that nobody waits for the request any more: the garbage collector may close it anywhere."""
        if current_record() is not self:
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

    @_lazy
    def user_id(self) -> str | None:
        """The user."""
        return self._identity.user_id  # type: ignore[no-any-return]

    @guarded()
    def resolve_user(self, carrier: Mapping[str, Any]) -> None:
        """Let what server code knows of the user win over what a header claimed.

        Args:
            carrier: The ASGI scope or WSGI environ.
        """
        if self.ended or not (self.resolver.knows_users or self._inner):
            return
        user = self.known_user(carrier)
        if user is not None and self.user_id == self._identity.user_id:  # else set with `update_current_trace`
            self.user_id = user

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
        return chance.getrandbits(128) or 1

    @_lazy
    def root_span_id(self) -> int:
        """A span id."""
        return chance.getrandbits(64) or 1

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
