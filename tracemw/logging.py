"""Trace, request, session and user ids on log records, so that a line leads to its trace and back.

    import tracemw.logging
    tracemw.logging.install()                                   # the root logger's handlers
    tracemw.logging.install("uvicorn.access", append=True)      # uvicorn's access lines, ids at their end

or in a `logging` configuration:

    "filters": {"trace": {"()": "tracemw.logging.TraceContextFilter"}},
    "handlers": {"console": {"filters": ["trace"], ...}},
    "formatters": {"default": {"format": "%(levelname)s [%(trace_id)s %(client_request_id)s] %(message)s"}},

gunicorn writes its access line when the request is over and takes what it needs from the response's headers:
set `access_log_format` to `GUNICORN_ACCESS_FORMAT` in its configuration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import trace as trace_api

from tracemw.record import TraceRecord, current_record

FIELDS: Final = ("trace_id", "span_id", "client_request_id", "session_id", "user_id")
FORMAT: Final = "%(asctime)s %(levelname)s %(name)s [%(trace_id)s %(client_request_id)s] %(message)s"

_QUOTED: Final = re.compile(r'["\\]')

# gunicorn's own default, and the two headers that the middleware puts on every response.
GUNICORN_ACCESS_FORMAT: Final = (
    '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s"'
    " trace_id=%({x-trace-id}o)s client_request_id=%({x-request-id}o)s"
)


class TraceContextFilter(logging.Filter):
    """Puts `trace_id`, `span_id`, `client_request_id`, `session_id` and `user_id` on records; drops none.

    Put it on handlers: a logger's filters do not see what its children log. A field that the record has
    already stays as it is (the application's own `extra`, or an earlier filter in another thread, as with a
    `QueueHandler`). Whatever an id holds, it is one word or phrase on the same line: characters that are not
    printable are written as escapes.

    Args:
        missing: What a field is outside a request, or where the request has no such id.
    """

    def __init__(self, missing: str | None = "-") -> None:
        super().__init__()
        self._missing = missing

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete a record; always True."""
        fields = record.__dict__
        try:
            found = _ids(current_record())
        except Exception:  # a log call must not fail because of us
            found = {}
        for name in FIELDS:
            if name not in fields:
                fields[name] = found.get(name, self._missing)
        return True


class _Appending(logging.Formatter):
    """Another formatter's text with the ids at the end of its first line."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        first, newline, rest = self.inner.format(record).partition("\n")
        return f"{first} {_pairs(record.__dict__)}{newline}{rest}"


def install(logger: logging.Logger | str | None = None, *, append: bool = False) -> None:
    """Put the ids on every record that a logger's handlers write.

    A root logger without handlers gets one first, as with `logging.basicConfig`, that shows the ids. Calling
    it again changes nothing. (A log record factory would reach every handler at once, but then an
    application's `extra={"user_id": ...}` raises.)

    Args:
        logger: A logger or its name; the root logger by default.
        append: Also write the ids at the end of each line, for handlers whose format does not name them.
    """
    chosen = logger if isinstance(logger, logging.Logger) else logging.getLogger(logger)
    if chosen is logging.getLogger() and not chosen.handlers:
        logging.basicConfig(format=FORMAT)
        append = False
    for handler in chosen.handlers:
        if not any(isinstance(present, TraceContextFilter) for present in handler.filters):
            handler.addFilter(TraceContextFilter())
        if append and not isinstance(handler.formatter, _Appending):
            handler.setFormatter(_Appending(handler.formatter or logging.Formatter()))


def describe(record: TraceRecord | None) -> str:
    """Return the ids of a trace as one phrase for a log line.

    Args:
        record: The trace's record, None outside a request.

    Returns:
        `trace_id=tr-... client_request_id=... session_id=... user_id=...`, `-` where there is none; values
        with blanks or quotes are quoted.
    """
    return _pairs(_ids(record))


def _pairs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_word(values.get(name) or '-')}" for name in FIELDS if name != "span_id")


def _word(value: object) -> str:
    text = _on_one_line(str(value))
    return f'"{_QUOTED.sub(_escaped, text)}"' if _QUOTED.search(text) or " " in text else text


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found.group()}"


def _ids(record: TraceRecord | None) -> dict[str, str]:
    if record is None:
        return {}
    found = {
        "client_request_id": record.client_request_id,
        "session_id": record.session_id,
        "user_id": record.user_id,
    }
    if record.recording:
        found["trace_id"] = f"tr-{record.trace_id:032x}"
        span = trace_api.get_current_span().get_span_context()
        if span.trace_id == record.trace_id:
            found["span_id"] = f"{span.span_id:016x}"
    return {name: _on_one_line(value) for name, value in found.items() if value}


def _on_one_line(value: str) -> str:
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
