"""The trace and the request that the running code belongs to: what is known of them, and what can be added."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api

from tracemw import scope as scopes
from tracemw.guard import due
from tracemw.identity import check_id
from tracemw.record import RECORD_KEY, SESSION_METADATA, USER_METADATA, TraceRecord, current_record, record_of
from tracemw.scope import DEFAULTS_KEY, Defaults, defaults_in

logger = logging.getLogger("tracemw")

FOREVER: Final = float("inf")


def update_current_trace(
    tags: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    client_request_id: str | None = None,
    request_preview: str | None = None,
    response_preview: str | None = None,
    state: Any = None,
    model_id: str | None = None,
    session_id: str | None = None,
    user: str | None = None,
) -> None:
    """Add to what is known of the current trace, from any depth and any thread that carries the context.

    Once the trace has ended (in a background task), the stored trace is changed. Outside a trace nothing
    happens, and a warning says so once.

    Args:
        tags: Added to the trace's tags; other values than strings are stored as their `str`.
        metadata: Added to the trace's metadata, likewise.
        client_request_id: The caller's id of the request.
        request_preview: Shown instead of a preview made from the inputs.
        response_preview: Shown instead of a preview made from the outputs.
        state: "OK" or "ERROR": the trace's state, whatever its spans say.
        model_id: The model version that the trace is about.
        session_id: The session (conversation) that the trace belongs to. One that is too long or has control
            characters is refused with a warning, never shortened.
        user: The user that the trace belongs to, likewise; wins over what a header claimed.

    Raises:
        TracemwError: `state` is something else, a preview is no string (as in MLflow), or tags or metadata are no
            dictionary. Nothing was changed.
    """
    record = _current()
    if record is None:
        if due("update_current_trace outside a trace", FOREVER):
            logger.warning(
                "update_current_trace was called where there is no trace, and did nothing. Call it inside "
                "a request that the middleware traces, a function with @tracemw.trace or a start_span block; "
                "in another thread, carry the context there with tracemw.propagate. (Said once.)"
            )
        return
    record.update(
        tags=tags,
        metadata=_checked_metadata(metadata),
        client_request_id=checked("client_request_id", client_request_id),
        session_id=checked("session_id", session_id),
        user=checked("user_id", user),
        request_preview=request_preview,
        response_preview=response_preview,
        state=state,
        model_id=model_id,
    )


def checked(field: str, value: object) -> str | None:
    """Return an id that code has set, or None (with a warning) where it cannot be used as it is."""
    try:
        return check_id(field, value)
    except ValueError as exc:
        logger.warning("%s; it is left out", exc)
        return None


def _checked_metadata(metadata: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not isinstance(metadata, Mapping) or not (SESSION_METADATA in metadata or USER_METADATA in metadata):
        return metadata
    made = dict(metadata)
    for key, field in ((SESSION_METADATA, "session_id"), (USER_METADATA, "user_id")):
        if key in made:
            value = checked(field, made.pop(key))
            if value is not None:
                made[key] = value
    return made


def get_active_trace_id() -> str | None:
    """Return the id of the current trace, `tr-` and 32 hexadecimal digits; None where nothing is recorded."""
    record = _current()
    if record is not None:
        return f"tr-{record.trace_id:032x}" if record.recording else None
    span = trace_api.get_current_span()
    return f"tr-{span.get_span_context().trace_id:032x}" if span.is_recording() else None


def get_last_active_trace_id(thread_local: bool = False) -> str | None:
    """Return the id of the trace that ended last in this process, None before the first one.

    Args:
        thread_local: The one that ended last in this thread.
    """
    return scopes.last_trace_id(thread_local)


@contextmanager
def context(
    metadata: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    enabled: bool | None = None,
    session_id: str | None = None,
    user: str | None = None,
) -> Iterator[None]:
    """Say what the traces that begin inside the block have in common; blocks nest, and the inner one wins.

    Args:
        metadata: Of each trace.
        tags: Of each trace.
        enabled: False records nothing inside, True records although `disable()` was called or an outer block
            says False.
        session_id: The session of each trace.
        user: The user of each trace.
    """
    before = otel_context.get_current()
    outer = defaults_in(before)
    inner = Defaults(
        {**(outer.metadata if outer else {}), **(_checked_metadata(metadata) or {})},
        {**(outer.tags if outer else {}), **(tags or {})},
        checked("session_id", session_id) or (outer.session_id if outer else None),
        checked("user_id", user) or (outer.user if outer else None),
        enabled if enabled is not None else (outer.enabled if outer else None),
        outer.suppressed if outer else None,
    )
    after = _with_record_for(enabled, before, outer, inner)
    after = otel_context.set_value(DEFAULTS_KEY, inner, after)
    otel_context.attach(after)
    try:
        yield
    finally:
        if otel_context.get_current() is after:
            otel_context.attach(before)


def _with_record_for(
    enabled: bool | None, before: otel_context.Context, outer: Defaults | None, inner: Defaults
) -> otel_context.Context:
    """Take the record out of the context where tracing is off inside, and back in where it is on again."""
    if enabled is False:
        if outer is None or outer.enabled is not False:
            inner.suppressed = current_record(before)
        return otel_context.set_value(RECORD_KEY, TraceRecord(0, 0, recording=False), before)
    if enabled is True and outer is not None and outer.enabled is False:
        return otel_context.set_value(RECORD_KEY, inner.suppressed, before)
    return before


def _current() -> TraceRecord | None:
    record = current_record()
    if record is not None:
        return record
    span = trace_api.get_current_span().get_span_context()
    return record_of(span.trace_id, span.span_id)


class CurrentRequest:
    """The request being handled where it is asked: `tracemw.current_request.session_id`. All None outside one."""

    __slots__ = ()

    @property
    def client_request_id(self) -> str | None:
        """The caller's id of the request, or the one that was generated."""
        record = self._record
        return None if record is None else record.client_request_id

    @property
    def session_id(self) -> str | None:
        """The session, from a header or from the application's code."""
        record = self._record
        return None if record is None else record.session_id

    @property
    def user_id(self) -> str | None:
        """The user, from a header, the framework's authentication or the application's code."""
        record = self._record
        return None if record is None else record.user_id

    @property
    def trace_id(self) -> str | None:
        """The id of the request's trace; None where it is not recorded."""
        record = self._record
        return f"tr-{record.trace_id:032x}" if record is not None and record.recording else None

    @property
    def _record(self) -> TraceRecord | None:
        record = current_record()
        return record if record is not None and record.is_request else None

    def __bool__(self) -> bool:
        return self._record is not None

    def __repr__(self) -> str:
        facts = "client_request_id", "session_id", "user_id", "trace_id"
        return f"CurrentRequest({', '.join(f'{fact}={getattr(self, fact)!r}' for fact in facts)})"


current_request: Final = CurrentRequest()
