"""The sink for development: one line on stderr for each trace that ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracemw.store.rows import SpanRow, TraceRow

RECENT: Final = 1000  # ended traces remembered, so that a later change of one prints no second line
WIDTH: Final = 100  # characters of one value


class ConsoleSink:
    """Prints a line per ended trace; keeps nothing.

    Args:
        stream: Where to print; None is whatever `sys.stderr` is at that time.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._printed: dict[str, None] = {}

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        """Print the traces that have ended since the last call.

        A console that is gone (closed, a broken pipe) loses lines and nothing else.
        """
        lines = [line(trace, spans) for trace in traces if self._is_new(trace)]
        stream = self._stream or sys.stderr
        if not lines or stream is None:  # a process without a console has no stderr
            return
        text = "".join(f"{each}\n" for each in lines)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except (OSError, ValueError):
            pass

    def stats(self) -> dict[str, str]:
        """Return where traces go."""
        return {"destination": "console:"}

    def _is_new(self, trace: TraceRow) -> bool:
        if trace.duration_ns is None or trace.trace_id in self._printed:
            return False
        self._printed[trace.trace_id] = None
        if len(self._printed) > RECENT:
            del self._printed[next(iter(self._printed))]
        return True


def line(trace: TraceRow, spans: Iterable[SpanRow] = ()) -> str:
    """Return one line about an ended trace, without any character that a terminal would act upon.

    Args:
        trace: The trace.
        spans: Spans written along with it; the root's message says what went wrong.
    """
    milliseconds = (trace.duration_ns or 0) / 1e6
    what = f"{trace.method} {trace.route}" if trace.method and trace.route else trace.name
    parts = [_clock(trace.start_ns), _plain(what)]
    if trace.status_code is not None:
        parts.append(str(trace.status_code))
    if trace.state != "OK":
        parts.append(_plain(trace.state if trace.state == "ERROR" else trace.outcome or trace.state))
    parts.append(f"{milliseconds:.1f} ms")
    for label, value in (("user", trace.user_id), ("session", trace.session_id)):
        if value is not None:
            parts.append(f"{label}={_plain(value)}")
    parts.append(f"tr-{trace.trace_id}")
    message = next((span.status_message for span in spans if _is_root(span, trace)), None)
    if trace.state == "ERROR" and message:
        parts.append(_plain(message))
    return "  ".join(parts)


def _is_root(span: SpanRow, trace: TraceRow) -> bool:
    return span.trace_id == trace.trace_id and span.span_id == trace.root_span_id


def _clock(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1_000_000:03d}"


def _plain(text: str) -> str:
    """Escape what is not printable (control and format characters, surrogates) and shorten."""
    if len(text) > WIDTH:
        text = text[: WIDTH - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
