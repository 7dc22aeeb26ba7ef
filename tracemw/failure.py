"""Exceptions that leave a span's code: what is recorded of them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.trace import Status, StatusCode

EVENT: Final = "exception"
TYPE: Final = "exception.type"
MESSAGE: Final = "exception.message"
STACKTRACE: Final = "exception.stacktrace"

MESSAGE_LIMIT: Final = 4_000  # characters
STACKTRACE_LIMIT: Final = 32_000

# RFC 6455 §7.4.1: protocol errors and a failed server; with 1000, 1001 and 1012 (a restart) connections end.
FAILED_CLOSES: Final = frozenset({1002, 1003, 1007, 1009, 1010, 1011, 1013, 1014, 1015})
ABNORMAL_CLOSE: Final = 1006  # there was no close: the connection broke off

# By name, since nothing is imported for them; of asyncio, trio and greenlet (gevent).
_CANCELLED: Final = frozenset({"CancelledError", "Cancelled", "GreenletExit", "GeneratorExit"})


def outcome_of(exc: BaseException) -> str | None:
    """Return how a span ended that was left by this exception; None where that is an error.

    No errors are: a cancelled task, a closed generator, and the process told to stop. Others that are no
    `Exception` are: a time-out that has to get past `except Exception` (gevent.Timeout) is one.
    """
    if isinstance(exc, Exception):
        return None
    if isinstance(exc, (KeyboardInterrupt, SystemExit)):
        return "interrupted"
    children = getattr(exc, "exceptions", None)  # BaseExceptionGroup, Python 3.11
    if isinstance(children, tuple) and children:
        outcomes = [outcome_of(child) for child in children]
        return None if None in outcomes else outcomes[0]
    return "cancelled" if any(kind.__name__ in _CANCELLED for kind in type(exc).__mro__) else None


def outcome_of_span(exc: BaseException) -> str | None:
    """Return how a span of code ended that was left by this exception; None where that is an error.

    `WebSocketDisconnect` is how Starlette tells the application of the end of a connection, whatever its code.
    """
    if type(exc).__name__ != "WebSocketDisconnect":
        return outcome_of(exc)
    code = getattr(exc, "code", None)
    if code in FAILED_CLOSES:
        return None
    return "disconnected" if code == ABNORMAL_CLOSE else "completed"


def outcome_of_request(exc: BaseException) -> str:
    """Return how a request ended whose application this exception left.

    `SystemExit` cuts the client off: gunicorn ends a worker with it whose request took too long.
    """
    return "error" if isinstance(exc, SystemExit) or outcome_of(exc) is None else "cancelled"


def exception_attributes(exc: BaseException) -> dict[str, str]:
    """Return the attributes of an `exception` event, bounded in size."""
    try:
        told = traceback.TracebackException.from_exception(exc, compact=True)
        _without_positions(told)
        trace = "".join(told.format())
    except BaseException:  # what cannot be formatted; its own code may raise anything, and must not win over it
        trace = f"{_type_name(exc)}: {_message(exc)}"
    return {
        TYPE: _type_name(exc),
        MESSAGE: _bounded(_message(exc), MESSAGE_LIMIT),
        STACKTRACE: _tail(_clean(trace), STACKTRACE_LIMIT),
    }


def _without_positions(told: Any) -> None:
    """Leave out the marks below the lines of the code: Python parses each line to place them.

    That takes most of the time, and it must not be done while the application parses code: a request that was
    dropped ends wherever the garbage collector runs, and CPython's parser cannot be entered twice (SystemError).
    """
    waiting, seen = [told], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        for frame in one.stack:
            if hasattr(frame, "colno"):  # Python 3.11
                frame.colno = frame.end_colno = None
        waiting += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]


def description(exc: BaseException) -> str:
    """Return the status description: `ValueError: boom`."""
    return _bounded(f"{_type_name(exc)}: {_message(exc)}", MESSAGE_LIMIT)


def record_exception(span: Any, exc: BaseException) -> None:
    """Record an exception on an OpenTelemetry span as one event, and mark the span as failed.

    The same exception is recorded once, though the application may have recorded it before it let it go.
    """
    attributes = exception_attributes(exc)
    if not _is_recorded(span, attributes):
        span.add_event(EVENT, attributes)
    span.set_status(Status(StatusCode.ERROR, description(exc)))


def last_recorded(span: Any) -> Mapping[str, Any] | None:
    """Return the attributes of the last exception recorded on a span."""
    for event in reversed(getattr(span, "events", None) or ()):
        if event.name == EVENT:
            return event.attributes  # type: ignore[no-any-return]
    return None


def _is_recorded(span: Any, attributes: dict[str, str]) -> bool:
    for event in reversed(getattr(span, "events", None) or ()):
        if event.name == EVENT:
            before = event.attributes or {}
            return before.get(MESSAGE) == attributes[MESSAGE] and str(before.get(TYPE, "")).endswith(
                attributes[TYPE]
            )
    return False


def _type_name(exc: BaseException) -> str:
    return type(exc).__name__


def _message(exc: BaseException) -> str:
    try:
        return _clean(str(exc))
    except BaseException:  # its own code, likewise
        return "(its text cannot be had)"


def _clean(text: str) -> str:
    """Return text that can be encoded: a lone surrogate is written as its escape."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _tail(text: str, limit: int) -> str:
    """Cut a stack trace at its beginning: its end says what happened."""
    return text if len(text) <= limit else f"({len(text)} characters) …{text[-limit:]}"
