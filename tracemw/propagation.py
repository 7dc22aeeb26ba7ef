"""Context across threads, across the end of a request, and between services.

- Into threads and callbacks: `propagate`; `executor` has a pool that does it.
- Out of a request: `detached`, for work that outlives it.
- Between services: `parse_traceparent` and `TrustPolicy` for what comes in, `outgoing_headers` for the rest.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import re
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar, cast

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, TraceFlags, TraceState

from tracemw import guard
from tracemw.errors import SettingError
from tracemw.identity import clean_id
from tracemw.record import current_record

P = ParamSpec("P")
R = TypeVar("R")

LINKS_KEY: Final = otel_context.create_key("tracemw-links")


# Into threads


def propagate(fn: Callable[P, R]) -> Callable[P, R]:
    """Bind a callable to the current context: called in another thread, it is still in this trace.

    Every call runs in a copy of its own of the context in which `propagate` was called: calls may overlap,
    and none sees what another one sets. Coroutine functions, generators and async generators run each of
    their steps in that copy, whichever task or thread takes the step.

    Args:
        fn: Any callable.

    Returns:
        A callable of the same kind with the same signature.
    """
    # Imported here because it brings asyncio along, which costs as much as the rest of us. What comes back is
    # called without arguments because release 0.7 hands on those of the binding instead of those of the call.
    from contextvars_extras.context_management import (  # type: ignore[import-untyped]
        bind_to_snapshot_context,
    )

    return _bound(fn, bind_to_snapshot_context(contextvars.copy_context))


def _bound(fn: Callable[P, R], context_of_call: Callable[[], contextvars.Context]) -> Callable[P, R]:
    """Return `fn` so that each call runs in the context that `context_of_call` returns for it."""
    target: Any = fn

    def call(*args: Any, **kwargs: Any) -> Any:
        return context_of_call().run(target, *args, **kwargs)

    async def call_coroutine(*args: Any, **kwargs: Any) -> Any:
        context = context_of_call()
        return await _awaited(context, context.run(target, *args, **kwargs))

    def call_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        context = context_of_call()
        return (yield from _steps(context, context.run(target, *args, **kwargs)))

    wrapper: Any = call
    if _is(inspect.iscoroutinefunction, fn):
        wrapper = call_coroutine
    elif _is(inspect.isgeneratorfunction, fn):
        wrapper = call_generator
    elif _is(inspect.isasyncgenfunction, fn):
        wrapper = _async_generator(target, context_of_call)
    return cast("Callable[P, R]", functools.wraps(fn)(wrapper))


def _is(kind: Callable[[object], bool], fn: object) -> bool:
    return kind(fn) or kind(getattr(fn, "__call__", None))  # noqa: B004 - an object with an async __call__


def _steps(context: contextvars.Context, inner: Any) -> Generator[Any, Any, Any]:
    """Do what `yield from` does for a generator or a coroutine, with each of its steps in the context."""
    step, value = inner.send, None
    while True:
        try:
            item = context.run(step, value)
        except StopIteration as stop:
            return stop.value
        finally:
            value = None  # a thrown exception must not stay in its own traceback
        try:
            step, value = inner.send, (yield item)
        except GeneratorExit:
            context.run(inner.close)
            raise
        except BaseException as exc:
            step, value = inner.throw, exc


@types.coroutine
def _awaited(context: contextvars.Context, inner: Any) -> Generator[Any, Any, Any]:
    return (yield from _steps(context, inner))


def _async_generator(target: Any, context_of_call: Callable[[], contextvars.Context]) -> Any:
    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        context = context_of_call()
        inner = context.run(target, *args, **kwargs)
        step, value = inner.asend, None
        while True:
            try:
                item = await _awaited(context, step(value))
            except StopAsyncIteration:
                return
            finally:
                value = None
            try:
                step, value = inner.asend, (yield item)
            except GeneratorExit:
                await _awaited(context, inner.aclose())
                raise
            except BaseException as exc:
                step, value = inner.athrow, exc

    return call


# Out of a request


class detached:
    """Leave the current trace for work that outlives it.

    Inside there is no current span and no trace record; what is begun there is a trace of its own, with none
    of the request's metadata and a link to the span that was current. So a worker that is made on the way of
    a request does not stay in that request's trace for ever.

        with tracemw.detached():
            asyncio.create_task(refresh_cache())

        @tracemw.detached()
        def refresh_cache(): ...    # each call leaves the caller's trace

    Args:
        link: Link to the span that was current. False suits workers that serve everybody from then on.
    """

    def __init__(self, *, link: bool = True) -> None:
        self._link = link
        self._tokens: list[Any] = []

    def __enter__(self) -> None:
        self._tokens.append(otel_context.attach(self._outside()))

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        otel_context.detach(self._tokens.pop())

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Have every call of a function run detached from its caller's trace."""
        return _bound(fn, self._context_of_call)

    def _context_of_call(self) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(otel_context.attach, self._outside())
        return context

    def _outside(self) -> Context:
        links = _links_to(otel_context.get_current()) if self._link else ()
        return Context({LINKS_KEY: links}) if links else Context()


def pending_links(context: Context | None = None) -> tuple[Link, ...]:
    """Return the links that a trace begun in the given (or current) context is to have."""
    return otel_context.get_value(LINKS_KEY, context) or ()  # type: ignore[return-value]


def _links_to(context: Context) -> tuple[Link, ...]:
    span = trace_api.get_current_span(context).get_span_context()
    if not span.is_valid:
        return pending_links(context)
    record = current_record(context)
    # A link into a trace that is not stored would lead nowhere.
    return (Link(span),) if record is None or record.recording else ()


# Between services

MAX_TRACEPARENT: Final = 512  # a future version may be longer than the 55 characters of version 00
MAX_TRACESTATE: Final = 8192
MAX_TRACESTATE_MEMBERS: Final = 32
_KNOWN_FLAGS: Final = 0x03  # sampled, random
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER: Final = re.compile(
    r"([a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)
# W3C Baggage: its limits, and the characters of keys and of values.
MAX_BAGGAGE: Final = 8192
MAX_BAGGAGE_MEMBERS: Final = 180
MAX_BAGGAGE_MEMBER: Final = 4096
_KEY: Final = r"[!#-'*+\-.0-9A-Z^-z|~]+"
_VALUE: Final = r"[!#-+\--:<-\[\]-~]*"
_BAGGAGE: Final = re.compile(
    rf"({_KEY})[ \t]*=[ \t]*({_VALUE}(?:[ \t]*;[ \t]*{_KEY}(?:[ \t]*=[ \t]*{_VALUE})?)*)"
)


def parse_traceparent(value: str | bytes | None, tracestate: str | bytes | None = None) -> SpanContext | None:
    """Read a caller's `traceparent` as W3C Trace Context defines it.

    OpenTelemetry's own propagator writes what is wrong with a `tracestate` to the log; a stranger could fill
    the log that way, so it is checked here, silently.

    Args:
        value: The header, or None.
        tracestate: The header, or None; one that is malformed is left out.

    Returns:
        The caller's span (`is_remote`), None where there is none or it is malformed. Never raises.
    """
    text = _header_text(value, MAX_TRACEPARENT)
    found = _TRACEPARENT.fullmatch(text) if text else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    context = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16) & _KNOWN_FLAGS),
        trace_state=_parse_tracestate(_header_text(tracestate, MAX_TRACESTATE)),
    )
    return context if context.is_valid else None


def _header_text(value: object, limit: int) -> str:
    """Return a header as text, empty where it is too long or no ASCII."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str) or len(value) > limit or not value.isascii():
        return ""
    return value.strip(" \t")


def _parse_tracestate(text: str) -> TraceState:
    members: dict[str, str] = {}
    for part in filter(None, (part.strip(" \t") for part in text.split(","))):
        found = _MEMBER.fullmatch(part)
        if found is None or found.group(1) in members or len(members) == MAX_TRACESTATE_MEMBERS:
            return TraceState()
        members[found.group(1)] = found.group(2)
    return TraceState(list(members.items()))


class TrustPolicy:
    """Who may continue a trace of theirs here: the setting `trust_traceparent`, made ready once.

    Args:
        policy: True (everybody), False (nobody), networks ("10.0.0.0/8", "fd00::/8", single addresses), or a
            callable on the ASGI scope or WSGI environ.

    Raises:
        SettingError: A network cannot be read.
    """

    def __init__(self, policy: bool | Iterable[str] | Callable[[Any], Any] = False) -> None:
        self._decide: Callable[[Any], Any] | None = None
        self._networks: tuple[Any, ...] = ()
        self._all = policy is True
        if callable(policy):
            self._decide = policy
        elif not isinstance(policy, bool):
            self._networks = _networks(policy)
            self._contains = functools.lru_cache(maxsize=1024)(self._contains)  # type: ignore[method-assign]

    def is_trusted(self, peer: str | None, scope: Any = None) -> bool:
        """Say whether the caller of a request is trusted.

        Args:
            peer: Address of the peer of the connection, as the server says it (a server that is told to
                believe a proxy's `X-Forwarded-For` gives the proxy's client). A unix socket has none.
            scope: The ASGI scope or WSGI environ, for a callable.

        Returns:
            False also where a callable fails or answers with a coroutine (both are logged), or the address
            cannot be read.
        """
        if self._decide is not None:
            try:
                return _is_yes(self._decide(scope))
            except Exception as exc:
                guard.report("trust_traceparent", exc)
                return False
        return self._all or (bool(self._networks) and isinstance(peer, str) and self._contains(peer))

    def _contains(self, peer: str) -> bool:
        from ipaddress import ip_address

        try:
            address = ip_address(peer)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)


def _is_yes(answer: Any) -> bool:
    """Say whether a callable's answer means yes; one that would have to be awaited does not."""
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError("the callable answers with something to await; it must return True or False")
    return bool(answer)


def _networks(policy: Iterable[str]) -> tuple[Any, ...]:
    from ipaddress import ip_network

    names = [policy] if isinstance(policy, str) else list(policy)
    try:
        return tuple(ip_network(name, strict=False) for name in names)
    except ValueError as exc:
        raise SettingError(
            f"trust_traceparent: {exc}; it must be True, False, networks like '10.0.0.0/8', or a callable"
        ) from None


def with_baggage(header: str, context: Context) -> Context:
    """Return a context with the baggage of a header.

    OpenTelemetry's own propagator writes each entry that it cannot read to the log; here it is left out.

    Args:
        header: As the caller has sent it.
        context: Gets the baggage.
    """
    if len(header) > MAX_BAGGAGE:
        return context
    from urllib.parse import unquote_plus

    from opentelemetry.baggage import set_baggage

    for member in header.split(",", MAX_BAGGAGE_MEMBERS)[:MAX_BAGGAGE_MEMBERS]:
        found = _BAGGAGE.fullmatch(member.strip(" \t")) if len(member) <= MAX_BAGGAGE_MEMBER else None
        if found is not None:
            context = set_baggage(unquote_plus(found.group(1)), unquote_plus(found.group(2)).strip(), context)
    return context


def outgoing_headers(request_id_header: str | None = "X-Request-ID") -> dict[str, str]:
    """Return the headers that let the next service continue this trace.

        httpx.get(url, headers=tracemw.propagation.outgoing_headers())

    Baggage is left out: what strangers sent must not travel on in our name.

    Args:
        request_id_header: Name of the header for the request id; None leaves it out.

    Returns:
        `traceparent` (and `tracestate`) of the current span, and the request id; empty outside a trace.
    """
    headers: dict[str, str] = {}
    span = trace_api.get_current_span().get_span_context()
    if span.is_valid:
        headers["traceparent"] = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
        if span.trace_state:
            headers["tracestate"] = span.trace_state.to_header()
    record = current_record()
    request_id = clean_id("client_request_id", record.client_request_id) if record is not None else None
    if request_id and request_id_header:
        headers[request_id_header] = request_id
    return headers
